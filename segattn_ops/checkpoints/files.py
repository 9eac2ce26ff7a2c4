"""Reads and writes checkpoint files without running pickled code."""

import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .formats import HEADER, directory, is_numpy, is_safetensors, pickled, refusal

Source = str | os.PathLike[str] | IO[bytes]

_SAFETENSORS = "segattn_ops.checkpoints needs safetensors for .safetensors files: pip install safetensors"


def read(path: Source, weights_only: bool = True) -> Mapping[str, Any]:
    """Reads a checkpoint onto the CPU: safetensors (known by its content), or what ``torch.save`` wrote.

    Args:
        path: the file, or a file object open in binary mode.
        weights_only: refuse pickled objects other than tensors and plain containers. Pass False only for a file whose
            author you trust as much as the author of a program you run: unpickling runs code.

    Returns:
        The mapping in the file. A pickled module, with ``weights_only=False``, is replaced by its state dict.

    Raises:
        TypeError: if ``path`` is neither a path nor a binary file.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint; the message says what it is and what to do. If it has objects that
            need unpickling; the message names their classes, and how to allow it.
        ImportError: for safetensors without the package.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if re.match(r"https?://", text):
            raise ValueError(
                f"checkpoints.read: {text} is an address, not a file: download it first, or pass "
                "torch.hub.load_state_dict_from_url(...)"
            )
        if os.path.isdir(text):
            raise ValueError(f"checkpoints.read: {text} is {directory(Path(text))}")
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
        raise ValueError(f"checkpoints.read: {name} is {problem}")
    file.seek(0)
    try:
        with warnings.catch_warnings():  # of another pickle protocol than torch.save's
            warnings.simplefilter("ignore", UserWarning)
            checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        archive = header.startswith(b"PK")
        raise ValueError(
            f"checkpoints.read: {name} {_unreadable(error, pickled(file), archive, weights_only, header)}"
        ) from error
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"checkpoints.read: {name} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


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
    if not weights_only or not classes:
        return f"cannot be read: {_sentence(error)}"
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    if any(name.startswith("torch.nn.modules.") for name in classes):
        return (
            f"is a pickled module, not a state dict, and needs its classes ({shown}), whose unpickling may run code: "
            "save module.state_dict() instead, or if you trust its author, pass "
            "checkpoints.read(path, weights_only=False)"
        )
    return (
        f"has pickled objects beyond tensors, whose unpickling may run code ({shown}): if you trust its author, pass "
        "checkpoints.read(path, weights_only=False)"
    )


def _sentence(error: Exception) -> str:
    """The first line of an error, without terminal codes and advice on torch.load."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    text = re.sub(r"(?s)^Weights only load failed\..*?(WeightsUnpickler error: |$)", "", text)
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"


def _read_safetensors(file: IO[bytes], name: str) -> Mapping[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ImportError(_SAFETENSORS) from error
    file.seek(0)
    try:
        return load(file.read()) if isinstance(file, io.BytesIO) else load_file(name)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoints.read: {name} is a damaged safetensors file ({_sentence(error)}): download it again"
        ) from error


def save(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state dict: safetensors if the name ends in .safetensors, else by ``torch.save``.

    Raises:
        TypeError: if ``state`` is not a mapping of names to tensors.
        ValueError: for tensors on the meta device, which holds no values.
        ImportError: for a .safetensors file without the package.
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
        torch.save(tensors, path)
        return
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(_SAFETENSORS) from error
    seen: set[int] = set()
    for name, value in tensors.items():  # safetensors takes no two names for one storage (APNB's f_key and f_query)
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    save_file(tensors, path)
