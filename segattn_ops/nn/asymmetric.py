"""Asymmetric non-local blocks of ANN: every position attends to pyramid-pooled keys."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.position import position_attention
from ._checks import Unscripted, feature_map, is_pointwise, is_recorded, positive_int, probability
from ._pooling import adaptive_avg_pool2d

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NormLayer = Callable[[int], nn.Module]


class PyramidPooling(nn.Module):
    """Adaptive average pooling to several square grids, flattened and joined: (B, C, H, W) -> (B, C, S), S = sum of
    squares.

    Args:
        sizes: sides of the grids; (1, 3, 6, 8) gives ANN's S = 110, (1, 2, 3, 6) DRANet's 50.
    """

    def __init__(self, sizes: Sequence[int] = (1, 3, 6, 8)) -> None:
        super().__init__()
        self.sizes = tuple(positive_int("PyramidPooling", "sizes", size) for size in sizes)
        if not self.sizes:
            raise ValueError("PyramidPooling: sizes must not be empty")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, S)."""
        return torch.cat([adaptive_avg_pool2d(x, size).flatten(2) for size in self.sizes], dim=2)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


class AsymmetricAttention(Unscripted):
    r"""One stage of an asymmetric non-local block: queries at every position, keys and values pyramid-pooled.

    ``y = W(position_attention(f_query(high), pool(f_key(low)), pool(f_value(low)), key_channels ** -0.5))``

    A 1 x 1 convolution is affine and average pooling preserves constants, so pool(f_value(low)) = f_value(pool(low)).
    The second form is computed: the value projection then runs on 110 positions instead of N. If f_value has been
    replaced by another kind of layer, the first form is.

    Source: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019, equations 7 to 9.
    Names are the authors': ``f_key.0, f_key.1.0, f_query.*, f_value, W``; W starts at zero.

    Args:
        low_channels: channels of the feature map of keys and values.
        high_channels: channels of the feature map of the queries.
        key_channels: channels of queries and keys.
        value_channels: channels of the values.
        out_channels: channels of the result.
        pool_sizes: grids of :class:`PyramidPooling`.
        shared: use f_key for the queries as well, as APNB does (``f_query`` and ``f_key`` are then one module under
            two names).
        norm_layer: makes a norm layer from its number of channels.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        pool_sizes: Sequence[int] = (1, 3, 6, 8),
        shared: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        if shared and low_channels != high_channels:
            raise ValueError(
                "AsymmetricAttention: a shared projection needs low_channels = high_channels "
                f"(got {low_channels} and {high_channels})"
            )

        def projection(channels: int) -> nn.Sequential:
            norm = nn.Sequential(norm_layer(key_channels), nn.ReLU())
            return nn.Sequential(nn.Conv2d(channels, key_channels, 1), norm)

        self.scale = key_channels**-0.5
        self.f_key = projection(low_channels)
        self.f_query = self.f_key if shared else projection(high_channels)
        self.f_value = nn.Conv2d(low_channels, value_channels, 1)
        self.W = nn.Conv2d(value_channels, out_channels, 1)
        self.psp = PyramidPooling(pool_sizes)
        for parameter in self.W.parameters():
            nn.init.zeros_(parameter)
        self._set_mesh(mesh)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low (B, low_channels, H', W'), high (B, high_channels, H, W) -> (B, out_channels, H, W)."""
        key = self.f_key(low)
        query = key if self.f_query is self.f_key and high is low else self.f_query(high)
        if is_pointwise(self.f_value):
            value = self.f_value(self.psp(low)[..., None])[..., 0]  # (B, value_channels, S)
        else:
            value = self.psp(self.f_value(low))
        y: Tensor = self.W(position_attention(query, self.psp(key), value, self.scale))
        return y

    if TYPE_CHECKING:

        def __call__(self, low: Tensor, high: Tensor) -> Tensor: ...


def _stages(name: str, sizes: Sequence[int]) -> int:
    """The number of stages, one for each of ANN's ``sizes``. All must be 1: a downsampled query could not be
    concatenated with the input."""
    if not sizes or any(size != 1 for size in sizes):
        raise ValueError(f"{name}: sizes must be a non-empty sequence of ones (got {tuple(sizes)!r})")
    return len(sizes)


def _sum_of(stages: nn.ModuleList, low: Tensor, high: Tensor) -> Tensor:
    """Without the copy that the 0 of Python's ``sum`` makes of a single stage's result."""
    total: Tensor = reduce(torch.add, (stage(low, high) for stage in stages))
    return total


