"""Calls that together run every op and every operator, forward, backward and differentiated twice, for tests of what
happens around a call: failures, threads, processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import segattn_ops
from segattn_ops import _backend, ops
from segattn_ops.distributed import _parts

from ..families import FAMILIES, Family

Make = Callable[[torch.dtype], list[Tensor]]


@dataclass(frozen=True)
class Call:
    name: str
    make: Make  # the inputs, for a dtype
    run: Callable[..., list[Tensor]]  # results, for the inputs

    def __str__(self) -> str:
        return self.name


def drawn(*shapes: tuple[int, ...]) -> Make:
    """The same numbers for every dtype, rounded."""

    def make(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    return make


def leaves_of(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in inputs]


def forward(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    return run


def backward(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., list[Tensor]]:
    """The outputs, and the gradients of all inputs for a gradient of the outputs that is not constant."""

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = leaves_of(inputs)
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        gradients = torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])
        return [*(o.detach() for o in outputs), *gradients]

    return run


def double_backward(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = leaves_of(inputs)
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, output.detach(), create_graph=True)
        return list(torch.autograd.grad(gradients, leaves, [g.detach() for g in gradients], allow_unused=True))

    return run


def of_family(family: Family) -> list[Call]:
    case = family.cases[0]

    def function(*inputs: Tensor) -> Tensor:
        return family.function(*inputs, *case.scalars)

    def make(dtype: torch.dtype) -> list[Tensor]:
        return family.make(case, dtype)

    kinds = {"forward": forward, "backward": backward, "double backward": double_backward}
    return [Call(f"{family.operator} {kind}", make, wrap(function)) for kind, wrap in kinds.items()]


def part(name: str) -> Callable[..., list[Tensor]]:
    """The operators of segattn_ops.distributed, forward and backward."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        mask = [padding_of(key)] if name == "position_attention_partial" else []
        operators = _backend.operators(name, query, key, value)
        output, logsumexp, low = _parts.forward(operators, name, query, key, value, 0.5, *mask)
        grad_output = output.to(query.dtype)
        delta = (grad_output * output).sum(1).to(output.dtype)
        arguments = (grad_output, query, key, value, logsumexp, low, delta, 0.5)
        return [output, logsumexp, low, *_parts.backward(operators, name, arguments, (True, True, True), *mask)]

    return run


def padding_of(key: Tensor) -> Tensor:
    """Every third key is padding, and in the second sample one more."""
    mask = torch.zeros((key.shape[0], key[0, 0].numel()), dtype=torch.bool)
    mask[:, ::3] = True
    mask[1:, 1] = True
    return mask.view(key.shape[0], *key.shape[2:])


def attend_without_padding(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return segattn_ops.position_attention(
        query, key, value, 0.5, num_heads=2, key_padding_mask=padding_of(key), return_logsumexp=True
    )


def halves(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.channel_apply(ops.channel_energy(query, key), value, 0.2)


def self_halves(x: Tensor, gamma: Tensor) -> Tensor:
    energy = ops.channel_energy(x)
    return ops.channel_apply(energy, x, -0.2, gamma=gamma.to(energy.dtype))


def channels_last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    copies = (t.to(memory_format=torch.channels_last) for t in (query, key, value))
    return segattn_ops.position_attention(*copies, 0.5)


QUERY_KEY_VALUE = drawn((2, 8, 5, 7), (2, 8, 5, 7), (2, 16, 5, 7))
CALLS = (
    *(call for family in FAMILIES for call in of_family(family)),
    Call("position_attention with padding and heads", QUERY_KEY_VALUE, backward(attend_without_padding)),
    Call("position_attention of channels_last", QUERY_KEY_VALUE, backward(channels_last)),
    Call("channel_energy and channel_apply", drawn((2, 8, 5, 7), (2, 6, 5, 7), (2, 6, 3, 4)), backward(halves)),
    Call("channel_energy and channel_apply with gamma", drawn((2, 8, 5, 7), (2, 8)), backward(self_halves)),
    *(
        Call(name, QUERY_KEY_VALUE, part(name))
        for name in ("position_attention_partial", "criss_cross_rows", "criss_cross_columns")
    ),
)
BY_NAME = {call.name: call for call in CALLS}
