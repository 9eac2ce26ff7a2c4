"""The suite's results as Markdown: steps, ceilings, SDPA's backends, and a row per cell."""

from __future__ import annotations

from pathlib import Path

from tools.compilers import files
from tools.cuda_bounds.document import bounds
from tools.cuda_bounds.launches import VALUE_CHANNELS

from .. import measure, rivals, validate, workloads
from ..report import markdown_table, size_of
from ..run import record
from ..workloads import Workload
from .selection import DTYPES, OURS, SIZES
from .state import State, key_of

COLUMNS = (
    "op",
    "size",
    "B",
    "dtype",
    "",
    "forward ms",
    "TFLOP/s",
    "GB/s",
    "graph ms",
    "backward ms",
    "TFLOP/s",
    "both, x ours",
    "extra MiB",
    "error",
)
EXPOSED = "*"
ENGINE_COLUMNS = (
    *("op", "size", "B", "dtype", "", "wgmma ms", "TFLOP/s", "error", "mma.sync ms", "TFLOP/s", "error"),
    "mma.sync, x wgmma",
)
# TFLOP/s of wgmma at the first size, B = 8, bfloat16, on an H200: to reach, and then.
GOALS = {"forward": (550, 600), "backward": (380, 450)}
BOUND_COLUMNS = ("op", "size", "B", "forward us", "bound us", "x bound", "backward us", "bound us", "x bound")


def table(cells: list[dict]) -> list[list[str]]:
    """A row per cell: TFLOP/s of the definition, GB/s of the least bytes to move, time over the fused op's."""
    order = {name: index for index, name in enumerate((*OURS, *rivals.RIVALS[1:]))}
    ours = {key_of(entry): entry for entry in cells if entry["rival"] == "fused" and entry["status"] == "measured"}
    rows = []
    groups = sorted(
        cells, key=lambda e: (workloads.OPS.index(e["op"]), e["dtype"], e["positions"], e["batch"], order[e["rival"]])
    )
    for entry in groups:
        row = [entry["op"], size_of(entry), str(entry["batch"]), entry["dtype"], rivals.TITLES[entry["rival"]]]
        if entry["status"] != "measured":
            rows.append([*row, f"{entry['status']}: {entry['reason']}", *[""] * (len(COLUMNS) - len(row) - 1)])
            continue
        forward, backward = entry["forward"]["median"], entry["backward"]["median"]
        fused = ours.get(key_of(entry | {"rival": "fused"}))
        graph = entry.get("forward_graph")
        host = {kind: EXPOSED for kind in entry.get("host_exposed", ())}
        row += [
            f"{forward * 1e3:.3f}{host.get('forward', '')}",
            f"{tflops(entry, 'forward'):.1f}",
            f"{Workload.of(entry).least_bytes()[0] / forward / 1e9:.0f}",
            f"{graph['median'] * 1e3:.3f}{host.get('forward_graph', '')}" if graph else "",
            f"{backward * 1e3:.3f}{host.get('backward', '')}",
            f"{tflops(entry, 'backward'):.1f}",
            f"{entry['forward_backward']['median'] / fused['forward_backward']['median']:.2f}" if fused else "",
            f"{entry['memory']['forward_backward'] / measure.MIB:.1f}" if entry["memory"] else "",
            f"{validate.worst(entry['errors']):.0e}",
        ]
        rows.append(row)
    return rows


def tflops(entry: dict, kind: str) -> float:
    """Of the definition's FLOP, in a cell that was measured."""
    flop = entry["flop"]
    of = {"forward": flop["forward"], "backward": flop["forward_backward"] - flop["forward"]}[kind]
    return of / entry[kind]["median"] / 1e12


def engine_table(cells: list[dict]) -> list[list[str]]:
    """Two rows for each workload that wgmma and mma.sync were to serve, forward and backward; the status of an engine
    that was not measured. No rows where the package takes another engine than wgmma."""
    by_mma = {key_of(entry): entry for entry in cells if entry["rival"] == rivals.FUSED_BY_MMA}
    rows = []
    for entry in cells:
        other = by_mma.get(key_of(entry | {"rival": rivals.FUSED_BY_MMA}))
        if entry["rival"] != "fused" or other is None or other["status"] == "skipped":
            continue
        pair = (entry, other)
        for kind in ("forward", "backward"):
            row = [entry["op"], size_of(entry), str(entry["batch"]), entry["dtype"], kind]
            for one in pair:
                if one["status"] == "measured":
                    time, error = one[kind]["median"], validate.worst(one["errors"])
                    row += [f"{time * 1e3:.3f}", f"{tflops(one, kind):.1f}", f"{error:.0e}"]
                else:
                    row += [f"{one['status']}: {one['reason']}", "", ""]
            measured = all(one["status"] == "measured" for one in pair)
            rows.append([*row, f"{other[kind]['median'] / entry[kind]['median']:.2f}" if measured else ""])
    return rows


