"""Runs tests on one wheel under several versions of PyTorch and Python, and writes docs/compatibility.md.

    python -m tools.wheels cpu                                  # the wheel
    python -m tools.wheel_matrix dist/segattn_ops-*cpu*.whl     # about three minutes a cell, of which two are the tests

Each cell is a fresh virtual environment with the released torch of that version, torchvision, numpy and pytest; the
wheel itself is never rebuilt. The tests come from this tree, the package from the wheel. uv (requirements/wheels.txt)
installs a torch of 5 GB in 16 s of processor time, pip in 60. All cells together download and store about 20 GB below
build/, which go at the end. A cell that was run with the same wheel and the same tests is not run again, so that an
interrupted matrix continues.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from .compilers import ROOT, files

TABLE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "build" / "wheel_matrix.json"
TORCH = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
PYTHON = ("3.10", "3.11", "3.12", "3.13")
# Every torch under one Python, every Python under one torch.
CELLS = [*((torch, "3.12") for torch in TORCH), *(("2.14", python) for python in PYTHON if python != "3.12")]
# What the libraries and the Python side of the operators have to do with torch: results and gradients of every op in
# every dtype, schemas against checks, fake tensors, autograd, torch.func, compile, FLOP formulas, memory layouts,
# eager calls, backends; modules, compiled, traced and exported, and their gradients.
TESTS = (
    "ops/test_ops.py",
    "ops/test_errors.py",
    "ops/test_layout.py",
    "ops/test_torch_integration.py",
    "ops/test_torch_function.py",
    "ops/test_functorch.py",
    "ops/test_overhead.py",
    "ops/test_backend.py",
    "modules/test_nn.py",
    "modules/test_pairwise.py",
    "modules/test_tracing.py",
)
LARGE = "64x65 or 97x97"  # sizes that take seconds and test the kernels, not what torch changes; two thirds of the time
# By the tests. The folder of the two files of the package is no package: the installed one is imported.
NEEDED = (
    "tests",
    "tools",
    "benchmarks",
    "csrc",
    "pyproject.toml",
    "segattn_ops/_build_tools.py",
    "segattn_ops/_files.py",
)
PACKAGES = ("numpy", "pytest", "setuptools", "torchvision")


@dataclass(frozen=True)
class Cell:
    """An entry of the table. ``versions`` and ``counts`` are empty where ``fault`` says why nothing was run."""

    torch: str
    python: str
    versions: str = ""
    counts: str = ""
    fault: str = ""


def interpreter(version: str) -> str | None:
    """A Python of the version: pyenv's newest, or one on PATH (pyenv's own entries there fail where another version is
    selected)."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = root.glob(f"{version}.*/bin/python")
    newest = max(found, key=lambda path: int(re.sub(r"\D", "", path.parts[-3].rpartition(".")[2]) or 0), default=None)
    return str(newest) if newest else shutil.which(f"python{version}")


