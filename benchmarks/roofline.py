"""The roofline of the ops: what their forward reaches of what the machine allows."""

from __future__ import annotations

import math

from .ceilings import flop_ceiling
from .drawing import FAINT, INK, Panel, line, log_numbers
from .plots import names_of, of_rival
from .report import groups, size_of
from .workloads import Workload


def intensity(entry: dict) -> float:
    """FLOP of the definition's forward for each byte of inputs and output."""
    return entry["flop"]["forward"] / Workload.of(entry).least_bytes()[0]


def roof(entry: dict, ceilings: dict) -> float | None:
    """FLOP/s that the machine allows a forward: a large product's, or the copy's bandwidth times the intensity."""
    product, copy = flop_ceiling(ceilings, entry["dtype"]), ceilings.get("copy_bytes_per_second")
    return min(product, copy * intensity(entry)) if product and copy else None


def panel(cells: list[dict], ceilings: dict, dtype: str) -> Panel:
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
        fused = sorted(of_rival(cells, "fused"), key=intensity)
        levels = _levels([math.log(intensity(cell) / left) / math.log(right / left) for cell in fused])
        decades = math.log10(high / low)
        step = 0.13 * decades / (1 - 0.13 * (1 + max(levels, default=0)))  # decades, of a name's height
        ax.plot([left, product / copy, right], [left * copy / 1e9, *[product / 1e9] * 2], color=INK, linewidth=1.6)
        for name in names_of(cells):
            points = [(intensity(cell), ys[id(cell)]) for cell in of_rival(cells, name)]
            size = 8 if name == "fused" else 6
            line(ax, name, *map(list, zip(*points, strict=True)), linestyle="none", markersize=size)
        for cell, level in zip(fused, levels, strict=True):
            x, y = intensity(cell), ys[id(cell)]
            at = high * 10 ** (step * level)
            ax.plot([x, x], [y, at], color=FAINT, linewidth=1.0, zorder=1)
            share = f"{100 * y * 1e9 / roof(cell, ceilings):.0f}%"
            ax.annotate(f"{cell['op']}\n{share}", (x, at), ha="center", va="bottom", linespacing=1.0)
        ax.set_xlim(left, right)
        ax.set_ylim(low, high * 10 ** (step * (1 + max(levels, default=0))))
        log_numbers(ax.xaxis, left, right)
        log_numbers(ax.yaxis, low, top * 1.1)
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


def cells(records: list[dict], dtype: str) -> list[dict]:
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
