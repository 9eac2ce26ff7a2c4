"""The sources compile against the headers of the oldest supported and of the newest PyTorch; the build itself has used
those of the installed one. Front ends alone: nothing is optimised, assembled or linked."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from benchmarks import cuda_resources

from ..emulator.build import compiler
from . import torch_headers

CSRC = torch_headers.ROOT / "csrc"


def limited_api() -> list[str]:
    """The flags of setup.py that choose PyTorch's stable ABI and its oldest version."""
    (flags,) = re.findall(r"^LIMITED_API = (\[.+\])$", (torch_headers.ROOT / "setup.py").read_text(), re.MULTILINE)
    return ast.literal_eval(flags)


def includes_torch(file: Path) -> bool:
    """Whether a file includes a header of PyTorch, itself or through others of csrc."""
    text = file.read_text()
    if re.search(r"^#include <torch/", text, re.MULTILINE):
        return True
    local = [CSRC / name for name in re.findall(r'^#include "(.+)"$', text, re.MULTILINE)]
    return any(includes_torch(header) for header in local if header.exists())


def sources(suffix: str) -> list:
    files = [file for file in sorted(CSRC.rglob(f"*{suffix}")) if includes_torch(file)]
    return [pytest.param(file, id=str(file.relative_to(CSRC))) for file in files]


@pytest.fixture(params=torch_headers.versions())
def include(request) -> Path:
    folder = torch_headers.include_folder(request.param)
    if not folder.exists():
        missing = pytest.fail if os.environ.get("SEGATTN_REQUIRE_HEADERS") == "1" else pytest.skip
        missing(f"no headers of torch {request.param}; python -m tests.tools.torch_headers")
    return folder


def compile_with(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", sources(".cpp"))
def test_cpu_sources(source, include):
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-Wno-psabi",
        '-DSEGATTN_CPU_CAPABILITY_NAME="baseline"',
        f"-I{CSRC}",
        *limited_api(),
    ]
    compile_with([compiler(), *flags, "-isystem", str(include), str(source)])


@pytest.mark.parametrize("source", sources(".cu"))
def test_cuda_host_sources(source, include, tmp_path):
    """To PTX: nvcc checks the host code on the way, and compiles the few kernels there."""
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc on PATH and CUDA_HOME is not set")
    flags = [
        "-std=c++20",
        "-ptx",
        "-arch=compute_90",
        "--expt-relaxed-constexpr",
        "-DUSE_CUDA",
        f"-I{CSRC}",
        *limited_api(),
    ]
    flags += ["-isystem", str(include), "-o", str(tmp_path / "out.ptx")]
    compile_with([cuda_resources.nvcc(), *flags, str(source)])


def test_versions():
    """The oldest is the one that the package asks for and that the stable ABI is limited to; the newest is at least
    the installed one."""
    oldest, newest = map(Version, torch_headers.versions())
    project = (torch_headers.ROOT / "pyproject.toml").read_text()
    (required,) = re.findall(r'^dependencies = .*"torch>=([\d.]+)"', project, re.MULTILINE)
    assert oldest == Version(required)
    assert f"-DTORCH_TARGET_VERSION=0x{oldest.major:02x}{oldest.minor:02x}{'0' * 12}" in limited_api()
    assert newest >= Version(Version(torch.__version__).public)
