"""The definitions of the ops in plain PyTorch: the oracle of the tests, and the fallback for devices without kernels.

They follow the papers' equations and store the attention map. float16 and bfloat16 are computed in float32 and rounded
once at the end. Every function with a softmax returns the output and the logsumexp of the energies.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def position_attention_partial(
    query: Tensor, key: Tensor, value: Tensor, scale: float, key_padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Position attention over a part of the keys, perhaps none, for merging with that over others.

    query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T), True for padding
    -> output (B, C, *S), logsumexp (B, *S), its rounding error (B, *S), in the dtype of accumulation.
    """
    q, k, v = _upcast(query.flatten(2), key.flatten(2), value.flatten(2))
    padding = None if key_padding_mask is None else key_padding_mask.flatten(1).unsqueeze(1)  # (B, 1, M)
    if padding is not None:
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    energy = scale * (q.transpose(1, 2) @ k)
    if padding is not None:
        energy = energy.masked_fill(padding, -torch.inf)
    weights, logsumexp, low = partial_softmax(energy)
    spatial = query.shape[2:]
    return (
        (v @ weights.transpose(1, 2)).unflatten(2, spatial),
        logsumexp.unflatten(1, spatial),
        low.unflatten(1, spatial),
    )


def position_attention_partial_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients of position attention that comes from these keys: grad_output (B, C, *S), logsumexp,
    its rounding error and delta (B, *S) over all keys -> gradients of query, key and value, in the dtype of
    accumulation."""
    q, k, v, g = _upcast(query.flatten(2), key.flatten(2), value.flatten(2), grad_output.flatten(2))
    padding = None if key_padding_mask is None else key_padding_mask.flatten(1).unsqueeze(1)  # (B, 1, M)
    if padding is not None:
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    lse, low, d = (t.flatten(1) for t in (logsumexp, logsumexp_low, delta))
    gradients = _partial_gradients(g, q, k, v, lse, low, d, scale, padding)
    return tuple(g.unflatten(2, t.shape[2:]) for g, t in zip(gradients, (query, key, value), strict=True))


def _partial_gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_output (..., C, N), query (..., E, N), key (..., E, M), value (..., C, M), statistics (..., N), excluded
    (..., N, M) or broadcast to it."""
    energy = scale * (query.transpose(-1, -2) @ key)
    weights = ((energy - logsumexp.unsqueeze(-1)) - logsumexp_low.unsqueeze(-1)).exp()
    without_keys = (logsumexp == -torch.inf).unsqueeze(-1)
    weights = weights.masked_fill(without_keys if excluded is None else without_keys | excluded, 0)
    grad_energy = scale * weights * (grad_output.transpose(-1, -2) @ value - delta.unsqueeze(-1))
    return key @ grad_energy.transpose(-1, -2), query @ grad_energy, grad_output @ weights


