"""Everything to run on a machine with a GPU, in pieces of under eight minutes that resume: ``--help``, ``--dry-run``.

Each piece leaves its result in one JSON file as soon as it has it, so that an interrupted run goes on where it stopped;
what was found with other sources is done again. Exit status: 0 all that was asked is done (or there is no GPU), 1
something failed or was wrong, 3 the time limit was reached and the same command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import gpu_cells, measure, report, rivals, validate, workloads
from .gpu_driver import FAMILIES
from .run import record
from .schedule import GIB, MEMORY_SHARE
from .workloads import Workload, peak_bytes

PIECES = ("build", "tests", "sanitize", "ceilings", "profile", *(f"bench-{family}" for family in FAMILIES))
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# The most important first: a run that is cut short has them.
SIZES = ((97, 97), (128, 128), (64, 64), (128, 256))
DTYPES = ("bfloat16", "float32", "float16")
BATCHES = {"position": (8, 1), "criss-cross": (8, 1, 32), "channel": (8, 1)}
RIVALS = ("eager", "fused", "sdpa", *rivals.SDPA_BACKENDS, "flex", "compile")
ROOT = Path(__file__).resolve().parent.parent
MORE_TO_DO = 3


def workloads_of(family: str) -> list[Workload]:
    """The family's workloads; the block of R = 2 (rcca), the Non-local widths and ANN's few keys at 97 x 97 only."""
    planned = []
    for op in FAMILIES[family]:
        once = op in ("rcca", "non_local", "ann")
        for dtype in DTYPES[:1] if once else DTYPES:
            for size in SIZES[:1] if once else SIZES:
                planned += [Workload(op, *size, dtype, batch) for batch in BATCHES[family]]
    return planned


def key_of(entry: dict) -> str:
    """What identifies a cell in the JSON."""
    size = report.size_of(entry)
    return f"{entry['op']} {size} B={entry['batch']} {entry['dtype']} {entry['rival']}"


def fingerprint() -> str:
    """Of the sources that decide the figures, whether or not they are committed."""
    files = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*"), *(ROOT / "segattn_ops").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class State:
    """The JSON file: read at the start, written after every result."""

    def __init__(self, path: Path, again: bool = False):
        self.path = path
        self.commit = report.commit()
        self.sources = fingerprint()
        stored = json.loads(path.read_text()) if path.exists() and not again else {}
        if stored and stored.get("schema") != 1:
            raise ValueError(f"{path} is of schema {stored.get('schema')}, this program writes 1: move it away")
        self.pieces: dict[str, dict] = stored.get("pieces", {})
        self.cells: dict[str, dict] = {key_of(entry): entry for entry in stored.get("cells", [])}
        self.machine = stored.get("machine", {})
        self.commands: list[str] = stored.get("commands", [])

    def step(self, piece: str, name: str) -> dict | None:
        """A step's result, if it passed with these sources."""
        found = self.pieces.get(piece, {}).get(name)
        return found if found and found["sources"] == self.sources and found["status"] == "passed" else None

    def set_step(self, piece: str, name: str, status: str, **facts) -> None:
        entry = {"status": status, "commit": self.commit, "sources": self.sources, "date": _now(), **facts}
        self.pieces.setdefault(piece, {})[name] = entry
        self.save()

    def cell(self, workload: Workload, rival: str) -> dict | None:
        """A cell's record, if these sources need not try it again."""
        found = self.cells.get(key_of(record(workload, rival, "")))
        final = found and found["sources"] == self.sources and found["status"] in ("measured", "skipped", "failed")
        return found if final else None

    def set_cell(self, entry: dict) -> None:
        self.cells[key_of(entry)] = entry | {"commit": self.commit, "sources": self.sources, "date": _now()}
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": 1,
            "commands": self.commands,
            "machine": self.machine,
            "pieces": self.pieces,
            "cells": list(self.cells.values()),
        }
        report.write_json(content, self.path)


