"""The helpers of tools: names of compiled files, and the direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compilers import CSRC, ROOT, locked, output_name, run_ninja


def test_output_names_keep_the_path():
    sources = [file for file in CSRC.rglob("*") if file.suffix in (".cpp", ".cu")]
    names = {output_name(file, ".o") for file in sources}
    assert len(names) == len(sources)
    assert output_name(CSRC / "cuda" / "common" / "device.cu", ".o") == "csrc/cuda/common/device.cu.o"


def test_a_failed_build_raises_with_its_output(tmp_path):
    with locked(tmp_path), pytest.raises(RuntimeError, match="a message of the command"):
        run_ninja(tmp_path, "rule fail\n  command = echo a message of the command; false\nbuild x: fail\n")


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports absolutely, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "segattn_ops").rglob("*.py")), ids=lambda file: file.stem)
def test_the_package_imports_no_development_code(file):
    assert not imported(file) & {"tools", "benchmarks", "tests"}


def test_tools_load_neither_the_package_nor_the_tests():
    """The GPU suite imports them before it builds the libraries; the emulator's tests import them."""
    code = "import sys, tools.compilers, tools.cuda_resources, tools.torch_headers\n"
    code += "sys.exit(bool({name.split('.')[0] for name in sys.modules} & {'segattn_ops', 'tests', 'benchmarks'}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
