"""The costs of attention of a sharded feature map before anything is run: memory of a rank, bytes it sends, FLOP, time.

The formulas are functions of a :class:`Layout`. Bytes are those that `recording` counts, memory is that of the tensors
of a call at its peak, forward and backward: tests/distributed/test_plan.py compares both. Time is a lower bound, from
the rates of a :class:`Machine`: FLOP over the peak rate, messages over the rate of the link, at the same time where the
code overlaps them.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..ops import OPERATORS
from ..ops._check import accumulation_dtype
from . import _agreement
from ._collectives import Spec, size_of
from .position import _gather_fits

OPS = ("position", "criss_cross", "channel")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
MOST = 2**40  # of a size
_OPERATORS = {operator.name: operator for operator in OPERATORS}
_STATISTICS = 8  # vectors of a number a query, of the merge of two parts


@dataclass(frozen=True)
class Machine:
    """Rates of a device and of the link between two ranks.

    Attributes:
        device: its name.
        flops: FLOP/s by the name of a dtype.
        memory: bytes, or None: not limited.
        link: bytes/s in one direction.
        latency: seconds of a message.
        link_name: of the link.
    """

    device: str
    flops: dict[str, float]
    memory: int | None
    link: float
    latency: float
    link_name: str


# Peak rates without sparsity and memory, of the data sheets of NVIDIA's A100 80GB, H100 and H200 (SXM). float32 is a
# third of TF32, as the kernels compute it (docs/architecture.md, 3xTF32). cpu: one core of an AMD EPYC 9005 (Zen 5),
# the product of two matrices of 1024 x 1024 in torch 2.14, measured; float16 was not measured and is taken as float32.
_FLOPS = {
    "a100": {"float16": 312e12, "bfloat16": 312e12, "float32": 52e12, "float64": 19.5e12},
    "h100": {"float16": 989e12, "bfloat16": 989e12, "float32": 165e12, "float64": 67e12},
    "h200": {"float16": 989e12, "bfloat16": 989e12, "float32": 165e12, "float64": 67e12},
    "cpu": {"float16": 110e9, "bfloat16": 494e9, "float32": 110e9, "float64": 58e9},
}
_MEMORY = {"a100": 80 * 10**9, "h100": 80 * 10**9, "h200": 141 * 10**9, "cpu": None}
DEVICES = tuple(_FLOPS)
# Bytes/s in one direction: half of the data sheets' NVLink 3 (600 GB/s) and NVLink 4 (900 GB/s); 400 Gb/s InfiniBand;
# 100 Gb/s Ethernet; two gloo processes on one host, messages of 16 MiB, measured. Latencies of a message are round
# numbers, except that of gloo, which was measured.
LINKS = {
    "nvlink3": (300e9, 5e-6),
    "nvlink4": (450e9, 5e-6),
    "infiniband400": (50e9, 10e-6),
    "ethernet100": (12.5e9, 30e-6),
    "gloo": (1.1e9, 200e-6),
}
_NVLINK = {"a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4"}
HOST = 8  # GPUs that NVLink connects; more ranks are on several hosts


def machine(
    device: str,
    ranks: int,
    *,
    link: float | str | None = None,
    flops: float | None = None,
    memory: float | None = None,
) -> Machine:
    """The rates of a device, and what overrides them. Arguments as of :func:`plan`."""
    if device not in DEVICES:
        raise ValueError(f"plan: device must be one of {list(DEVICES)} (got {device!r})")
    default = "gloo" if device == "cpu" else _NVLINK[device] if ranks <= HOST else "infiniband400"
    name = link if isinstance(link, str) else default
    if name not in LINKS:
        raise ValueError(f"plan: link must be GB/s or one of {list(LINKS)} (got {link!r})")
    rate, latency = LINKS[name]
    if link is not None and not isinstance(link, str):
        rate, name = _positive("link", link) * 1e9, f"given, latency of {name}"
    rates = dict(_FLOPS[device])
    if flops is not None:
        rates = dict.fromkeys(rates, _positive("flops", flops) * 1e12)
    limit = _MEMORY[device] if memory is None else round(_positive("memory", memory) * 2**30)
    return Machine(device, rates, limit, rate, latency, name)


@dataclass(frozen=True)
class Layout:
    """A call of an op on all ranks, forward and backward with the gradients of query, key and value, with one head.

    Channel attention is that of a map with itself, whose energies are C x C.

    Attributes:
        op: position, criss_cross or channel.
        method: of position attention, ring or gather; else "".
        mesh: its shape, of one or two dimensions.
        batch, channels, key_channels: B, C and E.
        dtype: of the operands.
        heights: of the parts, one for each index of the first dimension of the mesh.
        widths: one for each index of the second; one if there is none.
    """

    op: str
    method: str
    mesh: tuple[int, ...]
    batch: int
    channels: int
    key_channels: int
    dtype: torch.dtype
    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh)

    @property
    def positions(self) -> int:
        return sum(self.heights) * sum(self.widths)

    def index(self, rank: int) -> tuple[int, int]:
        """Its coordinates in the mesh."""
        return divmod(rank, len(self.widths))

    def part(self, rank: int) -> int:
        """Its number of positions."""
        i, j = self.index(rank)
        return self.heights[i] * self.widths[j]

    @functools.cached_property
    def parts(self) -> tuple[int, ...]:
        return tuple(height * width for height in self.heights for width in self.widths)

    @functools.cached_property
    def different_ranks(self) -> tuple[int, ...]:
        """One of each kind of rank: all others have the same costs as one of them."""
        kinds: dict[tuple[int, ...], int] = {}
        for rank in range(self.ranks):
            i, j = self.index(rank)
            following = self.parts[(rank + 1) % self.ranks]
            key = self.heights[i], self.widths[j], following, _columns(self, rank), _rows(self, rank)
            kinds.setdefault(key, rank)
        return tuple(kinds.values())


def even_layout(
    op: str,
    method: str,
    mesh: tuple[int, ...],
    height: int,
    width: int,
    channels: int,
    key_channels: int,
    dtype: torch.dtype,
    batch: int = 1,
) -> Layout:
    """The parts of :func:`segattn_ops.distributed.shard`."""
    widths = _split(width, mesh[1]) if len(mesh) == 2 else (width,)
    return Layout(op, method, mesh, batch, channels, key_channels, dtype, _split(height, mesh[0]), widths)


@functools.lru_cache(4096)
def _split(size: int, parts: int) -> tuple[int, ...]:
    """As even as can be, the first ones longer."""
    each, more = divmod(size, parts)
    return (each + 1,) * more + (each,) * (parts - more)


@functools.lru_cache(4096)
def _counted(values: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(Counter(values).items())


def _total(values: tuple[int, ...], size: Callable[[int], int]) -> int:
    return sum(count * size(value) for value, count in _counted(values))


def _to_others(values: tuple[int, ...], own: int, size: Callable[[int], int]) -> int:
    """The sum of the sizes of the values except that of one index."""
    return _total(values, size) - size(values[own])


# Messages and tensors by their number of positions


def _keys(layout: Layout, positions: int) -> int:
    """Bytes of key and value."""
    return _bytes(layout, positions, layout.dtype, layout.key_channels, layout.channels)


def _key_gradients(layout: Layout, positions: int) -> int:
    return _bytes(layout, positions, accumulation_dtype(layout.dtype), layout.key_channels, layout.channels)


def _operands(layout: Layout, positions: int) -> int:
    """Bytes of query, key and value."""
    return _bytes(layout, positions, layout.dtype, layout.key_channels, layout.key_channels, layout.channels)


def _gradients(layout: Layout, positions: int) -> int:
    """Their gradients before rounding."""
    dtype = accumulation_dtype(layout.dtype)
    return _bytes(layout, positions, dtype, layout.key_channels, layout.key_channels, layout.channels)


def _partial(layout: Layout, positions: int) -> int:
    """The output over a part of the keys and its two statistics."""
    return _bytes(layout, positions, accumulation_dtype(layout.dtype), layout.channels, 1, 1)


def _incoming(layout: Layout, positions: int) -> int:
    """What the backward of a line needs: grad_output, logsumexp, its rounding error, delta."""
    statistics = _bytes(layout, positions, accumulation_dtype(layout.dtype), 1, 1, 1)
    return _bytes(layout, positions, layout.dtype, layout.channels) + statistics


def _bytes(layout: Layout, positions: int, dtype: torch.dtype, *channels: int) -> int:
    return size_of([Spec((layout.batch, c, positions), dtype) for c in channels])


def _columns(layout: Layout, rank: int) -> int:
    """How many whole columns a rank computes."""
    i, j = layout.index(rank)
    return _split(layout.widths[j], len(layout.heights))[i]


def _rows(layout: Layout, rank: int) -> int:
    i, j = layout.index(rank)
    return _split(layout.heights[i], len(layout.widths))[j]


@dataclass(frozen=True)
class _Direction:
    """An exchange of criss-cross attention as a rank sees it.

    Attributes:
        is_sharded: whether the lines are; if not, nothing is sent.
        lengths: of the parts of a line.
        own: the index of this rank.
        counts: the lines of each rank.
    """

    is_sharded: bool
    lengths: tuple[int, ...]
    own: int
    counts: tuple[int, ...]

    @property
    def whole(self) -> int:
        """Positions of the lines that this rank computes."""
        return sum(self.lengths) * self.counts[self.own]

    def sent_to_lines(self, size: Callable[[int], int]) -> int:
        length = self.lengths[self.own]
        return _to_others(self.counts, self.own, lambda count: size(count * length))

    def sent_to_parts(self, size: Callable[[int], int]) -> int:
        count = self.counts[self.own]
        return _to_others(self.lengths, self.own, lambda length: size(length * count))


def _directions(layout: Layout, rank: int) -> tuple[_Direction, _Direction]:
    """Rows and columns."""
    i, j = layout.index(rank)
    heights, widths = layout.heights, layout.widths
    return (
        _Direction(len(widths) > 1, widths, j, _split(heights[i], len(widths))),
        _Direction(len(heights) > 1, heights, i, _split(widths[j], len(heights))),
    )


# Bytes sent


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends, without those to itself; a sum over ranks counts as 2 (R - 1) / R of its tensor.

    Attributes:
        agreement: the descriptions of the call, in the forward pass.
        forward: all others.
        backward: with the number of the call.
    """

    agreement: int
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.agreement + self.forward + self.backward