def partial_softmax(energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over the last dimension, its logsumexp, and the rounding error of that. Without entries, or where all
    are -inf, the weights are 0, the logsumexp is -inf and its rounding error 0."""
    if energy.shape[-1] == 0:
        none = energy.sum(-1)
        return energy, none - torch.inf, none
    maximum = energy.amax(-1, keepdim=True)
    shift = maximum.masked_fill(maximum == -torch.inf, 0).detach()
    exponentials = (energy - shift).exp()
    total = exponentials.sum(-1, keepdim=True)
    is_empty = total == 0
    weights = exponentials / total.masked_fill(is_empty, 1)
    log = total.masked_fill(is_empty, 1).log().squeeze(-1)
    shift = shift.squeeze(-1)
    logsumexp = (shift + log).masked_fill(is_empty.squeeze(-1), -torch.inf)
    low = ((shift - logsumexp) + log).masked_fill(~logsumexp.isfinite(), 0).detach()
    return weights, logsumexp, low


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


def channel_energy(query: Tensor, key: Tensor | None = None) -> Tensor:
    """The energies of channel attention without their scale, in the dtype of accumulation: query (B, C, *S), key
    (B, K, *S), query if None -> (B, C, K)."""
    q, k = _upcast(query.flatten(2), (query if key is None else key).flatten(2))
    return q @ k.transpose(1, 2)


def channel_apply(energy: Tensor, value: Tensor, scale: float, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The second half of channel attention: energy (B, C, K), value (B, K, *T), gamma (B, C), for K = C
    -> output (B, C, *T), logsumexp (B, C)."""
    (v,) = _upcast(value.flatten(2))
    scaled = scale * energy
    output = scaled.softmax(2) @ v
    if gamma is not None:
        output = gamma.unsqueeze(2) * output + v
    return output.unflatten(2, value.shape[2:]).to(value.dtype), scaled.logsumexp(2)


def criss_cross_affinity(query: Tensor, key: Tensor) -> Tensor:
    """Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2, Affinity.

    query, key (B, E, H, W) -> (B, H + W - 1, H, W): channels [0, W) the row, self included, then the column, self
    skipped: channel W + i is row i if that is above the query's row, else row i + 1.
    """
    row, column = _products(*_upcast(query, key))
    return torch.cat([row, _skip_self(column)], 3).permute(0, 3, 1, 2).to(query.dtype)


def criss_cross_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    """Huang et al. (2019), section 3.2, Aggregation. attention (B, H + W - 1, H, W), value (B, C, H, W) -> as value."""
    a, v = _upcast(attention, value)
    return _weighted_sums(*_rows_and_columns(a), v).to(value.dtype)


def criss_cross_aggregation_transposed(weights: Tensor, attention: Tensor) -> Tensor:
    """Row vectors times the attention map, the transpose of :func:`criss_cross_aggregation`: from weights over queries
    to weights over keys. weights (B, P, H, W), attention (B, H + W - 1, H, W) -> as weights."""
    row, column = _rows_and_columns(attention)
    over_rows = weights.permute(0, 2, 1, 3) @ row  # (B, H, P, W)
    over_columns = weights.permute(0, 3, 1, 2) @ column.transpose(1, 2)  # (B, W, P, H)
    return over_rows.permute(0, 2, 1, 3) + over_columns.permute(0, 2, 3, 1)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Huang et al. (2019), section 3.2: affinity, softmax over row and column, aggregation; without gamma. As in the
    authors' PyTorch version, the column keeps an entry for the position itself, of energy -inf.

    query, key (B, E, H, W), value (B, C, H, W) -> output (B, C, H, W), logsumexp (B, H, W).
    """
    q, k, v = _upcast(query, key, value)
    height, width = value.shape[2:]
    row, column = _products(q, k)
    column = (scale * column).masked_fill(_is_self(height, q.device), float("-inf"))
    energy = torch.cat([scale * row, column], 3)  # (B, H, W, W + H)
    weights = energy.softmax(3)
    return _weighted_sums(weights[..., :width], weights[..., width:], v).to(value.dtype), energy.logsumexp(3)


def criss_cross_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The part of criss-cross attention over the row, self included, for merging with :func:`criss_cross_columns`.

    query, key (B, E, H, W), value (B, C, H, W) -> output (B, C, H, W), logsumexp (B, H, W), its rounding error, in the
    dtype of accumulation.
    """
    q, k, v = (t.permute(0, 2, 1, 3) for t in _upcast(query, key, value))  # (B, H, channels, W)
    weights, logsumexp, low = partial_softmax(scale * (q.transpose(2, 3) @ k))
    return (v @ weights.transpose(2, 3)).permute(0, 2, 1, 3), logsumexp, low


def criss_cross_columns(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The part over the column, self left out: without any key if H = 1. Shapes as of :func:`criss_cross_rows`."""
    q, k, v = (t.permute(0, 3, 1, 2) for t in _upcast(query, key, value))  # (B, W, channels, H)
    is_self = torch.eye(q.shape[3], dtype=torch.bool, device=q.device)
    weights, logsumexp, low = partial_softmax((scale * (q.transpose(2, 3) @ k)).masked_fill(is_self, -torch.inf))
    return (v @ weights.transpose(2, 3)).permute(0, 2, 3, 1), logsumexp.transpose(1, 2), low.transpose(1, 2)


def criss_cross_rows_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients that comes from the rows, in the dtype of accumulation: grad_output (B, C, H, W),
    logsumexp, its rounding error and delta (B, H, W) over row and column."""
    g, q, k, v = (t.transpose(1, 2) for t in _upcast(grad_output, query, key, value))  # (B, H, channels, W)
    gradients = _partial_gradients(g, q, k, v, logsumexp, logsumexp_low, delta, scale, None)
    return tuple(t.transpose(1, 2) for t in gradients)  # type: ignore[return-value]


def criss_cross_columns_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part that comes from the columns, self left out. Shapes as of :func:`criss_cross_rows_backward`."""
    g, q, k, v = (t.permute(0, 3, 1, 2) for t in _upcast(grad_output, query, key, value))  # (B, W, channels, H)
    is_self = torch.eye(q.shape[3], dtype=torch.bool, device=q.device)
    lse, low, d = (t.transpose(1, 2) for t in (logsumexp, logsumexp_low, delta))
    gradients = _partial_gradients(g, q, k, v, lse, low, d, scale, is_self)
    return tuple(t.permute(0, 2, 3, 1) for t in gradients)  # type: ignore[return-value]


def _products(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """query . key of each position with its row, (B, H, W, W), and with its column, (B, H, W, H), self included."""
    row = query.permute(0, 2, 3, 1) @ key.permute(0, 2, 1, 3)
    column = query.permute(0, 3, 2, 1) @ key.permute(0, 3, 1, 2)  # (B, W, H, H)
    return row, column.transpose(1, 2)


def _weighted_sums(row: Tensor, column: Tensor, value: Tensor) -> Tensor:
    """value (B, C, H, W) weighted by (B, H, W, W) over the rows and by (B, H, W, H) over the columns."""
    over_rows = row @ value.permute(0, 2, 3, 1)  # (B, H, W, C)
    over_columns = column.transpose(1, 2) @ value.permute(0, 3, 2, 1)  # (B, W, H, C)
    return (over_rows + over_columns.transpose(1, 2)).permute(0, 3, 1, 2)


def _rows_and_columns(attention: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H + W - 1, H, W) -> (B, H, W, W) and (B, H, W, H), with zero for self in the column."""
    width = attention.shape[3]
    weights = attention.permute(0, 2, 3, 1)
    return weights[..., :width], _insert_self(weights[..., width:])


def _is_self(height: int, device: torch.device) -> Tensor:
    """(H, 1, H) over (query row, x, key row)."""
    rows = torch.arange(height, device=device)
    return (rows[:, None] == rows).unsqueeze(1)


def _is_above(height: int, keys: int, device: torch.device) -> Tensor:
    """Whether a key's row, one of the first `keys`, is above the query's: (H, 1, keys)."""
    rows = torch.arange(height, device=device)
    return (rows[:keys] < rows[:, None]).unsqueeze(1)


def _skip_self(column: Tensor) -> Tensor:
    """(B, H, W, H) over (query row, x, key row) -> (B, H, W, H - 1)."""
    height = column.shape[3]
    return torch.where(_is_above(height, height - 1, column.device), column[..., :-1], column[..., 1:])


def _insert_self(column: Tensor) -> Tensor:
    """The inverse of `_skip_self`, with zero for self."""
    height, device = column.shape[1], column.device
    full = torch.where(_is_above(height, height, device), F.pad(column, (0, 1)), F.pad(column, (1, 0)))
    return full.masked_fill(_is_self(height, device), 0)
