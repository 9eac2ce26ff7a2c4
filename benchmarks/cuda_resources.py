"""What ptxas makes of the CUDA kernels, all of them: registers, local memory (spills), shared memory, occupancy,
tensor-core instructions.

    python -m benchmarks.cuda_resources      # writes docs/cuda_resources.md

Needs no GPU, but nvcc, cuobjdump (the toolkit's or triton's) and the emulator (tests/emulator), whose dry runs say what
each kernel is launched with: the same host code, nothing run. tests/cuda/test_resources.py holds the built library
against the table.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "cuda_resources.md"
ARCHITECTURES = (80, 86, 90)
RESERVED_SHARED_BYTES = (
    1024  # of every block from sm_80 on, for the system; cuobjdump counts them from sm_90 on, where a kernel has any
)
REGISTERS = 65536


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
    """Compiled for one architecture."""

    name: str
    architecture: int
    registers: int
    local_bytes: int  # of a thread, in memory: spilled registers, or an array that is indexed at run time
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


# ---- what was compiled -----------------------------------------------------------------------------------------------


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))


def nvcc_release() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


@cache
def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    packaged = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(packaged) if packaged.exists() else None


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> "weighted_sum_kernel<...>"."""
    if not names:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def short(name: str) -> str:
    """Without result, parameters and namespaces."""
    name = re.sub(r"^void |segattn::cuda::|__nv_|\(anonymous namespace\)::", "", name)
    return re.sub(r" (?=>)", "", re.sub(r"\([^()]*\)$", "", name))


def _dump(option: str, file: Path) -> str:
    return subprocess.run([cuobjdump(), option, str(file)], capture_output=True, text=True, check=True).stdout


def read(file: Path) -> list[Kernel]:
    """The kernels in a fat binary, or in a shared library with some."""
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
    """The CUDA library that was built in place."""
    return next((ROOT / "segattn_ops").glob("_C_cuda*.so"), None)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def compiled(files: list[Path], architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """The kernels of some sources. Their fat binaries stay in build/cuda_resources: only what has changed since is
    compiled, by ninja, MAX_JOBS at a time."""
    from torch.utils import cpp_extension

    from tests.emulator.build import locked

    folder = ROOT / "build" / "cuda_resources" / "_".join(map(str, architectures))
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DPy_LIMITED_API=0x030A0000"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    lines = ["rule compile", f"  command = {nvcc()} {' '.join(flags)} -MD -MF $out.d -fatbin $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    lines += [f"build {file.stem}.fatbin: compile {file}" for file in files]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs]
    with locked(folder):  # pytest-xdist may ask twice at once
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    kernels = [kernel for file in files for kernel in read(folder / f"{file.stem}.fatbin")]
    unique = {(k.name, k.architecture): k for k in kernels}
    return [unique[key] for key in sorted(unique)]


# ---- what it is launched with ----------------------------------------------------------------------------------------

# E, C and the image's side of the problems whose launches are looked at; the first that launches a kernel counts: the
# papers' sizes, and what takes the paths beside.
PROBLEMS = ((64, 512, 97), (64, 128, 97), (200, 512, 97), (200, 128, 97), (1024, 512, 97), (8, 8, 300))
# and whether TF32 is allowed
DTYPES = (
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.float32, True),
    (torch.float32, False),
    (torch.float64, False),
)


def _call_everything(operators, embedding: int, channels: int, side: int, dtype: torch.dtype) -> None:
    """Every operator forward and backward on one sample of side x side positions."""

    def call(operator: str, *arguments) -> None:
        result = getattr(operators, operator)(*arguments)
        output = result if isinstance(result, torch.Tensor) else result[0]
        leaves = [a for a in arguments if isinstance(a, torch.Tensor)]
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    def features(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, dtype=dtype, requires_grad=True)

    query, key = features(embedding, side, side), features(embedding, side, side)
    value, weights = features(channels, side, side), features(2 * side - 1, side, side)
    call("position_attention", query, key, value, 1.0)
    call("criss_cross_attention", query, key, value, 1.0)
    call("criss_cross_affinity", query, key)
    call("criss_cross_aggregation", weights, value)
    few = [features(channels, 8, 8) for _ in range(3)]  # torch's own products are computed
    call("channel_attention", *few, 1.0)
    call("channel_self_attention", few[0], 1.0)
    gamma = torch.ones(1, channels, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    call("channel_self_attention", few[0], 1.0, gamma)


def launches(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[tuple[str, int], Launch]:
    """By kernel and architecture: what the first of PROBLEMS that needs the kernel launches it with there, the largest
    blocks of several launches (criss-cross attention has other blocks for columns than for rows)."""
    from tests.emulator import build

    emulator = build.load("plain")
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


# ---- the table -------------------------------------------------------------------------------------------------------


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
            continue  # the twin is in the table
        cells = [cell(of[a], found.get((name, a))) if a in of else "" for a in ARCHITECTURES]
        yield f"| `{name}` | {max(k.static_shared_bytes for k in of.values())} | " + " | ".join(cells) + " |"


def table(kernels: list[Kernel], found: dict[tuple[str, int], Launch]) -> str:
    spilling = sum(k.local_bytes > 0 for k in kernels)
    problems = ", ".join(f"({e}, {c}, {side})" for e, c, side in PROBLEMS)
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Made by `python -m benchmarks.cuda_resources` with nvcc {nvcc_release()}; `tests/cuda/test_resources.py`",
        "holds the built library against it. For each architecture: registers a thread, threads a block, dynamic shared",
        "memory in KB / blocks a multiprocessor / tensor-core instructions in the SASS. The launches are those of the",
        "first problem that needs the kernel there, the largest blocks of several, and a dash means that none does;",
        f"the problems are, as (E, C, height and width), {problems}.",
        "The float16 kernels are the bfloat16 ones with another `mma`, and are left out.",
        "",
        f"Of {len(kernels)} kernels, counted for each architecture, {spilling} use local memory (spilled registers):",
        'marked by "B local", a thread\'s bytes.',
        "",
        "| kernel | static shared bytes | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
        *rows(kernels, found),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    for tool in (nvcc, cuobjdump):
        if tool() is None:
            print(f"{tool.__name__} is needed: neither on PATH nor in the places it is usually installed")
            return 1
    TABLE.write_text(table(compiled(sources()), launches()))
    print(TABLE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
