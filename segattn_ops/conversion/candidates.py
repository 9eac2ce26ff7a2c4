"""Matches a module's class and structure against the published blocks."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .fused import (
    FusedAsymmetricAttention,
    FusedBlock,
    FusedChannelAttention,
    FusedCrissCrossAttention,
    FusedDotProductChannel,
    FusedDotProductPosition,
    FusedNonLocal,
    FusedPositionAttention,
)

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Attention blocks that the ops cannot express, by class name, with the reason.
LEFT_ALONE = {
    "PABBlock": "its softmax runs over all pairs of positions together, not over the keys of each query",
    "DisentangledNonLocal2d": "its queries and keys are whitened and a unary term is added (DNL)",
    "ContextBlock": "it has one query for all positions (GCNet): there is no N x N map to avoid",
    "SpatialGatherModule": "its keys are classes, not positions (OCR)",
    "ObjectAttentionBlock": "it adds to mmsegmentation's SelfAttentionBlock in a forward of its own (OCR)",
    "MultiheadAttention": "PyTorch's scaled_dot_product_attention serves it already",
}
# Classes of the original repositories, whose forward is known without running it.
PUBLISHED = {
    "PAM_Module",
    "CAM_Module",
    "PAM",
    "CAM",
    "CrissCrossAttention",
    "_PositionAttentionModule",
    "_ChannelAttentionModule",
}
_SUSPECT = re.compile(
    r"^_?(pam|cam|psa|nonlocal|non_local)|criss|(position|channel|spatial|self|pixelwise)_?att|non_?local",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Candidate:
    """One block that a module may be.

    Attributes:
        fused: the class of the replacement.
        names: the module's attribute for each role.
        options: of the fused class.
        inputs: shapes on which the two can be compared.
    """

    fused: type[FusedBlock]
    names: Mapping[str, str]
    inputs: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, original: nn.Module) -> FusedBlock:
        """The replacement of ``original``, on the same parameters."""
        return self.fused(original, self.names, self.options)


def candidates(module: nn.Module) -> list[Candidate]:
    """The blocks that ``module`` may be, likeliest first; empty if its structure matches none."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    for matcher in _MATCHERS:
        found = matcher(module)
        if found:
            return found
    return []


def why_suspect(module: nn.Module) -> str | None:
    """The reason to list a module that is no candidate in the report; None to omit it."""
    name = type(module).__name__
    if name in LEFT_ALONE:
        return LEFT_ALONE[name]
    if isinstance(module, torch.jit.ScriptModule) and _SUSPECT.search(getattr(module, "original_name", "")):
        return "it is scripted: convert the model before torch.jit.script"
    if _SUSPECT.search(name):
        return "its class is named like an attention block, but its layers or its forward are none of the known ones'"
    return None


def _only_conv(module: nn.Module | None) -> _Conv | None:
    """The convolution of a conv, an mmcv ConvModule, or a sequence of one of them and a pool."""
    convs = [m for m in module.modules() if isinstance(m, _CONVS)] if isinstance(module, nn.Module) else []
    return convs[0] if len(convs) == 1 else None


def _pointwise(module: nn.Module | None) -> _Conv | None:
    conv = _only_conv(module)
    if conv is None or any(k != 1 for k in conv.kernel_size) or any(s != 1 for s in conv.stride) or conv.groups != 1:
        return None
    return conv


def _parametrised(module: nn.Module) -> set[str]:
    """Attributes of the module that have parameters; named_children() lists a module with two names only once."""
    children = {
        name
        for name, child in module._modules.items()
        if child is not None and next(child.parameters(), None) is not None
    }
    return children | {name for name, parameter in module._parameters.items() if parameter is not None}