class Clock:
    """The time limit of one invocation."""

    def __init__(self, limit: float):
        self.end = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _run(command: list[str], seconds: float, environment: dict | None = None) -> tuple[int, str, float]:
    """(exit status, output, seconds); 124 for a command stopped by the time limit."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(seconds, 1),
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        status, output = 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return status, output, time.monotonic() - started


def _step(state: State, piece: str, name: str, command: list[str], clock: Clock, environment=None) -> bool | None:
    """Runs a command as a resumable step. True passed, False failed, None no time left."""
    if state.step(piece, name):
        return True
    if clock.left < 20:
        return None
    print(f"{piece}: {name}", flush=True)
    status, output, seconds = _run(command, clock.left, environment)
    verdict = "passed" if status == 0 else "stopped" if status == 124 else "failed"
    lines = output.strip().splitlines()
    state.set_step(
        piece, name, verdict, seconds=round(seconds, 1), command=command, exit_status=status, output=lines[-60:]
    )
    print(f"  {verdict} in {seconds:.0f} s: {lines[-1] if lines else ''}", flush=True)
    return None if status == 124 else status == 0


def build(state: State, clock: Clock, device: torch.device) -> bool | None:
    major, minor = torch.cuda.get_device_capability(device)
    environment = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2)),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return _step(state, "build", f"sm_{major}{minor}", command, clock, environment)


def test_files() -> list[str]:
    """Test modules that have tests for a GPU, by what they say themselves."""
    marks = re.compile(r"\b(mark\.cuda|backend|kernels)\b")
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").glob("test_*.py")
        if marks.search(path.read_text())
    )


def tests(state: State, clock: Clock, device: torch.device) -> bool | None:
    verdicts = []
    for name in test_files():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", name]
        verdict = _step(state, "tests", name, command, clock, {"SEGATTN_TEST_BACKENDS": "cuda"})
        if verdict is False and state.pieces["tests"][name]["exit_status"] == 5:  # pytest: no test was selected
            state.set_step("tests", name, "passed", output=["no test for a GPU"])
            verdict = True
        verdicts.append(verdict)
    return _all(verdicts)


def sanitize(state: State, clock: Clock, device: torch.device) -> bool | None:
    program = shutil.which("compute-sanitizer")
    if not program:
        state.set_step("sanitize", "compute-sanitizer", "failed", output=["compute-sanitizer is not on PATH"])
        return False
    # The option that restricts a tool to kernels with a substring in their names was renamed over the years.
    options = _run([program, "--help"], 30)[1]
    only_ours = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if name in options), None)
    verdicts = []
    for family in FAMILIES:
        for tool in SANITIZERS:
            for dtype in ("bfloat16", "float16", "float32", "float64"):
                command = [program, "--tool", tool, "--error-exitcode", "9"]
                command += [only_ours, "kns=segattn"] if only_ours else []
                command += [sys.executable, "-m", "benchmarks.gpu_driver", "--op", family, "--dtypes", dtype]
                # PyTorch's allocator hands out parts of large blocks, in which memcheck would not see an overrun.
                environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                verdicts.append(_step(state, "sanitize", f"{family} {tool} {dtype}", command, clock, environment))
    return _all(verdicts)


def ceilings(state: State, clock: Clock, device: torch.device) -> bool | None:
    if state.step("ceilings", "device"):
        return True
    if clock.left < 30:
        return None
    found = gpu_cells.ceilings(device)
    state.set_step("ceilings", "device", "passed", **found)
    for name, value in found.items():
        print(f"  {name}: {value / 1e12:.2f} T/s")
    return True


def profile(state: State, clock: Clock, device: torch.device) -> bool | None:
    """Nsight Compute's account of the package's kernels at 97 x 97, the device's clocks left as they are."""
    program = shutil.which("ncu")
    if not program:
        state.set_step("profile", "ncu", "failed", output=["ncu is not on PATH"])
        return False
    verdicts = []
    for family in FAMILIES:
        log = state.path.parent / f"profile-{family}.txt"
        command = [program, "--clock-control", "none", "--set", "full", "--kernel-name-base", "mangled"]
        command += ["--kernel-name", "regex:segattn", "--log-file", str(log.resolve())]
        command += [sys.executable, "-m", "benchmarks.gpu_driver", "--op", family, "--dtypes", "bfloat16", "--once"]
        command += ["--size", "97x97", "--batch", "8", "--channels", "512", "--key-channels", "64"]
        verdicts.append(_step(state, "profile", family, command, clock))
    return _all(verdicts)


