"""Blocks that look like attention and are no candidates: why they are left, and what would make them candidates."""

import re

import torch
from torch import nn
from torch.nn.utils import parametrize

from .candidates import pointwise

# Attention blocks that the ops cannot express, by class name, with the reason.
LEFT_ALONE = {
    "PABBlock": "its softmax runs over all pairs of positions together, not over the keys of each query",
    "DisentangledNonLocal2d": "its queries and keys are whitened and a unary term is added (DNL)",
    "ContextBlock": "it has one query for all positions (GCNet): there is no N x N map to avoid",
    "SpatialGatherModule": "its keys are classes, not positions (OCR)",
    "ObjectAttentionBlock": "it adds to mmsegmentation's SelfAttentionBlock in a forward of its own (OCR)",
    "MultiheadAttention": "PyTorch's scaled_dot_product_attention serves it already",
}
LOOKED_FOR = (
    "looked for modules with these children and parameters:\n"
    "  query_conv, key_conv (1 x 1, C -> E), value_conv (1 x 1, C -> C) and a scalar gamma; also under the names of\n"
    "  mmsegmentation (*_project), Tramac (conv_b, conv_c, conv_d, alpha) and query, key, value, gamma\n"
    "  theta, phi, g (1 x 1, C -> E) and W or conv_out (1 x 1, E -> C), with or without concat_project; timm's t, p,\n"
    "  g, z, norm\n"
    "  f_query, f_key, f_value, psp and W (ANN); a class named like CAM with a scalar gamma or beta only\n"
    'blocks under other names: convert(model, mapping={"to_q": "query_conv", ...}), from your name to the one above'
)
_SUSPECT = re.compile(
    r"^_?(pam|cam|psa|nonlocal|non_local)|criss|(position|channel|spatial|self|pixelwise)_?att|non_?local",
    re.IGNORECASE,
)


def why_suspect(module: nn.Module) -> str | None:
    """The reason to list a module that is no candidate in the report; None to omit it."""
    name = type(module).__name__
    if name in LEFT_ALONE:
        return LEFT_ALONE[name]
    if isinstance(module, torch.jit.ScriptModule):
        if _SUSPECT.search(getattr(module, "original_name", "")):
            return "it is scripted or traced: convert the model before torch.jit"
        return None
    if "parametrizations" in module._modules and parametrize.is_parametrized(module):
        name = name.removeprefix("Parametrized")
        parametrized = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        if _SUSPECT.search(name) or near_miss(module) is not None:
            return f"its {parametrized} is parametrized: convert the model before register_parametrization"
        return None
    near = near_miss(module)
    if near is not None:
        return near
    if _SUSPECT.search(name):
        return "its class is named like an attention block, but its layers or its forward are none of the known ones'"
    return None


def near_miss(module: nn.Module) -> str | None:
    """The layers of a module that has an attention block's layers under other names, with the mapping to try."""
    convs = {name: conv for name, child in module.named_children() if (conv := pointwise(child)) is not None}
    scalars = [name for name, parameter in module.named_parameters(recurse=False) if parameter.numel() == 1]
    scalars += [
        name
        for name, child in module.named_children()
        if [p.numel() for p in child.parameters()] == [1] and name not in convs
    ]
    if len(scalars) != 1 or len(convs) < 3 or len({conv.in_channels for conv in list(convs.values())[:3]}) != 1:
        return None
    layers = ", ".join(f"{name} ({conv.in_channels} -> {conv.out_channels})" for name, conv in convs.items())
    found = f"it has 1 x 1 convolutions and a scalar like an attention block, {layers}, {scalars[0]}"
    parametrised = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    mapping = None if parametrised - {*convs, *scalars} else _suggestion(convs, scalars[0])
    if mapping is None:
        return f"{found}, but no known block has these"
    return f"{found}; if it is position attention, convert(model, mapping={mapping}) checks and converts it"


def _suggestion(convs: dict[str, nn.Conv1d | nn.Conv2d | nn.Conv3d], scalar: str) -> dict[str, str] | None:
    """query and key have the same shape, value keeps the number of channels."""
    if len(convs) != 3 or not all(isinstance(conv, nn.Conv2d) for conv in convs.values()):
        return None
    value = next((name for name, c in reversed(convs.items()) if c.in_channels == c.out_channels), None)
    rest = [name for name in convs if name != value]
    if value is None or convs[rest[0]].out_channels != convs[rest[1]].out_channels:
        return None
    return {rest[0]: "query_conv", rest[1]: "key_conv", value: "value_conv", scalar: "gamma"}