def sent(layout: Layout, rank: int) -> Sent:
    """What a rank sends."""
    others = layout.ranks - 1
    forward, backward = _SENT[layout.op](layout, rank) if others > 0 else (0, 0)
    return Sent(_agreement._SIZE * others, forward, backward + _agreement.CALL_SIZE * others)


def _sent_by_position(layout: Layout, rank: int) -> tuple[int, int]:
    keys = functools.partial(_keys, layout)
    gradients = functools.partial(_key_gradients, layout)
    if layout.method == "gather":
        forward = (layout.ranks - 1) * keys(max(layout.parts))
        return forward, forward + _to_others(layout.parts, rank, gradients)
    forward = _to_others(layout.parts, (rank + 1) % layout.ranks, keys)
    return forward, forward + _total(layout.parts, gradients)


def _sent_by_criss_cross(layout: Layout, rank: int) -> tuple[int, int]:
    forward = backward = 0
    for direction in _directions(layout, rank):
        forward += direction.sent_to_lines(functools.partial(_operands, layout))
        forward += direction.sent_to_parts(functools.partial(_partial, layout))
        backward += direction.sent_to_lines(functools.partial(_incoming, layout))
        backward += direction.sent_to_parts(functools.partial(_gradients, layout))
    return forward, backward


def _sent_by_channel(layout: Layout, rank: int) -> tuple[float, float]:
    size = 2 * (layout.ranks - 1) / layout.ranks * _energies(layout)
    return size, size


