"""The piece ``bench``: the selection's cells, one rival at one workload each, measured in a worker process."""

from __future__ import annotations

from dataclasses import asdict

from .. import rivals
from ..run import record
from ..workloads import Workload
from .client import Refused, TooLong, Worker, WorkerLost
from .selection import OURS, Selection
from .state import Clock, State, combined
from .steps import LEAST_SECONDS

CELL_SECONDS = 100.0  # limit of a cell, including the start of its process and compilation
_AFTER = "after "  # how the reason of a cell that took its whole time starts
SDPA = tuple(name for name in rivals.RIVALS if name.startswith("sdpa"))


def steps(selection: Selection) -> list[str]:
    return [f"{work.label}: {', '.join(selection.rivals_of(work))}" for work in selection.workloads()]


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Runs the selection's cells that have no final record.

    Returns:
        True if no cell of ours failed, None if time ran out, False if one of ours failed or the package's kernels for
        the device are not loaded; then nothing is measured.
    """
    with Worker(device) as worker:
        try:
            worker.ask("require_native", min(CELL_SECONDS, max(clock.left, 1)))
        except (Refused, WorkerLost) as error:
            print(f"bench: {error}", flush=True)
            state.set_step("bench", "kernels", "failed", output=[str(error)])
            return False
        for workload in selection.workloads():
            for name in selection.rivals_of(workload):
                if state.cell(workload, name):
                    continue
                if clock.left < LEAST_SECONDS:
                    return _verdict(state, selection)
                _run_cell(state, clock, worker, workload, name)
    return _verdict(state, selection)


def _refusal(state: State, workload: Workload, name: str) -> str | None:
    """Why a cell is skipped, or None. A cell of the package runs whatever failed elsewhere, unless one of its op and
    dtype took its whole time: kernels that hang would take that of all other cells."""
    refusal = state.refusal(workload, name)
    hung = refusal is not None and f": {_AFTER}" in refusal
    return refusal if name not in OURS or hung else None


def _run_cell(state: State, clock: Clock, worker: Worker, workload: Workload, name: str) -> None:
    """Runs one cell and records its result."""
    refusal = _refusal(state, workload, name)
    if refusal:
        state.set_cell(record(workload, name, "skipped", refusal[:300]))
        return
    if name in SDPA:
        _choose_sdpa(state, clock, worker, workload)
    if not state.start_cell(workload, name):
        return
    eager = state.cell(workload, "eager")
    limit = min(CELL_SECONDS, clock.left)
    try:
        entry = worker.ask(
            "cell",
            limit,
            workload=asdict(workload),
            rival=name,
            eager_errors=eager.get("errors") if eager else None,
            # An eager cell that failed on its own would fail in this process too.
            run_eager=name in OURS and eager is None and not state.refusal(workload, "eager"),
        )
    except Refused as refused:  # raised outside the cell's own record: by its operands or a missing library
        entry = record(workload, name, "failed", str(refused))
    except TooLong as late:
        status = "failed" if limit == CELL_SECONDS else "stopped"  # "stopped": the suite's own time ended
        entry = record(workload, name, status, f"{_AFTER}{limit:.0f} s it {late}")
    except WorkerLost as lost:
        entry = record(workload, name, "crashed", str(lost))
    state.set_cell(entry)
    print(f"{workload.label} {rivals.TITLES[name]}: {_line(entry)}", flush=True)


def _choose_sdpa(state: State, clock: Clock, worker: Worker, workload: Workload) -> None:
    """Records which of SDPA's backends accept an op and dtype, and which one PyTorch chooses."""
    choices, key = state.pieces.setdefault("sdpa", {}), f"{workload.op} {workload.dtype}"
    if key in choices:
        return
    try:
        choices[key] = worker.ask("sdpa", min(CELL_SECONDS, clock.left), workload=asdict(workload))
    except (Refused, WorkerLost) as error:
        choices[key] = {"unknown": str(error)}


def _verdict(state: State, selection: Selection) -> bool | None:
    verdicts = []
    for workload in selection.workloads():
        for name in selection.rivals_of(workload):
            found = state.cell(workload, name)
            bad = found and name in OURS and found["status"] not in ("measured", "skipped")
            verdicts.append(None if found is None else not bad)
    return combined(verdicts)


def _line(entry: dict) -> str:
    if entry["status"] != "measured":
        return f"{entry['status']}, {entry['reason']}"
    return ", ".join(f"{kind} {entry[kind]['median'] * 1e3:.3f} ms" for kind in ("forward", "backward"))
