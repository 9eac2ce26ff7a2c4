"""Position attention: DANet's PAM."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.position import position_attention
from ._checks import ScalarShapes, feature_map, finite_float, of_part, positive_int, reduced_channels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class PositionAttention(ScalarShapes):
    r"""DANet's position attention module (PAM) on the fused op: no N x N attention map is stored.

    ``y = gamma * position_attention(query_conv(x), key_conv(x), value_conv(x), scale) + x``

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, equations 1 and 2. Parameter names
    and shapes are those of the authors' ``PAM_Module``: ``gamma`` (1,) and ``{query,key,value}_conv.{weight,bias}`` (1
    x 1 convolutions), so that its state dict loads unchanged; a 0-dim ``gamma`` loads too.

    Args:
        in_channels: C, channels of the feature map.
        key_channels: E, channels of query and key; ``in_channels // 8`` if None.
        scale: factor on the energies before the softmax; 1 in DANet.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W), any floating-point dtype the op takes -> (B, C, H, W), same dtype.

    Raises:
        TypeError: for a scale that is not a number, or an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype or number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int | None = None,
        scale: float = 1.0,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("PositionAttention", "in_channels", in_channels)
        self.key_channels = reduced_channels("PositionAttention", "key_channels", self.in_channels, key_channels, 8)
        self.scale = finite_float("PositionAttention", "scale", scale)
        self.query_conv = nn.Conv2d(self.in_channels, self.key_channels, 1)
        self.key_conv = nn.Conv2d(self.in_channels, self.key_channels, 1)
        self.value_conv = nn.Conv2d(self.in_channels, self.in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self._set_mesh(mesh, calls_ops=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> gamma * attention + x, of the same shape."""
        feature_map("PositionAttention", "input", x, self.in_channels)
        projections = self.query_conv, self.key_conv, self.value_conv
        mesh = self._mesh_for(x, *projections)
        if mesh is None:
            query, key, value = (project(x) for project in projections)
            attended = position_attention(query, key, value, self.scale)
        else:
            from .. import distributed

            query, key, value = (of_part(project, x) for project in projections)
            attended = distributed.position_attention(query, key, value, mesh=mesh, scale=self.scale)
        return self.gamma * attended + x

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        sizes = f"in_channels={self.in_channels}, key_channels={self.key_channels}, scale={self.scale:g}"
        return f"{sizes}{self._mesh_repr()}"
