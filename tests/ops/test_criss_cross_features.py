"""Criss-cross attention's gradients on features with regions and on a photograph's. There an error common to all keys
of a query does not average out, as it does in noise around zero."""

import functools

import pytest
import torch
from torch import Tensor

import segattn_ops
from benchmarks import features, validate
from benchmarks.workloads import DTYPES, Workload
from segattn_ops import reference

from ..families import eager_criss_cross
from ..region_features import region_features

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def relative_errors(leaves: list[Tensor], function) -> dict[str, float]:
    """Relative L2 error of each gradient, of a random gradient of the output, against float64."""
    grad_output = torch.randn(leaves[2].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])

    def gradients(function, dtype):
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        return torch.autograd.grad(function(*inputs, 1.0), inputs, grad_output.to(dtype))

    exact = gradients(lambda *a: reference.criss_cross_attention(*a)[0], torch.float64)
    names = ("grad_query", "grad_key", "grad_value")
    return {
        name: ((got.double() - expected).norm() / expected.norm()).item()
        for name, got, expected in zip(names, gradients(function, leaves[0].dtype), exact, strict=True)
    }


def assert_within_twice_eager(leaves: list[Tensor], function=segattn_ops.criss_cross_attention) -> None:
    """The rule of benchmarks/validate.py."""
    floor = validate.FLOOR[NAMES[leaves[0].dtype]]
    eager = relative_errors(leaves, eager_criss_cross)
    for name, error in relative_errors(leaves, function).items():
        assert error <= 2 * eager[name] + floor, f"{name}: error {error:.2e}, eager's {eager[name]:.2e}"


@pytest.mark.parametrize("energy", [4.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_regions(kernels, dtype, energy):
    channels = 512 if dtype == torch.float32 else 128  # eager takes seconds in 16 bits
    size, widths = ((33, 33), (64, channels)) if kernels.runs_large else ((20, 17), (16, 32))
    leaves = region_features(*size, *widths, dtype, energy)
    assert_within_twice_eager([leaf.to(kernels.device) for leaf in leaves])


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 260), (110, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regions_of_long_and_single_lines(kernels, dtype, shape):
    """A single row or column, and lines whose weights are computed in several parts."""
    leaves = region_features(*shape, 16, 32, dtype, 4.0)
    assert_within_twice_eager([leaf.to(kernels.device) for leaf in leaves])


def emulated_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.ops.segattn_emulated.criss_cross_attention(query, key, value, scale)[0]


@pytest.mark.parametrize(
    ("architecture", "dtype", "shape"),
    [
        (75, torch.float32, (20, 17)),  # fused multiply-adds
        (75, torch.bfloat16, (20, 17)),
        (86, torch.bfloat16, (70, 4)),  # two tiles a column
        (90, torch.bfloat16, (4, 97)),  # a row is one wide tile
        (90, torch.float32, (4, 97)),
        (86, torch.bfloat16, (2, 1700)),  # no room for the weights of a row at once
    ],
)
def test_regions_on_every_path_of_cuda(emulator, architecture, dtype, shape):
    emulator.set_device(architecture)
    assert_within_twice_eager(region_features(*shape, 16, 32, dtype, 8.0), emulated_attention)


def test_regions_in_tf32(emulator):
    """The products' operands are rounded to 11 bits. If delta's error is not corrected, grad_query's error is 8e-3."""
    torch.ops.segattn_emulated._set_allow_tf32(True)
    errors = relative_errors(region_features(20, 17, 16, 32, torch.float32, 8.0), emulated_attention)
    assert max(errors.values()) < 2e-3


@functools.cache
def photograph() -> features.FeatureSource:
    return features.FeatureSource(features.load_photograph("astronaut"), [(33, 33)], features.Extractor())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_photograph(kernels, dtype):
    """Features after a ReLU and the block's three convolutions."""
    if not kernels.runs_large:
        pytest.skip("takes the emulator minutes")
    leaves = photograph().leaves(Workload("criss_cross", 33, 33, dtype))
    assert_within_twice_eager([leaf.to(kernels.device) for leaf in leaves.values()])
