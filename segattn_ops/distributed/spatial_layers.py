"""Rules of layers that look beyond a position: convolutions, poolings, padding, resampling.

Each computes which rows and columns of its input a rank's part of the output needs, by the indices of the whole map,
gets those from the ranks that hold them, and runs PyTorch's function on them without padding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..ops._check import accumulation_dtype
from ._functions import SumOverRanks
from .spatial_map import (
    Parts,
    SpatialMap,
    handles,
    maps_in,
    on_replicated,
    own_shape,
    part_of,
    refusal,
    run_on,
)
from .spatial_rows import Range, fetch, own_range

_OP = "distributed.spatially_parallel"


def pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return value, value


def _check(function: str, input: Any, *others: Any) -> None:
    if not isinstance(input, SpatialMap) or any(m.is_sharded for m in maps_in(*others)):
        raise refusal(function, maps_in(input, *others), "only its input may be one, so it has no rule")
    if input.is_sharded and (input.dims != (-2, -1) or len(own_shape(input)) != 4):
        raise refusal(function, [input], "its input must be (B, C, H, W), so it has no rule")


def _result(input: SpatialMap, local: Tensor, parts: Sequence[Parts]) -> SpatialMap:
    if local.untyped_storage().data_ptr() == input.local.untyped_storage().data_ptr():
        local = local.clone()  # rows that were taken over: an in-place function would change the input
    return SpatialMap(local, input.lineage, (parts[0], parts[1]), (-2, -1))


def _empty(shape: Sequence[int], part: Tensor) -> Tensor:
    """A result without positions, in the graph behind the part."""
    return (part.sum() * 0).expand(shape)


class _Windows:
    """The windows of a layer along one dimension: output i reads inputs i * stride - padding + dilation * j for j below
    size."""

    def __init__(self, size: int, stride: int, padding: int, dilation: int) -> None:
        self.stride, self.padding, self.reach = stride, padding, dilation * (size - 1) + 1

    def count(self, length: int, after: int | None = None, ceil_mode: bool = False) -> int:
        """Outputs of so many inputs. after: padding behind them, if it is another than before them."""
        room = length + self.padding + (self.padding if after is None else after) - self.reach
        if room < 0 and not ceil_mode:
            return 0
        count = (-(-room // self.stride) if ceil_mode else room // self.stride) + 1
        if ceil_mode and (count - 1) * self.stride >= length + self.padding:
            count -= 1  # no window starts in the padding behind
        return count

    def inputs(self, outputs: Range) -> Range:
        """What outputs read, beyond the borders as well."""
        start = outputs[0] * self.stride - self.padding
        return start, start if outputs[1] == outputs[0] else (outputs[1] - 1) * self.stride - self.padding + self.reach


def _within(wanted: Range, length: int) -> Range:
    start = min(max(wanted[0], 0), length)
    return start, max(start, min(wanted[1], length))


def _windowed(
    function: str, input: SpatialMap, windows: Sequence[_Windows], counts: Sequence[int], fill: float
) -> tuple[Tensor, tuple[Parts, Parts], tuple[Range, Range]]:
    """What this rank's outputs read, filled up beyond the borders of the map; the parts of the outputs, and those of
    this rank. Without outputs: what one would read, since PyTorch's layers refuse to have none."""
    local, lineage = part_of(input), input.lineage
    parts, own, around = [], [], []
    for axis, (window, count) in enumerate(zip(windows, counts, strict=True)):
        if count < 1:
            raise RuntimeError(
                f"{function}: the kernel must not be larger than the padded input "
                f"(got an input of {list(own_shape(input))})"
            )
        held = input.parts[axis]
        made = lineage.parts(axis, count, held)
        ranges = [window.inputs(own_range(made, index)) for index in range(len(made))]
        total, index = sum(held), lineage.index(axis)
        wanted = [[_within(r, total)] for r in ranges]
        local = fetch(local, 2 + axis, lineage.group(axis), held, wanted)
        start, stop = ranges[index]
        before = min(max(-start, 0), stop - start)
        behind = max(stop - start, window.reach) - before - local.shape[2 + axis]
        around.append((before, behind))
        parts.append(made)
        own.append(own_range(made, index))
    if any(any(r) for r in around):
        local = F.pad(local, (*around[1], *around[0]), value=fill)
    return local, (parts[0], parts[1]), (own[0], own[1])


