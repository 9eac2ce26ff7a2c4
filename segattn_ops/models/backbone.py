"""ResNets of torchvision as dense feature extractors: dilated, with the stems of the published checkpoints."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

try:
    from torchvision import models as _torchvision
except ImportError as error:  # pragma: no cover
    raise ImportError("segattn_ops.models needs torchvision: pip install 'segattn_ops[models]'") from error

LAYERS = ("layer1", "layer2", "layer3", "layer4")
STEMS = {"torchvision": None, "v1c": (32, 32, 64), "deep": (64, 64, 128), "ccnet": (64, 64, 128)}
_DILATION = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}


class Backbone(nn.Module):
    """The stem and the four stages of a ResNet; returns the feature maps of the chosen stages by name.

    The state dict has torchvision's names (``conv1, bn1, layer1 ... layer4``; ``stem`` instead of the first two for a
    deep stem), without the classifier.

    Args:
        resnet: a torchvision ResNet, whose modules are reused.
        return_layers: the stages whose feature maps are returned, of ``layer1`` to ``layer4``.
        stem: replaces conv1, bn1 and relu if given.

    Shape:
        x (B, 3, H, W) -> {"layer1": (B, 256, H/4, W/4), ...}, sides rounded up.
    """

    def __init__(
        self, resnet: _torchvision.ResNet, return_layers: Sequence[str], stem: nn.Sequential | None = None
    ) -> None:
        super().__init__()
        unknown = set(return_layers) - set(LAYERS)
        if unknown or not return_layers:
            raise ValueError(f"Backbone: return_layers must name some of {', '.join(LAYERS)} (got {return_layers!r})")
        self.return_layers = tuple(return_layers)
        if stem is None:
            self.conv1: nn.Module = resnet.conv1
            self.bn1: nn.Module = resnet.bn1
            self.relu: nn.Module = resnet.relu
        else:
            self.stem = stem
        self.maxpool: nn.Module = resnet.maxpool
        self.channels: dict[str, int] = {}
        for name in LAYERS:
            stage = getattr(resnet, name)
            self.add_module(name, stage)
            last = stage[-1]
            self.channels[name] = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x (B, 3, H, W) -> the chosen feature maps by stage, finest first."""
        x = self.stem(x) if hasattr(self, "stem") else self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        maps = OrderedDict()
        for name in LAYERS:
            x = getattr(self, name)(x)
            if name in self.return_layers:
                maps[name] = x
        return maps

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> dict[str, Tensor]: ...


def dilated_resnet(
    name: str = "resnet50",
    *,
    weights: object = None,
    output_stride: int = 8,
    stem: str = "torchvision",
    return_layers: Sequence[str] = ("layer3", "layer4"),
    norm_layer: Callable[[int], nn.Module] | None = None,
) -> Backbone:
    """A torchvision ResNet whose last stages dilate instead of striding.

    Args:
        name: a bottleneck ResNet of torchvision (``resnet50``, ``resnet101``, ``resnet152``, ``resnext...``); the
            basic ones (18, 34) only at output stride 32, because torchvision does not dilate them.
        weights: as torchvision's ``get_model`` takes them ("DEFAULT" downloads); None for random ones. Only for the
            stem "torchvision".
        output_stride: 8, 16 or 32: input pixels per position of the last feature map.
        stem: "torchvision" (one 7 x 7 convolution); "v1c", mmsegmentation's ResNetV1c (three 3 x 3, 32-32-64);
            "deep" (64-64-128), the ``resnet50s`` family of DANet's authors; "ccnet": the same, the first block of a
            dilated stage dilated too, and a max pool that rounds up, as CCNet's own network.
        return_layers: the stages whose feature maps are returned.
        norm_layer: makes a norm layer from its number of channels; batch norm if None.

    Raises:
        TypeError: for ``weights=True``.
        ValueError: for an unknown name, stem, stride or name of weights, or weights that do not fit the stem.
    """
    if output_stride not in _DILATION:
        raise ValueError(f"dilated_resnet: output_stride must be 8, 16 or 32 (got {output_stride!r})")
    if stem not in STEMS:
        raise ValueError(f"dilated_resnet: stem must be one of {', '.join(STEMS)} (got {stem!r})")
    if isinstance(weights, bool):
        raise TypeError(
            'dilated_resnet: weights must be a name of torchvision\'s ("DEFAULT"), one of its enums or None '
            f"(got {weights})"
        )
    if weights is not None and stem != "torchvision":
        raise ValueError(f"dilated_resnet: torchvision's weights have no {stem} stem; load a checkpoint that does")
    if not name.startswith(("resnet", "resnext", "wide_resnet")) or name not in _torchvision.list_models():
        raise ValueError(f"dilated_resnet: {name!r} is not a ResNet of torchvision")
    if name in ("resnet18", "resnet34") and output_stride != 32:
        raise ValueError(f"dilated_resnet: torchvision does not dilate {name}; use output_stride=32 or a resnet50")
    if isinstance(weights, str):
        weights = _named_weights(name, weights)
    resnet = _torchvision.get_model(
        name, weights=weights, replace_stride_with_dilation=_DILATION[output_stride], norm_layer=norm_layer
    )
    stem_channels = STEMS[stem]
    if stem_channels is None:
        return Backbone(resnet, return_layers)
    if stem == "ccnet":
        _dilate_first_blocks(resnet)
        resnet.maxpool.ceil_mode = True
    return Backbone(resnet, return_layers, _deep_stem(resnet, stem_channels, norm_layer or nn.BatchNorm2d))


def _named_weights(name: str, weights: str) -> object:
    """torchvision's enum member of that name."""
    known = _torchvision.get_model_weights(name)
    member = weights.removeprefix(f"{known.__name__}.")
    if member not in known.__members__:
        raise ValueError(
            f"dilated_resnet: torchvision has no weights {weights!r} of {name}, only {', '.join(known.__members__)}; "
            "load a file with segattn_ops.checkpoints.load"
        )
    return known[member]


def _deep_stem(
    resnet: _torchvision.ResNet, channels: Sequence[int], norm_layer: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Three 3 x 3 convolutions, the first with stride 2; adapts the first block of ``resnet`` to their output."""
    layers: list[nn.Module] = []
    inputs = 3
    for index, outputs in enumerate(channels):
        conv = nn.Conv2d(inputs, outputs, 3, stride=2 if index == 0 else 1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, norm_layer(outputs), nn.ReLU(inplace=True)]
        inputs = outputs
    if inputs != 64:
        block = resnet.layer1[0]
        for owner, name in ((block, "conv1"), (block.downsample, "0")):
            old = getattr(owner, name)
            new = nn.Conv2d(inputs, old.out_channels, 1, bias=False)
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            setattr(owner, name, new)
    return nn.Sequential(*layers)


def _dilate_first_blocks(resnet: _torchvision.ResNet) -> None:
    """Dilates the first block of a dilated stage as well, as CCNet does and torchvision does not."""
    for name in LAYERS[2:]:
        stage = getattr(resnet, name)
        conv = stage[0].conv2
        conv.dilation = conv.padding = stage[1].conv2.dilation
