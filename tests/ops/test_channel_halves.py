"""channel_energy and channel_apply: the two halves of channel attention, over all positions and over parts of them."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import segattn_ops
from segattn_ops import reference
from segattn_ops.ops import channel_apply, channel_energy
from segattn_ops.ops._check import accumulation_dtype

from ..families import DTYPES
from ..tolerance import assert_as_exact_as_eager

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Case(NamedTuple):
    """channels C, key channels K, None for the self form, the spatial sizes of the energy and of the value, scale."""

    batch: int
    channels: int
    keys: int | None
    positions: tuple[int, ...]
    value_positions: tuple[int, ...]
    scale: float
    large: bool = False

    def __str__(self) -> str:
        return "_".join(map(str, self[:5])).replace(" ", "")

    def draw(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """query, key, value, and the gradient of the output"""
        generator = torch.Generator().manual_seed(sum(self[:2]) + sum(self.positions))
        keys = self.channels if self.keys is None else self.keys
        shapes = (
            (self.batch, self.channels, *self.positions),
            (self.batch, keys, *self.positions),
            (self.batch, keys, *self.value_positions),
            (self.batch, self.channels, *self.value_positions),
        )
        q, k, v, g = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
        return (q, None, q, g) if self.keys is None and self.value_positions == self.positions else (q, k, v, g)


CASES = (
    Case(2, 8, 6, (5, 7), (3, 4), 0.3),
    Case(1, 1, 1, (1, 1), (1, 1), -1.0),
    Case(2, 13, None, (9, 11), (9, 11), 0.1),
    Case(1, 33, None, (1, 9), (1, 9), -0.3),
    Case(1, 5, 9, (31, 1), (2, 3, 2), 0.25),
    Case(1, 70, None, (9, 9), (9, 9), -0.1),
    Case(1, 130, 65, (20, 17), (40,), -0.1),
    Case(1, 100, None, (2100,), (2100,), -0.03, large=True),
    Case(1, 150, 90, (2500,), (333,), 0.03, large=True),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def eager_energy(q: Tensor, k: Tensor) -> Tensor:
    dtype = accumulation_dtype(q.dtype)
    return q.flatten(2).to(dtype) @ k.flatten(2).to(dtype).mT


def eager_apply(e: Tensor, v: Tensor, scale: float, gamma: Tensor | None = None) -> Tensor:
    weights = (scale * e).softmax(-1).to(v.dtype)
    output = (weights @ v.flatten(2)).unflatten(2, v.shape[2:])
    if gamma is None:
        return output
    return gamma.to(v.dtype).reshape(*gamma.shape, *[1] * (v.dim() - 2)) * output + v


def with_gradients(function, inputs, grad_output) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def compare(names, got, eager, exact, energy=12.0):
    for name, *values in zip(names, got, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *values, energy=energy)


@each_dtype
@each_case
def test_energy_as_exact_as_eager(backend, case, dtype):
    query, key, _, _ = case.draw(dtype, backend.device)
    inputs = [query] if key is None else [query, key]
    functions = (channel_energy, lambda q, k=None: eager_energy(q, q if k is None else k))
    gradient = torch.randn(*query.shape[:2], inputs[-1].shape[1], device=query.device)
    got, eager = (with_gradients(f, inputs, gradient) for f in functions)
    exact = with_gradients(functions[1], [t.double() for t in inputs], gradient.to(got[0].dtype))
    assert got[0].dtype == accumulation_dtype(dtype)
    if key is None and (backend.name == "cpu" or backend.namespace is not None and dtype.itemsize == 2):
        assert torch.equal(got[0], got[0].mT)  # by our kernels: cuBLAS computes the other products on CUDA
    compare(["energy", "grad_query", "grad_key"][: len(got)], got, eager, exact)


@pytest.mark.parametrize("with_gamma", [False, True], ids=["", "gamma"])
@each_dtype
@each_case
def test_apply_as_exact_as_eager(backend, case, dtype, with_gamma):
    if with_gamma and case.keys not in (None, case.channels):
        pytest.skip("gamma is for as many channels as keys")
    query, key, value, gradient = case.draw(dtype, backend.device)
    energy = eager_energy(query, query if key is None else key) * case.scale
    inputs = [energy, value]
    if with_gamma:
        inputs.append(torch.randn(energy.shape[:2], device=energy.device, dtype=energy.dtype))

    def ours(e, v, gamma=None):
        return channel_apply(e, v, 0.5, gamma)

    def eager(e, v, gamma=None):
        return eager_apply(e, v, 0.5, gamma)

    got, theirs = (with_gradients(f, inputs, gradient) for f in (ours, eager))
    exact = with_gradients(eager, [t.double() for t in inputs], gradient.double())
    assert got[0].dtype == dtype and got[1].dtype == energy.dtype
    compare(["output", "grad_energy", "grad_value", "grad_gamma"][: len(got)], got, theirs, exact)


# ---- the whole from the halves ---------------------------------------------------------------------------------------


@each_dtype
@each_case
def test_the_composition_is_channel_attention_to_the_bit(kernels, case, dtype):
    query, key, value, gradient = case.draw(dtype, kernels.device)
    operators = kernels.operators
    energy = operators.channel_energy(query, key)
    got = operators.channel_apply(energy, value, case.scale)
    if key is not None:
        expected = operators.channel_attention(query, key, value, case.scale)
        backward = operators.channel_attention_backward(gradient, query, key, value, case.scale)
        halves = operators.channel_apply_backward(gradient, energy, value, case.scale)
        assert torch.equal(halves[1], backward[2])
    else:
        expected = operators.channel_self_attention(query, case.scale)
        gamma = torch.randn_like(expected[1])
        with_gamma = operators.channel_self_attention(query, case.scale, gamma)
        backward = operators.channel_self_attention_backward(gradient, query, case.scale, gamma)
        got = *got, *operators.channel_apply(energy, value, case.scale, gamma)
        got = *got, operators.channel_apply_backward(gradient, energy, value, case.scale, gamma)[2]
        expected = *expected, *with_gamma, backward[1]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def whole(operators, query, key, value, gradient, scale, gamma):
    if key is None:
        output, logsumexp = operators.channel_self_attention(query, scale, gamma)
        grad_input, grad_gamma = operators.channel_self_attention_backward(gradient, query, scale, gamma)
        return output, logsumexp, grad_input, grad_gamma
    output, logsumexp = operators.channel_attention(query, key, value, scale)
    return output, logsumexp, *operators.channel_attention_backward(gradient, query, key, value, scale)


def from_parts(operators, query, key, value, gradient, scale, gamma, sizes):
    """The same from parts of the positions, none in one of them: what ranks compute and add up."""
    maps = [(None,) * len(sizes) if t is None else t.split(sizes, 2) for t in (query, key, value, gradient)]
    parts = list(zip(*maps, strict=True))
    energy = sum(operators.channel_energy(q, k) for q, k, _, _ in parts)
    applied = [operators.channel_apply(energy, v, scale, gamma) for _, _, v, _ in parts]
    for _, logsumexp in applied:
        assert torch.equal(logsumexp, applied[0][1])
    backward = [operators.channel_apply_backward(g, energy, v, scale, gamma) for _, _, v, g in parts]
    grad_energy = sum(b[0] for b in backward)
    inputs = [operators.channel_energy_backward(grad_energy, q, k) for q, k, _, _ in parts]
    output, logsumexp = torch.cat([o for o, _ in applied], 2), applied[0][1]
    grad_query, grad_value = (torch.cat([r[i] for r in results], 2) for results, i in ((inputs, 0), (backward, 1)))
    if key is None:
        return output, logsumexp, grad_query + grad_value, sum(b[2] for b in backward)
    return output, logsumexp, grad_query, torch.cat([r[1] for r in inputs], 2), grad_value


@pytest.mark.parametrize("form", ["three inputs", "self", "gamma"])
@each_dtype
def test_parts_of_the_positions(kernels, dtype, form):
    case = Case(2, 20, 17 if form == "three inputs" else None, (60,), (60,), -0.2)
    query, key, value, gradient = case.draw(dtype, kernels.device)
    gamma = None
    if form == "gamma":
        gamma = torch.randn(2, 20, dtype=accumulation_dtype(dtype), device=query.device)
    arguments = (query, key, value, gradient, case.scale, gamma)
    got, expected = from_parts(kernels.operators, *arguments, (37, 0, 23)), whole(kernels.operators, *arguments)
    eps = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=4 * eps * b.abs().max().item())


def test_autograd_over_parts(backend):
    """The functions, with a sum between them."""
    x = torch.randn(2, 5, 4, 9, dtype=torch.float64, device=backend.device, requires_grad=True)
    gamma = torch.randn(5, dtype=torch.float64, device=backend.device, requires_grad=True)
    parts = x.split((6, 0, 3), 3)
    energy = sum(channel_energy(p) for p in parts)
    output = torch.cat([channel_apply(energy, p, -0.3, gamma) for p in parts], 3)
    expected = segattn_ops.residual_channel_attention(x, gamma, -0.3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(output)
    for a, b in zip(*(torch.autograd.grad(o, (x, gamma), weights) for o in (output, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@each_dtype
def test_no_positions(backend, dtype, symmetric):
    accumulator = accumulation_dtype(dtype)
    q = torch.randn(2, 9, 0, 5, device=backend.device, dtype=dtype, requires_grad=True)
    k = None if symmetric else torch.randn(2, 60, 0, 5, device=q.device, dtype=dtype, requires_grad=True)
    energy = channel_energy(q, k)
    leaves = (q,) if k is None else (q, k)
    assert torch.equal(energy, torch.zeros(2, 9, 9 if k is None else 60, dtype=accumulator, device=q.device))
    for gradient, leaf in zip(torch.autograd.grad(energy.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
    if backend.namespace is None:
        return
    energy = torch.randn(energy.shape, device=q.device, dtype=accumulator)
    v = torch.randn(2, energy.shape[2], 0, device=q.device, dtype=dtype)
    gamma = torch.randn(2, 9, device=q.device, dtype=accumulator) if symmetric else None
    output, logsumexp = backend.operators.channel_apply(energy, v, 0.7, gamma)
    assert output.shape == (2, 9, 0) and output.dtype == dtype
    torch.testing.assert_close(logsumexp, (0.7 * energy).logsumexp(2))
    grad_energy, grad_value, grad_gamma = backend.operators.channel_apply_backward(output, energy, v, 0.7, gamma)
    assert torch.equal(grad_energy, torch.zeros_like(energy)) and grad_value.shape == v.shape
    assert torch.equal(grad_gamma, torch.zeros_like(logsumexp))


def test_no_samples(backend):
    q = torch.randn(0, 4, 3, device=backend.device, requires_grad=True)
    v = torch.randn(0, 4, 5, device=backend.device, requires_grad=True)
    energy = channel_energy(q)
    assert energy.shape == (0, 4, 4)
    output = channel_apply(energy, v, 1.0, 0.5)
    assert output.shape == v.shape
    for gradient, leaf in zip(torch.autograd.grad(output.sum(), (q, v)), (q, v), strict=True):
        assert gradient.shape == leaf.shape


@each_dtype
def test_energies_of_minus_infinity(kernels, dtype):
    """A key without weight, and a row that has no other key: NaN, as of a softmax. So are NaN and +inf."""
    inf = torch.inf
    energy = torch.randn(1, 6, 37, dtype=accumulation_dtype(dtype), device=kernels.device)
    energy[0, 0, 3:] = -inf
    energy[0, 1, 20] = -inf
    value = torch.randn(1, 37, 10, dtype=dtype, device=kernels.device)
    finite = energy.clone()
    energy[0, 2] = -inf
    energy[0, 3, 5] = inf
    energy[0, 4, 5] = torch.nan
    output, logsumexp = kernels.operators.channel_apply(energy, value, 0.5)
    wanted, wanted_logsumexp = reference.channel_apply(energy.double(), value.double(), 0.5)
    assert torch.equal(output.isnan(), wanted.isnan())
    rows = [0, 1, 5]
    torch.testing.assert_close(output[:, rows].double(), wanted[:, rows], rtol=0, atol=2e-2)
    torch.testing.assert_close(logsumexp[:, rows].double(), wanted_logsumexp[:, rows], rtol=0, atol=1e-5)
    gradient = torch.randn_like(output)
    got = kernels.operators.channel_apply_backward(gradient, finite, value, 0.5)
    leaves = [finite.double().requires_grad_(), value.double().requires_grad_()]
    wanted = torch.autograd.grad(reference.channel_apply(*leaves, 0.5)[0], leaves, gradient.double())
    for a, b in zip(got[:2], wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("size", [1000.0, -1000.0])
@each_dtype
def test_large_energies(backend, dtype, size):
    """The logsumexp is about 1000; rounded to float32, it would change every weight by 3e-5 of its value."""
    energy = size + torch.randn(2, 9, 37, dtype=accumulation_dtype(dtype), device=backend.device)
    value, gradient = (torch.randn(2, c, 50, device=backend.device).to(dtype) for c in (37, 9))
    got, eager, exact = (
        with_gradients(f, [energy.to(energy_dtype), value.to(value_dtype)], gradient)
        for f, energy_dtype, value_dtype in (
            (lambda e, v: channel_apply(e, v, 1.0), energy.dtype, dtype),
            (lambda e, v: eager_apply(e, v, 1.0), energy.dtype, dtype),
            (lambda e, v: eager_apply(e, v, 1.0), torch.float64, torch.float64),
        )
    )
    compare(["output", "grad_energy", "grad_value"], got, eager, exact)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("size", "features"), [(1e6, 1e-3), (1.0, 1.0), (1e-7, 1e3)])
def test_gradients_of_energies_beyond_float16(kernels, size, features, symmetric):
    """Gradients of energies are sums over the positions of all ranks: they overflow float16, or vanish in it, where
    those of the feature maps do not."""
    x, other = ((features * torch.randn(1, c, 30, device=kernels.device)).half() for c in (40, 24))
    inputs = (x,) if symmetric else (x, other)
    rows = size * torch.logspace(-1, 0.3, 40, device=x.device).unsqueeze(1)
    gradient = rows * torch.randn(1, 40, inputs[-1].shape[1], device=x.device)
    got = with_gradients(channel_energy, inputs, gradient)[1:]
    exact = with_gradients(
        lambda q, k=None: eager_energy(q, q if k is None else k), [t.double() for t in inputs], gradient
    )
    for a, b in zip(got, exact[1:], strict=True):
        assert a.dtype == torch.float16 and 2**-13 < b.abs().max() < 65504
        error = (a.double() - b).abs().amax(2)
        assert (error <= 2**-9 * b.abs().amax(2)).all()


def sliced(t: Tensor) -> Tensor:
    buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=t.device)
    buffer[..., ::2] = t
    return buffer[..., ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [sliced, lambda t: t.mT.contiguous().mT], ids=["sliced", "transposed"])
def test_any_strides(kernels, layout, dtype):
    query, key, _, _ = CASES[0].draw(dtype, kernels.device)
    value, gradient = (torch.randn(2, c, 3, 5, device=query.device).to(dtype) for c in (6, 8))
    operators = kernels.operators
    energy = operators.channel_energy(query, key)
    gamma, square = torch.randn(2, 6, device=query.device), torch.randn(2, 6, 6, device=query.device)
    calls = [
        (operators.channel_energy, (query, key)),
        (operators.channel_energy, (query,)),
        (operators.channel_energy_backward, (torch.randn_like(energy), query, key)),
        (operators.channel_energy_backward, (torch.randn(2, 8, 8, device=query.device), query)),
        (operators.channel_apply, (energy, value, 0.5)),
        (operators.channel_apply, (square, value, 0.5, gamma)),
        (operators.channel_apply_backward, (gradient, energy, value, 0.5)),
        (operators.channel_apply_backward, (value, square, value, 0.5, gamma)),
    ]
    eps = torch.finfo(dtype).eps
    for function, arguments in calls:
        laid_out = [layout(a) if isinstance(a, Tensor) else a for a in arguments]
        assert not any(a.is_contiguous() for a in laid_out if isinstance(a, Tensor))
        got, expected = (r if isinstance(r, tuple) else (r,) for r in (function(*laid_out), function(*arguments)))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=16 * eps, atol=16 * eps)


def test_channels_last(backend):
    x = torch.randn(2, 6, 4, 5, device=backend.device).to(memory_format=torch.channels_last).requires_grad_()
    output = channel_apply(channel_energy(x), x, -0.5, 0.3)
    torch.testing.assert_close(output, segattn_ops.residual_channel_attention(x, 0.3, -0.5))
    assert output.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# ---- within PyTorch --------------------------------------------------------------------------------------------------


def operator_calls(operators, dtype=torch.float32, device="cpu"):
    """operator, arguments, the number of gradients of its backward"""
    q, k, v, g = (t.to(device) for t in CASES[0].draw(dtype, "cpu"))
    accumulator = accumulation_dtype(dtype)
    e, square = (torch.randn(2, c, k.shape[1], dtype=accumulator, device=device) for c in (q.shape[1], k.shape[1]))
    gamma = torch.randn(2, k.shape[1], dtype=accumulator, device=device)
    return {
        "energy": (operators.channel_energy, operators.channel_energy_backward, (q, k), e),
        "self energy": (operators.channel_energy, operators.channel_energy_backward, (k, None), square),
        "apply": (operators.channel_apply, operators.channel_apply_backward, (e, v, 0.3, None), g),
        "gamma": (operators.channel_apply, operators.channel_apply_backward, (square, v, 0.3, gamma), v.cos()),
    }


KINDS = ("energy", "self energy", "apply", "gamma")
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_opcheck(kernels, kind):
    forward, backward, arguments, gradient = operator_calls(kernels.operators, device=kernels.device)[kind]
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(forward.default, tuple(leaves))
    torch.library.opcheck(backward.default, (gradient, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_kind
def test_every_subset_of_the_gradients(kernels, kind, dtype):
    _, backward, arguments, gradient = operator_calls(kernels.operators, dtype, kernels.device)[kind]
    complete = backward(gradient, *arguments)
    for needs in itertools.product([False, True], repeat=len(complete)):
        for i, (needed, got) in enumerate(zip(needs, backward(gradient, *arguments, list(needs)), strict=True)):
            expected = complete[i] if needed else complete[i].new_empty(0)
            assert got.dtype == expected.dtype and torch.equal(got, expected), needs
    if kind == "self energy":
        assert complete[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=str)
def test_the_same_bits_every_time(kernels, case, dtype):
    query, key, value, gradient = case.draw(dtype, kernels.device)

    def run():
        energy = kernels.operators.channel_energy(query, key)
        results = [energy, *kernels.operators.channel_apply(energy, value, case.scale)]
        backward = kernels.operators.channel_apply_backward(gradient, energy, value, case.scale)
        return [*results, *backward, *kernels.operators.channel_energy_backward(backward[0], query, key)]

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(3 if kernels.name == "cpu" else threads)  # the emulator's bmm is PyTorch's on the CPU
        second = run()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def function_of(kind):
    """A function under test, its definition, and the inputs, few numbers each."""
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 2, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    e, square = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    gamma = torch.randn(2, 2, dtype=torch.float64)
    return {
        "energy": (channel_energy, reference.channel_energy, [x, k]),
        "self energy": (channel_energy, reference.channel_energy, [x]),
        "apply": (lambda *t: channel_apply(*t, 0.5), lambda *t: reference.channel_apply(*t, 0.5)[0], [e, v]),
        "gamma": (
            lambda e, v, g: channel_apply(e, v, 0.5, g),
            lambda e, v, g: reference.channel_apply(e, v, 0.5, g)[0],
            [square, v, gamma],
        ),
    }[kind]


@each_kind
def test_derivatives(kernels, kind):
    function, definition, inputs = function_of(kind)
    inputs = [t.to(kernels.device) for t in inputs]
    for some in itertools.product([False, True], repeat=len(inputs)):
        if any(some):
            leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(inputs, some, strict=True)]
            assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(function, leaves)

    def scalar(f):
        return lambda *tensors: f(*tensors).sin().sum()

    indices = tuple(range(len(inputs)))
    for transform in (torch.func.hessian, lambda f, i: torch.func.jacrev(torch.func.jacfwd(f, i), i)):
        got, expected = (transform(scalar(f), indices)(*inputs) for f in (function, definition))
        for a, b in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@each_kind
def test_forward_mode_of_the_gradients(kernels, kind):
    function, definition, inputs = function_of(kind)
    inputs = [t.to(kernels.device) for t in inputs]

    def gradients(f):
        return torch.cat([g.flatten() for g in torch.func.vjp(f, *duals)[1](f(*duals).sin())])

    for some in itertools.product([False, True], repeat=len(inputs)):
        if any(some):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, t.cos()) if d else t for t, d in zip(inputs, some, strict=True)]
                got, expected = (forward_ad.unpack_dual(gradients(f)).tangent for f in (function, definition))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@each_kind
def test_vmap(kernels, kind):
    function, _, inputs = function_of(kind)
    inputs = [torch.stack([t, t.cos(), t.sin()], 1).to(kernels.device) for t in inputs]
    got = torch.func.vmap(function, in_dims=1)(*inputs)
    for i, sample in enumerate(zip(*(t.unbind(1) for t in inputs), strict=True)):
        torch.testing.assert_close(got[i], function(*sample))


@each_kind
def test_one_graph(kernels, kind):
    function, _, inputs = function_of(kind)
    inputs = [t.to(kernels.device).requires_grad_() for t in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = function(*inputs), compiled(*inputs)
    assert torch.equal(*outputs)
    for a, b in zip(*(torch.autograd.grad(o.sum(), inputs) for o in outputs), strict=True):
        assert torch.equal(a, b)


@each_kind
def test_the_decomposition_for_onnx(kind):
    forward, _, arguments, _ = operator_calls(torch.ops.segattn)[kind]
    decomposed = get_decompositions([forward.default])[forward.default]
    torch.testing.assert_close(decomposed(*arguments), forward(*arguments))


def test_flops(kernels):
    calls = operator_calls(kernels.operators, device=kernels.device)

    def counted(function, *arguments):
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()

    forward, backward, arguments, gradient = calls["energy"]
    product = 2 * 2 * 8 * 6 * 35
    assert counted(forward, *arguments) == product
    assert [counted(backward, gradient, *arguments, n) for n in ([True, True], [False, True])] == [2 * product, product]
    forward, backward, arguments, gradient = calls["self energy"]
    assert counted(forward, *arguments) == 2 * 6 * 6 * 35
    assert counted(backward, gradient, *arguments) == 2 * 2 * 6 * 6 * 35
    forward, backward, arguments, gradient = calls["apply"]
    product = 2 * 2 * 8 * 6 * 12
    assert counted(forward, *arguments) == product
    for needs, products in (([True, True, True], 2), ([True, False, True], 1), ([False, True, False], 1)):
        assert counted(backward, gradient, *arguments, needs) == products * product


# ---- the functions ---------------------------------------------------------------------------------------------------


def test_the_same_tensor_is_the_self_form(backend):
    x = torch.randn(2, 6, 5, device=backend.device)
    assert torch.equal(channel_energy(x, x), channel_energy(x))
    torch.testing.assert_close(channel_energy(x, x.clone()), channel_energy(x))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 6), (2, 1)])
def test_gamma_broadcasts(backend, shape):
    x, energy = (torch.randn(2, 6, n, device=backend.device) for n in (5, 6))
    gamma = torch.randn(shape, device=x.device)
    whole = gamma.expand(2, 6)
    assert torch.equal(channel_apply(energy, x, 1.0, gamma), channel_apply(energy, x, 1.0, whole.contiguous()))
    assert torch.equal(channel_apply(energy, x, 1.0, 0.5), channel_apply(energy, x, 1.0, torch.full_like(whole, 0.5)))


def test_autocast(backend):
    """As of channel_attention: products in autocast's dtype, no rounding of the residual."""
    x = torch.randn(2, 6, 5, device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        energy = channel_energy(x)
        output, residual = channel_apply(energy, x), channel_apply(energy, x, gamma=0.5)
        expected = segattn_ops.channel_attention(x, x, x), segattn_ops.residual_channel_attention(x, 0.5)
    assert energy.dtype == torch.float32 and output.dtype == torch.bfloat16 and residual.dtype == torch.float32
    torch.testing.assert_close((output, residual), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(energy, channel_energy(x.bfloat16()))


def test_bad_input_of_the_functions(backend):
    x, energy = (torch.zeros(2, 6, n, device=backend.device) for n in (5, 6))
    for call, error, message in (
        (lambda: channel_energy(None), TypeError, r"channel_energy: query must be a torch.Tensor \(got NoneType\)"),
        (lambda: channel_energy(x, 1.0), TypeError, r"channel_energy: key must be a torch.Tensor \(got float\)"),
        (lambda: channel_energy(x, x[:1]), RuntimeError, r"channel_energy: key must have batch size 2 like query"),
        (lambda: channel_apply(energy, 1.0), TypeError, r"channel_apply: value must be a torch.Tensor \(got float\)"),
        (lambda: channel_apply(energy, x, "auto"), TypeError, r"channel_apply: scale must be a number \(got str\)"),
        (lambda: channel_apply(energy[:, :, 1:], x), RuntimeError, r"channel_apply: energy must have 6 keys"),
        (lambda: channel_apply(energy.double(), x), RuntimeError, r"channel_apply: energy must be float32 for these"),
        (lambda: channel_apply(energy, x, gamma=True), TypeError, r"channel_apply: gamma must be a number or a torch"),
        (lambda: channel_apply(energy, x, gamma=energy[0]), RuntimeError, r"channel_apply: gamma must be of a shape"),
        (lambda: channel_apply(energy[:, 1:], x, gamma=1.0), RuntimeError, r"channel_apply: energy must have as many"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()
