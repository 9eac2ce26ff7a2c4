"""The ends of the range of sizes and numbers: large energies, denormals, single positions and channels, many samples,
channels and positions. tests/ops/test_non_finite.py has infinities and NaN, tests/reliability the sizes that take
minutes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from ..emulator import build
from ..families import BY_OPERATOR, DTYPES, FAMILIES, Case, Family
from ..tolerance import assert_as_exact_as_eager
from .test_ops import grad_output_of, names, results

SOFTMAX = ("position_attention", "channel_attention", "channel_self_attention", "criss_cross_attention")


def terms_of_gradients(case: Case, inputs: list[Tensor], grad_output: Tensor) -> list[float]:
    """The size of the terms of which the gradients of query and key are sums, |scale dP| times the other operand. They
    may cancel to 0, as with one key or with keys that are alike."""
    if len(inputs) < 3:
        return [0.0] * len(inputs)
    query, key, value, gradient = (t.double().abs().max().item() for t in (*inputs, grad_output))
    contracted = max(inputs[2].shape[1], inputs[2][0, 0].numel())  # channels, in channel attention positions
    weight_gradient = abs(case.scale) * gradient * value * contracted**0.5
    return [weight_gradient * key, weight_gradient * query, 0.0]


def compare(backend, family: Family, case: Case, inputs: list[Tensor], energy: float = 12) -> None:
    """With the exact results, by the rule of tests/tolerance.py; a gradient that cancels has the rounding error of its
    terms."""
    dtype = inputs[0].dtype
    grad_output = grad_output_of(family, case, inputs).to(dtype)
    moved = [t.to(backend.device) for t in inputs]
    got = results(family.function, moved, case.scalars, grad_output.to(backend.device))
    eager = results(family.eager, inputs, case.scalars, grad_output)
    exact = results(family.definition, [t.double() for t in inputs], case.scalars, grad_output.double())
    terms = [0.0, *terms_of_gradients(case, inputs, grad_output)]
    for name, ours, theirs, true, term in zip(names(family), got, eager, exact, terms, strict=True):
        rounding = torch.finfo(dtype).eps * term
        cancels = true.abs().max() <= rounding
        if cancels or (dtype == torch.float64 and term > 0):  # eager's error in float64 counts as 0
            allowed = rounding + 64 * torch.finfo(dtype).eps * energy * true.abs().max()
            assert (ours.double().cpu() - true).abs().max() <= allowed, f"{family.operator} {case}: {name}"
        else:
            assert_as_exact_as_eager(f"{family.operator} {case}: {name}", ours, theirs, true, energy=energy)


@pytest.mark.parametrize("energy", [100.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", SOFTMAX)
def test_logits_to_ten_thousand(backend, operator, dtype, energy, record_property):
    """Of whole numbers, whose energies every implementation computes without an error. Two keys of each query have the
    same energy, the others' weights vanish or are exp of small differences."""
    family = BY_OPERATOR[operator]
    shapes = {
        "position_attention": ((2, 4, 5, 7), (2, 4, 12), (2, 9, 12)),
        "channel_attention": ((2, 9, 4), (2, 12, 4), (2, 12, 7)),
        "channel_self_attention": ((2, 12, 4),),
        "criss_cross_attention": ((2, 4, 5, 8), (2, 4, 5, 8), (2, 9, 5, 8)),
    }[operator]
    generator = torch.Generator().manual_seed(0)
    # Four products of up to size^2 each; bfloat16 has 8 bits, so numbers up to 128 are exact.
    size = min(int((energy / 4) ** 0.5), 128)
    count = 0
    for scale in (energy / (4 * size**2), -energy / (4 * size**2)):
        whole = [torch.randint(-size, size + 1, shape, generator=generator).double() for shape in shapes]
        if operator == "position_attention":
            whole[1][..., 1::2] = whole[1][..., ::2]
        if operator == "channel_attention":
            whole[1][:, 1::2] = whole[1][:, ::2]
        if operator == "criss_cross_attention":
            whole[1][..., 1::2] = whole[1][..., ::2]
        if operator == "channel_self_attention":
            whole[0][:, 1::2] = whole[0][:, ::2]
        if len(whole) == 3:
            whole[2] = torch.randn(shapes[2], generator=generator, dtype=torch.float64)
        inputs = [t.to(dtype) for t in whole]
        # Energies are rounded by the float32 product with scale, and weights recomputed from a rounded logsumexp.
        compare(backend, family, Case(shapes, scale), inputs, energy=4 * energy)
        count += 1
    record_property("inputs tried", count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_denormals(backend, family, dtype, record_property):
    """Inputs that are denormal in the dtype, one at a time, flushed to 0 or not: as exact as eager up to a few of the
    smallest normal number. Nothing becomes NaN, and what does not depend on the input keeps its bits."""
    case = family.cases[0]
    tiny = torch.finfo(dtype).tiny
    inputs = family.make(case, dtype)
    grad_output = grad_output_of(family, case, inputs).to(dtype)
    for which in range(len(inputs)):
        changed = [t.clone() for t in inputs]
        changed[which] = (changed[which].double() * tiny / 8).to(dtype)
        assert (changed[which].abs() < tiny).all() and changed[which].any()
        moved = [t.to(backend.device) for t in changed]
        got = results(family.function, moved, case.scalars, grad_output.to(backend.device))
        exact = results(family.definition, [t.double() for t in changed], case.scalars, grad_output.double())
        eager = results(family.eager, changed, case.scalars, grad_output)
        for name, ours, theirs, true in zip(names(family), got, eager, exact, strict=True):
            assert ours.isfinite().all(), name
            error, eager_error = ((t.double().cpu() - true).abs().max() for t in (ours, theirs))
            floor = 64 * torch.finfo(dtype).eps * true.abs().max() + 64 * tiny
            assert error <= 2 * eager_error + floor, f"{name}: {error:.1e}, eager's {eager_error:.1e}"
    record_property("inputs tried", len(inputs))


# One of everything, and one of each dimension alone.
ONES = {
    "position_attention": [
        Case(((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), 0.7),
        Case(((2, 3, 1, 1), (2, 3, 9, 5), (2, 4, 9, 5)), 0.7),  # one query
        Case(((2, 3, 9, 5), (2, 3, 1, 1), (2, 4, 1, 1)), 0.7),  # one key
        Case(((2, 1, 6, 5), (2, 1, 6, 5), (2, 1, 6, 5)), 0.7),  # one channel
        Case(((2, 3, 1, 17), (2, 3, 17, 1), (2, 4, 17, 1)), 0.7),
        Case(((2, 3, 1), (2, 3, 1), (2, 40, 1)), 0.7),
    ],
    "channel_attention": [
        Case(((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), -0.7),
        Case(((2, 5, 1, 1), (2, 7, 1, 1), (2, 7, 1, 1)), -0.7),
        Case(((2, 1, 6, 5), (2, 7, 6, 5), (2, 7, 3)), -0.7),
        Case(((2, 7, 6, 5), (2, 1, 6, 5), (2, 1, 3)), -0.7),
    ],
    "channel_self_attention": [Case(((1, 1, 1, 1),), -0.7), Case(((2, 7, 1, 1),), -0.7), Case(((2, 1, 6, 5),), -0.7)],
    "residual_channel_attention": [
        Case(((1, 1, 1, 1), (1, 1)), -0.7),
        Case(((2, 7, 1, 1), (2, 7)), -0.7),
        Case(((2, 1, 6, 5), (2, 1)), -0.7),
    ],
    "criss_cross_affinity": [
        Case(((1, 1, 1, 1), (1, 1, 1, 1))),
        Case(((2, 3, 1, 17), (2, 3, 1, 17))),
        Case(((2, 3, 17, 1), (2, 3, 17, 1))),
        Case(((2, 1, 4, 5), (2, 1, 4, 5))),
        Case(((2, 1, 2, 1), (2, 1, 2, 1))),
    ],
    "criss_cross_aggregation": [
        Case(((1, 1, 1, 1), (1, 1, 1, 1))),
        Case(((2, 17, 1, 17), (2, 3, 1, 17))),
        Case(((2, 17, 17, 1), (2, 3, 17, 1))),
        Case(((2, 8, 4, 5), (2, 1, 4, 5))),
        Case(((2, 2, 1, 2), (2, 1, 1, 2))),
    ],
    "criss_cross_attention": [
        Case(((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), 0.7),
        Case(((2, 3, 1, 17), (2, 3, 1, 17), (2, 5, 1, 17)), 0.7),
        Case(((2, 3, 17, 1), (2, 3, 17, 1), (2, 5, 17, 1)), 0.7),
        Case(((2, 1, 4, 5), (2, 1, 4, 5), (2, 1, 4, 5)), 0.7),
        Case(((2, 1, 2, 1), (2, 1, 2, 1), (2, 1, 2, 1)), 0.7),
    ],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_one_of_a_dimension(backend, family, dtype, record_property):
    for case in ONES[family.operator]:
        compare(backend, family, case, family.make(case, dtype))
    record_property("inputs tried", len(ONES[family.operator]))


MANY = {
    "position_attention": Case(((1, 2, 2), (1, 2, 3), (1, 2, 3)), 0.7),
    "channel_attention": Case(((1, 2, 2), (1, 3, 2), (1, 3, 1)), -0.7),
    "channel_self_attention": Case(((1, 2, 2),), -0.7),
    "residual_channel_attention": Case(((1, 2, 2), (1, 2)), -0.7),
    "criss_cross_affinity": Case(((1, 1, 2, 2), (1, 1, 2, 2))),
    "criss_cross_aggregation": Case(((1, 3, 2, 2), (1, 1, 2, 2))),
    "criss_cross_attention": Case(((1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 2)), 0.7),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_70000_samples(backend, family):
    """More samples than the y and z dimensions of a grid allow; tests/cuda/test_host.py has the emulator's."""
    if not backend.runs_large:
        pytest.skip("tests/cuda/test_host.py::test_batches_beyond_65535")
    one = MANY[family.operator]
    case = Case(tuple((70_000, *shape[1:]) for shape in one.shapes), one.scale)
    compare(backend, family, case, family.make(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_4096_channels(backend, family, dtype):
    """On the emulator 600, since the kernels' largest tile of channels has 256."""
    channels = 4096 if backend.runs_large else 600
    if backend.name == "reference" and "channel" in family.operator:
        pytest.skip("the definition itself: 2 s")
    shapes = {
        "position_attention": ((1, 16, 4), (1, 16, 3), (1, channels, 3)),
        "channel_attention": ((1, 8, 6), (1, channels, 6), (1, channels, 2)),
        "channel_self_attention": ((1, channels, 2),),
        "residual_channel_attention": ((1, channels, 2), (1, channels)),
        "criss_cross_affinity": ((1, channels, 2, 3),) * 2,
        "criss_cross_aggregation": ((1, 4, 2, 3), (1, channels, 2, 3)),
        "criss_cross_attention": ((1, 16, 2, 3), (1, 16, 2, 3), (1, channels, 2, 3)),
    }[family.operator]
    scalars = {"criss_cross_affinity": None, "criss_cross_aggregation": None}.get(family.operator, 0.2)
    case = Case(shapes, scalars)
    compare(backend, family, case, family.make(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4096_key_channels(backend, dtype):
    """On the emulator 1000: too many for the shared memory of any device, so the SIMT kernels."""
    channels = 4096 if backend.runs_large else 1000
    for operator, shapes in (
        ("position_attention", ((1, channels, 4), (1, channels, 3), (1, 2, 3))),
        ("criss_cross_attention", ((1, channels, 2, 3), (1, channels, 2, 3), (1, 2, 2, 3))),
    ):
        family = BY_OPERATOR[operator]
        case = Case(shapes, channels**-0.5)
        compare(backend, family, case, family.make(case, dtype))


def test_the_memory_of_262144_positions():
    """A process of its own measures the memory of 512 x 512 positions, here as keys of few queries: the operands are
    packed once, nothing is of the size queries x keys. The whole takes minutes (tests/reliability/long_extremes.py)."""
    program = """
        import resource
        import torch
        import segattn_ops

        torch.set_num_threads(1)
        q, k, v = torch.randn(1, 8, 64), torch.randn(1, 8, 512, 512), torch.randn(1, 16, 512, 512)
        segattn_ops.position_attention(q, k[..., :16], v[..., :16])  # what is allocated once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output = segattn_ops.position_attention(q, k, v)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *output[0, :3, 5].tolist())
        weights = (q[0, :, 5] @ k.flatten(2)[0]).softmax(0)
        torch.testing.assert_close(output[0, :, 5], v.flatten(2)[0] @ weights)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kilobytes = int(done.stdout.split()[0])
    operands = (8 + 16) * 512 * 512 * 4 // 1024  # 24 MiB, which are packed
    assert kilobytes <= 1.5 * operands, f"{kilobytes} KiB"  # the attention map of the 64 queries has 64 MiB
