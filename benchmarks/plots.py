"""The plots of a report: panels that are drawn into PNG grids for Markdown, and one by one as SVG for the page.

Colours are Okabe and Ito's, which remain distinct with colour-blindness; every rival also has its own marker. Texts are
10 pt in a panel of 4.4 inches, so that they stay readable when a page shows two panels side by side.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tools.compilers import files

from . import rivals, workloads
from .ceilings import flop_ceiling
from .report import MIB, groups, size_of
from .workloads import Workload

_FIXED = {
    "fused": ("#D55E00", "o"),
    "eager": ("#0072B2", "s"),
    "sdpa": ("#009E73", "^"),
    "compile": ("#E69F00", "D"),
    "flex": ("#CC79A7", "v"),
    "onnxruntime": ("#56B4E9", ">"),
    "onnx_attention": ("#5D3A9B", "<"),
    "eager_onednn": ("#7F7F7F", "P"),
    "sdpa_onednn": ("#8C6D1F", "X"),
    "mmcv": ("#A8A000", "*"),
}
_OTHER_COLOURS = ("#56B4E9", "#7F7F7F", "#8C6D1F", "#5D3A9B")
_OTHER_MARKERS = ("p", "h", "v", "P", "<")
_OTHERS = [name for name in rivals.TITLES if name not in _FIXED]
COLOURS = {name: colour for name, (colour, _) in _FIXED.items()} | {
    name: _OTHER_COLOURS[index % len(_OTHER_COLOURS)] for index, name in enumerate(_OTHERS)
}
MARKERS = {name: marker for name, (_, marker) in _FIXED.items()} | {
    name: _OTHER_MARKERS[index % len(_OTHER_MARKERS)] for index, name in enumerate(_OTHERS)
}
INK, FAINT, PAPER = "#1b1f24", "#c9ced4", "#fefefe"  # of text, grids and what is behind; a page puts in its own
PANEL = (4.4, 3.3)  # inches
LEGEND_COLUMN = 2.0  # inches
NUMBER_HEIGHT = 11.5  # points, of a number at the end of a line
GIB = 2**30
CARDS = (8, 24, 80)  # GB of common GPUs, marked in the plots of memory
BEYOND = ((128, 256), (256, 256), (256, 512))  # sizes at which a formula continues a curve of memory
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "segattn_ops",
}
Panel = Callable[..., None]  # draws into the axes that it is given


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def new_figure(count: int, rows: int, panel: tuple[float, float] = PANEL):
    return _pyplot().subplots(
        rows, count, figsize=(panel[0] * count, panel[1] * rows + 0.7), squeeze=False, constrained_layout=True
    )


def finish(figure, axes, path: Path, heading: str) -> Path:
    """Writes the figure with a legend of all its panels below."""
    handles: dict[str, object] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        ax.grid(True, which="major", color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=12)
    columns = min(len(handles), max(int(figure.get_figwidth() / LEGEND_COLUMN), 1))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    with files.replacing(path) as part:
        figure.savefig(part, dpi=150)
    _pyplot().close(figure)
    return path


def grid(panels: Sequence[Panel], path: Path, heading: str, columns: int = 2) -> Path | None:
    """A PNG of the panels, row by row; None without any."""
    if not panels:
        return None
    with _pyplot().rc_context(STYLE):
        columns = min(columns, len(panels))
        figure, axes = new_figure(columns, -(-len(panels) // columns))
        for ax, panel in zip(axes.flat, panels, strict=False):
            panel(ax)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_visible(False)
        return finish(figure, axes, path, heading)


def svg(panel: Panel, height: float = PANEL[1]) -> str:
    """The panel as an SVG element for a page: text stays text, and ink and grid take the page's colours."""
    pyplot = _pyplot()
    with pyplot.rc_context(STYLE):
        figure, ax = pyplot.subplots(figsize=(PANEL[0], height), constrained_layout=True)
        panel(ax)
        ax.grid(True, which="major", color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = written.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(INK, "currentColor")
        .replace(FAINT, "var(--faint)")
        .replace(PAPER, "var(--back)")
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page has many: ids that nothing refers to are dropped, the others get a prefix of this one's content.
    prefix = "p" + hashlib.sha256(text.encode()).hexdigest()[:8]
    referred = set(re.findall(r"[\"(]#([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in referred else "", text)
    text = re.sub(r"([\"(])#([^\")]+)", lambda match: f"{match[1]}#{prefix}{match[2]}", text)
    # Text is set in the page's font; anchors keep it in place where that is narrower than matplotlib's.
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    return re.sub(r' width="[^"]*pt" height="[^"]*pt"| height="[^"]*pt"| width="[^"]*pt"', "", text, count=2)


def size_label(height: int, width: int) -> str:
    return f"{height}²" if height == width else f"{height}x{width}"


def _size_axis(ax, sizes: dict[int, str], beyond: dict[int, str] | None = None) -> None:
    """A logarithmic axis of positions with the sizes' names, as many as do not overlap, the largest first, those
    ``beyond`` the measured ones last."""
    order = sorted(sizes, reverse=True) + sorted((beyond or {}).keys() - sizes.keys(), reverse=True)
    sizes = (beyond or {}) | sizes
    ax.set_xscale("log", base=2)
    low, high = min(sizes), max(sizes)
    octaves = max(math.log2(high / low), 1.0)
    per_octave = 0.66 * PANEL[0] / octaves  # inches
    keep: list[int] = []
    for n in order:
        if all(
            abs(math.log2(other / n)) * per_octave >= 0.085 * (len(sizes[n]) + len(sizes[other])) / 2 + 0.06
            for other in keep
        ):
            keep.append(n)
    ax.set_xticks(keep, [sizes[n] for n in keep])
    ax.set_xticks(sorted(sizes), minor=True)
    ax.xaxis.set_minor_formatter("")
    ax.set_xlim(low / 1.25, high * 2 ** (octaves * 0.16))  # room for the numbers at the ends of the lines


def _log_numbers(axis, low: float, high: float, format=lambda value: f"{value:g}") -> None:
    """Plain numbers on a log axis: decades, and 2 and 5 of each where the axis has few."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    decades = math.log10(high / low)
    digits = (
        (1,) if decades > 3.2 else (1, 3) if decades > 2 else (1, 2, 5) if decades > 0.7 else (1, 1.5, 2, 3, 4, 5, 7)
    )
    ticks = [
        digit * 10.0**exponent
        for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in digits
        if low <= digit * 10.0**exponent <= high
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: format(value))
    axis.set_minor_formatter(NullFormatter())


def _end_numbers(ax, ends: list[tuple[float, float, str, bool]]) -> None:
    """Writes each (x, y, text, bold) to the right of its point; texts that would overlap are spread about their
    middle."""
    points = 72 / ax.get_figure().dpi
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [ax.transData.transform((x, y))[1] * points for x, y, *_ in ends]
    clusters: list[list[int]] = []
    places = list(wanted)
    for index in range(len(ends)):
        cluster = [index]
        while clusters and places[clusters[-1][-1]] + NUMBER_HEIGHT > places[cluster[0]]:
            cluster = clusters.pop() + cluster
            middle = sum(wanted[i] for i in cluster) / len(cluster)
            for order, i in enumerate(cluster):
                places[i] = middle + (order - (len(cluster) - 1) / 2) * NUMBER_HEIGHT
        clusters.append(cluster)
    for (x, y, text, bold), place, own in zip(ends, places, wanted, strict=True):
        weight = "bold" if bold else "normal"
        ax.annotate(text, (x, y), xytext=(7, place - own), textcoords="offset points", va="center", fontweight=weight)


def _line(ax, name: str, xs: list[float], ys: list[float], **style) -> None:
    fused = name == "fused"
    ax.plot(
        xs,
        ys,
        **{
            "color": COLOURS[name],
            "marker": MARKERS[name],
            "markersize": 5,
            "linewidth": 2.2 if fused else 1.5,
            "zorder": 4 if fused else 3,
            "label": rivals.TITLES[name],
        }
        | style,
    )


def _of_rival(entries: list[dict], name: str, kind: str = "forward") -> list[dict]:
    """Its measured cells that have this pass."""
    return [e for e in entries if e["rival"] == name and e["status"] == "measured" and e.get(kind)]


def extra_bytes(cell: dict) -> int | None:
    """Of forward + backward; None where it was not measured, or the rival has no backward."""
    return (cell["memory"] or {}).get("forward_backward")


def _names(entries: list[dict]) -> list[str]:
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
        for name in _names(entries):
            cells = _of_rival(entries, name, kind)
            if not cells:
                continue
            ys = [cell[kind]["median"] * 1e3 for cell in cells]
            _line(ax, name, [cell["positions"] for cell in cells], ys)
            values += ys
            if cells[-1]["positions"] == largest:
                ends.append((largest, ys[-1], _short(ys[-1]), name == "fused"))
        low, high = min(values) / 1.5, max(values) * 2.5
        ax.set_ylim(low, high)
        _size_axis(ax, {entry["positions"]: size_label(entry["height"], entry["width"]) for entry in entries})
        _log_numbers(ax.yaxis, low, high)
        _end_numbers(ax, ends)
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
    eager = _of_rival(entries, "eager")
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
        for name in _names(entries):
            cells = [cell for cell in _of_rival(entries, name) if extra_bytes(cell) is not None]
            if not cells:
                continue
            ys = [max(extra_bytes(cell), 2**14) for cell in cells]
            _line(ax, name, [cell["positions"] for cell in cells], ys)
            values += ys
            if name in ("fused", "eager"):
                numbers.append((cells[-1]["positions"], ys[-1], name == "fused"))
        xs, ys = _by_formula(entries)
        if xs:
            before = [cell for cell in _of_rival(entries, "eager") if extra_bytes(cell)][-1:]
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
        _size_axis(ax, sizes, beyond)
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


def intensity(entry: dict) -> float:
    """FLOP of the definition's forward for each byte of inputs and output."""
    return entry["flop"]["forward"] / Workload.of(entry).least_bytes()[0]


def roof(entry: dict, ceilings: dict) -> float | None:
    """FLOP/s that the machine allows a forward: a large product's, or the copy's bandwidth times the intensity."""
    product, copy = flop_ceiling(ceilings, entry["dtype"]), ceilings.get("copy_bytes_per_second")
    return min(product, copy * intensity(entry)) if product and copy else None


def roofline_panel(cells: list[dict], ceilings: dict, dtype: str) -> Panel:
    """GFLOP/s of each op's forward over its FLOP a byte, below the roof of the machine: a point for each cell. Above
    the roof are the ops' names and the share of the roof that the fused op reaches."""

    def draw(ax) -> None:
        ax.set_xscale("log")
        ax.set_yscale("log")
        product, copy = flop_ceiling(ceilings, dtype), ceilings["copy_bytes_per_second"]
        xs = [intensity(cell) for cell in cells]
        left, right = min(*xs, product / copy) / 4, max(xs) * 4
        ys = {id(cell): cell["flop"]["forward"] / cell["forward"]["median"] / 1e9 for cell in cells}
        top = max(product / 1e9, *ys.values())
        low, high = min(ys.values()) / 2, top * 1.3
        fused = sorted(_of_rival(cells, "fused"), key=intensity)
        levels = _levels([math.log(intensity(cell) / left) / math.log(right / left) for cell in fused])
        decades = math.log10(high / low)
        step = 0.13 * decades / (1 - 0.13 * (1 + max(levels, default=0)))  # decades, of a name's height
        ax.plot([left, product / copy, right], [left * copy / 1e9, *[product / 1e9] * 2], color=INK, linewidth=1.6)
        for name in _names(cells):
            points = [(intensity(cell), ys[id(cell)]) for cell in _of_rival(cells, name)]
            size = 8 if name == "fused" else 6
            _line(ax, name, *map(list, zip(*points, strict=True)), linestyle="none", markersize=size)
        for cell, level in zip(fused, levels, strict=True):
            x, y = intensity(cell), ys[id(cell)]
            at = high * 10 ** (step * level)
            ax.plot([x, x], [y, at], color=FAINT, linewidth=1.0, zorder=1)
            share = f"{100 * y * 1e9 / roof(cell, ceilings):.0f}%"
            ax.annotate(f"{cell['op']}\n{share}", (x, at), ha="center", va="bottom", linespacing=1.0)
        ax.set_xlim(left, right)
        ax.set_ylim(low, high * 10 ** (step * (1 + max(levels, default=0))))
        _log_numbers(ax.xaxis, left, right)
        _log_numbers(ax.yaxis, low, top * 1.1)
        ax.set_title(f"{dtype}, GFLOP/s; product {product / 1e9:.0f}, copy {copy / 1e9:.0f} GB/s", loc="left")
        ax.set_xlabel("FLOP a byte of inputs and output")

    return draw


def _levels(places: list[float]) -> list[int]:
    """For names centred on sorted ``places`` in [0, 1] of a panel's width: the lowest level at which each overlaps no
    other."""
    ends: list[float] = []
    levels = []
    for place in places:
        level = next((index for index, end in enumerate(ends) if place - end >= 0.27), len(ends))
        ends[level : level + 1] = [place]
        levels.append(level)
    return levels


def roofline_cells(records: list[dict], dtype: str) -> list[dict]:
    """Of each op the measured cells at the largest size that fused and eager both ran, else that fused ran."""
    chosen: list[dict] = []
    for (_, of_dtype, _), entries in groups(records).items():
        measured = [entry for entry in entries if entry["status"] == "measured"]
        fused = {size_of(entry): entry["positions"] for entry in measured if entry["rival"] == "fused"}
        eager = {size_of(entry) for entry in measured if entry["rival"] == "eager"}
        both = {size: n for size, n in fused.items() if size in eager}
        if of_dtype == dtype and fused:
            candidates = both or fused
            size = max(candidates, key=candidates.__getitem__)
            chosen += [entry for entry in measured if size_of(entry) == size]
    return chosen


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
        _log_numbers(ax.xaxis, low, high)
        ax.set_title(heading, loc="left", x=-0.15)

    return draw


def ratio_height(rows: list[tuple[str, list]]) -> float:
    """Inches of :func:`ratio_panel`."""
    return 0.9 + 0.25 * sum(len(bars) + 0.6 for _, bars in rows)
