"""The panels of a report: time and memory over size, and the rivals' times as bars."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from . import rivals, workloads
from .drawing import COLOURS, INK, MARKERS, PAPER, Panel, end_numbers, grid, line, log_numbers, size_axis, size_label
from .report import MIB, groups
from .workloads import Workload

GIB = 2**30
CARDS = (8, 24, 80)  # GB of common GPUs, marked in the plots of memory
BEYOND = ((128, 256), (256, 256), (256, 512))  # sizes at which a formula continues a curve of memory


def of_rival(entries: list[dict], name: str, kind: str = "forward") -> list[dict]:
    """Its measured cells that have this pass."""
    return [e for e in entries if e["rival"] == name and e["status"] == "measured" and e.get(kind)]


def extra_bytes(cell: dict) -> int | None:
    """Of forward + backward; None where it was not measured, or the rival has no backward."""
    return (cell["memory"] or {}).get("forward_backward")


def names_of(entries: list[dict]) -> list[str]:
    present = {entry["rival"] for entry in entries}
    return [name for name in rivals.TITLES if name in present]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def heading(op: str, dtype: str, batch: int) -> str:
    """Of a panel: the op, and on the next line what is said of it."""
    return f"{workloads.TITLES[op]}\n{dtype}{f', batch {batch}' if batch > 1 else ''}: "


KINDS = {"forward": "forward", "forward_backward": "forward + backward"}


def time_panel(key: tuple, entries: list[dict], kind: str, named: bool = True) -> Panel:
    """Milliseconds over N, with the number at the end of each line."""

    def draw(ax) -> None:
        ax.set_yscale("log")
        ends, values = [], []
        largest = max(entry["positions"] for entry in entries if entry["status"] == "measured")
        for name in names_of(entries):
            cells = of_rival(entries, name, kind)
            if not cells:
                continue
            ys = [cell[kind]["median"] * 1e3 for cell in cells]
            line(ax, name, [cell["positions"] for cell in cells], ys)
            values += ys
            if cells[-1]["positions"] == largest:
                ends.append((largest, ys[-1], _short(ys[-1]), name == "fused"))
        low, high = min(values) / 1.5, max(values) * 2.5
        ax.set_ylim(low, high)
        size_axis(ax, {entry["positions"]: size_label(entry["height"], entry["width"]) for entry in entries})
        log_numbers(ax.yaxis, low, high)
        end_numbers(ax, ends)
        ax.set_title(f"{heading(*key)}{KINDS[kind]}, ms" if named else f"{KINDS[kind]}, ms", loc="left")

    return draw


def measured_panels(records: list[dict]) -> dict[tuple, list[dict]]:
    """The groups of which something was measured."""
    return {
        key: entries
        for key, entries in groups(records).items()
        if any(entry["status"] == "measured" for entry in entries)
    }


def draw_time(records: list[dict], path: Path) -> Path | None:
    """A row for each op: forward, and forward + backward."""
    panels = [
        time_panel(key, entries, kind)
        for key, entries in measured_panels(records).items()
        for kind in KINDS
        if any(entry.get(kind) for entry in entries)
    ]
    return grid(panels, path, "Time against the size of the feature map, ms (lower is better)")


def bytes_label(value: float) -> str:
    """Bytes in the unit that leaves the fewest digits."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if value >= size:
            return f"{_short(value / size)} {unit}"
    return f"{value:.0f} B"


def seconds_label(seconds: float) -> str:
    return f"{_short(seconds)} s" if seconds >= 1 else f"{_short(seconds * 1e3)} ms"


def _by_formula(entries: list[dict]) -> tuple[list[int], list[float]]:
    """(positions, extra bytes) of eager beyond its last measured size, from the formula of its attention maps."""
    eager = of_rival(entries, "eager")
    known = eager or [entry for entry in entries if entry["rival"] == "eager"]
    if not known:
        return [], []
    last = eager[-1]["positions"] if eager else 0
    base = Workload.of(known[-1])
    sizes = {(entry["height"], entry["width"]) for entry in entries} | set(BEYOND)
    found = {}
    for height, width in sizes:
        workload = replace(base, height=height, width=width)
        if workload.positions > last:
            extra = workloads.peak_bytes(workload, "eager") - workload.operand_bytes() - workload.result_bytes()
            found[workload.positions] = extra
    return sorted(found), [found[n] for n in sorted(found)]


