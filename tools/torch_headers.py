"""Fetches the headers of other PyTorch versions than the installed one, for tests/tools/test_torch_headers.py.

    python -m tools.torch_headers      # those of requirements/headers.txt, into build/torch_headers

They come from the wheels for macOS, the smallest, since they hold no CUDA libraries. The headers of the stable ABI are
the same on every platform.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .compilers import ROOT

REQUIREMENTS = ROOT / "requirements" / "headers.txt"
FOLDER = ROOT / "build" / "torch_headers"
WANTED = ("torch/include/torch/csrc/", "torch/include/torch/headeronly/")
# Of the wheel; any will do, since the headers are the same for every Python and every macOS.
PYTHON_VERSION = "3.11"
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")


def versions() -> list[str]:
    return re.findall(r"^torch==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)


def include_folder(version: str) -> Path:
    """The include folder of a version; it exists once the headers have been fetched."""
    return FOLDER / version / "torch" / "include"


def fetch(version: str) -> None:
    """Downloads a wheel and keeps its headers. The version's folder appears only when it is complete.

    Raises:
        subprocess.CalledProcessError: where pip cannot download a wheel.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--platform={platform}" for platform in PLATFORMS]
        command += [f"--python-version={PYTHON_VERSION}", "--dest", scratch, f"torch=={version}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(WANTED)]
            archive.extractall(Path(scratch) / "headers", names)
        (Path(scratch) / "headers").rename(FOLDER / version)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.torch_headers", description=__doc__, formatter_class=formatter)
    parser.parse_args()
    for wanted in versions():
        if not include_folder(wanted).exists():
            fetch(wanted)
        print(f"headers of torch {wanted}: {include_folder(wanted)}")
