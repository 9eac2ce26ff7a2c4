"""Rules of functions that are the same at each position: pointwise ones, those along channels, changes of layout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._agreement import in_step
from ._collectives import all_reduce
from .spatial_map import (
    HANDLERS,
    OWN_FUNCTIONS,
    SpatialMap,
    handles,
    mapped,
    maps_in,
    name_of,
    on_replicated,
    own_shape,
    part_of,
    refusal,
    run_on,
)
from .spatial_rows import fetch, own_range

_UNARY = """abs absolute acos acosh asin asinh atan atanh arctan ceil celu clamp clamp_max clamp_min clip cos cosh
deg2rad digamma elu erf erfc erfinv exp exp2 expm1 expit fix floor frac gelu hardshrink hardsigmoid hardswish hardtanh
isfinite isinf isnan isneginf isposinf leaky_relu lgamma log log10 log1p log2 logical_not logit logsigmoid mish
nan_to_num neg negative positive rad2deg reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc
sinh softplus softshrink softsign sqrt square tan tanh tanhshrink threshold trunc zeros_like ones_like empty_like
full_like zero fill bitwise_not"""
_BINARY = """add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor copysign div divide eq equal_ float_power
floor_divide fmax fmin fmod ge greater greater_equal gt hypot le lerp less less_equal logaddexp logical_and logical_or
logical_xor lt masked_fill maximum minimum mul multiply ne not_equal pow remainder rsub sub subtract true_divide where
xlogy copy"""
_SPECIAL = """abs add and eq floordiv ge gt iadd iand idiv ifloordiv imul invert ior ipow isub itruediv le lt mod mul ne
neg or pos pow radd rand rdiv rfloordiv rmod rmul ror rpow rsub rtruediv sub truediv xor rxor ixor imod div"""
_AS_IS = """contiguous clone detach to type double float half bfloat16 int long bool cpu cuda requires_grad_ type_as
detach_ to_dense"""
_OWN = """size dim ndimension numel nelement is_floating_point is_complex is_signed is_contiguous stride element_size
__hash__ __format__ __len__ get_device is_same_size storage_offset"""
_OWN_PROPERTIES = """shape ndim dtype device layout is_cuda is_cpu is_leaf is_sparse is_quantized is_meta
is_mps is_xpu is_nested is_mkldnn names itemsize grad_fn _backward_hooks output_nr is_mkldnn"""


def _named(names: str) -> list[Any]:
    """The functions of these names, in-place ones too, in torch, torch.nn.functional, torch.special and Tensor."""
    found = []
    for name in names.split():
        for candidate in (name, f"{name}_"):
            for place in (torch, F, torch._C._nn, torch.special, Tensor, torch._C.TensorBase):
                function = getattr(place, candidate, None)
                if callable(function):
                    found.append(function)
    return found


def _special(names: str) -> list[Any]:
    methods = [f"__{name}__" for name in names.split()]
    places = (Tensor, torch._C.TensorBase)
    return [getattr(place, method) for method in methods for place in places if hasattr(place, method)]


_IN_PLACE = {f"{name}_" for name in f"{_UNARY} {_BINARY}".split()} | {
    f"__{n}__" for n in _SPECIAL.split() if n[0] == "i"
}

OWN_FUNCTIONS.update(getattr(Tensor, name) for name in _OWN.split() if hasattr(Tensor, name))
OWN_FUNCTIONS.update(
    getattr(Tensor, name).__get__ for name in _OWN_PROPERTIES.split() if hasattr(getattr(Tensor, name, None), "__get__")
)
OWN_FUNCTIONS.add(torch.is_floating_point)
OWN_FUNCTIONS.add(torch.numel)


@handles(*_named(_UNARY), *_named(_BINARY), *_special(_SPECIAL))
def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    maps = maps_in(*args, kwargs)
    if name_of(func) == "where" and len(args) + len(kwargs) == 1:  # the indices of what is not 0
        return on_replicated(func, args, kwargs)
    sharded = [m for m in maps if m.is_sharded]
    if not sharded:
        return on_replicated(func, args, kwargs)
    like = max(sharded, key=lambda m: sum(m.parts[1]))  # not one with a width of 1, which is broadcast
    if "out" in kwargs or (name_of(func) in _IN_PLACE and args[0] is not like):
        raise refusal(name_of(func), maps, "it writes a part of another tensor, so it has no rule")
    aligned = [align(func, m, like) for m in maps]
    used = {id(m): a for m, a in zip(maps, aligned, strict=True)}
    dims = max((len(own_shape(t)) for t in _tensors(args, kwargs)), default=0)

    def of(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return used[id(argument)] if id(argument) in used else cut(func, argument, like, dims)

    args, kwargs = mapped(of, args), mapped(of, kwargs)
    return run_on([m for m in aligned if isinstance(m, SpatialMap)], like.with_local, func, args, kwargs)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda a: found.append(a) if isinstance(a, Tensor) else None, [*args, *kwargs.values()])
    return found


def align(func: Any, one: SpatialMap, like: SpatialMap) -> Any:
    """The map sharded as another one, with which it is to be combined; of a tensor that is the same on each rank, the
    part that this rank needs."""
    if not one.is_sharded:
        return cut(func, part_of(one), like, len(own_shape(like)))
    if one.dims != like.dims or one.lineage.space != like.lineage.space:
        raise refusal(name_of(func), [one, like], "they must have height and width in the same dimensions")
    if one.parts == like.parts:
        return one
    local, parts = part_of(one), list(one.parts)
    for axis in (0, 1):
        mine, its = one.parts[axis], like.parts[axis]
        if mine == its or (len(mine) == 1 and 1 in (mine[0], its[0]) and len(like.dims) == 2):  # a whole width of 1
            continue
        if sum(mine) != sum(its) or len(like.dims) != 2:
            raise refusal(name_of(func), [one, like], "they must have the same height and width")
        wanted = [[own_range(its, index)] for index in range(len(its))]
        local, parts[axis] = fetch(local, like.dims[axis], one.lineage.group(axis), mine, wanted), its
    return SpatialMap(local, one.lineage, (parts[0], parts[1]), one.dims)


def cut(func: Any, whole: Tensor, like: SpatialMap, dims: int) -> Tensor:
    """The part that this rank needs of a tensor that is the same on each rank: its rows, or all where it is broadcast.

    dims: of the result.
    """
    for axis, dim in enumerate(like.dims):
        if -dim > whole.dim() or whole.shape[dim] == 1:
            continue
        if len(like.dims) == 1:
            raise refusal(name_of(func), [like], "a tensor that differs between its flattened positions is not cut")
        of_axis = like.parts[axis]
        if whole.shape[dim] != sum(of_axis):
            raise refusal(
                name_of(func), [like], f"a tensor of shape {list(whole.shape)} has another height or width, and is not"
            )
        start, stop = own_range(of_axis, like.lineage.index(axis))
        whole = whole.narrow(dim, start, stop - start)
    return whole


@handles(*_named(_AS_IS), Tensor.requires_grad_)
def _as_is(func: Any, *args: Any, **kwargs: Any) -> Any:
    maps = maps_in(*args, kwargs)
    if not isinstance(args[0], SpatialMap):  # a whole tensor, as in `whole.to(map)`
        return func(*mapped(part_of, args), **mapped(part_of, kwargs))
    return run_on(maps, args[0].with_local, func, args, kwargs)


@handles(F.dropout)
def _dropout(func: Any, input: SpatialMap, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if input.is_sharded:
        return run_on([input], input.with_local, F.dropout, (input, p, training, inplace), {})
    return _drop(F.dropout, input, part_of(input).shape, p, training, inplace)


@handles(F.dropout2d)
def _dropout2d(func: Any, input: SpatialMap, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if input.is_sharded and (input.dims != (-2, -1) or len(own_shape(input)) != 4):
        raise refusal("dropout2d", [input])
    return _drop(F.dropout, input, (*part_of(input).shape[:2], 1, 1), p, training, inplace)


def _drop(func: Any, input: SpatialMap, shape: Sequence[int], p: float, training: bool, inplace: bool) -> SpatialMap:
    """Drops the same on each rank: the first one's draw."""
    if not training or p == 0:
        return input
    local = part_of(input)
    factors = func(torch.ones(shape, dtype=local.dtype, device=local.device), p, True)
    factors = _of_first_rank(factors, input)
    if inplace:
        local.mul_(factors)
        return input
    return input.with_local(local * factors)


