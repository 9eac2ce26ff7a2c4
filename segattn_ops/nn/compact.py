"""The blocks of DRANet (Dual Relation-aware Attention Network): attention to a few gathered tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.channel import channel_attention
from ..ops.position import position_attention
from ._checks import ScalarShapes, Unscripted, feature_map, is_recorded, positive_int, same_size
from ._pooling import adaptive_avg_pool2d

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NormLayer = Callable[[int], nn.Module]


class CompactPositionEncoder(Unscripted):
    """Gathers 1 + 4 + 9 + 36 = 50 tokens: the feature map pooled to 1, 2, 3 and 6, each with its own 1 x 1 convolution,
    norm and ReLU.

    Source: Fu et al., "Scene Segmentation with Dual Relation-aware Attention Network", TNNLS 2020, section III-B (the
    gathering half of CPAM). Names are the authors' (``CPAMEnc``): ``conv1.0, conv1.1 ... conv4.1``.

    Args:
        in_channels: channels of the feature map and of the tokens.
        norm_layer: makes a norm layer from its number of channels.
        mesh: of one dimension or two, whose ranks hold the parts of the feature map: the forward pass then takes this
            rank's part, and returns the tokens, the same on each rank. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W) -> tokens (B, 50, C).
    """

    sizes = (1, 2, 3, 6)

    def __init__(
        self, in_channels: int, norm_layer: NormLayer = nn.BatchNorm2d, *, mesh: "DeviceMesh | None" = None
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("CompactPositionEncoder", "in_channels", in_channels)

        def block() -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(in_channels, in_channels, 1, bias=False), norm_layer(in_channels), nn.ReLU())

        self.conv1, self.conv2, self.conv3, self.conv4 = (block() for _ in self.sizes)
        self._set_mesh(mesh)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, 50, C)."""
        feature_map("CompactPositionEncoder", "input", x, self.in_channels)
        convs = (self.conv1, self.conv2, self.conv3, self.conv4)
        pooled = [adaptive_avg_pool2d(x, size) for size in self.sizes]
        return torch.cat([conv(part).flatten(2) for conv, part in zip(convs, pooled, strict=True)], dim=2).mT

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


