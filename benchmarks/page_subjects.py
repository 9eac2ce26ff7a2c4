"""The sections of ``modules`` and ``models``."""

from __future__ import annotations

from . import command_line, drawing, network_run, plots, subject_tables, subjects
from .page_blocks import Figures, Section, Table, legend
from .report import size_of
from .subject_tables import PASS_TITLES

HEADINGS = {"module": "Modules", "model": "Networks"}


def command_of(content: dict, cells: list[dict]) -> str:
    kind = subject_tables.kind_of(content)
    names = {cell["rival"] for cell in cells}
    options = {
        content["kind"]: ",".join(dict.fromkeys(cell[kind] for cell in cells)),
        "sizes": ",".join(dict.fromkeys(size_of(cell) for cell in cells)),
        "dtypes": ",".join(dict.fromkeys(cell["dtype"] for cell in cells)),
        "rivals": ",".join(name for name in network_run.TITLES if name in names),
        "threads": str(content["machine"]["threads"]),
    }
    return command_line.reproduce(content["command"], **options)


def summary(content: dict) -> list[str]:
    """A sentence for each network, or one for all modules."""
    kind = subject_tables.kind_of(content)
    lines = []
    for key, cells in subject_tables.groups(content["cells"]).items():
        for size in dict.fromkeys(size_of(cell) for cell in cells):
            of_size = {cell["rival"]: cell for cell in cells if size_of(cell) == size}
            ours, eager = of_size.get("fused"), of_size.get("eager")
            if kind == "model" and ours and ours["status"] == "measured":
                lines.append(_sentence(key, ours, eager))
    if kind == "module":
        ratios = [
            ratio
            for which in subjects.PASSES
            for _, bars in ratio_rows(kind, content["cells"], which)
            for _, ratio, _ in bars
        ]
        if ratios:
            lines.append(
                f"Blocks with their convolutions: the rivals take {min(ratios):.2f} to {max(ratios):.2f} times as long "
                "as those of segattn_ops."
            )
    return lines


def _sentence(key: tuple, ours: dict, eager: dict | None) -> str:
    parts = []
    for which in subjects.PASSES:
        if which not in ours:
            continue
        figure = f"{PASS_TITLES['model'][which]} {ours['batch'] / ours[which]['median']:.3g} images a second"
        memory = subject_tables.memory_of("model", ours, which)
        figure += f" in {plots.bytes_label(memory)}" if memory else ""
        if eager and which in eager:
            theirs = subject_tables.memory_of("model", eager, which)
            figure += f" (eager {eager['batch'] / eager[which]['median']:.3g}"
            figure += f" in {plots.bytes_label(theirs)})" if theirs else ")"
        elif eager and which in eager.get("not_run", {}):
            figure += f" (eager: {eager['not_run'][which]})"
        parts.append(figure)
    return f"{subject_tables.title('model', *key)}, {size_of(ours)} pixels: {'; '.join(parts)}."


def ratio_rows(kind: str, cells: list[dict], which: str, memory: bool = False) -> list[tuple[str, list]]:
    """Rows of :func:`plots.ratio_panel`: the rivals' time or memory of a pass over the fused one's."""
    rows = []
    for (name, _, _), of_key in subject_tables.groups(cells).items():
        for size in dict.fromkeys(size_of(cell) for cell in of_key):
            by_rival = {
                cell["rival"]: cell for cell in of_key if size_of(cell) == size and cell["status"] == "measured"
            }
            ours = by_rival.pop("fused", None)
            bars = []
            for rival in network_run.TITLES:
                cell = by_rival.get(rival)
                if not ours or not cell or which not in cell or which not in ours:
                    continue
                if memory:
                    mine, theirs = (subject_tables.memory_of(kind, one, which) for one in (ours, cell))
                    text = plots.bytes_label(theirs or 0)
                else:
                    mine, theirs = ours[which]["median"], cell[which]["median"]
                    text = f"{cell['batch'] / theirs:.3g}/s" if kind == "model" else plots.seconds_label(theirs)
                if mine and theirs:
                    bars.append((rival, theirs / mine, f"{theirs / mine:.2f}  ({text})"))
            if bars:
                rows.append((f"{name}\n{size}", bars))
    return rows


def sections(content: dict) -> list[Section]:
    kind = subject_tables.kind_of(content)
    cells = content["cells"]
    figures = []
    for memory in (False, True):
        for which in subjects.PASSES:
            if memory and kind == "module" and which == "forward":
                continue
            rows = ratio_rows(kind, cells, which, memory)
            if rows:
                what = f"{PASS_TITLES[kind][which]}: {'memory' if memory else 'time'} over that of segattn_ops"
                figures.append((what, drawing.svg(plots.ratio_panel(rows, what), plots.ratio_height(rows))))
    measured = {cell["rival"] for cell in cells if cell["status"] == "measured"}
    blocks: list = []
    if figures:
        shown = "the rival's images a second" if kind == "model" else "the rival's time"
        caption = f"Right of the line the rival needs more. Numbers: the factor, and {shown} or memory."
        blocks.append(Figures(figures, caption=caption, legend=legend(measured)))
    for key, of_key in subject_tables.groups(cells).items():
        rows = subject_tables.rows(kind, of_key)
        commands = [
            (size, command_of(content, [cell for cell in of_key if size_of(cell) == size]))
            for size in dict.fromkeys(size_of(cell) for cell in of_key)
        ]
        blocks.append(
            Table(
                list(subject_tables.COLUMNS[kind]),
                rows,
                subject_tables.title(kind, *key),
                notes=subject_tables.remarks(kind, of_key),
                command=command_of(content, of_key),
                commands=commands,
                commands_title="The command of each row, by size",
                ours=[index for index, row in enumerate(rows) if row[1] == network_run.TITLES["fused"]],
            )
        )
    lead = [subject_tables.NOTES[kind].replace("*", "").replace("\n", " ")]
    return [Section(HEADINGS[kind], lead, blocks)]
