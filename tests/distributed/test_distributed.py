"""The ops of segattn_ops.distributed on 2, 3 and 4 gloo processes, against one process.

A test runs all checks of a mesh, because the processes take longer to start than the checks.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from . import fault_checks
from .processes import run_module

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.slow,
]

DOCUMENT = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
SCRIPTS = re.findall(r'^```python\n("""torchrun (.*?)""".*?)^```', DOCUMENT, re.DOTALL | re.MULTILINE)
OPS = {"ring": "position_attention", "criss-cross": "criss_cross_attention"}


@pytest.mark.parametrize("mesh", ["2", "3", "2x2"])
def test_ops(mesh):
    errors = {name: error for name, error in run_module("tests.distributed.op_checks", mesh).items() if error}
    assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())


def test_other_ranks_end_with_an_error():
    """Where one raises, ends or stalls between the messages of an op."""
    command = [sys.executable, "-m", "tests.distributed.fault_checks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for op, messages in results["orders"].items():
        for message in messages:
            assert "must go backward through the same calls in the same order" in message, f"{op}: {message}"
    found: dict[str, list[str | None]] = results["faults"]
    assert len(found) == len(OPS) * len(fault_checks.FAULTS) * len(fault_checks.PASSES)
    for case, (*others, faulty) in found.items():
        op, fault, _ = case.split()
        for message in others:
            assert message is not None, f"{case}: a rank ended without an error"
            assert f"distributed.{OPS[op]}: communication failed on rank" in message, f"{case}: {message}"
            assert "an earlier call on this mesh failed" in message, f"{case}: {message}"
        if fault == "ends":
            assert faulty is None, case
        elif fault == "raises":
            assert "of this rank alone" in faulty and "an earlier call on this mesh failed" in faulty, case
        else:
            assert "communication failed" in faulty, case


@pytest.mark.parametrize("script, arguments", SCRIPTS, ids=[arguments.split()[-1] for _, arguments in SCRIPTS])
def test_documented_scripts(script, arguments, tmp_path):
    """As their first line says. A line of each rank tells that it is done, not the exit status: gloo of torch 2.14 can
    abort a process at its exit after an all-to-all."""
    *options, name = arguments.split()
    (tmp_path / name).write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(tmp_path / name)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    ranks = sorted(re.findall(r"rank (\d): ", done.stdout))  # lines of ranks may be mixed
    assert ranks == ["0", "1"], done.stderr
