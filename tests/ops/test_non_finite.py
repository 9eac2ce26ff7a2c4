"""NaN, infinities and overflow: results are not finite exactly where those of the eager formula in the dtype of
accumulation are not.

Whether such an element is NaN or an infinity depends on the order of the sums (inf - inf), so gradients are compared by
position alone, and outputs by kind too where a product cannot mix signs.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import segattn_ops
from segattn_ops.ops._check import accumulation_dtype

from ..families import BY_OPERATOR, DTYPES, FAMILIES, Case, Family, eager_affinity
from .test_ops import results

POISONS = (math.nan, math.inf, -math.inf)
ATTENTIONS = ("position_attention", "channel_attention", "criss_cross_attention")

# For the emulator: odd sizes, one tile. The other backends run them too.
SMALL = {
    "position_attention": Case(((1, 4, 3, 7), (1, 4, 3, 5), (1, 5, 3, 5)), 0.5),
    "channel_attention": Case(((1, 5, 3, 4), (1, 7, 3, 4), (1, 7, 3, 4)), -0.3),
    "channel_self_attention": Case(((1, 6, 3, 4),), -0.3),
    "residual_channel_attention": Case(((1, 6, 3, 4), (1, 6)), -0.3),
    "criss_cross_affinity": Case(((1, 3, 4, 5), (1, 3, 4, 5))),
    "criss_cross_aggregation": Case(((1, 8, 4, 5), (1, 3, 4, 5))),
    "criss_cross_attention": Case(((1, 3, 4, 5), (1, 3, 4, 5), (1, 4, 4, 5)), 0.5),
}
# Several tiles of queries, keys and channels.
TILES = {
    "position_attention": Case(((1, 20, 35, 7), (1, 20, 19, 17), (1, 40, 19, 17)), 0.5),
    "channel_attention": Case(((1, 37, 9, 4), (1, 70, 9, 4), (1, 70, 3, 14)), -0.3),
    "channel_self_attention": Case(((1, 70, 9, 4),), -0.3),
    "residual_channel_attention": Case(((1, 70, 9, 4), (1, 70)), -0.3),
    "criss_cross_affinity": Case(((1, 9, 20, 35), (1, 9, 20, 35))),
    "criss_cross_aggregation": Case(((1, 54, 20, 35), (1, 9, 20, 35))),
    "criss_cross_attention": Case(((1, 9, 20, 35), (1, 9, 20, 35), (1, 12, 20, 35)), 0.5),
}


def case_for(backend, operator: str) -> Case:
    return TILES[operator] if backend.runs_large else SMALL[operator]


def kinds(t: Tensor) -> Tensor:
    """0 for finite, 1 for inf, 2 for -inf, 3 for NaN."""
    return torch.where(t.isnan(), 3, torch.where(t.isinf(), torch.where(t > 0, 1, 2), 0)).cpu()


def uses_3xtf32(backend, dtype: torch.dtype) -> bool:
    """It splits a number into two, and inf into inf and inf - inf = NaN: a product with an infinity is NaN."""
    return backend.name in ("emulated", "cuda") and dtype == torch.float32


@dataclass(frozen=True)
class Problem:
    family: Family
    scalars: tuple[float, ...]
    inputs: list[Tensor]
    grad_output: Tensor

    @staticmethod
    def make(family: Family, case: Case, dtype: torch.dtype) -> "Problem":
        inputs = family.make(case, dtype)
        shape = family.eager(*inputs, *case.scalars).shape
        generator = torch.Generator().manual_seed(1)
        return Problem(family, case.scalars, inputs, torch.randn(shape, generator=generator).to(dtype))

    def tensors(self) -> list[Tensor]:
        """Copies of the inputs and grad_output."""
        return [t.clone() for t in (*self.inputs, self.grad_output)]

    def assert_as_eager(self, backend, tensors: list[Tensor], what: str, *, kinds_of_output: bool) -> None:
        *inputs, grad_output = tensors
        moved = [t.to(backend.device) for t in inputs]
        got = results(self.family.function, moved, self.scalars, grad_output.to(backend.device))
        wide = [t.to(accumulation_dtype(t.dtype)) for t in tensors]
        expected = results(self.family.eager, wide[:-1], self.scalars, wide[-1])
        for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            name = f"{what}: {'output' if i == 0 else f'gradient {i - 1}'}"
            theirs = theirs.to(ours.dtype)
            assert torch.equal(ours.isfinite().cpu(), theirs.isfinite()), f"{name}: other positions are not finite"
            if i == 0 and kinds_of_output:
                assert torch.equal(kinds(ours), kinds(theirs)), f"{name}: NaN for an infinity, or the reverse"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_one_element(backend, family, dtype, record_property):
    """NaN, inf or -inf in one element of an input or of grad_output: the first, one in the middle, the last."""
    problem = Problem.make(family, case_for(backend, family.operator), dtype)
    count = 0
    for which in range(len(problem.inputs) + 1):
        for poison in POISONS:
            if math.isinf(poison) and which == 1 and family.operator in ATTENTIONS and uses_3xtf32(backend, dtype):
                continue  # test_an_infinite_key_in_3xtf32
            for position in (0, 0.5, 1) if backend.runs_large else (0, 1):
                tensors = problem.tensors()
                flat = tensors[which].view(-1)
                flat[int(position * (flat.numel() - 1))] = poison
                # An infinite gamma multiplies the weights, so that the sum has terms of both signs.
                of_gamma = family.operator == "residual_channel_attention" and which == 1
                same_kinds = not of_gamma and not uses_3xtf32(backend, dtype)
                what = f"{poison} in tensor {which} at {position}"
                problem.assert_as_eager(backend, tensors, what, kinds_of_output=same_kinds)
                count += 1
    record_property("inputs tried", count)


@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
def test_an_infinite_key_in_3xtf32(cuda_kernels, operator, record_property):
    """Eager gives a key with an energy of -inf the weight 0; here the query's energies, which include inf - inf, are
    NaN. They are NaN at least where eager's are (docs/decisions.md)."""
    family = BY_OPERATOR[operator]
    problem = Problem.make(family, SMALL[operator], torch.float32)
    for poison in (math.inf, -math.inf):
        *inputs, grad_output = problem.tensors()
        inputs[1].view(-1)[0] = poison
        moved = [t.to(cuda_kernels.device) for t in inputs]
        got = results(family.function, moved, problem.scalars, grad_output.to(cuda_kernels.device))
        expected = results(family.eager, inputs, problem.scalars, grad_output)
        for ours, theirs in zip(got, expected, strict=True):
            assert not (ours.isfinite().cpu() & ~theirs.isfinite()).any()
        assert (~got[0].isfinite().cpu() & expected[0].isfinite()).any()  # otherwise this is fixed: say so
    record_property("inputs tried", 2)


