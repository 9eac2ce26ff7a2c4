"""The ops under test: for each its function, its definition, the eager computation that its error is compared with,
and shapes. A ``Family`` here is one op, not one of the three op families of docs/architecture.md."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import segattn_ops
from segattn_ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """The shapes of a call's tensors, and its scale."""

    shapes: tuple[tuple[int, ...], ...]
    scale: float | None = None
    large: bool = False  # too much for the emulator

    @property
    def scalars(self) -> tuple[float, ...]:
        return () if self.scale is None else (self.scale,)

    def __str__(self) -> str:
        return "_".join("x".join(map(str, shape)) for shape in self.shapes)


@dataclass(frozen=True)
class Family:
    operator: str
    function: Callable  # public, returns the output alone
    definition: Callable  # of float64 tensors: the exact result
    eager: Callable  # the formula in the tensors' dtype, as in the original repositories
    cases: tuple[Case, ...]
    inputs: Callable | None = field(default=None)

    def make(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Random inputs, drawn in float64 so that every dtype has the same numbers, rounded."""
        generator = torch.Generator().manual_seed(sum(map(sum, case.shapes)))
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
        if self.inputs is not None:
            tensors = self.inputs(*tensors)
        return [t.to(dtype).to(device) for t in tensors]


def eager_position(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    attention = (scale * torch.bmm(q.flatten(2).transpose(1, 2), k.flatten(2))).softmax(-1)
    return torch.bmm(v.flatten(2), attention.transpose(1, 2)).unflatten(2, q.shape[2:])


def eager_channel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    energy = scale * torch.bmm(q.flatten(2), k.flatten(2).transpose(1, 2))
    return torch.bmm(energy.softmax(-1), v.flatten(2)).unflatten(2, v.shape[2:])


def eager_residual(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    return gamma.reshape(*gamma.shape, *[1] * (x.dim() - 2)) * eager_channel(x, x, x, scale) + x


def eager_affinity(q: Tensor, k: Tensor) -> Tensor:
    row = torch.einsum("beyx,beyj->bjyx", q, k)
    column = torch.einsum("beyx,bejx->bjyx", q, k)
    others = reference._skip_self(column.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.cat([row, others], 1)


def eager_aggregation(a: Tensor, v: Tensor) -> Tensor:
    width = v.shape[3]
    column = reference._insert_self(a[:, width:].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.einsum("bjyx,bcyj->bcyx", a[:, :width], v) + torch.einsum("bjyx,bcjx->bcyx", column, v)


def eager_criss_cross(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return eager_aggregation((scale * eager_affinity(q, k)).softmax(1), v)


def _position(q, k, v, s=1.0, large=False) -> Case:
    return Case((q, k, v), s, large)


POSITION_CASES = (
    _position((2, 8, 5, 7), (2, 8, 5, 7), (2, 16, 5, 7)),
    _position((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    _position((1, 8, 1, 13), (1, 8, 1, 13), (1, 24, 1, 13), 0.5),
    _position((1, 8, 13, 1), (1, 8, 13, 1), (1, 24, 13, 1)),
    _position((2, 12, 9, 11), (2, 12, 3, 4), (2, 20, 3, 4), 0.3),
    _position((1, 16, 6, 7), (1, 16, 110), (1, 33, 110), 0.25),
    _position((1, 5, 4, 5, 3), (1, 5, 4, 5, 3), (1, 7, 4, 5, 3), -0.7),
    _position((3, 64, 10, 10), (3, 64, 10, 10), (3, 40, 10, 10), 0.2),
    _position((1, 70, 9, 9), (1, 70, 130), (1, 65, 130), 0.125),
    _position((1, 64, 33, 31), (1, 64, 33, 31), (1, 512, 33, 31), 0.15, large=True),
    _position((1, 512, 16, 16), (1, 512, 16, 16), (1, 600, 16, 16), 0.05, large=True),
    _position((1, 16, 64, 65), (1, 16, 64, 65), (1, 48, 64, 65), 0.25, large=True),
)


def _channel(q, k, v, s=-1.0, large=False) -> Case:
    return Case((q, k, v), s, large)


CHANNEL_CASES = (
    _channel((2, 8, 5, 7), (2, 8, 5, 7), (2, 8, 5, 7), -0.2),
    _channel((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    _channel((2, 13, 4, 5), (2, 6, 4, 5), (2, 6, 3, 7), 0.3),
    _channel((1, 5, 31), (1, 9, 31), (1, 9, 2, 3), 0.25),
    _channel((1, 70, 9, 9), (1, 65, 9, 9), (1, 65, 40), -0.1),
    _channel((1, 3, 2, 3, 4), (1, 5, 2, 3, 4), (1, 5, 2, 3, 4), 0.4),
    _channel((1, 200, 33, 31), (1, 136, 33, 31), (1, 136, 33, 31), -0.03, large=True),
)

# x, gamma
RESIDUAL_CASES = (
    Case(((2, 8, 5, 7), (2, 8)), -0.2),
    Case(((1, 1, 1, 1), (1, 1)), -1.0),
    Case(((1, 33, 1, 9), (1, 33)), -0.3),
    Case(((2, 13, 9, 11), (2, 13)), 0.1),
    Case(((1, 70, 9, 9), (1, 70)), -0.1),
    Case(((1, 200, 33, 31), (1, 200)), -0.03, large=True),
)

SELF_CASES = (
    Case(((2, 8, 5, 7),), -0.2),
    Case(((1, 1, 1, 1),), -1.0),
    Case(((1, 33, 1, 9),), -0.3),
    Case(((2, 13, 9, 11),), 0.1),
    Case(((1, 70, 9, 9),), -0.1),
    Case(((1, 3, 2, 3, 4),), 0.4),
    Case(((1, 200, 33, 31),), -0.03, large=True),
    Case(((1, 512, 40, 41),), -0.02, large=True),
)

# (B, E, C, H, W), scale
CRISS_CROSS_SIZES = (
    ((2, 8, 16, 5, 7), 1.0),
    ((1, 1, 1, 1, 1), 1.0),
    ((1, 8, 24, 1, 13), 0.5),
    ((1, 8, 24, 13, 1), 0.5),
    ((2, 12, 20, 9, 11), 0.3),
    ((1, 5, 7, 3, 18), -0.7),
    ((1, 16, 33, 19, 17), 0.25),
    ((1, 70, 65, 6, 35), 0.125),
    ((1, 8, 16, 9, 49), 0.3),
    ((1, 64, 136, 33, 31), 0.15),
    ((1, 64, 256, 97, 97), 0.125),
    ((1, 8, 16, 20, 140), 0.3),
    ((1, 8, 16, 140, 20), 0.3),
)
CRISS_CROSS_LARGE = 9  # from here on


def _criss_cross_cases(shapes: Callable, scaled: bool) -> tuple[Case, ...]:
    return tuple(
        Case(shapes(*sizes), scale if scaled else None, large=i >= CRISS_CROSS_LARGE)
        for i, (sizes, scale) in enumerate(CRISS_CROSS_SIZES)
    )


FAMILIES = (
    Family(
        "position_attention",
        segattn_ops.position_attention,
        lambda *a: reference.position_attention(*a)[0],
        eager_position,
        POSITION_CASES,
    ),
    Family(
        "channel_attention",
        segattn_ops.channel_attention,
        lambda *a: reference.channel_attention(*a)[0],
        eager_channel,
        CHANNEL_CASES,
    ),
    Family(
        "channel_self_attention",
        lambda x, scale: segattn_ops.channel_attention(x, x, x, scale),
        lambda x, scale: reference.channel_attention(x, x, x, scale)[0],
        lambda x, scale: eager_channel(x, x, x, scale),
        SELF_CASES,
    ),
    Family(
        "residual_channel_attention",
        segattn_ops.residual_channel_attention,
        lambda x, gamma, scale: reference.channel_self_attention(x, scale, gamma)[0],
        eager_residual,
        RESIDUAL_CASES,
    ),
    Family(
        "criss_cross_affinity",
        segattn_ops.criss_cross_affinity,
        reference.criss_cross_affinity,
        eager_affinity,
        _criss_cross_cases(lambda b, e, c, h, w: ((b, e, h, w), (b, e, h, w)), scaled=False),
    ),
    Family(
        "criss_cross_aggregation",
        segattn_ops.criss_cross_aggregation,
        reference.criss_cross_aggregation,
        eager_aggregation,
        _criss_cross_cases(lambda b, e, c, h, w: ((b, h + w - 1, h, w), (b, c, h, w)), scaled=False),
        inputs=lambda a, v: [a.softmax(1), v],
    ),
    Family(
        "criss_cross_attention",
        segattn_ops.criss_cross_attention,
        lambda *a: reference.criss_cross_attention(*a)[0],
        eager_criss_cross,
        _criss_cross_cases(lambda b, e, c, h, w: ((b, e, h, w), (b, e, h, w), (b, c, h, w)), scaled=True),
    ),
)
BY_OPERATOR = {family.operator: family for family in FAMILIES}
# residual_channel_attention is no operator: it calls channel_self_attention.
OPERATORS = [family.operator for family in FAMILIES if family.operator != "residual_channel_attention"]
