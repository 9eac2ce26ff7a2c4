"""The two blocks of DFN (Discriminative Feature Network)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import Unscripted, feature_map, positive_int, same_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ChannelAttentionBlock(Unscripted):
    r"""DFN's channel attention block (CAB): high-level features weight the channels of low-level ones.

    ``gate = sigmoid(conv2(relu(conv1(mean(cat[high, low])))))``, ``y = gate * low + high``

    The means are concatenated, not the feature maps: the same result without a concatenated feature map.

    Source: Yu et al., "Learning a Discriminative Feature Network for Semantic Segmentation", CVPR 2018, section 3.2
    and figure 3b. Names are those of dfn_seg's ``CAB``: ``conv1, conv2``.

    Args:
        in_channels: channels of high and low together.
        out_channels: channels of each of them, and of the result.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        high (B, out_channels, H, W), low (B, out_channels, H, W) -> (B, out_channels, H, W).

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for arguments out of range, or inputs of the wrong rank, dtype, sizes or number of channels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, mesh: "DeviceMesh | None" = None) -> None:
        super().__init__()
        self.in_channels = positive_int("ChannelAttentionBlock", "in_channels", in_channels)
        self.out_channels = positive_int("ChannelAttentionBlock", "out_channels", out_channels)
        if in_channels != 2 * out_channels:
            raise ValueError(
                "ChannelAttentionBlock: in_channels must be 2 * out_channels, the channels of high and low together "
                f"(got {in_channels} and {out_channels})"
            )
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 1)
        self._set_mesh(mesh)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """high, low (B, out_channels, H, W) -> (B, out_channels, H, W)."""
        feature_map("ChannelAttentionBlock", "high", high, self.out_channels)
        feature_map("ChannelAttentionBlock", "low", low, self.out_channels)
        same_size("ChannelAttentionBlock", "low", low, "high", high)
        pooled = torch.cat([F.adaptive_avg_pool2d(high, 1), F.adaptive_avg_pool2d(low, 1)], dim=1)
        gate: Tensor = self.conv2(self.conv1(pooled).relu()).sigmoid()
        return gate * low + high

    if TYPE_CHECKING:

        def __call__(self, high: Tensor, low: Tensor) -> Tensor: ...


class RefinementResidualBlock(Unscripted):
    r"""DFN's refinement residual block (RRB).

    ``x = conv1(input)``, ``y = relu(x + conv3(relu(bn(conv2(x)))))``

    Source: Yu et al., CVPR 2018, section 3.2 and figure 3a. Names are those of dfn_seg's ``RRB``: ``conv1`` (1 x 1),
    ``conv2``, ``conv3`` (3 x 3), ``bn``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        final_relu: the ReLU after the sum, in the paper's figure but not in dfn_seg. False for dfn_seg's weights.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, in_channels, H, W) -> (B, out_channels, H, W).

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype or number of channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, final_relu: bool = True, *, mesh: "DeviceMesh | None" = None
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("RefinementResidualBlock", "in_channels", in_channels)
        positive_int("RefinementResidualBlock", "out_channels", out_channels)
        self.final_relu = bool(final_relu)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.conv3 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self._set_mesh(mesh)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        feature_map("RefinementResidualBlock", "input", x, self.in_channels)
        x = self.conv1(x)
        y: Tensor = x + self.conv3(self.bn(self.conv2(x)).relu())
        return y.relu() if self.final_relu else y

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...
