"""The ops of segattn_ops.distributed on 2, 3 and 4 gloo processes, against one process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from . import fault_checks, op_checks
from .processes import run_module

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SHAPES = ((2,), (3,), (2, 2))
CASES = [(shape, name) for shape in SHAPES for name in op_checks.checks(shape)]


@pytest.fixture(scope="module")
def errors() -> Iterator[Any]:
    """shape -> the errors of its checks, which run when the first of them is asked for."""
    found: dict[tuple[int, ...], dict[str, str | None]] = {}

    def of_shape(shape: tuple[int, ...]) -> dict[str, str | None]:
        if shape not in found:
            found[shape] = run_module("tests.distributed.op_checks", "x".join(map(str, shape)))
        return found[shape]

    return of_shape


@pytest.mark.parametrize("shape, name", CASES, ids=[f"{'x'.join(map(str, s))}-{n}" for s, n in CASES])
def test_op(errors, shape, name):
    assert errors(shape)[name] is None, errors(shape)[name]


@pytest.fixture(scope="module")
def faults() -> dict[str, list[tuple[str, float] | None]]:
    command = [sys.executable, "-m", "tests.distributed.fault_checks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[str, float] | None]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("where", fault_checks.PASSES)
@pytest.mark.parametrize("fault", fault_checks.FAULTS)
@pytest.mark.parametrize("op", fault_checks.OPS)
def test_other_ranks_end_with_an_error(faults, op, fault, where):
    *others, faulty = faults[f"{op} {fault} {where}"]
    name = {"ring": "position_attention", "criss-cross": "criss_cross_attention"}[op]
    for result in others:
        assert result is not None, "a rank ended without an error"
        message, seconds = result
        assert f"distributed.{name}: communication failed on rank" in message, message
        assert "an earlier call on this mesh failed" in message
        assert seconds < fault_checks.TIMEOUT + 10
    if fault == "ends":
        assert faulty is None
    elif fault == "raises":
        assert "of this rank alone" in faulty[0] and "an earlier call on this mesh failed" in faulty[0]
    else:
        assert "communication failed" in faulty[0]


DOCUMENT = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
SCRIPTS = re.findall(r'^```python\n("""torchrun (.*?)""".*?)^```', DOCUMENT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("script, arguments", SCRIPTS, ids=[arguments.split()[-1] for _, arguments in SCRIPTS])
def test_documented_scripts(script, arguments, tmp_path):
    """As their first line says."""
    *options, name = arguments.split()
    (tmp_path / name).write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(tmp_path / name)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
