"""Attention as the papers' code computes it, with the attention map as a tensor: what the fused ops are compared with
in errors (self-test) and memory. Unlike :mod:`segattn_ops.reference` it stays in the inputs' dtype, and returns the
output alone."""

import torch
from torch import Tensor

from .ops._check import Argument
from .ops.channel import channel_factors
from .reference import _insert_self, _skip_self


def _softmax(energy: Tensor, dim: int) -> Tensor:
    """CUDA's autocast computes softmax in float32, and its kernel converts without a copy. That form exists for fake
    tensors on the CPU, on which memory is counted, and not for real ones."""
    if torch.is_autocast_enabled(energy.device.type) and energy.dtype in (torch.float16, torch.bfloat16):
        return torch._softmax(energy, dim, True)
    return energy.softmax(dim)


def position_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """DANet's, official code: two batched products around a softmax. Shapes as
    :func:`segattn_ops.position_attention`."""
    energy = torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2))
    attention = _softmax(energy if scale == 1 else scale * energy, -1)
    output: Tensor = torch.bmm(value.flatten(2), attention.transpose(1, 2)).unflatten(2, query.shape[2:])
    return output


def channel_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = -1.0) -> Tensor:
    """Shapes as :func:`segattn_ops.channel_attention`."""
    energy = torch.bmm(query.flatten(2), key.flatten(2).transpose(1, 2))
    output: Tensor = torch.bmm(_softmax(scale * energy, -1), value.flatten(2)).unflatten(2, value.shape[2:])
    return output


def residual_channel_attention(input: Tensor, gamma: Tensor | float, scale: float = -1.0) -> Tensor:
    """Shapes as :func:`segattn_ops.residual_channel_attention`."""
    factors = channel_factors("residual_channel_attention", gamma, Argument("input", input), input.shape[1])
    factors = factors.reshape(*factors.shape, *[1] * (input.dim() - 2)).to(input.dtype)
    return factors * channel_attention(input, input, input, scale) + input


def criss_cross_affinity(query: Tensor, key: Tensor) -> Tensor:
    """Shapes as :func:`segattn_ops.criss_cross_affinity`."""
    row = torch.einsum("beyx,beyj->bjyx", query, key)
    column = torch.einsum("beyx,bejx->bjyx", query, key)
    others = _skip_self(column.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.cat([row, others], 1)


def criss_cross_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    """Shapes as :func:`segattn_ops.criss_cross_aggregation`."""
    width = value.shape[3]
    column = _insert_self(attention[:, width:].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    over_rows = torch.einsum("bjyx,bcyj->bcyx", attention[:, :width], value)
    return over_rows + torch.einsum("bjyx,bcjx->bcyx", column, value)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """In einsums, as mmcv's: one softmax over column and row, itself masked in the column. Shapes as
    :func:`segattn_ops.criss_cross_attention`."""
    height = query.shape[2]
    column = torch.einsum("bchw,bciw->bhwi", query, key)
    itself = torch.eye(height, dtype=torch.bool, device=query.device).view(1, height, 1, height)
    row = torch.einsum("bchw,bchj->bhwj", query, key)
    energy = torch.cat([column.masked_fill(itself, float("-inf")), row], dim=-1)
    attention = _softmax(energy if scale == 1 else scale * energy, -1)
    output = torch.einsum("bciw,bhwi->bchw", value, attention[..., :height])
    return output + torch.einsum("bchj,bhwj->bchw", value, attention[..., height:])
