"""Rules of norms whose statistics are over positions: those of all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._check import accumulation_dtype
from ._agreement import check_call, in_step, number_call
from ._collectives import all_reduce, gather, spec_of
from ._functions import differentiable_once
from ._mesh import Group
from .spatial_map import SpatialMap, handles, maps_in, on_replicated, own_shape, part_of, refusal

_OP = "distributed.spatially_parallel"


class _Standardize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps), by statistics over dimensions and ranks; in the dtype of x, which is that of
    accumulation.

    Each rank sends mean and sum of squared deviations of its positions, which are merged in the order of the ranks: the
    same bits on each, and no difference of large squares. Backward, one sum over the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dims: Sequence[int], counts: Sequence[int], eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = tuple(dims)
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        if counts[group.index] == 0:
            mean, squares = x.new_zeros(shape), x.new_zeros(shape)
        else:
            mean = x.mean(dims, keepdim=True)
            squares = (x - mean).square_().sum(dims, keepdim=True)
        with in_step(_OP, group):
            parts = gather(_OP, group, [mean, squares], [[spec_of(mean), spec_of(squares)]] * group.size)
        mean, squares, so_far = torch.zeros_like(mean), torch.zeros_like(squares), 0
        for (its_mean, its_squares), count in zip(parts, counts, strict=True):
            if count == 0:
                continue
            so_far += count
            distance = its_mean - mean
            mean = mean + distance * (count / so_far)
            squares = squares + its_squares + distance.square() * (count * (so_far - count) / so_far)
        variance = squares / so_far
        inverse = (variance + eps).rsqrt()
        standard = (x - mean).mul_(inverse)
        ctx.save_for_backward(standard, inverse)
        ctx.dims, ctx.total, ctx.group, ctx.call = dims, so_far, group, number_call(group)
        ctx.mark_non_differentiable(mean, variance)
        return standard, mean, variance

    @staticmethod
    @differentiable_once(_OP)
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        standard, inverse = ctx.saved_tensors
        sums = torch.stack([gradient.sum(ctx.dims, keepdim=True), (gradient * standard).sum(ctx.dims, keepdim=True)])
        with in_step(_OP, ctx.group):
            check_call(_OP, ctx.group, ctx.call, gradient.device)
            sums = all_reduce(_OP, ctx.group, sums) / ctx.total
        return (gradient - sums[0] - standard * sums[1]).mul_(inverse), None, None, None, None


def _positions(input: SpatialMap) -> list[int]:
    """Of each rank's part, in the order of the mesh."""
    return [h * w for h in input.parts[0] for w in input.parts[1]]


def _check(name: str, input: Any, *others: Any) -> None:
    if not isinstance(input, SpatialMap) or maps_in(*others):
        raise refusal(name, maps_in(input, *others), "only its input may be one, so it has no rule")
    shape = own_shape(input)
    if input.is_sharded and (input.dims[0] != 2 - len(shape) or len(shape) > 4):
        raise refusal(name, [input], "its input must be (B, C, H, W), so it has no rule")


def _affine(standard: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """standard (B, C, *S), weight and bias (C)."""
    shape = (-1, *[1] * (standard.dim() - 2))
    if weight is None:
        result = standard.clone() if bias is None else standard + bias.to(standard.dtype).view(shape)
    elif bias is None:
        result = standard * weight.to(standard.dtype).view(shape)
    else:
        factor, offset = weight.to(standard.dtype).view(shape), bias.to(standard.dtype).view(shape)
        result = torch.addcmul(offset, standard, factor)
    return result.to(dtype)


@handles(F.batch_norm, torch.batch_norm)
def _batch_norm(
    func: Any, input: Any, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    _check("batch_norm", input, running_mean, running_var, weight, bias)
    if not input.is_sharded:
        return on_replicated(func, (input, running_mean, running_var, weight, bias, training, momentum, eps), {})
    local = part_of(input)
    dtype = accumulation_dtype(local.dtype)
    dims = [0, *range(2, local.dim())]
    if not training:
        assert running_mean is not None and running_var is not None
        shape = (-1, *[1] * (local.dim() - 2))
        if local.numel() > 0:
            return input.with_local(F.batch_norm(local, running_mean, running_var, weight, bias, False, momentum, eps))
        standard = (local.to(dtype) - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
        return input.with_local(_affine(standard, weight, bias, local.dtype))
    counts = [local.shape[0] * n for n in _positions(input)]
    total = sum(counts)
    if total <= 1:
        raise ValueError(
            f"batch_norm: must have more than 1 value per channel when training (got {list(own_shape(input))})"
        )
    standard, mean, variance = _Standardize.apply(local.to(dtype), dims, counts, eps, input.lineage.space.whole)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance.flatten() * (total / (total - 1))).to(running_var.dtype), momentum)
    return input.with_local(_affine(standard, weight, bias, local.dtype))


@handles(F.group_norm, torch.group_norm)
def _group_norm(
    func: Any, input: Any, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    _check("group_norm", input, weight, bias)
    if not input.is_sharded:
        return on_replicated(func, (input, num_groups, weight, bias, eps), {})
    local = part_of(input)
    channels = local.shape[1] // num_groups
    grouped = local.to(accumulation_dtype(local.dtype)).unflatten(1, (num_groups, channels))
    counts = [channels * n for n in _positions(input)]
    dims = list(range(2, grouped.dim()))
    standard, _, _ = _Standardize.apply(grouped, dims, counts, eps, input.lineage.space.whole)
    return input.with_local(_affine(standard.flatten(1, 2), weight, bias, local.dtype))


@handles(F.instance_norm, torch.instance_norm)
def _instance_norm(
    func: Any, input: Any, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise refusal("instance_norm with running statistics", maps_in(input))
    return _group_norm(F.group_norm, input, own_shape(input)[1], weight, bias, eps)
