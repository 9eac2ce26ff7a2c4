"""The definitions of the ops in plain PyTorch: the oracle of the tests, and the fallback for devices without kernels.

They follow the papers' equations and store the attention map. float16 and bfloat16 are computed in float32 and rounded
once at the end. Every function with a softmax returns the output and the logsumexp of the energies.
"""

import torch
from torch import Tensor


def _upcast(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def position_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, key_padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fu et al., "Dual Attention Network for Scene Segmentation" (2019), equations 1 and 2, without gamma.

    query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T), True for padding
    -> output (B, C, *S), logsumexp (B, *S).
    """
    q, k, v = _upcast(query.flatten(2), key.flatten(2), value.flatten(2))
    spatial = query.shape[2:]
    padding = None if key_padding_mask is None else key_padding_mask.flatten(1)
    weights, logsumexp = position_weights(q, k, scale, padding)
    if padding is not None:
        v = v.masked_fill(padding.unsqueeze(1), 0)  # a NaN in padding would spread in spite of the weight 0
    output = v @ weights.transpose(1, 2)
    return output.unflatten(2, spatial).to(query.dtype), logsumexp.unflatten(1, spatial)


def position_weights(query: Tensor, key: Tensor, scale: float, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The attention map. query (B, E, N), key (B, E, M), padding (B, M), True for padding -> weights (B, N, M),
    logsumexp (B, N)."""
    if padding is None:
        energy = scale * (query.transpose(1, 2) @ key)
        return energy.softmax(2), energy.logsumexp(2)
    padding = padding.unsqueeze(1)  # (B, 1, M)
    only_padding = padding.all(2, keepdim=True)  # (B, 1, 1), where a softmax over -inf would be NaN
    energy = scale * (query.transpose(1, 2) @ key.masked_fill(padding, 0))  # a NaN in padding would spread
    energy = energy.masked_fill(padding & ~only_padding, -torch.inf)
    weights = energy.softmax(2).masked_fill(only_padding, 0)
    return weights, energy.logsumexp(2).masked_fill(only_padding.squeeze(2), -torch.inf)


def channel_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fu et al. (2019), equations 3 and 4, without beta; the authors' code has scale = -1: softmax(max - E).

    query (B, C, *S), key (B, K, *S), value (B, K, *T) -> output (B, C, *T), logsumexp (B, C).
    """
    q, k, v = _upcast(query.flatten(2), key.flatten(2), value.flatten(2))
    energy = scale * (q @ k.transpose(1, 2))  # (B, C, K)
    output = energy.softmax(2) @ v
    return output.unflatten(2, value.shape[2:]).to(query.dtype), energy.logsumexp(2)


def channel_self_attention(x: Tensor, scale: float, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with query = key = value = x, and, with gamma (B, C), gamma * attention + x.

    x (B, C, *S) -> output (B, C, *S), logsumexp (B, C).
    """
    if gamma is None:
        return channel_attention(x, x, x, scale)
    (upcast,) = _upcast(x)
    attended, logsumexp = channel_attention(upcast, upcast, upcast, scale)
    factors = gamma.to(upcast.dtype).reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    return (factors * attended + upcast).to(x.dtype), logsumexp


def criss_cross_affinity(query: Tensor, key: Tensor) -> Tensor:
    """Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2, Affinity.

    query, key (B, E, H, W) -> (B, H + W - 1, H, W): channels [0, W) the row, self included, then the column, self
    skipped: channel W + i is row i if that is above the query's row, else row i + 1.
    """
    q, k = _upcast(query, key)
    height = query.shape[2]
    row = torch.einsum("beyx,beyj->bjyx", q, k)
    column = torch.einsum("beyx,bejx->bjyx", q, k)  # (B, H, H, W), self included
    return torch.cat([row, _skip_self(column, height)], 1).to(query.dtype)


def criss_cross_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    """Huang et al. (2019), section 3.2, Aggregation. attention (B, H + W - 1, H, W), value (B, C, H, W) -> as value."""
    a, v = _upcast(attention, value)
    height, width = value.shape[2:]
    row = torch.einsum("bjyx,bcyj->bcyx", a[:, :width], v)
    column = torch.einsum("bjyx,bcjx->bcyx", _insert_self(a[:, width:], height), v)
    return (row + column).to(value.dtype)


def criss_cross_aggregation_transposed(weights: Tensor, attention: Tensor) -> Tensor:
    """Row vectors times the attention map, the transpose of :func:`criss_cross_aggregation`: from weights over queries
    to weights over keys. weights (B, P, H, W), attention (B, H + W - 1, H, W) -> as weights."""
    height, width = weights.shape[2:]
    row = torch.einsum("bjyx,bpyx->bpyj", attention[:, :width], weights)
    column = torch.einsum("bjyx,bpyx->bpjx", _insert_self(attention[:, width:], height), weights)
    return row + column


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Huang et al. (2019), section 3.2: affinity, softmax over row and column, aggregation; without gamma.

    query, key (B, E, H, W), value (B, C, H, W) -> output (B, C, H, W), logsumexp (B, H, W).
    """
    q, k, v = _upcast(query, key, value)
    energy = scale * criss_cross_affinity(q, k)
    return criss_cross_aggregation(energy.softmax(1), v).to(value.dtype), energy.logsumexp(1)


def _other_rows(height: int, device: torch.device) -> Tensor:
    """(H - 1, H): entry (i, y) is the i-th row other than y."""
    i = torch.arange(height - 1, device=device).unsqueeze(1)
    return i + (i >= torch.arange(height, device=device))


def _skip_self(column: Tensor, height: int) -> Tensor:
    """(B, H, H, W) over (key row, query row, x) -> (B, H - 1, H, W)."""
    index = _other_rows(height, column.device)[None, :, :, None].expand(column.shape[0], -1, -1, column.shape[3])
    return column.gather(1, index)


def _insert_self(column: Tensor, height: int) -> Tensor:
    """The inverse of `_skip_self`, with zero for self."""
    index = _other_rows(height, column.device)[None, :, :, None].expand(column.shape[0], -1, -1, column.shape[3])
    full = column.new_zeros(column.shape[0], height, height, column.shape[3])
    return full.scatter(1, index, column)
