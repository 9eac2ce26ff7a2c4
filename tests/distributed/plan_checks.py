"""Checks of the plan against what the ops do: ``python -m tests.distributed.plan_checks 3`` or ``2x2`` (see
processes.py)."""

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segattn_ops import distributed
from segattn_ops.distributed import plan

from .processes import Check, main

DTYPES = (torch.float32, torch.bfloat16)
METHODS = {"position": ("ring", "gather"), "criss_cross": ("",), "channel": ("",)}
CASES = [(op, method) for op in METHODS for method in METHODS[op]]
# The parts of a dimension of the mesh, by its size: uneven, one of them empty.
UNEVEN = {1: (5,), 2: (4, 1), 3: (3, 0, 2), 4: (1, 4, 0, 3)}
TOLERANCE = 0.03  # of the memory


class PeakMemory(TorchDispatchMode):
    """The bytes of the tensors that are alive, at their peak since the last `reset`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def reset(self) -> None:
        self.peak = self.current

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.device.type == "cpu":
                self._add(result)
        return results


def attend(layout: plan.Layout, operands: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
    if layout.op == "position":
        return distributed.position_attention(*operands, mesh=mesh, scale=0.1, method=layout.method)
    if layout.op == "criss_cross":
        return distributed.criss_cross_attention(*operands, mesh=mesh, scale=0.1)
    return distributed.channel_attention(*[operands[-1]] * 3, mesh=mesh, scale=-0.01)


def operands_of(layout: plan.Layout, rank: int) -> list[Tensor]:
    i, j = layout.index(rank)
    size = layout.heights[i], layout.widths[j]
    channels = (layout.channels,) if layout.op == "channel" else (layout.key_channels,) * 2 + (layout.channels,)
    return [torch.randn(layout.batch, c, *size).to(layout.dtype).requires_grad_() for c in channels]


def bytes_sent(op: str, method: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """To the byte, of parts as even as can be and of others; odd channels, so that messages are padded."""
    shape, rank = tuple(mesh.shape), dist.get_rank()
    widths = UNEVEN[shape[1]] if len(shape) == 2 else (7,)
    layouts = [
        plan.Layout(op, method, shape, 2, 5, 3, dtype, UNEVEN[shape[0]], widths),
        plan.even_layout(op, method, shape, 9, 11, 8, 4, dtype),
    ]
    for layout in layouts:
        expected = plan.sent(layout, rank)
        with distributed.recording() as forward:
            output = attend(layout, operands_of(layout, rank), mesh)
        with distributed.recording() as backward:
            output.backward(torch.ones_like(output))
        assert forward.bytes == expected.agreement + expected.forward, (forward, expected)
        assert backward.bytes == expected.backward, (backward, expected)


def peak(layout: plan.Layout, mesh: DeviceMesh) -> tuple[int, int]:
    """Of the forward and the backward."""
    operands = operands_of(layout, dist.get_rank())
    gradient = torch.ones(layout.batch, layout.channels, *operands[0].shape[2:], dtype=layout.dtype)
    with PeakMemory(operands) as memory:
        output = attend(layout, operands, mesh)
        forward = memory.peak
        memory._add(gradient)
        memory.reset()
        output.backward(gradient)
    return forward, memory.peak


def peak_memory(op: str, method: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    shape = tuple(mesh.shape)
    layout = plan.even_layout(op, method, shape, 48, 48, 64, 16, dtype)
    expected = plan.memory(layout, dist.get_rank())
    got = peak(layout, mesh)
    print(shape, op, method, dtype, got, (expected.forward, expected.backward), [round(g/e,3) for g,e in zip(got,(expected.forward, expected.backward))], file=sys.stderr)
    for measured, planned in zip(got, (expected.forward, expected.backward), strict=True):
        assert abs(measured - planned) <= TOLERANCE * planned, (got, expected)


def checks(shape: tuple[int, ...]) -> dict[str, Check]:
    found: dict[str, Callable[..., None]] = {}
    for op, method in CASES:
        for dtype in DTYPES:
            name = f"{op} {method} {str(dtype).removeprefix('torch.')}"
            found[f"bytes sent, {name}"] = functools.partial(bytes_sent, op, method, dtype)
            found[f"memory, {name}"] = functools.partial(peak_memory, op, method, dtype)
    return found


if __name__ == "__main__":
    main(checks, sys.argv[1])
