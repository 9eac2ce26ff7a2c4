"""Bounds on the error of a kernel."""

import torch
from torch import Tensor

from benchmarks import validate
from segattn_ops.ops._check import accumulation_dtype

FLOOR = 4  # units in the last place of the largest exact value
# The exact result of float64 inputs is eager's own float64 result. Its rounding errors are part of the difference, and
# eager's error is 0.
FLOOR_FLOAT64 = 64


def assert_as_exact_as_eager(name: str, got: Tensor, eager: Tensor, exact: Tensor, energy: float = 12) -> None:
    """The error against the float64 result may be twice that of the same computation by eager PyTorch in the same
    dtype, plus a small floor. Where eager overflows to NaN, the floor alone is the bound.

    `energy` is the size of the largest energy. The backward pass recomputes the weights from a logsumexp of that size,
    rounded to the dtype of accumulation: an error of up to energy / 2 units in the last place in a row of weights."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    exact = exact.double().cpu()
    error = (got.double().cpu() - exact).abs().max().item()
    eager_error = (eager.double().cpu() - exact).abs().nan_to_num(0).max().item()
    floor = FLOOR_FLOAT64 if got.dtype == torch.float64 else FLOOR
    floor *= torch.finfo(got.dtype).eps
    floor += energy * torch.finfo(accumulation_dtype(got.dtype)).eps
    floor *= exact.abs().max().item()
    assert error <= 2 * eager_error + floor, (
        f"{name} ({got.dtype}): error {error:.3e}, eager's {eager_error:.3e}, floor {floor:.3e}"
    )


def assert_norm_as_exact_as_eager(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """As above for the relative L2 error of all elements together, with the floor of the benchmark's validation."""
    exact = exact.double()
    error, eager_error = (((t.double() - exact).norm() / exact.norm()).item() for t in (got, eager))
    allowed = 2 * eager_error + validate.FLOOR[str(got.dtype).removeprefix("torch.")]
    assert error <= allowed, f"{name} ({got.dtype}): relative error {error:.3e}, eager's {eager_error:.3e}"
