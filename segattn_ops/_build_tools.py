"""What a build uses before torch is imported. setup.py runs this file by itself, without importing the package."""

import glob
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

# Where the toolkit and its profilers are installed when they are not on PATH, the newest version last.
USUAL_PLACES = (
    "/opt/cuda/bin",
    "/usr/local/cuda-*/bin",
    "/usr/local/cuda/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda-*/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer",
)


def fingerprint(root: Path, python: bool = False) -> str:
    """Hash of the sources that the libraries are compiled from, committed or not, and of the package's Python files if
    ``python``."""
    digest = hashlib.sha256()
    files = [root / "setup.py", *(root / "csrc").rglob("*.*")]
    files += (root / "segattn_ops").rglob("*.py") if python else []
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_program(name: str) -> str | None:
    """The path of a program of the CUDA toolkit: from CUDA_HOME, PATH, or the usual places; None if it is not found."""
    home = os.environ.get("CUDA_HOME")
    if home and (found := shutil.which(name, path=os.path.join(home, "bin"))):
        return found
    if found := shutil.which(name):
        return found
    folders = [folder for pattern in USUAL_PLACES for folder in sorted(glob.glob(pattern), key=_version)]
    return next((found for folder in reversed(folders) if (found := shutil.which(name, path=folder))), None)


def _version(folder: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder)]


def find_cuda_toolkit() -> tuple[str | None, str]:
    """The toolkit's folder and how it was found. `nvcc --dryrun` prints it; nvcc's own folder may be another, because
    nvcc may be a wrapper script."""
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
