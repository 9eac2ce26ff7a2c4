"""Reads and writes checkpoint files without running pickled code."""

import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from .._files import bounded, replacing, shown
from .formats import HEADER, directory, is_numpy, is_safetensors, pickled, refusal
from .unpickle import Damaged, Foreign, read_archive, read_old

Source = str | os.PathLike[str] | IO[bytes]

_SAFETENSORS = "segattn_ops.checkpoints needs safetensors for .safetensors files: pip install safetensors"


def read(path: Source, weights_only: bool = True) -> Mapping[str, Any]:
    """Reads a checkpoint onto the CPU: safetensors (known by its content), or what ``torch.save`` wrote.

    Nothing that the file names is called, and a file from anywhere takes no more memory than 24 times its size and
    256 MiB, whatever it says of the sizes of its tensors; one that ``torch.save`` wrote takes its own size. Classes
    that you allow by ``torch.serialization.add_safe_globals`` are called by ``torch.load``, after the rest of the file
    has been checked so.

    Args:
        path: the file (regular, or a link to one: a pipe could be waited for without end), or a file object open in
            binary mode, which is read to its end.
        weights_only: refuse pickled objects other than tensors and plain containers. Pass False only for a file whose
            author you trust as much as the author of a program you run: unpickling runs code, and takes any amount of
            memory.

    Returns:
        The mapping in the file. A pickled module, with ``weights_only=False``, is replaced by its state dict.

    Raises:
        TypeError: if ``path`` is neither a path nor a binary file.
        FileNotFoundError, PermissionError, OSError: if there is no such file, or it cannot be opened.
        ValueError: if the file is no checkpoint; the message says what it is and what to do. If it has objects that
            need unpickling; the message names their classes, and how to allow it. If it is damaged, compressed, or its
            tensors are larger than their data. If it holds sparse, quantized or nested tensors.
        ImportError: for safetensors without the package.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fsdecode(path)
        if re.match(r"https?://", text):
            raise ValueError(
                f"checkpoints.read: {shown(text)} is an address, not a file: download it first, or pass "
                "torch.hub.load_state_dict_from_url(...)"
            )
        if "\0" in text:
            raise ValueError(f"checkpoints.read: {shown(text)} is no path: it has a null character")
        if os.path.isdir(text):
            raise ValueError(f"checkpoints.read: {shown(text)} is {directory(Path(text))}")
        if os.path.exists(text) and not os.path.isfile(text):
            raise ValueError(
                f"checkpoints.read: {shown(text)} is a device, a pipe or a socket, not a file: pass a file object open "
                "in binary mode"
            )
        with open(text, "rb") as file:
            return _read(file, text, weights_only)
    if not hasattr(path, "read"):
        raise TypeError(
            "checkpoints.read: path must be a path or a file open in binary mode; load also takes a mapping or a "
            f"module (got {type(path).__name__})"
        )
    content = path.read()
    if not isinstance(content, bytes):
        raise TypeError("checkpoints.read: the file must be open in binary mode, open(path, 'rb') (got text)")
    return _read(io.BytesIO(content), str(getattr(path, "name", "the file object")), weights_only)


def _read(file: IO[bytes], name: str, weights_only: bool) -> Mapping[str, Any]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = file.read(HEADER)
    if is_safetensors(header):
        return _read_safetensors(file, name)
    if problem := refusal(header, file, size, name):
        raise ValueError(bounded(f"checkpoints.read: {shown(name)} is {problem}"))
    archive = header.startswith(b"PK")
    try:
        checkpoint = _read_weights(file, size, archive) if weights_only else _read_anything(file, weights_only)
    except Damaged as error:
        raise ValueError(f"checkpoints.read: {shown(name)} {_damaged(error, file, archive, header)}") from error
    except Exception as error:
        reason = _unreadable(error, pickled(file), archive, weights_only, header)
        raise ValueError(f"checkpoints.read: {shown(name)} {reason}") from error
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"checkpoints.read: {shown(name)} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def _read_anything(file: IO[bytes], weights_only: bool) -> Any:
    file.seek(0)
    with warnings.catch_warnings():  # of another pickle protocol than torch.save's
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _read_weights(file: IO[bytes], size: int, archive: bool) -> Any:
    """By our own reader; by torch's where the file has classes that the caller allows, after ours has looked past
    them."""
    read = read_archive if archive else read_old
    try:
        return read(file, size)
    except Foreign as error:
        names = (of[1] if isinstance(of, tuple) else of for of in torch.serialization.get_safe_globals())
        allowed = {" ".join(_path_of(name)) for name in names}
        if str(error) not in allowed:
            raise
        read(file, size, allowed)
    return _read_anything(file, weights_only=True)


def _path_of(allowed: Any) -> tuple[str, str]:
    """The module and the name of what torch.serialization.add_safe_globals was given."""
    if isinstance(allowed, str):
        module, _, name = allowed.rpartition(".")
        return module, name
    return allowed.__module__, allowed.__qualname__


def _damaged(error: Damaged, file: IO[bytes], archive: bool, header: bytes) -> str:
    """What our reader says; for a file without pickles, or with those of another program, that."""
    if archive:
        return str(error)
    classes = pickled(file)
    if classes is None or is_numpy(classes) or not classes and "torch.save did not" in str(error):
        return _unreadable(error, classes, archive, True, header)
    return str(error)


def _unreadable(error: Exception, classes: list[str] | None, archive: bool, weights_only: bool, header: bytes) -> str:
    """Why torch.load failed, and what to do, from the classes that the pickle wants."""
    if classes is None:
        return (
            f"is no checkpoint (it begins {header[:8]!r}): perhaps it is damaged, or of another framework; download it "
            "again"
        )
    if not archive and is_numpy(classes):
        return (
            "is a pickle of numpy arrays (Paddle's .pdparams are, under names of their own), whose unpickling may run "
            "code: if you trust its author, read it with pickle.load and pass the dictionary"
        )
    if not archive and not classes:
        return (
            "cannot be read: it is cut off, or a pickle that torch.save did not write; download it again, or if you "
            "trust its author, read it with pickle.load and pass the dictionary"
        )
    if isinstance(error, Foreign) and not classes:
        return f"cannot be read: it needs {shown(error)}, which a state dict of dense tensors does not need"
    if not weights_only or not classes:
        return f"cannot be read: {_sentence(error)}"
    listed = ", ".join(shown(name, 120) for name in classes[:8])
    listed += f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    if any(name.startswith("torch.nn.modules.") for name in classes):
        return (
            f"is a pickled module, not a state dict, and needs its classes ({listed}), whose unpickling may run code: "
            "save module.state_dict() instead, or if you trust its author, pass "
            "checkpoints.read(path, weights_only=False)"
        )
    return (
        f"has pickled objects beyond tensors, whose unpickling may run code ({listed}): if you trust its author, pass "
        "checkpoints.read(path, weights_only=False)"
    )


def _sentence(error: Exception) -> str:
    """The first line of an error, without terminal codes and advice on torch.load."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    text = re.sub(r"(?s)^Weights only load failed\..*?(WeightsUnpickler error: |$)", "", text)
    return shown(f"{type(error).__name__}: {(text.splitlines() or [''])[0]}")


