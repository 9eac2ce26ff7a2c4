"""Files that are no checkpoints, each refused in a sentence that says what it is; checkpoints in unusual files."""

import gzip
import io
import json
import pathlib
import pickle
import shutil
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn as tnn

from segattn_ops import checkpoints, nn

from ..peers import randomise


@pytest.fixture
def block() -> nn.PositionAttention:
    return randomise(nn.PositionAttention(16))


class RunningMean:
    """An object that a training script saves beside its weights."""


class Net(tnn.Module):
    """A user's own module around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.PositionAttention(16)


def legacy(state, path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def zipped(path: pathlib.Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)


def scripted(path: pathlib.Path) -> None:
    torch.jit.save(torch.jit.trace(tnn.Linear(2, 2), torch.ones(1, 2)), path)


def exported(path: pathlib.Path) -> None:
    torch.export.save(torch.export.export(tnn.Linear(2, 2), (torch.ones(1, 2),)), path)


def tarred(path: pathlib.Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))


def cut(path: pathlib.Path, share: float, save=torch.save) -> None:
    save({"weight": torch.zeros(4000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


ARRAYS = {"conv.weight": np.ones((2, 3), np.float32), "StructuredToParameterName@@": {"a": "b"}}
NOT_CHECKPOINTS = {
    "a page with a byte order mark": (lambda p: p.write_bytes(b"\xef\xbb\xbf\n <!DOCTYPE html><p>Sign in"), "HTML"),
    "an XML error of a bucket": (lambda p: p.write_text("<?xml version='1.0'?><Error>Denied</Error>"), "XML page"),
    "a pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        "git lfs pull",
    ),
    "JSON": (lambda p: p.write_text(json.dumps({"message": "Not Found"})), "is text ('{\"message\": \"Not Found\"}'"),
    "nothing": (lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
    "noise": (lambda p: p.write_bytes(bytes(range(140, 250)) * 9), "is no checkpoint (it begins"),
    "a zip cut off": (lambda p: cut(p, 0.6), "a zip without its end"),
    "an old file cut off": (lambda p: cut(p, 0.5, legacy), "cannot be read"),
    "a zip of something": (lambda p: zipped(p, readme__txt=b"x", model__pth=b"y"), "unpack it first"),
    "arrays of numpy": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "pass dict(numpy.load(path))"),
    "one array": (lambda p: np.save(p.open("wb"), np.ones(2)), "a single numpy array"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "compressed with gzip: unpack"),
    "a tar": (tarred, "a tar archive"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(80)), "an HDF5 file"),
    "ONNX": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(60)), "an ONNX model"),
    "TorchScript": (scripted, "a TorchScript archive: pass torch.jit.load(path)"),
    "torch.export": (exported, "an archive of torch.export"),
    "a pickle of Paddle": (lambda p: pickle.dump(ARRAYS, p.open("wb"), protocol=2), "a pickle of numpy arrays"),
    "a newer pickle of arrays": (lambda p: pickle.dump(ARRAYS, p.open("wb"), protocol=5), "a pickle of numpy arrays"),
    "a pickle without arrays": (lambda p: pickle.dump({"a": 1}, p.open("wb")), "a pickle that torch.save did not"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "holds a list, not a state dict"),
    "safetensors cut off": (
        lambda p: (checkpoints.save({"w": torch.ones(900)}, p.with_suffix(".safetensors")),
                   p.write_bytes(p.with_suffix(".safetensors").read_bytes()[:500])),
        "a damaged safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path, block) -> None:
    make, expected = NOT_CHECKPOINTS[kind]
    path = tmp_path / "file.pth"
    make(path)
    before = block.gamma.item()
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        with pytest.raises(ValueError) as error:
            checkpoints.load(block, source)
        message = str(error.value)
        assert expected in message and message.startswith("checkpoints.read: ")
        assert "\n" not in message and "\033" not in message and "weights_only" not in message
        assert len(message) < 400
    assert block.gamma.item() == before


def test_an_html_page_under_the_name_of_safetensors(tmp_path, block) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match="HTML"):
        checkpoints.load(block, path)
    path.write_bytes(bytes(range(140, 250)))
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoints.load(block, path)


@pytest.mark.parametrize("save", [torch.save, legacy], ids=["zip", "legacy"])
def test_the_classes_of_a_pickle_are_named(save, tmp_path, block) -> None:
    path = tmp_path / "run.pth"
    saved = {
        "state_dict": block.state_dict(),
        "mean": RunningMean(),
        "iou": np.float64(0.7),
        "at": pathlib.PurePosixPath("a"),
    }
    save(saved, path)
    with pytest.raises(ValueError) as error:
        checkpoints.load(nn.PositionAttention(16), path)
    message = str(error.value)
    for name in ("test_checkpoints_files.RunningMean", "numpy", "pathlib.PurePosixPath", "weights_only=False"):
        assert name in message
    assert "\n" not in message and "_rebuild_tensor" not in message and "OrderedDict" not in message
    other = nn.PositionAttention(16)
    assert checkpoints.load(other, checkpoints.read(path, weights_only=False)).complete
    assert torch.equal(other.key_conv.weight, block.key_conv.weight)


def test_a_pickled_module(tmp_path) -> None:
    net = randomise(Net())
    path = tmp_path / "whole.pth"
    torch.save(net, path)
    other = nn.PositionAttention(16)
    with pytest.raises(ValueError, match=r"a pickled module, .*test_checkpoints_files\.Net") as error:
        checkpoints.load(other, path)
    assert "module.state_dict()" in str(error.value)
    checkpoints.load(other, checkpoints.read(path, weights_only=False))
    assert torch.equal(other.value_conv.weight, net.attention.value_conv.weight)
    torch.save({"model": net, "epoch": 3}, path)
    assert checkpoints.load(other, checkpoints.read(path, weights_only=False)).complete


def test_a_pickled_module_whose_class_is_gone(tmp_path, monkeypatch) -> None:
    path = tmp_path / "whole.pth"
    torch.save(Net(), path)
    monkeypatch.delitem(globals(), "Net")
    with pytest.raises(ValueError, match=r"cannot be read: AttributeError: .*Net"):
        checkpoints.read(path, weights_only=False)


def test_classes_that_the_user_allows_are_not_refused(tmp_path, block) -> None:
    path = tmp_path / "run.pth"
    torch.save({"state_dict": block.state_dict(), "at": OrderedDict(a=1), "mean": RunningMean()}, path)
    with torch.serialization.safe_globals([RunningMean]):
        assert checkpoints.load(nn.PositionAttention(16), path).complete


def test_safetensors_by_content(tmp_path, block) -> None:
    checkpoints.save(block.state_dict(), tmp_path / "a.SafeTensors")  # the suffix in any case writes safetensors
    assert (tmp_path / "a.SafeTensors").read_bytes()[8:9] == b"{"
    shutil.copy(tmp_path / "a.SafeTensors", tmp_path / "pytorch_model.bin")
    for source in (tmp_path / "a.SafeTensors", tmp_path / "pytorch_model.bin", (tmp_path / "a.SafeTensors").open("rb")):
        other = nn.PositionAttention(16)
        assert checkpoints.load(other, source).complete
        assert torch.equal(other.query_conv.weight, block.query_conv.weight)


@pytest.mark.parametrize("save", [torch.save, legacy], ids=["zip", "legacy"])
def test_file_objects(save, tmp_path, block) -> None:
    save(block.state_dict(), tmp_path / "a.pth")
    with (tmp_path / "a.pth").open("rb") as opened:
        for file in (io.BytesIO((tmp_path / "a.pth").read_bytes()), opened):
            assert checkpoints.load(nn.PositionAttention(16), file).complete


def test_sources_of_other_types(tmp_path, block) -> None:
    with pytest.raises(TypeError, match="open in binary mode"):
        checkpoints.load(block, io.StringIO("text"))
    for source in (b"bytes", 3, [block.state_dict()], None):
        with pytest.raises(TypeError, match=f"load also takes a mapping or a module \\(got {type(source).__name__}"):
            checkpoints.load(block, source)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module \(got dict\)"):
        checkpoints.load(dict(block.state_dict()), block)
    with pytest.raises(ValueError, match="is an address, not a file: download it first"):
        checkpoints.load(block, "https://example.org/danet.pth")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(block, tmp_path / "none.pth")
    with pytest.raises(TypeError, match="state must be a mapping of names to tensors"):
        checkpoints.save(block, tmp_path / "a.pth")


def test_directories(tmp_path, block) -> None:
    def message() -> str:
        with pytest.raises(ValueError) as error:
            checkpoints.load(block, tmp_path)
        return str(error.value)

    assert "a directory: name a file in it (it is empty)" in message()
    (tmp_path / "model.safetensors").touch()
    assert "name a file in it (model.safetensors)" in message()
    (tmp_path / "zero_to_fp32.py").touch()
    assert "DeepSpeed" in message()
    (tmp_path / ".metadata").touch()
    assert "dcp_to_torch_save" in message()


def test_what_holds_no_weights(block) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="the state of an optimizer, not of a model"):
        checkpoints.load(block, optimizer.state_dict())
    with pytest.raises(ValueError, match=r"no state dict found: .* with keys epoch"):
        checkpoints.load(block, {"epoch": 3, "optimizer": optimizer.state_dict()})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_usable_values(block, tmp_path) -> None:
    state = block.state_dict()
    with pytest.raises(ValueError, match="of PositionAttention is on the meta device, .*to_empty"):
        checkpoints.load(nn.PositionAttention(16).to("meta"), state)
    with pytest.raises(ValueError, match="of the checkpoint is on the meta device"):
        checkpoints.load(block, {name: value.to("meta") for name, value in state.items()})
    with pytest.raises(ValueError, match="on the meta device"):
        checkpoints.save({name: value.to("meta") for name, value in state.items()}, tmp_path / "a.pth")
    quantized = torch.quantize_per_tensor(state["key_conv.weight"], 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"key_conv\.weight of the checkpoint is quantized \(torch\.qint8\)"):
        checkpoints.load(block, {**state, "key_conv.weight": quantized})
    with pytest.raises(ValueError, match=r"key_conv\.weight of the checkpoint is sparse"):
        checkpoints.load(block, {**state, "key_conv.weight": state["key_conv.weight"].to_sparse()})
    for value in (torch.nan, torch.inf):
        with pytest.warns(UserWarning, match="NaN or infinite values in key_conv.bias$"):
            checkpoints.load(nn.PositionAttention(16), {**state, "key_conv.bias": torch.full((2,), value)})
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match=rf"key_conv\.weight torch\.float32, in the checkpoint {dtype}"):
            checkpoints.load(block, {**state, "key_conv.weight": state["key_conv.weight"].to(dtype)})


def test_values_that_float16_does_not_hold(block) -> None:
    state = {**block.state_dict(), "value_conv.bias": torch.full((16,), 1e5)}
    report = checkpoints.load(nn.PositionAttention(16).half(), state)
    assert report.notes == ["values above 65504 become infinite in float16: value_conv.bias"]
    assert checkpoints.load(nn.PositionAttention(16), state).notes == []
