"""DAModule: the dual attention variant of the External-Attention collection, in scaled dot-product form."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops._memory_format import like_inputs
from ..ops.channel import channel_attention
from ..ops.position import position_attention
from ._checks import Unscripted, feature_map, is_recorded, positive_int

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _PositionProjections(nn.Module):
    """The four linear layers of single-head attention, named as in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc_q = nn.Linear(channels, channels)
        self.fc_k = nn.Linear(channels, channels)
        self.fc_v = nn.Linear(channels, channels)
        self.fc_o = nn.Linear(channels, channels)


class _ChannelProjection(nn.Module):
    """The output layer over positions, of the fixed-size form only."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.fc_o = nn.Linear(positions, positions)


class _PositionBranch(Unscripted):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(channels, channels, kernel_size, padding=(kernel_size - 1) // 2)
        self.pa = _PositionProjections(channels)
        self.scale = channels**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        x = self.cnn(x)
        y = x.flatten(2).mT.contiguous()  # (B, N, C): three linear layers read it faster than its transpose
        query, key, value = (layer(y).mT for layer in (self.pa.fc_q, self.pa.fc_k, self.pa.fc_v))
        projected = self.pa.fc_o(position_attention(query, key, value, self.scale).mT)
        output: Tensor = projected.mT.unflatten(2, x.shape[2:])
        return output

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


class _ChannelBranch(Unscripted):
    def __init__(self, channels: int, kernel_size: int, positions: int | None) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(channels, channels, kernel_size, padding=(kernel_size - 1) // 2)
        self.pa = None if positions is None else _ChannelProjection(positions)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        x = self.cnn(x)
        # Half of the scale (H W)**-0.5 in query and half in key: as an argument, a trace would keep its value. One half
        # keeps float16 clear of overflow and of underflow.
        positions = x.shape[2] * x.shape[3]
        if isinstance(positions, Tensor):  # in a trace, whose power of an integer is a float32
            positions = positions.double()
        scaled = x * positions**-0.25
        y = channel_attention(scaled, scaled, x, 1.0)
        if self.pa is None:
            return y
        projected: Tensor = self.pa.fc_o(y.flatten(2)).unflatten(2, x.shape[2:])
        return projected if is_recorded(x) else like_inputs(projected, x)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


class DAModule(Unscripted):
    r"""Dual attention by scaled dot products: ``position(x) + channel(x)``, each after a k x k convolution; no
    residual, no gamma.

    The position branch is single-head attention with scale 1/sqrt(C) and linear layers before and after it. The
    channel branch has query = key = value, scale 1/sqrt(H * W) and the ordinary sign of the softmax.

    The original (External-Attention-pytorch, ``DAModule``) ends its channel branch with a linear layer over the H * W
    positions, which fixes the input size at 7 x 7. Here that layer exists only if H and W are given; without them any
    size is accepted. Names are the original's: ``position_attention_module.{cnn, pa.fc_q, pa.fc_k, pa.fc_v,
    pa.fc_o}.*`` and ``channel_attention_module.{cnn, pa.fc_o}.*``, so that its state dict loads into the fixed-size
    form unchanged.

    The original applies a dropout of 10% to the attention map in training. It is left out, because the attention map is
    not stored.

    Args:
        d_model: C, channels of the feature map.
        kernel_size: odd, of the two convolutions.
        H, W: both, for the fixed-size form; neither for any size.
        mesh: only without H and W; of one dimension or two, whose ranks hold the parts of the feature maps: the
            forward pass then takes and returns this rank's part. See :mod:`segattn_ops.distributed`.

    Shape:
        x (B, C, H, W) -> (B, C, H, W).

    Raises:
        TypeError: for an input that is not a tensor.
        ValueError: for arguments out of range, or an input of the wrong rank, dtype, channels, or size in the
            fixed-size form.
    """

    def __init__(
        self,
        d_model: int = 512,
        kernel_size: int = 3,
        H: int | None = None,
        W: int | None = None,
        *,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        self.d_model = positive_int("DAModule", "d_model", d_model)
        if positive_int("DAModule", "kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"DAModule: kernel_size must be odd (got {kernel_size})")
        if (H is None) != (W is None):
            raise ValueError(f"DAModule: give both H and W, or neither (got H={H}, W={W})")
        self.size = None if H is None else (positive_int("DAModule", "H", H), positive_int("DAModule", "W", W))
        positions = None if self.size is None else self.size[0] * self.size[1]
        self.position_attention_module = _PositionBranch(d_model, kernel_size)
        self.channel_attention_module = _ChannelBranch(d_model, kernel_size, positions)
        self._set_mesh(mesh, None if self.size is None else "the linear layer over all positions")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        feature_map("DAModule", "input", x, self.d_model)
        if self.size is not None and not is_recorded(x) and tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"DAModule: input must have the spatial size {self.size} that the module was made for "
                f"(got {tuple(x.shape[2:])}); make it without H and W for any size"
            )
        position = self.position_attention_module(x)  # a transposed view
        y: Tensor = self.channel_attention_module(x) + position  # in the memory format of the first summand
        return y

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, size={self.size or 'any'}{self._mesh_repr()}"
