"""Compiler flags, the CUDA toolkit and the fingerprint of the sources. setup.py runs this file by path, before torch
and without the package."""

import glob
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

LANGUAGE = ("-std=c++20",)
# PyTorch's stable ABI from 2.10 on and the limited API of Python 3.10: one wheel serves every later version.
STABLE_ABI = ("-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
CXX_FLAGS = ("-O3", *LANGUAGE, "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", *STABLE_ABI)

# The CPU kernels are compiled once for each.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
CPU_INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_INSTRUCTION_SETS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512bf16")}
# -Wno-psabi: GCC splits vectors wider than a register, but none crosses a library boundary. The other two: GCC 12's own
# AVX-512 intrinsics start from undefined registers.
CPU_WARNINGS = ("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized")

# What decides nvcc's device code; setup.py adds the architectures and the visibility of host symbols.
NVCC_FLAGS = ("-O3", *LANGUAGE, "--expt-relaxed-constexpr", "-DUSE_CUDA", *STABLE_ABI)
# Kernels with instructions of Hopper alone are in files of this name, which are compiled for sm_90a and nothing else.
# The define tells all files of a library that it contains them.
SM90A_SUFFIX = "_sm90.cu"
SM90A_TARGET = "-gencode=arch=compute_90a,code=sm_90a"
SM90A_DEFINE = "-DSEGATTN_SM90A"

BUILD_SCRIPTS = ("setup.py", "segattn_ops/_build_tools.py")  # they hold the flags

# Folders of the toolkit and its profilers where they are not on PATH, in rising preference.
USUAL_PLACES = (
    "/opt/cuda/bin",
    "/usr/local/cuda-*/bin",
    "/usr/local/cuda/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda-*/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer",
)


def fingerprint(root: Path, python: bool = False) -> str:
    """A hash of what the libraries are compiled from (csrc and the build scripts), committed or not; with all Python
    files of the package if ``python``."""
    digest = hashlib.sha256()
    files = {root / name for name in BUILD_SCRIPTS} | set((root / "csrc").rglob("*.*"))
    files |= set((root / "segattn_ops").rglob("*.py")) if python else set()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_program(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, from CUDA_HOME, PATH or :data:`USUAL_PLACES`; None if absent."""
    home = os.environ.get("CUDA_HOME")
    if home and (found := shutil.which(name, path=os.path.join(home, "bin"))):
        return found
    if found := shutil.which(name):
        return found
    folders = [folder for pattern in USUAL_PLACES for folder in sorted(glob.glob(pattern), key=_version)]
    return next((found for folder in reversed(folders) if (found := shutil.which(name, path=folder))), None)


def _version(folder: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder)]


def version_of(command: str, pattern: str = r"^(.+)$") -> str | None:
    """The first group of ``pattern`` in what ``command --version`` prints, its first line by default; None if the
    command does not run or prints no such thing."""
    try:
        printed = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(pattern, printed, re.MULTILINE)
    return found.group(1).strip() if found else None


def find_cuda_toolkit() -> tuple[str | None, str]:
    """The toolkit's folder and how it was found: from ``nvcc --dryrun``, since nvcc may be a wrapper script in another
    folder. (None, reason) without one."""
    if home := os.environ.get("CUDA_HOME"):
        return home, "CUDA_HOME"
    nvcc = find_program("nvcc")
    if nvcc is None:
        return None, "no nvcc on PATH or in the usual places, and CUDA_HOME is not set"
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
    if top is None:
        return None, f"`{nvcc} --dryrun` did not tell where the toolkit is"
    return os.path.realpath(top.group(1).strip()), f"{nvcc} --dryrun"
