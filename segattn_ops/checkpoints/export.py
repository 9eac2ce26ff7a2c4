"""Exports weights under the names of the official repositories and of mmsegmentation."""

import re
import warnings

import torch
from torch import Tensor, nn

from ..nn import (
    ChannelAttention,
    CrissCrossAttention,
    NonLocal1d,
    NonLocal2d,
    NonLocal3d,
    PositionAttention,
    RecurrentCrissCrossAttention,
)
from .containers import State, unwrapped
from .names import AUXILIARY, BLOCKS, HEADS, PREFIXES, STAGES, STEMS, Pairs
from .translate import Found, backbones, choose, rename

_BLOCK_CLASSES = ((PositionAttention, "position"), (ChannelAttention, "channel"), (CrissCrossAttention, "criss_cross"))


def to_official(module: nn.Module) -> State:
    """The state dict of a module under the names of its authors' repository (DANet, DRANet, CCNet, ANN, dfn_seg;
    AlexHex7 for a non-local block; External-Attention for DAModule).

    Blocks and heads already have those names; a network's parts get their authors' prefixes (``pretrained.`` and
    ``head.`` for DANet), its auxiliary head CCNet's and ANN's ``dsn``, whose convolution has a bias: zero. DANet and
    dfn_seg have no auxiliary head, which only training needs: it is left out with a ``UserWarning``. Another says
    where a ``scale`` other than 1 is lost, which DANet's and CCNet's attention does not have.

    Args:
        module: of :mod:`segattn_ops.nn`, or a head or network of :mod:`segattn_ops.models`.

    Returns:
        dict: names to tensors that share the module's storage.

    Raises:
        TypeError: if it is no module.
        ValueError: if there is no official layout for the module or for a part of it; the message names the part.
    """
    module, state, found = _of(module, "to_official")
    _warn_of_scale(module, "to_official")
    if found.naming is None or found.naming.system == "non_local":
        raise ValueError(f"to_official: there is no official repository of {type(module).__name__}")
    if any(re.search(r"(smooth|border)_cls", name) for name in state):
        raise ValueError("to_official: dfn_seg has no smooth_cls and border_cls: it has as many channels as classes")
    if found.prefix != "classifier.":
        return state
    return _network(state, "official", found.naming.system, found.naming.pairs)


def to_mmseg(module: nn.Module) -> State:
    """The state dict of a module under mmsegmentation's names (DAHead, CCHead, ANNHead, NLHead, their networks; PAM,
    CAM and mmcv's CrissCrossAttention and NonLocal2d).

    gamma becomes a 0-dim ``gamma.scale``. Biases before batch norms, which mmcv's ConvModule does not have, are
    subtracted from the running means: the same function. The result loads with ``strict=True``. A ``UserWarning`` says
    where the counterpart's settings have to differ from its defaults (ReLU and
    ``recurrence`` in CCHead, ``use_scale`` in NonLocal2d),
    and where it cannot compute the same (a ``scale`` other than 1 in position and criss-cross attention).

    Args, returns, raises: as :func:`to_official`.
    """
    module, state, found = _of(module, "to_mmseg")
    system = found.recognised.system
    system = next((name for kind, name in _BLOCK_CLASSES if isinstance(module, kind)), system)
    theirs = [n for n in (*HEADS, *BLOCKS) if n.system == system and n.format in ("mmsegmentation", "mmcv")]
    if found.naming is None or not theirs:
        raise ValueError(f"to_mmseg: mmsegmentation has no counterpart of {type(module).__name__}")
    _warn_of_settings(module, system)
    _warn_of_scale(module, "to_mmseg")
    _fold_biases(state)
    target = theirs[-1] if system == "non_local_block" and "W.weight" in state else theirs[0]
    if found.prefix == "classifier.":
        named = _network(state, "mmsegmentation", system, target.pairs)
    else:
        named = _renamed(state, target.pairs, "to_mmseg")
    return {name: value.reshape(()) if name.endswith("gamma.scale") else value for name, value in named.items()}