def _is_gamma(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    parameters = (
        [value] if isinstance(value, nn.Parameter) else list(value.parameters()) if isinstance(value, nn.Module) else []
    )
    return len(parameters) == 1 and parameters[0].numel() == 1


def _query_key_value(module: nn.Module) -> list[Candidate]:
    for query, key, value, gamma in (
        ("query_conv", "key_conv", "value_conv", "gamma"),
        ("query_project", "key_project", "value_project", "gamma"),
        ("conv_b", "conv_c", "conv_d", "alpha"),
        ("query", "key", "value", "gamma"),
    ):
        if _parametrised(module) != {query, key, value, gamma} or not _is_gamma(module, gamma):
            continue
        q, k, v = (_pointwise(getattr(module, name)) for name in (query, key, value))
        if q is None or k is None or v is None or not isinstance(q, nn.Conv2d):
            continue
        if q.in_channels != v.out_channels or q.out_channels != k.out_channels:
            continue
        names = {"query": query, "key": key, "value": value, "gamma": gamma}
        shape = ((2, q.in_channels, 5, 4),)
        kinds = [FusedPositionAttention, FusedCrissCrossAttention]
        if "criss" in type(module).__name__.lower():
            kinds.reverse()
        return [Candidate(kind, names, shape) for kind in kinds]
    return []


def _gamma_only(module: nn.Module) -> list[Candidate]:
    if not re.search(r"cam|channel_?att", type(module).__name__, re.IGNORECASE):
        return []
    for gamma in ("gamma", "beta"):
        if _parametrised(module) == {gamma} and _is_gamma(module, gamma):
            return [Candidate(FusedChannelAttention, {"gamma": gamma}, ((2, 12, 5, 4),))]
    return []


def _non_local(module: nn.Module) -> list[Candidate]:
    timm = _parametrised(module) == {"t", "p", "g", "z", "norm"}
    out = "z" if timm else next((name for name in ("W", "conv_out") if hasattr(module, name)), None)
    value = _pointwise(getattr(module, "g", None))
    if out is None or value is None or _pointwise(getattr(module, out)) is None:
        return []
    names = {"value": "g", "out": out}
    if timm:
        names |= {"query": "t", "key": "p", "norm": "norm"}
    else:
        expected = {"g", out}
        if hasattr(module, "theta"):
            names |= {"query": "theta", "key": "phi"}
            expected |= {"theta", "phi"}
        elif hasattr(module, "phi"):
            names["key"] = "phi"  # gaussian with sub_sample: a pool
        if hasattr(module, "concat_project"):
            names["projection"] = "concat_project"
            expected.add("concat_project")
        if _parametrised(module) != expected:
            return []
    dims = next(n for n, conv in enumerate(_CONVS, start=1) if isinstance(value, conv))
    shape = ((2, value.in_channels, *(4, 5, 6)[3 - dims :]),)
    return [Candidate(FusedNonLocal, names, shape, options) for options in _modes(module, names, value, timm)]


def _modes(module: nn.Module, names: Mapping[str, str], value: _Conv, timm: bool) -> list[dict[str, Any]]:
    """The modes the block may have, likeliest first. mmcv's has an attribute; AlexHex7's four classes have one name and
    differ only in their forward."""
    if timm:
        return [{"mode": "embedded_gaussian", "scale": module.scale}]
    if "projection" in names:
        return [{"mode": "concatenation"}]
    if "query" not in names:
        return [{"mode": "gaussian"}]
    mode = getattr(module, "mode", None)
    inter = float(value.out_channels)
    scaled = [{"mode": "embedded_gaussian", "scale": inter**-0.5}, {"mode": "embedded_gaussian", "scale": 1.0}]
    if not getattr(module, "use_scale", False):
        scaled.reverse()
    if mode == "dot_product" or "dot" in type(module).__name__.lower():
        return [{"mode": "dot_product"}, *scaled]
    return [*scaled, {"mode": "dot_product"}]


def _asymmetric(module: nn.Module) -> list[Candidate]:
    if _parametrised(module) == {"f_key", "f_query", "f_value", "W"} and isinstance(
        getattr(module, "psp", None), nn.Module
    ):
        names = {"query": "f_query", "key": "f_key", "value": "f_value", "pool": "psp", "out": "W"}
        options: dict[str, Any] = {"query_first": False}
        if getattr(module, "scale", 1) != 1:
            return []
    elif hasattr(module, "key_downsample") and hasattr(module, "matmul_norm") and not hasattr(module, "gamma"):
        if getattr(module, "query_downsample", None) is not None or _overrides_forward(module, "SelfAttentionBlock"):
            return []
        names = {"query": "query_project", "key": "key_project", "value": "value_project"}
        if module.key_downsample is not None:
            names["pool"] = "key_downsample"
        if getattr(module, "out_project", None) is not None:
            names["out"] = "out_project"
        channels: Any = module.channels
        options = {"query_first": True, "scale": channels**-0.5 if module.matmul_norm else 1.0}
    else:
        return []
    query, key = (_pointwise(getattr(module, names[role])) for role in ("query", "key"))
    if query is None or key is None:
        return []
    options.setdefault("scale", key.out_channels**-0.5)
    low, high = (2, key.in_channels, 9, 8), (2, query.in_channels, 9, 8)
    if options["query_first"]:
        return [Candidate(FusedAsymmetricAttention, names, (high, low), options)]
    shared = module.f_query is module.f_key
    return [Candidate(FusedAsymmetricAttention, names, (low,) if shared else (low, high), options)]


def _overrides_forward(module: nn.Module, base: str) -> bool:
    """Whether the class overrides the forward of the base class with the given name."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            return cls.__name__ != base
    return True


def _external_attention(module: nn.Module) -> list[Candidate]:
    if _parametrised(module) != {"cnn", "pa"} or not isinstance(module.cnn, nn.Conv2d):
        return []
    attention: Any = module.pa
    if getattr(attention, "h", None) != 1 or not isinstance(getattr(attention, "dropout", None), nn.Dropout):
        return []
    channels = module.cnn.in_channels
    layers = _parametrised(attention)
    if layers == {"fc_q", "fc_k", "fc_v", "fc_o"}:
        return [Candidate(FusedDotProductPosition, {}, ((2, channels, 5, 4),))]
    if layers == {"fc_o"} and isinstance(attention.fc_o, nn.Linear):
        return [Candidate(FusedDotProductChannel, {}, ((2, channels, attention.fc_o.in_features, 1),))]
    return []


_MATCHERS: tuple[Callable[[nn.Module], list[Candidate]], ...] = (
    _query_key_value,
    _gamma_only,
    _non_local,
    _asymmetric,
    _external_attention,
)
