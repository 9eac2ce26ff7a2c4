"""`make wheels` and the matrix, without building a wheel or installing a torch."""

import sys
from pathlib import Path

import pytest
import torch

from tools import wheel_matrix, wheels

WHEEL = "segattn_ops-0.1.0+cpu-cp310-abi3-linux_x86_64.whl"


@pytest.mark.parametrize("toolkit", [None, "/usr/bin/nvcc"])
def test_a_cuda_wheel_needs_a_toolkit_and_a_torch_with_cuda(toolkit, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(wheels, "nvcc", lambda: toolkit)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = {"cu130": {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wheels.ARCHITECTURES}} if toolkit else {}
    assert wheels.wanted() == {"cpu": {"FORCE_CUDA": "0"}} | cuda
    assert wheels.ARCHITECTURES.endswith("+PTX")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert wheels.wanted() == {"cpu": {"FORCE_CUDA": "0"}}


def test_without_auditwheel_the_wheel_stays_and_says_so(tmp_path, monkeypatch):
    built = tmp_path / "build" / WHEEL
    built.parent.mkdir()
    built.write_bytes(b"new")
    folder = tmp_path / "dist"
    folder.mkdir()
    earlier = folder / WHEEL.replace("linux_x86_64", "manylinux_2_34_x86_64")
    other = folder / WHEEL.replace("+cpu", "+cu130")
    earlier.touch()
    other.touch()
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    wheel, fault = wheels.repair(built, folder)
    assert wheel == folder / WHEEL and wheel.read_bytes() == b"new"
    assert "pip install -r requirements/wheels.txt" in fault
    assert not earlier.exists() and other.exists()  # the earlier one of the same build is replaced


def test_what_the_matrix_could_not_run_is_in_its_table(tmp_path):
    cell = wheel_matrix.run("2.14", "2.99", tmp_path / WHEEL, tmp_path)
    assert cell.fault == "no Python 2.99 on this machine" and not cell.counts
    (tmp_path / WHEEL).write_bytes(b"")
    lines = wheel_matrix.page(tmp_path / WHEEL, [cell]).splitlines()
    assert "| 2.14 | 2.99 | - | not run: no Python 2.99 on this machine |" in lines
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert Path(wheel_matrix.interpreter(version)).name.startswith("python")
