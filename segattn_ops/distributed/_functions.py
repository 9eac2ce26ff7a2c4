"""What the Functions of this package share: results, and backward passes that cannot be differentiated again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._agreement import check_call, in_step, number_call
from ._collectives import all_reduce
from ._mesh import Group

Gradients = tuple[Tensor | None, ...]


def result(tensor: Tensor) -> Tensor:
    """A tensor that a Function returns. In a graph it is a copy: Dynamo of torch 2.11 drops the gradient of a tensor
    that was written in place, as one that arrives by a collective is."""
    return tensor.clone() if torch.compiler.is_compiling() else tensor


class SumOverRanks(torch.autograd.Function):
    """Each rank uses the sum, so the gradient for its own part is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, op: str, group: Group) -> Tensor:
        ctx.op, ctx.group, ctx.call = op, group, number_call(group)
        with in_step(op, group):
            return result(all_reduce(op, group, tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with in_step(ctx.op, ctx.group):
            check_call(ctx.op, ctx.group, ctx.call, gradient.device)
        return SumOverRanks.apply(gradient, ctx.op, ctx.group), None, None


class _Refusal(torch.autograd.Function):
    """The identity of its first argument, without a derivative in any."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, op: str, *inputs: Tensor | None) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Gradients:
        raise NotImplementedError(f"{ctx.op}: the op has no second derivative")


def differentiable_once(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Marks the backward of a Function. ``torch.autograd.function.once_differentiable`` looks at the gradients that
    arrive alone: if these are constants, what the result owes to the inputs is lost without an error."""

    def decorator(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Tensor | None) -> Gradients:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            with torch.no_grad():
                results = backward(ctx, *gradients)
            inputs = [*ctx.saved_tensors, *gradients]
            return tuple(None if r is None else _Refusal.apply(r, op, *inputs) for r in results)

        return once

    return decorator