class APNB(Unscripted):
    r"""ANN's asymmetric pyramid non-local block: ``conv_bn_dropout(cat[sum of stages(x), x])``.

    Source: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019, section 3.2. Names
    are the authors': ``stages.0.{f_key,f_query,f_value,W}.*, conv_bn_dropout.0.*, conv_bn_dropout.1.0.*``.

    Args:
        in_channels: channels of the feature map.
        out_channels: channels of the result; also of each stage's, which is concatenated with the input.
        key_channels: channels of queries and keys.
        value_channels: channels of the values.
        dropout: probability of the last layer, Dropout2d.
        sizes: ones, as many as there are stages; their results are added.
        pool_sizes: grids that keys and values are pooled to.
        norm_layer: makes a norm layer from its number of channels.
        mesh: of one dimension or two, whose ranks hold the parts of the feature maps: the forward pass then takes and
            returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, in_channels, H, W) -> (B, out_channels, H, W).

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype or number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        dropout: float = 0.05,
        sizes: Sequence[int] = (1,),
        pool_sizes: Sequence[int] = (1, 3, 6, 8),
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("APNB", "in_channels", in_channels)
        positive_int("APNB", "out_channels", out_channels)
        positive_int("APNB", "key_channels", key_channels)
        positive_int("APNB", "value_channels", value_channels)
        self.stages = nn.ModuleList(
            AsymmetricAttention(
                in_channels, in_channels, key_channels, value_channels, out_channels, pool_sizes, True, norm_layer
            )
            for _ in range(_stages("APNB", sizes))
        )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(in_channels + out_channels, out_channels, 1),
            nn.Sequential(norm_layer(out_channels), nn.ReLU()),
            nn.Dropout2d(probability("APNB", "dropout", dropout)),
        )
        self._set_mesh(mesh)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        feature_map("APNB", "input", x, self.in_channels)
        y: Tensor = self.conv_bn_dropout(torch.cat([_sum_of(self.stages, x, x), x], dim=1))
        return y

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


class AFNB(Unscripted):
    r"""ANN's asymmetric fusion non-local block: high-level queries, low-level keys and values.

    ``y = conv_bn_dropout(cat[sum of stages(low, high), high])``

    Source: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019, section 3.3. Names
    are the authors': ``stages.0.{f_key,f_query,f_value,W}.*, conv_bn_dropout.0.*, conv_bn_dropout.1.*`` (batch norm
    without ReLU).

    Args:
        low_channels: channels of the low-level feature map (keys and values).
        high_channels: channels of the high-level feature map (queries).
        out_channels, key_channels, value_channels, dropout, sizes, pool_sizes, norm_layer, mesh: as in :class:`APNB`.

    Shape:
        low (B, low_channels, H', W'), high (B, high_channels, H, W) -> (B, out_channels, H, W); the two sizes may
        differ.

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype or number of channels.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        dropout: float = 0.05,
        sizes: Sequence[int] = (1,),
        pool_sizes: Sequence[int] = (1, 3, 6, 8),
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        self.low_channels = positive_int("AFNB", "low_channels", low_channels)
        self.high_channels = positive_int("AFNB", "high_channels", high_channels)
        positive_int("AFNB", "out_channels", out_channels)
        positive_int("AFNB", "key_channels", key_channels)
        positive_int("AFNB", "value_channels", value_channels)
        self.stages = nn.ModuleList(
            AsymmetricAttention(
                low_channels, high_channels, key_channels, value_channels, out_channels, pool_sizes, False, norm_layer
            )
            for _ in range(_stages("AFNB", sizes))
        )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(out_channels + high_channels, out_channels, 1),
            norm_layer(out_channels),
            nn.Dropout2d(probability("AFNB", "dropout", dropout)),
        )
        self._set_mesh(mesh)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low (B, low_channels, H', W'), high (B, high_channels, H, W) -> (B, out_channels, H, W)."""
        feature_map("AFNB", "low", low, self.low_channels)
        feature_map("AFNB", "high", high, self.high_channels)
        if not is_recorded(low, high) and low.shape[0] != high.shape[0]:
            raise ValueError(f"AFNB: low must have batch size {high.shape[0]} like high (got {low.shape[0]})")
        y: Tensor = self.conv_bn_dropout(torch.cat([_sum_of(self.stages, low, high), high], dim=1))
        return y

    if TYPE_CHECKING:

        def __call__(self, low: Tensor, high: Tensor) -> Tensor: ...
