"""The positions whose rows of an attention map are computed."""

import math

import torch
from torch import Tensor


def flat_positions(positions: Tensor, spatial: torch.Size, op: str) -> Tensor:
    """(P, D) coordinates in D spatial dimensions -> (P,) indices into the flattened positions.

    Raises:
        ValueError: for positions of another shape or dtype, or outside the spatial size. A compiled graph raises a
            RuntimeError for those outside, which it finds when it runs.
    """
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
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"{op}: positions must lie within the spatial size")
    elif outside.any():
        raise ValueError(
            f"{op}: positions must lie within the spatial size {list(spatial)} (got {positions[outside][0].tolist()})"
        )
    strides = torch.tensor([math.prod(spatial[d + 1 :]) for d in range(len(spatial))], device=positions.device)
    index = (torch.where(positions < 0, positions + sizes, positions) * strides).sum(1)
    # Where the assertion is dropped (ONNX), a position outside is an index outside.
    return torch.where(outside, math.prod(spatial), index)
