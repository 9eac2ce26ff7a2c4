"""num_heads: equal to a call for each group of channels, in every mode in which the ops run, without a copy."""

import math
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import segattn_ops
from segattn_ops.ops._heads import merge_heads, split_heads

HEADS = 3
FUNCTIONS = {
    "position_attention": segattn_ops.position_attention,
    "criss_cross_attention": segattn_ops.criss_cross_attention,
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
# Shapes of query, key and value; the widths of a head differ between keys and values.
SHAPES = {
    "image": ((2, 6, 5, 4), (2, 6, 5, 4), (2, 15, 5, 4)),
    "other keys": ((2, 12, 5, 4), (2, 12, 9), (2, 3, 9)),
    "sequence": ((1, 3, 11), (1, 3, 7), (1, 6, 7)),
    "volume": ((2, 6, 2, 3, 4), (2, 6, 3, 2, 2), (2, 9, 3, 2, 2)),
}
CASES = [
    pytest.param(function, shapes, id=f"{name}, {title}")
    for name, function in FUNCTIONS.items()
    for title, shapes in SHAPES.items()
    if name == "position_attention" or title == "image"
]


def inputs(shapes: tuple, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for shape in shapes]


def for_each_head(function: Callable, tensors: list[Tensor], heads: int, **keywords: object) -> list[Tensor]:
    """The outputs, and the logsumexp of each, of one call for each group of channels."""
    groups = zip(*(t.chunk(heads, 1) for t in tensors), strict=True)
    results = [function(*(t.contiguous() for t in group), 0.4, return_logsumexp=True, **keywords) for group in groups]
    return [torch.cat(parts, 1) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize(("function", "shapes"), CASES)
def test_equals_a_call_for_each_head(backend, function, shapes):
    tensors = inputs(shapes, backend.device)
    got = function(*tensors, 0.4, num_heads=HEADS, return_logsumexp=True)
    expected = for_each_head(function, tensors, HEADS)
    assert got[0].shape == (*shapes[2][:2], *shapes[0][2:]) and got[1].shape == (shapes[0][0], HEADS, *shapes[0][2:])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert torch.equal(function(*tensors, 0.4, num_heads=HEADS), got[0])
    gradients = [torch.autograd.grad(result[0].square().sum(), tensors) for result in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@each_function
def test_gradient_of_the_logsumexp(backend, function):
    tensors = inputs(SHAPES["image"], backend.device)
    gradients = []
    for output, logsumexp in (
        function(*tensors, 0.4, num_heads=HEADS, return_logsumexp=True),
        for_each_head(function, tensors, HEADS),
    ):
        gradients.append(torch.autograd.grad(output.square().sum() + logsumexp.sin().sum(), tensors))
        assert gradients[-1][0].norm() > 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_sdpa(backend, dtype):
    """PyTorch's attention has the heads in a dimension of their own, and the channels last."""
    q, k, v = inputs(SHAPES["other keys"], backend.device, dtype)
    got = segattn_ops.position_attention(q, k, v, 0.5, num_heads=HEADS)
    heads = [t.unflatten(1, (HEADS, -1)).flatten(3).mT for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, scale=0.5).mT.flatten(1, 2).unflatten(2, q.shape[2:])
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Operators(TorchDispatchMode):
    """The calls of the package's operators, with the address of each tensor, and all other operators that copy."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[list[int], int]] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == self.namespace:
            addresses = [t.data_ptr() for t in args if isinstance(t, Tensor)]
            self.calls.append((addresses, result[0].data_ptr()))
        elif not function.is_view:
            self.copies.append(str(function))
        return result


@each_function
def test_contiguous_tensors_are_not_copied(kernels, function):
    tensors = inputs(SHAPES["image"], kernels.device, torch.float32)
    with Operators(kernels.namespace) as operators:
        output = function(*tensors, num_heads=HEADS)
    assert operators.calls == [([t.data_ptr() for t in tensors], output.data_ptr())]
    assert operators.copies == []
    assert output.is_contiguous()
    with Operators(kernels.namespace) as operators:
        torch.autograd.grad(output, tensors, torch.ones_like(output))
    assert [name for name in operators.copies if "ones_like" not in name and "detach" not in name] == []


def test_splitting_and_merging_are_inverse_views():
    x = torch.randn(2, 12, 3, 5)
    split = split_heads(x, 4)
    assert split.shape == (8, 3, 3, 5) and split.data_ptr() == x.data_ptr()
    assert torch.equal(split[5], x[1, 3:6])
    merged = merge_heads(split, 4)
    assert torch.equal(merged, x) and merged.data_ptr() == x.data_ptr()
    assert split_heads(torch.empty(0, 12, 3), 4).shape == (0, 3, 3)
    assert merge_heads(torch.empty(0, 3, 3), 4).shape == (0, 12, 3)


@each_function
def test_strides_do_not_matter(backend, function):
    q, k, v = inputs(SHAPES["image"], backend.device)
    expected = function(q, k, v, 0.4, num_heads=HEADS, return_logsumexp=True)
    last = [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (q, k, v)]
    got = function(*last, 0.4, num_heads=HEADS, return_logsumexp=True)
    slices = [torch.stack([t, -t], 3).detach()[..., 0, :] for t in (q, k, v)]
    got_of_slices = function(*slices, 0.4, num_heads=HEADS, return_logsumexp=True)
    for result in (got, got_of_slices):
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(r[0].square().sum(), ts) for r, ts in ((got, last), (expected, (q, k, v)))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@each_function
def test_an_empty_batch(backend, function):
    tensors = [t[:0] for t in inputs(SHAPES["image"], backend.device)]
    output, logsumexp = function(*tensors, num_heads=HEADS, return_logsumexp=True)
    assert output.shape == (0, 15, 5, 4) and logsumexp.shape == (0, HEADS, 5, 4)


@each_function
def test_vmap(backend, function):
    batches = [torch.stack([t, -t, t.flip(1)]).detach() for t in inputs(SHAPES["image"], backend.device)]
    call = lambda *t: function(*t, 0.4, num_heads=HEADS, return_logsumexp=True)  # noqa: E731
    expected = [call(*each) for each in zip(*batches, strict=True)]
    for in_dims, tensors in ((0, batches), (-1, [b.movedim(0, -1) for b in batches])):
        got = torch.vmap(call, in_dims=in_dims)(*tensors)
        for i in range(2):
            torch.testing.assert_close(got[i], torch.stack([e[i] for e in expected]), rtol=0, atol=1e-13)


class Module(torch.nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, logsumexp = self.function(q, k, v, 0.4, num_heads=HEADS, return_logsumexp=True)
        return output, logsumexp


@each_function
def test_compile_with_dynamic_shapes(kernels, function):
    """One graph for all sizes, forward and backward."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    module = Module(function)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width in ((2, 5, 4), (3, 6, 7)):
        tensors = inputs([(batch, c, height, width) for c in (6, 6, 15)], kernels.device)
        got, expected = compiled(*tensors), module(*tensors)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        gradients = [torch.autograd.grad(r[0].square().sum(), tensors) for r in (got, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@each_function
def test_export(kernels, function):
    """One fused operator, for any batch, height and width."""
    batch, height, width = (torch.export.Dim(name, min=2) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: height, 3: width}
    tensors = [t.detach() for t in inputs(SHAPES["image"], kernels.device)]
    program = torch.export.export(Module(function), tuple(tensors), dynamic_shapes=(sizes, sizes, sizes))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum(kernels.namespace in t for t in targets) == 1
    others = [t.detach() for t in inputs([(3, c, 7, 6) for c in (6, 6, 15)], kernels.device)]
    for a, b in zip(program.module()(*others), Module(function)(*others), strict=True):
        torch.testing.assert_close(a, b)


@each_function
def test_flop_count_is_that_of_one_call_for_each_head(kernels, function):
    tensors = inputs(SHAPES["image"], kernels.device)
    counts = []
    for call in (
        lambda: function(*tensors, 0.4, num_heads=HEADS),
        lambda: for_each_head(function, tensors, HEADS)[0],
        lambda: function(*tensors, 0.4),
    ):
        with FlopCounterMode(display=False) as counter:
            output = call()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1] == counts[2]
    keys = math.prod(SHAPES["image"][1][2:]) if function is segattn_ops.position_attention else 5 + 4 - 1
    assert counts[0][0] == 2 * 2 * 20 * keys * (6 + 15)


@each_function
def test_autocast(backend, function):
    tensors = inputs(SHAPES["image"], backend.device, torch.float32)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output, logsumexp = function(*tensors, 0.4, num_heads=HEADS, return_logsumexp=True)
    assert output.dtype == torch.bfloat16 and logsumexp.dtype == torch.float32
    half = [t.bfloat16() for t in tensors]
    assert torch.equal(output, function(*half, 0.4, num_heads=HEADS))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(output.float().sum(), tensors))


@each_function
def test_meta_and_fake_tensors(backend, function):
    shapes = ((2, 15, 5, 4), (2, HEADS, 5, 4))
    meta = [t.detach().to("meta") for t in inputs(SHAPES["image"], dtype=torch.bfloat16)]
    results = function(*meta, num_heads=HEADS, return_logsumexp=True)
    assert [tuple(r.shape) for r in results] == list(shapes)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.float32] and results[0].is_meta
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t.detach()) for t in inputs(SHAPES["image"], backend.device)]
        results = function(*fake, num_heads=HEADS, return_logsumexp=True)
    assert [tuple(r.shape) for r in results] == list(shapes)


