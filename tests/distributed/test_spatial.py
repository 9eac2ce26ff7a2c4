"""Spatially parallel models: the same results, gradients and statistics on 2, 3 and 4 processes as on one."""

import pytest
import torch.distributed as dist

from .processes import run_module


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_on_processes():
    """All checks in one test: the processes take longer to start than most of them."""
    pytest.importorskip("torchvision")
    errors = run_module("tests.distributed.spatial_checks", timeout=600)
    failed = {name: error for name, error in errors.items() if error}
    assert errors and not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
