"""Spatially parallel models: the same results, gradients and statistics on 2, 3 and 4 processes as on one."""

import pytest
import torch.distributed as dist

pytest.importorskip("torchvision")

from . import spatial_checks
from .processes import run_module


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Of all checks, which the processes of one command run."""
    return run_module("tests.distributed.spatial_checks", timeout=600)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("name", spatial_checks.NAMES)
def test_on_processes(errors: dict[str, str | None], name: str):
    assert errors[name] is None, errors[name]
