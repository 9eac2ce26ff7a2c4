"""The source distribution, and its wheels: one for every Python from 3.10 and every PyTorch from 2.10, usable outside
the source tree, and one without the extension."""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from segattn_ops import _build_tools, _version
from tools.compilers import nvcc

from .quick_compiler import without_optimisation

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, of a copy of the tree without what earlier builds left."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "report", "_build_info.json", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True)
    env = {**os.environ, "FORCE_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=source, env=env, check=True)
    (path,) = (source / "dist").glob("*.tar.gz")
    return path


def build_wheel(sdist: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """pip's attempt at a wheel of the source distribution, which pip unpacks elsewhere."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, sdist],
        env={**os.environ, "FORCE_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def install(wheel: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
    subprocess.run(command, check=True)


def run_installed(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_source_distribution_has_all_that_is_compiled(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        listed = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/segattn_ops.egg-info/SOURCES.txt")
        assert not [line for line in listed.read().decode().splitlines() if line.startswith("/")]
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "segattn_ops").rglob("*.py")}
    wanted |= {"setup.py", "build_backend.py", "pyproject.toml", "LICENSE", "segattn_ops/py.typed"}
    assert wanted - names == set()


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel of the source distribution, with the baseline instruction set only, not optimised: half a minute instead
    of several."""
    folder = tmp_path_factory.mktemp("wheel")
    compiler = without_optimisation(tmp_path_factory.mktemp("compiler"))
    done = build_wheel(sdist, folder, SEGATTN_CPU_ONLY="baseline", CXX=compiler)
    assert done.returncode == 0, done.stderr
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

    install(wheel, tmp_path)
    code = (
        "import torch, segattn_ops; x = torch.randn(1, 4, 3, 3);"
        "print(segattn_ops.__file__, segattn_ops.build_config()['cpu']['instruction_set']);"
        "segattn_ops.position_attention(x, x, x)"
    )
    printed = run_installed(tmp_path, "-W", "error", "-c", code).stdout
    assert printed.split() == [str(tmp_path / "segattn_ops" / "__init__.py"), "baseline"]


def test_a_wheel_without_the_extension(sdist, tmp_path):
    """On a PATH without any program, since neither a compiler nor ninja is wanted, and with a torch that cannot be
    imported."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('the build imports torch')")
    hidden = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = build_wheel(sdist, tmp_path, SEGATTN_NO_EXTENSION="1", **hidden)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert built.name == f"segattn_ops-{_version.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(built).namelist()
    assert "segattn_ops/py.typed" in names and not [name for name in names if name.endswith(".so")]

    install(built, tmp_path / "site")
    code = (
        "import torch, segattn_ops; x = torch.randn(1, 4, 3, 3, requires_grad=True);"
        "segattn_ops.position_attention(x, x, x).sum().backward();"
        "print(segattn_ops.build_config()['extension'], segattn_ops.build_config()['cpu']['native'])"
    )
    done = run_installed(tmp_path / "site", "-W", "always", "-c", code)
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr.count("RuntimeWarning: segattn_ops: the plain PyTorch reference serves cpu tensors") == 1
    assert "installed without the extension (SEGATTN_NO_EXTENSION=1); build it with" in done.stderr
    page = " ".join(run_installed(tmp_path / "site", "-m", "segattn_ops").stdout.split())
    assert "built with nothing: without the extension" in page
    assert "CPU kernels none: installed without the extension (SEGATTN_NO_EXTENSION=1)" in page


def test_without_the_extension_nothing_is_required_to_build(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    backend = importlib.import_module("build_backend")
    monkeypatch.delenv("SEGATTN_NO_EXTENSION", raising=False)
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    monkeypatch.setenv("SEGATTN_NO_EXTENSION", "1")
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == []


MISSING = {
    "no compiler": ("", "CXX=nothing", "needs a C++20 compiler, and `nothing` does not run as one (No such file"),
    "an old compiler": (
        "",
        "CXX=old",
        "needs a C++20 compiler, and `old` does not run as one (old: error: unrecognized -std=c++20)",
    ),
    "no ninja": (
        "import torch.utils.cpp_extension as c; c.is_ninja_available = lambda: False",
        "",
        "needs ninja, which is missing: pip install ninja",
    ),
    "no torch": ("import sys; sys.modules['torch'] = None", "", "needs torch >= 2.10 (got: import of torch halted"),
    "an old torch": ("import torch; torch.__version__ = '2.9.1'", "", "needs torch >= 2.10 (got 2.9.1)"),
}


@pytest.mark.parametrize(("before", "variable", "message"), MISSING.values(), ids=MISSING.keys())
def test_what_the_build_misses_is_named(before, variable, message, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 'old: error: unrecognized -std=c++20' >&2; exit 1\n")
    old.chmod(0o755)
    code = f"{before}\nimport sys, runpy; sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]\n"
    name, _, value = variable.partition("=")
    env = {**os.environ, "FORCE_CUDA": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"} | (
        {name: value} if name else {}
    )
    code += "runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("segattn_ops: ")]
    assert message in sentence and "set SEGATTN_NO_EXTENSION=1" in sentence
    assert "Traceback" not in done.stderr


def test_an_old_setuptools_is_named():
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "setuptools >= 77 (got 65.5.0)" in result.stderr


EXTENSIONS = """
import json, runpy, setuptools
setuptools.setup = lambda **arguments: found.update(arguments)
found = {}
runpy.run_path("setup.py", run_name="__main__")
(cuda,) = [e for e in found["ext_modules"] if e.name == "segattn_ops._C_cuda"]
flags = cuda.extra_compile_args["nvcc"]
print(json.dumps([cuda.sources, cuda.sources_for_sm90a, "-DSEGATTN_SM90A" in flags, cuda.depends]))
"""


@pytest.mark.skipif(torch.version.cuda is None or nvcc() is None, reason="the CUDA kernels cannot be built here")
@pytest.mark.parametrize(
    ("architectures", "named", "has_sm90a"),
    [
        ("9.0", "['90', '90a']", True),
        ("8.0;9.0+PTX", "['80', '90', '90a']", True),
        ("9.0a", "['90a']", True),
        ("8.0", "['80']", False),
        ("10.0 12.0+PTX", "['100', '120']", False),
    ],
)
def test_files_for_sm90a_are_compiled_where_the_build_is_for_sm_90(architectures, named, has_sm90a):
    env = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    command = [sys.executable, "-c", EXTENSIONS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert any(line.endswith(f"architectures {named}") for line in lines), lines
    sources, for_sm90a, defined, depends = json.loads(lines[-1])
    assert not [source for source in sources if source.endswith("_sm90.cu")]
    there = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*_sm90.cu"))
    assert there and for_sm90a == (there if has_sm90a else [])
    assert defined == has_sm90a
    assert set(for_sm90a) <= set(depends)
