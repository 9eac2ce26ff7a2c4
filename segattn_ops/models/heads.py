"""Segmentation heads of DANet, CCNet, ANN and Non-local networks: feature maps in, class logits out at their size."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import (
    AFNB,
    APNB,
    ChannelAttention,
    NonLocal2d,
    PositionAttention,
    RecurrentCrissCrossAttention,
)
from ..nn._checks import feature_map, positive_int, probability

NormLayer = Callable[[int], nn.Module]
Activation = Callable[[], nn.Module]


def leaky_relu() -> nn.Module:
    """The activation of CCNet's InPlaceABN: slope 0.01."""
    return nn.LeakyReLU(0.01)


def conv_block(
    inputs: int, outputs: int, norm_layer: NormLayer, activation: Activation = nn.ReLU, bias: bool = False
) -> nn.Sequential:
    """3 x 3 convolution (``0``), norm (``1``), activation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), norm_layer(outputs), activation())


def _classifier(inputs: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(inputs, num_classes, 1))


class FCNHead(nn.Sequential):
    """The auxiliary head: 3 x 3 convolution, norm, ReLU, dropout, 1 x 1 convolution; torchvision's names and layout.

    Args:
        in_channels: channels of the feature map.
        num_classes: channels of the logits.
        channels: of the hidden layer; ``in_channels // 4`` if None.
        norm_layer: makes a norm layer from its number of channels.
        dropout: probability.
    """

    inputs: ClassVar[tuple[str, ...]] = ("layer3",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ) -> None:
        hidden = channels or max(in_channels // 4, 1)
        super().__init__(
            *conv_block(in_channels, hidden, norm_layer),
            nn.Dropout(probability("FCNHead", "dropout", dropout)),
            nn.Conv2d(hidden, positive_int("FCNHead", "num_classes", num_classes), 1),
        )


class DANetHead(nn.Module):
    r"""DANet's head: position and channel attention side by side, summed.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, figure 2. Names are those of the
    authors' ``DANetHead``: ``conv5a, conv5c, sa, sc, conv51, conv52, conv6.1, conv7.1, conv8.1``.

    Args:
        in_channels: channels of the feature map.
        num_classes: channels of the logits.
        inter_channels: of the attended feature maps; ``in_channels // 4`` if None.
        key_channels: of query and key of the position attention; ``inter_channels // 8`` if None.
        norm_layer: makes a norm layer from its number of channels.
        dropout: probability before each classifier.

    Shape:
        x (B, in_channels, H, W) -> {"out": fused, "position", "channel"}, each (B, num_classes, H, W).
    """

    inputs: ClassVar[tuple[str, ...]] = ("layer4",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int | None = None,
        key_channels: int | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("DANetHead", "in_channels", in_channels)
        positive_int("DANetHead", "num_classes", num_classes)
        inter = positive_int("DANetHead", "inter_channels", inter_channels or in_channels // 4)
        probability("DANetHead", "dropout", dropout)
        self.conv5a = conv_block(in_channels, inter, norm_layer)
        self.conv5c = conv_block(in_channels, inter, norm_layer)
        self.sa = PositionAttention(inter, key_channels)
        self.sc = ChannelAttention(inter)
        self.conv51 = conv_block(inter, inter, norm_layer)
        self.conv52 = conv_block(inter, inter, norm_layer)
        self.conv6 = _classifier(inter, num_classes, dropout)
        self.conv7 = _classifier(inter, num_classes, dropout)
        self.conv8 = _classifier(inter, num_classes, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x (B, in_channels, H, W) -> logits by name, each (B, num_classes, H, W)."""
        feature_map("DANetHead", "input", x, self.in_channels)
        position = self.conv51(self.sa(self.conv5a(x)))
        channel = self.conv52(self.sc(self.conv5c(x)))
        return {
            "out": self.conv8(position + channel),
            "position": self.conv6(position),
            "channel": self.conv7(channel),
        }

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> dict[str, Tensor]: ...


