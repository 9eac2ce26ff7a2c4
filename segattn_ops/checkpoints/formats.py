"""Says what a file is that is no checkpoint, and what to do about it."""

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from .._files import shown
from .unpickle import Window, check_archive

HEADER = 256  # bytes that tell the kinds apart
_AGAIN = "download it again"
# What a state dict of torch.save needs, which the safe unpickler allows.
_TENSORS = re.compile(
    r"torch\._utils\..*|torch\.\w*Storage|torch\.storage\..*|torch\.(nn\.parameter\.)?Parameter|"
    r"torch\.(Size|device|[a-z]+\d+)|torch\._tensor\..*|collections\.OrderedDict|_codecs\.encode|"
    r"(__builtin__|builtins)\.(set|complex|bytearray)"
)
_NUMPY = re.compile(
    r"numpy(\.\w+)*\.(_reconstruct|_frombuffer|scalar|ndarray|dtype)|_codecs\.encode|collections\.OrderedDict"
)
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras writes its weights so), which is not read here: convert it with its framework"),
    (b"\x93NUMPY", "a single numpy array, not a state dict"),
    (b"%PDF", f"a PDF document, not a checkpoint: {_AGAIN}"),
    (b"\x89PNG", "a picture, not a checkpoint"),
    (b"\xff\xd8\xff", "a picture, not a checkpoint"),
)


def refusal(header: bytes, file: IO[bytes], size: int, name: str) -> str | None:
    """What is wrong with a file, as the end of a sentence "this is ..."; None if it may be a checkpoint.

    Args:
        header: its first bytes.
        file: open at its start.
        size: in bytes.
        name: of the file, for kinds without a mark of their own.
    """
    if size == 0:
        return f"empty (0 bytes): {_AGAIN}"
    for start, text in _STARTS:
        if header.startswith(start):
            return text
    if header.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"an HTML or XML page, perhaps the error page of a failed download: {_AGAIN}"
    if header.startswith(b"PK\x03\x04"):
        return _archive(file, size)
    if _is_tar(file):
        return "a tar archive (or a checkpoint of PyTorch before 0.1.10): unpack it first"
    if name.lower().endswith(".onnx") or (header[:1] == b"\x08" and re.search(rb"pytorch|onnx|tf2onnx", header[:64])):
        return "an ONNX model, whose weights have lost the parameters' names: load the checkpoint it came from"
    if _is_text(header):
        return f"text ({header[:40].decode(errors='replace').strip()!r} ...), not a checkpoint: {_AGAIN}"
    return None


def is_safetensors(header: bytes) -> bool:
    """Whether a file begins with the length of a JSON header and the header."""
    return header[8:9] == b"{" and int.from_bytes(header[:8], "little") < 1 << 32


def _is_text(header: bytes) -> bool:
    if re.search(rb"[^\x09\x0a\x0d\x20-\xff]", header):
        return False
    try:
        header[:-4].decode()  # the end may cut a character
    except UnicodeDecodeError:
        return False
    return True


def _is_tar(file: IO[bytes]) -> bool:
    file.seek(257)
    return file.read(5) == b"ustar"


def _archive(file: IO[bytes], size: int) -> str | None:
    """For a zip, which torch.save writes, and others do."""
    file.seek(0)
    try:
        names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile:
        return f"a zip without its end, after {size} bytes: the download or the copy was cut off; {_AGAIN}"
    except Exception as error:  # zipfile raises many kinds for damaged directories
        return f"a zip with a damaged directory ({shown(type(error).__name__)}): {_AGAIN}"
    parts = [name.partition("/")[2] or name for name in names]
    if "constants.pkl" in parts:
        return "a TorchScript archive: pass torch.jit.load(path), whose state dict is taken"
    if "archive_format" in parts:
        return "an archive of torch.export: pass torch.export.load(path).state_dict"
    if "data.pkl" in parts:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of numpy arrays: pass dict(numpy.load(path))"
    held = ", ".join(shown(name, 80) for name in names[:3])
    return f"a zip that torch.save did not write (it holds {held or 'nothing'}): unpack it first"


def directory(path: Path) -> str:
    """What a directory is, as the end of a sentence."""
    files = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in files:
        return (
            "a directory of torch.distributed.checkpoint: convert it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if "zero_to_fp32.py" in files:
        return "a directory of DeepSpeed: run the zero_to_fp32.py in it, which writes one file"
    weights = [name for name in files if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt"))]
    listed = ", ".join(shown(name, 80) for name in (weights or files)[:4])
    return f"a directory: name a file in it ({listed or 'it is empty'})"


def pickled(file: IO[bytes]) -> list[str] | None:
    """The classes and functions that a pickle wants beyond tensors; None if it is no pickle. Nothing is run."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    zipped = zipfile.is_zipfile(file)
    stream: IO[bytes] | Window = Window(file, size)
    if zipped:
        try:
            archive = zipfile.ZipFile(file)
            check_archive(archive.infolist(), size)
            stream = io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
        except Exception:  # zipfile raises many kinds for damaged files
            return None
    else:
        file.seek(0)
    found: dict[str, None] = {}
    parsed = 0
    try:
        while parsed < (1 if zipped else 4):  # the old format begins with three short pickles
            for name in _globals(stream):
                found[name] = None
            parsed += 1
    except Exception:  # pickletools raises many kinds for bytes that are no pickle
        if parsed == 0:
            return None
    return [name for name in found if not _TENSORS.fullmatch(name)]


def is_numpy(names: list[str]) -> bool:
    """Whether a pickle wants nothing but what numpy arrays need."""
    return bool(names) and all(_NUMPY.fullmatch(name) for name in names)


def _globals(stream: IO[bytes] | Window) -> Iterator[str]:
    """The names that one pickle imports, in order."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    last = ""
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
            continue
        elif "BINPUT" in opcode.name:
            memo[int(argument or 0)] = last
            continue
        last = str(argument) if "UNICODE" in opcode.name or "STRING" in opcode.name else ""
        if "BINGET" in opcode.name:
            last = memo.get(int(argument or 0), "")
        if last:
            strings.append(last)