def _energies(layout: Layout) -> int:
    return layout.batch * layout.channels**2 * accumulation_dtype(layout.dtype).itemsize


_SENT: dict[str, Callable[[Layout, int], tuple[float, float]]] = {
    "position": _sent_by_position,
    "criss_cross": _sent_by_criss_cross,
    "channel": _sent_by_channel,
}


# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors of a call on a rank. Scratch of kernels and of the communication library is not counted.

    Attributes:
        operands: query, key and value; for channel attention the map alone.
        results: output and logsumexp.
        saved: what the backward needs beside these.
        grad_output: the gradient that arrives.
        forward_messages, forward_work: sent and received buffers, and what is computed, at the peak of the forward.
        backward_messages, backward_work: the same of the backward, with the gradients that it returns.
    """

    operands: int
    results: int
    saved: int
    grad_output: int
    forward_messages: int
    forward_work: int
    backward_messages: int
    backward_work: int

    @property
    def forward(self) -> int:
        """The peak of the forward pass. The results are part of what is computed."""
        return self.operands + self.forward_messages + self.forward_work

    @property
    def backward(self) -> int:
        kept = self.operands + self.results + self.saved + self.grad_output
        return kept + self.backward_messages + self.backward_work

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


_Moment = tuple[int, int]  # bytes of messages, of what is computed


def memory(layout: Layout, rank: int) -> Memory:
    """The memory of a rank."""
    positions = layout.part(rank)
    accumulation = accumulation_dtype(layout.dtype)
    output = _bytes(layout, positions, layout.dtype, layout.channels)
    statistic = _bytes(layout, positions, accumulation, 1)
    if layout.op == "channel":
        energies = _energies(layout)
        forward_moments = [(energies, energies), (0, energies + output)]
        # The gradients of the map as value, as query and key, and their sum; the energies are released by then.
        backward_moments = [(energies, energies + output), (0, 3 * output - energies)]
        forward, backward = (max(found, key=sum) for found in (forward_moments, backward_moments))
        return Memory(output, output, energies, output, *forward, *backward)
    in_accumulation = 0 if layout.dtype == accumulation else _bytes(layout, positions, accumulation, layout.channels)
    saved = in_accumulation + statistic
    operands = _operands(layout, positions)
    moments = _position_moments if layout.op == "position" else _criss_cross_moments
    forward_moments, backward_moments = moments(layout, rank)
    if layout.op == "criss_cross":
        saved += sum(_operands(layout, d.whole) for d in _directions(layout, rank) if d.is_sharded)
    forward_moments.append((0, output + statistic + saved))
    rounded = 0 if layout.dtype == accumulation else operands
    backward_moments.append((0, _gradients(layout, positions) + rounded + statistic))
    forward, backward = (max(found, key=sum) for found in (forward_moments, backward_moments))
    return Memory(operands, output + statistic, saved, output, *forward, *backward)


def _position_moments(layout: Layout, rank: int) -> tuple[list[_Moment], list[_Moment]]:
    """The moments of the forward and of the backward at which the memory may be at its peak."""
    positions, ranks = layout.part(rank), layout.ranks
    accumulation = accumulation_dtype(layout.dtype)
    part, statistic = _partial(layout, positions), _bytes(layout, positions, accumulation, 1)
    merging = 2 * part + _STATISTICS * statistic
    query = _bytes(layout, positions, accumulation, layout.key_channels)  # its gradient
    keys, gradients = _keys(layout, max(layout.parts)), _key_gradients(layout, max(layout.parts))
    if ranks == 1:
        return [(0, part)], [(0, query + gradients + statistic)]
    if layout.method == "gather":
        every, every_gradient = _keys(layout, layout.positions), _key_gradients(layout, layout.positions)
        own = _key_gradients(layout, positions)
        forward = [((ranks + 1) * keys, 0), (ranks * keys, every), (0, every + part)]
        backward = [(messages, computed + statistic) for messages, computed in forward[:2]]
        backward.append((0, every + query + every_gradient + statistic))
        backward.append((every_gradient + ranks * own, every_gradient + query + statistic))
        return forward, backward
    # A shard is held, sent and received at once; the first one is among the operands, the last one is only held.
    if ranks == 2:
        forward = [(2 * keys, part), (keys, merging)]
        backward = [(2 * keys + 2 * gradients, gradients + query), (keys + 2 * gradients, gradients + 2 * query)]
    else:
        forward = [(3 * keys, merging)]
        backward = [(3 * keys + 2 * gradients, gradients + 2 * query)]
    return forward, [(messages, computed + statistic) for messages, computed in backward]


def _criss_cross_moments(layout: Layout, rank: int) -> tuple[list[_Moment], list[_Moment]]:
    """See `_position_moments`."""
    positions = layout.part(rank)
    directions = _directions(layout, rank)
    part, own_gradients = _partial(layout, positions), _gradients(layout, positions)
    statistic = _bytes(layout, positions, accumulation_dtype(layout.dtype), 1)
    operands, incoming = _operands(layout, positions), _incoming(layout, positions)
    to_lines = [operands + _operands(layout, d.whole) if d.is_sharded else 0 for d in directions]
    to_lines_back = [incoming + _incoming(layout, d.whole) if d.is_sharded else 0 for d in directions]
    forward: list[_Moment] = []
    backward: list[_Moment] = []
    whole = 0  # of lines, in bytes
    for index, direction in enumerate(directions):
        results, found = index * part, index * own_gradients + statistic
        under_way, under_way_back = sum(to_lines[index:]), sum(to_lines_back[index:])
        later, later_back = under_way - to_lines[index], under_way_back - to_lines_back[index]
        if direction.is_sharded:
            lines, in_lines = _partial(layout, direction.whole), _gradients(layout, direction.whole)
            received = _incoming(layout, direction.whole)
            whole += _operands(layout, direction.whole)
            forward.append((under_way, whole + results))
            forward.append((later + lines + part, whole + results + lines))
            forward.append((later + part, whole + results + lines + part))
            backward.append((under_way_back, found + received))
            backward.append((later_back, found + received + in_lines))
            backward.append((later_back + in_lines + own_gradients, found + received + in_lines))
            backward.append((later_back + own_gradients, found + received + in_lines + own_gradients))
        else:
            forward.append((later, whole + results + part))
            backward.append((later_back, found + own_gradients))
    forward.append((0, whole + 2 * part + _STATISTICS * statistic))
    return forward, backward


# FLOP and time


@dataclass(frozen=True)
class Passes:
    """Of the forward and of the backward pass."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def flop(layout: Layout, rank: int) -> Passes:
    """Two for a multiply-add, as the operators count them; without those of merging."""
    found = list(_flop_of_parts(layout, rank))
    return Passes(sum(f.forward for f in found), sum(f.backward for f in found))