def bench(family: str, state: State, clock: Clock, device: torch.device) -> bool | None:
    good = True
    choices = state.pieces.setdefault("sdpa", {})  # op and dtype -> which backends took it, which was chosen
    for workload in workloads_of(family):
        todo = [name for name in rivals.applicable(RIVALS, workload) if not state.cell(workload, name)]
        if not todo:
            continue
        if clock.left < 60:
            return None
        if workload.op in rivals.APPLICABLE["sdpa"] and f"{workload.op} {workload.dtype}" not in choices:
            choices[f"{workload.op} {workload.dtype}"] = gpu_cells.sdpa_choice(workload, device)
        cell = None
        # Eager's error is the measure of the fused op's, so it runs again with it.
        for name in dict.fromkeys((["eager"] if "fused" in todo else []) + todo):
            if clock.left < 40:
                return None
            needed, available = peak_bytes(workload, name), measure.available_bytes(str(device))
            if needed > MEMORY_SHARE * available:
                reason = f"would not fit: needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
                entry = record(workload, name, "skipped", reason)
            else:
                cell = cell or gpu_cells.DeviceCell(workload, device)
                entry = gpu_cells.cell_record(workload, name, cell, device)
            good &= entry["status"] in ("measured", "skipped") or name != "fused"
            state.set_cell(entry)
            print(f"{workload.label} {rivals.TITLES[name]}: {_line(entry)}", flush=True)
        del cell
        torch.cuda.empty_cache()
    return good


def _line(entry: dict) -> str:
    if entry["status"] != "measured":
        return f"{entry['status']}, {entry['reason']}"
    return ", ".join(f"{kind} {entry[kind]['median'] * 1e3:.3f} ms" for kind in ("forward", "backward"))


