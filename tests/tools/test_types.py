"""The types of the public functions, as a user's mypy sees them."""

import ast
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


def test_calls_have_the_signature_of_forward():
    """`__call__` of a module is written for type checkers alone, beside forward."""
    pairs = 0
    for path in [*(ROOT / "segattn_ops" / "nn").glob("*.py"), *(ROOT / "segattn_ops" / "models").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or "Function" in ast.unparse(node.bases[0] if node.bases else node):
                continue
            found = {item.name: item for item in ast.walk(node) if isinstance(item, ast.FunctionDef)}
            if "forward" not in found:
                continue
            call, forward = found["__call__"], found["forward"]
            assert ast.unparse(call.args) == ast.unparse(forward.args), (path.name, node.name)
            assert ast.unparse(call.returns) == ast.unparse(forward.returns), (path.name, node.name)
            pairs += 1
    assert pairs >= 20