def _without(made: Tensor, own: Sequence[Range]) -> Tensor:
    """The outputs of this rank, perhaps none."""
    for dim, (start, stop) in enumerate(own, 2):
        if start == stop:
            made = made.narrow(dim, 0, 0).clone()  # no view, which an in-place layer would change
    return made


@handles(F.conv2d, torch.conv2d)
def _conv2d(
    func: Any, input: Any, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Output i belongs to the rank that holds the proportional part of the input."""
    _check("conv2d", input, weight, bias)
    if not input.is_sharded:
        return on_replicated(func, (input, weight, bias, stride, padding, dilation, groups), {})
    strides, dilations = pair(stride), pair(dilation)
    reach = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if padding == "same":
        if strides != (1, 1):
            raise RuntimeError("conv2d: padding='same' is not supported for strided convolutions")
        before, after = [r // 2 for r in reach], [r - r // 2 for r in reach]
    else:
        before = list(pair(0 if padding == "valid" else padding))
        after = before
    windows = [_Windows(k, s, p, d) for k, s, p, d in zip(weight.shape[2:], strides, before, dilations, strict=True)]
    counts = [w.count(size, behind) for w, size, behind in zip(windows, own_shape(input)[2:], after, strict=True)]
    local, parts, own = _windowed("conv2d", input, windows, counts, 0.0)
    made = F.conv2d(local, weight, bias, strides, 0, dilations, groups)
    return _result(input, _without(made, own), parts)


@handles(F.conv_transpose2d, torch.conv_transpose2d)
def _conv_transpose2d(
    func: Any, input: Any, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """Input i reaches outputs i * stride - padding + dilation * j."""
    _check("conv_transpose2d", input, weight, bias)
    if not input.is_sharded:
        return on_replicated(func, (input, weight, bias, stride, padding, output_padding, groups, dilation), {})
    local, lineage = part_of(input), input.lineage
    strides, paddings, dilations, extras = pair(stride), pair(padding), pair(dilation), pair(output_padding)
    parts, crops, added = [], [], []
    for axis, (s, p, d, e) in enumerate(zip(strides, paddings, dilations, extras, strict=True)):
        held, reach = input.parts[axis], d * (weight.shape[2 + axis] - 1)
        total = sum(held)
        made = lineage.parts(axis, (total - 1) * s - 2 * p + reach + e + 1, held)
        wanted = []
        for index in range(len(made)):
            start, stop = own_range(made, index)
            first = min(-((reach - start - p) // s), (start + p) // s)
            wanted.append([_within((first, (stop - 1 + p) // s + 1 if stop > start else first), total)])
        index = lineage.index(axis)
        local = fetch(local, 2 + axis, lineage.group(axis), held, wanted)
        start, stop = own_range(made, index)
        crops.append((start - wanted[index][0][0] * s + p if stop > start else 0, stop - start))
        added.append(max(e, s - 1 - reach))
        parts.append(made)
    none = [int(n == 0) for n in local.shape[2:]]
    if any(none):  # the part has no positions
        local = F.pad(local, (0, none[1], 0, none[0]))
    whole = F.conv_transpose2d(local, weight, bias, strides, 0, tuple(added), groups, dilations)
    for axis, (start, length) in enumerate(crops):
        whole = whole.narrow(2 + axis, start, length)
    return _result(input, whole.contiguous(), parts)


@handles(F.max_pool2d, torch.max_pool2d)
def _max_pool2d(
    func: Any, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    if return_indices:
        raise refusal("max_pool2d with return_indices", maps_in(input))
    _check("max_pool2d", input)
    if not input.is_sharded:
        return on_replicated(torch.max_pool2d, (input, kernel_size, stride or (), padding, dilation, ceil_mode), {})
    kernels = pair(kernel_size)
    strides, paddings, dilations = pair(stride or kernels), pair(padding), pair(dilation)
    _check_padding("max_pool2d", kernels, paddings)
    windows = [_Windows(*w) for w in zip(kernels, strides, paddings, dilations, strict=True)]
    counts = [w.count(size, None, ceil_mode) for w, size in zip(windows, own_shape(input)[2:], strict=True)]
    local, parts, own = _windowed("max_pool2d", input, windows, counts, -math.inf)
    return _result(input, _without(F.max_pool2d(local, kernels, strides, 0, dilations), own), parts)


def _check_padding(function: str, kernels: Sequence[int], paddings: Sequence[int]) -> None:
    if any(2 * p > k for k, p in zip(kernels, paddings, strict=True)):
        raise RuntimeError(f"{function}: padding must be at most half of kernel_size (got {paddings} and {kernels})")


@handles(F.avg_pool2d)
def _avg_pool2d(
    func: Any, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    _check("avg_pool2d", input)
    if not input.is_sharded:
        arguments = (input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return on_replicated(func, arguments, {})
    kernels = pair(kernel_size)
    strides, paddings = pair(stride or kernels), pair(padding)
    _check_padding("avg_pool2d", kernels, paddings)
    windows = [_Windows(k, s, p, 1) for k, s, p in zip(kernels, strides, paddings, strict=True)]
    lengths = own_shape(input)[2:]
    counts = [w.count(size, None, ceil_mode) for w, size in zip(windows, lengths, strict=True)]
    local, parts, own = _windowed("avg_pool2d", input, windows, counts, 0.0)
    if divisor_override is not None:
        pooled = F.avg_pool2d(local, kernels, strides, 0, divisor_override=divisor_override)
        return _result(input, _without(pooled, own), parts)
    divisors = []
    for window, padding, length, outputs in zip(windows, paddings, lengths, own, strict=True):
        first, last = (-padding, length + padding) if count_include_pad else (0, length)
        reads = [window.inputs((i, i + 1)) for i in range(*outputs)]
        divisors.append([min(stop, last) - max(start, first) for start, stop in reads])
    if all(d == [k] * len(d) for d, k in zip(divisors, kernels, strict=True)):
        return _result(input, _without(F.avg_pool2d(local, kernels, strides, 0), own), parts)
    dtype = accumulation_dtype(local.dtype)
    sums = _without(F.avg_pool2d(local.to(dtype), kernels, strides, 0, divisor_override=1), own)
    rows, columns = (torch.tensor(d, dtype=dtype, device=local.device) for d in divisors)
    return _result(input, (sums / (rows[:, None] * columns)).to(local.dtype), parts)


@handles(F.pad, torch._C._nn.pad)
def _pad(func: Any, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if not isinstance(input, SpatialMap) or not input.is_sharded:
        return on_replicated(func, (input, pad, mode, value), {})
    touched = [-(i // 2 + 1) for i, n in enumerate(pad) if n]
    if not any(dim in input.dims for dim in touched):
        return run_on([], input.with_local, F.pad, (input, pad, mode, value), {})
    if input.dims != (-2, -1) or any(dim < -2 for dim in touched):
        raise refusal("pad", [input], "beside height and width it has no rule")
    edges = [*pad, 0, 0][:4]
    local, lineage, parts = part_of(input), input.lineage, []
    for axis, (before, behind) in enumerate(((edges[2], edges[3]), (edges[0], edges[1]))):
        held = input.parts[axis]
        length = sum(held)
        if mode in ("reflect", "circular") and max(before, behind) > length - (mode == "reflect"):
            raise RuntimeError(f"pad: {mode} padding must be smaller than the input (got {list(pad)} for {length})")
        made = lineage.parts(axis, length + before + behind, held)
        sources = [_sources(own_range(made, i), length, before, mode) for i in range(len(made))]
        wanted = [_ranges(s) for s in sources]
        local = fetch(local, 2 + axis, lineage.group(axis), held, wanted)
        own = sources[lineage.index(axis)]
        local = _arranged(local, 2 + axis, own, wanted[lineage.index(axis)], 0.0 if value is None else value)
        parts.append(made)
    return _result(input, local, parts)


def _sources(outputs: Range, length: int, before: int, mode: str) -> list[int]:
    """The input that each output of a padding is a copy of; -1 for none."""
    found = []
    for i in range(outputs[0] - before, outputs[1] - before):
        if 0 <= i < length:
            found.append(i)
        elif mode == "constant":
            found.append(-1)
        elif mode == "replicate":
            found.append(min(max(i, 0), length - 1))
        elif mode == "circular":
            found.append(i % length)
        else:
            found.append(-i if i < 0 else 2 * (length - 1) - i)
    return found


def _ranges(sources: Sequence[int]) -> list[Range]:
    """The fewest ranges that contain these indices, without -1."""
    ranges: list[Range] = []
    for i in sorted({s for s in sources if s >= 0}):
        if ranges and ranges[-1][1] == i:
            ranges[-1] = ranges[-1][0], i + 1
        else:
            ranges.append((i, i + 1))
    return ranges or [(0, 0)]


def _arranged(rows: Tensor, dim: int, sources: Sequence[int], ranges: Sequence[Range], fill: float) -> Tensor:
    """The fetched rows in the order of the sources, with `fill` for -1."""
    place = {index: at for at, index in enumerate(i for r in ranges for i in range(*r))}
    known = [place[s] for s in sources if s >= 0]
    if known != list(range(rows.shape[dim])):
        rows = rows.index_select(dim, torch.tensor(known, dtype=torch.long, device=rows.device))
    before = next((at for at, s in enumerate(sources) if s >= 0), len(sources))
    behind = len(sources) - before - len(known)
    if before or behind:
        rows = F.pad(rows, (0, 0, before, behind) if dim == 2 else (before, behind), value=fill)
    return rows


# Resampling


@functools.lru_cache(maxsize=256)
def _coordinates(
    length: int, count: int, scale: float | None, mode: str, align_corners: bool | None, kind: torch.dtype,
    device: torch.device,
) -> tuple[float, ...]:  # fmt: skip
    """Where in the input each output of F.interpolate lies, along one dimension: its result for a ramp. The nearest
    input may be another one for another dtype or device, by the rounding of its index."""
    ramp = torch.arange(length, dtype=kind, device=device)[None, None, :, None]
    if scale is None:
        made = F.interpolate(ramp, size=(count, 1), mode=mode, align_corners=align_corners)
    else:
        made = F.interpolate(ramp, scale_factor=(scale, 1.0), mode=mode, align_corners=align_corners)
    return tuple(made.flatten().tolist())


@handles(F.interpolate)
def _interpolate(
    func: Any, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Any:  # fmt: skip
    """Output rows belong to the ranks that hold the rows of another map of that height, or the proportional ones."""
    _check("interpolate", input)
    options = {"mode": mode, "align_corners": align_corners, "antialias": antialias}
    lineage, shape = input.lineage, own_shape(input)
    if len(shape) != 4:
        given = {"size": size, "scale_factor": scale_factor, "recompute_scale_factor": recompute_scale_factor}
        return on_replicated(func, (input,), {**given, **options})
    scales: tuple[Any, Any] = (None, None)
    if size is None:
        factors = pair(scale_factor)
        counts = [math.floor(n * f) for n, f in zip(shape[2:], factors, strict=True)]
        if not recompute_scale_factor:
            scales = factors
    else:
        counts = [int(n) for n in pair(size)]
    if not input.is_sharded:
        if any(count not in known for count, known in zip(counts, lineage.known, strict=True)):
            given = {"size": size, "scale_factor": scale_factor, "recompute_scale_factor": recompute_scale_factor}
            return on_replicated(func, (input,), {**given, **options})
        if antialias or mode not in ("nearest", "nearest-exact", "bilinear"):
            if tuple(shape[2:]) != (1, 1):
                raise refusal(f"interpolate with mode={mode!r}, antialias={antialias}", [input])
            mode = "nearest"  # all modes repeat a single position
    elif antialias or mode not in ("nearest", "nearest-exact", "bilinear"):
        raise refusal(f"interpolate with mode={mode!r}, antialias={antialias}", [input])
    if mode != "bilinear":
        align_corners = None
    local, parts = part_of(input), []
    if mode == "bilinear":
        computed = torch.float64, torch.device("cpu")
    else:
        computed = torch.float64 if local.dtype == torch.float64 else torch.float32, local.device
    for axis, (count, scale) in enumerate(zip(counts, scales, strict=True)):
        length, index = shape[2 + axis], lineage.index(axis)
        held = input.parts[axis] if input.is_sharded else (length,)
        made = lineage.parts(axis, count, held) if input.is_sharded else lineage.known[axis][count]
        parts.append(made)
        if length == count and (scale is None or scale == 1):
            places: Sequence[float] = range(count)
        else:
            places = _coordinates(length, count, scale, mode, align_corners, *computed)
        sources = [_neighbours(places[slice(*own_range(made, i))], length) for i in range(len(made))]
        ranges = [(0, length)]
        if len(held) > 1:
            wanted = [_ranges([s for both in of_rank for s in both[:2]]) for of_rank in sources]
            local = fetch(local, 2 + axis, lineage.group(axis), held, wanted)
            ranges = wanted[index]
        local = _blended(local, 2 + axis, sources[index], ranges)
    return _result(input, local, parts)


def _neighbours(places: Sequence[float], length: int) -> list[tuple[int, int, float]]:
    """The two inputs that an output lies between, and the weight of the second."""
    found = []
    for place in places:
        low = min(math.floor(place), length - 1)
        found.append((low, min(low + 1, length - 1) if place > low else low, place - low))
    return found


def _blended(rows: Tensor, dim: int, sources: Sequence[tuple[int, int, float]], ranges: Sequence[Range]) -> Tensor:
    place = {index: at for at, index in enumerate(i for r in ranges for i in range(*r))}
    low, high, weights = [list(c) for c in zip(*sources, strict=True)] if sources else ([], [], [])
    if [place[i] for i in low] == list(range(rows.shape[dim])) and not any(weights):
        return rows

    def selected(indices: Sequence[int]) -> Tensor:
        return rows.index_select(dim, torch.tensor([place[i] for i in indices], dtype=torch.long, device=rows.device))

    first = selected(low)
    if not any(weights):
        return first
    shape = [1, 1, -1, 1] if dim == 2 else [1, 1, 1, -1]
    factor = torch.tensor(weights, dtype=accumulation_dtype(rows.dtype), device=rows.device).view(shape)
    return torch.lerp(first.to(factor.dtype), selected(high).to(factor.dtype), factor).to(rows.dtype)


# Poolings to a size that does not depend on that of the map


def _adaptive(
    name: str, func: Any, input: Any, output_size: Any, pooled: Callable[[SpatialMap, Sequence[int | None]], Tensor]
) -> Any:
    _check(name, input)
    if not input.is_sharded:
        return on_replicated(func, (input, output_size), {})
    sizes: list[int | None] = list(pair(output_size))
    lineage = input.lineage
    kept = [axis for axis in range(len(lineage.space.along)) if sizes[axis] is None]
    if len(kept) == len(lineage.space.along):
        if sizes[1] is None:
            return _result(input, part_of(input), input.parts)
        return _result(input, _local_adaptive(func, part_of(input), sizes[1]), (input.parts[0], (sizes[1],)))
    if kept:
        raise refusal(f"{name} of one of two sharded dimensions", [input])
    return input.replicated(pooled(input, sizes))


def _local_adaptive(func: Any, local: Tensor, width: int) -> Tensor:
    """Along the width alone."""
    height = local.shape[2]
    if height == 0:
        return _empty((*local.shape[:3], width), local)
    made: Tensor = func(local, (height, width))
    return made


def _cells(length: int, count: int) -> list[Range]:
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def _own_cells(input: SpatialMap, sizes: Sequence[int | None]) -> list[list[tuple[Range, int]]]:
    """For each axis and cell, this rank's rows in it and the number of all rows in it."""
    found = []
    for axis, count in enumerate(sizes):
        held = input.parts[axis]
        first, last = own_range(held, input.lineage.index(axis))
        cells = _cells(sum(held), sum(held) if count is None else count)
        own = []
        for start, stop in cells:
            low = min(max(start, first), last)
            own.append(((low - first, max(low, min(stop, last)) - first), stop - start))
        found.append(own)
    return found


@handles(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(func: Any, input: Any, output_size: Any) -> Any:
    return _adaptive("adaptive_avg_pool2d", F.adaptive_avg_pool2d, input, output_size, _cell_means)


def _cell_means(input: SpatialMap, sizes: Sequence[int | None]) -> Tensor:
    """Sums over this rank's positions in each cell, then over the ranks."""
    local = part_of(input)
    dtype = accumulation_dtype(local.dtype)
    rows, columns = _own_cells(input, sizes)
    sums = torch.stack([local[:, :, slice(*r)].sum(2, dtype=dtype) for r, _ in rows], 2)
    sums = torch.stack([sums[..., slice(*c)].sum(3) for c, _ in columns], 3)
    total = SumOverRanks.apply(sums, _OP, input.lineage.space.whole)
    counts = torch.tensor([[r * c for _, c in columns] for _, r in rows], dtype=dtype, device=local.device)
    mean: Tensor = (total / counts).to(local.dtype)
    return mean


@handles(F.adaptive_max_pool2d)
def _adaptive_max_pool2d(func: Any, input: Any, output_size: Any, return_indices: bool = False) -> Any:
    if return_indices:
        raise refusal("adaptive_max_pool2d with return_indices", maps_in(input))
    return _adaptive("adaptive_max_pool2d", F.adaptive_max_pool2d, input, output_size, _cell_maxima)


def _cell_maxima(input: SpatialMap, sizes: Sequence[int | None]) -> Tensor:
    local = part_of(input)
    rows, columns = _own_cells(input, sizes)
    nothing = local.new_full((*local.shape[:2], 1, 1), -math.inf)
    cells = []
    for r, _ in rows:
        for c, _ in columns:
            cell = local[:, :, slice(*r), slice(*c)].flatten(2)
            cells.append(torch.cat([cell, nothing[..., 0]], 2).max(2).values)
    own = torch.stack(cells, 2).unflatten(2, (len(rows), len(columns)))
    return _first_largest(own, input)


def _first_largest(own: Tensor, input: SpatialMap) -> Tensor:
    """The largest of the ranks' values; its gradient goes to the first rank that has it."""
    group = input.lineage.space.whole
    slots = [own if index == group.index else torch.zeros_like(own) for index in range(group.size)]
    largest: Tensor = SumOverRanks.apply(torch.stack(slots), _OP, group).max(0).values
    return largest


def _evenly_largest(own: Tensor, ties: Tensor, input: SpatialMap) -> Tensor:
    """The largest of the ranks' values; its gradient is shared by all positions that have it, of which a rank has so
    many ties."""
    group = input.lineage.space.whole
    dtype = accumulation_dtype(own.dtype) if own.is_floating_point() else own.dtype
    mine = torch.stack([own.to(dtype), ties.to(dtype)])
    slots = [mine if index == group.index else torch.zeros_like(mine) for index in range(group.size)]
    values, counts = SumOverRanks.apply(torch.stack(slots, 1), _OP, group)
    largest: Tensor = _Largest.apply(values, counts.detach())
    return largest.to(own.dtype)


class _Largest(torch.autograd.Function):
    """values, counts (R, *) -> the largest values (*), whose gradient goes to the ranks that have them by their
    counts."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Tensor) -> Tensor:
        largest = values.amax(0)
        counts = counts * (values == largest)
        ctx.save_for_backward(counts)
        return largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return gradient * (counts / counts.sum(0)), None


# Reductions


def _reduced_dims(func: str, input: SpatialMap, dim: Any) -> tuple[int, ...]:
    """The dimensions from the end, sorted; all for None."""
    count = len(own_shape(input))
    given = range(count) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    return tuple(sorted(d % count - count for d in given))


def _reduction(
    name: str, func: Any, input: SpatialMap, dim: Any, keepdim: bool, over_ranks: Callable[[Tensor], Tensor],
    **kwargs: Any,
) -> Any:  # fmt: skip
    if not input.is_sharded:
        return on_replicated(func, (input,) if dim is None else (input, dim, keepdim), kwargs)
    dims = _reduced_dims(name, input, dim)
    across = [d for d in input.dims if d in dims]
    lineage = input.lineage
    sharded = input.dims[: len(lineage.space.along)]
    if not across or not any(d in sharded for d in across):
        if across and not keepdim:
            raise refusal(name, [input], "over the width alone without keepdim it has no rule")
        kept = input.dims if keepdim else tuple(d + sum(r > d for r in dims) for d in input.dims)
        made = func(part_of(input), dims, keepdim, **kwargs)
        parts = (input.parts[0], (1,)) if across else input.parts
        return SpatialMap(made, lineage, parts, kept)
    if not all(d in dims for d in sharded):
        raise refusal(name, [input], "over one of its two sharded dimensions it has no rule")
    return input.replicated(over_ranks(func(part_of(input), dims, keepdim, **kwargs)))


@handles(torch.sum, torch.Tensor.sum)
def _sum(func: Any, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dim = dim if axis is None else axis
    group = input.lineage.space.whole
    return _reduction(
        "sum", torch.sum, input, dim, keepdim, lambda part: SumOverRanks.apply(part, _OP, group), dtype=dtype
    )


@handles(torch.mean, torch.Tensor.mean)
def _mean(func: Any, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dim = dim if axis is None else axis
    if not input.is_sharded:
        return on_replicated(torch.mean, (input,) if dim is None else (input, dim, keepdim), {"dtype": dtype})
    count = 1
    shape = own_shape(input)
    for d in _reduced_dims("mean", input, dim):
        count *= shape[d]
    wide = dtype or accumulation_dtype(input.local.dtype)
    total = _sum(torch.sum, input, dim, keepdim, dtype=wide)
    return (total / count).to(dtype or input.local.dtype)


@handles(torch.amax, torch.Tensor.amax)
def _amax(func: Any, input: Any, dim: Any = (), keepdim: bool = False) -> Any:
    def local(part: Tensor, dims: Sequence[int], keep: bool) -> Tensor:
        if part.numel() == 0:
            shape = [1 if d - part.dim() in dims else n for d, n in enumerate(part.shape)]
            made = part.sum() * 0 + part.new_full(shape, -math.inf)
            return made if keep else made.squeeze(tuple(dims))
        return torch.amax(part, tuple(dims), keep)

    if not input.is_sharded:
        return on_replicated(func, (input, dim, keepdim), {})

    def over_ranks(part: Tensor) -> Tensor:
        with torch.no_grad():
            whole, dims = part_of(input), _reduced_dims("amax", input, dim)
            ties = (whole == local(whole, dims, True)).sum(dims, keepdim)
        return _evenly_largest(part, ties, input)

    return _reduction("amax", local, input, dim, keepdim, over_ranks)


@handles(F.pixel_shuffle, torch.pixel_shuffle)
def _pixel_shuffle(func: Any, input: Any, upscale_factor: int) -> Any:
    _check("pixel_shuffle", input)
    if not input.is_sharded:
        return on_replicated(func, (input, upscale_factor), {})
    lineage, local, parts = input.lineage, part_of(input), []
    for axis in (0, 1):
        held = input.parts[axis]
        made = lineage.parts(axis, sum(held) * upscale_factor, held)
        if made != tuple(n * upscale_factor for n in held):
            raise refusal("pixel_shuffle to a height or width that is sharded otherwise", [input])
        parts.append(made)
    if local.numel() == 0:
        size = [n * upscale_factor for n in local.shape[2:]]
        return _result(input, _empty((local.shape[0], local.shape[1] // upscale_factor**2, *size), local), parts)
    return _result(input, F.pixel_shuffle(local, upscale_factor), parts)
