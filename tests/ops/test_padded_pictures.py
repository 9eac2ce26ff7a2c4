"""key_padding_mask of position_attention: pictures padded to one size, and pooled keys, are what they are alone."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import segattn_ops
from segattn_ops import position_attention

HEADS = 2
SIZES = [(5, 6), (3, 4), (5, 2), (1, 1)]  # of the pictures in a batch of (5, 6)


def pictures(device: str = "cpu", padding: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """Query, key and value (4, C, 5, 6), with `padding` beyond each picture, and the mask (4, 5, 6)."""
    tensors = [torch.full((4, c, 5, 6), padding, dtype=torch.float64) for c in (4, 4, 6)]
    mask = torch.ones(4, 5, 6, dtype=torch.bool)
    for i, (height, width) in enumerate(SIZES):
        mask[i, :height, :width] = False
        for t in tensors:
            t[i, :, :height, :width] = torch.randn(t.shape[1], height, width)
    return [t.to(device) for t in tensors], mask.to(device)


def alone(tensors: list[Tensor], **keywords: object) -> list[list[Tensor]]:
    """The results for each picture, cut out."""
    return [
        list(position_attention(*(t[i : i + 1, :, :h, :w] for t in tensors), 0.5, return_logsumexp=True, **keywords))
        for i, (h, w) in enumerate(SIZES)
    ]


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("padding", [0.0, 1e30, torch.nan, torch.inf])
def test_a_padded_picture_is_as_alone(backend, heads, padding):
    """Also the gradients, whatever the padding holds: 0 there."""
    tensors, mask = pictures(backend.device, padding)
    query = tensors[0].nan_to_num(0, 0, 0).clamp(-9, 9)  # queries of the padding have results, which nobody reads
    leaves = [t.requires_grad_() for t in (query, *tensors[1:])]
    keywords = {"num_heads": heads}
    results = position_attention(*leaves, 0.5, key_padding_mask=mask, return_logsumexp=True, **keywords)
    incoming = [torch.randn(r.shape, dtype=r.dtype, device=r.device) for r in results]
    for g in incoming:
        g.masked_fill_(mask.unsqueeze(1), 0)
    gradients = torch.autograd.grad(results, leaves, incoming)
    cut = [t.detach().clone().requires_grad_() for t in leaves]
    for i, ((h, w), expected) in enumerate(zip(SIZES, alone(cut, **keywords), strict=True)):
        for result, e in zip(results, expected, strict=True):
            torch.testing.assert_close(result[i : i + 1, :, :h, :w], e, rtol=0, atol=1e-12)
        wanted = torch.autograd.grad(expected, cut, [g[i : i + 1, :, :h, :w] for g in incoming])
        for got, e in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got[i], e[i], rtol=0, atol=1e-12)


def test_pooled_keys(backend):
    """ANN's keys: fewer, in one dimension, of which samples have different numbers."""
    q = torch.randn(2, 4, 5, 6, dtype=torch.float64, device=backend.device)
    k, v = (torch.randn(2, c, 14, dtype=torch.float64, device=backend.device) for c in (4, 6))
    mask = torch.zeros(2, 14, dtype=torch.bool, device=backend.device)
    mask[0, 10:] = mask[1, ::2] = True
    got = position_attention(q, k, v, 0.5, key_padding_mask=mask)
    for i in range(2):
        kept = [t[i : i + 1, :, ~mask[i]] for t in (k, v)]
        torch.testing.assert_close(got[i : i + 1], position_attention(q[i : i + 1], *kept, 0.5), rtol=0, atol=1e-13)
    heads = [t.unflatten(1, (HEADS, -1)).flatten(3).mT for t in (q, k, v)]
    allowed = ~mask[:, None, None]
    expected = (
        F.scaled_dot_product_attention(*heads, attn_mask=allowed, scale=0.5).mT.flatten(1, 2).unflatten(2, (5, 6))
    )
    got = position_attention(q, k, v, 0.5, key_padding_mask=mask, num_heads=HEADS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_nothing_but_padding(backend, heads):
    """That sample's output is 0, its logsumexp -inf and its gradients 0; the other sample's are those of a call without
    a mask."""
    tensors = [torch.randn(2, c, 3, 4, dtype=torch.float64, device=backend.device) for c in (4, 4, 6)]
    tensors[1][0] = tensors[2][0] = torch.nan
    leaves = [t.requires_grad_() for t in tensors]
    mask = torch.zeros(2, 3, 4, dtype=torch.bool, device=backend.device)
    mask[0] = True
    keywords = {"num_heads": heads, "return_logsumexp": True}
    output, logsumexp = position_attention(*leaves, key_padding_mask=mask, **keywords)
    assert (output[0] == 0).all() and (logsumexp[0] == -torch.inf).all()
    expected = position_attention(*(t[1:] for t in leaves), **keywords)
    torch.testing.assert_close(output[1:], expected[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(logsumexp[1:], expected[1], rtol=0, atol=1e-13)
    gradients = torch.autograd.grad(output.sum(), leaves)
    for got, wanted in zip(gradients, torch.autograd.grad(expected[0].sum(), leaves), strict=True):
        assert (got[0] == 0).all()
        torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-12)


def test_no_padding(backend):
    tensors = [torch.randn(2, c, 3, 4, dtype=torch.float64, device=backend.device) for c in (4, 4, 6)]
    mask = torch.zeros(2, 3, 4, dtype=torch.bool, device=backend.device)
    for got, expected in zip(
        position_attention(*tensors, key_padding_mask=mask, return_logsumexp=True),
        position_attention(*tensors, return_logsumexp=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    output: Tensor = position_attention(q, k, v, 0.5, num_heads=HEADS, key_padding_mask=mask)
    return output


def test_vmap(backend):
    """The mask mapped with the tensors, and one mask for all."""
    tensors, mask = pictures(backend.device)
    masks = torch.stack([mask, mask.flip(1)])
    batches = [torch.stack([t, -t]) for t in tensors]
    expected = torch.stack([masked(*(b[i] for b in batches), masks[i]) for i in range(2)])
    torch.testing.assert_close(torch.vmap(masked)(*batches, masks), expected, rtol=0, atol=1e-13)
    expected = torch.stack([masked(*(b[i] for b in batches), mask) for i in range(2)])
    got = torch.vmap(masked, in_dims=(0, 0, 0, None))(*batches, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_compile(kernels):
    tensors, mask = pictures(kernels.device)
    leaves = [t.requires_grad_() for t in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(masked, fullgraph=True, dynamic=True, backend="aot_eager")
    got, expected = compiled(*leaves, mask), masked(*leaves, mask)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(r.square().sum(), leaves) for r in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


class Module(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return masked(q, k, v, mask)


def test_export(kernels):
    tensors, mask = pictures(kernels.device)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), (*tensors, mask), dynamic_shapes=({0: batch},) * 4)
    few = [*(t[:3] for t in tensors), mask[:3]]
    torch.testing.assert_close(program.module()(*few), masked(*few))


def test_autocast(backend):
    tensors, mask = pictures(backend.device)
    single = [t.float() for t in tensors]
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = masked(*single, mask)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, masked(*(t.bfloat16() for t in single), mask))


def test_meta_and_fake_tensors(backend):
    tensors, mask = pictures()
    assert masked(*(t.to("meta") for t in tensors), mask.to("meta")).shape == (4, 6, 5, 6)
    with FakeTensorMode() as mode:
        assert masked(*(mode.from_tensor(t) for t in (*tensors, mask))).shape == (4, 6, 5, 6)


def test_flop_count_is_that_without_a_mask(kernels):
    tensors, mask = pictures(kernels.device)
    counts = []
    for keywords in ({}, {"key_padding_mask": mask}):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with FlopCounterMode(display=False) as counter:
            position_attention(*leaves, **keywords).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 4 * 30 * 30 * (4 * 4 + 3 * 6)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: m.to(torch.uint8), "key_padding_mask must be bool with True for padding (got uint8)"),
        (lambda m: m.float(), "key_padding_mask must be bool with True for padding (got float32)"),
        (lambda m: m[:, :4], "key_padding_mask must have shape"),
        (lambda m: m.flatten(1), "key_padding_mask must have shape"),
        (lambda m: m[:1], "key_padding_mask must have shape"),
        (lambda m: m[:, None], "key_padding_mask must have shape"),
    ],
)
def test_other_masks_are_refused(backend, heads, wrong, message):
    tensors, mask = pictures(backend.device)
    with pytest.raises(RuntimeError) as raised:
        position_attention(*tensors, num_heads=heads, key_padding_mask=wrong(mask))
    assert str(raised.value).startswith(f"position_attention: {message}")


@pytest.mark.parametrize("function", ["position_attention", "position_attention_map"])
def test_a_list_is_no_mask(function):
    tensors, mask = pictures()
    arguments = tensors if function == "position_attention" else (*tensors[:2], torch.tensor([[0, 0]]))
    with pytest.raises(TypeError, match=f"{function}: key_padding_mask must be a torch.Tensor \\(got list\\)"):
        getattr(segattn_ops, function)(*arguments, key_padding_mask=mask.tolist())


@pytest.mark.parametrize("heads", [None, HEADS])
def test_rows_of_the_attention_map(backend, heads):
    (q, k, v), mask = pictures(backend.device, torch.nan)
    q = q.nan_to_num()
    mask[3] = True
    positions = torch.tensor([[0, 0], [4, 5]], device=backend.device)
    rows = segattn_ops.position_attention_map(q, k, positions, 0.5, num_heads=heads, key_padding_mask=mask)
    assert rows.shape == ((4, 2, 5, 6) if heads is None else (4, HEADS, 2, 5, 6))
    assert (rows.movedim(0, -3).masked_select(mask) == 0).all()
    assert (rows[3] == 0).all()
    sums = rows[:3].flatten(-2).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    output = position_attention(q, k, v, 0.5, num_heads=heads or 1, key_padding_mask=mask)
    values = v.masked_fill(mask.unsqueeze(1), 0).unflatten(1, (heads or 1, -1)).flatten(3)
    applied = torch.einsum("bhpn,bhcn->bhcp", rows.reshape(4, heads or 1, 2, 30), values).flatten(1, 2)
    torch.testing.assert_close(applied, output[:, :, positions[:, 0], positions[:, 1]])
