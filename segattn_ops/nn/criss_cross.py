"""Criss-cross attention: CCNet's block and its recurrence."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.criss_cross import criss_cross_attention
from ._checks import ScalarShapes, feature_map, finite_float, of_part, positive_int, reduced_channels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class CrissCrossAttention(ScalarShapes):
    r"""CCNet's criss-cross attention on the fused op: every position attends to its row and its column.

    ``y = gamma * criss_cross_attention(query_conv(x), key_conv(x), value_conv(x), scale) + x``

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019, section 3.2. Parameter
    names and shapes are those of both published versions of the authors' block: ``gamma`` (1,),
    ``{query,key,value}_conv.{weight,bias}``.

    Args:
        in_channels: C, channels of the feature map.
        key_channels: E, channels of query and key; ``in_channels // 8`` if None.
        scale: factor on the energies before the softmax; 1 in CCNet.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W) -> (B, C, H, W), same dtype. H = 1 and W = 1 are valid.

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
        name = type(self).__name__
        self.in_channels = positive_int(name, "in_channels", in_channels)
        self.key_channels = reduced_channels(name, "key_channels", self.in_channels, key_channels, 8)
        self.scale = finite_float(name, "scale", scale)
        self.query_conv = nn.Conv2d(self.in_channels, self.key_channels, 1)
        self.key_conv = nn.Conv2d(self.in_channels, self.key_channels, 1)
        self.value_conv = nn.Conv2d(self.in_channels, self.in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self._set_mesh(mesh, calls_ops=True)

    def _attend(self, x: Tensor) -> Tensor:
        """One pass: x (B, C, H, W) -> (B, C, H, W)."""
        projections = self.query_conv, self.key_conv, self.value_conv
        mesh = self._mesh_for(x, *projections)
        if mesh is None:
            query, key, value = (project(x) for project in projections)
            attended = criss_cross_attention(query, key, value, self.scale)
        else:
            from .. import distributed

            query, key, value = (of_part(project, x) for project in projections)
            attended = distributed.criss_cross_attention(query, key, value, mesh=mesh, scale=self.scale)
        return self.gamma * attended + x

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> gamma * attention + x, of the same shape."""
        feature_map("CrissCrossAttention", "input", x, self.in_channels)
        return self._attend(x)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        sizes = f"in_channels={self.in_channels}, key_channels={self.key_channels}, scale={self.scale:g}"
        return f"{sizes}{self._mesh_repr()}"


class RecurrentCrissCrossAttention(CrissCrossAttention):
    r"""CCNet's recurrent criss-cross attention (RCCA): the same block, same weights, applied ``recurrence`` times.

    After two passes every position has attended to every other (CCNet, section 3.3). The state dict is that of one
    :class:`CrissCrossAttention`.

    Args:
        in_channels: C, channels of the feature map.
        recurrence: number of passes; 2 in CCNet.
        key_channels: E, channels of query and key; ``in_channels // 8`` if None.
        scale: factor on the energies before the softmax; 1 in CCNet.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Raises:
        TypeError: as :class:`CrissCrossAttention`.
        ValueError: as :class:`CrissCrossAttention`, and for a recurrence below 1.
    """

    def __init__(
        self,
        in_channels: int,
        recurrence: int = 2,
        key_channels: int | None = None,
        scale: float = 1.0,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(in_channels, key_channels, scale, mesh=mesh)
        self.recurrence = positive_int("RecurrentCrissCrossAttention", "recurrence", recurrence)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the block applied ``recurrence`` times, of the same shape."""
        feature_map("RecurrentCrissCrossAttention", "input", x, self.in_channels)
        for _ in range(self.recurrence):
            x = self._attend(x)
        return x

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recurrence={self.recurrence}"
