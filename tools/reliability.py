"""The reliability page: what was tried to break the library, how often, and with what outcome.

    python -m tools.reliability run fuzz         # runs an area and writes tests/reliability/records/fuzz.json
    python -m tools.reliability run --only TEXT  # the runs whose title contains TEXT; the others' records stay
    python -m tools.reliability run              # all areas: some hours
    python -m tools.reliability page             # docs/reliability.md, from the records

Every run is a run of pytest. Its JUnit report has the tests, and the counts that tests report with ``record_property``:
integers are summed by name over all tests of the run.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import report

from .compilers import ROOT

RECORDS = ROOT / "tests" / "reliability" / "records"
PAGE = ROOT / "docs" / "reliability.md"
SLOWEST = 20


@dataclass(frozen=True)
class Run:
    """A run of pytest. ``launcher`` comes between "python" and "-m pytest"."""

    title: str
    arguments: str
    launcher: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    slowest: bool = False  # the record lists the slowest tests

    @property
    def command(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, "python", *shlex.split(self.launcher), "-m pytest", self.arguments])

    def argv(self) -> list[str]:
        return [*shlex.split(self.launcher), "-m", "pytest", *shlex.split(self.arguments)]


@dataclass(frozen=True)
class Area:
    """One section of the page."""

    title: str
    text: str
    runs: tuple[Run, ...]


INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
OPS = 'tests/ops/test_ops.py -k "not float64 and not -float16"'
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FUZZ_MINUTES = "2"  # of each run

AREAS = {
    "suite": Area(
        "The suite",
        "What `make test` runs, the builds for the emulator and the sanitizers among it. Warnings are errors.",
        (Run("All tests", "-n 2 --dist worksteal", slowest=True),),
    ),
    "fuzz": Area(
        "Properties",
        "Calls that hypothesis draws: ops, sizes around the tiles, dtypes, strides, scales, threads, devices. Each is "
        "compared with float64 and with laws of its op: weights sum to one, permuted positions permute results, a "
        "batch is its samples. A call that fails is shrunk and kept in `tests/regressions`, which `make test` replays. "
        "`make test` tries the same few hundred calls every time; `make fuzz` draws new ones, by a seed that it "
        "prints.",
        (
            *(
                Run(
                    f"CPU, {name}",
                    "-q tests/properties",
                    environment={
                        "SEGATTN_TEST_BACKENDS": "reference,cpu",
                        "SEGATTN_CPU_CAPABILITY": name,
                        "SEGATTN_FUZZ_MINUTES": FUZZ_MINUTES,
                    },
                )
                for name in INSTRUCTION_SETS
            ),
            Run(
                "CUDA, emulated",
                "-q tests/properties",
                environment={"SEGATTN_TEST_BACKENDS": "emulated", "SEGATTN_FUZZ_MINUTES": FUZZ_MINUTES},
            ),
        ),
    ),
    "sanitize": Area(
        "Sanitizers",
        "The op tests over builds of the CPU library for AddressSanitizer, UndefinedBehaviorSanitizer and "
        "ThreadSanitizer, and over the emulated CUDA kernels with AddressSanitizer and with the race detector, which "
        "also reports shared memory that is read before it is written. A report fails its test (`docs/emulator.md`).",
        (
            Run("Planted faults", "-q tests/tools/test_sanitizers.py -k planted"),
            *(
                Run(
                    f"CPU, {sanitizer}, {name}",
                    f"-q {OPS}",
                    launcher=f"-m tests.sanitizers {sanitizer}",
                    environment={"SEGATTN_TEST_BACKENDS": "cpu", "SEGATTN_CPU_CAPABILITY": name} | ONE_THREAD,
                )
                for sanitizer in ("address", "undefined", "thread")
                for name in ("baseline", "avx2", "avx512_bf16")
            ),
            Run(
                "CUDA emulated, address",
                f"-q {OPS}",
                launcher="-m tests.emulator.asan",
                environment={"SEGATTN_TEST_BACKENDS": "emulated"} | ONE_THREAD,
            ),
            Run(
                "CUDA emulated, race",
                f"-q {OPS}",
                environment={"SEGATTN_TEST_BACKENDS": "emulated", "SEGATTN_EMULATOR_VARIANT": "race"} | ONE_THREAD,
            ),
            Run("Valgrind", "-q tests/sanitizers/valgrind_checks.py"),
        ),
    ),
    "mutate": Area(
        "Planted faults",
        "Typical faults, planted one at a time in a copy of the sources; the tests named beside each must fail, and "
        "pass without it. The list is `tests/mutation/faults.toml`.",
        (
            Run("Python", "tests/mutation/run_faults.py -k python -n 2 --dist loadgroup"),
            Run("CPU kernels", "tests/mutation/run_faults.py -k cpu -n 2 --dist loadgroup"),
            Run("CUDA kernels", "tests/mutation/run_faults.py -k emulated -n 2 --dist loadgroup"),
        ),
    ),
    "extremes": Area(
        "Extremes",
        "Energies of 10,000, infinities and NaN where eager has them, denormals, one position, one channel, 70,000 "
        "samples, 262,144 positions, more than 2^31 elements.",
        (
            Run("Values and sizes", "-q tests/ops/test_extremes.py tests/ops/test_non_finite.py"),
            Run("Sizes that take minutes or gigabytes", "-q tests/reliability/long_extremes.py"),
        ),
    ),
    "failures": Area(
        "Failures",
        "Each allocation, launch and call of the CUDA runtime fails in turn: a clean error, no leak, and the next call "
        "is right. Interrupts, threads that cannot start, forks, eight threads at once.",
        (
            Run("Allocations, CPU", "-q tests/reliability/long_failures.py -k on_the_cpu"),
            Run("Allocations, CUDA emulated", "-q tests/reliability/long_failures.py -k emulated"),
            Run("Launches and calls of the CUDA runtime, emulated", "-q tests/reliability/long_cuda_failures.py"),
            Run("Interrupts, hooks, threads, processes", "-q tests/ops/test_failures.py tests/ops/test_concurrency.py"),
            Run("Eight threads at once", "-q tests/reliability/long_concurrency.py"),
        ),
    ),
    "hostile": Area(
        "Hostile files",
        "Checkpoints and pictures with flipped bits, cut off, or made to run code or to fill the memory; libraries "
        "that are cut off, foreign or of another machine; disks that are full.",
        (
            Run("Checkpoints and pictures", "-q tests/reliability/long_hostile_files.py"),
            Run("Libraries", "-q tests/ops/test_foreign_libraries.py"),
        ),
    ),
    "determinism": Area(
        "Determinism",
        "Bitwise equal results over 100 runs, 1 to 8 threads, schedules of the emulated device, and processes.",
        (
            Run("Threads, schedules, processes", "-q tests/ops/test_determinism.py"),
            Run("100 runs", "-q tests/reliability/long_determinism.py"),
        ),
    ),
}


def outcome(xml: str, slowest: bool = False) -> dict:
    """The outcome of a run, from its JUnit report."""
    suites = ElementTree.fromstring(xml).iter("testsuite")
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts: dict[str, int] = {}
    for item in (item for case in cases for item in case.iter("property")):
        if item.get("value", "").lstrip("-").isdigit():
            counts[item.get("name", "")] = counts.get(item.get("name", ""), 0) + int(item.get("value", ""))
    result = {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "counts": counts,
        "failures": sorted(map(_name, bad)),
    }
    if slowest:
        longest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:SLOWEST]
        result["slowest"] = [[_name(case), round(float(case.get("time", 0)), 1)] for case in longest]
    return result


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name', '')}"


def execute(run: Run, commit: str | None) -> dict:
    """Runs it and returns its record. The commit is given, since the records that a series of runs writes change the
    working copy."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        start = datetime.datetime.now(datetime.timezone.utc)
        done = subprocess.run(
            [sys.executable, *run.argv(), f"--junitxml={xml}"],
            cwd=ROOT,
            env=os.environ | run.environment,
            check=False,
        )
        seconds = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
        if not xml.exists():
            raise RuntimeError(f"{run.title}: pytest ended with {done.returncode} and without a report: {run.command}")
        result = outcome(xml.read_text(), run.slowest)
    # pytest's exit codes beyond 1 are interruptions and errors of its own, which the report does not show.
    if done.returncode not in (0, 1):
        result["failures"].append(f"pytest ended with {done.returncode}")
    return {
        "title": run.title,
        "command": run.command,
        "date": start.isoformat(timespec="minutes"),
        "commit": commit,
        "machine": report.machine("cpu", torch.get_num_threads()),
        "seconds": round(seconds),
        **result,
    }


