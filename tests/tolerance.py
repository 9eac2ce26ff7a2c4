"""How close a kernel must come to the exact result."""

import torch
from torch import Tensor

from benchmarks import validate
from segattn_ops.ops._check import accumulation_dtype

FLOOR = 4  # units in the last place of the largest exact value
# The exact result of float64 inputs is another float64 computation (eager's own, so that eager's error is 0), whose
# rounding is part of the difference.
FLOOR_FLOAT64 = 64


def assert_as_exact_as_eager(name: str, got: Tensor, eager: Tensor, exact: Tensor, energy: float = 12) -> None:
    """The error against the float64 result may be twice that of the same computation by eager PyTorch in the same
    dtype, plus a small floor. (Eager may overflow to NaN where the kernel does not: then the floor alone holds, at
    the dtype's precision.)

    `energy` is the size of the largest energy. The backward pass makes the weights again from a logsumexp of that size,
    rounded to the dtype of accumulation, which moves a row of weights by up to energy / 2 units in the last place."""
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
    """As above for the relative L2 error, with the floor of the benchmark's validation: of all elements together, where
    single ones are too few to average."""
    exact = exact.double()
    error, eager_error = (((t.double() - exact).norm() / exact.norm()).item() for t in (got, eager))
    allowed = 2 * eager_error + validate.FLOOR[str(got.dtype).removeprefix("torch.")]
    assert error <= allowed, f"{name} ({got.dtype}): relative error {error:.3e}, eager's {eager_error:.3e}"
