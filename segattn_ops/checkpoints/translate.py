"""Recognises the layout of a state dict from its keys, and translates it into ours."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .names import AUXILIARY, BLOCKS, HEADS, IGNORED, STAGES, STEMS, WRAPPERS, Naming, Pairs

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recognised:
    """Layout of a state dict.

    Attributes:
        system: danet, ccnet, ann, non_local, dfn; a block (position, channel, criss_cross, query_key_value for the
            official position and criss-cross blocks, which have the same names, non_local_block, apnb, afnb,
            da_module, ...); or backbone for a ResNet alone.
        format: official, mmsegmentation, mmcv, tramac, alexhex7, timm, external-attention, segattn_ops or torchvision.
        prefix: of the head's or block's names.
        stem: of the backbone, as :func:`segattn_ops.models.dilated_resnet` names it; None without a backbone.
    """

    system: str
    format: str
    prefix: str = ""
    stem: str | None = None


@dataclass
class Translation:
    """A state dict in our names: ``classifier.``, ``backbone.``, ``aux_classifier.`` for heads, plain for blocks.

    Attributes:
        recognised: the layout it came in.
        state: tensors by our names.
        source: the checkpoint's name for each of ours.
        unknown: names of the checkpoint that have no place in the layout.
        ignored: names that the network does not use (the ImageNet classifier).
    """

    recognised: Recognised
    state: State
    source: dict[str, str]
    unknown: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def unwrap(checkpoint: Any) -> State:
    """The state dict inside a checkpoint: itself, or under one of the usual keys; wrappers' prefixes removed.

    Raises:
        ValueError: if there is none.
    """
    for _ in range(3):
        if not isinstance(checkpoint, Mapping):
            break
        if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
            return _strip_wrappers(dict(checkpoint))
        inner = [key for key in ("state_dict", "model_state_dict", "model", "net", "module") if key in checkpoint]
        if not inner:
            break
        checkpoint = checkpoint[inner[0]]
    raise ValueError(
        "checkpoints: no state dict found: expected a mapping of names to tensors, alone or under 'state_dict' or "
        f"'model' (got {type(checkpoint).__name__}"
        + (f" with keys {', '.join(map(str, list(checkpoint)[:5]))})" if isinstance(checkpoint, Mapping) else ")")
    )


def _strip_wrappers(state: State) -> State:
    """Removes ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile) and ``model.`` where every key has it."""
    while state:
        prefix = next((p for p in WRAPPERS if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def rename(key: str, pairs: Pairs) -> str | None:
    """``key`` with the longest matching left side of ``pairs`` replaced by its right side; None if none matches."""
    best: tuple[int, str] | None = None
    for theirs, ours in pairs:
        pattern = re.escape(theirs).replace(r"\#", r"(\d+)").replace("#", r"(\d+)")
        match = re.match(rf"{pattern}(?=\.|$)", key)
        if match and (best is None or match.end() > best[0]):
            for number in match.groups():
                ours = ours.replace("#", number, 1)
            best = match.end(), ours + key[match.end() :]
    return None if best is None else best[1]


def _has(keys: Iterable[str], name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in keys)


def _prefixes(keys: Iterable[str], name: str) -> list[str]:
    """Prefixes under which ``name`` is a parameter or the stem of one, shortest first."""
    pattern = re.compile(rf"^((?:.*\.)?){re.escape(name)}(?:\.(?:weight|bias))?$")
    return sorted({m.group(1) for key in keys if (m := pattern.match(key))}, key=len)


def _find(keys: list[str], naming: Naming) -> str | None:
    """The prefix under which a layout's anchors all are, if there is just one such prefix."""
    found = [
        prefix
        for prefix in _prefixes(keys, naming.anchors[0])
        if all(prefix in _prefixes(keys, anchor) for anchor in naming.anchors[1:])
        and not any(_has(keys, prefix + name) for name in naming.absent)
    ]
    return found[0] if len(found) == 1 else None


