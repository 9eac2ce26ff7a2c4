"""The tables of ``modules`` and ``models``."""

from __future__ import annotations

from . import network_run, report, subjects
from .report import MIB

PASS_TITLES = {
    "module": {"forward": "forward", "forward_backward": "forward + backward"},
    "model": {"forward": "inference", "forward_backward": "training step"},
}
NOTES = {
    "module": """\
Milliseconds are medians of interleaved rounds; *forward* runs in evaluation mode under no_grad, *forward + backward*
includes the gradients of inputs and parameters. *Extra memory* is the peak over forward + backward in a separate
process, minus inputs, parameters, output and gradients. GFLOP are those of the forward, as torch counts them for the
rival: 2 x multiply-accumulates, convolutions included. *segattn_ops is*: the rival's time over that of segattn_ops in
the same rounds, its interval, and a verdict; "unclear" where the interval does not allow one.""",
    "model": """\
Images a second are the batch over the median of interleaved rounds; *inference* runs in evaluation mode under no_grad,
a *training step* is forward, loss, backward, and SGD with momentum. *Memory* is the peak of the process above what it
held before the network existed, less the input: weights, momentum, activations and gradients. All rivals have the same
weights; only the attention blocks differ: segattn_ops is the eager network after `segattn_ops.convert`. *segattn_ops
is*: the rival's time over that of segattn_ops in the same rounds, its interval, and a verdict; "unclear" where the
interval does not allow one.""",
}
COLUMNS = {
    "module": (
        *("size", "", "GFLOP", "forward ms", "segattn_ops is", "forward + backward ms", "segattn_ops is"),
        *("extra memory MiB", "error"),
    ),
    "model": (
        *("size", "", "inference images/s", "segattn_ops is", "training images/s", "segattn_ops is"),
        *("inference MiB", "training MiB", "error"),
    ),
}


def kind_of(content: dict) -> str:
    return content["kind"].removesuffix("s")


def groups(cells: list[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """Cells by (name, dtype, batch), in order."""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for cell in cells:
        subject = subjects.of_record(cell)
        found.setdefault((subject.name, subject.dtype, subject.batch), []).append(cell)
    return found


def title(kind: str, name: str, dtype: str, batch: int) -> str:
    known = subjects.KINDS[kind]
    head = known[name].title if name in known else name
    return f"{head}, {dtype}" + (f", batch {batch}" if batch > 1 else "")


def memory_of(kind: str, cell: dict, which: str) -> int | None:
    """Bytes of a pass: of a model with its weights."""
    if not cell.get("memory") or which not in cell["memory"]:
        return None
    return cell["memory"][which] + (cell["state_bytes"] if kind == "model" else 0)


def _time(kind: str, cell: dict, which: str) -> list[str]:
    """The figure of a pass, and what segattn_ops is beside this rival."""
    if which not in cell:
        return ["not run", ""]
    median = cell[which]["median"]
    figure = report._milliseconds(median) if kind == "module" else f"{cell['batch'] / median:.3g}"
    return [figure, report.verdict(cell["ratio"].get(which))]


def _bytes(kind: str, cell: dict, ours: dict | None, which: str) -> str:
    mine = memory_of(kind, cell, which)
    if mine is None:
        return "not run" if which in cell.get("not_run", {}) else "not measured"
    theirs = memory_of(kind, ours, which) if ours and ours is not cell else None
    ratio = f" ({report._factor(mine / theirs)}x)" if theirs and theirs >= MIB else ""
    return f"{mine / MIB:.0f}{ratio}"


def worst(cell: dict) -> float:
    return max([*cell["errors"]["blocks"].values(), cell["errors"]["small_float64"]["worst"]])


def rows(kind: str, cells: list[dict]) -> list[list[str]]:
    """A row for each cell of one group; one that did not run says why."""
    fused = {report.size_of(cell): cell for cell in cells if cell["rival"] == "fused" and cell["status"] == "measured"}
    table = []
    for cell in cells:
        size = report.size_of(cell)
        row = [size, network_run.TITLES.get(cell["rival"], cell["rival"])]
        if cell["status"] != "measured":
            table.append([*row, f"{cell['status']}: {cell['reason']}", *[""] * (len(COLUMNS[kind]) - 3)])
            continue
        ours = fused.get(size)
        times = [text for which in subjects.PASSES for text in _time(kind, cell, which)]
        if kind == "module":
            row += [f"{cell['flop']['forward'] / 1e9:.3g}", *times, _bytes(kind, cell, ours, "forward_backward")]
        else:
            row += [*times, *(_bytes(kind, cell, ours, which) for which in subjects.PASSES)]
        table.append([*row, f"{worst(cell):.0e}"])
    return table


def remarks(kind: str, cells: list[dict]) -> list[str]:
    """A line for every pass that did not run in a cell that did, and for figures without rounds."""
    lines = []
    for cell in cells:
        for which, found in cell.get("drift", {}).items():
            if found and found["noted"]:
                name = network_run.TITLES.get(cell["rival"], cell["rival"])
                change = f"{found['change']:+.0%} ({found['low']:+.0%} to {found['high']:+.0%})"
                lines.append(f"{report.size_of(cell)} {name}, {PASS_TITLES[kind][which]}: drifted by {change}")
        for which, reason in cell.get("not_run", {}).items():
            if cell["status"] == "measured":
                name, title = network_run.TITLES.get(cell["rival"], cell["rival"]), PASS_TITLES[kind][which]
                lines.append(f"{report.size_of(cell)} {name}, {title}: not run, {reason}")
    once = dict.fromkeys(report.size_of(cell) for cell in cells if cell["status"] == "measured" and not cell["rounds"])
    if once:
        lines.append(f"{', '.join(once)}: one pass each, not repeated")
    return lines


def markdown(content: dict) -> str:
    kind = kind_of(content)
    parts = [
        f"# segattn_ops: {content['kind']}",
        f"`{content['command']}`, {content['date']}, commit {content['commit'] or 'unknown'}, {report.where(content)}.",
        NOTES[kind],
    ]
    for key, cells in groups(content["cells"]).items():
        parts += [f"## {title(kind, *key)}", report.markdown_table(COLUMNS[kind], rows(kind, cells))]
        if lines := remarks(kind, cells):
            parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"