def _read_safetensors(file: IO[bytes], name: str) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ImportError(_SAFETENSORS) from error
    file.seek(0)
    try:
        return load(file.read()) if isinstance(file, io.BytesIO) else load_file(name)
    except Exception as error:  # SafetensorError, and KeyError and others for dtypes that torch does not have
        raise ValueError(
            f"checkpoints.read: {shown(name)} is a damaged safetensors file ({_sentence(error)}): download it again"
        ) from error


def save(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state dict: safetensors if the name ends in .safetensors, else by ``torch.save``.

    The file is whole or absent: an earlier one of this name stays as it is until the new one is on the disk.

    Raises:
        TypeError: if ``state`` is not a mapping of names to tensors.
        ValueError: for tensors on the meta device, which holds no values.
        ImportError: for a .safetensors file without the package.
        OSError: if it cannot be written (a full disk).
    """
    path = Path(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(
            "checkpoints.save: state must be a mapping of names to tensors, such as module.state_dict() (got "
            f"{type(state).__name__})"
        )
    if meta := [name for name, value in state.items() if value.is_meta]:
        raise ValueError(f"checkpoints.save: {meta[0]} is on the meta device, which holds no values")
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix.lower() != ".safetensors":
        save_whole(tensors, path)
        return
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(_SAFETENSORS) from error
    seen: set[int] = set()
    for name, value in tensors.items():  # safetensors takes no two names for one storage (APNB's f_key and f_query)
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    with replacing(path) as part:
        try:
            save_file(tensors, part)
        except SafetensorError as error:  # it has no OSError
            raise OSError(f"checkpoints.save: {shown(path)} cannot be written ({_sentence(error)})") from error


def save_whole(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save``, to a file that is whole or absent.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as part, open(part, "wb") as file:
        writer = _Writer(file)
        try:
            torch.save(content, cast(IO[bytes], writer))
        except RuntimeError as error:  # of torch's zip writer, whatever the file raised
            raise writer.error or error from None
        if writer.error is not None:
            raise writer.error


class _Writer:
    """A file that keeps the error of a write: torch's zip writer, which is C++, goes on to an error of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()
