"""The calls of the self-test, and what their errors are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import segattn_ops

from .. import _eager, ops, reference
from ..ops._check import accumulation_dtype

Shapes = tuple[tuple[int, ...], ...]
ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)
ENERGY = 12  # of the largest energy: its rounding in the logsumexp is an error of the recomputed weights


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        op: its row in the table.
        call: the op, of this package.
        exact: its definition, of float64 tensors.
        eager: the formula in the tensors' dtype; None where the definition is taken.
        shapes: of the inputs.
        dtypes: that are tested.
        prepared: makes the inputs of random ones.
        channels_last: whether the inputs are in that memory format.
    """

    op: str
    call: Callable[..., Any]
    exact: Callable[..., Any]
    eager: Callable[..., Any] | None
    shapes: Shapes
    dtypes: tuple[torch.dtype, ...] = ALL
    prepared: Callable[..., list[Tensor]] | None = None
    channels_last: bool = False

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.op} of {shapes}{', channels last' if self.channels_last else ''}"

    def inputs(self) -> list[Tensor]:
        """float64, on the CPU."""
        generator = torch.Generator().manual_seed(sum(map(sum, self.shapes)))
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        made = drawn if self.prepared is None else self.prepared(*drawn)
        return [t.contiguous(memory_format=torch.channels_last) for t in made] if self.channels_last else made


@dataclass(frozen=True)
class Failure:
    """A result that is wrong, and how."""

    op: str
    dtype: str
    text: str

    def __str__(self) -> str:
        return f"FAILED {self.text} in {self.dtype}"


def check(case: Case, dtype: torch.dtype, on: torch.device) -> tuple[list[float], list[Failure]]:
    """Compares the results and all gradients of one call.

    Returns:
        the error of each as a share of what is allowed, twice that of eager PyTorch in the same dtype plus a floor of
        the dtype's rounding; and the failures.
    """
    name = str(dtype).removeprefix("torch.")
    inputs = [t.to(dtype) for t in case.inputs()]
    exact = _results(case.exact, [t.double() for t in inputs])
    placed = [t.to(on) for t in inputs]
    try:
        got = _results(case.call, placed)
        eager = _results(case.eager or case.exact, placed)
    except RuntimeError as raised:
        return [], [Failure(case.op, name, f"{case}: {' '.join(str(raised).split())[:200]}")]
    errors, failures = [], []
    most = max(float(expected.abs().max()) for expected in exact.values())
    for result, expected in exact.items():
        error, allowed = _error(got[result], eager[result], expected, most)
        if allowed and error < float("inf"):
            errors.append(error / allowed)
        if not error <= allowed:
            text = f"{case}: {result} has error {error:.2e}, allowed is {allowed:.2e}"
            failures.append(Failure(case.op, name, text))
    return errors, failures


def _error(got: Tensor, eager: Tensor, exact: Tensor, most: float) -> tuple[float, float]:
    """The largest error of an element, infinite for another shape and where it is not finite, and what is allowed.

    Args:
        most: the largest value among the call's exact results. The floor is relative to it where the exact result is
            zero up to rounding, as a gradient that passes a softmax over one key.
    """
    if got.shape != exact.shape or not bool(got.isfinite().all()):
        return float("inf"), 0.0
    largest = float(exact.abs().max())
    eps, accumulated = (torch.finfo(dtype).eps for dtype in (got.dtype, accumulation_dtype(got.dtype)))
    floor = (64 if got.dtype == torch.float64 else 4) * eps + ENERGY * accumulated
    eager_error = float((eager.double().cpu() - exact).abs().nan_to_num(0).max())
    allowed = 2 * eager_error + floor * (largest if largest > 1e-12 * most else most)
    return float((got.double().cpu() - exact).abs().max()), allowed


def _results(function: Callable[..., Any], inputs: list[Tensor]) -> dict[str, Tensor]:
    """The outputs by name, and the gradients of their sum weighted by fixed numbers."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {"output" if not i else f"output {i}": output.detach() for i, output in enumerate(outputs)}
    differentiable = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in differentiable]
    # Rounded to 16 bits in every dtype: the definition then differentiates the same sum.
    weights = [w.bfloat16().to(o.dtype).to(o.device) for w, o in zip(weights, differentiable, strict=True)]
    gradients = torch.autograd.grad(differentiable, leaves, weights)
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def _heads(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The op with heads as groups of channels."""

    def call(*tensors: Tensor) -> Tensor:
        split = (t.unflatten(1, (count, -1)).flatten(0, 1) for t in tensors)
        output: Tensor = function(*split)
        joined: Tensor = output.unflatten(0, (-1, count)).flatten(1, 2)
        return joined

    return call


