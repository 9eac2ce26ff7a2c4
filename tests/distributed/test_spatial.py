"""Spatially parallel models: the same results, gradients and statistics on 2, 3 and 4 processes as on one."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

pytest.importorskip("torchvision")

from . import spatial_checks


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Of all checks, which the processes of one command run."""
    command = [sys.executable, "-m", "tests.distributed.spatial_checks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("name", spatial_checks.NAMES)
def test_on_processes(errors: dict[str, str | None], name: str):
    assert errors[name] is None, errors[name]
