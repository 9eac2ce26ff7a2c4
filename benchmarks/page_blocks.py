"""What a page is made of: sections of tables, figures and pictures, and the commands that measure a row again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from . import drawing, rivals

SIGNS = dict(zip("os^Dv<>PXp*h", "●■▲◆▼◀▶✚✖⬟★⬢", strict=True))  # of matplotlib's markers
_NUMBER = re.compile(r"^[<~]?-?[0-9.]+(e-?[0-9]+)?( |%|$)")


@dataclass
class Table:
    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    notes: list[str] = field(default_factory=list)
    command: str = ""
    commands: list[tuple[str, str]] = field(default_factory=list)  # (row, command)
    commands_title: str = "The command of each row"
    ours: list[int] = field(default_factory=list)  # rows of this package
    kind: str = "table"

    @property
    def numeric(self) -> list[bool]:
        """Columns most of whose cells are numbers are set flush right."""
        found = []
        for index in range(len(self.columns)):
            cells = [row[index] for row in self.rows if row[index] not in ("", "-")]
            found.append(
                bool(cells) and index > 0 and 2 * sum(bool(_NUMBER.match(cell)) for cell in cells) > len(cells)
            )
        return found


@dataclass
class Figures:
    figures: list[tuple[str, str]]  # (what it shows, SVG)
    title: str = ""
    caption: str = ""
    legend: list[tuple[str, str, str]] = field(default_factory=list)  # (name, colour, sign)
    command: str = ""
    kind: str = "figures"


@dataclass
class Picture:
    source: str  # a data URL
    caption: str
    command: str = ""
    kind: str = "picture"


@dataclass
class Section:
    title: str
    lead: list[str]
    blocks: list[Table | Figures | Picture]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def legend(names: Iterable[str]) -> list[tuple[str, str, str]]:
    present = set(names)
    return [
        (rivals.TITLES[name], drawing.COLOURS[name], SIGNS[drawing.MARKERS[name]])
        for name in rivals.TITLES
        if name in present
    ]


def plain_table(content: dict) -> Section:
    """The cells of a file of another kind: a column for each of their plain fields."""
    cells = content["cells"]
    columns = list(
        dict.fromkeys(name for cell in cells for name, value in cell.items() if not isinstance(value, (dict, list)))
    )
    rows = [["" if cell.get(name) is None else str(cell[name]) for name in columns] for cell in cells]
    return Section(content["kind"].capitalize(), [], [Table(columns, rows, command=content["command"])])
