"""Matches a module's class and structure against the published blocks."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .block import FusedBlock
from .fused import (
    FusedAsymmetricAttention,
    FusedChannelAttention,
    FusedCrissCrossAttention,
    FusedDotProductChannel,
    FusedDotProductPosition,
    FusedNonLocal,
    FusedPositionAttention,
)

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Classes of the original repositories, for which a missing extension or device does not prevent the conversion.
PUBLISHED = {
    "PAM_Module",
    "CAM_Module",
    "PAM",
    "CAM",
    "CrissCrossAttention",
    "_PositionAttentionModule",
    "_ChannelAttentionModule",
}
# The names of the layers, of which a mapping gives other names.
KNOWN_NAMES = frozenset(
    ("query_conv", "key_conv", "value_conv", "gamma", "theta", "phi", "g", "W", "concat_project")
    + ("f_query", "f_key", "f_value", "psp")
)


@dataclass(frozen=True)
class Candidate:
    """One block that a module may be.

    Attributes:
        kind: the class of the replacement.
        names: the module's attribute for each role.
        channels: of each feature map that the forward takes.
        options: of the replacement.
        dims: numbers of spatial dimensions that the replacement can take.
        sizes: the only spatial sizes that the block can take, for one bound to them.
        label: what distinguishes it from the published block, for the report.
    """

    kind: type[FusedBlock]
    names: Mapping[str, str]
    channels: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    dims: tuple[int, ...] = (2,)
    sizes: tuple[tuple[int, ...], ...] = ()
    label: str = ""


class View:
    """A module under known names.

    Args:
        module: any module.
        mapping: its own name of a layer to the known one.
    """

    def __init__(self, module: nn.Module, mapping: Mapping[str, str]) -> None:
        self.module = module
        self._known = {own: known for own, known in mapping.items() if hasattr(module, own)}
        self._own = {known: own for own, known in self._known.items()}
        self.class_name = type(module).__name__

    @property
    def renamed(self) -> bool:
        """Whether the mapping applies to this module."""
        return bool(self._known)

    def own(self, name: str) -> str:
        """The module's own name."""
        return self._own.get(name, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.module, self.own(name), default)

    def parametrised(self) -> set[str]:
        """Known names of the attributes that have parameters. named_children() lists a module with two names once."""
        children = {
            name
            for name, child in self.module._modules.items()
            if child is not None and next(child.parameters(), None) is not None
        }
        children |= {name for name, parameter in self.module._parameters.items() if parameter is not None}
        return {self._known.get(name, name) for name in children}

    def is_scalar(self, name: str) -> bool:
        """Whether the attribute is a parameter of one element, or a module with no other."""
        value = self.get(name)
        parameters = [value] if isinstance(value, nn.Parameter) else []
        if isinstance(value, nn.Module):
            parameters = list(value.parameters())
        return len(parameters) == 1 and parameters[0].numel() == 1

    def pointwise(self, name: str) -> Conv | None:
        return pointwise(self.get(name))


