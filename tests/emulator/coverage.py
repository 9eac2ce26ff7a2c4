"""Line coverage of csrc/cuda under the emulator, with gcc's gcov:

    python -m tests.emulator.coverage [--only position] [--minimum 95] [pytest arguments]

Builds the `coverage` variant, runs the op suite and the kernels' own tests on it (or the given pytest arguments), and
prints for each file of csrc/cuda how many lines ran and which did not. A line of a template counts as run if any
instantiation ran it. Exits with 1 if the total is below the minimum.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from . import build

CUDA_SOURCES = build.ROOT / "csrc" / "cuda"
# The op suite's shapes do not reach every path of every device; the kernels' own tests do.
SUITE = (
    "tests/ops/test_ops.py",
    *(f"tests/cuda/test_{name}.py" for name in ("position", "channel", "criss_cross", "host")),
    *sorted(str(path.relative_to(build.ROOT)) for path in (build.ROOT / "tests" / "cuda").glob("test_*_sm90.py")),
)


def run_suite(arguments: list[str]) -> int:
    environment = os.environ | {"SEGATTN_EMULATOR_VARIANT": "coverage", "SEGATTN_TEST_BACKENDS": "emulated"}
    command = [sys.executable, "-m", "pytest", "-q", *(arguments or SUITE)]
    return subprocess.run(command, cwd=build.ROOT, env=environment, check=False).returncode


def line_counts(folder: Path) -> dict[Path, dict[int, int]]:
    """For each file of csrc/cuda, how often each line with code ran."""
    counts: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    prefix = build.library_name("coverage", "kernels")
    gcov = os.environ.get("GCOV", "gcov")
    for data in sorted(folder.rglob(f"*.{prefix}.gcda")):
        command = [gcov, "--json-format", "--stdout", str(data.relative_to(folder))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        for text in done.stdout.splitlines():
            for file in json.loads(text)["files"]:
                path = (folder / file["file"]).resolve()
                if not path.is_relative_to(CUDA_SOURCES):
                    continue
                for line in file["lines"]:
                    counts[path][line["line_number"]] += line["count"]
    return counts


def ranges(numbers: list[int]) -> str:
    """ "3-5, 9" for [3, 4, 5, 9]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def report(counts: dict[Path, dict[int, int]], only: str) -> float:
    """Prints a line per file and returns the percentage of lines that ran."""
    ran = total = 0
    for path in sorted(counts):
        name = path.relative_to(CUDA_SOURCES).as_posix()
        if not name.startswith(only):
            continue
        missed = sorted(line for line, count in counts[path].items() if count == 0)
        lines = len(counts[path])
        ran, total = ran + lines - len(missed), total + lines
        share = 100 * (lines - len(missed)) / lines
        print(f"{name:44} {lines - len(missed):4} of {lines:4}  {share:6.1f}%  {ranges(missed)}")
    percentage = 100 * ran / total if total else 0.0
    print(f"{'together':44} {ran:4} of {total:4}  {percentage:6.1f}%")
    return percentage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="files whose path below csrc/cuda starts with this")
    parser.add_argument("--minimum", type=float, default=0.0, help="percentage below which to fail")
    options, pytest_arguments = parser.parse_known_args()
    folder = build.build("coverage", "runtime", "kernels")
    for data in folder.rglob("*.gcda"):
        data.unlink()
    failed = run_suite(pytest_arguments)
    percentage = report(line_counts(folder), options.only)
    return failed or int(percentage < options.minimum)


if __name__ == "__main__":
    sys.exit(main())