@each_function
@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (0, ValueError, "num_heads must be at least 1 (got 0)"),
        (-1, ValueError, "num_heads must be at least 1 (got -1)"),
        (1.0, TypeError, "num_heads must be an int (got float)"),
        (True, TypeError, "num_heads must be an int (got bool)"),
        (2.0, TypeError, "num_heads must be an int (got float)"),
        ("2", TypeError, "num_heads must be an int (got str)"),
        (None, TypeError, "num_heads must be an int (got NoneType)"),
        (4, RuntimeError, "query must have a number of channels divisible by num_heads = 4 (got 6)"),
        (6, RuntimeError, "value must have a number of channels divisible by num_heads = 6 (got 15)"),
    ],
)
def test_other_numbers_of_heads_are_refused(backend, function, heads, error, message):
    tensors = inputs(SHAPES["image"], backend.device)
    with pytest.raises(error) as raised:
        function(*tensors, num_heads=heads)
    assert str(raised.value) == f"{function.__name__}: {message}"


@each_function
def test_other_ranks_are_refused(function):
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match=rf"{function.__name__}: query must have .* dimensions"):
        function(x, x, x, num_heads=2)


@each_function
def test_messages_have_the_sizes_of_the_caller(backend, function):
    query, key, value = inputs(SHAPES["image"], backend.device)
    with pytest.raises(RuntimeError) as raised:
        function(query, key[:1], value, num_heads=HEADS)
    assert str(raised.value) == f"{function.__name__}: key must have batch size 2 like query (got 1)"
    with pytest.raises(RuntimeError) as raised:
        function(query, torch.cat([key, key], 1), value, num_heads=HEADS)
    channels = query.shape[1]
    expected = f"key must have {channels} channels like query (got {2 * channels})"
    assert str(raised.value) == f"{function.__name__}: {expected}"