def run(torch: str, python: str, wheel: Path, scratch: Path) -> Cell:
    """One cell. The scratch folder holds uv's cache, whose files the environments share by hard links."""
    program = interpreter(python)
    if program is None:
        return Cell(torch, python, fault=f"no Python {python} on this machine")
    environment = scratch / "environment"
    shutil.rmtree(environment, ignore_errors=True)
    uv = [sys.executable, "-m", "uv", "--quiet", "--native-tls", "--cache-dir", str(scratch / "cache")]
    subprocess.run([*uv, "venv", "--python", program, environment], check=True)
    installed = environment / "bin" / "python"
    install = [
        *uv,
        "pip",
        "install",
        "--python",
        installed,
        "--only-binary=:all:",
        f"torch=={torch}.*",
        *PACKAGES,
        wheel,
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return Cell(torch, python, fault=" ".join(re.sub(r"[^\x20-\x7e]", " ", done.stderr).split())[:300])
    tree = scratch / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            (tree / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, tree / name)
    return test(torch, python, installed, tree)


def test(torch: str, python: str, program: Path, tree: Path) -> Cell:
    """Runs the tests of the tree with the package that is installed for the interpreter."""
    facts = "import torch, platform, segattn_ops as s; c = s.build_config()['cpu']; assert c['native'], c['why_not'];"
    facts += "print(torch.__version__, platform.python_version(), s.__file__)"
    asked = subprocess.run([program, "-c", facts], cwd=tree, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return Cell(torch, python, fault=asked.stderr.strip().splitlines()[-1][:200])
    torch_version, python_version, package = asked.stdout.split()
    if "site-packages" not in package:
        raise RuntimeError(f"the tests would import {package}, not the wheel")
    command = [program, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-k", f"not ({LARGE})"]
    command += ["-W", "default"]  # other versions of torch warn of other things
    command += [f"tests/{name}" for name in TESTS]
    environment = {**os.environ, "SEGATTN_TEST_BACKENDS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(line)
    counts = re.search(r"^=*\s*(\d+ [a-z].*?) in [\d.]+s", done.stdout, re.MULTILINE)
    versions = f"torch {torch_version}, Python {python_version}"
    if counts is None:
        return Cell(torch, python, versions, fault=f"pytest stopped: {' '.join(done.stderr.split())[-200:]}")
    return Cell(torch, python, versions, counts.group(1))


FILES = """\
## Checkpoints and pictures from anywhere

`segattn_ops.checkpoints` reads what `torch.save` writes (the zip, and the format before PyTorch 1.6) and safetensors.
It calls nothing that the file names, and takes at most 24 times the file's size and 256 MiB, whatever the file says of
its tensors; a file that `torch.save` wrote takes its own size. Refused with a `ValueError` are zips with compressed
entries, tensors with more elements than their storage (expanded views), sparse, quantized and nested tensors, names of
more than 500 characters or with unprintable ones, and pipes and devices. `segattn_ops.visualize` opens pictures of at
most `PIL.Image.MAX_IMAGE_PIXELS` pixels, each of which takes up to 36 bytes; not PostScript, which PIL gives to another
program.
"""


def fingerprint(wheel: Path) -> str:
    """Of the wheel, of the tests, and of which of them are run."""
    digest = hashlib.sha256(wheel.read_bytes() + repr((TESTS, LARGE)).encode())
    for name in ("tests", "benchmarks", "tools"):
        for path in sorted((ROOT / name).rglob("*.py")):
            if path != Path(__file__):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def page(wheel: Path, cells: list[Cell]) -> str:
    """The document."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    commit = asked.stdout.strip() or "unknown"
    mark = hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]
    lines = [
        "# Compatibility: one wheel, several PyTorch and Python",
        "",
        f"Written by `python -m tools.wheel_matrix` on {date.today().isoformat()}, at commit {commit}, with",
        f"`{wheel.name}` (sha256 {mark}).",
        "Every row installs this file beside a released torch in a fresh environment and runs",
        f"{', '.join(f'`tests/{name}`' for name in TESTS)}",
        f"without the largest sizes (`-k 'not ({LARGE})'`), on the CPU kernels with one thread.",
        "",
        "| torch | Python | versions | tests |",
        "|---|---|---|---|",
    ]
    for cell in cells:
        outcome = cell.counts or f"not run: {cell.fault}"
        lines.append(f"| {cell.torch} | {cell.python} | {cell.versions or '-'} | {outcome} |")
    return "\n".join(lines) + "\n\n" + FILES


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.wheel_matrix", description=__doc__, formatter_class=formatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cells", nargs="*", metavar="TORCH/PYTHON", help="as 2.14/3.12; default: the table's rows")
    arguments = parser.parse_args(argv)
    wheel = arguments.wheel.resolve()
    if not wheel.exists():
        parser.error(f"wheel must be an existing file (got {arguments.wheel})")
    wanted = CELLS if arguments.cells is None else [tuple(cell.split("/")) for cell in arguments.cells]
    if importlib.util.find_spec("uv") is None:
        parser.error("uv is not installed: pip install -r requirements/wheels.txt")
    mark = fingerprint(wheel)
    known = json.loads(RESULTS.read_text()).get(mark, {}) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheel_matrix_", dir=RESULTS.parent) as scratch:
        for torch, python in wanted:
            name = f"{torch}/{python}"
            if name not in known:
                known[name] = asdict(run(torch, python, wheel, Path(scratch)))
                files.write_text(RESULTS, json.dumps({mark: known}, indent=1))
                cells = [Cell(**known[f"{t}/{p}"]) for t, p in CELLS if f"{t}/{p}" in known]
                files.write_text(TABLE, page(wheel, cells))
            print(name, known[name]["versions"], known[name]["counts"] or known[name]["fault"], flush=True)
    failed = [
        name
        for name, cell in known.items()
        if re.search("failed|error", cell["counts"]) or cell["versions"] and cell["fault"]
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
