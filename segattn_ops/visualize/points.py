"""Points of an image, in fractions of its size or in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Points = Sequence[tuple[float, ...]] | Tensor
UNITS = ("fractions", "pixels")
_AXES = {1: "(x,)", 2: "(y, x)", 3: "(t, y, x)"}


def fractions(
    points: Points, dimensions: int | None = None, units: str = "fractions", size: Sequence[int] | None = None
) -> Tensor:
    """(P, D) float64 on the CPU, D = ``dimensions`` if that is given. Raises as :func:`grid_positions`.

    Args:
        points: in ``units``.
        dimensions: that each point must have.
        units: "fractions" of the image, or "pixels": the fractions are then those of the pixels' centres.
        size: of the image whose pixels are counted, height and width; with "pixels" alone.
    """
    check_units(units, size)
    values = _numbers(points, dimensions if size is None else len(size))
    if units == "pixels":
        assert size is not None  # checked above
        return _from_pixels(values, size)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            "visualize: points must be fractions of the image in [0, 1], or pixels with units='pixels' "
            f"(got {values.tolist()})"
        )
    return values


def check_units(units: Any, size: Any) -> None:
    """Raises ValueError unless ``units`` is known and ``size`` is given with "pixels" alone."""
    if units not in UNITS:
        raise ValueError(f"visualize: units must be 'fractions' or 'pixels' (got {units!r})")
    if units == "fractions":
        if size is not None:
            raise ValueError(f"visualize: size is for points in pixels, units='pixels' (got size {size!r}, {units!r})")
        return
    whole = isinstance(size, Sequence) and all(isinstance(n, int | np.integer) and n > 0 for n in size)
    if not whole or not size:
        raise ValueError(
            f"visualize: points in pixels need the size of the image, such as size=(height, width) (got {size!r})"
        )


def _numbers(points: Points, dimensions: int | None) -> Tensor:
    try:
        values = torch.as_tensor(points, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"visualize: points must be a list of (y, x) pairs (got {points!r})") from error
    if values.dim() in (1, 2) and len(values) == 0:
        values = values.reshape(0, 2 if dimensions is None else dimensions)
    if values.dim() != 2 or values.shape[1] != (values.shape[1] if dimensions is None else dimensions):
        expected = _AXES.get(dimensions or 2, f"{dimensions} numbers each")
        raise ValueError(
            f"visualize: points must be a list of {expected} for a feature map of {dimensions or 2} dimensions "
            f"(got shape {list(values.shape)})"
        )
    return values


def _from_pixels(values: Tensor, size: Sequence[int]) -> Tensor:
    sizes = torch.tensor([int(n) for n in size], dtype=torch.float64)
    if not bool(((values >= 0) & (values < sizes) & (values == values.floor())).all()):
        last = ", ".join(f"0 to {int(n) - 1}" for n in size)
        raise ValueError(
            f"visualize: points in pixels must be whole numbers within the image, ({last}) (got {values.tolist()})"
        )
    return (values + 0.5) / sizes


def grid_positions(points: Points, *size: int) -> Tensor:
    """Points as fractions of an image -> (P, D) integer positions in its feature map.

    Args:
        points: (y, x) for each point; (x,) or (t, y, x) for feature maps of one or three dimensions. May be empty.
        size: of the feature map: height, width.

    Raises:
        TypeError: for what is not a list of numbers.
        ValueError: for points of another length than ``size``, or outside [0, 1].
    """
    values = fractions(points, len(size))
    sizes = torch.tensor(size)
    return torch.minimum((values * sizes).long(), sizes - 1)
