"""The backward operators compute the gradients that are asked for; the others are empty."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segattn_ops.ops import channel_apply, channel_energy, criss_cross_rows, position_attention_partial

from ..families import BY_OPERATOR, FAMILIES

DTYPES = (torch.float32, torch.bfloat16)
# Of a call: which of the operator's cases. Several tiles of keys, of queries and of channels.
CASES = {
    "position_attention": (0, 4, 5, 8),
    "channel_attention": (0, 2),
    "channel_self_attention": (0, 3),
    "criss_cross_affinity": (0, 4),
    "criss_cross_aggregation": (0, 4),
    "criss_cross_attention": (0, 6, 7),
}
ALL_CASES = [pytest.param(op, i, id=f"{op}-{BY_OPERATOR[op].cases[i]}") for op, cases in CASES.items() for i in cases]
WITH_KEYS_COMPLETE = ("position_attention", "criss_cross_attention")


def differentiated(operator: str) -> int:
    """How many gradients the backward operator has."""
    return {"channel_self_attention": 2, "criss_cross_affinity": 2, "criss_cross_aggregation": 2}.get(operator, 3)


def saved_arguments(kernels, operator: str, case: int, dtype: torch.dtype) -> dict[str, object]:
    """The arguments of the backward operator by name, without needs_input_grad."""
    family = BY_OPERATOR[operator]
    sizes = family.cases[case]
    inputs = family.make(sizes, dtype, kernels.device)
    schema = getattr(kernels.operators, operator).default._schema
    names = [argument.name for argument in schema.arguments]
    arguments: dict[str, object] = dict(zip(names, (*inputs, *sizes.scalars), strict=False))
    results = getattr(kernels.operators, operator)(*inputs, *sizes.scalars)
    output = results if isinstance(results, Tensor) else results[0]
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(output.device, dtype)
    arguments["grad_affinity" if operator == "criss_cross_affinity" else "grad_output"] = gradient
    if operator in WITH_KEYS_COMPLETE:
        arguments |= {"output": output, "logsumexp": results[1]}
    if operator == "criss_cross_attention":
        arguments["logsumexp_low"] = results[2]
    if operator == "channel_self_attention":
        gamma = torch.randn(output.shape[:2], generator=generator).to(output.device)
        arguments["gamma"] = gamma.double() if dtype == torch.float64 else gamma
    return arguments


def backward(kernels, operator: str):
    return getattr(kernels.operators, f"{operator}_backward")


def masks(gradients: int) -> list[list[bool]]:
    return [list(mask) for mask in itertools.product([False, True], repeat=gradients)]


def assert_every_subset(function, gradients: int, **arguments: object) -> None:
    complete = function(**arguments)
    assert all(gradient.numel() > 0 and gradient.isfinite().all() for gradient in complete)
    for needs in masks(gradients):
        for needed, got, expected in zip(needs, function(**arguments, needs_input_grad=needs), complete, strict=True):
            assert got.dtype == expected.dtype and got.device == expected.device
            assert torch.equal(got, expected) if needed else got.shape == (0,), needs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), ALL_CASES)
def test_every_subset(kernels, operator, case, dtype):
    """Freezing a layer does not change the gradients of the others by a bit."""
    arguments = saved_arguments(kernels, operator, case, dtype)
    for more in [{}, {"keys_complete": True}] if operator in WITH_KEYS_COMPLETE else [{}]:
        assert_every_subset(backward(kernels, operator), differentiated(operator), **arguments, **more)


@pytest.mark.parametrize("operator", WITH_KEYS_COMPLETE)
def test_every_subset_with_a_gradient_of_the_logsumexp(kernels, operator):
    arguments = saved_arguments(kernels, operator, 0, torch.float32)
    arguments |= {"grad_logsumexp": torch.randn_like(arguments["logsumexp"]), "keys_complete": True}
    assert_every_subset(backward(kernels, operator), 3, **arguments)


@pytest.mark.parametrize("keys", [110, 200])
def test_every_subset_with_padding(kernels, keys):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 8, 20), (3, 8, keys), (3, 16, keys), (3, 16, 20)]
    query, key, value, grad_output = (torch.randn(s, generator=generator).to(kernels.device) for s in sizes)
    mask = torch.rand(3, keys, generator=generator) < 0.4
    mask[1] = True
    mask = mask.to(kernels.device)
    output, logsumexp, _, low = kernels.operators.position_attention(query, key, value, 0.3, key_padding_mask=mask)

    arguments = {"grad_output": grad_output, "query": query, "key": key, "value": value}
    arguments |= {"output": output, "logsumexp": logsumexp, "scale": 0.3}
    arguments |= {"logsumexp_low": low, "key_padding_mask": mask, "keys_complete": True}
    assert_every_subset(kernels.operators.position_attention_backward, 3, **arguments)


@pytest.mark.parametrize("operator", CASES)
def test_fake_results_are_like_the_kernels(kernels, operator):
    arguments = saved_arguments(kernels, operator, 0, torch.float32)
    for needs in masks(differentiated(operator)):
        torch.library.opcheck(
            backward(kernels, operator).default,
            (),
            arguments | {"needs_input_grad": needs},
            test_utils="test_faketensor",
        )


class _Masks(TorchDispatchMode):
    """Collects needs_input_grad of the backward operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0].endswith("_backward"):
            given = [list(a) for a in args if isinstance(a, (list, tuple)) and all(isinstance(n, bool) for n in a)]
            defaults = [a.default_value for a in func._schema.arguments if a.name == "needs_input_grad"]
            self.found += given or [list(d) for d in defaults]  # the dispatcher leaves out what equals the default
        return func(*args, **(kwargs or {}))