def candidates(module: nn.Module, mapping: Mapping[str, str] | None = None) -> list[Candidate]:
    """The blocks that ``module`` may be, likeliest first; empty if its structure matches none."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return []
    view = View(module, mapping or {})
    for matcher in _MATCHERS:
        found = matcher(view)
        if found:
            return found
    return []


def _only_conv(module: Any) -> Conv | None:
    """The convolution of a conv, an mmcv ConvModule, or a sequence of one of them and a pool."""
    convs = [m for m in module.modules() if isinstance(m, _CONVS)] if isinstance(module, nn.Module) else []
    return convs[0] if len(convs) == 1 else None


def pointwise(module: Any) -> Conv | None:
    """The only convolution of the module, if it is 1 x 1 with stride 1 and one group."""
    conv = _only_conv(module)
    if conv is None or any(k != 1 for k in conv.kernel_size) or any(s != 1 for s in conv.stride) or conv.groups != 1:
        return None
    return conv


def _dims(conv: Conv) -> int:
    return next(n for n, kind in enumerate(_CONVS, start=1) if isinstance(conv, kind))


def _scales(view: View, key_channels: int, channels: int, published: float = 1.0) -> list[tuple[str, float]]:
    """Scales of the energies in use, the published one first, without a label."""
    usual = [
        ("", published),
        ("1", 1.0),
        ("key_channels ** -0.5", key_channels**-0.5),
        ("channels ** -0.5", channels**-0.5),
        ("1 / key_channels", 1 / key_channels),
    ]
    for name in ("scale", "temperature"):
        own = view.get(name)
        if isinstance(own, (int, float)) and own not in (0, True):
            usual += [(f"its {name}", float(own)), (f"1 / its {name}", 1 / own)]
    different = [(name, s) for n, (name, s) in enumerate(usual) if s not in [other for _, other in usual[:n]]]
    return [(f"energies times {name} = {scale:.4g}" if name else "", scale) for name, scale in different]


def _query_key_value(view: View) -> list[Candidate]:
    for query, key, value, gamma in (
        ("query_conv", "key_conv", "value_conv", "gamma"),
        ("query_project", "key_project", "value_project", "gamma"),
        ("conv_b", "conv_c", "conv_d", "alpha"),
        ("query", "key", "value", "gamma"),
    ):
        if view.parametrised() != {query, key, value, gamma} or not view.is_scalar(gamma):
            continue
        q, k, v = (view.pointwise(name) for name in (query, key, value))
        if q is None or k is None or v is None:
            continue
        if q.in_channels != v.out_channels or q.out_channels != k.out_channels:
            continue
        roles = zip(("query", "key", "value", "gamma"), (query, key, value, gamma), strict=True)
        names = {role: view.own(name) for role, name in roles}
        kinds: list[type[FusedBlock]] = [FusedPositionAttention]
        if isinstance(q, nn.Conv2d):
            kinds.append(FusedCrissCrossAttention)
        if "criss" in view.class_name.lower():
            kinds.reverse()
        # A block of 1-D convolutions may flatten what it is given: fastai's.
        dims, flat = ((2, 1, 3), {"flat": True}) if isinstance(q, nn.Conv1d) else ((_dims(q),), {})
        exchanged = names | {"query": names["key"], "key": names["query"]}  # fastai's softmax is over the queries
        return [
            Candidate(kind, names, (q.in_channels,), {"scale": scale} | flat, dims, label=label)
            for label, scale in _scales(view, q.out_channels, q.in_channels)
            for kind in kinds
        ] + [
            Candidate(kind, exchanged, (q.in_channels,), {"scale": 1.0} | flat, dims, label="query and key exchanged")
            for kind in kinds
        ]
    return []


def _gamma_only(view: View) -> list[Candidate]:
    if not view.renamed and not re.search(r"cam|channel_?att", view.class_name, re.IGNORECASE):
        return []
    for gamma in ("gamma", "beta"):
        if view.parametrised() == {gamma} and view.is_scalar(gamma):
            names, dims, channels = {"gamma": view.own(gamma)}, (2, 3, 1), (_own_channels(view),)
            return [
                Candidate(FusedChannelAttention, names, channels, {"scale": -1.0}, dims),
                Candidate(FusedChannelAttention, names, channels, {"scale": 1.0}, dims, label="softmax of +E"),
            ]
    return []


def _own_channels(view: View) -> int:
    """The number of channels that a block without layers was made for; 12 if it does not say, or has very many."""
    for name in ("chanel_in", "channel_in", "in_channels", "in_dim", "channels", "dim"):
        own = getattr(view.module, name, None)
        if isinstance(own, int) and 0 < own <= 1024:
            return own
    return 12


def _non_local(view: View) -> list[Candidate]:
    timm = view.parametrised() == {"t", "p", "g", "z", "norm"}
    out = "z" if timm else next((name for name in ("W", "conv_out") if view.get(name) is not None), None)
    value = view.pointwise("g")
    if out is None or value is None or view.pointwise(out) is None:
        return []
    names = {"value": "g", "out": out}
    if timm:
        names |= {"query": "t", "key": "p", "norm": "norm"}
    else:
        expected = {"g", out}
        if view.get("theta") is not None:
            names |= {"query": "theta", "key": "phi"}
            expected |= {"theta", "phi"}
        elif view.get("phi") is not None:
            names["key"] = "phi"  # gaussian with sub_sample: a pool
        if view.get("concat_project") is not None:
            names["projection"] = "concat_project"
            expected.add("concat_project")
        if view.parametrised() != expected:
            return []
    names = {role: view.own(name) for role, name in names.items()}
    return [
        Candidate(FusedNonLocal, names, (value.in_channels,), options, (_dims(value),), label=label)
        for label, options in _modes(view, names, value, timm)
    ]


def _modes(view: View, names: Mapping[str, str], value: Conv, timm: bool) -> list[tuple[str, dict[str, Any]]]:
    """The modes the block may have, likeliest first. mmcv's has an attribute; AlexHex7's four classes have one name and
    differ only in their forward."""
    if timm:
        return [("", {"mode": "embedded_gaussian", "scale": view.get("scale")})]
    if "projection" in names:
        return [("", {"mode": "concatenation"})]
    scales = _scales(view, value.out_channels, value.in_channels)
    if "query" not in names:
        return [(label, {"mode": "gaussian", "scale": scale}) for label, scale in scales]
    if view.get("use_scale", False):
        scales[:2] = [("", value.out_channels**-0.5), ("", 1.0)]  # mmcv's default
    softmax = [(label, {"mode": "embedded_gaussian", "scale": scale}) for label, scale in scales]
    dot_product: list[tuple[str, dict[str, Any]]] = [("", {"mode": "dot_product"})]
    if view.get("mode") == "dot_product" or "dot" in view.class_name.lower():
        return dot_product + softmax
    return softmax[:2] + dot_product + softmax[2:]


def _asymmetric(view: View) -> list[Candidate]:
    if view.parametrised() == {"f_key", "f_query", "f_value", "W"} and isinstance(view.get("psp"), nn.Module):
        names = {"query": "f_query", "key": "f_key", "value": "f_value", "pool": "psp", "out": "W"}
        options: dict[str, Any] = {"query_first": False}
    elif all(hasattr(view.module, name) for name in ("key_downsample", "matmul_norm")) and view.get("gamma") is None:
        if view.get("query_downsample") is not None or _overrides_forward(view.module, "SelfAttentionBlock"):
            return []
        names = {"query": "query_project", "key": "key_project", "value": "value_project"}
        if view.get("key_downsample") is not None:
            names["pool"] = "key_downsample"
        if view.get("out_project") is not None:
            names["out"] = "out_project"
        options = {"query_first": True, "scale": view.get("channels") ** -0.5 if view.get("matmul_norm") else 1.0}
    else:
        return []
    query, key = view.pointwise(names["query"]), view.pointwise(names["key"])
    if query is None or key is None:
        return []
    scales = (
        [("", options.pop("scale"))]
        if "scale" in options
        else _scales(view, key.out_channels, key.in_channels, key.out_channels**-0.5)
    )
    low, high = key.in_channels, query.in_channels
    channels: tuple[int, ...] = (high, low) if options["query_first"] else (low, high)
    if not options["query_first"] and view.get("f_query") is view.get("f_key"):
        channels = (low,)
    names = {role: view.own(name) for role, name in names.items()}
    return [
        Candidate(FusedAsymmetricAttention, names, channels, options | {"scale": scale}, label=label)
        for label, scale in scales
    ]


def _overrides_forward(module: nn.Module, base: str) -> bool:
    """Whether the class overrides the forward of the base class with the given name."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            return cls.__name__ != base
    return True


