"""Non-local blocks in 1, 2 and 3 spatial dimensions, in all four modes of the paper."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops.position import position_attention
from . import _pairwise
from ._checks import Unscripted, feature_map, finite_float, is_recorded, positive_int

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_POOL_SIZE: dict[int, int | tuple[int, ...]] = {1: 2, 2: (2, 2), 3: (1, 2, 2)}


class _NonLocal(Unscripted):
    """See :class:`NonLocal2d`."""

    spatial_dims = 2

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        mode: str = "embedded_gaussian",
        sub_sample: bool = False,
        scale: float = 1.0,
        norm_layer: Callable[[int], nn.Module] | None | str = "batch_norm",
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        name, dims = type(self).__name__, self.spatial_dims
        self.in_channels = positive_int(name, "in_channels", in_channels)
        self.inter_channels = positive_int(
            name, "inter_channels", max(self.in_channels // 2, 1) if inter_channels is None else inter_channels
        )
        if mode not in MODES:
            raise ValueError(f"{name}: mode must be one of {', '.join(MODES)} (got {mode!r})")
        self.mode = mode
        self.sub_sample = bool(sub_sample)
        self.scale = finite_float(name, "scale", scale)
        if self.scale != 1.0 and mode in ("dot_product", "concatenation"):
            raise ValueError(f"{name}: scale must be 1 in mode {mode}, which has no softmax (got {scale!r})")
        if norm_layer == "batch_norm":
            norm_layer = _NORM[dims]
        elif isinstance(norm_layer, str):
            raise ValueError(f"{name}: norm_layer must be a callable, None or 'batch_norm' (got {norm_layer!r})")

        conv = _CONV[dims]
        pool = _POOL[dims](_POOL_SIZE[dims])

        def sampled(layer: nn.Module) -> nn.Module:
            return nn.Sequential(layer, pool) if self.sub_sample else layer

        self.g = sampled(conv(self.in_channels, self.inter_channels, 1))
        if mode != "gaussian":
            self.theta = conv(self.in_channels, self.inter_channels, 1)
            self.phi = sampled(conv(self.in_channels, self.inter_channels, 1))
        elif self.sub_sample:
            self.phi = pool
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * self.inter_channels, 1, 1, bias=False), nn.ReLU())
        out = conv(self.inter_channels, self.in_channels, 1)
        if norm_layer is None:
            self.W: nn.Module = out
            last: nn.Module = out
        else:
            last = norm_layer(self.in_channels)
            self.W = nn.Sequential(out, last)
        for parameter in last.parameters():  # the block starts as the identity (paper, section 4.1)
            nn.init.zeros_(parameter)
        refused = "the mode concatenation" if mode == "concatenation" else f"{dims} spatial dimensions"
        self._set_mesh(mesh, refused if dims != 2 or mode == "concatenation" else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> x + W(y), of the same shape."""
        name = type(self).__name__
        feature_map(name, "input", x, self.in_channels, self.spatial_dims)
        if self.sub_sample and not is_recorded(x):
            pooled = x.shape[-min(self.spatial_dims, 2) :]  # a 3-D pool does not reduce time
            if min(pooled) < 2:
                raise ValueError(f"{name}: sub_sample needs sides of at least 2 to halve (got {tuple(pooled)})")
        y: Tensor = self.W(self._aggregate(x))
        return x + y

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def _aggregate(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> y (B, inter_channels, *spatial)."""
        g = self.g(x)
        if self.mode == "gaussian":
            return position_attention(x, self.phi(x) if self.sub_sample else x, g, self.scale)
        theta, phi = self.theta(x), self.phi(x)
        if self.mode == "embedded_gaussian":
            return position_attention(theta, phi, g, self.scale)
        theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
        if self.mode == "dot_product":
            y = _pairwise.dot_product(theta, phi, g)
        else:
            y = _pairwise.concatenation(self.concat_project, theta, phi, g)
        unflattened: Tensor = y.unflatten(2, x.shape[2:])
        return unflattened

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, inter_channels={self.inter_channels}, mode={self.mode}, "
            f"sub_sample={self.sub_sample}, scale={self.scale:g}{self._mesh_repr()}"
        )


class NonLocal2d(_NonLocal):
    r"""Non-local block: ``z = x + W(y)``, where y_i = sum_j f(x_i, x_j) g(x_j) over all positions; no N x N attention
    map is stored.

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018. The modes are the paper's choices of f:

    =================== ========================================================= ================================
    mode                f                                                         evaluated by
    =================== ========================================================= ================================
    embedded_gaussian   softmax_j(scale * theta_i . phi_j)                        ``position_attention``
    gaussian            softmax_j(scale * x_i . x_j)                              ``position_attention``
    dot_product         theta_i . phi_j / N                                       phi g^T first: linear in N
    concatenation       ReLU(w . [theta_i, phi_j]) / N                            sort and prefix sums: N log N
    =================== ========================================================= ================================

    Parameter names are those of AlexHex7's ``NONLocalBlock2D`` (``g, theta, phi, W.0, W.1, concat_project.0``; ``g.0,
    phi.0`` with sub_sample; ``W`` alone without a norm layer). mmcv's and timm's load through
    :mod:`segattn_ops.checkpoints`.

    Args:
        in_channels: C, channels of the feature map.
        inter_channels: channels of theta, phi and g; ``max(C // 2, 1)`` if None.
        mode: one of the table's.
        sub_sample: max-pool phi and g by 2 in height and width, which quarters the keys.
        scale: factor on the energies of the two softmax modes; 1 in the paper, ``inter_channels ** -0.5`` in mmcv's
            embedded Gaussian, ``in_channels ** -0.5`` in timm.
        norm_layer: makes the norm after W from its number of channels; batch norm by default, None for none. The last
            layer starts at zero, so that the block starts as the identity.
        mesh: not in the mode concatenation; of one dimension or two, whose ranks hold the parts of the feature
            maps: the forward pass then takes and returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W) -> (B, C, H, W).

    Raises:
        TypeError: for a scale that is not a number, or an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype or number of channels, or too
            small to pool.
    """

    spatial_dims = 2


class NonLocal1d(_NonLocal):
    """:class:`NonLocal2d` for sequences: x (B, C, L) -> (B, C, L). Without mesh."""

    spatial_dims = 1


class NonLocal3d(_NonLocal):
    """:class:`NonLocal2d` for video and volumes: x (B, C, T, H, W) -> (B, C, T, H, W); sub_sample does not reduce T.
    Without mesh."""

    spatial_dims = 3
