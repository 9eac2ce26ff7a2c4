"""The sections of the main job, ``ops``."""

from __future__ import annotations

from collections import Counter

from . import command_line, drawing, plots, report, rivals, roofline, statistics
from .ceilings import flop_ceiling
from .page_blocks import Figures, Section, Table, legend
from .report import groups, size_of, title

KINDS = plots.KINDS


def chosen(entries: list[dict]) -> dict[str, dict]:
    """The measured cells by rival, at the size of :func:`report.summary`; empty without ours."""
    size = report.summary_size(entries)
    return {e["rival"]: e for e in entries if e["status"] == "measured" and size_of(e) == size}


def _factor(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _speed(median: float, verdict: str) -> str:
    """``median``: theirs over ours."""
    if verdict == "level":
        return "level with"
    about = "about " if verdict == "unclear" else ""
    if median >= 1:
        return f"{about}{_factor(median)} times as fast as"
    return f"takes {about}{_factor(1 / median)} times as long as"


def summary(content: dict) -> list[str]:
    """A sentence for each op, and one that counts the verdicts."""
    lines = []
    for (op, dtype, batch), entries in groups(content["cells"]).items():
        cells = dict(chosen(entries))
        if len(cells) < 2:
            continue
        ours = cells.pop("fused")
        image = f"an image of {8 * ours['height']} x {8 * ours['width']}"
        sentence = f"{title(op, dtype, batch)}, {ours['height']} x {ours['width']} positions ({image}): "
        parts = []
        for name in dict.fromkeys(["eager", *(_fastest(cells, kind) for kind in reversed(KINDS))]):
            if name in cells:
                ratios = cells[name]["ratio"]
                longest = list(ratios)[-1]
                speed = _speed(ratios[longest]["median"], ratios[longest]["verdict"])
                also = f" ({_factor(ratios['forward']['median'])} forward)" if longest != "forward" else ""
                parts.append(f"{speed} {rivals.TITLES[name]} {KINDS[longest]}{also}")
        mine, other = (plots.extra_bytes(cell) for cell in (ours, cells.get("eager", {"memory": None})))
        if mine and other:
            parts.append(f"{plots.bytes_label(mine)} of extra memory against {plots.bytes_label(other)} of eager")
        lines.append(sentence + "; ".join(parts) + ".")
    counts, losses = verdicts(content["cells"])
    if total := sum(counts.values()):
        counted = ", ".join(f"{word} in {counts[word]}" for word in statistics.VERDICTS if counts[word])
        lines.append(f"Of {total} comparisons with rivals (every size, each pass), segattn_ops is {counted}.")
    if losses:
        lines.append(f"Where it is slower: {'; '.join(losses)}.")
    return lines


def _fastest(others: dict[str, dict], kind: str) -> str:
    """The rival that is fastest in this pass; empty if none has it."""
    having = [name for name in others if others[name].get(kind)]
    return min(having, key=lambda name: others[name][kind]["median"], default="")


def verdicts(records: list[dict]) -> tuple[Counter, list[str]]:
    """How often each verdict fell, and where it was "slower": a phrase for each op and rival."""
    counts: Counter = Counter()
    losses: dict[tuple, list[tuple[str, float]]] = {}
    for entry in records:
        for kind, found in entry.get("ratio", {}).items():
            counts[found["verdict"]] += 1
            if found["verdict"] == "slower":
                key = entry["op"], entry["dtype"], entry["rival"], kind
                losses.setdefault(key, []).append((size_of(entry), found["median"]))
    phrases = []
    for (op, dtype, rival, kind), places in losses.items():
        low, high = min(ratio for _, ratio in places), max(ratio for _, ratio in places)
        span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        sizes = ", ".join(size for size, _ in places)
        phrases.append(f"{rivals.TITLES[rival]} needs {span} of the time for {op} {dtype} {KINDS[kind]} at {sizes}")
    return counts, phrases


def command_of(content: dict, entries: list[dict]) -> str:
    """The command that measures these cells."""
    names = {entry["rival"] for entry in entries}
    return command_line.reproduce(
        content["command"],
        ops=",".join(dict.fromkeys(entry["op"] for entry in entries)),
        sizes=",".join(dict.fromkeys(size_of(entry) for entry in entries)),
        dtypes=",".join(dict.fromkeys(entry["dtype"] for entry in entries)),
        rivals=",".join(name for name in rivals.TITLES if name in names),
        threads=str(content["machine"]["threads"]),
    )


def sections(content: dict) -> list[Section]:
    records = content["cells"]
    found = [Section("Ops in short", [], _short(content))]
    curves = _curves(content)
    if curves:
        found.append(Section("Time and memory against size", [], curves))
    found.append(_roofline(content))
    found.append(Section("Every op in numbers", [_clean(report.NOTES)], _tables(content, records)))
    return found


def scaling(content: dict) -> list[Section]:
    """The sections of ``scaling``: the fitted exponents, and the curves."""
    from . import scaling as fitted

    rows = fitted.rows(content["fits"])
    table = Table(list(fitted.COLUMNS), rows, command=content["command"], ours=_ours(rows, 1))
    return [Section("How time and memory grow", [_clean(fitted.NOTES)], [table, *_curves(content)])]


def _clean(markdown: str) -> str:
    return markdown.replace("*", "").replace("\n", " ")


def _short(content: dict) -> list:
    records = content["cells"]
    used = [entry for entries in groups(records).values() for entry in chosen(entries).values()]
    blocks: list = []
    figures, names = [], set()
    for kind in KINDS:
        rows = _ratio_rows(records, kind)
        if rows:
            panel = plots.ratio_panel(rows, f"{KINDS[kind]}: time over that of segattn_ops")
            figures.append((f"Times of the rivals, {KINDS[kind]}", drawing.svg(panel, plots.ratio_height(rows))))
            names |= {name for _, bars in rows for name, *_ in bars}
    if figures:
        caption = "Right of the line the rival takes longer. Numbers: the factor, and the rival's time."
        blocks.append(Figures(figures, caption=caption, legend=legend({"fused"} | names)))
    notes = ['A question mark: the interval of the rounds allows no verdict. "=": level.']
    table = Table(report.summary_columns(records), report.summary(records), notes=notes)
    table.command = command_of(content, used) if used else ""
    return [*blocks, table]


def _ratio_rows(records: list[dict], kind: str) -> list[tuple[str, list[tuple[str, float, str]]]]:
    rows = []
    keys = groups(records)
    several = len({(dtype, batch) for _, dtype, batch in keys}) > 1
    for (op, dtype, batch), entries in keys.items():
        cells = dict(chosen(entries))
        if len(cells) < 2:
            continue
        ours = cells.pop("fused")
        bars = []
        for name in rivals.TITLES:
            if name in cells and cells[name].get(kind):
                ratio = cells[name][kind]["median"] / ours[kind]["median"]
                bars.append((name, ratio, f"{ratio:.2f}  ({plots.seconds_label(cells[name][kind]['median'])})"))
        label = f"{op}\n{size_of(ours)}" + (f"\n{dtype} B={batch}" if several else "")
        if bars:
            rows.append((label, bars))
    return rows


def _curves(content: dict) -> list:
    """The panels of every op that was measured at more than one size."""
    blocks: list = []
    for key, entries in plots.measured_panels(content["cells"]).items():
        if len({entry["positions"] for entry in entries if entry["status"] == "measured"}) < 2:
            continue
        figures = []
        for kind in KINDS:
            if any(entry.get(kind) for entry in entries):
                panel = plots.time_panel(key, entries, kind, named=False)
                figures.append((f"{title(*key)}: time of {KINDS[kind]} over size", drawing.svg(panel)))
        if any(entry.get("memory") and plots.extra_bytes(entry) for entry in entries):
            panel = plots.memory_panel(key, entries, named=False)
            figures.append((f"{title(*key)}: extra memory over size", drawing.svg(panel)))
        used = [entry["rival"] for entry in entries if entry["status"] == "measured"]
        blocks.append(Figures(figures, title(*key), legend=legend(used), command=command_of(content, entries)))
    if blocks:
        blocks[0].caption = (
            "Numbers are those of the largest size. Memory: dashed lines are the memories of common GPUs; hollow "
            "markers are eager by formula (the bytes of its attention maps) where it was not measured, up to "
            f"{plots.BEYOND[-1][0]}x{plots.BEYOND[-1][1]}."
        )
    return blocks


def _roofline(content: dict) -> Section:
    ceilings = content.get("ceilings")
    heading = "Roofline"
    if not ceilings:
        return Section(heading, ["This run did not measure what the machine reaches."], [])
    records = content["cells"]
    figures, rows = [], []
    used: list[dict] = []
    for dtype in dict.fromkeys(entry["dtype"] for entry in records):
        cells = roofline.cells(records, dtype)
        if not cells or flop_ceiling(ceilings, dtype) is None:
            continue
        used += cells
        shown = [cell for cell in cells if cell["rival"] in ("fused", "eager", "sdpa")]
        figures.append((f"Roofline of the ops in {dtype}", drawing.svg(roofline.panel(shown, ceilings, dtype), 4.2)))
        for cell in cells:
            reached, roof = cell["flop"]["forward"] / cell["forward"]["median"], roofline.roof(cell, ceilings)
            limit = "bandwidth" if roof < flop_ceiling(ceilings, dtype) else "product"
            names = [cell["op"], size_of(cell), dtype, rivals.TITLES[cell["rival"]]]
            figures_of = [f"{roofline.intensity(cell):.0f}", f"{reached / 1e9:.0f}", f"{roof / 1e9:.0f}", limit]
            rows.append([*names, *figures_of, f"{100 * reached / roof:.0f}%"])
    if not rows:
        return Section(heading, ["No op was measured in a dtype of which the machine's products were."], [])
    copy = ceilings["copy_bytes_per_second"] / 1e9
    lead = [
        "The roof of a forward is the lower of two ceilings measured in the same run: a large matrix product of that "
        f"dtype, and a copy ({copy:.0f} GB/s) times the op's FLOP a byte. FLOP are the definition's; bytes are inputs "
        "and output once. Channel attention can pass its roof: its energies are symmetric, and half of them suffice."
    ]
    columns = ["op", "size", "dtype", "", "FLOP a byte", "GFLOP/s", "roof GFLOP/s", "set by", "of the roof"]
    table = Table(columns, rows, command=command_of(content, used), ours=_ours(rows, 3))
    blocks = [Figures(figures, legend=legend({c["rival"] for c in used} & {"fused", "eager", "sdpa"})), table]
    return Section(heading, lead, blocks)


def _ours(rows: list[list[str]], column: int) -> list[int]:
    return [index for index, row in enumerate(rows) if row[column] == rivals.TITLES["fused"]]


def _tables(content: dict, records: list[dict]) -> list[Table]:
    found = []
    for key, entries in groups(records).items():
        rows = report.rows(entries)
        commands = []
        for size in dict.fromkeys(size_of(entry) for entry in entries):
            of_size = [entry for entry in entries if size_of(entry) == size and entry["status"] == "measured"]
            if of_size:
                commands.append((size, command_of(content, of_size)))
        found.append(
            Table(
                list(report.COLUMNS),
                rows,
                title(*key),
                notes=report.remarks(entries),
                command=command_of(content, entries),
                commands=commands,
                commands_title="The command of each row, by size",
                ours=_ours(rows, report.COLUMNS.index("")),
            )
        )
    return found
