"""A full disk while a file is written: the old file stays whole, and nothing is left beside it."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import report
from segattn_ops import _files, checkpoints
from segattn_ops.checkpoints.files import save_whole
from segattn_ops.visualize import draw_attention

OLD = b"the old file"
STATE = {f"layer{index}.weight": torch.full((600,), float(index)) for index in range(8)}
REPORT = {"cells": [{"op": "position", "seconds": index / 7} for index in range(300)]}


def draw(path: Path) -> None:
    draw_attention(np.zeros((8, 8, 3), np.uint8), {"map": torch.ones(1, 2, 2)}, [(0.5, 0.5)], path)


# name -> the file's name, and what writes it
WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "text": ("page.md", lambda path: _files.write_text(path, "a line\n" * 2000)),
    "report": ("report.json", lambda path: report.write_json(REPORT, path)),
    "checkpoint": ("model.pth", lambda path: checkpoints.save(STATE, path)),
    "safetensors": ("model.safetensors", lambda path: checkpoints.save(STATE, path)),
    "state of a training": ("run.pth", lambda path: save_whole({"state": STATE, "step": 3}, path)),
    "picture": ("picture.png", draw),
}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond the size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_file_stays_whole(name, tmp_path, record_property) -> None:
    file, write = WRITERS[name]
    write(tmp_path / file)
    whole = (tmp_path / file).stat().st_size
    tried = 0
    for size in sorted({0, 1, 64, 512, whole // 2, whole - 1}):
        (tmp_path / file).write_bytes(OLD)
        with file_size_limit(size), pytest.raises(OSError):
            write(tmp_path / file)
        assert (tmp_path / file).read_bytes() == OLD
        assert os.listdir(tmp_path) == [file]
        tried += 1
    write(tmp_path / file)
    assert (tmp_path / file).stat().st_size == pytest.approx(whole, abs=64)
    record_property("writes failed", tried)


@pytest.mark.parametrize("step", ["fsync", "replace", "mkstemp"])
def test_errors_of_the_steps_around_the_write(step, tmp_path, monkeypatch) -> None:
    (tmp_path / "page.md").write_bytes(OLD)

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.tempfile if step == "mkstemp" else _files.os, step, full)
    with pytest.raises(OSError, match="No space left"):
        _files.write_text(tmp_path / "page.md", "new")
    assert (tmp_path / "page.md").read_bytes() == OLD and os.listdir(tmp_path) == ["page.md"]


def test_an_interrupt_leaves_the_old_file(tmp_path) -> None:
    (tmp_path / "page.md").write_bytes(OLD)
    with pytest.raises(KeyboardInterrupt), _files.replacing(tmp_path / "page.md") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "page.md").read_bytes() == OLD and os.listdir(tmp_path) == ["page.md"]


def test_links_permissions_and_devices(tmp_path) -> None:
    target = tmp_path / "target.md"
    target.write_bytes(OLD)
    target.chmod(0o640)
    (tmp_path / "link.md").symlink_to(target)
    _files.write_text(tmp_path / "link.md", "new")
    assert (tmp_path / "link.md").is_symlink() and target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    _files.write_text(tmp_path / "fresh.md", "new")
    (tmp_path / "usual.md").write_text("new")
    assert (tmp_path / "fresh.md").stat().st_mode == (tmp_path / "usual.md").stat().st_mode
    with pytest.raises(OSError, match="No space left"):
        _files.write_text("/dev/full", "new")
    _files.write_text("/dev/null", "new")
    with pytest.raises(FileNotFoundError):
        _files.write_text(tmp_path / "none" / "page.md", "new")
    with pytest.raises(IsADirectoryError):
        _files.write_text(tmp_path, "new")


def test_the_helper_needs_neither_torch_nor_the_package(tmp_path) -> None:
    """setup.py writes the record of the build with it."""
    code = f"import runpy; runpy.run_path({_files.__file__!r})['write_text']('record.json', '[1]')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "record.json").read_text()) == [1]


def test_names_in_messages() -> None:
    assert _files.shown("a\n\x1b[2J\ud800é") == r"a\n\x1b[2J\ud800é"
    assert len(_files.shown("x" * 10**6)) < 300 and "1000000 characters" in _files.shown("x" * 10**6)
    assert _files.bounded("short") == "short"
    assert len(_files.bounded("y" * 10**6)) < 8100


def test_a_file_object_that_is_full_is_an_oserror() -> None:
    """torch's zip writer turns it into an error of its own."""
    with pytest.raises(OSError, match="No space left"):
        save_whole(STATE, "/dev/full")
