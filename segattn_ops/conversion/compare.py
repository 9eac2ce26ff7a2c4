"""Largest difference between two nested outputs."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Relative to the largest value. About ten roundings of the dtype: attention sums in another order than the original.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def coarsest(dtypes: Iterator[torch.dtype]) -> torch.dtype:
    """The dtype with the largest tolerance; float32 if there is none."""
    known = [dtype for dtype in dtypes if dtype in TOLERANCE]
    return max(known, key=TOLERANCE.__getitem__, default=torch.float32)


def leaves(output: Any, path: str = "") -> dict[str, Any]:
    """What a nested output consists of, by position, tensors detached and copied: a later run may write over them."""
    if isinstance(output, Tensor):
        return {path: output.detach().clone()}
    if isinstance(output, Mapping):
        items: Any = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    else:
        return {path: output}
    found: dict[str, Any] = {f"{path}.": type(output)}  # an empty list is not an empty dictionary
    for name, value in items:
        found |= leaves(value, f"{path}.{name}")
    return found


def compared(found: Mapping[str, Any]) -> list[Tensor]:
    """The leaves whose values count: floating-point tensors. Integers, such as an argmax, may flip at a tie."""
    return [v for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()]


def difference(got: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest difference of two sets of :func:`leaves`, relative to the largest expected value of each tensor.

    Equal infinities, and NaN in both, are equal. Infinite for another structure or shape, and for a NaN where none was.
    """
    if got.keys() != expected.keys():
        return float("inf")
    largest = 0.0
    for path, theirs in expected.items():
        ours = got[path]
        if not isinstance(theirs, Tensor):
            if isinstance(ours, Tensor) or (theirs is None) != (ours is None):
                return float("inf")
        elif not isinstance(ours, Tensor) or ours.shape != theirs.shape:
            return float("inf")
        elif theirs.is_floating_point():
            largest = max(largest, _of_tensors(ours, theirs))
    return largest


def _of_tensors(ours: Tensor, theirs: Tensor) -> float:
    if torch.equal(ours, theirs):
        return 0.0
    a, b = ours.double(), theirs.double()
    error, largest = (a - b).abs().max(), b.abs().max()
    if not bool(error.isfinite()):
        equal = (a == b) | (a.isnan() & b.isnan())
        finite = b.isfinite() & a.isfinite()
        if not bool((equal | finite).all()):
            return float("inf")
        a, b = a[finite], b[finite]
        if not a.numel():
            return 0.0
        error, largest = (a - b).abs().max(), b.abs().max()
    return (error / largest.clamp_min(torch.finfo(torch.float32).tiny)).item()
