"""Channel attention: DANet's CAM."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.channel import residual_channel_attention
from ._checks import ScalarShapes, feature_map, finite_float, positive_int

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ChannelAttention(ScalarShapes):
    r"""DANet's channel attention module (CAM) on the fused op.

    ``y = gamma * channel_attention(x, x, x, scale) + x``

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, equations 3 and 4, in the form of
    the authors' ``CAM_Module``: softmax(rowmax(E) - E), which is softmax(-E), hence ``scale = -1``. Its only parameter
    is ``gamma`` (1,); a 0-dim one loads too.

    Args:
        in_channels: C, which the input must have; any number of channels if None. No parameter depends on it.
        scale: factor on the energies before the softmax; -1 in DANet's code, +1 as its paper prints it.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W) -> (B, C, H, W), same dtype. The energies are accumulated in float32 (float64 for float64).

    Raises:
        TypeError: for a scale that is not a number, or an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype or number of channels.
    """

    def __init__(
        self, in_channels: int | None = None, scale: float = -1.0, *, mesh: "DeviceMesh | None" = None
    ) -> None:
        super().__init__()
        self.in_channels = None if in_channels is None else positive_int("ChannelAttention", "in_channels", in_channels)
        self.scale = finite_float("ChannelAttention", "scale", scale)
        self.gamma = nn.Parameter(torch.zeros(1))
        self._set_mesh(mesh, calls_ops=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> gamma * attention + x, of the same shape."""
        feature_map("ChannelAttention", "input", x, self.in_channels)
        mesh = self._mesh_for(x)
        if mesh is None:
            return residual_channel_attention(x, self.gamma, self.scale)
        from .. import distributed

        return distributed.residual_channel_attention(x, self.gamma, mesh=mesh, scale=self.scale)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, scale={self.scale:g}{self._mesh_repr()}"
