"""Resources of every compiled CUDA kernel: registers, local memory (spills), shared memory, occupancy, tensor-core
instructions.

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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import torch

from .compilers import CSRC, ROOT, build_tools, cuobjdump, locked, ninja_path, nvcc, output_name, run_ninja

TABLE = ROOT / "docs" / "cuda_resources.md"
ARCHITECTURES = (80, 86, 90)
# The system reserves these of every block from sm_80 on. cuobjdump includes them from sm_90 on, for kernels that use
# shared memory.
RESERVED_SHARED_BYTES = 1024
REGISTERS = 65536  # of a multiprocessor


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
    architecture: int
    registers: int
    local_bytes: int  # per thread: spilled registers, or an array indexed at run time
    static_shared_bytes: int
    tensor_core_instructions: int  # in the SASS


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
    tensor_core = {}
    for part in re.split(r"code for sm_", _dump("-sass", file))[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        for function in part.split("Function : ")[1:]:
            name = function.split("\n", 1)[0].strip()
            tensor_core[architecture, name] = len(re.findall(r"\bHMMA\.", function))
    found = {}
    for part in re.split(r"^arch = sm_", _dump("-res-usage", file), flags=re.MULTILINE)[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for name, registers, stack, shared, local in re.findall(usage, part):
            static = max(int(shared) - (RESERVED_SHARED_BYTES if architecture >= 90 else 0), 0)
            found[architecture, name] = (int(registers), int(stack) + int(local), static)
    names = readable(sorted({name for _, name in found}))
    return [
        Kernel(names[name], architecture, *figures, tensor_core[architecture, name])
        for (architecture, name), figures in sorted(found.items())
    ]


def library() -> Path | None:
    """The CUDA library built in place, None if absent."""
    return next((ROOT / "segattn_ops").glob("_C_cuda*.so"), None)


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").rglob("*.cu"))


def fat_binaries(files: list[Path], architectures: tuple[int, ...] = ARCHITECTURES) -> list[Path]:
    """Compiles some sources. ninja keeps the fat binaries in build/cuda_resources and compiles what changed."""
    from torch.utils import cpp_extension

    folder = ROOT / "build" / "cuda_resources" / "_".join(map(str, architectures))
    flags = list(build_tools.NVCC_FLAGS)
    flags += [f"-I{path}" for path in (CSRC, *cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    lines = ["rule compile", f"  command = {nvcc()} {' '.join(flags)} -MD -MF $out.d -fatbin $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    binaries = {file: output_name(file, ".fatbin") for file in files}
    lines += [f"build {ninja_path(binary)}: compile {ninja_path(file)}" for file, binary in binaries.items()]
    with locked(folder):
        run_ninja(folder, "\n".join(lines) + "\n")
    return [folder / binary for binary in binaries.values()]


def compiled(files: list[Path], architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """The kernels of some sources."""
    kernels = [kernel for binary in fat_binaries(files, architectures) for kernel in read(binary)]
    unique = {(k.name, k.architecture): k for k in kernels}
    return [unique[key] for key in sorted(unique)]


# ---- launches --------------------------------------------------------------------------------------------------------

# (key_channels, value_channels, height and width) of the problems whose launches are recorded: the papers' sizes first,
# then sizes that take the other paths. The first problem that launches a kernel decides its row.
PROBLEMS = ((64, 512, 97), (64, 128, 97), (200, 512, 97), (200, 128, 97), (1024, 512, 97), (8, 8, 300))
# (dtype, whether TF32 is allowed)
DTYPES = (
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.float32, True),
    (torch.float32, False),
    (torch.float64, False),
)


def _call_everything(operators, key_channels: int, value_channels: int, side: int, dtype: torch.dtype) -> None:
    """Calls every operator forward and backward on one sample of side x side positions."""

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


def launches(emulator: ModuleType, architectures: tuple[int, ...] = ARCHITECTURES) -> dict[tuple[str, int], Launch]:
    """The launch of each (kernel, architecture) in the first of PROBLEMS that needs the kernel; the largest block of
    several launches (criss-cross attention uses different blocks for columns and rows).

    Args:
        emulator: the control module that ``tests.emulator.build.load`` returns.
    """
    operators = torch.ops.segattn_emulated
    found: dict[tuple[str, int], Launch] = {}
    emulator.set_blocks_at_ends(0)
    try:
        for architecture, (dtype, tf32), sizes in product(architectures, DTYPES, PROBLEMS):
            emulator.set_device(architecture)
            operators._set_allow_tf32(tf32)
            emulator.reset()
            _call_everything(operators, *sizes, dtype)
            largest: dict[str, Launch] = {}
            for report in emulator.report():
                name, (x, y, z) = short(report["kernel"]), report["block"]
                launch = Launch(report["dynamic_shared_bytes"], x * y * z)
                largest[name] = max(launch, largest.get(name, launch))
            for name, launch in largest.items():
                found.setdefault((name, architecture), launch)
    finally:
        emulator.set_blocks_at_ends(-1)
        operators._set_allow_tf32(False)
    return found


# ---- table -----------------------------------------------------------------------------------------------------------


def cell(kernel: Kernel, launch: Launch | None) -> str:
    parts = [f"{kernel.registers}", "-", "-", "-", f"{kernel.tensor_core_instructions}"]
    if launch is not None:
        parts[1] = f"{launch.threads}"
        parts[2] = f"{launch.dynamic_shared_bytes / 1024:.1f}"
        parts[3] = f"{blocks_per_multiprocessor(kernel, launch)}"
    if kernel.local_bytes:
        parts[0] += f" (+{kernel.local_bytes} B local)"
    return " / ".join(parts)


def rows(kernels: list[Kernel], found: dict[tuple[str, int], Launch]) -> Iterator[str]:
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for name, of in sorted(by_name.items()):
        if "__half" in name and name.replace("__half", "bfloat16") in by_name:
            continue  # the table lists the bfloat16 twin
        cells = [cell(of[a], found.get((name, a))) if a in of else "" for a in ARCHITECTURES]
        yield f"| `{name}` | {max(k.static_shared_bytes for k in of.values())} | " + " | ".join(cells) + " |"


def table(kernels: list[Kernel], found: dict[tuple[str, int], Launch]) -> str:
    spilling = sum(k.local_bytes > 0 for k in kernels)
    problems = ", ".join(f"({e}, {c}, {side})" for e, c, side in PROBLEMS)
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
    TABLE.write_text(table(compiled(sources()), launches(build.load("plain"))))
    print(TABLE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
