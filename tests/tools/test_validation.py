"""Errors of gradients that cancel: a softmax over one key, or over equal ones, and CCNet's scalar gamma."""

import pytest
import torch

from benchmarks import features, rivals, validate
from benchmarks.workloads import Workload

EPSILON = {"float32": 1e-7, "float64": 1e-16, "float16": 1e-3, "bfloat16": 8e-3}


def case(op: str, dtype: str, height: int = 1, width: int = 1, seed: int = 0):
    """Leaves, grad_output, the float64 reference, and eager's float64 results."""
    workload = Workload(op, height, width, dtype, 2, channels=24, key_channels=6)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 24, height, width, generator=generator).relu()
    leaves = features.operands(workload, x, seed)
    grad_output = features.grad_output(workload, seed + 1)
    return workload, leaves, grad_output, validate.expected(workload, leaves, grad_output)


def in_float64(workload, leaves, grad_output):
    inputs = [leaf.double().requires_grad_() for leaf in leaves.values()]
    output = rivals.formulation("eager", workload.op)(*inputs)
    return output.detach(), list(torch.autograd.grad(output, inputs, grad_output.double()))


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("op", ["position", "non_local", "ann", "criss_cross", "rcca"])
class TestZeroGradients:
    """At one position the gradients of query and key are zero, and a kernel's are its rounding errors."""

    def found(self, op, dtype, error):
        workload, leaves, grad_output, expected = case(op, dtype)
        output, gradients = in_float64(workload, leaves, grad_output)
        name = "query_weight" if op == "rcca" else "query"
        index = list(leaves).index(name)
        terms = expected["scales"][f"grad_{name}"]
        assert terms > 1e-3
        broken = torch.zeros_like(gradients[index])
        broken.view(-1)[0] = error * terms
        gradients[index] = broken
        return workload, validate.errors(workload, leaves, grad_output, expected, output, tuple(gradients))

    def test_rounding_passes(self, op, dtype):
        workload, found = self.found(op, dtype, EPSILON[dtype] / 4)
        validate.check(workload, "fused", found, {name: 0.0 for name in found})

    def test_larger_errors_fail(self, op, dtype):
        workload, found = self.found(op, dtype, 20 * EPSILON[dtype] + 1e-5)
        with pytest.raises(validate.WrongResult, match="grad_query.* is wrong"):
            validate.check(workload, "fused", found, {name: 0.0 for name in found})


@pytest.mark.parametrize("op", ["position", "ann", "criss_cross", "rcca"])
def test_gradients_over_many_positions_are_compared_with_themselves(op, monkeypatch):
    monkeypatch.setattr(validate, "FEW", 34)
    expected = case(op, "bfloat16", 5, 7)[-1]
    assert all(scale == 0 for name, scale in expected["scales"].items() if name != "grad_gamma")


@pytest.mark.parametrize("op", ["position", "criss_cross", "rcca"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_correct_results_over_two_positions_pass(op, dtype):
    """The gradients of query and key are differences of two terms, which cancel to some degree that chance decides."""
    for seed in range(12):
        workload, leaves, grad_output, expected = case(op, dtype, 1, 2, seed)
        inputs = [leaf.requires_grad_() for leaf in leaves.values()]
        found = {}
        for rival in ("eager", "fused"):
            output = rivals.formulation(rival, op)(*inputs)
            gradients = torch.autograd.grad(output, inputs, grad_output)
            found[rival] = validate.errors(workload, leaves, grad_output, expected, output.detach(), gradients)
        validate.check(workload, "fused", found["fused"], found["eager"])
        validate.check(workload, "fused", found["fused"], None)


def test_a_cancelling_sum_is_compared_with_its_terms():
    workload, leaves, grad_output, _ = case("rcca", "float16", 3, 4)
    # A grad_output for which gamma's gradient is nearly zero and its rounding error relatively large.
    inputs = {name: leaf.double() for name, leaf in leaves.items()}
    flat = grad_output.double().flatten()
    _, gradients = validate._eager64(workload, inputs, grad_output)
    first = float(gradients["gamma"])
    other = features.grad_output(workload, 7)
    second = float(validate._eager64(workload, inputs, other)[1]["gamma"])
    cancelling = (flat - first / second * other.double().flatten()).view(grad_output.shape)
    expected = validate.expected(workload, leaves, cancelling)
    scale = expected["scales"]["grad_gamma"]
    assert abs(float(expected["gamma"])) < 1e-6 * scale
    output, exact = in_float64(workload, leaves, cancelling)
    for share, right in ((2e-4, True), (2e-2, False)):
        gradients = [*exact[:-1], exact[-1] + share * scale]
        found = validate.errors(workload, leaves, cancelling, expected, output, tuple(gradients))
        assert found["grad_gamma"] == pytest.approx(share, rel=1e-2)
        if right:
            validate.check(workload, "fused", found, {name: 0.0 for name in found})
        else:
            with pytest.raises(validate.WrongResult, match="grad_gamma"):
                validate.check(workload, "fused", found, {name: 0.0 for name in found})


@pytest.mark.parametrize("op", ["position", "criss_cross"])
def test_delta_is_exact_for_small_attention_maps(op):
    """The reference gradient of the key must not use the output under test, which is rounded to 16 bits."""
    workload, leaves, grad_output, expected = case(op, "bfloat16", 5, 7)
    output, gradients = in_float64(workload, leaves, grad_output)
    rounded = output.bfloat16()
    found = validate.errors(workload, leaves, grad_output, expected, rounded, tuple(gradients))
    assert found["grad_key"] < 1e-12