def _flop_of_parts(layout: Layout, rank: int) -> Iterator[Passes]:
    """All of it, or that of rows and of columns."""
    batch, channels, key_channels = layout.batch, layout.channels, layout.key_channels
    if layout.op == "channel":
        energy, value = (batch, channels, channels), (batch, channels, layout.part(rank))
        found = [_operator_flop("channel_energy", energy, value), _operator_flop("channel_apply", value, energy, value)]
        yield Passes(sum(f.forward for f in found), sum(f.backward for f in found))
    elif layout.op == "position":
        output, query = ((batch, c, layout.part(rank)) for c in (channels, key_channels))
        key, value = (batch, key_channels, layout.positions), (batch, channels, layout.positions)
        yield _operator_flop("position_attention_partial", output, query, key, value)
    else:
        height, width = sum(layout.heights), sum(layout.widths)
        for name, size in (
            ("criss_cross_rows", (_rows(layout, rank), width)),
            ("criss_cross_columns", (height, _columns(layout, rank))),
        ):
            keys, values = (batch, key_channels, *size), (batch, channels, *size)
            yield _operator_flop(name, values, keys, keys, values)


def _operator_flop(name: str, result: Sequence[int], *shapes: Sequence[int]) -> Passes:
    """From the shapes of the result and of the arguments."""
    operator = _OPERATORS[name]
    return Passes(operator.flops(*shapes), operator.flops_backward(result, *shapes))


