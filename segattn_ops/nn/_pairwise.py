"""The two non-local modes without a softmax, evaluated exactly without an N x N attention map.

Both are sums over all pairs of positions, which factor:

* dot product, y_i = (1/M) sum_j (theta_i . phi_j) g_j, is associative: the E x C matrix sum_j phi_j g_j^T is formed
  once.
* concatenation, y_i = (1/M) sum_j max(0, a_i + b_j) g_j, with a_i = w_theta . theta_i and b_j = w_phi . phi_j: j
  contributes to i where b_j > -a_i. With the keys sorted by b these j are a prefix, and the sum is a_i times a prefix
  sum of g plus a prefix sum of b g: O(M log M + (N + M) C) instead of O(N M C).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Prefix sums are held in double precision for this many channels at a time: 32 x 32768 positions are 8 MiB per array.
_CHANNELS_AT_ONCE = 32


def dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """y_i = (1/M) sum_j (theta_i . phi_j) g_j.

    Args:
        theta: (B, E, N).
        phi: (B, E, M).
        g: (B, C, M).

    Returns:
        (B, C, N) in the dtype of ``g``. Sums over positions are kept in at least float32, where float16 would
        overflow.

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, equation 4 with C(x) = N.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    with torch.autocast(g.device.type, enabled=False):
        summary = g.to(dtype) @ phi.to(dtype).mT / g.shape[-1]  # (B, C, E)
        return (summary @ theta.to(dtype)).to(g.dtype)


def concatenation(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """y_i = (1/M) sum_j max(0, a_i + b_j) g_j.

    Args:
        a: (B, N), the query's part of the energy, w_theta . theta_i.
        b: (B, M), the key's part, w_phi . phi_j.
        g: (B, C, M).

    Returns:
        (B, C, N) in the dtype of ``g``. Once differentiable; at a_i + b_j = 0 the derivative is 0, as of ReLU.

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, equation 5 with C(x) = N.
    """
    y: Tensor = _Concatenation.apply(a, b, g)
    return y


def _sum_dtype(like: Tensor) -> torch.dtype:
    """float64, because a prefix sum over N terms loses log2(N) bits; float32 on mps, which has no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _prefix(terms: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """The descending order of ``terms`` (B, M), and for each of ``thresholds`` (B, N) the number of terms above
    -threshold."""
    ordered, order = terms.sort(dim=-1, descending=True, stable=True)
    return order, torch.searchsorted(-ordered, thresholds.contiguous(), right=False)


def _prefix_sums(values: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first ``counts`` (B, N) entries, in ``order`` (B, M), of values (B, C, M) and of weights (B, M) *
    values."""
    at = counts[:, None].expand(-1, values.shape[1], -1)
    ordered = values.gather(2, order[:, None].expand_as(values))
    plain = torch.nn.functional.pad(ordered.cumsum(2), (1, 0)).gather(2, at)
    ordered = ordered * weights.gather(1, order)[:, None]
    return plain, torch.nn.functional.pad(ordered.cumsum(2), (1, 0)).gather(2, at)


class _Concatenation(torch.autograd.Function):
    """Forward and backward are the same sort and prefix sums with queries and keys exchanged: no scatter, so no
    atomics."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, g)
        dtype = _sum_dtype(g)
        a, b = a.to(dtype), b.to(dtype)
        order, counts = _prefix(b, a)
        parts = []
        for part in g.split(_CHANNELS_AT_ONCE, dim=1):
            plain, weighted = _prefix_sums(part.to(dtype), b, order, counts)
            parts.append(((a[:, None] * plain + weighted) / g.shape[2]).to(g.dtype))
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_given, b_given, g = ctx.saved_tensors
        dtype = _sum_dtype(g)
        a, b = a_given.to(dtype), b_given.to(dtype)
        keys, keys_of_query = _prefix(b, a)
        queries, queries_of_key = _prefix(a, b)
        grad_a, grad_b, grad_g = torch.zeros_like(a), torch.zeros_like(b), []
        for part, grad in zip(
            g.split(_CHANNELS_AT_ONCE, dim=1), grad_output.split(_CHANNELS_AT_ONCE, dim=1), strict=True
        ):
            part, grad = part.to(dtype), grad.to(dtype)
            plain, _ = _prefix_sums(part, b, keys, keys_of_query)
            grad_a = grad_a + (grad * plain).sum(1)
            plain, weighted = _prefix_sums(grad, a, queries, queries_of_key)
            grad_b = grad_b + (part * plain).sum(1)
            grad_g.append(((b[:, None] * plain + weighted) / g.shape[2]).to(g.dtype))
        count = g.shape[2]
        return (grad_a / count).to(a_given.dtype), (grad_b / count).to(b_given.dtype), torch.cat(grad_g, dim=1)
