"""A paper's block in its own process, for ``papers``: its peak memory, and the times of its forward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn as torch_nn

from segattn_ops import nn

from . import blocks, measure, statistics
from .processes import CellProcess

ANN_CHANNELS = (2048, 256)  # of the input; of query, key and value
FULL = (128, 256)  # positions of a 1024 x 2048 image at output stride 8
SMALL = (16, 16)
ROUNDS = 3


class _Self(torch_nn.Module):
    """APNB's use of its stage: keys and queries from the same feature map."""

    def __init__(self, stage: torch_nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage(x, x)


def non_local() -> torch_nn.Module:
    """ANN's non-local block, NB, without the norm that the paper does not count."""
    return nn.NonLocal2d(*ANN_CHANNELS, norm_layer=None)


def apnb() -> torch_nn.Module:
    channels, projected = ANN_CHANNELS
    return _Self(nn.AsymmetricAttention(channels, channels, projected, projected, channels, shared=True))


# name: (how to make it, the shape of its input)
BLOCKS: dict[str, tuple[Callable[[], torch_nn.Module], tuple[int, int, int, int]]] = {
    "Non-local": (lambda: nn.PositionAttention(512), (1, 512, 97, 97)),
    "RCCA, R = 2": (lambda: nn.RecurrentCrissCrossAttention(512, recurrence=2), (1, 512, 97, 97)),
    "NB": (non_local, (1, ANN_CHANNELS[0], *FULL)),
    "APNB": (apnb, (1, ANN_CHANNELS[0], *FULL)),
    "PAM": (lambda: nn.PositionAttention(512), (1, 512, *FULL)),
    "CAM": (lambda: nn.ChannelAttention(512), (1, 512, *FULL)),
}


@dataclass(frozen=True)
class BlockSpec:
    """The parameters of a cell, as ``benchmarks.processes`` takes them."""

    name: str
    rival: str
    threads: int = 0
    backend: str = "native"
    device: str = "cpu"
    size: tuple[int, int] | None = None  # other than the block's own

    def make(self) -> BlockCell:
        return BlockCell(self)


class BlockCell:
    def __init__(self, spec: BlockSpec):
        if spec.threads:
            torch.set_num_threads(spec.threads)
        make, shape = BLOCKS[spec.name]
        torch.manual_seed(0)
        self.block = blocks.written_out(blocks.awaken(make()), spec.rival).eval()
        self.input = torch.randn(*shape[:2], *(spec.size or shape[2:])).relu_()
        self._forward_backward(self.input[..., : SMALL[0], : SMALL[1]].clone())
        gc.collect()

    def _forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.block(self.input)

    def _forward_backward(self, x: torch.Tensor, grad_output: torch.Tensor | None = None):
        x = x.requires_grad_()
        output = self.block(x)
        leaves = [x, *self.block.parameters()]
        gradients = torch.autograd.grad(output, leaves, torch.ones_like(output) if grad_output is None else grad_output)
        return output.detach(), gradients

    def peak(self, backward: bool) -> int | None:
        """Bytes at the peak, with input and output, without gradients, grad_output and weights; None where the system
        has no such account."""
        if not measure.host_memory_is_measurable():
            return None
        grad_output = torch.ones_like(self.input) if backward else None  # every block keeps its input's shape
        measure.populate_code()
        meter = measure.HostMemory()
        gradients: tuple[torch.Tensor, ...] = ()
        if backward:
            _, gradients = self._forward_backward(self.input, grad_output)
        else:
            self._forward()
        bytes_of = [tensor.numel() * tensor.element_size() for tensor in gradients]
        return meter.peak() + self.input.numel() * self.input.element_size() - sum(bytes_of)

    def timed_pass(self) -> float:
        measure.keep_freed_memory()
        measure.wake_threads()
        return measure.time_host(self._forward)


def measured(name: str, rival: str, backward: bool, **options) -> int | None:
    """Peak bytes of a block in a process of its own; see :meth:`BlockCell.peak`."""
    cell = CellProcess(BlockSpec(name, rival, **options))
    try:
        return cell.call("peak", backward, timeout=600)
    finally:
        cell.close()


def timed(slow: str, fast: str, rival: str, **options) -> dict:
    """The ratio of two blocks' forwards, in interleaved rounds after one that is discarded."""
    cells = [CellProcess(BlockSpec(name, rival, **options)) for name in (fast, slow)]
    try:
        rounds = [[cell.call("timed_pass", timeout=600) for cell in cells] for _ in range(1 + ROUNDS)][1:]
    finally:
        for cell in cells:
            cell.close()
    return statistics.ratio(*zip(*rounds, strict=True))
