"""Position attention: softmax attention over all positions of a feature map, without the N x N map."""

import math

import torch
from torch import Tensor

from .. import _backend, reference
from ._check import Arguments, accumulation_dtype, fail
from ._register import autocast, register_flops, register_once_differentiable, register_vmap


def position_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    r"""Attention over all positions: ``out_i = sum_j softmax_j(scale * q_i . k_j) v_j``, the attention of a Non-local
    block, of DANet's position attention module and, with pooled keys and values, of ANN and DRANet.

    The map of N x M weights is never stored: memory beyond the result is O(N + M), forward and backward. Only 16-bit
    inputs that want a gradient keep a second map like the result, what rounding takes from it, for the backward pass.

    Args:
        query: (B, E, *S), float16, bfloat16, float32 or float64. Any strides; contiguous is fastest.
        key: (B, E, *T), at least one position. T may differ from S, in the number of dimensions too.
        value: (B, C, *T).
        scale: multiplies the energies; DANet and CCNet have 1, scaled dot-product attention E ** -0.5. Not
            differentiable.

    Returns:
        (B, C, *S), in the inputs' dtype. Accumulated in float32, float64 for float64.

    Raises:
        RuntimeError: for mismatched shapes, dtypes or devices, and for a scale that is not finite.

    Source: Wang et al., "Non-local Neural Networks" (2018), equation 1; Fu et al., "Dual Attention Network for Scene
    Segmentation" (2019), equations 1 and 2. The logsumexp that the backward pass needs is the second result of the
    operator ``torch.ops.segattn.position_attention``.
    """
    query, key, value = autocast(query, key, value)
    operators = _backend.operators(query.device)
    if operators is None:
        _check(query, key, value, scale)
        return _backend.call_reference(reference.position_attention, query, key, value, scale)[0]
    return operators.position_attention(query, key, value, scale, _wants_gradient(query, key, value))[0]


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def position_attention_map(query: Tensor, key: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
    """Chosen rows of the attention map, for looking at what a position attends to.

    Args:
        query: (B, E, *S).
        key: (B, E, *T).
        positions: (P, number of dimensions of S), integer coordinates, (y, x) for an image; negative ones count
            from the end.
        scale: as in :func:`position_attention`.

    Returns:
        (B, P, *T), in the dtype of accumulation; every row sums to 1.

    Raises:
        RuntimeError: as :func:`position_attention`.
        ValueError: for positions of another shape or dtype, or outside the map.
    """
    _check(query, key, key, scale, "position_attention_map")
    index = flat_positions(positions, query.shape[2:], "position_attention_map")
    dtype = accumulation_dtype(query.dtype)
    rows = query.flatten(2)[:, :, index.to(query.device)].to(dtype)  # (B, E, P)
    energy = scale * (rows.transpose(1, 2) @ key.flatten(2).to(dtype))
    return energy.softmax(2).unflatten(2, key.shape[2:])


def flat_positions(positions: Tensor, spatial: torch.Size, op: str) -> Tensor:
    """(P, D) coordinates in a map of D spatial sizes -> (P,) indices into the flattened map."""
    positions = torch.as_tensor(positions)
    if positions.dim() != 2 or positions.shape[1] != len(spatial):
        raise ValueError(
            f"{op}: positions must have shape (P, {len(spatial)}), a coordinate for each of the spatial dimensions "
            f"(got shape {list(positions.shape)})"
        )
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"{op}: positions must be integers (got {positions.dtype})")
    sizes = torch.tensor(spatial, device=positions.device)
    outside = ((positions < -sizes) | (positions >= sizes)).any(1)
    if outside.any():
        raise ValueError(
            f"{op}: positions must lie within the spatial size {list(spatial)} (got {positions[outside][0].tolist()})"
        )
    strides = torch.tensor([math.prod(spatial[d + 1 :]) for d in range(len(spatial))], device=positions.device)
    return (positions.remainder(sizes) * strides).sum(1)


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float, op: str = "position_attention") -> None:
    arguments = Arguments(op, query=query, key=key, value=value)
    arguments.dtype("query")
    for name in ("key", "value"):
        arguments.like(name, "query")
    for name in ("query", "key", "value"):
        arguments.feature_map(name)
    for name in ("query", "value"):
        arguments.has_channels(name)
    for name in ("key", "value"):
        arguments.batch(name, "query")
    arguments.channels("key", "query")
    arguments.spatial("value", "key")
    arguments.has_positions("key")
    arguments.scale(scale)


def _fake(query, key, value, scale, with_low=False) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, scale)
    batch, spatial = query.shape[0], query.shape[2:]
    output = query.new_empty((batch, value.shape[1], *spatial))
    logsumexp = query.new_empty((batch, *spatial), dtype=accumulation_dtype(query.dtype))
    low_channels = value.shape[1] if with_low and query.dtype.itemsize == 2 else 0
    return output, logsumexp, query.new_empty((batch, low_channels, *spatial))


def _fake_backward(grad_output, query, key, value, output, logsumexp, scale, output_low=None):
    op = "position_attention_backward"
    _check(query, key, value, scale, op)
    if grad_output.shape != output.shape:
        fail(op, f"grad_output must have shape {list(output.shape)} like output (got {list(grad_output.shape)})")
    if output_low is not None:
        Arguments(op, output_low=output_low, query=query).like("output_low", "query")
        if output_low.shape != output.shape:
            fail(op, f"output_low must have shape {list(output.shape)} like output (got {list(output_low.shape)})")
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, ctx.scale, _ = inputs
    output, logsumexp, output_low = output
    ctx.save_for_backward(query, key, value, output, logsumexp, output_low if output_low.shape[1] > 0 else None)
    ctx.mark_non_differentiable(logsumexp, output_low)
    ctx.set_materialize_grads(False)  # else the backward gets a map of zeros for output_low


def _flops(query, key, value) -> int:
    return 2 * query[0] * math.prod(query[2:]) * math.prod(key[2:]) * (query[1] + value[1])


def _flops_backward(grad_output, query, key, value, output, logsumexp, output_low=None) -> int:
    """With the energies computed again: three products over E, two over C."""
    return 2 * query[0] * math.prod(query[2:]) * math.prod(key[2:]) * (3 * query[1] + 2 * value[1])


def register(namespace: str) -> None:
    """Registers the Python side of the family's operators in `namespace`."""
    operators = getattr(torch.ops, namespace)

    def backward(ctx, grad_output, grad_logsumexp, grad_output_low):
        if grad_output is None:  # gradients that are not materialised may be missing
            return (None,) * 5
        *saved, output_low = ctx.saved_tensors
        return *operators.position_attention_backward(grad_output, *saved, ctx.scale, output_low), None, None

    name = f"{namespace}::position_attention"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    register_once_differentiable(f"{name}_backward")
    # Under vmap no tensor says that it wants a gradient; those that the rule unwraps do.
    register_vmap(name, lambda q, k, v, scale, with_low=False: (q, k, v, scale, with_low or _wants_gradient(q, k, v)))
    register_vmap(f"{name}_backward")
    register_flops(operators.position_attention, _flops)
    register_flops(operators.position_attention_backward, _flops_backward)
