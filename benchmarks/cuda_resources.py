"""What ptxas makes of the CUDA kernels of position attention: registers, spills, shared memory, occupancy, tensor-core
instructions.

    python -m benchmarks.cuda_resources      # writes docs/cuda_resources.md

Needs nvcc, no GPU. cuobjdump, where there is one (the toolkit's or triton's), counts the tensor-core instructions.
tests/test_cuda_static.py compiles a part of it again and compares.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "cuda_resources.md"
ARCHITECTURES = (80, 86, 90)
EMBEDDING = 64  # the dynamic shared memory in the table is for E = 64
# One 16-bit type stands for both: their kernels differ in the mma's type alone.
SOURCES = ("position_bfloat16.cu", "position_tf32.cu", "position_3xtf32.cu", "position_simt.cu")


@dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_bytes: int
    shared_bytes_of_a_block: int
    warps: int


MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 163 * 1024, 64),
    86: Multiprocessor(100 * 1024, 99 * 1024, 48),
    90: Multiprocessor(228 * 1024, 227 * 1024, 64),
}
REGISTERS = 65536
RESERVED_SHARED_BYTES = 1024  # of every block, for the system


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    static_shared_bytes: int
    threads: int
    tensor_core_instructions: int | None  # in the SASS; None without cuobjdump

    @property
    def dynamic_shared_bytes(self) -> int | None:
        return dynamic_shared_bytes(self.name, EMBEDDING)

    def fits(self) -> bool:
        return (self.dynamic_shared_bytes or 0) <= MULTIPROCESSORS[self.architecture].shared_bytes_of_a_block

    def blocks_per_multiprocessor(self) -> int:
        limits = MULTIPROCESSORS[self.architecture]
        warps = (self.threads + 31) // 32
        registers_of_a_warp = (self.registers * 32 + 255) // 256 * 256
        shared = (self.dynamic_shared_bytes or 0) + self.static_shared_bytes + RESERVED_SHARED_BYTES
        return min(REGISTERS // (registers_of_a_warp * warps), limits.warps // warps, limits.shared_bytes // shared, 32)


def dynamic_shared_bytes(name: str, embedding: int) -> int | None:
    """What the host asks for at a launch of position attention's kernels, from the template arguments in `name`; None
    for kernels that ask for none or whose amount depends on more. tests/test_cuda_position.py holds this against the
    launches themselves."""
    element, step = (4, 8) if "MmaTf32" in name else (2, 16)
    if match := re.search(r"WeightedSumTraits<.*?>, (\d+), (\d+), (\d+), (\d+), (\d+), (\d+)>", name):
        owned, channels, _, stages, score_steps, _ = map(int, match.groups())
        rows = score_steps * step if score_steps else -(-embedding // step) * step
        pipeline = rows * owned * element + stages * (rows + channels) * 64 + 2 * owned * 64
        pipeline += 2 * (owned + owned // 16) * 4 + 24
        return max(pipeline, channels * (owned + 8) * 2 if element == 2 else 0)
    if match := re.search(r"QueryKeyGradientTraits<.*?>, (\d+), (\d+), \d+, \d+, (\d+), (?:true|false)>", name):
        queries, keys, stages = map(int, match.groups())
        rows = -(-embedding // 64) * 64
        return ((rows + stages * 32) * (queries + keys) + queries * keys) * element + 8 * queries
    if match := re.search(r"SimtTraits<(\w+)", name):
        real = 8 if match[1] == "double" else 4
        return real * ((128 if real == 8 else 256) * 33 + 32 * 33 + 2 * 8 * 32)
    return None


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


def demangled(names: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    texts = [re.sub(r"^void |\([^()]*\)$|segattn::|__nv_", "", line) for line in done.stdout.splitlines()]
    return dict(zip(names, [re.sub(r" (?=>)", "", text) for text in texts], strict=True))


def max_threads(cubin: bytes) -> dict[str, int]:
    """Mangled kernel name -> threads of its launch bounds: EIATTR_MAX_THREADS in section .nv.info.<kernel>."""
    (section_table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, section_table + i * entry_size) for i in range(count)]
    names = sections[names_index][4]
    found = {}
    for name_offset, _, _, _, offset, size in sections:
        start = names + name_offset
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + size:
            kind, attribute, length = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if kind == 4:  # a value of `length` bytes follows
                if attribute == 5:
                    x, y, z = struct.unpack_from("<III", cubin, at)
                    found[name.removeprefix(".nv.info.")] = x * y * z
                at += length
    return found


def tensor_core_instructions(cubin: Path) -> dict[str, int]:
    text = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    counted = {}
    for part in text.split("Function : ")[1:]:
        counted[part.split("\n", 1)[0].strip()] = len(re.findall(r"\bHMMA\.", part))
    return counted


def include_folders() -> list[str]:
    from torch.utils import cpp_extension

    return [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]


def compile_one(source: Path, architecture: int, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DPy_LIMITED_API=0x030A0000"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-I{include}" for include in include_folders()]
    command = [nvcc(), *flags, f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    entries = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)$",
        done.stderr,
        re.DOTALL | re.MULTILINE,
    )
    if not entries:
        return []
    names = demangled([entry[0] for entry in entries])
    threads = max_threads(cubin.read_bytes())
    tensor_cores = tensor_core_instructions(cubin) if cuobjdump() else {}
    kernels = []
    for mangled, stores, loads, registers, rest in entries:
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                names[mangled],
                architecture,
                int(registers),
                max(int(stores), int(loads)),
                int(shared[1]) if shared else 0,
                threads.get(mangled, 1024),
                tensor_cores.get(mangled, 0) if cuobjdump() else None,
            )
        )
    return kernels


def measure(architectures: tuple[int, ...] = ARCHITECTURES, names: tuple[str, ...] = SOURCES) -> list[Kernel]:
    """Compiles the sources for each architecture, MAX_JOBS at a time (default: the processors)."""
    sources = [ROOT / "csrc" / "cuda" / name for name in names]
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        work = [
            pool.submit(compile_one, source, architecture, Path(folder))
            for architecture in architectures
            for source in sources
        ]
        kernels = [kernel for job in work for kernel in job.result()]
    unique = {(k.name, k.architecture): k for k in kernels}
    return [unique[key] for key in sorted(unique)]


def table(kernels: list[Kernel]) -> str:
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    architectures = sorted({k.architecture for k in kernels})
    spilled = sum(k.spilled_bytes for k in kernels)
    lines = [
        "# Resources of position attention's CUDA kernels",
        "",
        f"Made by `python -m benchmarks.cuda_resources` with nvcc {nvcc_release()}; `tests/test_cuda_static.py`",
        "compiles a part again and compares. For each architecture: registers a thread / blocks a multiprocessor /",
        f"tensor-core instructions in the SASS. Dynamic shared memory is for E = {EMBEDDING}. The float16 kernels",
        f"are the bfloat16 ones with another mma. Spilled bytes, all together: {spilled}.",
        "",
        "| kernel | threads | static shared | dynamic shared | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
        "|---|---|---|---|" + "---|" * len(architectures),
    ]
    for name, found in by_name.items():
        any_one = next(iter(found.values()))
        cells = []
        for a in architectures:
            k = found.get(a)
            if k is None:
                cells.append("")
                continue
            text = f"{k.registers} / {k.blocks_per_multiprocessor() if k.fits() else 'does not fit'}"
            cells.append(text + f" / {'?' if k.tensor_core_instructions is None else k.tensor_core_instructions}")
        dynamic = any_one.dynamic_shared_bytes
        row = [f"`{name}`", any_one.threads, any_one.static_shared_bytes, "-" if dynamic is None else dynamic, *cells]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if nvcc() is None:
        print("nvcc is not on PATH and CUDA_HOME is not set")
        return 1
    TABLE.write_text(table(measure()))
    print(TABLE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