def _external_attention(view: View) -> list[Candidate]:
    module: Any = view.module
    if view.parametrised() != {"cnn", "pa"} or not isinstance(module.cnn, nn.Conv2d):
        return []
    attention = View(module.pa, {})
    if attention.get("h") != 1 or not isinstance(attention.get("dropout"), nn.Dropout):
        return []
    channels = (module.cnn.in_channels,)
    layers = attention.parametrised()
    names = {"in": "cnn", "out": "pa.fc_o"}
    if layers == {"fc_q", "fc_k", "fc_v", "fc_o"}:
        names |= {"query": "pa.fc_q", "key": "pa.fc_k", "value": "pa.fc_v"}
        return [Candidate(FusedDotProductPosition, names, channels)]
    if layers == {"fc_o"} and isinstance(module.pa.fc_o, nn.Linear):
        positions = module.pa.fc_o.in_features
        side = next(n for n in range(math.isqrt(positions), 0, -1) if positions % n == 0)
        sizes = ((positions, 1), (side, positions // side))
        return [Candidate(FusedDotProductChannel, names, channels, sizes=sizes)]
    return []


_MATCHERS: tuple[Callable[[View], list[Candidate]], ...] = (
    _query_key_value,
    _gamma_only,
    _non_local,
    _asymmetric,
    _external_attention,
)
