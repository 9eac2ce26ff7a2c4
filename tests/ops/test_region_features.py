"""Gradients on features of trained networks and photographs: means that are not zero, as after a ReLU, and regions of
similar positions.

There grad_query is a small difference of large sums. An error common to all keys of a query, such as an error of delta
(docs/decisions.md), does not average out. On noise around zero it is invisible.
"""

from functools import lru_cache

import pytest
import torch

from benchmarks import features
from benchmarks.workloads import Workload

from ..families import BY_OPERATOR
from ..region_features import region_features
from ..tolerance import assert_norm_as_exact_as_eager
from .test_ops import names, results

SIZES = {"cpu": (33, 33), "cuda": (97, 97), "emulated": (13, 11)}


def check(family, inputs, backend) -> None:
    leaves = [t.to(backend.device) for t in inputs]
    generator = torch.Generator().manual_seed(1)
    shape = (*inputs[2].shape[:2], *inputs[0].shape[2:])
    grad_output = torch.randn(shape, generator=generator).to(inputs[0].dtype).to(backend.device)
    scalars = (1.0,)
    got = results(family.function, leaves, scalars, grad_output)
    eager = results(family.eager, leaves, scalars, grad_output)
    exact = results(family.definition, [t.double() for t in leaves], scalars, grad_output.double())
    for name, *values in zip(names(family), got, eager, exact, strict=True):
        assert_norm_as_exact_as_eager(name, *values)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("energy", [0.5, 4.0, 8.0])
def test_regions(kernels, energy, dtype):
    height, width = SIZES[kernels.name]
    channels = (64, 128) if kernels.name != "emulated" else (16, 32)
    inputs = region_features(height, width, *channels, dtype, energy, seed=0)
    check(BY_OPERATOR["position_attention"], inputs, kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regions_where_no_tile_fits(kernels, dtype):
    """So many channels of query and key that the CUDA kernels take the path without tensor cores."""
    height, width = (13, 11) if kernels.name == "emulated" else (20, 20)
    inputs = region_features(height, width, 1100, 24, dtype, 4.0, seed=0)
    check(BY_OPERATOR["position_attention"], inputs, kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [110, 150])
def test_keys_that_are_nearly_alike(kernels, keys, dtype):
    """ANN's pooled keys: their mean is 30 times their spread."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 32, 9, 20, generator=generator) / 8
    key = 1 + torch.randn(1, 32, keys, generator=generator) / 30
    value = 1 + torch.randn(1, 48, keys, generator=generator) / 10
    check(BY_OPERATOR["position_attention"], [t.to(dtype) for t in (query, key, value)], kernels)


@lru_cache(maxsize=1)
def photograph(height: int, width: int) -> torch.Tensor:
    """(1, 512, height, width): a photograph's features after the ReLU before a head's attention."""
    picture = features.load_photograph("astronaut")
    return features.FeatureSource(picture, [(height, width)], features.Extractor()).window(height, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["position", "ann", "non_local"])
def test_a_photograph(kernels, op, dtype):
    if kernels.name == "emulated":
        pytest.skip("too large for the emulator")
    x = photograph(16, 16)
    workload = Workload(op, 16, 16, str(dtype).removeprefix("torch."))
    check(BY_OPERATOR["position_attention"], list(features.operands(workload, x).values()), kernels)
