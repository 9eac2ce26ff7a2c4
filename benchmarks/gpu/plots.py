"""Draws the suite's JSON, on any machine: ``python -m benchmarks.gpu_plots report/gpu/gpu.json``.

Each op family gets three pictures beside the JSON, with a row per workload and panels for forward and backward:
``FAMILY-throughput.png`` (every rival's TFLOP/s and that of a large matrix product on the device),
``FAMILY-rivals.png`` (every rival's time over the fused op's) and ``FAMILY-bound.png`` (the fused op's time over its
bound). Hollow markers include time the device waited for the host. Only cells of the latest sources and device are
drawn. Exit status 1 if there is nothing to draw, 2 if the file is not the suite's.
"""

from __future__ import annotations

from pathlib import Path

from .. import command_line, rivals, workloads
from ..ceilings import flop_ceiling
from ..command_line import Refused
from ..drawing import COLOURS, MARKERS, finish
from ..report import size_of
from ..workloads import Workload
from . import state
from .selection import FAMILIES

PROG = "python -m benchmarks.gpu_plots"
KINDS = ("forward", "backward")
ROW = 0.2  # inches
BOUNDS = {"FLOP": ("#30638e", "o"), "bytes": ("#edae49", "D")}  # what sets the bound: colour, marker


def current_cells(content: dict) -> list[dict]:
    """The measured cells with the sources and device of the latest one; others are not comparable."""

    def origin(entry: dict) -> tuple:
        return entry["sources"], entry.get("device")

    measured = [entry for entry in content["cells"] if entry["status"] == "measured"]
    if not measured:
        return []
    latest = origin(max(measured, key=lambda entry: entry["date"]))
    return [entry for entry in measured if origin(entry) == latest]


def seconds(entry: dict, kind: str) -> float:
    return entry[kind]["median"]


def flop(entry: dict, kind: str) -> int:
    """FLOP of the definition."""
    counted = entry["flop"]
    return counted["forward"] if kind == "forward" else counted["forward_backward"] - counted["forward"]


def throughput(entry: dict, kind: str) -> float:
    """TFLOP/s of the definition."""
    return flop(entry, kind) / seconds(entry, kind) / 1e12


def bound(entry: dict, kind: str, ceilings: dict) -> tuple[float, str] | None:
    """(least seconds of a cell, what sets them): FLOP over the dtype's ceiling, or bytes over that of a copy."""
    by_flop, copy = flop_ceiling(ceilings, entry["dtype"]), ceilings.get("copy_bytes_per_second")
    if not by_flop or not copy:
        return None
    moved = Workload.of(entry).least_bytes()[KINDS.index(kind)]
    return max((flop(entry, kind) / by_flop, "FLOP"), (moved / copy, "bytes"))


def _key(entry: dict) -> tuple:
    dtypes = ("bfloat16", "float16", "float32", "float64")
    op = workloads.OPS.index(entry["op"])
    return op, dtypes.index(entry["dtype"]), -entry["batch"], entry["positions"], entry["height"]


def _rows(cells: list[dict]) -> list[list[dict]]:
    """The cells by workload, in the order of the rows from the top."""
    rows: dict[tuple, list[dict]] = {}
    for entry in sorted(cells, key=_key):
        rows.setdefault(_key(entry), []).append(entry)
    return list(rows.values())


def _figure(rows: list[list[dict]], xlabel: str):
    """Two panels side by side with a row per workload and lines between dtypes and batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(11, ROW * len(rows) + 2.2), squeeze=False, sharey=True, constrained_layout=True
    )
    for ax, kind in zip(axes.flat, KINDS, strict=True):
        ax.set_xscale("log")
        ax.set_title(kind, fontsize=10)
        ax.set_xlabel(xlabel, fontsize=9)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        for index in range(1, len(rows)):
            here, above = _key(rows[index][0]), _key(rows[index - 1][0])
            if here[:3] != above[:3]:
                ax.axhline(index - 0.5, color="black", linewidth=0.8 if here[:2] != above[:2] else 0.3, zorder=1)
    labels = [f"{e['op']} {e['dtype']} B={e['batch']}  {size_of(e)}" for e, *_ in rows]
    axes[0, 0].set_yticks(range(len(rows)), labels, fontsize=7)
    return figure, axes


def _ticks(ax) -> None:
    """Plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=8)


HOLLOW = "hollow: with the host's time"


def _scatter(ax, points: list[tuple[float, int, bool]], colour: str, marker: str, label: str, **style) -> None:
    """Draws markers at (x, row, exposed), hollow where exposed: the figure includes waiting for the host."""
    if not points:
        return
    ax.scatter([], [], color=colour, marker=marker, label=label, **style)  # a legend entry even if all are hollow
    for exposed in (False, True):
        chosen = [(x, y) for x, y, with_host in points if with_host == exposed]
        if chosen and exposed:
            ax.scatter([], [], facecolors="none", edgecolors="#555555", marker="o", label=HOLLOW, **style)
        if chosen:
            face = {"facecolors": "none", "edgecolors": colour} if exposed else {"color": colour}
            ax.scatter(*zip(*chosen, strict=True), marker=marker, label=HOLLOW if exposed else label, **face, **style)


def _exposed(entry: dict, kind: str) -> bool:
    return kind in entry.get("host_exposed", ())