def _of_first_rank(drawn: Tensor, like: SpatialMap) -> Tensor:
    group = like.lineage.space.whole
    with in_step("distributed.spatially_parallel", group):
        return all_reduce(
            "distributed.spatially_parallel", group, drawn if group.index == 0 else torch.zeros_like(drawn)
        )


@handles(F.prelu, torch.prelu, Tensor.prelu)
def _prelu(func: Any, input: SpatialMap, weight: Tensor) -> Any:
    if input.is_sharded and -input.dims[0] >= len(own_shape(input)) - 1:
        raise refusal("prelu", [input])
    return run_on([input], input.with_local, func, (input, weight), {})


# Along channels


def _dimension(map_: SpatialMap, dim: int, extra: int = 0) -> int:
    """From the end."""
    count = len(own_shape(map_)) + extra
    return dim if dim < 0 else dim - count


def _along(names: str, position: int, default: int | None, adds: bool = False) -> None:
    """Registers functions with an argument dim.

    Args:
        names: of the functions.
        position: of the argument.
        default: of it; None if it must be given.
        adds: whether the dimension is a new one; else it is kept or removed.
    """

    def rule(func: Any, *args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs.get("dim", kwargs.get("axis", default))
        maps = maps_in(*args, kwargs)
        sharded = [m for m in maps if m.is_sharded]
        if not sharded:
            return on_replicated(func, args, kwargs)
        like = sharded[0]
        if not isinstance(given, int) or isinstance(given, bool):
            raise refusal(name_of(func), sharded, "it is not along channels, so it has no rule")
        dim = _dimension(like, given, adds)
        if dim in like.dims and not adds:
            raise refusal(name_of(func), sharded, "it is along height or width, so it has no rule")
        aligned = {id(m): align(func, m, like) for m in sharded}

        def of(argument: Any) -> Any:
            if isinstance(argument, SpatialMap) and not argument.is_sharded:
                argument = part_of(argument)
            if id(argument) in aligned:
                return aligned[id(argument)]
            if not isinstance(argument, Tensor) or name_of(func) == "index_select":
                return argument
            return _spread(func, argument, like)

        args, kwargs = mapped(of, args), mapped(of, kwargs)
        kwargs = {k: dim if k in ("dim", "axis") else v for k, v in kwargs.items()}
        if len(args) > position:
            args = (*args[:position], dim, *args[position + 1 :])

        def wrapped(local: Tensor) -> SpatialMap:
            more = local.dim() - len(own_shape(like))
            before = [d <= dim if adds else d < dim for d in like.dims]  # what stands there has another place
            dims = tuple(d - more * b for d, b in zip(like.dims, before, strict=True))
            return SpatialMap(local, like.lineage, like.parts, dims)

        return run_on([], wrapped, func, args, kwargs)

    for name in names.split():
        for place in (torch, F, Tensor, torch.special, torch.linalg):
            function = getattr(place, name, None)
            if callable(function) and function not in HANDLERS:
                HANDLERS[function] = rule


def _spread(func: Any, whole: Tensor, like: SpatialMap) -> Tensor:
    """The part of a tensor that is joined with a map: its height and width are those of the map."""
    for axis, dim in enumerate(like.dims):
        if -dim > whole.dim() or whole.shape[dim] != own_shape(like)[dim]:
            raise refusal(
                name_of(func), [like], f"a tensor of shape {list(whole.shape)} has another height or width, and is not"
            )
        if len(like.dims) == 1:
            raise refusal(name_of(func), [like], "a tensor that differs between its flattened positions is not cut")
        start, stop = own_range(like.parts[axis], like.lineage.index(axis))
        whole = whole.narrow(dim, start, stop - start)
    return whole


_along("softmax log_softmax softmin cumsum cumprod logcumsumexp index_select squeeze", 1, None)
_along("argmax argmin amin max min prod all any logsumexp std var median count_nonzero", 1, None)
_along("cat concat concatenate unbind", 1, 0)
_along("glu", 1, -1)
_along("topk", 2, None)
_along("unsqueeze", 1, None, adds=True)
_along("stack", 1, 0, adds=True)


def _chunks(func: Any, tensor: SpatialMap, sizes: Any = None, dim: int = 0, **named: Any) -> Any:
    """named: chunks, split_size, or another name of the sizes."""
    if named:
        (sizes,) = named.values()
    dim = _dimension(tensor, dim)
    if tensor.is_sharded and dim in tensor.dims:
        raise refusal(name_of(func), [tensor], "it is along height or width, so it has no rule")
    return run_on([], tensor.with_local, func, (tensor, sizes, dim), {})


for _function in (torch.chunk, torch.split, torch.tensor_split, Tensor.chunk, Tensor.split, Tensor.tensor_split):
    HANDLERS[_function] = _chunks
del _function


@handles(torch.narrow, Tensor.narrow)
def _narrow(func: Any, input: SpatialMap, dim: int, start: int, length: int) -> Any:
    dim = _dimension(input, dim)
    if input.is_sharded and dim in input.dims:
        raise refusal("narrow", [input], "it is along height or width, so it has no rule")
    return run_on([], input.with_local, torch.narrow, (input, dim, start, length), {})


@handles(torch.select, Tensor.select)
def _select(func: Any, input: SpatialMap, dim: int, index: int) -> Any:
    dim = _dimension(input, dim)
    if input.is_sharded and dim in input.dims:
        raise refusal("select", [input], "it is along height or width, so it has no rule")
    dims = tuple(d + 1 if d < dim else d for d in input.dims)
    return run_on([], lambda local: input.with_local(local, dims), torch.select, (input, dim, index), {})


@handles(F.normalize)
def _normalize(
    func: Any, input: SpatialMap, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Any:
    dim = _dimension(input, dim)
    if out is not None:
        raise refusal("normalize with out", [input])
    if input.is_sharded and dim in input.dims:
        raise refusal("normalize", [input], "it is along height or width, so it has no rule")
    return run_on([], input.with_local, F.normalize, (input, p, dim, eps), {})


@handles(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def _norm(func: Any, input: SpatialMap, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if not input.is_sharded:
        return on_replicated(func, (input, p, dim, keepdim), kwargs)
    if not isinstance(dim, int) or _dimension(input, dim) in input.dims:
        raise refusal(name_of(func), [input], "it is not along channels, so it has no rule")
    dim = _dimension(input, dim)
    dims = input.dims if keepdim else tuple(d + 1 if d < dim else d for d in input.dims)
    return run_on([], lambda local: input.with_local(local, dims), func, (input, p, dim, keepdim), kwargs)


@handles(F.layer_norm)
def _layer_norm(func: Any, input: SpatialMap, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    if input.is_sharded and -max(input.dims) <= len(normalized_shape):
        raise refusal("layer_norm", [input], "it is over height or width, so it has no rule")
    return run_on([], input.with_local, F.layer_norm, (input, normalized_shape, *args), kwargs)


@handles(F.linear)
def _linear(func: Any, input: SpatialMap, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(input, SpatialMap) or maps_in(weight, bias):
        raise refusal("linear", maps_in(input, weight, bias), "its weight is one, so it has no rule")
    if input.is_sharded and -1 in input.dims:
        raise refusal("linear", [input], "it is over height or width, so it has no rule")
    return run_on([], input.with_local, F.linear, (input, weight, bias), {})


@handles(Tensor.__getitem__)
def _getitem(func: Any, input: Any, index: Any) -> Any:
    maps = maps_in(input, index)
    if not any(m.is_sharded for m in maps):
        return on_replicated(func, (input, index), {})
    entries = list(index) if isinstance(index, tuple) else [index]
    simple = isinstance(input, SpatialMap) and all(
        entry is None or entry is Ellipsis or isinstance(entry, slice) or type(entry) is int for entry in entries
    )
    if not simple:
        raise refusal("indexing", maps, "its index has no rule")
    shape = own_shape(input)
    given = sum(entry is not None and entry is not Ellipsis for entry in entries)
    rest: list[Any] = [slice(None)] * (len(shape) - given)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = rest
    else:
        entries += rest
    spatial = [len(shape) + dim for dim in input.dims]
    source = 0
    places: list[int | None] = []  # places in the result of the dimensions of the map
    for place, entry in enumerate(entries):
        if entry is None:
            places.append(None)
            continue
        if source in spatial:
            if type(entry) is int or entry.indices(shape[source]) != (0, shape[source], 1):
                raise refusal("indexing", [input], "it takes some of its rows or columns, so it has no rule")
            entries[place] = slice(None)
        if type(entry) is not int:
            places.append(source)
        source += 1
    dims = tuple(places.index(d) - len(places) for d in spatial)
    return run_on([], lambda local: input.with_local(local, dims), func, (input, tuple(entries)), {})


# Layout


def _permuted(input: SpatialMap, order: Sequence[int]) -> SpatialMap:
    count = len(own_shape(input))
    order = [d % count for d in order]
    dims = tuple(order.index(d % count) - count for d in input.dims)
    local: Tensor = part_of(input).permute(order)
    return input.with_local(local, dims)


@handles(torch.permute, Tensor.permute)
def _permute(func: Any, input: SpatialMap, *dims: Any, **kwargs: Any) -> SpatialMap:
    given = dims or (kwargs["dims"],)
    return _permuted(input, given if isinstance(given[0], int) else given[0])


@handles(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transpose(func: Any, input: SpatialMap, dim0: int = -2, dim1: int = -1) -> SpatialMap:
    order = list(range(len(own_shape(input))))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, order)


@handles(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis)
def _movedim(func: Any, input: SpatialMap, source: int, destination: int) -> SpatialMap:
    count = len(own_shape(input))
    order = [d for d in range(count) if d != source % count]
    order.insert(destination % count, source % count)
    return _permuted(input, order)


def _reshaped(func: Any, input: SpatialMap, shape: Sequence[int]) -> SpatialMap:
    """Other leading dimensions; height and width joined to one dimension, or apart again."""
    local, old = part_of(input), own_shape(input)
    with torch._C.DisableTorchFunctionSubclass():
        new = list(torch.empty(old, device="meta").reshape(*shape).shape)
    height, width = own_shape_of(input)
    dims: tuple[int, ...] | None = None
    last = -min(input.dims)
    trailing = list(old[len(old) - last :])
    if len(new) >= last and new[len(new) - last :] == trailing:  # from the height or width on as before
        dims, tail = input.dims, list(local.shape[local.dim() - last :])
    elif input.dims == (-2, -1) and new[-1] == height * width:
        dims, tail = (-1,), [local.shape[-2] * local.shape[-1]]
    elif input.dims == (-1,) and new[-2:] == [height, width]:
        dims, tail = (-2, -1), [of_axis[input.lineage.index(axis)] for axis, of_axis in enumerate(input.parts)]
    if dims is None:
        raise refusal(name_of(func), [input], f"a reshape to {new} mixes its positions with others, so it has no rule")
    leading = new[: len(new) - len(tail)]
    reshaped: Tensor = local.reshape(*leading, *tail)
    return input.with_local(reshaped, dims)


def own_shape_of(input: SpatialMap) -> tuple[int, int]:
    """Height and width of the whole map."""
    return sum(input.parts[0]), sum(input.parts[1])


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(func: Any, input: SpatialMap, *shape: Any, **kwargs: Any) -> Any:
    given = shape or (kwargs.get("shape", kwargs.get("dtype")),)
    if not input.is_sharded or isinstance(given[0], torch.dtype):
        return on_replicated(func, (input, *shape), kwargs)
    return _reshaped(func, input, given if not isinstance(given[0], (tuple, list)) else given[0])


@handles(torch.flatten, Tensor.flatten)
def _flatten(func: Any, input: SpatialMap, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not input.is_sharded:
        return on_replicated(func, (input, start_dim, end_dim), {})
    shape = list(own_shape(input))
    start, end = start_dim % len(shape), end_dim % len(shape)
    joined = 1
    for size in shape[start : end + 1]:
        joined *= size
    return _reshaped(func, input, [*shape[:start], joined, *shape[end + 1 :]])


@handles(torch.unflatten, Tensor.unflatten)
def _unflatten(func: Any, input: SpatialMap, dim: int, sizes: Sequence[int]) -> Any:
    if not input.is_sharded:
        return on_replicated(func, (input, dim, sizes), {})
    shape = list(own_shape(input))
    dim = dim % len(shape)
    return _reshaped(func, input, [*shape[:dim], *sizes, *shape[dim + 1 :]])


@handles(Tensor.expand, Tensor.expand_as)
def _expand(func: Any, input: Any, *sizes: Any) -> Any:
    """Of a map to its own height and width; of a tensor that is the same on each rank, with a height and a width of 1,
    to those of a map: the part of this rank."""
    if isinstance(sizes[0], Tensor):
        sizes = tuple(own_shape(sizes[0]))
    elif not isinstance(sizes[0], int):
        sizes = tuple(sizes[0])
    if not isinstance(input, SpatialMap):
        return input.expand(sizes)
    lineage, shape = input.lineage, own_shape(input)
    if input.is_sharded:
        if any(sizes[dim] not in (-1, shape[dim]) for dim in input.dims):
            raise refusal("expand", [input], f"to {list(sizes)} it has no rule")
        local = list(sizes)
        for dim in input.dims:
            local[dim] = -1
        return input.with_local(part_of(input).expand(local))
    if len(shape) == len(sizes) == 4 and tuple(shape[2:]) == (1, 1):
        height, width = sizes[2:]
        if height in lineage.known[0] and width in lineage.known[1]:
            parts = lineage.known[0][height], lineage.known[1][width]
            own = [of_axis[lineage.index(axis)] for axis, of_axis in enumerate(parts)]
            return SpatialMap(part_of(input).expand(*sizes[:2], *own), lineage, parts, (-2, -1))
    return on_replicated(func, (input, sizes), {})


@handles(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor)
def _new(func: Any, input: SpatialMap, *args: Any, **kwargs: Any) -> SpatialMap:
    return input.replicated(func(part_of(input), *args, **kwargs))


@handles(Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_)
def _drawn(func: Any, input: SpatialMap, *args: Any, **kwargs: Any) -> SpatialMap:
    """The same on each rank where the tensor is."""
    local = func(part_of(input), *args, **kwargs)
    if not input.is_sharded:
        local.copy_(_of_first_rank(local.detach(), input))
    return input


@handles(torch.rand_like, torch.randn_like, torch.bernoulli, Tensor.bernoulli)
def _drawn_like(func: Any, input: SpatialMap, *args: Any, **kwargs: Any) -> SpatialMap:
    local = func(part_of(input), *args, **kwargs)
    return input.with_local(local if input.is_sharded else _of_first_rank(local, input))


@handles(torch.broadcast_tensors)
def _broadcast(func: Any, *tensors: Any) -> Any:
    raise refusal("broadcast_tensors", maps_in(*tensors))