def record_path(area: str) -> Path:
    return RECORDS / f"{area}.json"


def load(area: str) -> list[dict]:
    """The records of an area's runs, in the order of AREAS; those of runs that are no longer listed are left out."""
    path = record_path(area)
    records = {record["title"]: record for record in json.loads(path.read_text())} if path.exists() else {}
    return [records[run.title] for run in AREAS[area].runs if run.title in records]


def run_areas(names: Iterable[str], only: str = "") -> list[str]:
    """Runs areas, writes a record after each run, and returns the titles of the runs that failed."""
    bad = []
    commit = report.commit()
    for name in names:
        for run in AREAS[name].runs:
            if only not in run.title:
                continue
            print(f"{name}: {run.title}\n{run.command}", flush=True)
            record = execute(run, commit)
            kept = [other for other in load(name) if other["title"] != run.title]
            RECORDS.mkdir(parents=True, exist_ok=True)
            report.write_json([*kept, record], record_path(name))
            if record["failures"]:
                bad.append(f"{name}: {run.title}: {', '.join(record['failures'])}")
    return bad


# What divides the name of a part of a count, "inputs tried of position_attention", from that of the count.
_PART = re.compile(r"(.+?)( of |: | by )(.+)")


def _counted(counts: Mapping[str, int]) -> str:
    whole = sorted((name, number) for name, number in counts.items() if not _PART.fullmatch(name))
    return "; ".join(f"{number:,} {name}" for name, number in whole) or "-"


