"""Messages between the ranks: PyTorch's functional collectives, which torch.compile takes into its graph.

A message is a sequence of tensors of any dtypes, packed into bytes: one collective then moves operands, statistics and
masks together. Each tensor starts on 16 bytes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed._functional_collectives  # loads the operators
from torch import Tensor

from ._mesh import Group

_ALIGNMENT = 16  # bytes; more than any dtype's size

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor of a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def spec_of(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype)


def _length(spec: Spec) -> int:
    """Bytes without padding."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def size_of(specs: Sequence[Spec]) -> int:
    """Bytes of a message."""
    return sum(-(-_length(spec) // _ALIGNMENT) * _ALIGNMENT for spec in specs)


def pack(messages: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The messages one after the other, as bytes. What pads them is not written."""
    tensors = [tensor for message in messages for tensor in message]
    specs = [spec_of(tensor) for tensor in tensors]
    packed = torch.empty(size_of(specs), dtype=torch.uint8, device=device)
    for target, tensor in zip(unpack(packed, specs), tensors, strict=True):
        target.copy_(tensor)
    return packed


def unpack(packed: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of one message: views of it."""
    tensors, start = [], 0
    for spec in specs:
        tensors.append(packed[start : start + _length(spec)].view(spec.dtype).view(spec.shape))
        start += size_of([spec])
    return tensors


@dataclass
class Sent:
    """What a rank sent within `recording()`.

    Attributes:
        bytes: without what it sends to itself, and by the ring algorithm for sums: 2 (R - 1) / R of the tensor.
        collectives: the number of collectives.
    """

    bytes: float = 0
    collectives: int = 0
    by_name: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, size: float) -> None:
        self.bytes += size
        self.collectives += 1
        self.by_name[name] = self.by_name.get(name, 0) + size


_records: list[Sent] = []


@contextmanager
def recording() -> Iterator[Sent]:
    """Counts what the ops of segattn_ops.distributed send. Not within compiled functions."""
    record = Sent()
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def _count(name: str, size: float) -> None:
    if not torch.compiler.is_compiling():
        for record in _records:
            record.add(name, size)


def _named(op: str, group: Group, action: Callable[[], Result]) -> Result:
    """The action, whose failure names the op: a rank that is gone, or that did not come within the group's timeout."""
    if torch.compiler.is_compiling():
        return action()
    try:
        return action()
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: communication failed on rank {group.ranks[group.index]} of the ranks {list(group.ranks)}: another "
            f"rank raised an error, ended, or did not make the same call within the group's timeout ({error})"
        ) from error


class Arriving:
    """Messages under way."""

    def __init__(self, op: str, group: Group, received: Tensor, specs: Sequence[Sequence[Spec]], sent: Tensor) -> None:
        self._op, self._group, self._received, self._specs, self._sent = op, group, received, specs, sent

    def wait(self) -> list[list[Tensor]]:
        """The message of each rank, in the order of the group."""
        received = _named(self._op, self._group, lambda: torch.ops._c10d_functional.wait_tensor(self._received))
        sizes = [size_of(specs) for specs in self._specs]
        in_order = [0] * len(sizes)  # where the message of each rank starts
        start = 0
        for index in sorted(range(len(sizes)), key=self._group.order.__getitem__):
            in_order[index] = start
            start += sizes[index]
        return [
            unpack(received[first : first + size], specs)
            for first, size, specs in zip(in_order, sizes, self._specs, strict=True)
        ]


def exchange(op: str, group: Group, messages: Sequence[Sequence[Tensor]], specs: Sequence[Sequence[Spec]]) -> Arriving:
    """Sends a message to each rank of the group and receives one from each.

    Args:
        op: named in errors.
        messages: for each rank, in the order of the group; empty for none.
        specs: of the messages that arrive.
    """
    by_order = sorted(range(group.size), key=group.order.__getitem__)
    sent_sizes = [size_of([spec_of(t) for t in messages[index]]) for index in by_order]
    received_sizes = [size_of(specs[index]) for index in by_order]
    device = next(tensor.device for message in messages for tensor in message)
    packed = pack([messages[index] for index in by_order], device)
    _count(op, sum(sent_sizes) - sent_sizes[group.order[group.index]])
    received = _named(
        op,
        group,
        lambda: torch.ops._c10d_functional.all_to_all_single(packed, received_sizes, sent_sizes, group.name),
    )
    return Arriving(op, group, received, specs, packed)


def shift(op: str, group: Group, tensors: Sequence[Tensor], specs: Sequence[Spec]) -> Arriving:
    """Sends the tensors to the next rank of the group, and receives those of `specs` from the rank before: the only
    message of the result that is not empty."""
    messages: list[Sequence[Tensor]] = [()] * group.size
    arriving: list[Sequence[Spec]] = [()] * group.size
    messages[(group.index + 1) % group.size] = tensors
    arriving[(group.index - 1) % group.size] = specs
    return exchange(op, group, messages, arriving)


def all_reduce(op: str, group: Group, tensor: Tensor) -> Tensor:
    """The sum over the ranks, the same bits on each."""
    _count(op, 2 * (group.size - 1) / group.size * tensor.numel() * tensor.dtype.itemsize)

    def summed() -> Any:
        pending = torch.ops._c10d_functional.all_reduce(tensor.contiguous(), "sum", group.name)
        return torch.ops._c10d_functional.wait_tensor(pending)

    result: Tensor = _named(op, group, summed)
    return result


def all_gather_bytes(op: str, group: Group, data: Tensor) -> list[Tensor]:
    """Tensors of the same size from each rank, in the order of the group."""
    _count(op, (group.size - 1) * data.numel() * data.dtype.itemsize)

    def gathered() -> Any:
        pending = torch.ops._c10d_functional.all_gather_into_tensor(data, group.size, group.name)
        return torch.ops._c10d_functional.wait_tensor(pending)

    parts = _named(op, group, gathered).chunk(group.size)
    return [parts[group.order[index]] for index in range(group.size)]


def gather(op: str, group: Group, tensors: Sequence[Tensor], specs: Sequence[Sequence[Spec]]) -> list[list[Tensor]]:
    """The message of each rank, in the order of the group. One collective, padded to the largest message.

    specs: of each rank's message.
    """
    if torch.compiler.is_compiling():
        return _gather_in_graph(op, group, tensors, specs)
    return _gather(op, group, tensors, specs)


def _gather(op: str, group: Group, tensors: Sequence[Tensor], specs: Sequence[Sequence[Spec]]) -> list[list[Tensor]]:
    largest = max(size_of(message) for message in specs)
    packed = pack([tensors], tensors[0].device)
    if packed.numel() < largest:
        packed = torch.cat([packed, packed.new_zeros(largest - packed.numel())])
    parts = all_gather_bytes(op, group, packed)
    return [unpack(part, message) for part, message in zip(parts, specs, strict=True)]


def _gather_in_graph(
    op: str, group: Group, tensors: Sequence[Tensor], specs: Sequence[Sequence[Spec]]
) -> list[list[Tensor]]:
    """With a mark of the sizes that the graph was compiled for. Ranks whose graphs are for different sizes may send
    messages of the same padded size."""
    sizes = [size for message in specs for spec in message for size in spec.shape]
    mark = functools.reduce(lambda so_far, size: (so_far * 1000003 + size + 1) % 2**61, sizes, 1)
    own = torch.full((1,), mark, dtype=torch.int64, device=tensors[0].device)
    marked = [[*message, Spec((1,), torch.int64)] for message in specs]
    parts = _gather(op, group, [*tensors, own], marked)
    same = torch.cat([part[-1] for part in parts]) == mark
    torch._assert_async(same.all(), f"{op}: the ranks run graphs that were compiled for different sizes")
    return [part[:-1] for part in parts]
