"""Says in words why a checkpoint does not fit a module, or fits and computes something else."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..nn import CrissCrossAttention, PositionAttention
from .translate import Translation, backbones

_BLOCKS: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}
# Size of an axis of a parameter, the builder's or head's argument that sets it, and the names that change with it.
_SIZES = (
    (r"(conv[678]\.1|bottleneck\.3|cls|smooth_cls_\d|aux_classifier\.4)\.(weight|bias)", "num_classes", None),
    (r"(?<!.)4\.(weight|bias)", "num_classes", None),  # FCNHead alone
    (r"aux_classifier\.0\.weight", "aux_channels", r"(.*\.)?aux_classifier\..*"),
    (r"conv(5a|a)\.0\.weight", "inter_channels", r"(.*\.)?(conv\w+|sa|sc|cca|nl|bottleneck)\..*"),
    (r"(?<!_)out_conv\.weight", "num_classes", r"(.*\.)?(out_conv|cab\d|rrb_\w+)\..*"),  # dfn_seg's width
    (r"sa\.query_conv\.weight", "key_channels", r"(.*\.)?sa\.(query|key)_conv\..*"),
)


# Of torch.nn.utils.prune, weight_norm, spectral_norm and parametrize.
_REWRITTEN = re.compile(r".*\.(parametrizations\..*|(weight|bias)_(orig|mask|g|v|u))")


@dataclass(frozen=True)
class Hint:
    """A reason, and a pattern of the names that it explains."""

    text: str
    pattern: str

    def explains(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def hints(
    translation: Translation,
    target: Mapping[str, Tensor],
    mismatches: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> list[Hint]:
    """Why names are missing, unknown or of another shape: another stem, depth, or number of classes or channels.

    Args:
        translation: of the checkpoint.
        target: the module's state dict.
        mismatches: the module's and the checkpoint's shape by the module's name.
    """
    found: list[Hint] = []
    theirs = {name: value for name, value in translation.state.items() if name.startswith("backbone.")}
    ours = backbones(target)
    if theirs and len(ours) == 1:
        found += _backbone_hints(translation, target, ours[0][0])
    heads = [{name for name in names if name.startswith("classifier.")} for names in (translation.state, target)]
    if all(heads) and not heads[0] & heads[1]:
        recognised = translation.recognised
        found.append(Hint(f"the head in the checkpoint is one of {recognised.system}", r"classifier\..*"))
    rewritten = next((name for name in translation.source if _REWRITTEN.fullmatch(name)), None)
    if rewritten is not None and rewritten not in target:
        text = (
            f"{translation.source[rewritten]} is of a pruned or parametrized layer: save the checkpoint again after "
            "torch.nn.utils.prune.remove or remove_parametrizations"
        )
        found.append(Hint(text, _REWRITTEN.pattern))
    seen = set()
    for name, (shape, stored) in mismatches.items():
        for pattern, argument, explained in _SIZES:
            if re.fullmatch(rf"(.*\.)?{pattern}", name) and shape[:1] != stored[:1] and argument not in seen:
                seen.add(argument)
                own = explained or rf"(.*\.)?{pattern}"
                found.append(Hint(f"{argument}={stored[0]} in the checkpoint, {shape[0]} in the module", own))
    return found


def _backbone_hints(translation: Translation, target: Mapping[str, Tensor], prefix: str) -> list[Hint]:
    found = []
    ours, theirs = _stem(target, prefix), _stem(translation.state, "backbone.")
    if ours != theirs:
        stem = theirs
        if translation.recognised.stem == "ccnet" and translation.recognised.system != "ann":
            stem = "ccnet"  # ANN numbers its layers like CCNet, but dilates like torchvision
        text = f'the checkpoint\'s backbone has another stem: build the module with stem="{stem}" (it has "{ours}")'
        first = r"layer1\.0\.(conv1|downsample\.0)\..*"  # as wide as the stem
        found.append(Hint(text, rf"(.*\.)?(stem\..*|(?<!\d\.)(conv1|bn1)\..*|{first})"))
    depth, stored = (_depth(names, start) for names, start in ((target, prefix), (translation.state, "backbone.")))
    if depth != stored:
        text = f"the backbone is a {stored} in the checkpoint, a {depth} in the module"
        found.append(Hint(text, r"(.*\.)?layer[1-4]\.\d+\..*"))
    return found


def _stem(state: Mapping[str, Tensor], prefix: str) -> str:
    first = state.get(f"{prefix}stem.0.weight")
    if first is None:
        return "torchvision"
    return "v1c" if first.shape[0] == 32 else "deep"


def _depth(names: Iterable[str], prefix: str) -> str:
    """The ResNet of so many blocks."""
    blocks = tuple(
        len({m.group(1) for name in names if (m := re.match(rf"{re.escape(prefix)}layer{stage}\.(\d+)\.", name))})
        for stage in (1, 2, 3, 4)
    )
    known = _BLOCKS.get(blocks, f"ResNet of {blocks} blocks")
    bottleneck = f"{prefix}layer1.0.conv3.weight" in names
    return "resnet34" if known == "resnet50" and not bottleneck else known


def differences(translation: Translation, module: nn.Module, loaded: Container[str], inplace_abn: bool) -> list[str]:
    """What a state dict does not store, where the module's is not what the layout implies.

    Args:
        translation: of the checkpoint.
        module: that takes it.
        loaded: the module's names that are loaded.
        inplace_abn: whether norm weights are taken as InPlaceABN's.
    """
    recognised = translation.recognised
    found = []
    leaky = [m for m in module.modules() if isinstance(m, nn.LeakyReLU)]
    if (recognised.system, recognised.format) == ("ccnet", "mmsegmentation") and leaky:
        found.append("mmsegmentation's CCHead has ReLU, this module leaky ReLU: build it with activation=nn.ReLU")
    if recognised.system == "ccnet" and not inplace_abn and _negative_norms(translation.state):
        found.append("there are negative norm weights: if InPlaceABN trained them, load with inplace_abn=True")
    found += _attention(translation, module, loaded) + _scale(translation, module)
    align = {"mmsegmentation": False, "official": True}.get(recognised.format)
    if recognised.system not in ("danet", "ccnet", "ann", "non_local"):
        align = None
    if align is not None and getattr(module, "align_corners", align) != align:
        found.append(
            f"weights of {recognised.format} {recognised.system} are trained with align_corners={align}, this module "
            f"has {not align}: set its align_corners unless yours are not"
        )
    return found + _dilation(translation, module)


def _dilation(translation: Translation, module: nn.Module) -> list[str]:
    """CCNet's backbone against the others with a deep stem: the same names and shapes, other dilations and pooling."""
    recognised = translation.recognised
    pool = getattr(getattr(module, "backbone", module), "maxpool", None)
    if pool is None or recognised.system in ("dfn", "backbone") or recognised.stem not in ("deep", "ccnet"):
        return []
    wanted = "ccnet" if recognised.system == "ccnet" and recognised.stem == "ccnet" else "deep"
    if pool.ceil_mode == (wanted == "ccnet"):
        return []
    return [
        "CCNet's backbone dilates the first block of a dilated stage too and rounds up in its max pool, which the "
        f'others do not: this checkpoint needs stem="{wanted}"'
    ]


