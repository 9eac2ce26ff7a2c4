"""Checks of the plan against what the ops do: ``python -m tests.distributed.plan_checks 3`` (see processes.py). With
``weak`` it prints the memory of a rank for a map that grows with the number of ranks."""

import json
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from segattn_ops import distributed
from segattn_ops.distributed import plan

from .processes import Check, fork, main

DTYPES = (torch.float32, torch.bfloat16)
METHODS = {"position": ("ring", "gather"), "criss_cross": ("",), "channel": ("",)}
CASES = [(op, method) for op in METHODS for method in METHODS[op]]
# The parts of a dimension of the mesh, by its size: uneven, one of them empty.
UNEVEN = {1: (5,), 2: (4, 1), 3: (3, 0, 2), 4: (1, 4, 0, 3)}
TOLERANCE = 0.02  # of the memory: vectors of a number a position are estimated
RUNS = 12


class PeakMemory(TorchDispatchMode):
    """The bytes of the tensors that are alive, at their peak since the last `reset`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def reset(self) -> None:
        self.peak = self.current

    def add(self, tensor: Tensor) -> None:
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
                self.add(result)
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


def peaks(layout: plan.Layout, mesh: DeviceMesh, planned: Sequence[int]) -> list[int]:
    """Of the forward and of the backward: the least of some runs, because gloo's threads release a message a moment
    after it arrived. No further run once that of every rank is as planned."""
    least = list(_peaks(layout, mesh))
    for _ in range(RUNS - 1):
        fits = torch.tensor(int(all(map(is_as_planned, least, planned))))
        dist.all_reduce(fits, dist.ReduceOp.MIN)
        if fits.item():
            break
        least = list(map(min, least, _peaks(layout, mesh)))
    return least


def is_as_planned(got: int, planned: int) -> bool:
    return abs(got - planned) <= TOLERANCE * planned


def _peaks(layout: plan.Layout, mesh: DeviceMesh) -> tuple[int, int]:
    operands = operands_of(layout, dist.get_rank())
    gradient = torch.ones(layout.batch, layout.channels, *operands[0].shape[2:], dtype=layout.dtype)
    with PeakMemory(operands) as memory:
        output = attend(layout, operands, mesh)
        forward = memory.peak
        memory.add(gradient)
        memory.reset()
        output.backward(gradient)
    return forward, memory.peak


def peak_memory(op: str, method: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """Of maps of 48 x 48, whose columns and rows are divided evenly: all messages of a ring are of one size."""
    layout = plan.even_layout(op, method, tuple(mesh.shape), 48, 48, 64, 16, dtype)
    memory = plan.memory(layout, dist.get_rank())
    planned = memory.forward, memory.backward
    for name, got, expected in zip(("forward", "backward"), peaks(layout, mesh, planned), planned, strict=True):
        assert is_as_planned(got, expected), f"{name}: {got} (planned {expected}, {memory})"


def flop(op: str, method: str, mesh: DeviceMesh) -> None:
    """Of the operators; merging is not counted."""
    layout = plan.even_layout(op, method, tuple(mesh.shape), 9, 11, 8, 4, torch.float32)
    found = []
    operands = operands_of(layout, dist.get_rank())
    with FlopCounterMode(display=False) as forward:
        output = attend(layout, operands, mesh)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    for counter in (forward, backward):
        counts = counter.get_flop_counts()["Global"]
        found.append(sum(count for operator, count in counts.items() if str(operator).startswith("segattn")))
    expected = plan.flop(layout, dist.get_rank())
    assert found == [expected.forward, expected.backward], (found, expected)


def of_meshes(check: Callable[..., None], shapes: Sequence[tuple[int, ...]], *arguments: Any) -> Check:
    """A check on all meshes of these ranks."""

    def run(mesh: DeviceMesh) -> None:
        for shape in shapes:
            check(*arguments, mesh=init_device_mesh("cpu", shape))

    return run


def checks(shape: tuple[int, ...]) -> dict[str, Check]:
    shapes = plan.meshes(math.prod(shape))
    found: dict[str, Check] = {}
    for op, method in CASES:
        found[f"FLOP, {op} {method}"] = of_meshes(flop, shapes, op, method)
        for dtype in DTYPES:
            name = f"{op} {method} {str(dtype).removeprefix('torch.')}"
            found[f"bytes sent, {name}"] = of_meshes(bytes_sent, shapes, op, method, dtype)
            found[f"memory, {name}"] = of_meshes(peak_memory, shapes, op, method, dtype)
    return found


def of_growing_map(op: str, method: str) -> int:
    """The peak of this rank for a map that grows with the number of ranks."""
    ranks = dist.get_world_size()
    layout = plan.even_layout(op, method, (ranks,), 8 * ranks, 48, 64, 16, torch.float32)
    memory = plan.memory(layout, dist.get_rank())
    return max(peaks(layout, init_device_mesh("cpu", (ranks,)), (memory.forward, memory.backward)))


def weak_scaling() -> dict[str, list[int]]:
    """The largest peak of a rank among three and among six; of two, a ring has no shard that is passed on."""
    cases = [case for case in CASES if case[1] != "gather" and case[0] != "channel"]
    return {op: [max(fork(ranks, of_growing_map, (op, method))) for ranks in (3, 6)] for op, method in cases}


if __name__ == "__main__":
    if sys.argv[1:] == ["weak"]:
        print(json.dumps(weak_scaling()))
    else:
        main(checks, sys.argv[1])