def _parts(counts: Mapping[str, int]) -> list[str]:
    """A line for every count that is given in parts."""
    lines: dict[str, list[str]] = {}
    for name, number in sorted(counts.items()):
        if part := _PART.fullmatch(name):
            lines.setdefault(part[1] + part[2].rstrip(": "), []).append(f"{part[3]} {number:,}")
    return [f"{name}: {', '.join(parts)}." for name, parts in lines.items()]


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _total(records: Iterable[dict]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record["counts"])
    return dict(total)


def _tests(record: dict) -> str:
    skipped = f", {record['skipped']:,} skipped" if record["skipped"] else ""
    return f"{record['passed']:,} passed, {record['failed']:,} failed{skipped}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _where(record: dict) -> str:
    return f"{report.where({'machine': record['machine']})}; commit {record['commit']}"


def page() -> str:
    """docs/reliability.md."""
    lines = [
        "# Reliability",
        "",
        "What was tried to break the library, and what came of it. Every line is a run of pytest, with its command and",
        "date; a count is what the tests of the run reported. `python -m tools.reliability page` makes this page from",
        "the records in `tests/reliability/records`; a test compares the two.",
        "",
        "| area | counts | tests | runs |",
        "|---|---|---|---|",
    ]
    for name, area in AREAS.items():
        records = load(name)
        summed = {key: sum(record[key] for record in records) for key in ("passed", "failed", "skipped")}
        link = f"[{area.title}](#{area.title.lower().replace(' ', '-').replace(',', '')})"
        lines.append(f"| {link} | {_counted(_total(records))} | {_tests(summed)} | {len(records)} |")
    for name, area in AREAS.items():
        lines += [
            "",
            f"## {area.title}",
            "",
            _filled(area.text),
            "",
            "| run | counts | tests | time | date |",
            "|---|---|---|---|---|",
        ]
        records = load(name)
        for record in records:
            cells = [
                record["title"],
                _counted(record["counts"]),
                _tests(record),
                _duration(record["seconds"]),
                record["date"][:10],
            ]
            lines.append("| " + " | ".join(cells) + " |")
        recorded = {record["title"] for record in records}
        lines += [f"| {run.title} | not run | | | |" for run in area.runs if run.title not in recorded]
        lines += ["", *(line for part in _parts(_total(records)) for line in (_filled(part), ""))]
        lines += ["```sh", *(run.command for run in area.runs), "```", ""]
        for record in records:
            lines += [f"- Failed in {record['title']}: `{test}`" for test in record["failures"]]
        for record in records:
            if "slowest" in record:
                lines += ["", f"The slowest {SLOWEST} tests:", "", "| test | seconds |", "|---|---|"]
                lines += [f"| `{test}` | {seconds} |" for test, seconds in record["slowest"]]
        places = dict.fromkeys(_where(record) for record in records)
        lines += ["", *(f"{place}." for place in places)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.reliability", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run areas and write their records and the page")
    runner.add_argument("areas", nargs="*", metavar="area", help=f"some of {', '.join(AREAS)}; all without one")
    runner.add_argument("--only", default="", metavar="TEXT", help="runs whose title contains this text")
    commands.add_parser("page", help="write docs/reliability.md from the records")
    options = parser.parse_args()
    if options.command == "run" and (unknown := set(options.areas) - set(AREAS)):
        parser.error(f"area must be one of {', '.join(AREAS)} (got {', '.join(sorted(unknown))})")
    bad = run_areas(options.areas or AREAS, options.only) if options.command == "run" else []
    PAGE.write_text(page())
    for line in bad:
        print(line, file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
