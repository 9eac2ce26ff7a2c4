"""The operators within PyTorch: opcheck, compile, vmap, autocast, FLOP counts."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

import segattn_ops

from ..families import BY_OPERATOR, OPERATORS
from ..region_features import region_features
from .test_ops import MEDIUM_CASES, RECTANGULAR, grad_output_of, results


def backward_arguments(kernels, family, case, inputs):
    """The arguments that autograd passes to the `*_backward` operator."""
    grad_output = grad_output_of(family, case, inputs).to(kernels.device, inputs[0].dtype)
    result = getattr(kernels.operators, family.operator)(*inputs, *case.scalars)
    if not isinstance(result, tuple):
        return (grad_output, *inputs)
    # The channel backward recomputes its weights from the energies alone.
    saved = () if family.operator.startswith("channel") else result[:2]
    return (grad_output, *inputs, *saved, *case.scalars)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(kernels, operator):
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = [t.requires_grad_() for t in family.make(case, torch.float32, kernels.device)]
    torch.library.opcheck(getattr(kernels.operators, operator).default, (*inputs, *case.scalars))


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck_backward(kernels, operator):
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = family.make(case, torch.float32, kernels.device)
    arguments = backward_arguments(kernels, family, case, inputs)
    torch.library.opcheck(getattr(kernels.operators, f"{operator}_backward").default, arguments)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_results_of_rectangles(kernels, operator):
    """Queries and keys, and the positions of energies and values, have sizes of their own."""
    family = BY_OPERATOR[operator]
    case = family.cases[RECTANGULAR[operator]]
    inputs = family.make(case, torch.float32, kernels.device)
    calls = {
        operator: (*inputs, *case.scalars),
        f"{operator}_backward": backward_arguments(kernels, family, case, inputs),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(kernels.operators, name).default, arguments, test_utils="test_faketensor")


def test_opcheck_with_low(kernels):
    """The optional third result of position_attention, and the argument of its gradient."""
    family = BY_OPERATOR["position_attention"]
    inputs = family.make(family.cases[0], torch.bfloat16, kernels.device)
    arguments = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(kernels.operators.position_attention.default, (*arguments, 1.0, True))
    inputs = [t.detach() for t in inputs]
    output, logsumexp, low, logsumexp_low = kernels.operators.position_attention(*inputs, 1.0, True)
    assert logsumexp_low.numel() == 0
    assert low.shape == output.shape
    assert (low.abs() <= 2**-8 * output.abs()).all()  # half a unit in the last place
    assert low.norm() > 2**-11 * output.norm()
    backward = kernels.operators.position_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(output), *inputs, output, logsumexp, 1.0, low))


def test_output_low_is_written_only_for_a_backward_pass(kernels):
    """Inference skips the write, which has the output's size."""
    family = BY_OPERATOR["position_attention"]
    inputs = family.make(family.cases[0], torch.bfloat16, kernels.device)
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function is kernels.operators.position_attention.default:
                calls.append(result[2].shape[1])
            return result

    channels = inputs[2].shape[1]
    with Record():
        family.function(*inputs, 1.0)
        with torch.no_grad():
            family.function(inputs[0].requires_grad_(), *inputs[1:], 1.0)
        family.function(*inputs, 1.0)
    assert calls == [0, 0, channels]


def test_the_backward_pass_allocates_no_gradient_of_output_low(kernels):
    """output_low has no gradient; by default autograd would materialise zeros of its size."""
    family = BY_OPERATOR["position_attention"]
    leaves = [t.requires_grad_() for t in family.make(family.cases[0], torch.bfloat16, kernels.device)]
    output = family.function(*leaves, 1.0)
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append(function)
            return function(*arguments, **(keywords or {}))

    with Record():
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert [f for f in called if "detach" not in str(f) and "ones_like" not in str(f)] == [
        kernels.operators.position_attention_backward.default
    ]


def test_opcheck_with_gamma(kernels):
    """The optional argument of channel_self_attention and of its gradient."""
    family = BY_OPERATOR["residual_channel_attention"]
    x, gamma = (t.requires_grad_() for t in family.make(family.cases[0], torch.float32, kernels.device))
    torch.library.opcheck(kernels.operators.channel_self_attention.default, (x, -0.2, gamma))
    grad_output = torch.randn_like(x)
    backward = kernels.operators.channel_self_attention_backward.default
    torch.library.opcheck(backward, (grad_output, x.detach(), -0.2, gamma.detach()))


