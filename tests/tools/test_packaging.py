"""The wheel: one for every Python from 3.10 and every PyTorch from 2.10, usable outside the source tree."""

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from segattn_ops import _build_tools, _version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the source distribution, with the baseline instruction set only: a minute instead of several."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = [".git", ".venv", "build", "*.egg-info", "*.so", "report", "_build_info.json", "__pycache__"]
    subprocess.run(
        ["tar", "-cf", folder / "source.tar", *(f"--exclude={name}" for name in ignored), "-C", ROOT, "."], check=True
    )
    source.mkdir()
    subprocess.run(["tar", "-xf", folder / "source.tar", "-C", source], check=True)
    env = {**os.environ, "SEGATTN_CPU_ONLY": "baseline", "FORCE_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=source, env=env, check=True)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, sdist],
        env=env,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel(wheel, tmp_path):
    version = _version.__version__
    assert wheel.name.startswith(f"segattn_ops-{version}-cp310-abi3-"), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for library in ("_C", "_cpu_baseline"):
        assert f"segattn_ops/{library}.abi3.so" in names
    assert "segattn_ops/py.typed" in names
    info = json.loads(zipfile.ZipFile(wheel).read("segattn_ops/_build_info.json"))
    # By which libraries built elsewhere are matched with a tree's sources.
    assert info["sources"] == dict.fromkeys(["_C", "_cpu_baseline"], _build_tools.fingerprint(ROOT))
    assert info["compiler"] and info["python"] == platform.python_version()  # for `python -m segattn_ops`
    assert f"segattn_ops-{version}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "tools", "csrc"))]

    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    code = (
        "import torch, segattn_ops; x = torch.randn(1, 4, 3, 3);"
        "print(segattn_ops.__file__, segattn_ops.build_config()['cpu']['instruction_set']);"
        "segattn_ops.position_attention(x, x, x)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(tmp_path / "segattn_ops" / "__init__.py"), "baseline"]


def test_an_old_setuptools_is_named():
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "setuptools >= 77 (got 65.5.0)" in result.stderr