def seconds(layout: Layout, rank: int, on: Machine) -> Passes:
    """A lower bound of the time of a rank.

    What the code overlaps takes the longer of both: the steps of a ring with the next shard on its way, the rows of
    criss-cross attention with the columns on theirs. The ranks' agreement is not overlapped. A message costs the
    latency: R - 1 in an exchange, 2 log2 R in a sum.
    """
    rate = on.flops[str(layout.dtype).removeprefix("torch.")]
    computed = [Passes(f.forward / rate, f.backward / rate) for f in _flop_of_parts(layout, rank)]
    others = layout.ranks - 1
    agreement = others * on.latency + sent(layout, rank).agreement / on.link if others else 0
    if others == 0:
        return Passes(sum(c.forward for c in computed), sum(c.backward for c in computed))
    if layout.op == "channel":
        messages = 2 * math.ceil(math.log2(layout.ranks)) * on.latency
        found = sent(layout, rank)
        summed = messages + found.forward / on.link
        return Passes(agreement + computed[0].forward + summed, computed[0].backward + summed)
    if layout.op == "position":
        forward, backward = _position_seconds(layout, rank, on, computed[0])
    else:
        forward, backward = _criss_cross_seconds(layout, rank, on, computed)
    return Passes(agreement + forward, backward)


