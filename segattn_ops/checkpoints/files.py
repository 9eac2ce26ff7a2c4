"""Reads and writes checkpoint files without running pickled code."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAFETENSORS = "segattn_ops.checkpoints needs safetensors for .safetensors files: pip install safetensors"


def read(path: str | os.PathLike[str], weights_only: bool = True) -> Mapping[str, Any]:
    """Reads a checkpoint onto the CPU: ``.safetensors``, or what ``torch.save`` wrote.

    Args:
        path: the file.
        weights_only: refuse pickled objects other than tensors and plain containers. Pass False only for a file whose
            author you trust as much as the author of a program you run: unpickling runs code.

    Raises:
        ValueError: if the file has objects that need unpickling, naming them, and how to allow it.
        ImportError: for a .safetensors file without the package.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(_SAFETENSORS) from error
        return load_file(path)
    try:
        checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only)
        return checkpoint
    except Exception as error:
        if weights_only and "weights_only" in str(error).lower():
            raise ValueError(
                f"checkpoints.read: {path} has pickled objects beyond tensors ({str(error).splitlines()[0]}). "
                "If you trust its author: checkpoints.read(path, weights_only=False)"
            ) from error
        raise


def save(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state dict: safetensors if the name ends in .safetensors, else by ``torch.save``.

    Raises:
        ImportError: for a .safetensors file without the package.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix != ".safetensors":
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