class CCNetHead(nn.Module):
    r"""CCNet's head (RCCA): convolution, recurrent criss-cross attention, convolution, joined with its input.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019, section 3.1. Names are
    those of the authors' ``RCCAModule``: ``conva, cca, convb, bottleneck.0, bottleneck.1, bottleneck.3``.

    Args:
        in_channels: channels of the feature map.
        num_classes: channels of the logits.
        inter_channels: of the attended feature map; ``in_channels // 4`` if None.
        out_channels: of the input of the classifier; ``inter_channels`` if None.
        recurrence: passes of the attention.
        activation: makes the activation after each norm; leaky ReLU (0.01) as CCNet's InPlaceABN, mmsegmentation uses
            ``nn.ReLU``.
        norm_layer: makes a norm layer from its number of channels.
        dropout: probability before the classifier.

    Shape:
        x (B, in_channels, H, W) -> (B, num_classes, H, W).
    """

    inputs: ClassVar[tuple[str, ...]] = ("layer4",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int | None = None,
        out_channels: int | None = None,
        recurrence: int = 2,
        activation: Activation = leaky_relu,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("CCNetHead", "in_channels", in_channels)
        inter = positive_int("CCNetHead", "inter_channels", inter_channels or in_channels // 4)
        self.conva = conv_block(in_channels, inter, norm_layer, activation)
        self.cca = RecurrentCrissCrossAttention(inter, recurrence)
        self.convb = conv_block(inter, inter, norm_layer, activation)
        self.bottleneck = _bottleneck(
            "CCNetHead", in_channels, inter, out_channels, num_classes, norm_layer, activation, dropout
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, num_classes, H, W)."""
        feature_map("CCNetHead", "input", x, self.in_channels)
        logits: Tensor = self.bottleneck(torch.cat([x, self.convb(self.cca(self.conva(x)))], dim=1))
        return logits

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


class NonLocalHead(nn.Module):
    r"""Non-local head: convolution, non-local block, convolution, joined with its input (mmsegmentation's NLHead).

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018. Names as :class:`CCNetHead`, with ``nl`` for ``cca``.

    Args:
        in_channels: channels of the feature map.
        num_classes: channels of the logits.
        inter_channels: of the attended feature map; ``in_channels // 4`` if None.
        out_channels: of the input of the classifier; ``inter_channels`` if None.
        mode, scale: of :class:`~segattn_ops.nn.NonLocal2d`; a scale of None is ``(inter_channels // 2) ** -0.5`` in
            the mode embedded_gaussian, as mmcv has it, else 1.
        activation, norm_layer, dropout: as in :class:`CCNetHead`, but ReLU by default.

    Shape:
        x (B, in_channels, H, W) -> (B, num_classes, H, W).
    """

    inputs: ClassVar[tuple[str, ...]] = ("layer4",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int | None = None,
        out_channels: int | None = None,
        mode: str = "embedded_gaussian",
        scale: float | None = None,
        activation: Activation = nn.ReLU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("NonLocalHead", "in_channels", in_channels)
        inter = positive_int("NonLocalHead", "inter_channels", inter_channels or in_channels // 4)
        if scale is None:
            scale = max(inter // 2, 1) ** -0.5 if mode == "embedded_gaussian" else 1.0
        self.conva = conv_block(in_channels, inter, norm_layer, activation)
        self.nl = NonLocal2d(inter, mode=mode, scale=scale, norm_layer=norm_layer)
        self.convb = conv_block(inter, inter, norm_layer, activation)
        self.bottleneck = _bottleneck(
            "NonLocalHead", in_channels, inter, out_channels, num_classes, norm_layer, activation, dropout
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, num_classes, H, W)."""
        feature_map("NonLocalHead", "input", x, self.in_channels)
        logits: Tensor = self.bottleneck(torch.cat([x, self.convb(self.nl(self.conva(x)))], dim=1))
        return logits

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


def _bottleneck(
    name: str,
    in_channels: int,
    inter: int,
    out_channels: int | None,
    num_classes: int,
    norm_layer: NormLayer,
    activation: Activation,
    dropout: float,
) -> nn.Sequential:
    """Concatenated features to logits. The activation shares index 2 with the dropout, so that the classifier is ``3``,
    as in CCNet."""
    outputs = positive_int(name, "out_channels", out_channels or inter)
    return nn.Sequential(
        nn.Conv2d(in_channels + inter, outputs, 3, padding=1, bias=False),
        norm_layer(outputs),
        nn.Sequential(activation(), nn.Dropout2d(probability(name, "dropout", dropout))),
        nn.Conv2d(outputs, positive_int(name, "num_classes", num_classes), 1),
    )


class ANNHead(nn.Module):
    r"""ANN's head: asymmetric fusion of two stages, convolution, asymmetric pyramid non-local block, classifier.

    Source: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019, figure 4. Names
    are the authors': ``fusion`` (AFNB), ``context.0``, ``context.1.0``, ``context.2`` (APNB), ``cls``.

    Args:
        low_channels: channels of the low-level feature map.
        high_channels: channels of the high-level feature map.
        num_classes: channels of the logits.
        channels: of the second block; ``high_channels // 4`` if None.
        key_channels, value_channels: of both blocks; ``channels // 2`` if None.
        pool_sizes: grids that keys and values are pooled to.
        norm_layer: makes a norm layer from its number of channels.
        dropout: probability at the end of both blocks.

    Shape:
        low (B, low_channels, H', W'), high (B, high_channels, H, W) -> (B, num_classes, H, W).
    """

    inputs: ClassVar[tuple[str, ...]] = ("layer3", "layer4")

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        num_classes: int,
        channels: int | None = None,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool_sizes: Sequence[int] = (1, 3, 6, 8),
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        positive_int("ANNHead", "high_channels", high_channels)
        inner = positive_int("ANNHead", "channels", channels or high_channels // 4)
        keys, values = key_channels or max(inner // 2, 1), value_channels or max(inner // 2, 1)
        shared: dict[str, Any] = {"dropout": dropout, "pool_sizes": pool_sizes, "norm_layer": norm_layer}
        self.fusion = AFNB(low_channels, high_channels, high_channels, keys, values, **shared)
        self.context = nn.Sequential(
            nn.Conv2d(high_channels, inner, 3, padding=1),
            nn.Sequential(norm_layer(inner), nn.ReLU()),
            APNB(inner, inner, keys, values, **shared),
        )
        self.cls = nn.Conv2d(inner, positive_int("ANNHead", "num_classes", num_classes), 1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low (B, low_channels, H', W'), high (B, high_channels, H, W) -> (B, num_classes, H, W)."""
        logits: Tensor = self.cls(self.context(self.fusion(low, high)))
        return logits

    if TYPE_CHECKING:

        def __call__(self, low: Tensor, high: Tensor) -> Tensor: ...
