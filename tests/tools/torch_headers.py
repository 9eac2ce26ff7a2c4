"""Headers of other PyTorch versions than the installed one, for tests/tools/test_torch_headers.py.

    python -m tests.tools.torch_headers      # fetches those of requirements/headers.txt into build/torch_headers

They come from the wheels for macOS, which hold no CUDA libraries and are the smallest. The headers of the stable ABI
are the same in the wheels for Linux.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements" / "headers.txt"
FOLDER = ROOT / "build" / "torch_headers"
WANTED = ("torch/include/torch/csrc/", "torch/include/torch/headeronly/")
# Of the wheel, not of the running Python: the headers are the same for every Python and every macOS.
PYTHON_VERSION = "3.11"
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")


def versions() -> list[str]:
    return re.findall(r"^torch==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)


def include_folder(version: str) -> Path:
    """Where the headers of a version are once they have been fetched."""
    return FOLDER / version / "torch" / "include"


def fetch(version: str) -> None:
    """Downloads a wheel and keeps its headers. A folder appears under its name only when it is complete.

    Raises:
        subprocess.CalledProcessError: where pip finds or gets no wheel.
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
    for wanted in versions():
        if not include_folder(wanted).exists():
            fetch(wanted)
        print(f"headers of torch {wanted}: {include_folder(wanted)}")
