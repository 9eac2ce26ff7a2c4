"""Draws what each op attends to, as docs/images/layout_<family>.svg:

    python -m tools.site.layouts

Two panels of 190 units side by side, with text of 12 units: readable on a phone. A white card, because a picture in a
page does not know whether the page is dark.
"""

import math
import sys
from pathlib import Path

IMAGES = Path(__file__).parents[2] / "docs" / "images"
QUERY, KEY, LINE, TEXT, LABEL = "#D55E00", "#0072B2", "#9a9a9a", "#222222", "#555555"
ROWS, COLUMNS, CELL = 6, 8, 20
AT = (2, 5)  # the query: row, column
SECOND = (4, 1)  # a position that the query reaches through two others


def rectangle(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1, more: str = "") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" fill-opacity="{opacity:.2f}" '
        f'stroke="{LINE}" {more}/>'
    )


def text(x: float, y: float, content: str, colour: str = TEXT, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{content}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke="{TEXT}" stroke-width="1.5" marker-end="url(#head)"/>'


def centre(x: float, y: float, cell: tuple[int, int]) -> tuple[float, float]:
    return x + (cell[1] + 0.5) * CELL, y + (cell[0] + 0.5) * CELL


def feature_map(x: float, y: float, keys: set[tuple[int, int]]) -> str:
    """A grid of positions with the query, and the keys shaded by weights that fall with the distance."""
    cells = []
    for cell in ((row, column) for row in range(ROWS) for column in range(COLUMNS)):
        distance = math.hypot(cell[0] - AT[0], cell[1] - AT[1])
        opacity = 0.12 + 0.75 * math.exp(-distance / 3) if cell in keys else 0
        fill = QUERY if cell == AT else KEY
        size = x + cell[1] * CELL, y + cell[0] * CELL, CELL, CELL
        cells.append(rectangle(*size, fill, 1 if cell == AT else opacity))
    return "".join(cells)


EVERYWHERE = {(row, column) for row in range(ROWS) for column in range(COLUMNS)}
CROSS = {(row, column) for row, column in EVERYWHERE if row == AT[0] or column == AT[1]}


def position() -> str:
    side, strip = 140, 28
    return (
        text(95, 20, "a query and its N keys")
        + feature_map(15, 34, EVERYWHERE)
        + text(95, 176, "H x W positions", LABEL)
        + text(285, 20, "the attention map")
        + rectangle(215, 34, side, side, "none", 1, 'stroke-dasharray="5 4"')
        + rectangle(215, 34 + 2 * strip, strip, strip, KEY, 0.75)
        + "".join(rectangle(215, 34 + 2 * strip, strip * (i + 1), strip, "none") for i in range(5))
        + text(285, 56, "N x N, not stored")
        + text(285, 146, "computed in tiles")
        + text(285, 194, "keys", LABEL)
        + f'<g transform="rotate(-90 206 104)">{text(206, 104, "queries", LABEL)}</g>'
    )


def criss_cross() -> str:
    corner = (SECOND[0], AT[1])
    x, y = 205, 34
    return (
        text(95, 20, "one pass: H + W - 1 keys")
        + feature_map(15, y, CROSS)
        + text(95, 176, "row and column", LABEL)
        + text(285, 20, "two passes: all keys")
        + feature_map(x, y, EVERYWHERE)
        + arrow(*centre(x, y, SECOND), *centre(x, y, corner))
        + arrow(*centre(x, y, corner), *centre(x, y + 0.35 * CELL, AT))
        + text(285, 176, "over a corner", LABEL)
    )


def channel() -> str:
    planes = "".join(
        rectangle(60 - 9 * i, 40 + 9 * i, 100, 70, "#ffffff")
        + rectangle(60 - 9 * i, 40 + 9 * i, 100, 70, QUERY if i == 2 else KEY, 1 if i == 2 else 0.35)
        for i in range(5)
    )
    size = 28
    weights = "".join(
        rectangle(215 + size * k, 34 + size * c, size, size, KEY, 0.12 + 0.6 * abs(math.sin(1.7 * (c + 1) * (k + 2))))
        for c in range(5)
        for k in range(5)
    )
    row = f'<rect x="215" y="{34 + 2 * size}" width="{5 * size}" height="{size}" fill="none" stroke="{QUERY}"'
    return (
        text(95, 20, "C channels")
        + planes
        + text(95, 176, "each of H x W positions", LABEL)
        + text(285, 20, "C x C weights")
        + weights
        + f'{row} stroke-width="3"/>'
        + text(285, 194, "sums over all positions", LABEL)
    )


PICTURES = {"position": position, "criss_cross": criss_cross, "channel": channel}
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0 L8 4 L0 8 z" fill="{TEXT}"/></marker></defs>'
)


def picture(name: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 380 204" font-family="sans-serif" font-size="12">'
        f'{HEAD}<rect width="380" height="204" rx="6" fill="#ffffff"/>{PICTURES[name]()}</svg>\n'
    ).replace("><", ">\n<")


def main() -> int:
    for name in PICTURES:
        (IMAGES / f"layout_{name}.svg").write_text(picture(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