@pytest.mark.parametrize("shape", [(), (2,), (3, 5, 4), (2 * HEADS, 5, 4)])
def test_a_mask_of_another_shape_is_refused_with_heads(backend, shape):
    query, key, value = inputs(SHAPES["image"], backend.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=backend.device)
    expected = rf"key_padding_mask must have shape \[2, 5, 4\] \(got \{list(shape)}"
    with pytest.raises(RuntimeError, match=expected):
        segattn_ops.position_attention(query, key, value, num_heads=HEADS, key_padding_mask=mask)


def rows_for_each_head(function: Callable, q: Tensor, k: Tensor, positions: Tensor, **keywords: object) -> Tensor:
    groups = zip(q.chunk(HEADS, 1), k.chunk(HEADS, 1), strict=True)
    return torch.stack([function(a, b, positions, scale=0.4, **keywords) for a, b in groups], 1)


def test_attention_maps_with_heads():
    q, k, v = [t.detach() for t in inputs(SHAPES["image"])]
    positions = torch.tensor([[0, 0], [4, 3], [2, 1]])
    rows = segattn_ops.position_attention_map(q, k, positions, 0.4, num_heads=HEADS)
    assert rows.shape == (2, HEADS, 3, 5, 4)
    assert torch.equal(rows, rows_for_each_head(segattn_ops.position_attention_map, q, k, positions))
    output = segattn_ops.position_attention(q, k, v, 0.4, num_heads=HEADS)
    applied = torch.einsum("bhpn,bhcn->bhcp", rows.flatten(3), v.unflatten(1, (HEADS, -1)).flatten(3)).flatten(1, 2)
    torch.testing.assert_close(applied, output[:, :, positions[:, 0], positions[:, 1]])

    for recurrence in (1, 2):
        keywords = {"recurrence": recurrence, "num_heads": HEADS}
        rows = segattn_ops.criss_cross_attention_map(q, k, positions, scale=0.4, **keywords)
        expected = rows_for_each_head(segattn_ops.criss_cross_attention_map, q, k, positions, recurrence=recurrence)
        torch.testing.assert_close(rows, expected)
    for function in (segattn_ops.position_attention_map, segattn_ops.criss_cross_attention_map):
        assert torch.equal(function(q, k, positions, num_heads=1)[:, 0], function(q, k, positions))
        with pytest.raises(ValueError, match=f"{function.__name__}: num_heads must be at least 1"):
            function(q, k, positions, num_heads=0)
