"""The suite's results as Markdown: steps, ceilings, SDPA's backends, and a row per cell."""

from __future__ import annotations

from pathlib import Path

from tools.cuda_bounds.document import bounds
from tools.cuda_bounds.launches import VALUE_CHANNELS

from .. import measure, rivals, validate, workloads
from ..report import markdown_table, size_of
from ..workloads import Workload
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
BOUND_COLUMNS = ("op", "size", "B", "forward us", "bound us", "x bound", "backward us", "bound us", "x bound")


def table(cells: list[dict]) -> list[list[str]]:
    """A row per cell: TFLOP/s of the definition, GB/s of the least bytes to move, time over the fused op's."""
    order = {name: index for index, name in enumerate(rivals.RIVALS)}
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
        flop = entry["flop"]
        forward, backward = entry["forward"]["median"], entry["backward"]["median"]
        fused = ours.get(key_of(entry | {"rival": "fused"}))
        graph = entry.get("forward_graph")
        host = {kind: EXPOSED for kind in entry.get("host_exposed", ())}
        row += [
            f"{forward * 1e3:.3f}{host.get('forward', '')}",
            f"{flop['forward'] / forward / 1e12:.1f}",
            f"{Workload.of(entry).least_bytes()[0] / forward / 1e9:.0f}",
            f"{graph['median'] * 1e3:.3f}{host.get('forward_graph', '')}" if graph else "",
            f"{backward * 1e3:.3f}{host.get('backward', '')}",
            f"{(flop['forward_backward'] - flop['forward']) / backward / 1e12:.1f}",
            f"{entry['forward_backward']['median'] / fused['forward_backward']['median']:.2f}" if fused else "",
            f"{entry['memory']['forward_backward'] / measure.MIB:.1f}" if entry["memory"] else "",
            f"{validate.worst(entry['errors']):.0e}",
        ]
        rows.append(row)
    return rows


def bound_table(cells: list[dict], gpu: str) -> list[list[str]]:
    """The fused op's times in bfloat16 beside the bounds of docs/cuda_bounds.md; no rows for a GPU that it lacks."""
    known = {key[:3]: times for key, times in bounds().items() if key[3] in gpu}
    rows = []
    for entry in cells:
        key = (entry["op"], size_of(entry), entry["batch"])
        ours = entry["rival"] == "fused" and entry["status"] == "measured" and entry["dtype"] == "bfloat16"
        if not ours or key not in known or Workload.of(entry).channels != VALUE_CHANNELS:
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
    if beside := bound_table(counted, facts.get("gpu") or ""):
        parts.append("Beside the bounds of docs/cuda_bounds.md, which are counted from the machine code:")
        parts.append(markdown_table(BOUND_COLUMNS, beside))
    parts.append(f"{EXPOSED} the device waited for the host: the time includes launches.")
    path = state.path.with_suffix(".md")
    path.write_text("\n\n".join(parts) + "\n")
    return path
