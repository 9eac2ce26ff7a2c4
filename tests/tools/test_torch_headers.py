"""The sources compile against the headers of the oldest supported PyTorch and of the newest; the build covers the
installed one. Only the compilers' front ends run."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tools import torch_headers
from tools.compilers import CSRC, ROOT, build_tools, compiler, nvcc


def includes_torch(file: Path) -> bool:
    """Whether a file includes a PyTorch header, directly or through other files of csrc."""
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
        missing(f"no headers of torch {request.param}; python -m tools.torch_headers")
    return folder


def compile_with(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", sources(".cpp"))
def test_cpu_sources(source, include):
    flags = ["-fsyntax-only", "-Wno-psabi", '-DSEGATTN_CPU_CAPABILITY_NAME="baseline"', f"-I{CSRC}"]
    flags += [*build_tools.LANGUAGE, *build_tools.STABLE_ABI, "-isystem", str(include)]
    compile_with([compiler(), *flags, str(source)])


@pytest.mark.parametrize("source", sources(".cu"))
def test_cuda_host_sources(source, include, tmp_path):
    """Compiled to PTX, for which nvcc checks the host code as well."""
    if nvcc() is None:
        pytest.skip("no nvcc")
    flags = [*build_tools.NVCC_FLAGS, "-ptx", "-arch=compute_90", f"-I{CSRC}"]
    flags += ["-isystem", str(include), "-o", str(tmp_path / "out.ptx")]
    compile_with([nvcc(), *flags, str(source)])


def test_versions():
    """The oldest version is the one that pyproject.toml and the stable ABI's flags name; the newest is at least the
    installed one."""
    oldest, newest = map(Version, torch_headers.versions())
    project = (ROOT / "pyproject.toml").read_text()
    (required,) = re.findall(r'^dependencies = .*"torch>=([\d.]+)"', project, re.MULTILINE)
    assert oldest == Version(required)
    assert f"-DTORCH_TARGET_VERSION=0x{oldest.major:02x}{oldest.minor:02x}{'0' * 12}" in build_tools.STABLE_ABI
    assert newest >= Version(Version(torch.__version__).public)
