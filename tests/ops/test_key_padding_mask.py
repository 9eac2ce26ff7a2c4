"""position_attention's key_padding_mask: exact, and what padding holds has no influence, forward and backward."""

import pytest
import torch
from torch import Tensor

import segattn_ops
from segattn_ops import reference

from ..families import DTYPES
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager, assert_norm_as_exact_as_eager

NAMES = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")
# (B, E, C, spatial size of the queries, of the keys)
SHAPES = [
    (2, 8, 16, (5, 7), (5, 7)),
    (3, 5, 20, (9, 11), (3, 4)),
    (2, 16, 33, (6, 7), (110,)),
    (1, 1, 1, (1,), (3,)),
    (2, 9, 7, (4, 5), (2, 5, 15)),
]
LARGE_SHAPES = [(2, 33, 70, (13, 29), (37, 19)), (2, 16, 264, (9, 21), (26, 26))]


def padding_of(batch: int, spatial: tuple[int, ...], seed: int = 0) -> Tensor:
    """(B, *T): the first sample is padded at the ends of its dimensions, as pictures in a batch, the second has
    scattered padding, the third none."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros((batch, *spatial), dtype=torch.bool)
    for dimension, size in enumerate(spatial):
        mask[0].narrow(dimension, size - size // 3, size // 3).fill_(True)
    if batch > 1:
        mask[1] = torch.rand(spatial, generator=generator) < 0.6
        mask[1].view(-1)[0] = False
    assert mask[0].any() and not mask.flatten(1).all(1).any()
    return mask


def make(shape, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """query, key and value; the gradients of output and logsumexp. Drawn in float64, as tests.families.Family.make."""
    batch, e, c, queries, keys = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, e, *queries), (batch, e, *keys), (batch, c, *keys), (batch, c, *queries), (batch, 1, *queries)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    *inputs, grad_output, grad_logsumexp = tensors
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in inputs], [grad_output.to(dtype), grad_logsumexp.to(accumulation)]


def poisoned(tensor: Tensor, mask: Tensor) -> Tensor:
    """NaN and infinities where there is padding."""
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=tensor.dtype).repeat(tensor.numel() // 3 + 1)
    return torch.where(mask.unsqueeze(1).to(tensor.device), poison[: tensor.numel()].view_as(tensor), tensor)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    return segattn_ops.position_attention(query, key, value, scale, key_padding_mask=mask, return_logsumexp=True)


def definition(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    output, logsumexp = reference.position_attention(query, key, value, scale, mask)
    return output, logsumexp.unsqueeze(1)


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    """In the tensors' dtype."""
    energy = scale * torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2))
    energy = energy.masked_fill(mask.flatten(1).unsqueeze(1), -torch.inf)
    output = torch.bmm(value.flatten(2), energy.softmax(-1).transpose(1, 2)).unflatten(2, query.shape[2:])
    return output, energy.logsumexp(-1).unflatten(1, query.shape[2:]).unsqueeze(1)