def _kept_only(function: Callable[..., Any], kept: int) -> Callable[..., Any]:
    """The op over the first keys."""
    return lambda q, k, v: function(q, k.flatten(2)[..., :kept], v.flatten(2)[..., :kept])


def _padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (torch.arange(k[0, 0].numel(), device=k.device) >= KEPT).view(1, *k.shape[2:]).expand(len(k), *k.shape[2:])
    return segattn_ops.position_attention(q, k, v, SCALE, key_padding_mask=mask)


SCALE, KEPT, HEADS = 0.3, 31, 2
CHOSEN = torch.tensor([[0, 0], [4, 3], [2, 6]])  # positions whose rows of the map are computed
POSITION: tuple[Shapes, ...] = (
    ((2, 8, 5, 7), (2, 8, 5, 7), (2, 16, 5, 7)),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    ((2, 12, 9, 11), (2, 12, 3, 4), (2, 20, 3, 4)),
    ((1, 5, 4, 5, 3), (1, 5, 4, 5, 3), (1, 7, 4, 5, 3)),
    ((1, 70, 9, 9), (1, 70, 130), (1, 65, 130)),
    ((1, 64, 33, 31), (1, 64, 33, 31), (1, 264, 33, 31)),
)
CHANNEL: tuple[Shapes, ...] = (
    ((2, 13, 4, 5), (2, 6, 4, 5), (2, 6, 3, 7)),
    ((1, 70, 9, 9), (1, 65, 9, 9), (1, 65, 40)),
)
SELF: tuple[Shapes, ...] = (((2, 13, 9, 11),), ((1, 33, 1, 9),), ((1, 136, 33, 31),))
CRISS_CROSS: tuple[tuple[int, ...], ...] = (  # B, E, C, H, W
    (2, 8, 16, 5, 7),
    (1, 8, 24, 1, 13),
    (1, 5, 7, 18, 3),
    (1, 16, 33, 19, 17),
    (1, 64, 136, 33, 31),
)
_ENERGIES = 0.05  # channel energies are sums over all positions


def _criss_cross(shapes: Callable[..., Shapes]) -> list[Shapes]:
    return [shapes(*sizes) for sizes in CRISS_CROSS]