def _backbone(keys: Iterable[str]) -> tuple[str, str] | None:
    """Prefix and stem of the ResNet among the keys."""
    keys = set(keys)
    for prefix in _prefixes(keys, "layer1.0.conv1"):
        if f"{prefix}layer4.0.conv1.weight" not in keys:
            continue
        for stem, mark in (("v1c", "stem.0.weight"), ("deep", "conv1.0.weight"), ("ccnet", "conv3.weight")):
            if prefix + mark in keys:
                return prefix, stem
        if f"{prefix}conv1.weight" in keys:
            return prefix, "torchvision"
    return None


def recognise(state: Mapping[str, Any]) -> Recognised:
    """Identifies the layout of a state dict (or of the one inside a checkpoint) from its keys.

    Raises:
        ValueError: if no layout fits; the message lists the first keys and the layouts known.
    """
    return _recognise(unwrap(state))[0]


def _recognise(state: State) -> tuple[Recognised, Naming | None]:
    keys = list(state)
    backbone = _backbone(keys)
    stem = None if backbone is None else backbone[1]
    for naming in (*HEADS, *BLOCKS):
        prefix = _find(keys, naming)
        if prefix is None or not _fits(naming, state, prefix):
            continue
        ours = naming.head and naming.format == "official" and prefix == "classifier."
        return Recognised(naming.system, "segattn_ops" if ours else naming.format, prefix, stem), naming
    if backbone is not None:
        return Recognised("backbone", "torchvision", backbone[0], stem), None
    known = sorted({f"{naming.format} {naming.system}" for naming in (*HEADS, *BLOCKS)})
    raise ValueError(
        f"checkpoints: the layout of this state dict is not known (its keys begin {', '.join(keys[:4])}); known are "
        f"{', '.join(known)}"
    )


def _fits(naming: Naming, state: State, prefix: str) -> bool:
    """Distinctions that names alone do not make. mmsegmentation's APNB and AFNB have the same names, but APNB's query
    and key are one module, stored twice. A gamma is a channel attention block only if nothing is stored beside it."""
    if naming.system == "channel":
        return sum(key.startswith(prefix) for key in state) == 1
    if naming.system not in ("afnb", "apnb"):
        return True
    query, key = (
        ("query_project.conv", "key_project.conv") if naming.format == "mmsegmentation" else ("f_query.0", "f_key.0")
    )
    q, k = (state.get(f"{prefix}stages.0.{name}.weight") for name in (query, key))
    shared = q is not None and k is not None and q.shape == k.shape and torch.equal(q, k)
    return shared == (naming.system == "apnb")


def to_native(checkpoint: Mapping[str, Any]) -> Translation:
    """Translates a checkpoint of any known layout into our names.

    Names only; :func:`~segattn_ops.checkpoints.load` fits the tensors to a module.

    Raises:
        ValueError: if there is no state dict in it, or its layout is not known.
    """
    state = unwrap(checkpoint)
    recognised, naming = _recognise(state)
    result = Translation(recognised, {}, {})
    backbone = _backbone(state)
    for key, value in state.items():
        name = _native_name(key, recognised, naming, backbone)
        if name is not None:
            result.state[name] = value
            result.source[name] = key
        elif any(re.fullmatch(pattern, key) for pattern in IGNORED):
            result.ignored.append(key)
        else:
            result.unknown.append(key)
    return result


def _native_name(
    key: str, recognised: Recognised, naming: Naming | None, backbone: tuple[str, str] | None
) -> str | None:
    if naming is not None and key.startswith(recognised.prefix):
        name = rename(key[len(recognised.prefix) :], naming.pairs)
        if name is not None:
            return f"classifier.{name}" if naming.head else name
    for prefix, pairs in AUXILIARY.items():
        if key.startswith(prefix):
            name = rename(key[len(prefix) :], pairs)
            if name is not None:
                return f"aux_classifier.{name}"
    if backbone is not None and key.startswith(backbone[0]):
        name = rename(key[len(backbone[0]) :], (*STEMS[backbone[1]], *STAGES))
        if name is not None:
            return f"backbone.{name}"
    return None
