"""The positions whose rows of an attention map are computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def flat_positions(positions: Tensor, spatial: Sequence[int], device: torch.device, op: str) -> Tensor:
    """(P, D) coordinates in D spatial dimensions -> (P,) indices into the flattened positions, on the device.

    Raises:
        TypeError: for positions that are neither a tensor nor nested sequences of numbers.
        ValueError: for positions of another shape or dtype, or outside the spatial size. A compiled graph raises a
            RuntimeError for those outside, which it finds when it runs.
    """
    if not isinstance(positions, Tensor):
        try:
            positions = torch.as_tensor(positions, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{op}: positions must be integers, as a tensor or as nested sequences (got {positions!r})"
            ) from error
    if positions.dim() != 2 or positions.shape[1] != len(spatial):
        raise ValueError(
            f"{op}: positions must have shape (P, {len(spatial)}), a coordinate for each of the spatial dimensions "
            f"(got shape {list(positions.shape)})"
        )
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"{op}: positions must be integers (got {positions.dtype})")
    positions = positions.to(device, torch.int64)
    # Sizes enter as they are: in a trace they are tensors, and a copy of their values would fix them.
    coordinates = positions.unbind(1)
    outside = torch.zeros_like(coordinates[0], dtype=torch.bool)
    index = torch.zeros_like(coordinates[0])
    for coordinate, size in zip(coordinates, spatial, strict=True):
        outside = outside | (coordinate < -size) | (coordinate >= size)
        index = index * size + torch.where(coordinate < 0, coordinate + size, coordinate)
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"{op}: positions must lie within the spatial size")
    elif outside.any():
        raise ValueError(
            f"{op}: positions must lie within the spatial size {list(spatial)} (got {positions[outside][0].tolist()})"
        )
    # Where the assertion is dropped (ONNX), a position outside is an index outside.
    return torch.where(outside, math.prod(spatial), index)
