"""Every op on every implementation: against the exact result, forward and backward, over dtypes, shapes and strides."""

from functools import lru_cache

import pytest
import torch

from segattn_ops import _position_engine, reference

from ..families import BY_OPERATOR, DTYPES, FAMILIES, Case, Family
from ..tolerance import assert_as_exact_as_eager

CASES = [pytest.param(f, c, id=f"{f.operator}-{c}") for f in FAMILIES for c in f.cases]
FIRST_CASES = [pytest.param(f, f.cases[0], id=f.operator) for f in FAMILIES]
RECTANGULAR = {
    "position_attention": 4,
    "channel_attention": 2,
    "channel_self_attention": 3,
    "residual_channel_attention": 3,
    "criss_cross_affinity": 4,
    "criss_cross_aggregation": 4,
    "criss_cross_attention": 4,
}
MEDIUM_CASES = [pytest.param(f, f.cases[RECTANGULAR[f.operator]], id=f.operator) for f in FAMILIES]


def results(function, inputs, scalars, grad_output) -> list[torch.Tensor]:
    """The output and the gradient of every input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves, *scalars)
    gradients = torch.autograd.grad(output, leaves, grad_output.to(output.dtype).expand_as(output))
    return [output.detach(), *gradients]


def grad_output_of(family: Family, case: Case, inputs) -> torch.Tensor:
    shape = family.definition(*(t[:1].double().cpu() for t in inputs), *case.scalars).shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn((inputs[0].shape[0], *shape[1:]), generator=generator, dtype=torch.float64)


@lru_cache(maxsize=64)
def yardsticks(operator: str, index: int, dtype: torch.dtype):
    """Inputs, grad_output, and the eager and exact results of a case, shared by the implementations under test."""
    family = BY_OPERATOR[operator]
    case = family.cases[index]
    inputs = family.make(case, dtype)
    grad_output = grad_output_of(family, case, inputs).to(dtype)
    eager = results(family.eager, inputs, case.scalars, grad_output)
    exact = results(family.definition, [t.double() for t in inputs], case.scalars, grad_output)
    return inputs, grad_output, eager, exact


def names(family: Family) -> list[str]:
    return ["output", *(f"gradient {i}" for i in range(len(family.cases[0].shapes)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("family", "case"), CASES)
def test_as_exact_as_eager(backend, family, case, dtype):
    inputs, grad_output, eager, exact = yardsticks(family.operator, family.cases.index(case), dtype)
    moved = [t.to(backend.device) for t in inputs]
    got = results(family.function, moved, case.scalars, grad_output.to(backend.device))
    for name, *values in zip(names(family), got, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", BY_OPERATOR["position_attention"].cases, ids=str)
def test_position_by_mma_is_as_exact_as_eager(cuda_kernels, case, dtype):
    """mma.sync where the other tests take Hopper's kernels."""
    engine = cuda_kernels.operators._position_engine(torch.empty(1, 1, 1, dtype=dtype, device=cuda_kernels.device))
    if engine != "wgmma":
        pytest.skip(f"the other tests take {engine}")
    with _position_engine.forced_position_engine("mma", cuda_kernels.namespace):
        test_as_exact_as_eager(cuda_kernels, BY_OPERATOR["position_attention"], case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_rounds_no_sum(backend, dtype):
    """Features far larger than their attention: a sum that includes the residual would be rounded at the residual's
    size (10 times eager's error in float32). The floor is a tenth of a unit in the last place of the input."""
    family = BY_OPERATOR["residual_channel_attention"]
    case = Case(((1, 128, 9, 40), (1, 128)), -1.0)
    x, gamma = family.make(case, torch.float64, backend.device)
    inputs = [(0.05 * x).to(dtype), (0.4 * gamma).to(dtype)]
    grad_output = grad_output_of(family, case, inputs).to(backend.device, dtype)
    got = results(family.function, inputs, case.scalars, grad_output)
    eager = results(family.eager, inputs, case.scalars, grad_output)
    exact = results(family.definition, [t.double() for t in inputs], case.scalars, grad_output.double())
    for name, ours, theirs, true in zip(names(family), got, eager, exact, strict=True):
        error, eager_error = ((t.double() - true).square().mean().sqrt() for t in (ours, theirs))
        floor = 0.1 * torch.finfo(dtype).eps * true.square().mean().sqrt()
        assert error <= 2 * eager_error + floor, name


def sliced(t: torch.Tensor) -> torch.Tensor:
    """A view with gaps: every second element of a buffer twice as wide."""
    buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
    buffer[..., ::2] = t
    return buffer[..., ::2]


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def spatially_transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def offset(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, but starting one element into its storage, so that rows are not aligned."""
    return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [sliced, channels_last, spatially_transposed, offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("family", "case"), MEDIUM_CASES)
def test_any_strides(backend, family, case, layout, dtype):
    inputs = family.make(case, dtype, backend.device)
    grad_output = grad_output_of(family, case, inputs).to(backend.device, dtype)
    expected = results(family.function, inputs, case.scalars, grad_output)
    leaves = [layout(t).requires_grad_() for t in inputs]
    for plain, other in zip(inputs, leaves, strict=True):
        assert torch.equal(plain, other.detach())
    output = family.function(*leaves, *case.scalars)
    got = [output.detach(), *torch.autograd.grad(output, leaves, layout(grad_output))]
    for name, a, b in zip(names(family), got, expected, strict=True):
        few_roundings = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            a, b, rtol=few_roundings, atol=few_roundings, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_an_expanded_gradient_is_accepted(backend, family, case):
    """`output.sum().backward()` passes a gradient with strides of zero."""
    leaves = [t.requires_grad_() for t in family.make(case, torch.float32, backend.device)]
    output = family.function(*leaves, *case.scalars)
    got = torch.autograd.grad(output.sum(), leaves)
    output = family.function(*leaves, *case.scalars)
    expected = torch.autograd.grad(output, leaves, torch.ones_like(output))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("operator", ["position_attention", "channel_attention", "criss_cross_attention"])
def test_a_gradient_of_one_input_alone(backend, operator, wanted):
    family = BY_OPERATOR[operator]
    case = family.cases[0]
    inputs = family.make(case, torch.float32, backend.device)
    grad_output = grad_output_of(family, case, inputs).to(backend.device, torch.float32)
    expected = results(family.function, inputs, case.scalars, grad_output)[1 + wanted]
    inputs[wanted].requires_grad_()
    output = family.function(*inputs, *case.scalars)
    (got,) = torch.autograd.grad(output, inputs[wanted], grad_output)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["position_attention", "channel_self_attention", "criss_cross_attention"])
def test_large_logits(backend, operator, dtype):
    """Energies of thousands: nearly one-hot, no overflow, and rows whose maximum comes last or is far below zero."""
    family = BY_OPERATOR[operator]
    case = family.cases[RECTANGULAR[operator]]
    inputs = family.make(case, dtype, backend.device)
    inputs[0] = inputs[0] * 24
    grad_output = grad_output_of(family, case, inputs).to(backend.device, dtype)
    scalars = tuple(4 * s for s in case.scalars)
    got = results(family.function, inputs, scalars, grad_output)
    eager = results(family.eager, inputs, scalars, grad_output)
    exact = results(family.definition, [t.double() for t in inputs], scalars, grad_output.double())
    if operator == "channel_self_attention" and dtype in (torch.float16, torch.bfloat16):
        # Eager rounds energies of 10^4 to 16 bits and loses the softmax; compare with float32 energies.
        eager = [t.to(dtype) for t in results(family.eager, [t.float() for t in inputs], scalars, grad_output.float())]
    definition = getattr(reference, operator.replace("_self", ""))
    arguments = inputs * 3 if len(inputs) == 1 else inputs
    energy = definition(*(t.double() for t in arguments), *scalars)[1].abs().max().item()
    assert energy > 100
    # Weights that do not come from a rounded logsumexp. In float64 `exact` has the rounding errors of its own energies.
    if operator == "channel_self_attention" or (operator == "criss_cross_attention" and dtype != torch.float64):
        energy = 0
    for name, *values in zip(names(family), got, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *values, energy=energy)


def test_channel_energy_does_not_overflow_float16(backend):
    """relu(N(0, 1)) over 200 x 200 positions has an energy of about 20,000 a channel with gain 1; at gain 4 it is
    beyond 65,504, where eager float16 gives NaN."""
    x = (4 * torch.randn(1, 6, 60, 60).relu()).to(torch.float16).to(backend.device)
    family = BY_OPERATOR["channel_self_attention"]
    grad_output = torch.randn(x.shape).to(torch.float16).to(backend.device)
    energy = x.double().flatten(2) @ x.double().flatten(2).mT
    assert energy.max() > 20_000
    got = results(family.function, [x], (-4.0,), grad_output)
    exact = results(family.definition, [x.double()], (-4.0,), grad_output.double())
    for a, b in zip(got, exact, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "operator", ["position_attention", "channel_attention", "channel_self_attention", "criss_cross_attention"]
)
def test_logsumexp(kernels, operator, dtype):
    family = BY_OPERATOR[operator]
    case = family.cases[RECTANGULAR[operator]]
    inputs = family.make(case, dtype)
    definition = getattr(reference, operator.replace("_self", ""))
    arguments = inputs * 3 if len(inputs) == 1 else inputs
    expected = definition(*(t.double() for t in arguments), *case.scalars)[1]
    got = getattr(kernels.operators, operator)(*(t.to(kernels.device) for t in inputs), *case.scalars)[1]
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    precise = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got.double().cpu(), expected, rtol=precise, atol=precise)


@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_empty_batch(backend, family, case):
    empty = [t[:0].requires_grad_() for t in family.make(case, torch.float32, backend.device)]
    output = family.function(*empty, *case.scalars)
    assert output.shape[0] == 0
    for leaf, gradient in zip(empty, torch.autograd.grad(output.sum(), empty), strict=True):
        assert gradient.shape == leaf.shape


def test_no_queries(backend):
    query = torch.randn(2, 4, 0, 3, device=backend.device, requires_grad=True)
    key, value = (torch.randn(2, c, 5, device=backend.device, requires_grad=True) for c in (4, 6))
    output = BY_OPERATOR["position_attention"].function(query, key, value, 1.0)
    assert output.shape == (2, 6, 0, 3)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert gradients[0].shape == query.shape
    assert not gradients[1].any()
    assert not gradients[2].any()


@pytest.mark.parametrize(("family", "case"), MEDIUM_CASES)
def test_runs_are_bitwise_equal(kernels, family, case):
    inputs = family.make(case, torch.float32, kernels.device)
    grad_output = grad_output_of(family, case, inputs).to(kernels.device, torch.float32)
    first, second = (results(family.function, inputs, case.scalars, grad_output) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


GRADCHECK_SHAPES = {
    "position_attention": Case(((2, 3, 2, 3), (2, 3, 5), (2, 2, 5)), 0.7),
    "channel_attention": Case(((2, 3, 2, 2), (2, 4, 2, 2), (2, 4, 3)), -0.4),
    "channel_self_attention": Case(((2, 3, 2, 3),), -0.4),
    "residual_channel_attention": Case(((2, 3, 2, 3), (2, 3)), -0.4),
    "criss_cross_affinity": Case(((1, 2, 3, 4), (1, 2, 3, 4))),
    "criss_cross_aggregation": Case(((1, 6, 3, 4), (1, 2, 3, 4))),
    "criss_cross_attention": Case(((1, 2, 3, 4), (1, 2, 3, 4), (1, 3, 3, 4)), 0.7),
}


@pytest.mark.parametrize("operator", GRADCHECK_SHAPES)
def test_gradcheck(backend, operator):
    family, case = BY_OPERATOR[operator], GRADCHECK_SHAPES[operator]
    inputs = [t.requires_grad_() for t in family.make(case, torch.float64, backend.device)]
    torch.autograd.gradcheck(lambda *leaves: family.function(*leaves, *case.scalars), inputs)