def _position_seconds(layout: Layout, rank: int, on: Machine, computed: Passes) -> tuple[float, float]:
    ranks, largest = layout.ranks, max(layout.parts)
    if layout.method == "gather":
        keys = (ranks - 1) * (on.latency + _keys(layout, largest) / on.link)
        gradients = _to_others(layout.parts, rank, functools.partial(_key_gradients, layout))
        back = (ranks - 1) * on.latency + gradients / on.link
        return keys + computed.forward, keys + computed.backward + back
    shift = on.latency + _keys(layout, largest) / on.link
    shift_back = on.latency + _key_gradients(layout, largest) / on.link
    step, step_back = computed.forward / ranks, computed.backward / ranks
    forward = (ranks - 1) * max(step, shift) + step
    # The gradients of a step leave after it, so that those of the last one are not overlapped.
    return forward, (ranks - 1) * max(step_back, shift + shift_back) + step_back + shift_back


def _criss_cross_seconds(layout: Layout, rank: int, on: Machine, computed: Sequence[Passes]) -> tuple[float, float]:
    rows, columns = _directions(layout, rank)

    def exchange(direction: _Direction, to_lines: bool, size: Callable[[Layout, int], int]) -> float:
        if not direction.is_sharded:
            return 0
        send = direction.sent_to_lines if to_lines else direction.sent_to_parts
        return (len(direction.lengths) - 1) * on.latency + send(functools.partial(size, layout)) / on.link

    def of_pass(
        times: tuple[float, float], out: Callable[[Layout, int], int], back: Callable[[Layout, int], int]
    ) -> float:
        of_rows, of_columns = times
        first = exchange(rows, True, out) + max(of_rows, exchange(columns, True, out))
        return first + exchange(rows, False, back) + of_columns + exchange(columns, False, back)

    forward = of_pass((computed[0].forward, computed[1].forward), _operands, _partial)
    return forward, of_pass((computed[0].backward, computed[1].backward), _incoming, _gradients)


# The plan


@dataclass(frozen=True)
class Estimate:
    """The costs of a layout: of each kind that of the rank that has most of it.

    Attributes:
        op, method, mesh: as of :class:`Layout`.
        positions: of the largest part.
        memory: bytes.
        sent: bytes.
        flop, seconds: forward and backward.
        fits: whether the memory suffices.
        is_auto: whether ``method="auto"`` of position attention takes this method; None for other ops.
    """

    op: str
    method: str
    mesh: tuple[int, ...]
    positions: int
    memory: Memory
    sent: Sent
    flop: Passes
    seconds: Passes
    fits: bool
    is_auto: bool | None

    def costs(self) -> tuple[Any, ...]:
        """All but the mesh: layouts of the same costs are one line of a table."""
        return self.op, self.method, self.positions, self.memory, self.sent, self.flop, self.seconds


