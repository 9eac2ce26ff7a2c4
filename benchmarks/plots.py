"""Time and memory over the number of positions, log-log, one panel per op."""

from __future__ import annotations

import math
from pathlib import Path

from tools.compilers import files

from . import rivals
from .report import MIB, groups, title

COLOURS = {
    "fused": "#d1495b",
    "eager": "#30638e",
    "sdpa": "#7a9e35",
    "compile": "#edae49",
    "flex": "#8d6a9f",
    "sdpa_flash": "#2a9d8f",
    "sdpa_efficient": "#b5838d",
    "sdpa_cudnn": "#577590",
    "sdpa_flash_split": "#13505b",
}
LEGEND_COLUMN = 1.8  # inches
MARKERS = {
    "fused": "o",
    "eager": "s",
    "sdpa": "^",
    "compile": "D",
    "flex": "v",
    "sdpa_flash": "<",
    "sdpa_efficient": ">",
    "sdpa_cudnn": "P",
    "sdpa_flash_split": "X",
}


def new_figure(count: int, rows: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, count, figsize=(3.5 * count, 3.3 * rows + 0.7), squeeze=False, constrained_layout=True
    )
    return figure, axes


def finish(figure, axes, path: Path, heading: str) -> Path:
    from matplotlib import pyplot

    handles, labels = {}, []
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                labels.append(label)
                handles[label] = handle
        ax.grid(True, which="major", alpha=0.35)
        ax.grid(True, which="minor", alpha=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=12)
    columns = min(len(labels), max(int(figure.get_figwidth() / LEGEND_COLUMN), 1))
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=columns, frameon=False
    )
    with files.replacing(path) as part:
        figure.savefig(part, dpi=150)
    pyplot.close(figure)
    return path


def _axes(ax, entries: list[dict]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    sizes = {entry["positions"]: f"{entry['positions']}\n{entry['height']}x{entry['width']}" for entry in entries}
    keep, last = [], None
    for n in sorted(sizes):  # skips labels that would overlap
        if last is None or n / last >= 2:
            keep.append(n)
            last = n
    ax.set_xticks(keep, [sizes[n] for n in keep], fontsize=6.5)
    ax.set_xticks(sorted(sizes), minor=True)
    ax.xaxis.set_minor_formatter("")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(_minor_labels(*ax.get_ylim()))
    ax.tick_params(axis="y", which="minor", labelsize=6.5)


def _minor_labels(low: float, high: float):
    """A formatter of the minor ticks of a log axis: an axis of few decades has no or one major tick to read."""
    decades = math.log10(high / low)
    shown = "" if decades >= 2 else "25" if decades >= 0.8 else "123456789"
    return lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else ""


def draw_time(records: list[dict], path: Path) -> Path | None:
    """Milliseconds of forward (top) and forward + backward (bottom) over N; None if nothing was measured."""
    panels = {
        key: entries
        for key, entries in groups(records).items()
        if any(entry["status"] == "measured" for entry in entries)
    }
    if not panels:
        return None
    figure, axes = new_figure(len(panels), 2)
    for column, (key, entries) in enumerate(panels.items()):
        for row, kind in enumerate(("forward", "forward_backward")):
            ax = axes[row, column]
            for name in rivals.RIVALS:
                cells = [e for e in entries if e["rival"] == name and e["status"] == "measured"]
                if cells:
                    ax.plot(
                        [e["positions"] for e in cells],
                        [e[kind]["median"] * 1e3 for e in cells],
                        color=COLOURS[name],
                        marker=MARKERS[name],
                        markersize=4,
                        linewidth=2.0 if name == "fused" else 1.3,
                        zorder=3 if name == "fused" else 2,
                        label=rivals.TITLES[name],
                    )
            _axes(ax, entries)
            if row == 0:
                ax.set_title(_wrapped(title(*key)), fontsize=9)
            if column == 0:
                ax.set_ylabel(("forward" if row == 0 else "forward + backward") + ", ms")
    return finish(figure, axes, path, "Time against positions N (lower is better)")


def draw_memory(
    records: list[dict],
    path: Path,
    heading: str = "Extra memory of forward + backward against positions N (lower is better)",
) -> Path | None:
    """Extra memory of forward + backward over N. Hollow, dotted: by formula, where a rival would not fit."""
    panels = {key: entries for key, entries in groups(records).items() if any(e.get("memory") for e in entries)}
    if not panels:
        return None
    figure, axes = new_figure(len(panels), 1)
    for column, (key, entries) in enumerate(panels.items()):
        ax = axes[0, column]
        for name in rivals.RIVALS:
            cells = [e for e in entries if e["rival"] == name and e["status"] == "measured" and e["memory"]]
            xs = [e["positions"] for e in cells]
            ys = [max(e["memory"]["forward_backward"] / MIB, 0.05) for e in cells]
            if cells:
                ax.plot(
                    xs,
                    ys,
                    color=COLOURS[name],
                    marker=MARKERS[name],
                    markersize=4,
                    linewidth=2.0 if name == "fused" else 1.3,
                    zorder=3 if name == "fused" else 2,
                    label=rivals.TITLES[name],
                )
            refused = [e for e in entries if e["rival"] == name and e["status"] == "skipped" and _by_formula(e)]
            if refused:
                ax.plot(
                    xs[-1:] + [e["positions"] for e in refused],
                    ys[-1:] + [e["needed_extra_bytes"] / MIB for e in refused],
                    color=COLOURS[name],
                    marker=MARKERS[name],
                    markersize=5,
                    markerfacecolor="none",
                    linewidth=1.0,
                    linestyle=":",
                    markevery=slice(len(xs[-1:]), None),
                    label="would not fit: by formula" if name == "eager" else None,
                )
        _axes(ax, entries)
        ax.set_title(_wrapped(title(*key)), fontsize=9)
        if column == 0:
            ax.set_ylabel("extra memory, MiB")
    return finish(figure, axes, path, heading)


def _by_formula(entry: dict) -> bool:
    return (entry["reason"] or "").startswith("would not fit")


def _wrapped(text: str) -> str:
    head, separator, tail = text.partition(" (")
    return f"{head}\n({tail}" if separator else text