def with_keys(operator: str, tensors: list[Tensor], rows: slice, value: float) -> None:
    """Sets keys, all of whose elements become `value`, and makes queries positive: energies of that sign."""
    tensors[0].abs_().add_(0.25)
    key = tensors[1].flatten(2)  # a view
    if operator == "channel_attention":
        key[:, rows] = value
    else:
        key[:, :, rows] = value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ATTENTIONS)
def test_infinite_energies(backend, operator, dtype, record_property):
    """Of one key, of the last ones, of every second, of all. A row with inf is NaN, a key of -inf has the weight 0, and
    a row of -inf alone is NaN."""
    if uses_3xtf32(backend, dtype):
        pytest.skip("products with an infinity are NaN in 3xTF32: test_an_infinite_key_in_3xtf32")
    family = BY_OPERATOR[operator]
    problem = Problem.make(family, case_for(backend, operator), dtype)
    # +-max: finite keys, whose energies overflow. In 16 bits the gradients would overflow in other places, too.
    largest = [torch.finfo(dtype).max, -torch.finfo(dtype).max] if dtype.itemsize > 2 else []
    count = 0
    for value in (math.inf, -math.inf, *largest):
        for rows in (slice(0, 1), slice(-2, None), slice(0, None, 2), slice(None)):
            tensors = problem.tensors()
            with_keys(operator, tensors, rows, value)
            if abs(value) < math.inf:
                tensors[0].add_(4)
            problem.assert_as_eager(backend, tensors, f"keys of {value} at {rows}", kinds_of_output=True)
            count += 1
    record_property("inputs tried", count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
def test_a_scale_that_overflows_finite_products(backend, operator, dtype):
    """Energies of inf and of -inf alone: NaN, as in eager, although the products are finite."""
    if backend.name in ("emulated", "cuda"):
        pytest.skip("see test_large_finite_energies_on_cuda")
    family = BY_OPERATOR[operator]
    problem = Problem.make(family, SMALL[operator], dtype)
    largest = torch.finfo(dtype).max
    for sign in (1, -1):
        query, key, value, _ = problem.tensors()
        with_keys(operator, [query, key], slice(None), sign * largest / 1e3)
        query.clamp_(max=2)
        output, logsumexp = family.function(query, key, value, 1e4, return_logsumexp=True)
        eager = family.eager(query, key, value, 1e4)
        assert eager.isnan().all() and output.isnan().all()
        assert not logsumexp.isfinite().any()


def huge_problem(operator: str, energy: float, scale: float, dtype: torch.dtype) -> list[Tensor]:
    tensors = BY_OPERATOR[operator].make(Case(SMALL[operator].shapes, scale), torch.float64)
    return [*((t * energy**0.5).to(dtype) for t in tensors[:2]), tensors[2].to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ATTENTIONS)
def test_large_finite_energies(backend, operator, dtype, record_property):
    """A softmax that is 1 for one key, at energies up to the dtype's range: finite, and the output is exact."""
    family = BY_OPERATOR[operator]
    of_cuda = backend.name in ("emulated", "cuda")
    largest = 1e8 if dtype == torch.float16 else 1e30
    largest = min(largest, 1e7) if of_cuda and operator != "channel_attention" else largest
    count = 0
    for energy in (1e4, 1e6, 1e7, 1e8, 1e9, 4e9, 1e16, 1e30):
        for scale in (1.0, 0.3, -0.7):
            if energy > largest:
                continue
            *inputs, value = huge_problem(operator, energy, scale, dtype)
            inputs = [*inputs, value]
            grad_output = torch.randn(family.eager(*inputs, scale).shape).to(dtype)
            moved = [t.to(backend.device) for t in inputs]
            got = results(family.function, moved, (scale,), grad_output.to(backend.device))
            wide = [t.to(accumulation_dtype(dtype)) for t in inputs]
            expected = results(family.eager, wide, (scale,), grad_output.to(wide[0].dtype))
            for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
                finite = ours.isfinite().cpu() | ~theirs.to(dtype).isfinite()
                assert finite.all(), f"result {i} at energies of {energy}, scale {scale}: not finite"
            # Two keys of nearly the same energy: their weights depend on the rounding of the energies.
            decided = (got[0].cpu().double() - expected[0].double()).abs() <= 0.02 * value.abs().max().double()
            assert decided.float().mean() > 0.9
            count += 1
    record_property("inputs tried", count)


def test_large_finite_energies_on_cuda(cuda_kernels):
    """The kernels round an energy and its maximum differently, by more than exp takes from about 4e8 on
    (docs/decisions.md). The emulated behaviour, so that a change of it is seen: NaN, no finite wrong results."""
    *inputs, value = huge_problem("position_attention", 1e12, 0.3, torch.float32)
    output = segattn_ops.position_attention(*(t.to(cuda_kernels.device) for t in (*inputs, value)), 0.3).cpu()
    expected = BY_OPERATOR["position_attention"].eager(*inputs, value, 0.3)
    assert not output.isfinite().all()
    finite = output.isfinite()
    torch.testing.assert_close(output[finite], expected[finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_at_large_energies(backend, dtype):
    """Weights are recomputed from a rounded float32 logsumexp: exact to 16 bits up to energies of 10^5. Beyond, they
    have an error, but are at most 1 on the CPU."""
    family = BY_OPERATOR["position_attention"]
    for energy, allowed in ((1e4, 4e-3), (1e5, 2e-2), (1e6, 0.2)):
        inputs = huge_problem("position_attention", energy, 0.3, dtype)
        grad_output = torch.randn(1, 5, 3, 7).to(dtype)
        moved = [t.to(backend.device) for t in inputs]
        got = results(family.function, moved, (0.3,), grad_output.to(backend.device))[3]
        wide = [t.double() for t in inputs]
        exact = results(family.eager, wide, (0.3,), grad_output.double())[3]
        assert (got.cpu().double() - exact).norm() <= allowed * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
def test_logsumexp_of_infinite_energies(backend, operator, dtype):
    """-inf where all energies are, NaN in criss-cross attention on CUDA. With an energy of inf eager's and the
    reference's logsumexp is inf. The kernels' is NaN: the backward pass recomputes the weights from it, which are NaN
    then (docs/decisions.md)."""
    family = BY_OPERATOR[operator]
    if uses_3xtf32(backend, dtype):
        pytest.skip("products with an infinity are NaN in 3xTF32")
    for value in (math.inf, -math.inf):
        problem = Problem.make(family, SMALL[operator], dtype)
        tensors = problem.tensors()
        with_keys(operator, tensors, slice(None), value)
        moved = [t.to(backend.device) for t in tensors[:3]]
        logsumexp = family.function(*moved, 0.5, return_logsumexp=True)[1]
        if value < 0 and not (operator == "criss_cross_attention" and backend.name in ("emulated", "cuda")):
            assert (logsumexp == -math.inf).all()
        elif backend.name == "reference":
            assert (logsumexp == math.inf).all()
        else:
            assert logsumexp.isnan().all()


def eager_logsumexp(operator: str, query: Tensor, key: Tensor, scale: float) -> Tensor:
    if operator == "criss_cross_attention":
        return (scale * eager_affinity(query, key)).logsumexp(1)
    return (scale * query.flatten(2).mT @ key.flatten(2)).logsumexp(2).unflatten(1, query.shape[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
def test_values_have_no_part_in_the_gradient_of_the_logsumexp(backend, operator, dtype):
    """They may be NaN or inf, and so may the output."""
    family = BY_OPERATOR[operator]
    problem = Problem.make(family, SMALL[operator], dtype)
    query, key, value, _ = (t.to(backend.device) for t in problem.tensors())

    def gradients(value: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        logsumexp = family.function(*leaves, 0.5, return_logsumexp=True)[1]
        return list(torch.autograd.grad(logsumexp.sum(), leaves, allow_unused=True))

    clean = gradients(value)
    value[0, 0, 0], value[0, 1, 1], value[0, 2, 2] = POISONS
    poisoned = gradients(value)
    leaves = [t.cpu().double().requires_grad_() for t in (query, key)]
    exact = torch.autograd.grad(eager_logsumexp(operator, *leaves, 0.5).sum(), leaves)
    for got, same, expected in zip(poisoned[:2], clean[:2], exact, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    assert poisoned[2] is None or not poisoned[2].any()


@pytest.mark.parametrize("poison", POISONS)
def test_samples_do_not_mix(backend, poison):
    """What is not finite stays in its sample, in every op, forward and backward."""
    for family in FAMILIES:
        case = SMALL[family.operator]
        three = Case(tuple((3, *shape[1:]) for shape in case.shapes), case.scale)
        problem = Problem.make(family, three, torch.float32)
        *inputs, grad_output = (t.to(backend.device) for t in problem.tensors())
        clean = results(family.function, inputs, case.scalars, grad_output)
        for t in inputs:
            t[1] = poison
        for got, expected in zip(results(family.function, inputs, case.scalars, grad_output), clean, strict=True):
            assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
            assert not got[1].isfinite().all()
