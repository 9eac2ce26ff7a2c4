"""Derivatives beyond the first, and forward mode, of autograd: the same numbers as of the definitions."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import segattn_ops
from segattn_ops.ops._derivatives import attention

from ..derivatives import FUNCTIONS, assert_same
from ..families import BY_OPERATOR, FAMILIES, OPERATORS
from ..tolerance import assert_as_exact_as_eager

each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=str)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)


@pytest.fixture(params=["one block", "blocks of a row"])
def blocks(request, monkeypatch):
    if request.param != "one block":
        monkeypatch.setattr(attention, "_ENTRIES_OF_BLOCK", 1)


def leaves_of(inputs, wanted=None):
    wanted = wanted or [True] * len(inputs)
    return [t.detach().clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]


def derivative(values, leaves, **options):
    """Of a scalar that depends on every value."""
    total = sum(((i + 1) * v.double()).sin().sum() for i, v in enumerate(values))
    return torch.autograd.grad(total, [t for t in leaves if t.requires_grad], **options)


def second(f, inputs, wanted=None):
    leaves = leaves_of(inputs, wanted)
    return derivative(derivative([f(*leaves)], leaves, create_graph=True), leaves)


def third(f, inputs):
    leaves = leaves_of(inputs)
    first = derivative([f(*leaves)], leaves, create_graph=True)
    return derivative(derivative(first, leaves, create_graph=True), leaves)


def dual(f, inputs, tangents):
    with forward_ad.dual_level():
        duals = [t if d is None else forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(f(*duals)).tangent


def masks(count):
    return [m for m in itertools.product([False, True], repeat=count) if any(m)]


@each_function
def test_second_and_third_derivatives(kernels, blocks, function):
    inputs = function.inputs(device=kernels.device)
    assert_same(third(function.call, inputs), third(function.definition, inputs))
    for wanted in masks(len(inputs)):
        assert_same(second(function.call, inputs, wanted), second(function.definition, inputs, wanted))


@each_function
def test_forward_mode(kernels, blocks, function):
    """For tangents of some inputs, and of the gradients: those of a backward pass inside the level."""
    inputs = function.inputs(device=kernels.device)
    tangents = [t.cos() for t in inputs]

    def gradients(f):
        return lambda *tensors: torch.cat([g.flatten() for g in torch.func.vjp(f, *tensors)[1](f(*tensors).sin())])

    for some in masks(len(inputs)):
        directions = [d if chosen else None for d, chosen in zip(tangents, some, strict=True)]
        assert_same(dual(function.call, inputs, directions), dual(function.definition, inputs, directions))
        got, expected = (dual(gradients(f), inputs, directions) for f in (function.call, function.definition))
        assert_same(got, expected)


@each_function
def test_a_tangent_of_the_output_gradient_alone(kernels, function):
    """The level begins after the forward pass: the rule of the operator runs inside of it."""
    inputs = leaves_of(function.inputs(device=kernels.device))
    results = []
    for f in (function.call, function.definition):
        output = f(*inputs)
        with forward_ad.dual_level():
            grad_output = forward_ad.make_dual(torch.ones_like(output), output.detach().cos())
            gradients = torch.autograd.grad(output, inputs, grad_output)
            results.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    assert_same(*results)


@each_function
def test_gradcheck(kernels, function):
    if not kernels.runs_large:
        pytest.skip("up to 20 seconds each, and the other tests here compare the same derivatives")
    inputs = leaves_of(function.inputs(device=kernels.device))
    torch.autograd.gradcheck(
        function.call, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    torch.autograd.gradgradcheck(
        function.call, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_family
def test_as_exact_as_eager(backend, family, dtype):
    """Second derivatives and tangents."""
    case = family.cases[4] if backend.runs_large else family.cases[0]
    inputs = family.make(case, dtype, backend.device)
    tangents = [t.cos() for t in inputs]

    def gradients(f, tensors):
        return second(lambda *t: f(*t, *case.scalars), tensors)

    def tangent(f, tensors):
        directions = [d.to(t.dtype) for d, t in zip(tangents, tensors, strict=True)]
        return [dual(lambda *t: f(*t, *case.scalars), tensors, directions)]

    doubles = [t.double() for t in inputs]
    for name, derivatives in (("second derivative", gradients), ("tangent", tangent)):
        results = derivatives(family.function, inputs), derivatives(family.eager, inputs)
        for got, eager, exact in zip(*results, derivatives(family.definition, doubles), strict=True):
            assert_as_exact_as_eager(f"{name} of {family.operator}", got, eager, exact)


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
def test_no_attention_map_is_stored(kernels, operator, monkeypatch):
    """A gradient penalty and a jvp; the largest tensors are a block of the map and the inputs."""
    monkeypatch.setattr(attention, "_ENTRIES_OF_BLOCK", 512)
    function = getattr(segattn_ops, operator)
    inputs = [torch.randn(1, c, 16, 16, device=kernels.device) for c in (1, 1, 2)]
    with _Largest() as largest:
        second(function, inputs)
        dual(function, inputs, inputs)
    assert largest.elements == 512


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_an_operator_refuses_tangents(kernels, operator, suffix):
    """Called directly, without the function that knows about tangents. Its result would have the derivative 0."""
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = family.make(case, torch.float32, kernels.device)
    packet = getattr(kernels.operators, operator)

    def call(first):
        results = packet(first, *inputs[1:], *case.scalars)
        results = results if isinstance(results, tuple) else (results,)
        if not suffix:
            return results[0]
        saved = () if operator.startswith("channel") else results[:2] if len(results) > 1 else ()
        backward = getattr(kernels.operators, operator + suffix)
        return backward(torch.ones_like(results[0]) * tangent.sum(), *inputs, *saved, *case.scalars)[0]

    tangent = torch.ones(())
    call(inputs[0])
    message = f"{operator}{suffix}: the operator has no forward-mode derivative; call the function of segattn_ops"
    with forward_ad.dual_level():
        call(inputs[0])  # nothing has a tangent
        if suffix:
            tangent, first = forward_ad.make_dual(torch.ones(()), torch.ones(())), inputs[0]
        else:
            first = forward_ad.make_dual(inputs[0], inputs[0])
        with pytest.raises(NotImplementedError, match=message):
            call(first)
    if not suffix:
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(call, (inputs[0],), (inputs[0],))
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda t: call(t).sum())(inputs[0])


@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
def test_no_second_derivative_of_a_part_of_the_keys(kernels, operator):
    """The logsumexp given may be over more keys than those of the call, and its own dependence on them is unknown."""
    query, key, value = leaves_of([torch.randn(1, 2, 3, 4, device=kernels.device) for _ in range(3)])
    with torch.no_grad():
        output, logsumexp, *_ = getattr(kernels.operators, operator)(query, key, value, 1.0)
    backward = getattr(kernels.operators, f"{operator}_backward")
    gradients = backward(torch.ones_like(output), query, key, value, output, logsumexp, 1.0)
    with pytest.raises(RuntimeError, match=rf"{operator}_backward: keys_complete must be True .* \(got False\)"):
        torch.autograd.grad(gradients[0].sum(), query)


@each_family
def test_checkpoint_and_hooks(kernels, family):
    case = family.cases[0]
    inputs = family.make(case, torch.float64, kernels.device)
    call = lambda *t: family.function(*t, *case.scalars)  # noqa: E731
    expected = second(call, inputs)
    assert_same(second(lambda *t: checkpoint(call, *t, use_reentrant=False), inputs), expected)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        leaves = leaves_of(inputs)
        first = derivative([call(*leaves)], leaves)
    assert_same(first, derivative([call(*leaves)], leaves))
    assert len(packed) >= len(inputs)


def test_padding_may_hold_anything(kernels):
    """NaN and infinity in padded keys and values have no influence on derivatives, nor have their tangents."""
    q, k, v = (torch.randn(2, 3, 4, device=kernels.device, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[False, True, False, False], [True] * 4], device=kernels.device)
    padding = mask[:, None]
    call = lambda q, k, v: segattn_ops.position_attention(q, k, v, 0.5, key_padding_mask=mask)  # noqa: E731
    clean = [q, k.masked_fill(padding, 0), v.masked_fill(padding, 0)]
    dirty = [q, k.masked_fill(padding, torch.nan), v.masked_fill(padding, torch.inf)]
    assert_same(second(call, dirty), second(call, clean))
    assert_same(dual(call, dirty, dirty), dual(call, clean, clean))


def test_compiled_transforms():
    """torch.func inside of a compiled function: derivatives are those of the reference, vmap takes the operator."""
    family = BY_OPERATOR["position_attention"]
    case = family.cases[0]
    inputs = family.make(case, torch.float64)
    call = lambda *t: family.function(*t, *case.scalars)  # noqa: E731
    functions = [
        lambda *t: torch.func.grad(lambda *s: call(*s).sin().sum())(*t),
        lambda *t: torch.func.jvp(call, t, t)[1],
        lambda *t: torch.vmap(call)(*(s[None] for s in t)),
    ]
    for function in functions:
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*inputs), function(*inputs))


def test_a_function_compiled_outside_of_forward_mode_keeps_tangents_or_refuses_them():
    """In forward mode it is compiled again. From torch 2.14 on dynamo refuses inputs with tangents."""
    family = BY_OPERATOR["position_attention"]
    case = family.cases[0]
    inputs = family.make(case, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: family.function(*t, *case.scalars), fullgraph=True, backend="eager")
    compiled(*inputs)
    try:
        got = dual(compiled, inputs, inputs)
    except torch._dynamo.exc.Unsupported as error:
        assert "tangent" in str(error)
    else:
        torch.testing.assert_close(got, dual(lambda *t: family.function(*t, *case.scalars), inputs, inputs))