@pytest.mark.parametrize("operator", [*OPERATORS, "residual_channel_attention"])
def test_compile_with_dynamic_shapes(backend, operator):
    """One graph for every size, forward and backward, and the same numbers."""
    family = BY_OPERATOR[operator]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: 2 * family.function(*a), fullgraph=True, dynamic=True, backend=counter)
    plain = [c for c in family.cases if not c.large and all(min(s[2:], default=3) > 2 and s[0] > 1 for s in c.shapes)][
        :2
    ]
    for case in plain:
        inputs = family.make(case, torch.float32, backend.device)
        grad_output = grad_output_of(family, case, inputs).to(backend.device, torch.float32)
        got = results(lambda *a: compiled(*a), inputs, case.scalars, grad_output)
        expected = results(lambda *a: 2 * family.function(*a), inputs, case.scalars, grad_output)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count >= 1


@pytest.mark.parametrize("operator", [*OPERATORS, "residual_channel_attention"])
def test_availability_of_autocast_is_not_traced(backend, operator, monkeypatch):
    """Dynamo of PyTorch 2.10 and 2.11 cannot trace the query. Here no Dynamo can, and a call still compiles."""
    ask = torch._C._is_autocast_available

    def untraceable(device_type: str) -> bool:
        torch._dynamo.graph_break()
        return ask(device_type)

    monkeypatch.setattr(torch._C, "_is_autocast_available", untraceable)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = family.make(case, torch.float32, backend.device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: family.function(*a, *case.scalars), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), family.function(*inputs, *case.scalars))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs), family.function(*inputs, *case.scalars))


def test_compile_with_inductor():
    x = torch.randn(1, 8, 6, 6, requires_grad=True)

    def block(x):
        return x + 0.5 * segattn_ops.position_attention(x[:, :4].contiguous(), x[:, 4:].contiguous(), x)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_on_a_build_server(dynamic, tmp_path):
    """With the variable CI set, Inductor refuses operators that have decompositions and that are not registered with
    it. In a process and with a cache of its own, because a compiled graph or an earlier call hides it."""
    code = f"""
        import torch, segattn_ops as ops

        def block(x):
            affinity = ops.criss_cross_affinity(x, x)
            sums = ops.position_attention(x, x, x) + ops.criss_cross_attention(x, x, x) + ops.channel_attention(x, x, x)
            return ops.residual_channel_attention(sums, 0.5) + ops.criss_cross_aggregation(affinity, x)

        x = torch.randn(1, 8, 6, 5, requires_grad=True)
        result = torch.compile(block, fullgraph=True, dynamic={dynamic})(x)
        torch.testing.assert_close(result, block(x))
        gradients = [torch.autograd.grad(y.sum(), x) for y in (result, block(x))]
        torch.testing.assert_close(*gradients)
    """
    environment = {**os.environ, "CI": "true", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=environment, check=True)


@pytest.mark.parametrize(("family", "case"), MEDIUM_CASES)
def test_vmap(kernels, family, case):
    """A mapped dimension, in front or behind, of all inputs or of the first alone."""
    batches = [torch.stack([t, t.flip(1), -t]) for t in family.make(case, torch.float32, kernels.device)]
    expected = torch.stack([family.function(*(b[i] for b in batches), *case.scalars) for i in range(3)])
    call = lambda *a: family.function(*a, *case.scalars)  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(*batches), expected)
    behind = [b.movedim(0, -1) for b in batches]
    torch.testing.assert_close(torch.vmap(call, in_dims=-1)(*behind), expected)
    shared = [b[0] for b in batches[1:]]
    expected = torch.stack([family.function(b, *shared, *case.scalars) for b in batches[0]])
    mapped = torch.vmap(call, in_dims=(0, *[None] * len(shared)))(batches[0], *shared)
    torch.testing.assert_close(mapped, expected)


