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
    return tuple(torch.randn_like(t, generator=None) if False else t.sin() + 0.3 for t in inputs)


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
    "vmap of vmap of grad": lambda f, x: torch.vmap(
        torch.vmap(func.grad(loss(f), all_of(x)), in_dims=1)
    )(*[torch.stack([t, -t], 1) for t in batched(x, 3)]),
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
    "third order": lambda f, x: func.grad(
        loss(func.grad(loss(func.grad(loss(f))), len(x) - 1)), all_of(x)
    )(*x),
}


@each_function
def test_first_order(kernels, function):
    inputs = function.inputs(device=kernels.device)
    for name, transform in FIRST.items():
        try:
            assert_same(transform(function.call, inputs), transform(function.definition, inputs))
        except Exception as error:
            error.add_note(name)
            raise


@each_function
def test_second_order(kernels, function):
    inputs = function.inputs(device=kernels.device)
    for name, transform in SECOND.items():
        try:
            assert_same(transform(function.call, inputs), transform(function.definition, inputs))
        except Exception as error:
            error.add_note(name)
            raise