def _all(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


COLUMNS = (
    "op",
    "size",
    "B",
    "dtype",
    "",
    "forward ms",
    "TFLOP/s",
    "GB/s",
    "graph ms",
    "backward ms",
    "TFLOP/s",
    "both, x ours",
    "extra MiB",
    "error",
)


def table(cells: list[dict]) -> list[list[str]]:
    """A row a cell: TFLOP/s of the definition, GB/s of the least bytes that must move, time over the fused op's."""
    order = {name: index for index, name in enumerate(rivals.RIVALS)}
    ours = {key_of(entry): entry for entry in cells if entry["rival"] == "fused" and entry["status"] == "measured"}
    rows = []
    groups = sorted(
        cells, key=lambda e: (workloads.OPS.index(e["op"]), e["dtype"], e["positions"], e["batch"], order[e["rival"]])
    )
    for entry in groups:
        row = [entry["op"], report.size_of(entry), str(entry["batch"]), entry["dtype"], rivals.TITLES[entry["rival"]]]
        if entry["status"] != "measured":
            rows.append([*row, f"{entry['status']}: {entry['reason']}", *[""] * (len(COLUMNS) - len(row) - 1)])
            continue
        flop = entry["flop"]
        forward, backward = entry["forward"]["median"], entry["backward"]["median"]
        fused = ours.get(key_of(entry | {"rival": "fused"}))
        graph = entry.get("forward_graph")
        row += [
            f"{forward * 1e3:.3f}",
            f"{flop['forward'] / forward / 1e12:.1f}",
            f"{least_bytes(entry) / forward / 1e9:.0f}",
            f"{graph['median'] * 1e3:.3f}" if graph else "",
            f"{backward * 1e3:.3f}",
            f"{(flop['forward_backward'] - flop['forward']) / backward / 1e12:.1f}",
            f"{entry['forward_backward']['median'] / fused['forward_backward']['median']:.2f}" if fused else "",
            f"{entry['memory']['forward_backward'] / measure.MIB:.1f}" if entry["memory"] else "",
            f"{validate.worst(entry['errors']):.0e}",
        ]
        rows.append(row)
    return rows


def least_bytes(entry: dict) -> int:
    """Bytes a forward must move: each input read once, the output written once."""
    workload = Workload(
        *(entry[name] for name in ("op", "height", "width", "dtype", "batch", "channels")),
        key_channels=entry["query_channels"] if entry["op"] in ("position", "criss_cross", "rcca") else 64,
    )
    return workload.operand_bytes()


def write_table(state: State) -> Path:
    """gpu.md beside the JSON: the steps, the ceilings and the table."""
    facts = state.machine
    parts = ["# segattn_ops on a GPU", f"{facts.get('gpu')}, CUDA {facts.get('cuda')}, torch {facts.get('torch')}"]
    steps = [
        [piece, name, entry["status"], f"{entry.get('seconds', '')}", entry["commit"] or ""]
        for piece, entries in state.pieces.items()
        for name, entry in entries.items()
        if "status" in entry
    ]
    parts.append(report.markdown_table(("piece", "step", "status", "s", "commit"), steps))
    if found := state.pieces.get("ceilings", {}).get("device"):
        lines = [[name, f"{value / 1e12:.2f}"] for name, value in found.items() if name.endswith("per_second")]
        parts.append(report.markdown_table(("ceiling", "T/s"), lines))
    for name, answers in state.pieces.get("sdpa", {}).items():
        parts.append(f"SDPA, {name}: " + "; ".join(f"{backend}: {answer}" for backend, answer in answers.items()) + ".")
    parts.append(report.markdown_table(COLUMNS, table(list(state.cells.values()))))
    path = state.path.with_suffix(".md")
    path.write_text("\n\n".join(parts) + "\n")
    return path


def describe(state: State, pieces: list[str]) -> list[str]:
    """What ``--dry-run`` prints: each piece's steps, and which are done."""
    lines = []
    for piece in pieces:
        if piece.startswith("bench-"):
            planned = [
                (workload, name)
                for workload in workloads_of(piece.removeprefix("bench-"))
                for name in rivals.applicable(RIVALS, workload)
            ]
            done = sum(state.cell(*cell) is not None for cell in planned)
            lines.append(f"{piece}: {len(planned)} cells, {done} done")
            lines += [
                f"  {workload.label}: " + ", ".join(name for other, name in planned if other == workload)
                for workload in dict.fromkeys(workload for workload, _ in planned)
            ]
        else:
            lines.append(f"{piece}: " + (", ".join(state.pieces.get(piece, {})) or "nothing done"))
            if piece == "tests":
                lines += [f"  {name}" for name in test_files()]
            if piece == "sanitize":
                lines += [f"  {family} {tool}" for family in FAMILIES for tool in SANITIZERS]
    return lines


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description="Builds for the GPU at hand, tests, sanitizes, profiles and benchmarks; resumable.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--piece", choices=PIECES, action="append", help="repeatable; all of them, in order, if not given")
    p.add_argument("--output", type=Path, default=Path("report/gpu/gpu.json"), help="state and result, one JSON")
    p.add_argument("--limit", type=float, default=460.0, help="seconds of this invocation; the next one goes on")
    p.add_argument("--device", default="cuda", help="cuda or cuda:N")
    p.add_argument("--again", action="store_true", help="forget what is done")
    p.add_argument("--dry-run", action="store_true", help="list the work and what of it is done; needs no GPU")
    return p


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    pieces = arguments.piece or list(PIECES)
    if arguments.dry_run:
        print("\n".join(describe(State(arguments.output, arguments.again), pieces)))
        return 0
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device here, so there is nothing to run (--dry-run lists the work).")
        return 0
    device = torch.device(arguments.device)
    state = State(arguments.output, arguments.again)
    state.machine = report.machine(str(device), torch.get_num_threads())
    state.commands.append(" ".join(["python -m benchmarks.gpu_suite", *argv]))
    state.save()
    clock = Clock(arguments.limit)
    verdicts = []
    for piece in pieces:
        if piece.startswith("bench-"):
            verdicts.append(bench(piece.removeprefix("bench-"), state, clock, device))
        else:
            verdicts.append(globals()[piece](state, clock, device))
        if piece == "build" and verdicts[-1] is not True:
            break  # nothing after it would measure this tree
    print(f"gpu_suite: {write_table(state)}")
    verdict = _all(verdicts)
    return 1 if verdict is False else MORE_TO_DO if verdict is None else 0


if __name__ == "__main__":
    sys.exit(main())
