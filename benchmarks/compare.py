"""``python -m benchmarks compare OLD NEW``: what became slower or larger between two JSON files of the benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import command_line, report, statistics
from .command_line import Refused

PROG = "python -m benchmarks compare"
SUMMARY = "regressions between two JSON files, with intervals; exit status 1 if there is one"
KEYS = ("op", "module", "model", "height", "width", "dtype", "batch", "channels", "query_channels", "rival")
JUDGED = "fused"  # the others are controls: they tell how much the machine has changed
MEMORY_FLOOR = 2**20  # bytes; smaller differences of peak memory are a page of some library


@dataclass(frozen=True)
class Change:
    """New over old of one figure of one cell. Without an interval (low and high are None) it has no verdict."""

    cell: str
    rival: str
    figure: str
    old: float
    new: float
    low: float | None
    high: float | None

    @property
    def ratio(self) -> float:
        return self.new / self.old if self.old else float("inf")

    def verdict(self, threshold: float) -> str:
        if self.low is None or self.high is None:
            return "unclear"
        if self.low > 1 and self.ratio > 1 + threshold:
            return "regression"
        if self.high < 1 and self.ratio < 1 / (1 + threshold):
            return "improvement"
        return "level" if 1 / (1 + threshold) <= self.low and self.high <= 1 + threshold else "unclear"


def key(cell: dict) -> tuple:
    return tuple(cell.get(name) for name in KEYS)


def label(cell: dict) -> str:
    what = next(cell[name] for name in KEYS[:3] if name in cell)
    batch = f" B={cell['batch']}" if cell.get("batch", 1) > 1 else ""
    return f"{what} {cell['height']}x{cell['width']}{batch} {cell['dtype']}"


def changes(old: dict, new: dict) -> tuple[list[Change], list[str]]:
    """The changes of the cells that both files measured, and a line for each cell of ours that only OLD measured."""
    before = {key(cell): cell for cell in old["cells"] if cell["status"] == "measured"}
    after = {key(cell): cell for cell in new["cells"]}
    found, lost = [], []
    for name, cell in before.items():
        other = after.get(name)
        if other is None or other["status"] != "measured":
            why = "no such cell" if other is None else f"{other['status']}, {other['reason']}"
            if cell["rival"] == JUDGED and other is not None:
                lost.append(f"{label(cell)} {cell['rival']}: measured in OLD; in NEW {why}")
            continue
        for figure in report.PASSES:
            if figure in cell and figure in other:
                found.append(_time(cell, other, figure))
            memories = [(entry.get("memory") or {}).get(figure) for entry in (cell, other)]
            if None not in memories:
                found.append(_memory(cell, figure, *memories))
    return found, lost


def _time(cell: dict, other: dict, figure: str) -> Change:
    """Medians of two runs, which are not paired. The ends of the interval are those of both medians, so it covers the
    ratio at least as often as these cover their medians."""
    old, new = cell[figure], other[figure]
    known = None not in (old["low"], new["low"])
    low, high = (new["low"] / old["high"], new["high"] / old["low"]) if known else (None, None)
    return Change(label(cell), cell["rival"], figure, old["median"], new["median"], low, high)


def _memory(cell: dict, figure: str, old: int, new: int) -> Change:
    """Peak memory does not scatter: its interval is one point, and differences below MEMORY_FLOOR are none."""
    ratio = 1.0 if abs(new - old) < MEMORY_FLOOR else new / max(old, 1)
    return Change(label(cell), cell["rival"], f"{figure} memory", old, new, ratio, ratio)


def read(path: Path) -> dict:
    """Raises :class:`Refused` for a file that the benchmarks of this version did not write."""
    try:
        content = json.loads(path.read_text())
        schema, cells = content["schema"], content["cells"]
        labels = [label(cell) + cell["status"] + cell["rival"] for cell in cells]
    except OSError:
        raise
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise Refused(f"{path} is no JSON of the benchmarks with comparable cells ({error!r})") from error
    if schema != report.SCHEMA:
        raise Refused(f"{path} must be of schema {report.SCHEMA} (got {schema})")
    if not labels:
        raise Refused(f"{path} has no cells")
    return content


def lines_of(found: list[Change], threshold: float, everything: bool) -> list[list[str]]:
    table = []
    for change in found:
        verdict = change.verdict(threshold)
        if change.rival != JUDGED or not (everything or verdict in ("regression", "improvement")):
            continue
        ends = "one pass" if change.low is None else f"{change.low:.3f}-{change.high:.3f}"
        table.append([change.cell, change.figure.replace("_", " + "), f"{change.ratio:.3f}", ends, verdict])
    return table


def control(found: list[Change]) -> str:
    """How the rivals' times changed: the machine, or torch."""
    ratios = sorted(change.ratio for change in found if change.rival != JUDGED and not change.figure.endswith("memory"))
    if not ratios:
        return "No rival was measured in both files: nothing tells whether the machine is as fast."
    spread = statistics.interval(ratios)
    ends = f" ({spread[0]:.3f}-{spread[1]:.3f})" if spread else ""
    return f"Times of the rivals, new over old: median {median(ratios):.3f}{ends} of {len(ratios)}."


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(
        prog=PROG, description=f"Prints {SUMMARY}. Only the cells of segattn_ops are judged; rivals are controls."
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a JSON file of ops, scaling, modules or models")
    parser.add_argument("new", type=Path, metavar="NEW", help="a later one of the same cells")
    parser.add_argument(
        "--threshold", type=command_line.positive, default=5.0, help="percent that a regression exceeds (default 5)"
    )
    parser.add_argument("--all", action="store_true", help="also list what is level or unclear")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return command_line.run(PROG, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    old, new = read(arguments.old), read(arguments.new)
    found, lost = changes(old, new)
    judged = [change for change in found if change.rival == JUDGED]
    if not judged and not lost:
        raise Refused(f"{arguments.old} and {arguments.new} have no measured cell of segattn_ops in common")
    for name, content in (("OLD", old), ("NEW", new)):
        print(f"{name}: {content['date']}, commit {content['commit'] or 'unknown'}, {report.where(content)}")
    if report.where(old) != report.where(new):
        print("The machines or versions differ: a change may be theirs.")
    print(control(found))
    threshold = arguments.threshold / 100
    table = lines_of(found, threshold, arguments.all)
    if table:
        print("\n" + report.markdown_table(("cell", "figure", "new / old", "interval", "verdict"), table) + "\n")
    for line in lost:
        print(f"regression: {line}")
    verdicts = [change.verdict(threshold) for change in judged]
    counts = {name: verdicts.count(name) for name in ("regression", "improvement", "level", "unclear")}
    counts["regression"] += len(lost)
    print(f"{len(verdicts) + len(lost)} figures: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(counts["regression"] > 0)
