"""The search for the CUDA toolkit, and the fingerprint of the sources."""

import os
from pathlib import Path

import pytest

from segattn_ops import _build_tools


def program(folder: Path, name: str, text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A PATH with one test folder, no CUDA_HOME, and the usual places in a temporary folder."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "path"), "/bin", "/usr/bin"]))
    monkeypatch.setattr(_build_tools, "USUAL_PLACES", (f"{tmp_path}/cuda-*/bin", f"{tmp_path}/cuda/bin"))
    return tmp_path


def test_versions_of_programs(bare):
    compiler = program(bare / "path", "compiler-of-a-test", 'echo "c++ (A distribution) 12.2.0"; echo "Copyright"')
    assert _build_tools.version_of("compiler-of-a-test") == "c++ (A distribution) 12.2.0"
    assert _build_tools.version_of(f"{compiler} -m64", r"(\d+)\.") == "12"
    assert _build_tools.version_of("compiler-of-a-test", r"V([\d.]+)") is None
    program(bare / "path", "broken-of-a-test", "echo 1.0; exit 1")
    assert _build_tools.version_of("broken-of-a-test") is None
    assert _build_tools.version_of("nothing-of-a-test") is None


class TestToolkit:
    def test_nowhere(self, bare):
        assert _build_tools.find_program("nvcc-of-a-test") is None

    def test_newest_outside_path(self, bare):
        program(bare / "cuda-9.2" / "bin", "tool-of-a-test")
        newest = program(bare / "cuda-13.0" / "bin", "tool-of-a-test")
        assert _build_tools.find_program("tool-of-a-test") == str(newest)
        chosen = program(bare / "cuda" / "bin", "tool-of-a-test")
        assert _build_tools.find_program("tool-of-a-test") == str(chosen)

    def test_path_and_cuda_home_first(self, bare, monkeypatch):
        program(bare / "cuda" / "bin", "tool-of-a-test")
        on_path = program(bare / "path", "tool-of-a-test")
        assert _build_tools.find_program("tool-of-a-test") == str(on_path)
        at_home = program(bare / "home" / "bin", "tool-of-a-test")
        monkeypatch.setenv("CUDA_HOME", str(bare / "home"))
        assert _build_tools.find_program("tool-of-a-test") == str(at_home)
        assert _build_tools.find_cuda_toolkit() == (str(bare / "home"), "CUDA_HOME")

    def test_the_toolkit_of_nvcc(self, bare, monkeypatch):
        monkeypatch.setenv("PATH", str(bare / "path"))
        nvcc = program(bare / "cuda-13.0" / "bin", "nvcc", f"echo '#$ TOP={bare}/cuda-13.0' >&2")
        assert _build_tools.find_cuda_toolkit() == (os.path.realpath(bare / "cuda-13.0"), f"{nvcc} --dryrun")
        nvcc.unlink()
        assert _build_tools.find_cuda_toolkit()[0] is None


class TestFingerprint:
    def test_follows_the_sources(self, tmp_path):
        for name in (*_build_tools.BUILD_SCRIPTS, "csrc/kernel.cuh", "segattn_ops/ops.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("1")
        first, whole = (_build_tools.fingerprint(tmp_path, python=python) for python in (False, True))
        assert _build_tools.fingerprint(tmp_path) == first
        assert whole != first
        (tmp_path / "segattn_ops/ops.py").write_text("2")
        assert _build_tools.fingerprint(tmp_path) == first  # the libraries do not depend on it
        assert _build_tools.fingerprint(tmp_path, python=True) != whole
        (tmp_path / "csrc/kernel.cuh").write_text("2")
        assert _build_tools.fingerprint(tmp_path) != first
