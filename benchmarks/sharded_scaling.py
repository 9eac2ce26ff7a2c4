"""Attention of a sharded feature map over the number of ranks, from the formulas of segattn_ops.distributed.plan:

python -m benchmarks.sharded_scaling     # writes docs/images/scaling.png

Above a scene of one size (strong scaling), below one that grows with the ranks (weak scaling). Nothing is measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from segattn_ops.distributed import plan

from . import command_line, drawing
from .readme_pictures import save

PROG = "python -m benchmarks.sharded_scaling"
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "scaling.png"
WIDTH = 1200  # pixels
RANKS = tuple(2**exponent for exponent in range(13))
CHANNELS, KEY_CHANNELS, DTYPE, DEVICE, LINK = 512, 64, "bfloat16", "h100", "infiniband400"
STRONG = 1250, 1250  # 10,000 x 10,000 pixels at stride 8
WEAK = 128, 128  # of a rank
STYLES = {
    ("position", "ring"): ("position, ring", "#d1495b", "o", "-"),
    ("position", "gather"): ("position, gather", "#d1495b", "s", ":"),
    ("criss_cross", ""): ("criss-cross", "#30638e", "^", "-"),
    ("channel", ""): ("channel", "#7a9e35", "D", "-"),
}
COSTS: dict[str, Callable[[plan.Estimate], float]] = {
    "memory of a rank, GiB": lambda found: found.memory.peak / 2**30,
    "sent by a rank, GB": lambda found: found.sent.total / 1e9,
    "forward + backward, ms at least": lambda found: found.seconds.total * 1e3,
}


def estimates(ranks: int, height: int, width: int) -> dict[tuple[str, str], plan.Estimate]:
    """The best mesh of each op and method."""
    found = plan.plan(
        height=height,
        width=width,
        channels=CHANNELS,
        key_channels=KEY_CHANNELS,
        ranks=ranks,
        dtype=DTYPE,
        device=DEVICE,
        link=LINK,
    )
    best: dict[tuple[str, str], plan.Estimate] = {}
    for estimate in found.estimates:
        best.setdefault((estimate.op, estimate.method), estimate)
    return best


def grown(ranks: int) -> tuple[int, int]:
    """The map of so many parts of WEAK, as square as can be."""
    rows = 1
    while rows * rows * 4 <= ranks * 2:
        rows *= 2
    return WEAK[0] * rows, WEAK[1] * (ranks // rows)


def draw() -> None:
    from PIL import Image

    figure, axes = drawing.new_figure(len(COSTS), 2, panel=(3.5, 3.3))
    rows = (
        (f"one map of {STRONG[0]} x {STRONG[1]} positions", lambda ranks: STRONG),
        (f"{WEAK[0]} x {WEAK[1]} positions a rank", grown),
    )
    limit = plan.machine(DEVICE, 1).memory
    for row, (name, size) in enumerate(rows):
        curves = {ranks: estimates(ranks, *size(ranks)) for ranks in RANKS}
        for column, (cost, of) in enumerate(COSTS.items()):
            ax = axes[row, column]
            for key, (label, colour, marker, line) in STYLES.items():
                points = [(ranks, of(found[key])) for ranks, found in curves.items() if of(found[key]) > 0]
                ax.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linestyle=line,
                    markerfacecolor="none" if line == ":" else colour,
                    label=label,
                )
            if column == 0 and limit is not None:
                ax.axhline(limit / 2**30, color="black", linewidth=0.8, linestyle="--", label="memory of an H100")
                ax.set_ylabel(name, fontsize=9)
            ax.set_xscale("log", base=2)
            ax.set_xlim(RANKS[0] / 1.3, RANKS[-1] * 1.3)
            ax.set_yscale("log")
            ax.set_xticks(RANKS[::3], [f"{ranks}" for ranks in RANKS[::3]])
            ax.set_xticks(RANKS, minor=True)
            ax.xaxis.set_minor_formatter("")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.tick_params(labelsize=8)
            if row == 0:
                ax.set_title(cost, fontsize=10)
            else:
                ax.set_xlabel("ranks", fontsize=9)
    rate = plan.LINKS[LINK][0] / 1e9
    heading = (
        f"Attention of a sharded map, by formula: C = {CHANNELS}, E = {KEY_CHANNELS}, {DTYPE}, H100, {rate:g} GB/s"
    )
    with tempfile.TemporaryDirectory() as folder:
        save(Image.open(drawing.finish(figure, axes, Path(folder) / PICTURE.name, heading)), PICTURE, WIDTH)


def _run() -> int:
    command_line.require("matplotlib", "PIL")
    command_line.writable_folder(PICTURE.parent)
    draw()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(prog=PROG, description="Draws docs/images/scaling.png.")
    parser.parse_args(argv)
    return command_line.run(PROG, _run)


if __name__ == "__main__":
    sys.exit(main())
