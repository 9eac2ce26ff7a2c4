"""The cost tables of the CCNet and ANN papers, by formula, counted on this package's modules, and measured.

``python -m benchmarks papers`` prints them; ``--measure`` also measures the memory of CCNet's blocks at the paper's
size. Conventions differ: CCNet counts FLOPs as 2 x multiply-accumulates, including the block's convolutions; ANN counts
multiply-accumulates of "three convolutions and two products", without the last convolution.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from segattn_ops import nn

from . import command_line, features
from .processes import CellFailed, CellProcess
from .workloads import Workload

PROG = "python -m benchmarks papers"
SUMMARY = "the cost tables of the CCNet and ANN papers: published, by formula, counted, measured"

# Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019): a 769 x 769 image, a feature map of
# 1 x 512 x 97 x 97, 64 key channels. GFLOP and MB of the attention block alone. The paper does not say what the MB
# include; four N x N attention maps and the features, as in a float32 forward and backward, match.
CCNET_SHAPE = (1, 512, 97, 97)
CCNET_PUBLISHED = {"Non-local": (108.0, 1411.0), "RCCA, R = 2": (16.5, 127.0)}
# Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation" (2019): 2048 channels in, key and value
# of 256. Billions of multiply-accumulates of the non-local block and of APNB.
ANN_CHANNELS = (2048, 256)
ANN_PUBLISHED = {(96, 96): (57.98, 15.01), (128, 128): (163.2, 26.7), (128, 256): (601.3, 53.4)}
ANN_KEYS = 1 + 9 + 36 + 64


@dataclass(frozen=True)
class Row:
    """The paper's figure, that of its formula, and that of torch's FLOP counter for the module."""

    name: str
    unit: str
    published: float
    formula: float
    counted: float
    published_megabytes: float | None = None


def ccnet_formula(recurrence: int | None) -> float:
    """GFLOP of a block at CCNet's size: convolutions (with biases), attention, scaled residual. None: Non-local."""
    _, channels, height, width = CCNET_SHAPE
    n, key_channels = height * width, channels // 8
    projections = (2 * channels + 1) * (2 * key_channels + channels) * n
    keys = n if recurrence is None else height + width - 1
    attention = 2 * n * keys * (key_channels + channels)
    residual = 2 * channels * n
    return (recurrence or 1) * (projections + attention + residual) / 1e9


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


def ccnet_rows() -> list[Row]:
    """CCNet's table. Position attention is the paper's Non-local block: the same computation at C / 8 key channels."""
    channels = CCNET_SHAPE[1]
    blocks = {
        "Non-local": (nn.PositionAttention(channels), None),
        "RCCA, R = 2": (nn.RecurrentCrissCrossAttention(channels, recurrence=2), 2),
    }
    rows = []
    for name, (block, recurrence) in blocks.items():
        gflop, megabytes = CCNET_PUBLISHED[name]
        counted = counted_flops(block.eval(), CCNET_SHAPE)["Global"] / 1e9
        rows.append(Row(name, "GFLOP", gflop, ccnet_formula(recurrence), counted, megabytes))
    return rows


def ann_rows() -> list[Row]:
    """ANN's table. APNB's module executes less than the paper counts: query and key share a projection, and the value
    is projected after pooling to 110 positions, which is equivalent because pooling and a 1 x 1 convolution commute."""
    channels, projected = ANN_CHANNELS
    rows = []
    for (height, width), (non_local, pyramid) in ANN_PUBLISHED.items():
        shape = (1, channels, height, width)
        block = nn.NonLocal2d(channels, projected, norm_layer=None).eval()
        counts = counted_flops(block, shape)
        counted = (counts["Global"] - counts["NonLocal2d.W"]) / 2e9
        size = f"{height} x {width}"
        rows.append(Row(f"NB {size}", "GMAC", non_local, ann_formula(height, width), counted))
        stage = nn.AsymmetricAttention(channels, channels, projected, projected, channels, shared=True).eval()
        counts = counted_flops(_Self(stage), shape)
        counted = (counts["Global"] - counts["_Self.stage.W"]) / 2e9
        rows.append(Row(f"APNB {size}", "GMAC", pyramid, ann_formula(height, width, ANN_KEYS), counted))
    return rows


class _Self(torch.nn.Module):
    """APNB's use of its stage: keys and queries from the same feature map."""

    def __init__(self, stage: torch.nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage(x, x)


def measured_megabytes(backend: str = "native") -> dict[str, dict[str, float]]:
    """Extra memory (10^6 bytes) of forward + backward at CCNet's size, eager and fused, each in its own process."""
    from .cell import CellSpec, save_inputs

    found: dict[str, dict[str, float]] = {}
    _, channels, height, width = CCNET_SHAPE
    for name, op in {"Non-local": "position", "RCCA, R = 2": "rcca"}.items():
        workload = Workload(op, height, width)
        x = torch.randn(CCNET_SHAPE, generator=torch.Generator().manual_seed(0)).relu()
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "inputs.pt")
            save_inputs(path, workload, features.operands(workload, x), features.grad_output(workload))
            for rival in ("eager", "fused"):
                cell = CellProcess(CellSpec(workload, rival, path, backend=backend))
                try:
                    cell.call("warm_up")
                    memory = cell.call("first_pass")["memory"]
                finally:
                    cell.close()
                found.setdefault(name, {})[rival] = memory["forward_backward"] / 1e6 if memory else float("nan")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(prog=PROG, description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="also measure the memory of CCNet's blocks (seconds)")
    parser.add_argument("--backend", choices=("native", "reference"), default="native", help="of the fused blocks")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    command_line.require("rich")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    try:
        memory = measured_megabytes(arguments.backend) if arguments.measure else {}
    except CellFailed as error:
        return command_line.fail(PROG, error, 1)
    tables = {"CCNet's costs at 97 x 97": ccnet_rows(), "ANN's costs": ann_rows()}
    for title, rows in tables.items():
        columns = ["block", "unit", "published", "formula", "executed here"]
        if any(row.published_megabytes for row in rows):
            columns += ["published MB"] + [f"{rival} MB" for rival in ("eager", "fused") if memory]
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
        for row in rows:
            line = [row.name, row.unit, f"{row.published:g}", f"{row.formula:.2f}", f"{row.counted:.2f}"]
            if row.published_megabytes:
                line.append(f"{row.published_megabytes:g}")
            line += [f"{megabytes:.0f}" for megabytes in memory.get(row.name, {}).values()]
            table.add_row(*line)
        console.print(table)
    return 0
