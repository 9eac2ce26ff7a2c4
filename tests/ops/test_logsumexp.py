"""The logsumexp as a result with a gradient, and as an argument of the backward operators: with a logsumexp and an
output over more keys than those of the call, the gradients are the call's part of those over all keys."""

import pytest
import torch
from torch import Tensor

import segattn_ops
from segattn_ops import reference

from ..families import BY_OPERATOR, DTYPES, eager_affinity, eager_aggregation
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager, assert_norm_as_exact_as_eager

GRADIENTS = ("grad_query", "grad_key", "grad_value")
# |logsumexp|. Float exponentials overflow at 88; a logsumexp of 500 is rounded by up to 1.5e-5.
LEVELS = (1.0, -1.0, 40.0, -40.0, 500.0, -500.0)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def eager_position(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    energy = scale * torch.bmm(q.flatten(2).transpose(1, 2), k.flatten(2))
    output = torch.bmm(v.flatten(2), energy.softmax(-1).transpose(1, 2)).unflatten(2, q.shape[2:])
    return output, energy.logsumexp(-1).unflatten(1, q.shape[2:])


def eager_criss_cross(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    energy = scale * eager_affinity(q, k)
    return eager_aggregation(energy.softmax(1), v), energy.logsumexp(1)


OPS = {
    "position_attention": (segattn_ops.position_attention, reference.position_attention, eager_position),
    "criss_cross_attention": (segattn_ops.criss_cross_attention, reference.criss_cross_attention, eager_criss_cross),
}
# Few keys are one tile of the CPU kernels, more are several.
CASES = [
    *(("position_attention", i) for i in (0, 1, 4, 5, 6, 8)),
    *(("criss_cross_attention", i) for i in (0, 1, 2, 3, 5, 7)),
]
CASE_IDS = [f"{op}-{BY_OPERATOR[op].cases[i]}" for op, i in CASES]


def results(function, inputs: list[Tensor], scale: float, grad_output, grad_logsumexp, **options) -> list[Tensor]:
    """Output, logsumexp and the gradients of all inputs; without a gradient of a result where it is None."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output, logsumexp = function(*leaves, scale, **options)
    given = [
        (result, gradient.to(result.device, result.dtype).reshape(result.shape))
        for result, gradient in ((output, grad_output), (logsumexp, grad_logsumexp))
        if gradient is not None
    ]
    gradients = torch.autograd.grad(
        [result for result, _ in given], leaves, [gradient for _, gradient in given], allow_unused=True
    )
    return [output.detach(), logsumexp.detach(), *gradients]


def cast(inputs: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [t.to(device, dtype) for t in inputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES, ids=CASE_IDS)
def test_a_gradient_of_both_results(backend, op, case, dtype):
    family = BY_OPERATOR[op]
    case = family.cases[case]
    function, definition, eager = OPS[op]
    inputs = family.make(case, dtype)
    query, value = case.shapes[0], case.shapes[2]
    grad_output, grad_logsumexp = normal((query[0], value[1], *query[2:]), (query[0], *query[2:]), seed=1)
    gradients = grad_output.to(dtype), grad_logsumexp.to(accumulation(dtype))
    moved = cast(inputs, dtype, backend.device)
    got = results(function, moved, *case.scalars, *gradients, return_logsumexp=True)
    assert got[1].shape == (query[0], 1, *query[2:]) and got[1].dtype == accumulation(dtype)
    got[1] = got[1].squeeze(1)
    eagerly = results(eager, inputs, *case.scalars, *gradients)
    eagerly[1] = eagerly[1].to(got[1].dtype)
    exact = results(definition, cast(inputs, torch.float64), *case.scalars, *gradients)
    for name, *values in zip(("output", "logsumexp", *GRADIENTS), got, eagerly, exact, strict=True):
        assert_as_exact_as_eager(name, *values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_the_logsumexp_alone(backend, op, dtype):
    """That of the value is zero."""
    function, definition, eager = OPS[op]
    case = BY_OPERATOR[op].cases[0]
    inputs = BY_OPERATOR[op].make(case, dtype)
    (grad_logsumexp,) = normal((2, 5, 7), seed=1)
    grad_logsumexp = grad_logsumexp.to(accumulation(dtype))
    moved = cast(inputs, dtype, backend.device)
    got = results(function, moved, 1.0, None, grad_logsumexp, return_logsumexp=True)
    eagerly = results(eager, inputs, 1.0, None, grad_logsumexp)
    exact = results(definition, cast(inputs, torch.float64), 1.0, None, grad_logsumexp)
    for name, *values in zip(GRADIENTS[:2], got[2:4], eagerly[2:4], exact[2:4], strict=True):
        assert_as_exact_as_eager(name, *values)
    assert got[4] is None or not got[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("op", "keys"), [("position_attention", "all"), ("position_attention", "few"), ("criss_cross_attention", "all")]
)
def test_region_features(backend, op, keys, dtype):
    """tests/ops/test_region_features.py says why. The sum of dS over the keys is grad_logsumexp, not 0."""
    height, width = (13, 11) if backend.name == "emulated" else (24, 24)
    channels = (16, 32)
    function, definition, eager = OPS[op]
    inputs = list(region_features(height, width, *channels, dtype, 4.0))
    if keys == "few":
        inputs[1:] = [t.flatten(2)[..., :: height * width // 100].contiguous() for t in inputs[1:]]
    grad_output, grad_logsumexp = normal((1, channels[1], height, width), (1, height, width), seed=1)
    gradients = grad_output.to(dtype), 0.1 * grad_logsumexp.float()
    got = results(function, cast(inputs, dtype, backend.device), 1.0, *gradients, return_logsumexp=True)
    eagerly = results(eager, inputs, 1.0, *gradients)
    exact = results(definition, cast(inputs, torch.float64), 1.0, *gradients)
    for name, *values in zip(GRADIENTS, got[2:], eagerly[2:], exact[2:], strict=True):
        assert_norm_as_exact_as_eager(name, *(t.cpu() for t in values))


@pytest.mark.parametrize("op", OPS)
def test_heads(backend, op):
    """A logsumexp for each head, and its gradient."""
    function = OPS[op][0]
    inputs = normal((2, 8, 5, 7), (2, 8, 5, 7), (2, 12, 5, 7))
    grad_output, grad_logsumexp = normal((2, 12, 5, 7), (2, 2, 5, 7), seed=1)
    moved = cast(inputs, torch.float64, backend.device)
    got = results(function, moved, 0.5, grad_output, grad_logsumexp, num_heads=2, return_logsumexp=True)
    for head in range(2):
        parts = [t.chunk(2, 1)[head] for t in moved]
        given = grad_output.chunk(2, 1)[head], grad_logsumexp[:, head]
        expected = results(function, parts, 0.5, *given, return_logsumexp=True)
        for tensor, part in zip(got, expected, strict=True):
            torch.testing.assert_close(tensor.chunk(2, 1)[head], part, rtol=1e-12, atol=1e-12)


def merged(shards: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and logsumexp over the keys of all shards, from those of each, in float64."""
    outputs, logsumexps = (torch.stack([t.double() for t in tensors]) for tensors in zip(*shards, strict=True))
    logsumexp = logsumexps.logsumexp(0)
    return (outputs * (logsumexps - logsumexp).exp().unsqueeze(2)).sum(0), logsumexp


def split(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A number rounded to dtype, and its rounding error."""
    rounded = exact.to(dtype)
    return rounded, (exact - rounded.double()).to(dtype)


def shifted(query: Tensor, keys: list[Tensor], level: float, scale: float) -> None:
    """Adds `level` to every energy, by the first channel. It changes no weight, and with all keys together no gradient
    but that channel's."""
    query[:, 0] = 1
    for key in keys:
        key[:, 0] = level / scale


def assert_sharded(got, eagerly, exact, level: float) -> None:
    """grad_query, and the shards' grad_key and grad_value, side by side. The first channel of grad_query is a sum of
    zero times the level. Eager's errors are those without the level, which 16-bit energies would not survive."""
    for name, *values in zip(GRADIENTS, got, eagerly, exact, strict=True):
        if name == "grad_query":
            values = [t[:, 1:] for t in values]
        assert_as_exact_as_eager(name, *values, energy=12 + 3 * abs(level))


SHARDS = [(1, 7), (7, 1, 1, 7), (64, 128, 1), (128, 129), (200, 300)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_position_attention_over_sharded_keys(kernels, shards, dtype, level):
    """Keys on several devices, as in ring attention: each shard's backward gets the merged output and logsumexp."""
    scale, count = 0.5, sum(shards)
    query, key, value, grad_output, grad_logsumexp = normal(
        (2, 6, 21), (2, 6, count), (2, 9, count), (2, 9, 21), (2, 21)
    )
    inputs = [t.to(dtype) for t in (query, key, value)]
    gradients = grad_output.to(dtype), grad_logsumexp.to(accumulation(dtype))
    shifted(inputs[0], [inputs[1]], 1.0, scale)
    eagerly = results(eager_position, inputs, scale, *gradients)[2:]
    shifted(inputs[0], [inputs[1]], level, scale)
    exact = results(reference.position_attention, cast(inputs, torch.float64), scale, *gradients)[2:]

    query, key, value, grad_output = cast([*inputs, gradients[0]], dtype, kernels.device)
    keys, values = key.split(shards, 2), value.split(shards, 2)
    parts = []
    for k, v in zip(keys, values, strict=True):
        output, logsumexp, low, _ = kernels.operators.position_attention(query, k, v, scale, True)
        parts.append((output.double() + low.double() if low.shape[1] > 0 else output, logsumexp))
    output, logsumexp = merged(parts)
    assert abs(logsumexp.mean().item() - level) < 8
    output, low = split(output, dtype)
    backward = [
        kernels.operators.position_attention_backward(
            *(grad_output, query, k, v, output, logsumexp.to(accumulation(dtype)), scale),
            output_low=low if dtype.itemsize == 2 else None,
            grad_logsumexp=gradients[1].to(kernels.device),
        )
        for k, v in zip(keys, values, strict=True)
    ]
    grad_queries, grad_keys, grad_values = zip(*backward, strict=True)
    got = [sum(t.double() for t in grad_queries).to(dtype), torch.cat(grad_keys, 2), torch.cat(grad_values, 2)]
    assert_sharded(got, eagerly, exact, level)


def eager_frames(query: Tensor, *frames: Tensor) -> tuple[Tensor, Tensor]:
    """Criss-cross attention to the rows and columns of several pictures: key, value, key, value, ..., scale."""
    *tensors, scale = frames
    keys, values = tensors[::2], tensors[1::2]
    energy = scale * torch.cat([eager_affinity(query, key) for key in keys], 1)
    weights = energy.softmax(1).chunk(len(keys), 1)
    return sum(map(eager_aggregation, weights, values)), energy.logsumexp(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 49)], ids=str)
def test_criss_cross_attention_over_several_pictures(kernels, size, dtype, level):
    """A query attends to the row and column of its position in each of three pictures."""
    scale, count = 0.5, 3
    query, *pictures = normal((2, 6, *size), *[(2, c, *size) for _ in range(count) for c in (6, 9)])
    inputs = [t.to(dtype) for t in (query, *pictures)]
    grad_output, grad_logsumexp = normal((2, 9, *size), (2, *size), seed=1)
    gradients = grad_output.to(dtype), grad_logsumexp.to(accumulation(dtype))
    shifted(inputs[0], inputs[1::2], 1.0, scale)
    eagerly = results(eager_frames, inputs, scale, *gradients)[2:]
    shifted(inputs[0], inputs[1::2], level, scale)
    exact = results(eager_frames, cast(inputs, torch.float64), scale, *gradients)[2:]

    query, *pictures, grad_output = cast([*inputs, gradients[0]], dtype, kernels.device)
    pairs = list(zip(pictures[::2], pictures[1::2], strict=True))
    parts = []
    for key, value in pairs:
        output, logsumexp, low = kernels.operators.criss_cross_attention(query, key, value, scale)
        parts.append((output, logsumexp.double() + low.double()))
    output, logsumexp = merged(parts)
    logsumexp, logsumexp_low = split(logsumexp, accumulation(dtype))
    backward = [
        kernels.operators.criss_cross_attention_backward(
            *(grad_output, query, key, value, output.to(dtype), logsumexp, scale),
            logsumexp_low=logsumexp_low,
            grad_logsumexp=gradients[1].to(kernels.device),
        )
        for key, value in pairs
    ]
    grad_queries, *others = zip(*backward, strict=True)
    got = [sum(t.double() for t in grad_queries).to(dtype), *(torch.cat(gradient, 1) for gradient in others)]
    stacked = [[t[0], torch.cat(t[1::2], 1), torch.cat(t[2::2], 1)] for t in (eagerly, exact)]
    assert_sharded(got, *stacked, level)


@pytest.mark.parametrize("keys", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_gradient_of_the_logsumexp(kernels, keys, dtype):
    """As with one of zeros, and, over all keys, as the autograd rule's call."""
    query, key, value, grad_output = (
        t.to(kernels.device, dtype) for t in normal((2, 6, 21), (2, 6, keys), (2, 9, keys), (2, 9, 21))
    )
    output, logsumexp, *lows = kernels.operators.position_attention(query, key, value, 0.5, True)
    lows = [t if t.shape[1] > 0 else None for t in lows]
    arguments = (grad_output, query, key, value, output, logsumexp, 0.5, *lows)

    def backward(**more) -> list[Tensor]:
        return kernels.operators.position_attention_backward(*arguments, **more)

    zeros = torch.zeros_like(logsumexp)
    for complete in (False, True):
        without = backward(keys_complete=complete)
        for a, b in zip(without, backward(grad_logsumexp=zeros, keys_complete=complete), strict=True):
            torch.testing.assert_close(a, b)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    gradients = torch.autograd.grad(segattn_ops.position_attention(*leaves, 0.5), leaves, grad_output)
    for a, b in zip(gradients, backward(keys_complete=True), strict=True):
        assert torch.equal(a, b)
