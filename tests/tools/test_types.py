"""The types of the public functions, as a user's mypy sees them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USAGE = Path(__file__).with_name("typed_usage.py")


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_users_code_has_exact_types(tmp_path):
    """In another folder, without this project's configuration. 11 s, most of them for torch's own sources."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(
        [*command, USAGE],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_py_typed_is_there():
    """Without it a type checker ignores the annotations; test_packaging.py finds it in the wheels."""
    assert (ROOT / "segattn_ops" / "py.typed").read_text() == ""