def _cases() -> list[Case]:
    """The package's functions are looked up at each call."""
    made: list[Case] = []

    def add(op: str, shapes: Any, call: Any, exact: Any, eager: Any = None, **options: Any) -> None:
        made.extend(Case(op, call, exact, eager, shape, **options) for shape in shapes)

    def position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segattn_ops.position_attention(q, k, v, SCALE)

    def exact_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.position_attention(q, k, v, SCALE)[0]

    def eager_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _eager.position_attention(q, k, v, SCALE)

    add("position_attention", POSITION, position, exact_position, eager_position)
    add("position_attention", POSITION[:1], position, exact_position, eager_position, channels_last=True)
    add(
        "position_attention, heads",
        [POSITION[0], POSITION[5]],
        lambda q, k, v: segattn_ops.position_attention(q, k, v, SCALE, num_heads=HEADS),
        _heads(exact_position, HEADS),
        _heads(eager_position, HEADS),
    )
    add(
        "position_attention, padded keys",
        [POSITION[0], POSITION[5]],
        _padded,
        _kept_only(exact_position, KEPT),
        _kept_only(eager_position, KEPT),
    )

    def exact_channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.channel_attention(q, k, v, -_ENERGIES)[0]

    def eager_channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _eager.channel_attention(q, k, v, -_ENERGIES)

    add(
        "channel_attention",
        CHANNEL,
        lambda q, k, v: segattn_ops.channel_attention(q, k, v, -_ENERGIES),
        exact_channel,
        eager_channel,
    )
    add(
        "channel_attention of itself",
        SELF,
        lambda x: segattn_ops.channel_attention(x, x, x, -_ENERGIES),
        lambda x: exact_channel(x, x, x),
        lambda x: eager_channel(x, x, x),
    )
    add(
        "residual_channel_attention",
        [(shape, (1,)) for (shape,) in SELF],
        lambda x, gamma: segattn_ops.residual_channel_attention(x, gamma, -_ENERGIES),
        lambda x, gamma: gamma * exact_channel(x, x, x) + x,
        lambda x, gamma: _eager.residual_channel_attention(x, gamma, -_ENERGIES),
    )
    add(
        "criss_cross_attention",
        _criss_cross(lambda b, e, c, h, w: ((b, e, h, w), (b, e, h, w), (b, c, h, w))),
        lambda q, k, v: segattn_ops.criss_cross_attention(q, k, v, SCALE),
        lambda q, k, v: reference.criss_cross_attention(q, k, v, SCALE)[0],
        lambda q, k, v: _eager.criss_cross_attention(q, k, v, SCALE),
    )
    add(
        "criss_cross_affinity",
        _criss_cross(lambda b, e, c, h, w: ((b, e, h, w), (b, e, h, w))),
        lambda q, k: segattn_ops.criss_cross_affinity(q, k),
        reference.criss_cross_affinity,
        _eager.criss_cross_affinity,
    )
    add(
        "criss_cross_aggregation",
        _criss_cross(lambda b, e, c, h, w: ((b, h + w - 1, h, w), (b, c, h, w))),
        lambda a, v: segattn_ops.criss_cross_aggregation(a, v),
        reference.criss_cross_aggregation,
        _eager.criss_cross_aggregation,
        prepared=lambda a, v: [a.softmax(1), v],
    )
    # The parts from which sharded attention is merged. In 16 bits their results are those of the ops above.
    lines = _criss_cross(lambda b, e, c, h, w: ((b, e, h, w), (b, e, h, w), (b, c, h, w)))
    add(
        "criss_cross_rows",
        lines,
        lambda q, k, v: ops.criss_cross_rows(q, k, v, SCALE)[:2],
        lambda q, k, v: reference.criss_cross_rows(q, k, v, SCALE)[:2],
        dtypes=WIDE,
    )
    add(
        "criss_cross_columns",
        [shapes for shapes in lines if shapes[0][2] > 1],  # without other rows there are no keys
        lambda q, k, v: ops.criss_cross_columns(q, k, v, SCALE)[:2],
        lambda q, k, v: reference.criss_cross_columns(q, k, v, SCALE)[:2],
        dtypes=WIDE,
    )
    add(
        "position_attention_partial",
        [POSITION[0], POSITION[5]],
        lambda q, k, v: ops.position_attention_partial(q, k, v, SCALE)[:2],
        lambda q, k, v: reference.position_attention_partial(q, k, v, SCALE)[:2],
        dtypes=WIDE,
    )
    add("channel_energy", SELF, lambda x: ops.channel_energy(x), reference.channel_energy, dtypes=WIDE)
    add(
        "channel_apply",
        [((2, 8, 8), (2, 8, 5, 7)), ((1, 65, 70), (1, 70, 9, 9))],
        lambda energy, v: ops.channel_apply(energy, v, -1.0),
        lambda energy, v: reference.channel_apply(energy, v, -1.0)[0],
        dtypes=WIDE,
    )
    pairs: list[Shapes] = [((2, 8, 5, 7), (2, 8, 5, 7)), ((1, 16, 19, 17), (1, 16, 19, 17))]
    add(
        "position_attention_map",
        pairs,
        lambda q, k: segattn_ops.position_attention_map(q, k, CHOSEN, SCALE),
        lambda q, k: _rows_of(reference.position_attention, q, k),
        dtypes=WIDE,
    )
    add(
        "criss_cross_attention_map",
        pairs,
        lambda q, k: segattn_ops.criss_cross_attention_map(q, k, CHOSEN, scale=SCALE),
        lambda q, k: _rows_of(reference.criss_cross_attention, q, k),
        dtypes=WIDE,
    )
    return made


def _rows_of(attention: Callable[..., Any], query: Tensor, key: Tensor) -> Tensor:
    """(B, P, H, W): the chosen rows of an attention map, from values that are 1 at one position in each channel."""
    batch, height, width = query.shape[0], *query.shape[2:]
    one = torch.eye(height * width, dtype=query.dtype, device=query.device).view(1, -1, height, width)
    output = attention(query, key, one.expand(batch, -1, -1, -1), SCALE)[0]
    return torch.stack([output[:, :, y, x].unflatten(1, (height, width)) for y, x in CHOSEN.tolist()], 1)


CASES = _cases()
