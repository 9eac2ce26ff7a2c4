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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .._autocast import without_autocast
from .._transforms import has_tangent
from ..ops._register import fold_into_batch
from ._checks import is_pointwise

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
    if has_torch_function((theta, phi, g)):
        overridden: Tensor = handle_torch_function(dot_product, (theta, phi, g), theta, phi, g)
        return overridden
    dtype = torch.promote_types(g.dtype, torch.float32)
    with without_autocast(g.device.type):
        summary = g.to(dtype) @ phi.to(dtype).mT / g.shape[-1]  # (B, C, E)
        return (summary @ theta.to(dtype)).to(g.dtype)


def concatenation(projection: nn.Module, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """y_i = (1/M) sum_j f_ij g_j with f_ij = projection([theta_i, phi_j]).

    Args:
        projection: (B, 2 E, N, M) -> (B, 1, N, M): a 1 x 1 convolution and a ReLU, in a Sequential or in mmcv's
            ConvModule. The convolution runs on N + M + 1 columns, from which the energies of all pairs follow, and the
            ReLU on the largest energy of each query. Anything else is called on all pairs, as the published blocks do:
            O(N M E) memory.
        theta: (B, E, N).
        phi: (B, E, M).
        g: (B, C, M).

    Returns:
        (B, C, N) in the dtype of ``g``.

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, equation 5 with C(x) = N.
    """
    layers = _affine_and_relu(projection)
    if layers is None:
        queries = theta[:, :, :, None].expand(-1, -1, -1, phi.shape[2])
        keys = phi[:, :, None].expand(-1, -1, theta.shape[2], -1)
        energies = projection(torch.cat([queries, keys], dim=1))[:, 0]
        attended: Tensor = g @ (energies / g.shape[2]).to(g.dtype).mT
        return attended
    convolution, relu = layers
    # The convolution is affine: that of [theta_i, phi_j] is that of [theta_i, 0] plus that of [0, phi_j] minus that of
    # the last column, [0, 0].
    columns = torch.cat([F.pad(theta, (0, 0, 0, phi.shape[1])), F.pad(phi, (0, 1, theta.shape[1], 0))], dim=2)
    parts = in_sum_dtype(convolution(columns[..., None])[:, 0, :, 0])
    count = theta.shape[2]
    a, b = parts[:, :count], parts[:, count:-1] - parts[:, -1:]
    # Where the largest energy of a query is negative, all are: max(a_i, -max_j b_j) has the same sums as a_i.
    largest = b.amax(1, keepdim=True)
    return relu_sum(relu(a + largest) - largest, b, g)


def _affine_and_relu(projection: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The two layers if the projection is a 1 x 1 convolution followed by a ReLU."""
    if not isinstance(projection, nn.Sequential) and type(projection).__name__ != "ConvModule":
        return None
    layers = list(projection.children())
    if len(layers) != 2 or type(layers[1]) is not nn.ReLU:
        return None
    return (layers[0], layers[1]) if is_pointwise(layers[0]) else None


def in_sum_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype of prefix sums."""
    if has_torch_function((x,)):
        overridden: Tensor = handle_torch_function(in_sum_dtype, (x,), x)
        return overridden
    return x.to(_sum_dtype(x))


def relu_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """y_i = (1/M) sum_j max(0, a_i + b_j) g_j.

    Args:
        a: (B, N), the query's part of the energy.
        b: (B, M), the key's part.
        g: (B, C, M).

    Returns:
        (B, C, N) in the dtype of ``g``. At a_i + b_j = 0 the derivative is 0, as of ReLU.
    """
    if has_torch_function((a, b, g)):
        overridden: Tensor = handle_torch_function(relu_sum, (a, b, g), a, b, g)
        return overridden
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    # PyTorch's own ops, which a program can save with their derivatives, and which have tangents. The backward of a
    # Function is lost in torch.export with strict=True. Dynamo of torch 2.11 takes every compilation for an export.
    if tracing or torch.compiler.is_exporting() or has_tangent(a, b, g):
        return _relu_sum(a, b, g, g.shape[2])
    y: Tensor = _ReluSum.apply(a, b, g, g.shape[2])
    return y


def _sum_dtype(like: Tensor) -> torch.dtype:
    """float64, because a prefix sum over N terms loses log2(N) bits; float32 on mps, which has no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _prefix(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The descending order of b (B, M), and for each of a (B, N) the number of b above -a."""
    a, b = a.detach(), b.detach()
    if torch.compiler.is_exporting():
        return b.argsort(dim=1, descending=True), _count_above(-a, b)
    ordered, order = b.sort(dim=-1, descending=True, stable=True)
    return order, torch.searchsorted(-ordered, a.contiguous(), right=False)


def _count_above(a: Tensor, b: Tensor) -> Tensor:
    """For each of a (B, N) the number of b (B, M) above it, by operators of ONNX: it has neither searchsorted nor a
    stable sort. Both are sorted together. An a has the count of its group of equal numbers, which starts after all that
    are larger: a clamped query equals -max_j b_j."""
    count = a.shape[1]
    ordered, order = torch.cat([a, b], dim=1).sort(dim=1, descending=True)
    starts = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    group = starts.cumsum(1)  # from 1
    is_b = (order >= count).to(group.dtype)
    larger = is_b.cumsum(1) - is_b  # where a group starts; the other places write to an entry that none reads
    of_groups = torch.zeros_like(F.pad(group, (1, 0))).scatter(1, torch.where(starts, group, 0), larger)
    return of_groups.gather(1, group).gather(1, order.argsort(dim=1)[:, :count])


def _prefix_sums(values: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """Sums over the first ``counts`` (B, N) entries, in ``order`` (B, M), of values (B, C, M)."""
    ordered = values.gather(2, order[:, None].expand_as(values))
    at = counts[:, None].expand(-1, values.shape[1], -1)
    return F.pad(ordered.cumsum(2), (1, 0)).gather(2, at)


def _relu_sum(a: Tensor, b: Tensor, g: Tensor, divisor: int) -> Tensor:
    """y_ci = sum_j max(0, a_i + b_j) g_cj / divisor."""
    dtype = _sum_dtype(g)
    a, b = a.to(dtype), b.to(dtype)
    order, counts = _prefix(a, b)
    parts = []
    for part in g.split(_CHANNELS_AT_ONCE, dim=1):
        part = part.to(dtype)
        plain, weighted = _prefix_sums(part, order, counts), _prefix_sums(b[:, None] * part, order, counts)
        parts.append(((a[:, None] * plain + weighted) / divisor).to(g.dtype))
    return torch.cat(parts, dim=1)


def _active_sum(a: Tensor, b: Tensor, u: Tensor, divisor: int) -> Tensor:
    """y_ci = sum of u_cj over the j with a_i + b_j > 0, / divisor."""
    dtype = _sum_dtype(u)
    order, counts = _prefix(a.to(dtype), b.to(dtype))
    parts = [_prefix_sums(part.to(dtype), order, counts) / divisor for part in u.split(_CHANNELS_AT_ONCE, dim=1)]
    return torch.cat([part.to(u.dtype) for part in parts], dim=1)


def _active_products(a: Tensor, b: Tensor, g: Tensor, h: Tensor, divisor: int) -> Tensor:
    """y_i = sum of h_ci g_cj over all c and the j with a_i + b_j > 0, / divisor; in the dtype of a."""
    dtype = _sum_dtype(g)
    order, counts = _prefix(a.to(dtype), b.to(dtype))
    total = torch.zeros_like(a, dtype=dtype)
    for part, other in zip(g.split(_CHANNELS_AT_ONCE, dim=1), h.split(_CHANNELS_AT_ONCE, dim=1), strict=True):
        total = total + (other.to(dtype) * _prefix_sums(part.to(dtype), order, counts)).sum(1)
    return (total / divisor).to(a.dtype)


def _fold_mapped(function: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """The vmap rule of the functions below."""
    result = function.apply(*fold_into_batch(info.batch_size, in_dims, arguments))
    return result.unflatten(0, (info.batch_size, -1)), 0


class _ReluSum(torch.autograd.Function):
    """`_relu_sum`. The gradients are sums of the same kind, with queries and keys exchanged for those of keys: no
    scatter, so no atomics. The set of pairs with a_i + b_j > 0 is constant to autograd, so that the functions of this
    set are linear in their other arguments and differentiable any number of times."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, g: Tensor, divisor: int) -> Tensor:
        return _relu_sum(a, b, g, divisor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.divisor = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b, g = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_a = _ActiveProducts.apply(a, b, g, grad_output, ctx.divisor) if wanted[0] else None
        grad_b = _ActiveProducts.apply(b, a, grad_output, g, ctx.divisor) if wanted[1] else None
        grad_g = _ReluSum.apply(b, a, grad_output, ctx.divisor) if wanted[2] else None
        return grad_a, grad_b, grad_g, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return _fold_mapped(_ReluSum, info, in_dims, *arguments)


class _ActiveProducts(torch.autograd.Function):
    """`_active_products`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, g: Tensor, h: Tensor, divisor: int) -> Tensor:
        return _active_products(a, b, g, h, divisor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.divisor = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, g, h = ctx.saved_tensors
        weight = gradient[:, None]
        grad_g = _ActiveSum.apply(b, a, weight * h, ctx.divisor).to(g.dtype) if ctx.needs_input_grad[2] else None
        grad_h = (weight * _ActiveSum.apply(a, b, g, ctx.divisor)).to(h.dtype) if ctx.needs_input_grad[3] else None
        return None, None, grad_g, grad_h, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return _fold_mapped(_ActiveProducts, info, in_dims, *arguments)


class _ActiveSum(torch.autograd.Function):
    """`_active_sum`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, u: Tensor, divisor: int) -> Tensor:
        return _active_sum(a, b, u, divisor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _, ctx.divisor = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return None, None, _ActiveSum.apply(b, a, grad_output, ctx.divisor), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return _fold_mapped(_ActiveSum, info, in_dims, *arguments)
