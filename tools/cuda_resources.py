"""Resources of every compiled CUDA kernel: registers, local memory (spills), shared memory, occupancy, tensor-core
instructions; of the kernels for sm_90a also bulk copies and the registers of their warpgroups.

    python -m tools.cuda_resources      # writes docs/cuda_resources.md

Needs nvcc, cuobjdump (the toolkit's or triton's) and the emulator (tests/emulator), but no GPU: the host code runs on
the emulator, which records each launch without running the kernel. tests/cuda/test_resources.py compares the built
library with the table.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import torch

from .compilers import CSRC, ROOT, build_tools, cuobjdump, files, locked, ninja_path, nvcc, output_name, run_ninja

TABLE = ROOT / "docs" / "cuda_resources.md"
ARCHITECTURES = (80, 86, 90)
SM90A = ("90a",)  # of the files that build_tools.SM90A_SUFFIX names
# The system reserves these of every block from sm_80 on. cuobjdump includes them from sm_90 on, for kernels that use
# shared memory.
RESERVED_SHARED_BYTES = 1024
REGISTERS = 65536  # of a multiprocessor
# What ptxas prints, as information, where the products of a warpgroup do not overlap as they are written: serialised
# (C7510, C7511 and others), waits and fences that it inserts (C7517, C7519), setmaxnreg that it ignores (C7508).
FAULTS = re.compile(r"^ptxas.*\(C75\d\d\).*$", re.MULTILINE)


@dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_bytes: int
    warps: int
    blocks: int


MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 64, 32),
    86: Multiprocessor(100 * 1024, 48, 16),
    90: Multiprocessor(228 * 1024, 64, 32),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for one architecture."""

    name: str
    architecture: int  # 90 for sm_90 and for sm_90a
    registers: int  # of a thread at the launch
    local_bytes: int  # per thread: spilled registers, or an array indexed at run time
    static_shared_bytes: int
    # Counts in the SASS.
    tensor_core_instructions: int  # of a warp (HMMA)
    warpgroup_products: int  # HGMMA
    bulk_copies: int  # UTMALDG
    warpgroup_registers: tuple[int, ...]  # what setmaxnreg sets, in increasing order


@dataclass(frozen=True, order=True)
class Launch:
    dynamic_shared_bytes: int
    threads: int