def results(function, inputs: list[Tensor], mask: Tensor, gradients: list[Tensor], scale: float = 0.4) -> list[Tensor]:
    """Output, logsumexp and the gradients of query, key and value."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, scale, mask)
    given = [g.to(o.device, o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    return [o.detach().cpu() for o in (*outputs, *torch.autograd.grad(outputs, leaves, given))]


def check(backend, shape, mask: Tensor, dtype: torch.dtype) -> None:
    inputs, gradients = make(shape, dtype)
    query, key, value = inputs
    moved = [t.to(backend.device) for t in (query, poisoned(key, mask), poisoned(value, mask))]
    got = results(attention, moved, mask.to(backend.device), gradients)
    eagerly = results(eager, inputs, mask, gradients)
    exact = results(definition, [t.double() for t in inputs], mask, gradients)
    eagerly[1] = eagerly[1].to(got[1].dtype)
    for name, *values in zip(NAMES, got, eagerly, exact, strict=True):
        assert_as_exact_as_eager(name, *values)
    for gradient in got[3:]:
        assert not gradient.movedim(1, -1)[mask].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_eager(backend, shape, dtype):
    check(backend, shape, padding_of(shape[0], shape[4]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_shapes(backend, shape, dtype):
    if not backend.runs_large:
        pytest.skip("too large for the emulator")
    check(backend, shape, padding_of(shape[0], shape[4]), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [1, 2, 17])
def test_few_keys_are_left(backend, kept, dtype):
    """Far apart, and different ones in every sample."""
    shape = (2, 8, 12, (3, 7), (150,))
    mask = torch.ones(2, 150, dtype=torch.bool)
    for sample in range(2):
        mask[sample, torch.linspace(sample, 148 + sample, kept).long()] = False
    check(backend, shape, mask, dtype)


def test_the_reference_is_the_attention_over_the_keys_that_are_left():
    shape = (2, 8, 16, (5, 7), (30,))
    (query, key, value), _ = make(shape, torch.float64)
    mask = padding_of(2, (30,))
    output, logsumexp = reference.position_attention(query, poisoned(key, mask), poisoned(value, mask), 0.4, mask)
    for sample, padding in enumerate(mask):
        one = slice(sample, sample + 1)
        kept = [t[one][..., ~padding] for t in (key, value)]
        for got, expected in zip(
            (output[one], logsumexp[one]), reference.position_attention(query[one], *kept, 0.4), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_padding(backend, dtype):
    """The second of three samples: zeros, and a logsumexp of -inf. Its neighbours are not affected."""
    shape = (3, 8, 16, (5, 7), (4, 9))
    inputs, gradients = make(shape, dtype)
    mask = padding_of(3, (4, 9))
    mask[1] = True
    query, key, value = (t.to(backend.device) for t in inputs)
    got = results(attention, [query, poisoned(key, mask), poisoned(value, mask)], mask.to(backend.device), gradients)
    assert (got[1][1] == -torch.inf).all()
    for name, tensor in zip(NAMES, got, strict=True):
        assert name == "logsumexp" or not tensor[1].any(), name
    others = results(
        attention, [t[::2] for t in (query, key, value)], mask[::2].to(backend.device), [g[::2] for g in gradients]
    )
    for tensor, expected in zip(got, others, strict=True):
        torch.testing.assert_close(tensor[::2], expected)


def test_output_low_of_only_padding(kernels):
    (query, key, value), _ = make((2, 8, 16, (5, 7), (4, 9)), torch.bfloat16)
    mask = torch.tensor([False, True]).view(2, 1, 1).expand(2, 4, 9)
    tensors = [t.to(kernels.device) for t in (query, poisoned(key, mask), poisoned(value, mask))]
    output, logsumexp, low, _ = kernels.operators.position_attention(*tensors, 1.0, True, mask.to(kernels.device))
    assert not output[1].any() and not low[1].any() and (logsumexp[1] == -torch.inf).all()
    assert low[0].any() and logsumexp[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [(3, 4), (150,)], ids=str)
def test_a_mask_without_padding_changes_nothing(backend, keys, dtype):
    inputs, gradients = make((2, 8, 16, (5, 7), keys), dtype)
    moved = [t.to(backend.device) for t in inputs]
    mask = torch.zeros(2, *keys, dtype=torch.bool, device=backend.device)
    masked = results(attention, moved, mask, gradients)
    plain = results(attention, moved, None, gradients)
    for name, a, b in zip(NAMES, masked, plain, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_region_features(backend, dtype):
    """tests/ops/test_region_features.py says why. The picture's lower right part is padding."""
    height, width = (13, 11) if backend.name == "emulated" else (24, 24)
    channels = (16, 32)
    inputs = list(region_features(height, width, *channels, dtype, 4.0))
    mask = padding_of(1, (height, width))
    gradients = [torch.randn(1, n, height, width, generator=torch.Generator().manual_seed(n)) for n in (channels[1], 1)]
    gradients[0] = gradients[0].to(dtype)
    query, key, value = (t.to(backend.device) for t in inputs)
    moved = [query, poisoned(key, mask), poisoned(value, mask)]
    got = results(attention, moved, mask.to(backend.device), gradients, 1.0)
    eagerly = results(eager, inputs, mask, gradients, 1.0)
    exact = results(definition, [t.double() for t in inputs], mask, gradients, 1.0)
    for name, *values in zip(NAMES, got, eagerly, exact, strict=True):
        assert_norm_as_exact_as_eager(name, *values)


def test_heads_share_the_mask(backend):
    inputs, _ = make((2, 8, 12, (5, 7), (4, 9)), torch.float64)
    mask = padding_of(2, (4, 9))
    query, key, value = (t.to(backend.device) for t in (inputs[0], *(poisoned(t, mask) for t in inputs[1:])))
    mask = mask.to(backend.device)
    output, logsumexp = segattn_ops.position_attention(
        query, key, value, 0.4, num_heads=2, key_padding_mask=mask, return_logsumexp=True
    )
    for head in range(2):
        parts = [t.chunk(2, 1)[head] for t in (query, key, value)]
        expected, expected_logsumexp = attention(*parts, 0.4, mask)
        torch.testing.assert_close(output.chunk(2, 1)[head], expected)
        torch.testing.assert_close(logsumexp[:, head : head + 1], expected_logsumexp)


MASK_LAYOUTS = {
    "expanded": lambda mask: mask[:1, :1].expand(mask.shape),
    "sliced": lambda mask: torch.stack([mask, ~mask], -1)[..., 0],
}


@pytest.mark.parametrize("layout", MASK_LAYOUTS)
def test_any_strides_of_the_mask(backend, layout):
    inputs, gradients = make((2, 8, 12, (5, 7), (4, 9)), torch.float32)
    moved = [t.to(backend.device) for t in inputs]
    mask = MASK_LAYOUTS[layout](padding_of(2, (4, 9)).to(backend.device))
    assert not mask.is_contiguous()
    got = results(attention, moved, mask, gradients)
    for a, b in zip(got, results(attention, moved, mask.contiguous(), gradients), strict=True):
        assert torch.equal(a, b)


def test_no_queries(backend):
    """The gradients of key and value are zero."""
    inputs, gradients = make((2, 8, 12, (0,), (9,)), torch.float32)
    mask = padding_of(2, (9,)).to(backend.device)
    output, logsumexp, grad_query, *others = results(attention, [t.to(backend.device) for t in inputs], mask, gradients)
    assert output.shape == (2, 12, 0) and logsumexp.shape == (2, 1, 0) and grad_query.shape == (2, 8, 0)
    assert not any(gradient.any() for gradient in others)
