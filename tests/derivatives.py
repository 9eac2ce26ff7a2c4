"""Shared by the tests of derivatives: small inputs, and the derivatives of the definitions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import segattn_ops
from segattn_ops import reference

from .families import BY_OPERATOR, Case


class Function(NamedTuple):
    """A function of tensors under test, and its definition."""

    name: str
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    inputs: Callable[..., list[Tensor]]

    def __str__(self) -> str:
        return self.name


# Few numbers, for Hessians; all sizes of a call differ where they can.
_CASES = {
    "position_attention": Case(((2, 2, 2, 2), (2, 2, 3), (2, 1, 3)), 0.5),
    "channel_attention": Case(((2, 2, 3), (2, 3, 3), (2, 3, 2)), 0.5),
    "channel_self_attention": Case(((2, 3, 2, 2),), 0.5),
    "residual_channel_attention": Case(((2, 3, 2, 2), (2, 3)), -0.5),
    "criss_cross_affinity": Case(((2, 2, 2, 3), (2, 2, 2, 3))),
    "criss_cross_aggregation": Case(((2, 4, 2, 3), (2, 2, 2, 3))),
    "criss_cross_attention": Case(((1, 2, 2, 3), (1, 2, 2, 3), (1, 1, 2, 3)), 0.5),
}


def _of_family(operator: str) -> Function:
    family, case = BY_OPERATOR[operator], _CASES[operator]
    return Function(
        operator,
        lambda *tensors: family.function(*tensors, *case.scalars),
        lambda *tensors: family.definition(*tensors, *case.scalars),
        lambda dtype=torch.float64, device="cpu": family.make(case, dtype, device),
    )


def _both_results(operator: str) -> Function:
    """Output and logsumexp together, a channel each."""
    single, case = _of_family(operator), _CASES[operator]
    public, definition = getattr(segattn_ops, operator), getattr(reference, operator)

    def joined(output: Tensor, logsumexp: Tensor) -> Tensor:
        return torch.cat([output, logsumexp.reshape(output.shape[0], 1, *output.shape[2:]).to(output.dtype)], 1)

    return Function(
        f"{operator}_with_logsumexp",
        lambda *tensors: joined(*public(*tensors, *case.scalars, return_logsumexp=True)),
        lambda *tensors: joined(*definition(*tensors, *case.scalars)),
        single.inputs,
    )


def _with_padding() -> Function:
    """Padding in the first sample, nothing else in the second."""
    single, case = _of_family("position_attention"), _CASES["position_attention"]

    def padding(key: Tensor) -> Tensor:
        """A mask that vmap can map like the key."""
        index = torch.arange(key.shape[2], device=key.device)
        return torch.stack([index == 1, index >= 0]).expand(key.shape[0], -1)

    return Function(
        "position_attention_with_padding",
        lambda q, k, v: segattn_ops.position_attention(q, k, v, *case.scalars, key_padding_mask=padding(k)),
        lambda q, k, v: reference.position_attention(q, k, v, *case.scalars, padding(k))[0],
        single.inputs,
    )


FUNCTIONS = [
    *map(_of_family, _CASES),
    _both_results("position_attention"),
    _both_results("criss_cross_attention"),
    _with_padding(),
]


def assert_same(got: object, expected: object, tolerance: float = 1e-12) -> None:
    """Every tensor's difference relative to its largest entry."""
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))