def blocks_per_multiprocessor(kernel: Kernel, launch: Launch) -> int:
    limits = MULTIPROCESSORS[kernel.architecture]
    warps = -(-launch.threads // 32)
    registers_of_a_warp = -(-kernel.registers * 32 // 256) * 256
    shared = launch.dynamic_shared_bytes + kernel.static_shared_bytes + RESERVED_SHARED_BYTES
    return min(
        REGISTERS // (registers_of_a_warp * warps), limits.warps // warps, limits.shared_bytes // shared, limits.blocks
    )


# ---- compiled kernels ------------------------------------------------------------------------------------------------


def nvcc_release() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names to names like "weighted_sum_kernel<...>"."""
    if not names:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def short(name: str) -> str:
    """A demangled name without return type, parameters and namespaces."""
    name = re.sub(r"^void |segattn::cuda::|__nv_|\(anonymous namespace\)::", "", name)
    return re.sub(r" (?=>)", "", re.sub(r"\([^()]*\)$", "", name))


def _dump(option: str, file: Path) -> str:
    return subprocess.run([cuobjdump(), option, str(file)], capture_output=True, text=True, check=True).stdout


def read(file: Path) -> list[Kernel]:
    """The kernels of a fat binary or of a shared library."""
    instructions = {}
    for part in re.split(r"code for sm_", _dump("-sass", file))[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        for function in part.split("Function : ")[1:]:
            name = function.split("\n", 1)[0].strip()
            counts = [len(re.findall(rf"\b{opcode}\.", function)) for opcode in ("HMMA", "HGMMA", "UTMALDG")]
            registers = re.findall(r"\bUSETMAXREG\.[^;]*?(0x[0-9a-f]+) ;", function)
            instructions[architecture, name] = (*counts, tuple(sorted({int(number, 16) for number in registers})))
    found = {}
    for part in re.split(r"^arch = sm_", _dump("-res-usage", file), flags=re.MULTILINE)[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for name, registers, stack, shared, local in re.findall(usage, part):
            static = max(int(shared) - (RESERVED_SHARED_BYTES if architecture >= 90 else 0), 0)
            found[architecture, name] = (int(registers), int(stack) + int(local), static)
    names = readable(sorted({name for _, name in found}))
    return [
        Kernel(names[name], architecture, *figures, *instructions[architecture, name])
        for (architecture, name), figures in sorted(found.items())
    ]


def library() -> Path | None:
    """The CUDA library built in place, None if absent."""
    return next((ROOT / "segattn_ops").glob("_C_cuda*.so"), None)


def sources() -> list[Path]:
    """The files that are compiled for the architectures of a build."""
    return [file for file in sorted((CSRC / "cuda").rglob("*.cu")) if not file.name.endswith(build_tools.SM90A_SUFFIX)]


def sm90a_sources() -> list[Path]:
    """The files that are compiled for sm_90a alone."""
    return sorted((CSRC / "cuda").rglob(f"*{build_tools.SM90A_SUFFIX}"))


def fat_binaries(files: list[Path], architectures: tuple[int | str, ...] = ARCHITECTURES) -> list[Path]:
    """Compiles some sources. ninja keeps the fat binaries in build/cuda_resources and compiles what changed.

    Raises:
        RuntimeError: if a file does not compile, or if ptxas prints one of :data:`FAULTS` for it.
    """
    from torch.utils import cpp_extension

    folder = ROOT / "build" / "cuda_resources" / "_".join(map(str, architectures))
    flags = list(build_tools.NVCC_FLAGS)
    flags += [f"-I{path}" for path in (CSRC, *cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = f"{nvcc()} {' '.join(flags)} -MD -MF $out.d -fatbin $in -o $out"
    lines = ["rule compile", f"  command = {command} > $out.log 2>&1 || (cat $out.log; false)"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    binaries = {file: output_name(file, ".fatbin") for file in files}
    lines += [f"build {ninja_path(binary)}: compile {ninja_path(file)}" for file, binary in binaries.items()]
    with locked(folder):
        run_ninja(folder, "\n".join(lines) + "\n")
    found = [folder / binary for binary in binaries.values()]
    faults = [line for binary in found for line in FAULTS.findall(Path(f"{binary}.log").read_text())]
    if faults:
        raise RuntimeError("\n".join(["ptxas did not compile wgmma or setmaxnreg as written:", *faults]))
    return found


def compiled(files: list[Path], architectures: tuple[int | str, ...] = ARCHITECTURES) -> list[Kernel]:
    """The kernels of some sources."""
    kernels = [kernel for binary in fat_binaries(files, architectures) for kernel in read(binary)]
    unique = {(k.name, k.architecture): k for k in kernels}
    return [unique[key] for key in sorted(unique)]


# ---- launches --------------------------------------------------------------------------------------------------------

# (key_channels, value_channels, height and width) of the problems whose launches are recorded: the papers' sizes first,
# then sizes that take the other paths. The first problem that launches a kernel decides its row.
PROBLEMS = ((64, 512, 97), (64, 128, 97), (200, 512, 97), (200, 128, 97), (1024, 512, 97), (8, 8, 300))
# Of position attention for sm_90a, after those: two key tiles, and an odd number of owned tiles.
SM90A_PROBLEMS = ((128, 512, 97), (128, 128, 97), (64, 640, 8), (128, 512, 8))
# (dtype, whether TF32 is allowed)
DTYPES = (
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.float32, True),
    (torch.float32, False),
    (torch.float64, False),
)


def _call(
    operators, key_channels: int, value_channels: int, side: int, dtype: torch.dtype, only_position: bool
) -> None:
    """Calls the operators forward and backward on one sample of side x side positions."""

    def call(operator: str, *arguments) -> None:
        result = getattr(operators, operator)(*arguments)
        output = result if isinstance(result, torch.Tensor) else result[0]
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    def features(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, dtype=dtype, requires_grad=True)

    query, key = features(key_channels, side, side), features(key_channels, side, side)
    value, weights = features(value_channels, side, side), features(2 * side - 1, side, side)
    call("position_attention", query, key, value, 1.0)
    call("position_attention", query, key, value, 1.0, False, torch.zeros(1, side, side, dtype=torch.bool))
    call("position_attention_partial", query, key, value, 1.0)
    if only_position:
        return
    call("criss_cross_attention", query, key, value, 1.0)
    call("criss_cross_rows", query, key, value, 1.0)
    call("criss_cross_columns", query, key, value, 1.0)
    call("criss_cross_affinity", query, key)
    call("criss_cross_aggregation", weights, value)
    few = [features(value_channels, 8, 8) for _ in range(3)]  # small: torch's own products do run
    call("channel_attention", *few, 1.0)
    call("channel_self_attention", few[0], 1.0)
    gamma = torch.ones(1, value_channels, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    call("channel_self_attention", few[0], 1.0, gamma)
    call("channel_energy", *few[:2])
    call("channel_energy", few[0])
    energy = torch.zeros(1, value_channels, value_channels, dtype=gamma.dtype, requires_grad=True)
    call("channel_apply", energy, few[0], 1.0, gamma)


def _largest(reports: list[dict]) -> dict[str, Launch]:
    """The largest launch of each kernel."""
    found: dict[str, Launch] = {}
    for report in reports:
        name, (x, y, z) = short(report["kernel"]), report["block"]
        launch = Launch(report["dynamic_shared_bytes"], x * y * z)
        found[name] = max(launch, found.get(name, launch))
    return found


def launches(emulator: ModuleType, architectures: tuple[int, ...] = ARCHITECTURES) -> dict[tuple[str, int], Launch]:
    """The launch of each (kernel, architecture) in the first problem that needs the kernel: the largest block of
    several launches (criss-cross attention uses different blocks for columns and rows).

    Args:
        emulator: the control module that ``tests.emulator.build.load`` returns.
    """
    operators = torch.ops.segattn_emulated
    found: dict[tuple[str, int], Launch] = {}
    emulator.set_blocks_at_ends(0)
    try:
        for architecture, (dtype, tf32) in product(architectures, DTYPES):
            calls = [(sizes, False, False) for sizes in PROBLEMS]
            if architecture == 90 and dtype.itemsize == 2:
                calls += [(sizes, True, True) for sizes in PROBLEMS + SM90A_PROBLEMS]
            for sizes, only_position, has_sm90a in calls:
                emulator.set_device(architecture)
                emulator.set_built_for_sm90a(has_sm90a)
                operators._set_allow_tf32(tf32)
                emulator.reset()
                _call(operators, *sizes, dtype, only_position)
                for name, launch in _largest(emulator.report()).items():
                    found.setdefault((name, architecture), launch)
    finally:
        emulator.set_blocks_at_ends(-1)
        emulator.set_built_for_sm90a(True)
        operators._set_allow_tf32(False)
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


WARPGROUP_COLUMNS = ("kernel", "registers", "by setmaxnreg", "threads", "KiB", "blocks", "HGMMA", "UTMALDG")


def cell(kernel: Kernel, launch: Launch | None) -> str:
    parts = [f"{kernel.registers}", "-", "-", "-", f"{kernel.tensor_core_instructions}"]
    if launch is not None:
        parts[1] = f"{launch.threads}"
        parts[2] = f"{launch.dynamic_shared_bytes / 1024:.1f}"
        parts[3] = f"{blocks_per_multiprocessor(kernel, launch)}"
    if kernel.local_bytes:
        parts[0] += f" (+{kernel.local_bytes} B local)"
    return " / ".join(parts)


def is_twin(name: str, names: Container[str]) -> bool:
    """Whether a kernel is the float16 twin of a bfloat16 one, which the tables list instead."""
    return "__half" in name and name.replace("__half", "bfloat16") in names


def warpgroup_cells(kernel: Kernel, launch: Launch | None) -> list[str]:
    """The cells of a kernel for sm_90a after its name."""
    launched = ["-", "-", "-"]
    if launch is not None:
        blocks = blocks_per_multiprocessor(kernel, launch)
        launched = [f"{launch.threads}", f"{launch.dynamic_shared_bytes / 1024:.1f}", f"{blocks}"]
    registers = f"{kernel.registers} (+{kernel.local_bytes} B local)" if kernel.local_bytes else f"{kernel.registers}"
    budgets = " / ".join(map(str, kernel.warpgroup_registers)) or "-"
    return [registers, budgets, *launched, f"{kernel.warpgroup_products}", f"{kernel.bulk_copies}"]


def warpgroup_rows(kernels: list[Kernel], found: dict[tuple[str, int], Launch]) -> Iterator[str]:
    of_warpgroups = {kernel.name: kernel for kernel in kernels if kernel.warpgroup_products}
    for name, kernel in sorted(of_warpgroups.items()):
        if not is_twin(name, of_warpgroups):
            cells = warpgroup_cells(kernel, found.get((name, kernel.architecture)))
            yield f"| `{name}` | " + " | ".join(cells) + " |"


def rows(kernels: list[Kernel], found: dict[tuple[str, int], Launch]) -> Iterator[str]:
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        if not kernel.warpgroup_products:
            by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for name, of in sorted(by_name.items()):
        if is_twin(name, by_name):
            continue
        cells = [cell(of[a], found.get((name, a))) if a in of else "" for a in ARCHITECTURES]
        yield f"| `{name}` | {max(k.static_shared_bytes for k in of.values())} | " + " | ".join(cells) + " |"


def table(kernels: list[Kernel], found: dict[tuple[str, int], Launch]) -> str:
    spilling = sum(k.local_bytes > 0 for k in kernels)
    problems, more = (", ".join(f"({e}, {c}, {side})" for e, c, side in of) for of in (PROBLEMS, SM90A_PROBLEMS))
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Written by `python -m tools.cuda_resources` with nvcc {nvcc_release()}; `tests/cuda/test_resources.py`",
        "compares the built library with it. For each architecture: registers per thread / threads per block /",
        "dynamic shared memory in KiB / blocks per multiprocessor / tensor-core instructions in the SASS. The launch",
        "is that of the first problem that needs the kernel on the architecture, the largest block of several; a dash",
        "means that no problem does. The float16 kernels are left out: they are the bfloat16 ones with another `mma`.",
        "",
        f"The problems, as (E, C, height and width): {problems}.",
        "",
        f"{spilling} of {len(kernels)} kernels, counted per architecture, use local memory (spilled registers); these",
        'are marked "B local", with the bytes per thread.',
        "",
        "| kernel | static shared bytes | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
        *rows(kernels, found),
        "",
        "## Kernels for sm_90a",
        "",
        "Registers per thread at the launch and after `setmaxnreg`, of the producer warpgroup / of the consumers;",
        "products of a warpgroup (HGMMA) and bulk tensor copies (UTMALDG) in the SASS. ptxas compiles all products as",
        "written: none is serialised, no wait is inserted, no `setmaxnreg` ignored; its messages about these fail the",
        f"command and the test. The problems are those above, and {more}.",
        "",
        f"| {' | '.join(WARPGROUP_COLUMNS)} |",
        "|---" * len(WARPGROUP_COLUMNS) + "|",
        *warpgroup_rows(kernels, found),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    from tests.emulator import build  # here: the emulator's tests import this module

    argparse.ArgumentParser(
        prog="python -m tools.cuda_resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    for tool in (nvcc, cuobjdump):
        if tool() is None:
            reason = f"no {tool.__name__} on PATH or where CUDA is usually installed"
            print(f"python -m tools.cuda_resources: {reason}", file=sys.stderr)
            return 2
    kernels = compiled(sources()) + compiled(sm90a_sources(), SM90A)
    files.write_text(TABLE, table(kernels, launches(build.load("plain"))))
    print(TABLE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
