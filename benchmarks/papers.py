"""``python -m benchmarks papers``: the costs that CCNet, ANN and DANet state or imply, in one table.

Published; by the papers' formulas; counted by torch's FLOP counter and memory tracker; with ``--measure`` measured,
eager and fused, each block with its convolutions in a process of its own. Conventions differ: CCNet counts FLOPs as
2 x multiply-accumulates, ANN multiply-accumulates of "three convolutions and two products", without the last one.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from tools.compilers import files

from . import blocks, command_line, measure, papers_cell, report
from .papers_cell import ANN_CHANNELS, BLOCKS, FULL
from .processes import CellFailed, start_server
from .workloads import PYRAMID

PROG = "python -m benchmarks papers"
SUMMARY = "the costs in the CCNet, ANN and DANet papers: published, by formula, counted, measured"
MIB = 2**20
MEMORY_SHARE = 0.9  # of the available memory, that a block may need

# Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019): a 769 x 769 image, a feature map of
# 1 x 512 x 97 x 97, 64 key channels. GFLOP and "M" of memory of the attention block alone.
CCNET_SHAPE = (1, 512, 97, 97)
CCNET_PUBLISHED = {"Non-local": (108.0, 1411.0), "RCCA, R = 2": (16.5, 127.0)}
# Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation" (2019): 2048 channels in, key and value
# of 256. Billions of multiply-accumulates of the non-local block and of APNB; how much faster and smaller APNB is.
ANN_PUBLISHED = {(96, 96): (57.98, 15.01), (128, 128): (163.2, 26.7), (128, 256): (601.3, 53.4)}
ANN_FASTER, ANN_SMALLER = 6.0, 28.0
ANN_KEYS = sum(side * side for side in PYRAMID)


@dataclass(frozen=True)
class Row:
    """One figure: the paper's, that of its formula, that counted for this package's modules (memory: for eager ones),
    and those measured, by rival: a number, or why there is none."""

    paper: str
    name: str
    unit: str
    published: float | None
    formula: float | None
    counted: float
    note: str
    measured: dict[str, float | str] = field(default_factory=dict)


def ccnet_formula(recurrence: int | None, shape: tuple[int, int, int, int] = CCNET_SHAPE) -> float:
    """GFLOP of a block: convolutions (with biases), attention, scaled residual. None: Non-local."""
    _, channels, height, width = shape
    n, key_channels = height * width, channels // 8
    projections = (2 * channels + 1) * (2 * key_channels + channels) * n
    keys = n if recurrence is None else height + width - 1
    attention = 2 * n * keys * (key_channels + channels)
    residual = 2 * channels * n
    return (recurrence or 1) * (projections + attention + residual) / 1e9


def block_formula(maps: int, shape: tuple[int, int, int, int], key_channels: int, recurrence: int = 1) -> float:
    """MiB of forward + backward of an eager block whose attention map has ``maps`` entries: of each application the
    weights, query, key, value and output, at the peak three more maps (gradients, and a copy), and the input. 0 key
    channels: query, key and value are the input."""
    _, channels, height, width = shape
    projected = (2 * key_channels + channels) * height * width if key_channels else 0
    features = channels * height * width
    return 4 * ((3 + recurrence) * maps + recurrence * (projected + features) + features) / MIB


def ann_formula(height: int, width: int, keys: int | None = None) -> float:
    """Billions of multiply-accumulates: three 1 x 1 convolutions at every position, two products with the keys."""
    channels, projected = ANN_CHANNELS
    n = height * width
    return (3 * n * channels * projected + 2 * n * (keys or n) * projected) / 1e9


def counted_flops(module: torch.nn.Module, *shapes: tuple[int, ...]) -> dict[str, int]:
    """FLOPs that torch counts in one forward on fake tensors, by submodule path; "Global" is the total."""
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter:
        module(*(torch.empty(shape) for shape in shapes))
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def counted_mebibytes(name: str, backward: bool) -> float:
    """MiB of the tensors alive at the peak of an eager block, as torch's tracker counts them, with input and output,
    without weights, gradients and grad_output."""
    make, shape = BLOCKS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracker's, about hooks on modules that it sees twice
        block = blocks.written_out(make(), "eager").eval()
        x = torch.empty(shape, requires_grad=backward)
        tracker = MemTracker()
        tracker.track_external(block, x)
        with tracker, torch.set_grad_enabled(backward):
            output = block(x)
            if backward:
                output.backward(torch.empty_like(output))
        total = sum(of_device["Total"] for of_device in tracker.get_tracker_snapshot("peak").values())
        weights = sum(4 * parameter.numel() for parameter in block.parameters())
        others = weights * (1 + backward) + (4 * x.numel() + 4 * output.numel()) * backward
    return (total - others) / MIB


def ccnet_rows() -> list[Row]:
    """CCNet's table. Position attention is the paper's Non-local block: the same computation at C / 8 key channels."""
    _, channels, height, width = CCNET_SHAPE
    n = height * width
    notes = {
        "Non-local": "The formula adds biases and the residual to what torch counts.",
        "RCCA, R = 2": "As above.",
    }
    memory_notes = {
        "Non-local": "Four attention maps, query, key, value, input and output in MiB give the paper's figure, which "
        "is thus that of forward + backward in float32. The count lacks the fourth map, a copy inside softmax's "
        "backward. segattn_ops stores no attention map.",
        "RCCA, R = 2": "The paper does not say which tensors it counts; eager keeps those of both applications.",
    }
    rows = []
    for name, recurrence in {"Non-local": None, "RCCA, R = 2": 2}.items():
        gflop, mebibytes = CCNET_PUBLISHED[name]
        counted = counted_flops(BLOCKS[name][0]().eval(), CCNET_SHAPE)["Global"] / 1e9
        rows.append(Row("CCNet", name, "GFLOP", gflop, ccnet_formula(recurrence), counted, notes[name]))
        maps = n * n if recurrence is None else n * (height + width)
        formula = block_formula(maps, CCNET_SHAPE, channels // 8, recurrence or 1)
        counted = counted_mebibytes(name, backward=True)
        rows.append(Row("CCNet", name, "MiB", mebibytes, formula, counted, memory_notes[name]))
    return rows


def ann_rows() -> list[Row]:
    """ANN's table. APNB's module executes less than the paper counts: query and key share a projection, and the value
    is projected after pooling to 110 positions, which is equivalent because pooling and a 1 x 1 convolution commute."""
    rows = []
    totals = {}
    for (height, width), (non_local, pyramid) in ANN_PUBLISHED.items():
        shape = (1, ANN_CHANNELS[0], height, width)
        size = f"{height} x {width}"
        counts = counted_flops(papers_cell.non_local().eval(), shape)
        totals["NB"] = (counts["Global"] - counts["NonLocal2d.W"]) / 2e9
        note = "The paper leaves out the last convolution; so do formula and count."
        rows.append(Row("ANN", f"NB {size}", "GMAC", non_local, ann_formula(height, width), totals["NB"], note))
        counts = counted_flops(papers_cell.apnb().eval(), shape)
        totals["APNB"] = (counts["Global"] - counts["_Self.stage.W"]) / 2e9
        note = "Query and key share a projection here, and the value is projected after pooling: fewer products."
        formula = ann_formula(height, width, ANN_KEYS)
        rows.append(Row("ANN", f"APNB {size}", "GMAC", pyramid, formula, totals["APNB"], note))
    height, width = FULL
    ratio = ann_formula(height, width) / ann_formula(height, width, ANN_KEYS)
    note = "The paper's ratio is of times on a GPU; those of formula and count are of multiply-accumulates."
    rows.append(Row("ANN", "NB / APNB, time", "x", ANN_FASTER, ratio, totals["NB"] / totals["APNB"], note))
    n, projected = height * width, ANN_CHANNELS[1]
    ratio = (n + 4 * projected) / (ANN_KEYS + 4 * projected)
    mebibytes = [counted_mebibytes(name, backward=False) for name in ("NB", "APNB")]
    note = (
        "The formula has one attention map and the four maps of 256 channels, near the paper's figure; counted and "
        "measured include input and output of 2048 channels, which both blocks need, and a second attention map. "
        "segattn_ops stores a map in neither block."
    )
    rows.append(Row("ANN", "NB / APNB, memory", "x", ANN_SMALLER, ratio, mebibytes[0] / mebibytes[1], note))
    return rows


def danet_rows() -> list[Row]:
    """DANet's blocks on a whole 1024 x 2048 image, for which its paper states no costs."""
    rows = []
    for name in ("PAM", "CAM"):
        make, shape = BLOCKS[name]
        _, channels, height, width = shape
        n = height * width
        formula = ccnet_formula(None, shape) if name == "PAM" else (4 * channels**2 * n + 2 * channels * n) / 1e9
        counted = counted_flops(make().eval(), shape)["Global"] / 1e9
        title = f"{name} {height} x {width}"
        note = "The paper states no costs. " + (
            "The formula adds biases and the residual to what torch counts."
            if name == "PAM"
            else "segattn_ops computes half of the symmetric energies, and its count says so."
        )
        rows.append(Row("DANet", title, "GFLOP", None, formula, counted, note))
        maps, key_channels = (n * n, channels // 8) if name == "PAM" else (channels**2, 0)
        formula = block_formula(maps, shape, key_channels)
        note = (
            "Four maps of N x N in eager, of which the count lacks one, as above."
            if name == "PAM"
            else "The map has C x C entries. The count includes the temporary feature maps of the residual's backward."
        )
        rows.append(Row("DANet", title, "MiB", None, formula, counted_mebibytes(name, backward=True), note))
    return rows


def all_rows() -> list[Row]:
    return [*ccnet_rows(), *ann_rows(), *danet_rows()]


def measure_into(rows: list[Row], threads: int, backend: str, on_row=lambda name: None) -> None:
    """Fills in the figures that can be measured: memory, and ANN's ratios."""
    for row in rows:
        if row.unit not in ("MiB", "x"):
            continue
        on_row(f"{row.paper} {row.name}")
        for rival in ("eager", "fused"):
            row.measured[rival] = _measured(row, rival, threads, backend)


def _measured(row: Row, rival: str, threads: int, backend: str) -> float | str:
    options = {"threads": threads, "backend": backend}
    pair = row.unit == "x"
    names = ("NB", "APNB") if pair else (row.name.partition(f" {FULL[0]} x")[0],)
    needed = 1.25 * max(counted_mebibytes(name, backward=not pair) for name in names) * MIB
    available = measure.available_bytes()
    if rival == "eager" and needed > MEMORY_SHARE * available:
        return f"needs {needed / 2**30:.1f} GiB of {available / 2**30:.1f}"
    if row.name.endswith("time"):
        return papers_cell.timed(*names, rival, **options)["median"]
    peaks = [papers_cell.measured(name, rival, backward=not pair, **options) for name in names]
    if None in peaks:
        return "not measured"
    return peaks[0] / peaks[1] if pair else peaks[0] / MIB


COLUMNS = ("paper", "block", "", "published", "by formula", "counted", "eager, measured", "segattn_ops, measured")


def cells(row: Row) -> list[str]:
    measured = [row.measured.get(rival) for rival in ("eager", "fused")]
    numbers = [row.published, row.formula, row.counted, *measured]
    return [row.paper, row.name, row.unit, *(_number(number) for number in numbers)]


def _number(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


NOTES = """\
GFLOP: 10^9 FLOP of a forward; GMAC: 10^9 multiply-accumulates. MiB: peak of forward + backward in float32 with input
and output, without weights and gradients. x: the figure of NB over that of APNB, forward, at 128 x 256. Blocks with
their convolutions, batch 1; *counted* is torch's FLOP counter on this package's modules, and its memory tracker on
eager ones."""


def markdown(rows: list[Row], command: str) -> str:
    notes: dict[str, list[str]] = {}
    for row in rows:
        notes.setdefault(row.note, []).append(f"{row.paper} {row.name}, {row.unit}")
    notes["As above."] = []
    sentences = [f"- {'; '.join(names)}: {note}" for note, names in notes.items() if names]
    parts = ["# The papers' costs", f"`{command}`", NOTES, report.markdown_table(COLUMNS, list(map(cells, rows)))]
    return "\n\n".join([*parts, "\n".join(sentences)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_line.Parser(prog=PROG, description=f"Prints {SUMMARY}; writes papers.json and papers.md.")
    parser.add_argument("--measure", action="store_true", help="also measure memory and ANN's ratios (minutes)")
    parser.add_argument("--backend", choices=("native", "reference"), default="native", help="of the fused blocks")
    parser.add_argument("--threads", type=command_line.whole(), help="CPU threads; PyTorch's choice if not given")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the files")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(argv, arguments))


def _run(argv: list[str], arguments: argparse.Namespace) -> int:
    folder = command_line.writable_folder(arguments.output)
    threads = arguments.threads or torch.get_num_threads()
    rows = all_rows()
    if arguments.measure:
        measure.pin(threads)
        start_server()
        try:
            measure_into(rows, threads, arguments.backend, lambda name: print(f"measuring {name}", file=sys.stderr))
        except CellFailed as error:
            return command_line.fail(PROG, error, 1)
    command = " ".join([PROG, *argv])
    records = [{"rival": "", "status": "measured", **asdict(row)} for row in rows]
    report.write_json(report.build(command, "cpu", threads, records, "papers"), folder / "papers.json")
    files.write_text(folder / "papers.md", markdown(rows, command))
    print(markdown(rows, command), end="")
    return 0