def goals(cells: list[dict]) -> list[str]:
    """A sentence for each goal, of the cell that it is about; none without that cell measured with wgmma."""
    (height, width), dtype = SIZES[0], DTYPES[0]
    for entry in cells:
        workload = Workload("position", height, width, dtype, 8)
        if key_of(entry) != key_of(record(workload, "fused", "")) or entry.get("engine") != "wgmma":
            continue
        found = {kind: tflops(entry, kind) for kind in GOALS}
        return [
            f"{workload.label}, {kind}: {found[kind]:.0f} TFLOP/s by wgmma; goals: "
            + ", then ".join(f"{goal} ({'reached' if found[kind] >= goal else 'missed'})" for goal in of)
            + "."
            for kind, of in GOALS.items()
        ]
    return []


def bound_table(cells: list[dict], gpu: str) -> list[list[str]]:
    """The package's times in bfloat16 beside the bounds of docs/cuda_bounds.md, for position attention of mma.sync; no
    rows for a GPU that it lacks."""
    known = {key[:3]: times for key, times in bounds().items() if key[3] in gpu}
    rows = []
    for entry in cells:
        key = (entry["op"], size_of(entry), entry["batch"])
        ours = entry["rival"] in OURS and entry["status"] == "measured" and entry["dtype"] == "bfloat16"
        if (
            not ours
            or entry.get("engine") == "wgmma"
            or key not in known
            or Workload.of(entry).channels != VALUE_CHANNELS
        ):
            continue
        row = [key[0], key[1], str(key[2])]
        for kind, bound in zip(("forward", "backward"), known[key], strict=True):
            time = entry[kind]["median"]
            row += [f"{time * 1e6:.1f}", f"{bound * 1e6:.1f}", f"{time / bound:.2f}"]
        rows.append(row)
    return rows


def write_table(state: State) -> Path:
    """Writes a Markdown file beside the JSON: steps, ceilings and the cells of these sources; returns its path."""
    facts = state.machine
    parts = ["# segattn_ops on a GPU", f"{facts.get('gpu')}, CUDA {facts.get('cuda')}, torch {facts.get('torch')}"]
    steps = [
        [piece, name, entry["status"], f"{entry.get('seconds', '')}", entry["commit"] or ""]
        for piece, entries in state.pieces.items()
        for name, entry in entries.items()
        if "status" in entry
    ]
    parts.append(markdown_table(("piece", "step", "status", "s", "commit"), steps))
    if found := state.pieces.get("ceilings", {}).get("device"):
        lines = [[name, f"{value / 1e12:.2f}"] for name, value in found.items() if name.endswith("per_second")]
        parts.append(markdown_table(("ceiling", "T/s"), lines))
    for name, answers in state.pieces.get("sdpa", {}).items():
        parts.append(f"SDPA, {name}: " + "; ".join(f"{backend}: {answer}" for backend, answer in answers.items()) + ".")
    counted = [entry for entry in state.cells.values() if state.counts(entry)]
    parts.append(markdown_table(COLUMNS, table(counted)))
    if engines := engine_table(counted):
        parts.append("Position attention by wgmma and by mma.sync; errors relative to float64, of the worst result:")
        parts.append(markdown_table(ENGINE_COLUMNS, engines))
        parts += goals(counted)
    if beside := bound_table(counted, facts.get("gpu") or ""):
        parts.append("Beside the bounds of docs/cuda_bounds.md, which are counted from the machine code:")
        parts.append(markdown_table(BOUND_COLUMNS, beside))
    parts.append(f"{EXPOSED} the device waited for the host: the time includes launches.")
    path = state.path.with_suffix(".md")
    files.write_text(path, "\n\n".join(parts) + "\n")
    return path
