"""Checkpoints that were made to do harm: no code runs, memory is bounded by the file's size, and the error is one.

A process of its own opens them (tests/modules/hostile.py). tests/reliability/long_hostile_files.py opens more.
"""

import io
import os
import zipfile

import pytest
import torch

from segattn_ops import checkpoints, nn

from . import hostile
from .hostile_process import opened


def test_hostile_checkpoints(tmp_path, record_property) -> None:
    found = opened("checkpoints", 0, 150, tmp_path)
    record_property("files opened", found["tried"])
    record_property("inputs tried", found["tried"])
    record_property("code run", found["ran"])
    assert not found["faults"]
    assert found["tried"] > 900 and found["refused"] > 800


@pytest.mark.parametrize("kind", [kind for kind in hostile.valid() if kind != "safetensors"])
def test_what_torch_reads_is_read(kind, tmp_path) -> None:
    """The reader is our own: it gives what torch's gives, of the zip and of the old format."""
    content = hostile.valid()[kind]
    ours = checkpoints.read(io.BytesIO(content))
    theirs = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")

    def compare(one, other) -> None:
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == list(other)
            assert getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
            for key in one:
                compare(one[key], other[key])
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other)
            for ours, theirs in zip(one, other, strict=True):
                compare(ours, theirs)
        elif isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and one.stride() == other.stride()
            assert one.requires_grad == other.requires_grad and torch.equal(one, other)
        else:
            assert one == other

    compare(ours, theirs)


@pytest.mark.parametrize("save", [hostile.saved, hostile.old], ids=["zip", "old"])
def test_views_of_one_storage_share_it(save) -> None:
    values = torch.arange(12.0)
    content = save({"a": values[:6].view(2, 3).t(), "b": values[2:4], "c": values[:0], "d": values.new_zeros(())})
    state = checkpoints.read(io.BytesIO(content))
    assert state["a"].untyped_storage().data_ptr() == state["b"].untyped_storage().data_ptr()
    assert torch.equal(state["a"], values[:6].view(2, 3).t()) and torch.equal(state["b"], values[2:4])
    assert state["c"].shape == (0,) and state["d"].shape == ()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("a terabyte when copied", "is larger than its storage of 16 elements"),
        ("a storage of 2**60", "damaged"),
        ("a sparse tensor", "holds sparse tensors: save them dense"),
        ("a quantized tensor", "holds quantized tensors"),
        ("a conjugated view", "holds conjugated or negated views"),
        ("a bytearray of 2**36", "damaged"),
    ],
)
def test_the_message_says_what_is_wrong(what, expected) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        checkpoints.read(io.BytesIO(hostile.zipped(hostile.whole(hostile.SHAPES[what]))))
    assert str(error.value).startswith("checkpoints.read: the file object ")


def test_a_compressed_zip_says_how_to_go_on() -> None:
    content = hostile.zipped(hostile.whole(b"N"), {"data/0": bytes(9000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a compressed or encrypted zip, .*: unpack it, and zip it with -0"):
        checkpoints.read(io.BytesIO(content))


def test_files_that_are_none(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=r"is a device, a pipe or a socket, not a file"):
            checkpoints.read(path)  # an open would wait for a writer, a read never end
    with pytest.raises(ValueError, match=r"has a null character"):
        checkpoints.read("a\0b")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError):
        checkpoints.read(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "file.pth")
    (tmp_path / "file.pth").write_bytes(hostile.valid()["zip"])
    assert checkpoints.load(nn.PositionAttention(16), tmp_path / "link").complete
    name = tmp_path / "a\n\x1b[2J.pth"
    name.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\\n\\x1b\[2J\.pth is empty"):
        checkpoints.read(name)


@pytest.mark.parametrize("name", ["gamma\n", "\ud800", "x" * 501, "a\0"])
def test_names_that_no_module_has(name) -> None:
    state = {**nn.PositionAttention(16).state_dict(), name: torch.ones(1)}
    for source in (state, {"state_dict": state}):
        with pytest.raises(ValueError, match="a name must have at most 500 characters, all of them printable") as error:
            checkpoints.load(nn.PositionAttention(16), source)
        assert len(str(error.value)) < 400 and str(error.value).isprintable()