def _negative_norms(state: Mapping[str, Tensor]) -> bool:
    return any(
        name.endswith(".weight") and f"{name[:-7]}.running_mean" in state and bool((value < 0).any())
        for name, value in state.items()
    )


def _attention(translation: Translation, module: nn.Module, loaded: Container[str]) -> list[str]:
    """Position against criss-cross attention, whose parameters have the same names and shapes, and their scale."""
    position, criss_cross = (PositionAttention, "position attention"), (CrissCrossAttention, "criss-cross attention")
    theirs = {"danet": position, "position": position, "ccnet": criss_cross, "criss_cross": criss_cross}.get(
        translation.recognised.system
    )
    ours = criss_cross if theirs is position else position
    if theirs is None:
        return []
    blocks = [
        block
        for name, block in module.named_modules()
        if isinstance(block, (position[0], criss_cross[0])) and f"{name}.query_conv.weight".lstrip(".") in loaded
    ]
    if any(isinstance(block, ours[0]) for block in blocks):
        return [f"these are weights of {theirs[1]}, the module is {ours[1]}: another function of the same parameters"]
    scales = [block.scale for block in blocks if block.scale != 1]
    return [f"the layout's {theirs[1]} has no scale, this module scales by {scales[0]:g}"] if scales else []


def _scale(translation: Translation, module: nn.Module) -> list[str]:
    """The scale of a non-local block: mmcv's and timm's are not 1."""
    scale, channels = getattr(module, "scale", None), getattr(module, "inter_channels", None)
    if translation.recognised.system != "non_local_block" or not isinstance(scale, float) or scale != 1.0:
        return []
    layout = translation.recognised.format
    if layout == "mmcv" and getattr(module, "mode", None) == "embedded_gaussian" and channels != 1:
        return ["mmcv's block scales by inter_channels ** -0.5 unless use_scale=False, this module by 1: set scale"]
    if layout == "timm":
        return ["timm's block scales by in_channels ** -0.5, this module by 1: set scale"]
    return []
