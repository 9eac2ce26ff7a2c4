"""Forward-mode derivatives: those of the reference through the public functions, an error from the operators."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad

import segattn_ops
from segattn_ops import _backend

from ..families import BY_OPERATOR, FAMILIES, OPERATORS

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)


def call_and_inputs(family, device="cpu"):
    """The function of the tensors alone, in float64, and tensors."""
    case = family.cases[0]
    return lambda *tensors: family.function(*tensors, *case.scalars), family.make(case, torch.float64, device)


def expected_tangent(family, inputs, tangents):
    """By reverse mode twice, of the definition: the derivative of the vector-Jacobian product."""
    case = family.cases[0]
    leaves = [t.cpu().requires_grad_() for t in inputs]
    output = family.definition(*leaves, *case.scalars)
    probe = torch.zeros_like(output, requires_grad=True)
    products = torch.autograd.grad(output, leaves, probe, create_graph=True)
    return torch.autograd.grad(products, probe, [t.cpu() for t in tangents])[0].to(inputs[0].device)


def dual_tangent(function, inputs, tangents):
    with forward_ad.dual_level():
        duals = [t if d is None else forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


@each_family
@pytest.mark.filterwarnings("ignore:segattn_ops. the plain PyTorch reference serves")
def test_tangents(backend, family):
    function, inputs = call_and_inputs(family, backend.device)
    tangents = [torch.randn_like(t) for t in inputs]
    expected = expected_tangent(family, inputs, tangents)
    torch.testing.assert_close(torch.func.jvp(function, tuple(inputs), tuple(tangents))[1], expected)
    torch.testing.assert_close(dual_tangent(function, inputs, tangents), expected)
    # of the last input alone
    alone = [torch.zeros_like(t) for t in tangents[:-1]] + tangents[-1:]
    only_last = [None] * len(alone[:-1]) + tangents[-1:]
    torch.testing.assert_close(
        dual_tangent(function, inputs, only_last), expected_tangent(family, inputs, alone), check_device=False
    )


@pytest.mark.filterwarnings("ignore:segattn_ops. the plain PyTorch reference serves")
def test_transforms_around_a_jvp(kernels):
    """vmap inside and outside, a jvp of an outer level, and forward over reverse."""
    function, inputs = call_and_inputs(BY_OPERATOR["position_attention"], kernels.device)
    q, others = inputs[0], inputs[1:]
    attend = lambda t: function(t, *others)  # noqa: E731
    with segattn_ops.use_backend("reference"):
        jacobian = torch.autograd.functional.jacobian(attend, q)
        hessian = torch.func.hessian(lambda t: attend(t).square().sum())(q)
        tangent = torch.func.jvp(attend, (q,), (q,))[1]
    torch.testing.assert_close(torch.func.jacfwd(attend)(q), jacobian)
    forward = torch.autograd.functional.jacobian(attend, q, strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(forward, jacobian)
    torch.testing.assert_close(torch.func.hessian(lambda t: attend(t).square().sum())(q), hessian)
    mapped = torch.vmap(lambda t: function(t[None], *(o[:1] for o in others))[0])
    with segattn_ops.use_backend("reference"):
        expected = torch.func.jvp(mapped, (q,), (q,))[1]
    torch.testing.assert_close(torch.func.jvp(mapped, (q,), (q,))[1], expected)
    one = torch.ones((), dtype=q.dtype, device=q.device)
    inner = lambda t: torch.func.jvp(lambda s: s * attend(t), (one,), (one,))[1]  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(inner, (q,), (q,))[1], tangent)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_an_operator_refuses_tangents(kernels, operator, suffix):
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
    message = f"{operator}{suffix}: the fused kernels have no forward-mode derivative; call the function of segattn_ops"
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


def test_one_warning_and_only_for_tangents(monkeypatch):
    monkeypatch.setattr(_backend, "_warned", set())
    function, inputs = call_and_inputs(BY_OPERATOR["channel_attention"])
    expected = function(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with forward_ad.dual_level():
            assert torch.equal(function(*inputs), expected)
    with pytest.warns(RuntimeWarning, match="reference serves channel_attention in forward mode") as caught:
        for _ in range(2):
            torch.func.jvp(function, tuple(inputs), tuple(inputs))
    assert len(caught) == 1


def test_a_compiled_jvp():
    function, inputs = call_and_inputs(BY_OPERATOR["position_attention"])
    tangents = tuple(torch.randn_like(t) for t in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: torch.func.jvp(function, t, tangents)[1], fullgraph=True, backend="aot_eager")
    expected = expected_tangent(BY_OPERATOR["position_attention"], inputs, tangents)
    torch.testing.assert_close(compiled(*inputs), expected)
    # Dynamo has no guard for the level: the graph made outside of forward mode is used inside of it.
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    compiled(*inputs)
    with pytest.raises(NotImplementedError, match="position_attention: the fused kernels have no forward-mode"):
        dual_tangent(compiled, inputs, tangents)


def test_torch_func_grad_is_an_error_on_the_kernels(kernels):
    """The operators have no rule for torch.func.grad; the reference has."""
    function, inputs = call_and_inputs(BY_OPERATOR["criss_cross_attention"], kernels.device)
    total = lambda t: function(t, *inputs[1:]).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(total)(inputs[0])
    leaf = inputs[0].clone().requires_grad_()
    with segattn_ops.use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(total)(inputs[0]), torch.autograd.grad(total(leaf), leaf)[0])