PUBLIC = {f.operator: (f.function, f.cases[0].shapes, f.cases[0].scalars) for f in FAMILIES} | {
    "channel_energy": (channel_energy, ((2, 3, 4, 5), (2, 6, 4, 5)), ()),
    "channel_energy of one input": (channel_energy, ((2, 3, 4, 5),), ()),
    "channel_apply": (channel_apply, ((2, 3, 4), (2, 4, 5)), (0.5,)),
    "channel_apply with gamma": (
        lambda energy, value, gamma: channel_apply(energy, value, 0.5, gamma),
        ((2, 4, 4), (2, 4, 5), (2, 4)),
        (),
    ),
    "position_attention_partial": (
        lambda *tensors: position_attention_partial(*tensors)[0],
        ((2, 3, 4), (2, 3, 5), (2, 6, 5)),
        (),
    ),
    "criss_cross_rows": (
        lambda *tensors: criss_cross_rows(*tensors)[0],
        ((1, 3, 4, 5), (1, 3, 4, 5), (1, 2, 4, 5)),
        (),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_backward_operator_is_told_what_is_needed(kernels, name):
    """A gradient that no input asks for is not computed, nor is that of an optional input that is not given."""
    function, shapes, scalars = PUBLIC[name]
    for needs in masks(len(shapes)):
        if not any(needs):
            continue
        leaves = [torch.randn(s, device=kernels.device).requires_grad_(n) for s, n in zip(shapes, needs, strict=True)]
        output = function(*leaves, *scalars)
        with _Masks() as called:
            gradients = torch.autograd.grad(output.sum(), [t for t in leaves if t.requires_grad])
        assert all(g.isfinite().all() for g in gradients)
        (told,) = called.found
        assert told == [*needs, *[False] * (len(told) - len(needs))]


AUTOGRAD = [pytest.param(f, id=f.operator) for f in FAMILIES]


@pytest.mark.parametrize("family", AUTOGRAD)
def test_autograd_asks_for_what_requires_a_gradient(backend, family):
    """Of the public functions; the gradients are those of a call in which all inputs require one."""
    case = family.cases[0]
    inputs = family.make(case, torch.float64, backend.device)

    def gradients(needs) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        family.function(*leaves, *case.scalars).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    complete = gradients([True] * len(inputs))
    for needs in masks(len(inputs)):
        if not any(needs):
            continue
        for needed, got, expected in zip(needs, gradients(needs), complete, strict=True):
            assert (got is not None) == needed
            if needed:
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