class CompactPositionAttention(ScalarShapes):
    r"""DRANet's compact position attention: every position attends to the gathered tokens (S != T on the fused op).

    ``y = scale * position_attention(conv_query(x), conv_key(tokens), conv_value(tokens)) + x``

    Source: Fu et al., TNNLS 2020, section III-B. Names are the authors' (``CPAMDec``): ``scale`` (1,), ``conv_query``
    (1 x 1 convolution), ``conv_key``, ``conv_value`` (linear layers).

    Args:
        in_channels: C, channels of the feature map and of the tokens, at least 4; queries and keys have ``C // 4``.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. The tokens are the same on each rank. See
            :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W), tokens (B, K, C) -> (B, C, H, W).

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for arguments out of range, or inputs of the wrong rank, dtype, batch size or number of channels.
    """

    def __init__(self, in_channels: int, *, mesh: "DeviceMesh | None" = None) -> None:
        super().__init__()
        self.in_channels = positive_int("CompactPositionAttention", "in_channels", in_channels)
        if in_channels < 4:
            raise ValueError(f"CompactPositionAttention: in_channels must be at least 4 (got {in_channels})")
        self.conv_query = nn.Conv2d(in_channels, in_channels // 4, 1)
        self.conv_key = nn.Linear(in_channels, in_channels // 4)
        self.conv_value = nn.Linear(in_channels, in_channels)
        self.scale = nn.Parameter(torch.zeros(1))
        self._set_mesh(mesh)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, C, H, W), tokens (B, K, C) -> (B, C, H, W)."""
        feature_map("CompactPositionAttention", "input", x, self.in_channels)
        self._check_tokens(x, tokens)
        key, value = self.conv_key(tokens).mT, self.conv_value(tokens).mT
        return self.scale * position_attention(self.conv_query(x), key, value) + x

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, tokens: Tensor) -> Tensor: ...

    def _check_tokens(self, x: Tensor, tokens: Tensor) -> None:
        if is_recorded(x, tokens):
            return
        if not isinstance(tokens, Tensor):
            raise TypeError(f"CompactPositionAttention: tokens must be a tensor (got {type(tokens).__name__})")
        if tokens.dim() != 3 or tokens.shape[0] != x.shape[0] or tokens.shape[2] != self.in_channels:
            raise ValueError(
                f"CompactPositionAttention: tokens must have shape (B, K, C) = ({x.shape[0]}, K, {self.in_channels}) "
                f"(got {tuple(tokens.shape)})"
            )


class CompactChannelAttention(ScalarShapes):
    r"""DRANet's compact channel attention: every channel attends to K gathered channels.

    ``y = x + scale * channel_attention(x, gathered, gathered, -1)``

    Source: Fu et al., TNNLS 2020, section III-C. Names are the authors' (``CCAMDec``): ``scale`` (1,).

    Args:
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W), gathered (B, K, H, W) -> (B, C, H, W).

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for inputs of the wrong rank or dtype, or of different batch or spatial sizes.
    """

    def __init__(self, *, mesh: "DeviceMesh | None" = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self._set_mesh(mesh)

    def forward(self, x: Tensor, gathered: Tensor) -> Tensor:
        """x (B, C, H, W), gathered (B, K, H, W) -> (B, C, H, W)."""
        feature_map("CompactChannelAttention", "input", x, None)
        feature_map("CompactChannelAttention", "gathered", gathered, None)
        same_size("CompactChannelAttention", "gathered", gathered, "input", x)
        return x + self.scale * channel_attention(x, gathered, gathered, -1.0)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, gathered: Tensor) -> Tensor: ...


class CrossLevelGatingDecoder(ScalarShapes):
    r"""DRANet's cross-level gating decoder: joins attended and low-level features through a learned gate.

    With l = conv_low(low) and h = high upsampled to low's size:
    ``y = conv_out(conv_cat(cat[gamma * conv_att(cat[l, h]) * l, h]))``

    Source: Fu et al., TNNLS 2020, section III-D. Names are the authors' (``CLGD``): ``conv_low, conv_cat, conv_att,
    conv_out`` and ``gamma`` (1,), which starts at one.

    Args:
        in_channels: channels of both feature maps.
        out_channels: channels of the result.
        norm_layer: makes a norm layer from its number of channels.
        align_corners: of the bilinear upsampling; True as the authors have it.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        low (B, C, H, W), high (B, C, H', W') -> (B, out_channels, H, W).
    """

    gate_channels = 32

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_layer: NormLayer = nn.BatchNorm2d,
        align_corners: bool = True,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("CrossLevelGatingDecoder", "in_channels", in_channels)
        positive_int("CrossLevelGatingDecoder", "out_channels", out_channels)
        self.align_corners = align_corners

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm_layer(outputs), nn.ReLU())

        joined = in_channels + self.gate_channels
        self.conv_low = block(in_channels, self.gate_channels)
        self.conv_cat = block(joined, in_channels)
        self.conv_att = nn.Sequential(nn.Conv2d(joined, 1, 1), nn.Sigmoid())
        self.conv_out = block(in_channels, out_channels)
        self.gamma = nn.Parameter(torch.ones(1))
        self._set_mesh(mesh)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low (B, C, H, W), high (B, C, H', W') -> (B, out_channels, H, W)."""
        feature_map("CrossLevelGatingDecoder", "low", low, self.in_channels)
        feature_map("CrossLevelGatingDecoder", "high", high, self.in_channels)
        low = self.conv_low(low)
        high = F.interpolate(high, low.shape[2:], mode="bilinear", align_corners=self.align_corners)
        gate = self.gamma * self.conv_att(torch.cat([low, high], dim=1))
        y: Tensor = self.conv_out(self.conv_cat(torch.cat([gate * low, high], dim=1)))
        return y

    if TYPE_CHECKING:

        def __call__(self, low: Tensor, high: Tensor) -> Tensor: ...