def _points(ax, rows: list[list[dict]], value, kind: str, names: tuple[str, ...]) -> None:
    """Draws each rival of each row at ``value(entry, row)``."""
    for name in names:
        found = [
            (value(entry, row), index, _exposed(entry, kind))
            for index, row in enumerate(rows)
            for entry in row
            if entry["rival"] == name
        ]
        fused = name == "fused"
        _scatter(
            ax,
            found,
            COLOURS[name],
            MARKERS[name],
            rivals.TITLES[name],
            s=34 if fused else 22,
            zorder=4 if fused else 3,
        )


def draw_throughput(cells: list[dict], ceilings: dict, path: Path, heading: str) -> Path:
    """TFLOP/s of the definition for every rival, and a line in each row at that of a large matrix product."""
    rows = _rows(cells)
    figure, axes = _figure(rows, "TFLOP/s of the definition (higher is better)")
    for ax, kind in zip(axes.flat, KINDS, strict=True):
        _points(ax, rows, lambda entry, _, kind=kind: throughput(entry, kind), kind, rivals.RIVALS)
        reached = [(flop_ceiling(ceilings, row[0]["dtype"]), index) for index, row in enumerate(rows)]
        lines = [(x / 1e12, y) for x, y in reached if x]
        if lines:
            x, y = zip(*lines, strict=True)
            label = "large matrix product"
            ax.vlines(x, [v - 0.5 for v in y], [v + 0.5 for v in y], color="black", linewidth=1.5, label=label)
        _ticks(ax)
    return finish(figure, axes, path, heading)


def draw_rivals(cells: list[dict], path: Path, heading: str) -> Path | None:
    """Every rival's time over the fused op's; None unless both were measured at some workload."""
    rows = [row for row in _rows(cells) if len(row) > 1 and any(entry["rival"] == "fused" for entry in row)]
    if not rows:
        return None

    def ratio(entry: dict, row: list[dict], kind: str) -> float:
        ours = next(other for other in row if other["rival"] == "fused")
        return seconds(entry, kind) / seconds(ours, kind)

    figure, axes = _figure(rows, "time over that of segattn_ops (right of 1: segattn_ops is faster)")
    names = tuple(name for name in rivals.RIVALS if name != "fused")
    for ax, kind in zip(axes.flat, KINDS, strict=True):
        ax.axvline(1, color=COLOURS["fused"], linewidth=2, zorder=2, label=rivals.TITLES["fused"])
        _points(ax, rows, lambda entry, row, kind=kind: ratio(entry, row, kind), kind, names)
        _ticks(ax)
    return finish(figure, axes, path, heading)


def draw_bound(cells: list[dict], ceilings: dict, path: Path, heading: str) -> Path | None:
    """The fused op's time over its bound, coloured by what sets it; None without ceilings or fused cells."""
    rows = [
        [entry]
        for row in _rows(cells)
        for entry in row
        if entry["rival"] == "fused" and bound(entry, "forward", ceilings)
    ]
    if not rows:
        return None
    figure, axes = _figure(rows, "time of segattn_ops over its bound (1 is the bound)")
    for ax, kind in zip(axes.flat, KINDS, strict=True):
        ax.axvline(1, color="black", linewidth=1.5, zorder=2, label="bound")
        for decides, (colour, marker) in BOUNDS.items():
            found = [(bound(entry, kind, ceilings), index, entry) for index, (entry,) in enumerate(rows)]
            points = [
                (seconds(entry, kind) / least, y, _exposed(entry, kind))
                for (least, by), y, entry in found
                if by == decides
            ]
            _scatter(ax, points, colour, marker, f"bound by {decides}", s=34, zorder=3)
        _ticks(ax)
    return finish(figure, axes, path, heading)


def draw(content: dict, folder: Path) -> list[Path]:
    """Draws every picture for which there are cells and ceilings; returns their paths."""
    ceilings = content.get("pieces", {}).get("ceilings", {}).get("device", {})
    cells = current_cells(content)
    machine = content.get("machine", {})
    place = f"{machine.get('gpu', 'unknown device')}, torch {machine.get('torch')}, commit "
    place += ", ".join(dict.fromkeys(str(entry["commit"]) for entry in cells))
    paths = []
    for family, ops in FAMILIES.items():
        chosen = [entry for entry in cells if entry["op"] in ops]
        if not chosen:
            continue
        heading = f"{family.capitalize()} attention: {{}}\n{place}".format
        paths += [
            draw_throughput(chosen, ceilings, folder / f"{family}-throughput.png", heading("throughput")),
            draw_rivals(chosen, folder / f"{family}-rivals.png", heading("rivals")),
            draw_bound(chosen, ceilings, folder / f"{family}-bound.png", heading("distance from the bound")),
        ]
    return [path for path in paths if path]


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(prog=PROG, description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="the JSON of benchmarks.gpu_suite")
    parser.add_argument("--output", type=Path, help="folder of the pictures; the JSON's own if not given")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(arguments.json, arguments.output or arguments.json.parent))


def _run(path: Path, folder: Path) -> int:
    command_line.require("matplotlib")
    try:
        content = state.read(path)
    except ValueError as error:
        raise Refused(error) from error
    try:
        paths = draw(content, command_line.writable_folder(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} has a cell that benchmarks.gpu_suite did not write ({error!r})") from error
    for picture in paths:
        print(f"gpu_plots: {picture}")
    return 0 if paths else command_line.fail(PROG, f"{path} has no measured cells", 1)