def memory_panel(key: tuple, entries: list[dict], named: bool = True) -> Panel:
    """Extra memory of forward + backward over N, and the memories of GPUs. Hollow, dotted: eager by formula."""

    def draw(ax) -> None:
        ax.set_yscale("log")
        numbers, values, beyond = [], [], {}
        sizes = {entry["positions"]: size_label(entry["height"], entry["width"]) for entry in entries}
        for name in names_of(entries):
            cells = [cell for cell in of_rival(entries, name) if extra_bytes(cell) is not None]
            if not cells:
                continue
            ys = [max(extra_bytes(cell), 2**14) for cell in cells]
            line(ax, name, [cell["positions"] for cell in cells], ys)
            values += ys
            if name in ("fused", "eager"):
                numbers.append((cells[-1]["positions"], ys[-1], name == "fused"))
        xs, ys = _by_formula(entries)
        if xs:
            before = [cell for cell in of_rival(entries, "eager") if extra_bytes(cell)][-1:]
            ax.plot(
                [cell["positions"] for cell in before] + xs,
                [extra_bytes(cell) for cell in before] + ys,
                color=COLOURS["eager"],
                marker=MARKERS["eager"],
                markerfacecolor="none",
                linestyle=":",
                linewidth=1.2,
                markevery=slice(len(before), None),
                label="eager, by formula",
            )
            values += ys
            beyond = {height * width: size_label(height, width) for height, width in BEYOND}
        limits = [card * GIB for card in CARDS]
        low, high = min(values) / 2, max(*values, *limits) * 4
        ax.set_ylim(low, high)
        size_axis(ax, sizes, beyond)
        for card, limit in zip(CARDS, limits, strict=True):
            ax.axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
            ax.annotate(f"{card} GB", (ax.get_xlim()[0], limit), xytext=(3, 2), textcoords="offset points", va="bottom")
        _bytes_axis(ax.yaxis, low, high)
        for x, y, bold in numbers:  # below their lines, which rise
            ax.annotate(
                bytes_label(y),
                (x, y),
                xytext=(8, -10),
                textcoords="offset points",
                va="center",
                fontweight="bold" if bold else "normal",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
                zorder=5,
            )
        ax.set_title(f"{heading(*key) if named else ''}extra memory of forward + backward", loc="left")

    return draw


def _bytes_axis(axis, low: float, high: float) -> None:
    """KiB, MiB and GiB in steps of eight or of 32."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    step = 3 if math.log2(high / low) < 18 else 5
    ticks = [2.0**n for n in range(10, 50, step) if low <= 2.0**n <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: bytes_label(value))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))


def draw_memory(
    records: list[dict], path: Path, heading: str = "Extra memory of forward + backward (lower is better)"
) -> Path | None:
    """A panel for each op."""
    panels = [
        memory_panel(key, entries)
        for key, entries in groups(records).items()
        if any(entry.get("memory") and extra_bytes(entry) for entry in entries)
    ]
    return grid(panels, path, heading)


def ratio_panel(rows: list[tuple[str, list[tuple[str, float, str]]]], heading: str) -> Panel:
    """Bars from 1, on a log axis: rows of (label, [(rival, its figure over the fused one, text)])."""

    def draw(ax) -> None:
        ax.set_xscale("log")
        place, ticks, values = 0.0, [], [1.0]
        for label, bars in rows:
            ticks.append((place + (len(bars) - 1) / 2, label))
            for name, ratio, text in bars:
                ax.barh(place, ratio - 1, left=1, height=0.8, color=COLOURS[name], label=rivals.TITLES[name], zorder=3)
                ax.annotate(
                    text,
                    (max(ratio, 1.0), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    annotation_clip=False,
                )
                values.append(ratio)
                place += 1
            place += 0.6
        low, high = min(values) / 1.08, max(values) * 1.05
        ax.set_xlim(low, high * (high / low) ** 0.75)
        ax.set_ylim(place - 0.9, -0.7)
        ax.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
        ax.tick_params(axis="y", length=0)
        ax.axvline(1, color=COLOURS["fused"], linewidth=2.2, zorder=4)
        log_numbers(ax.xaxis, low, high)
        ax.set_title(heading, loc="left", x=-0.15)

    return draw


def ratio_height(rows: list[tuple[str, list]]) -> float:
    """Inches of :func:`ratio_panel`."""
    return 0.9 + 0.25 * sum(len(bars) + 0.6 for _, bars in rows)