def estimate(layout: Layout, on: Machine) -> Estimate:
    """The costs of a layout on a machine."""
    ranks = layout.different_ranks
    needed = max((memory(layout, rank) for rank in ranks), key=lambda m: m.peak)
    is_auto = None
    if layout.op == "position":
        key, value = (layout.batch, layout.key_channels), (layout.batch, layout.channels)
        shapes = [((*key, n), (*key, n), (*value, n)) for n in layout.parts]
        is_auto = _gather_fits(shapes, layout.dtype.itemsize) == (layout.method == "gather")
    return Estimate(
        layout.op,
        layout.method,
        layout.mesh,
        max(layout.parts),
        needed,
        max((sent(layout, rank) for rank in ranks), key=lambda s: s.total),
        max((flop(layout, rank) for rank in ranks), key=lambda f: f.total),
        max((seconds(layout, rank, on) for rank in ranks), key=lambda s: s.total),
        on.memory is None or needed.peak <= on.memory,
        is_auto,
    )


def meshes(ranks: int) -> list[tuple[int, ...]]:
    """All of so many ranks: of one dimension, and of two with at least two indices in the second."""
    return [(ranks,), *((r, ranks // r) for r in range(ranks // 2, 0, -1) if ranks % r == 0)]


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` finds.

    Attributes:
        height, width, channels, key_channels, batch, ranks, dtype: as given.
        machine: the rates.
        estimates: of all layouts, those of an op from the best to the worst: first those that fit, then by time.
        enough_ranks: for an op of which no layout fits, the least power of two of ranks of which one does; None if that
            is more than 65536.
    """

    height: int
    width: int
    channels: int
    key_channels: int
    batch: int
    ranks: int
    dtype: str
    machine: Machine
    estimates: tuple[Estimate, ...]
    enough_ranks: dict[str, int | None]

    def best(self, op: str) -> Estimate:
        """Of the layouts of an op."""
        return next(e for e in self.estimates if e.op == op)

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(e.op for e in self.estimates))

    def reason(self, op: str) -> str:
        """Why the best layout is the best."""
        of_op = [e for e in self.estimates if e.op == op]
        best, fitting = of_op[0], [e for e in of_op if e.fits]
        limit = "" if self.machine.memory is None else f"{self.machine.memory / 2**30:.3g} GiB"
        if not fitting:
            enough = self.enough_ranks[op]
            found = "65536 ranks are not enough" if enough is None else f"{enough} ranks are enough"
            return f"no layout fits in {limit}: the smallest needs {best.memory.peak / 2**30:.3g} GiB; {found}"
        fits = f"fits in {limit}" if limit else "memory is not limited"
        kinds = {e.costs(): e for e in fitting}.values()
        if len(kinds) == 1:
            return fits if len(of_op) == len(fitting) else f"the only one that {fits}"
        other = min((e for e in kinds if e.costs() != best.costs()), key=lambda e: e.seconds.total)
        ratio = other.seconds.total / best.seconds.total
        if ratio < 1.01:
            return f"{fits}; least memory of those within 1% of the fastest"
        return f"{fits}; the fastest, the next takes {ratio:.2f} times as long"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        for entry, found in zip(content["estimates"], self.estimates, strict=True):
            entry["memory"] |= {name: getattr(found.memory, name) for name in ("forward", "backward", "peak")}
        content["recommended"] = {
            op: {"mesh": self.best(op).mesh, "method": self.best(op).method, "reason": self.reason(op)}
            for op in self.ops
        }
        return content


def plan(
    *,
    height: int,
    width: int,
    channels: int,
    key_channels: int | None = None,
    ranks: int,
    dtype: str | torch.dtype = "float32",
    device: str = "h100",
    batch: int = 1,
    op: str = "all",
    mesh: Sequence[int] | None = None,
    link: float | str | None = None,
    flops: float | None = None,
    memory: float | None = None,
) -> Plan:
    """The costs of attention of a feature map whose positions are sharded, for each layout, and the best layout.

    Args:
        height, width: of the feature map.
        channels: C, of the values.
        key_channels: E, of query and key; C / 8 if None. Channel attention has none.
        ranks: how many.
        dtype: float16, bfloat16, float32 or float64.
        device: cpu (a core), a100, h100 or h200.
        batch: B, the samples of each rank.
        op: position, criss_cross, channel or all.
        mesh: its shape, of one or two dimensions; all of so many ranks if None.
        link: GB/s in one direction, or nvlink3, nvlink4, infiniband400, ethernet100 or gloo. If None, gloo for cpu;
            else NVLink up to 8 ranks, and InfiniBand beyond.
        flops: TFLOP/s; the peak rate of the device if None.
        memory: GiB; that of the device if None, and no limit for cpu.

    Raises:
        TypeError: for a size that is not an integer, a rate that is not a number, and names that are not strings.
        ValueError: for a size below 1, a rate that is not positive and finite, an unknown name, and a mesh of another
            number of ranks.
    """
    key_channels = max(channels // 8, 1) if key_channels is None and isinstance(channels, int) else key_channels
    sizes = {"height": height, "width": width, "channels": channels, "key_channels": key_channels}
    for name, value in (sizes | {"ranks": ranks, "batch": batch}).items():
        _size(name, value)
    assert key_channels is not None
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"plan: dtype must be one of {list(DTYPES)} (got {dtype!r})")
    if op not in (*OPS, "all"):
        raise ValueError(f"plan: op must be one of {[*OPS, 'all']} (got {op!r})")
    shapes = meshes(ranks) if mesh is None else [_mesh(mesh, ranks)]
    on = machine(device, ranks, link=link, flops=flops, memory=memory)
    estimates: list[Estimate] = []
    for name in OPS if op == "all" else (op,):
        of_op = [
            estimate(even_layout(name, method, shape, height, width, channels, key_channels, found, batch), on)
            for shape in shapes
            for method in (("ring", "gather") if name == "position" else ("",))
        ]
        estimates += _ordered(of_op)
    return Plan(
        height,
        width,
        channels,
        key_channels,
        batch,
        ranks,
        str(found).removeprefix("torch."),
        on,
        tuple(estimates),
        {
            e.op: _enough_ranks(e.op, height, width, channels, key_channels, found, batch, on.memory)
            for e in estimates
            if not e.fits and e == next(first for first in estimates if first.op == e.op)
        },
    )


def _enough_ranks(
    op: str,
    height: int,
    width: int,
    channels: int,
    key_channels: int,
    dtype: torch.dtype,
    batch: int,
    limit: int | None,
) -> int | None:
    for ranks in [1 << exponent for exponent in range(17)]:
        for mesh in meshes(ranks):
            layout = even_layout(op, "ring", mesh, height, width, channels, key_channels, dtype, batch)
            if limit is None or memory(layout, 0).peak <= limit:  # no rank has a larger part
                return ranks
    return None


def _ordered(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Those that fit by time, then those that do not by memory. Of those that take up to 1% longer than the fastest,
    which the formulas do not tell apart, the one of least memory comes first."""
    fitting = sorted((e for e in estimates if e.fits), key=lambda e: (e.seconds.total, e.memory.peak))
    if fitting:
        equal = [e for e in fitting if e.seconds.total <= 1.01 * fitting[0].seconds.total]
        fitting.sort(key=min(equal, key=lambda e: e.memory.peak).__ne__)
    others = sorted((e for e in estimates if not e.fits), key=lambda e: (e.memory.peak, e.seconds.total))
    return fitting + others


def _size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"plan: {name} must be an integer (got {type(value).__name__})")
    if not 1 <= value <= MOST:
        raise ValueError(f"plan: {name} must be at least 1 and at most 2**40 (got {value})")


def _positive(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"plan: {name} must be a number (got {type(value).__name__})")
    if not 0 < value < math.inf:
        raise ValueError(f"plan: {name} must be positive and finite (got {value})")
    return float(value)


def _mesh(mesh: Sequence[int], ranks: int) -> tuple[int, ...]:
    shape = tuple(mesh)
    for size in shape:
        _size("mesh", size)
    if len(shape) not in (1, 2) or math.prod(shape) != ranks:
        raise ValueError(f"plan: mesh must have 1 or 2 dimensions and {ranks} ranks (got {'x'.join(map(str, shape))})")
    return shape
