"""Finds the tensors of a model in whatever a training script saved around them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._files import shown

State = dict[str, Tensor]

# Entries beside a model's weights that hold tensors too: optimizers, schedulers, loss scalers, callbacks, metadata.
_NOT_WEIGHTS = re.compile(
    r"optims?|.*optimizer.*|.*sched.*|.*scaler.*|callbacks|loops|meta|message_hub|rng.*|.*_rng.*|param_groups|amp"
)
# Wrappers inside names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DEPTH = 4
# What no state dict of a network reaches, so that hostile ones (a mapping that contains itself a thousand times, a name
# of a megabyte) end in an error instead of taking all memory or hours.
_ENTRIES, _TENSORS, _NAME = 1_000_000, 50_000, 500


def unwrap(checkpoint: Any, prefix: str | None = None) -> tuple[State, list[str]]:
    """The tensors of a checkpoint by name, and remarks.

    Args:
        checkpoint: a state dict, a mapping around one or several, or a module.
        prefix: keep the names that begin so ("student" as "student."), without it; of the names in the state dict or,
            for several state dicts in one file, of its entries. "" keeps what
            :func:`~segattn_ops.checkpoints.recognise` calls "".

    Raises:
        TypeError: if it is neither a mapping nor a module.
        ValueError: if there are no tensors in it, none of the prefix, or two copies of the weights and no prefix; if
            a name has more than 500 characters or unprintable ones; for more than 50,000 tensors or 1,000,000 entries.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"checkpoints: prefix must be a string or None (got {type(prefix).__name__})")
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            "checkpoints: expected a module or a mapping of names to tensors, alone or under 'state_dict' or 'model' "
            f"(got {type(checkpoint).__name__})"
        )
    entries: dict[str, State] = {}
    _collect(checkpoint, "", 0, entries, [_ENTRIES, _TENSORS])
    if not entries:
        raise ValueError(f"checkpoints: {_nothing(checkpoint)}")
    notes: list[str] = []
    inner = [entry for entry in entries if entry]
    if inner and all(value.numel() <= 1 for value in entries.get("", {}).values()):
        entries.pop("", None)  # a best score beside the weights
    averaged = entries.get("ema_state_dict.", {})
    # mmengine's counts its steps, and swaps the two before it saves.
    if "steps" in averaged and "state_dict." in entries and not (prefix or "").startswith("ema_state_dict"):
        del entries["ema_state_dict."]
        notes.append(
            "state_dict is loaded, in which mmengine stores the average; prefix='ema_state_dict.' loads the weights "
            "without averaging"
        )
    whole = {entry + name: value for entry, state in entries.items() for name, value in state.items()}
    state = next(iter(entries.values())) if len(entries) == 1 else whole
    if prefix:
        state = _of_prefix(state, prefix) or _of_prefix(whole, prefix)
        if not state:
            raise ValueError(
                f"checkpoints: no name begins with prefix {prefix!r} (they begin {', '.join(_beginnings(whole))})"
            )
        return state, notes
    return _without_flat_copies(state, prefix), notes


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, torch.compile or an averaged copy."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and not module._parameters and list(module._modules) == ["module"]:
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _collect(value: Mapping[Any, Any], path: str, depth: int, entries: dict[str, State], left: list[int]) -> None:
    """Adds the tensors of ``value`` to ``entries``, those of a mapping inside it under its path.

    Args:
        left: how many entries and tensors more are taken.

    Raises:
        ValueError: if two names are the same without those of wrappers; for the limits of :func:`unwrap`.
    """
    import numpy as np  # here: the Hugging Face build may import torch alone

    for key, item in value.items():
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"checkpoints: there are more than {_ENTRIES} entries in its nested mappings")
        if not isinstance(key, str):
            continue
        if isinstance(item, nn.Module):
            item = item.state_dict()
        if isinstance(item, np.ndarray) and item.dtype.kind in "fiub":
            item = torch.from_numpy(item.copy())
        if isinstance(item, Tensor):
            _require_name(path + key)
            left[1] -= 1
            if left[1] < 0:
                raise ValueError(f"checkpoints: there are more than {_TENSORS} tensors, more than a network has")
            name, state = _WRAPPERS.sub("", key), entries.setdefault(path, {})
            if name in state:
                raise ValueError(
                    f"checkpoints: there are two tensors for {path}{name}, with and without the names of wrappers "
                    f"({key}); remove one of the copies"
                )
            state[name] = item
        elif isinstance(item, Mapping) and depth < _DEPTH:
            start = key[: _NAME + 1]  # of a longer name: too long for the tensors in it
            if not _NOT_WEIGHTS.fullmatch(start.lower()):
                _collect(item, f"{path}{start}.", depth + 1, entries, left)


def _require_name(name: str) -> None:
    if len(name) > _NAME or not name.isprintable():
        raise ValueError(
            f"checkpoints: a name must have at most {_NAME} characters, all of them printable (got {shown(name, 80)!r})"
        )


def _nothing(checkpoint: Mapping[Any, Any]) -> str:
    keys = ", ".join(shown(key, 80) for key in list(checkpoint)[:5]) or "none"
    if "param_groups" in checkpoint:
        return f"this is the state of an optimizer, not of a model (its keys are {keys})"
    return (
        "no state dict found: expected a mapping of names to tensors, alone or under 'state_dict' or 'model' (got a "
        f"{type(checkpoint).__name__} with keys {keys})"
    )


def _beginnings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] + "." * ("." in name) for name in names))[:8]


def _of_prefix(state: State, prefix: str) -> State:
    """The names with the prefix, without it. "student" means "student.", never "student2."."""
    if prefix == "ema_" and (copies := _flat_copies(state)):
        return {name: state[copies.get(name, name)] for name in state if name not in set(copies.values())}
    for start in (f"{prefix}.",) if prefix[-1].isalnum() else (prefix, f"{prefix}."):
        found = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
        if found:
            return found
    return {}


def _flat_copies(state: State) -> dict[str, str]:
    """Names of parameters and of their copies ``ema_backbone_conv1_weight``, which mmcv's EMAHook registers."""
    flat = {name: f"ema_{name.replace('.', '_')}" for name in state if "." in name}
    return {name: copy for name, copy in flat.items() if copy in state}


def _without_flat_copies(state: State, prefix: str | None) -> State:
    copies = set(_flat_copies(state).values())
    if not copies:
        return state
    if prefix is None:
        raise ValueError(
            "checkpoints: there are two copies of the weights, the plain names and ema_* (mmcv's EMAHook swaps them "
            "while it evaluates, so the file does not say which is the average); choose with prefix='' or prefix='ema_'"
        )
    return {name: value for name, value in state.items() if name not in copies}
