"""torch.func and torch.autograd.functional: the same numbers as of the definitions."""

from functools import partial

import pytest
import torch
from torch import func
from torch.autograd import functional

import segattn_ops
from segattn_ops import nn

from ..derivatives import FUNCTIONS, assert_same

each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=str)


def loss(f):
    return lambda *tensors: f(*tensors).sin().sum()


def tangents(inputs):
    return tuple(t.sin() + 0.3 for t in inputs)


def all_of(inputs):
    return tuple(range(len(inputs)))


def batched(inputs, count=2):
    return [torch.stack([(i + 1.0) * t for i in range(count)]) for t in inputs]


FIRST = {
    "grad": lambda f, x: func.grad(loss(f), all_of(x))(*x),
    "grad of the last": lambda f, x: func.grad(loss(f), len(x) - 1)(*x),
    "vjp": lambda f, x: func.vjp(f, *x)[1](f(*x).cos()),
    "jvp": lambda f, x: func.jvp(f, tuple(x), tangents(x)),
    "jvp of the last": lambda f, x: func.jvp(partial(f, *x[:-1]), (x[-1],), tangents(x[-1:])),
    "linearize": lambda f, x: func.linearize(f, *x)[1](*tangents(x)),
    "jacrev": lambda f, x: func.jacrev(f, all_of(x))(*x),
    "jacfwd": lambda f, x: func.jacfwd(f, all_of(x))(*x),
    "vmap": lambda f, x: torch.vmap(f)(*batched(x)),
    "vmap of grad": lambda f, x: torch.vmap(func.grad(loss(f), all_of(x)))(*batched(x)),
    "vmap of grad, the first mapped": lambda f, x: torch.vmap(
        func.grad(loss(f), all_of(x)), in_dims=(0, *[None] * (len(x) - 1))
    )(batched(x)[0], *x[1:]),
    "vmap of vmap of grad": lambda f, x: torch.vmap(torch.vmap(func.grad(loss(f), all_of(x)), in_dims=1))(
        *[torch.stack([t, -t], 1) for t in batched(x, 3)]
    ),
    "vmap of jvp": lambda f, x: torch.vmap(lambda *t: func.jvp(f, t, tangents(t))[1])(*batched(x)),
    "grad through vmap": lambda f, x: func.grad(loss(torch.vmap(f)), all_of(x))(*batched(x)),
    "functional.vjp": lambda f, x: functional.vjp(f, tuple(x), f(*x).cos()),
    "functional.jvp": lambda f, x: functional.jvp(f, tuple(x), tangents(x)),
    "functional.jacobian": lambda f, x: functional.jacobian(f, tuple(x), vectorize=True),
    "functional.jacobian, forward": lambda f, x: functional.jacobian(
        f, tuple(x), vectorize=True, strategy="forward-mode"
    ),
}
SECOND = {
    "hessian": lambda f, x: func.hessian(loss(f), all_of(x))(*x),
    "reverse over reverse": lambda f, x: func.jacrev(func.jacrev(loss(f), all_of(x)), all_of(x))(*x),
    "reverse over forward": lambda f, x: func.jacrev(func.jacfwd(loss(f), all_of(x)), all_of(x))(*x),
    "forward over forward": lambda f, x: func.jacfwd(func.jacfwd(loss(f), all_of(x)), all_of(x))(*x),
    "functional.hessian": lambda f, x: functional.hessian(loss(f), tuple(x), vectorize=True),
    "functional.hessian, forward": lambda f, x: functional.hessian(
        loss(f), tuple(x), vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.hvp": lambda f, x: functional.hvp(loss(f), tuple(x), tangents(x)),
    "functional.vhp": lambda f, x: functional.vhp(loss(f), tuple(x), tangents(x)),
    "third order": lambda f, x: func.grad(loss(func.grad(loss(func.grad(loss(f))), len(x) - 1)), all_of(x))(*x),
}


# A sample for each pair of inputs: a minute under the emulator.
FOLDED = [name for name in SECOND if "functional.hvp" not in name and "functional.vhp" not in name]


@each_function
@pytest.mark.parametrize("transforms", [FIRST, SECOND], ids=["first", "second"])
def test_transforms(kernels, function, transforms):
    inputs = function.inputs(device=kernels.device)
    for name, transform in transforms.items():
        if name in FOLDED and not kernels.runs_large:
            continue
        try:
            assert_same(transform(function.call, inputs), transform(function.definition, inputs))
        except Exception as error:
            error.add_note(name)
            raise


def test_gradients_of_each_sample_are_not_mixed(kernels):
    """Per-sample gradients, as for differential privacy, against a loop."""
    inputs = [torch.randn(3, c, 4, 5, device=kernels.device, dtype=torch.float64) for c in (2, 2, 3)]

    def gradients(q, k, v):
        return func.grad(lambda *t: segattn_ops.criss_cross_attention(*(s[None] for s in t)).sin().sum(), (0, 1, 2))(
            q, k, v
        )

    got = torch.vmap(gradients)(*inputs)
    assert_same(got, [torch.stack(g) for g in zip(*(gradients(*t) for t in zip(*inputs, strict=True)), strict=True)])


MODULES = {
    "PositionAttention": lambda: nn.PositionAttention(8),
    "ChannelAttention": lambda: nn.ChannelAttention(),
    "CrissCrossAttention": lambda: nn.CrissCrossAttention(8),
    "DAModule": lambda: nn.DAModule(4),
    **{
        f"NonLocal2d {mode}": partial(nn.NonLocal2d, 8, mode=mode)
        for mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(backend, name, monkeypatch):
    """Derivatives for the parameters and the input, of the module as a function of both."""
    module = MODULES[name]().double().to(backend.device).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(2, getattr(module, "in_channels", None) or 4, 3, 4, dtype=torch.float64, device=backend.device)

    def call(parameters, x):
        return func.functional_call(module, parameters, (x,)).sin().sum()

    def of_sample(parameters, sample):
        return call(parameters, sample[None])

    directions = ({k: v.cos() for k, v in parameters.items()}, x.cos())
    transforms = {
        "grad": lambda: func.grad(call, (0, 1))(parameters, x),
        "gradients of each sample": lambda: torch.vmap(func.grad(of_sample), in_dims=(None, 0))(parameters, x),
        "jvp": lambda: func.jvp(call, (parameters, x), directions),
        "forward over reverse": lambda: func.jvp(func.grad(call, (0, 1)), (parameters, x), directions),
        "reverse over reverse": lambda: func.grad(
            lambda *a: sum(g.sin().sum() for g in func.grad(call)(*a).values()), (0, 1)
        )(parameters, x),
    }
    got = {key: transform() for key, transform in transforms.items()}
    # The definitions: the reference, and for concatenation the sum over all pairs.
    monkeypatch.setattr(
        "segattn_ops.nn._pairwise.relu_sum", lambda a, b, g: g @ (a[:, :, None] + b[:, None]).relu().mT / g.shape[2]
    )
    with segattn_ops.use_backend("reference"):
        for key, transform in transforms.items():
            try:
                assert_same(got[key], transform())
            except AssertionError as error:
                error.add_note(key)
                raise