def test_gradients_under_vmap(kernels):
    """Bitwise those of the folded batch: output_low is kept although no tensor inside vmap requires a gradient. The
    difference is visible on regions, with more keys than a tile has."""
    q, k, v = region_features(9, 16, 8, 16, torch.bfloat16, 4.0)
    inputs = [torch.cat([t, t.flip(-1), t.roll(5, 1)]).to(kernels.device) for t in (q, k, v)]
    grad_output = torch.randn(3, 16, 9, 16, generator=torch.Generator().manual_seed(0)).to(inputs[0])
    function = BY_OPERATOR["position_attention"].function

    def gradients(call):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(call(*leaves), leaves, grad_output)

    mapped = torch.vmap(lambda *each: function(*(t[None] for t in each), 1.0)[0])
    for got, expected in zip(gradients(mapped), gradients(lambda *t: function(*t, 1.0)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_of_the_backward_operator(kernels, operator):
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = family.make(case, torch.float32, kernels.device)
    arguments = backward_arguments(kernels, family, case, inputs)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    scalars = arguments[len(tensors) :]
    backward = getattr(kernels.operators, f"{operator}_backward")
    mapped = torch.vmap(lambda *t: backward(*t, *scalars), in_dims=(0, *[None] * (len(tensors) - 1)))
    got = mapped(torch.stack([tensors[0], 2 * tensors[0]]), *tensors[1:])
    expected = [backward(g, *tensors[1:], *scalars) for g in (tensors[0], 2 * tensors[0])]
    if isinstance(got, torch.Tensor):
        got, expected = (got,), [(e,) for e in expected]
    for i, gradient in enumerate(got):
        torch.testing.assert_close(gradient, torch.stack([e[i] for e in expected]))


def test_autocast_does_not_round_the_residual(backend):
    family = BY_OPERATOR["residual_channel_attention"]
    x, gamma = family.make(family.cases[0], torch.float32, backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output = family.function(x, gamma, -0.2)
        half = family.function(x.bfloat16(), gamma, -0.2)
        unchanged = family.function(x, torch.zeros_like(gamma), -0.2)
    assert output.dtype == torch.float32
    assert torch.equal(unchanged, x)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert family.function(x.half(), gamma, -0.2).dtype == torch.float16
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), output, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast(backend, operator, dtype):
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = [t.requires_grad_() for t in family.make(case, torch.float32, backend.device)]
    with torch.autocast(backend.device, dtype=dtype):
        output = family.function(*inputs, *case.scalars)
    assert output.dtype == dtype
    assert torch.equal(output, family.function(*(t.to(dtype) for t in inputs), *case.scalars))
    for gradient in torch.autograd.grad(output.float().square().sum(), inputs):
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_leaves_float64_alone(backend, operator):
    """As PyTorch's products do."""
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = family.make(case, torch.float64, backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output = family.function(*inputs, *case.scalars)
    assert output.dtype == torch.float64
    assert torch.equal(output, family.function(*inputs, *case.scalars))


# FLOP of a forward and a forward with backward, by the sizes of the second case below
FLOPS = {
    "position_attention": lambda n, m, e, c: (2 * n * m * (e + c), 2 * n * m * (4 * e + 3 * c)),
    "channel_attention": lambda n, m, e, c: (2 * e * c * (n + m), 2 * e * c * (4 * n + 3 * m)),
}


def test_flop_counts(kernels):
    query, key = torch.randn(1, 8, 30, device=kernels.device), torch.randn(1, 8, 20, device=kernels.device)
    value = torch.randn(1, 6, 20, device=kernels.device)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    forward, both = FLOPS["position_attention"](30, 20, 8, 6)
    with FlopCounterMode(display=False) as counter:
        output = segattn_ops.position_attention(*leaves)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        segattn_ops.position_attention(*leaves).sum().backward()
    assert counter.get_total_flops() == both
    assert output.shape == (1, 6, 30)

    a, b = torch.randn(1, 5, 30, device=kernels.device), torch.randn(1, 7, 30, device=kernels.device)
    leaves = [t.requires_grad_() for t in (a, b, torch.randn(1, 7, 20, device=kernels.device))]
    with FlopCounterMode(display=False) as counter:
        segattn_ops.channel_attention(*leaves).sum().backward()
    assert counter.get_total_flops() == FLOPS["channel_attention"](30, 20, 5, 7)[1]

    x = torch.randn(1, 6, 40, device=kernels.device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        segattn_ops.channel_attention(x, x, x).sum().backward()
    assert counter.get_total_flops() == (3 + 7) * 36 * 40

    q, v = (torch.randn(1, c, 5, 7, device=kernels.device, requires_grad=True) for c in (4, 6))
    with FlopCounterMode(display=False) as counter:
        segattn_ops.criss_cross_attention(q, q, v).sum().backward()
    assert counter.get_total_flops() == 2 * 35 * 11 * (4 * 4 + 3 * 6)
    with FlopCounterMode(display=False) as counter:
        attention = segattn_ops.criss_cross_affinity(q, q)
        segattn_ops.criss_cross_aggregation(attention, v).sum().backward()
    assert counter.get_total_flops() == 2 * 35 * 11 * (3 * 4 + 3 * 6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_has_second_derivatives(operator):
    family = BY_OPERATOR[operator]
    from .test_ops import GRADCHECK_SHAPES

    case = GRADCHECK_SHAPES[operator]
    inputs = [t.requires_grad_() for t in family.make(case, torch.float64)]
    with segattn_ops.use_backend("reference"):
        torch.autograd.gradgradcheck(lambda *a: family.function(*a, *case.scalars), inputs)


def test_the_rounding_error_is_not_differentiable(kernels):
    q = torch.randn(1, 4, 6, device=kernels.device, requires_grad=True)
    output, logsumexp, output_low, logsumexp_low = kernels.operators.position_attention(q, q, q, 1.0, True)
    assert output.requires_grad
    assert logsumexp.requires_grad
    assert not output_low.requires_grad
    assert not logsumexp_low.requires_grad
