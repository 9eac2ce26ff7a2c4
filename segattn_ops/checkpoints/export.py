"""Exports weights under the names of the official repositories and of mmsegmentation."""

import re

import torch
from torch import Tensor, nn

from ..nn import ChannelAttention, CrissCrossAttention, PositionAttention
from .names import AUXILIARY, BLOCKS, HEADS, PREFIXES, STAGES, STEMS, Naming, Pairs
from .translate import Recognised, State, _backbone, _recognise, rename

_BLOCK_CLASSES = ((PositionAttention, "position"), (ChannelAttention, "channel"), (CrissCrossAttention, "criss_cross"))


def to_official(module: nn.Module) -> State:
    """The state dict of a module under the names of its authors' repository (DANet, CCNet, ANN, dfn_seg; AlexHex7 for
    a non-local block; External-Attention for DAModule).

    Blocks and heads already have those names; a network's parts get their authors' prefixes (``pretrained.`` and
    ``head.`` for DANet), its auxiliary head CCNet's and ANN's ``dsn``, whose convolution has a bias: zero.

    Args:
        module: of :mod:`segattn_ops.nn`, or a head or network of :mod:`segattn_ops.models`.

    Returns:
        dict: names to tensors that share the module's storage.

    Raises:
        ValueError: if there is no official layout for the module or for a part of it; the message names the part.
    """
    state = module.state_dict()
    recognised, naming = _of(module, state)
    if naming is None or recognised.system == "non_local":
        raise ValueError(f"to_official: there is no official repository of {type(module).__name__}")
    if any(re.search(r"(smooth|border)_cls", name) for name in state):
        raise ValueError("to_official: dfn_seg has no smooth_cls and border_cls: it has as many channels as classes")
    if recognised.prefix != "classifier.":
        return dict(state)
    head, backbone, aux = PREFIXES[recognised.system, "official"]
    return _network(state, "official", recognised.system, naming.pairs, (head, backbone, aux))


def to_mmseg(module: nn.Module) -> State:
    """The state dict of a module under mmsegmentation's names (DAHead, CCHead, ANNHead, NLHead, their networks; PAM,
    CAM and mmcv's CrissCrossAttention and NonLocal2d).

    gamma becomes a 0-dim ``gamma.scale``. Biases before batch norms, which mmcv's ConvModule does not have, are
    subtracted from the running means: the same function. The result loads with ``strict=True``.

    Args, returns, raises: as :func:`to_official`.
    """
    state = dict(module.state_dict())
    recognised, naming = _of(module, state)
    system = next((name for kind, name in _BLOCK_CLASSES if isinstance(module, kind)), recognised.system)
    theirs = [n for n in (*HEADS, *BLOCKS) if n.system == system and n.format in ("mmsegmentation", "mmcv")]
    if naming is None or not theirs:
        raise ValueError(f"to_mmseg: mmsegmentation has no counterpart of {type(module).__name__}")
    _fold_biases(state)
    target = theirs[-1] if system == "non_local_block" and "W.weight" in state else theirs[0]
    if recognised.prefix == "classifier.":
        prefixes = PREFIXES[system, "mmsegmentation"]
        named = _network(state, "mmsegmentation", system, target.pairs, prefixes)
    else:
        named = _renamed(state, target.pairs, "to_mmseg")
    return {name: value.reshape(()) if name.endswith("gamma.scale") else value for name, value in named.items()}


def _of(module: nn.Module, state: State) -> tuple[Recognised, Naming | None]:
    try:
        return _recognise(dict(state))
    except ValueError as error:
        raise ValueError(f"checkpoints: {type(module).__name__} is no module of segattn_ops") from error


def _swap(pairs: Pairs) -> Pairs:
    return tuple((ours, theirs) for theirs, ours in pairs)


def _renamed(state: State, pairs: Pairs, function: str) -> State:
    named: State = {}
    unknown = []
    for name, value in state.items():
        new = rename(name, _swap(pairs))
        if new is None:
            unknown.append(name)
        else:
            named[new] = value
    if unknown:
        raise ValueError(f"{function}: the layout has no place for {', '.join(unknown)}")
    return named


def _network(state: State, layout: str, system: str, pairs: Pairs, prefixes: tuple[str, str, str | None]) -> State:
    """A whole network's state dict under the layout's names and prefixes."""
    head, backbone, aux = prefixes
    function = "to_official" if layout == "official" else "to_mmseg"
    parts: dict[str, State] = {"classifier.": {}, "backbone.": {}, "aux_classifier.": {}}
    for name, value in state.items():
        part = next(p for p in parts if name.startswith(p))
        parts[part][name[len(part) :]] = value
    stem = _backbone([f"{name}" for name in parts["backbone."]])
    if stem is None:
        raise ValueError(
            f"{function}: the backbone is not a ResNet; export the head alone: {function}(model.classifier)"
        )
    result = {
        backbone + k: v
        for k, v in _renamed(parts["backbone."], _backbone_pairs(stem[1], system, layout), function).items()
    }
    result |= {head + k: v for k, v in _renamed(parts["classifier."], pairs, function).items()}
    if parts["aux_classifier."]:
        if aux is None:
            raise ValueError(
                f"{function}: the official {system} has no auxiliary head; set aux_classifier to None first"
            )
        named = _renamed(parts["aux_classifier."], _auxiliary_pairs(aux, system), function)
        if aux == "dsn.":
            named["0.bias"] = torch.zeros_like(parts["aux_classifier."]["0.weight"][:, 0, 0, 0])
        result |= {aux + k: v for k, v in named.items()}
    return result


def _backbone_pairs(stem: str, system: str, layout: str) -> Pairs:
    """A deep stem is ``stem`` here; each repository numbers it differently."""
    if stem == "v1c" and layout == "official":
        stem = "ccnet" if system in ("ccnet", "dfn") else "deep"
    return (*STEMS[stem], *STAGES)


def _auxiliary_pairs(prefix: str, system: str) -> Pairs:
    drop = {"dsn.": "1" if system == "ann" else "1.0"}.get(prefix)
    return tuple(pair for pair in AUXILIARY[prefix] if pair[0] != drop)


_FOLDS = (
    (r"((?:.*\.)?f_(?:key|query))\.0\.bias", ("{}.1.0.running_mean",)),
    (r"((?:.*\.)?conv_bn_dropout)\.0\.bias", ("{}.1.0.running_mean", "{}.1.running_mean")),
    (r"((?:.*\.)?context)\.0\.bias", ("{}.1.0.running_mean",)),
    (r"((?:.*\.)?W)\.0\.bias", ("{}.1.running_mean",)),
)


def _fold_biases(state: dict[str, Tensor]) -> None:
    """Moves biases before batch norms into their running means."""
    for name in list(state):
        for pattern, means in _FOLDS:
            match = re.fullmatch(pattern, name)
            mean = next((m for m in (t.format(match.group(1)) for t in means) if m in state), None) if match else None
            if mean is not None:
                state[mean] = state[mean] - state.pop(name)
                break
