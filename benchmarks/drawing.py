"""How the plots of a report look and are written: PNG grids for Markdown, SVG panel by panel for the page.

Colours are Okabe and Ito's, which remain distinct with colour-blindness; every rival also has its own marker. Texts are
10 pt in a panel of 4.4 inches, so that they stay readable when a page shows two panels side by side.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.compilers import files

from . import rivals

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


def size_axis(ax, sizes: dict[int, str], beyond: dict[int, str] | None = None) -> None:
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


def log_numbers(axis, low: float, high: float, format=lambda value: f"{value:g}") -> None:
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


def end_numbers(ax, ends: list[tuple[float, float, str, bool]]) -> None:
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


def line(ax, name: str, xs: list[float], ys: list[float], **style) -> None:
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