def _of(module: nn.Module, function: str) -> tuple[nn.Module, State, Found]:
    """The module without wrappers, its state dict, and its layout."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module must be a torch.nn.Module (got {type(module).__name__})")
    module = unwrapped(module)
    kind, state = type(module).__name__, dict(module.state_dict())
    if not state:
        raise ValueError(f"{function}: {kind} has no parameters")
    try:
        _, found = choose(state, None)
    except ValueError as error:
        raise ValueError(
            f"{function}: {kind} is no block, head or network of segattn_ops with a layout of its own"
        ) from error
    if found.naming is not None and found.prefix not in ("", "classifier."):
        part = found.prefix.removesuffix(".").removesuffix(".classifier")
        raise ValueError(f"{function}: {kind} is no module of segattn_ops, but its part {part!r} is; export that alone")
    return module, state, found


def _warn_of_settings(module: nn.Module, system: str) -> None:
    """Warns where mmsegmentation's default is another function."""
    recurrence = next((m.recurrence for m in module.modules() if isinstance(m, RecurrentCrissCrossAttention)), 2)
    if system == "ccnet" and recurrence != 2:
        warnings.warn(
            f"to_mmseg: CCHead applies its attention twice by default, this module {recurrence} times: build CCHead "
            f"with recurrence={recurrence}",
            UserWarning,
            stacklevel=3,
        )
    text = None
    if system == "ccnet" and any(isinstance(layer, nn.LeakyReLU) for layer in module.modules()):
        text = "this module has leaky ReLU, CCHead ReLU: build CCHead with act_cfg=dict(type='LeakyReLU')"
    if isinstance(module, (NonLocal1d, NonLocal2d, NonLocal3d)) and module.mode == "embedded_gaussian":
        scaled = abs(module.scale - module.inter_channels**-0.5) < 1e-6
        if not scaled:
            text = f"mmcv's block scales by inter_channels ** -0.5, this module by {module.scale:g}" + (
                ": build it with use_scale=False" if module.scale == 1 else ", which mmcv cannot do"
            )
    if text:
        warnings.warn(f"to_mmseg: {text}", UserWarning, stacklevel=3)


def _warn_of_scale(module: nn.Module, function: str) -> None:
    for block in module.modules():
        if isinstance(block, (PositionAttention, CrissCrossAttention)) and block.scale != 1:
            warnings.warn(
                f"{function}: this {type(block).__name__} scales its energies by {block.scale:g}, its counterpart does "
                f"not: multiply query_conv by {block.scale:g} first, and set scale to 1",
                UserWarning,
                stacklevel=3,
            )


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


def _network(state: State, layout: str, system: str, pairs: Pairs) -> State:
    """A whole network's state dict under the layout's names and prefixes."""
    head, backbone, aux = PREFIXES[system, layout]
    function = "to_official" if layout == "official" else "to_mmseg"
    parts: dict[str, State] = {"classifier.": {}, "backbone.": {}, "aux_classifier.": {}}
    for name, value in state.items():
        part = next(p for p in parts if name.startswith(p))
        parts[part][name[len(part) :]] = value
    resnets = backbones(parts["backbone."])
    if not resnets:
        raise ValueError(
            f"{function}: the backbone is not a ResNet; export the head alone: {function}(model.classifier)"
        )
    result = {
        backbone + k: v
        for k, v in _renamed(parts["backbone."], _backbone_pairs(resnets[0][1], system, layout), function).items()
    }
    result |= {head + k: v for k, v in _renamed(parts["classifier."], pairs, function).items()}
    if parts["aux_classifier."] and aux is None:
        warnings.warn(
            f"{function}: the official {system} has no auxiliary head: aux_classifier is left out", stacklevel=3
        )
    elif parts["aux_classifier."] and aux is not None:
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
