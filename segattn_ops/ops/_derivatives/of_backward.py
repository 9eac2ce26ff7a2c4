"""The backward operators of position and criss-cross attention, whose first arguments are the same: grad_output, query,
key, value, output, logsumexp, scale, a low part, grad_logsumexp, needs_input_grad.

Output, logsumexp and the low part are functions of query, key and value. Their derivatives are part of those of query,
key and value, and none is returned for themselves.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._check import fail
from .attention import Attention, MaybeTensors


def jvp(attention: Attention, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    """The tangents of grad_query, grad_key and grad_value."""
    grad_output, grad_logsumexp, needs_input_grad = arguments[0], arguments[8], arguments[9]
    t_grad_output, t_grad_logsumexp = tangents[0], tangents[8]
    return attention.backward_jvp(
        (*tangents[1:4], t_grad_output, t_grad_logsumexp), grad_output, grad_logsumexp, needs_input_grad
    )


def double_backward(
    attention: Attention, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients for all arguments, from those of grad_query, grad_key and grad_value."""
    grad_output, grad_logsumexp = arguments[0], arguments[8]
    *inputs, of_grad_output, of_grad_logsumexp = attention.double_backward(
        cotangents, grad_output, grad_logsumexp, (*wanted[1:4], wanted[0], wanted[8])
    )
    gradients = [of_grad_output, *inputs, None, None, None, None, of_grad_logsumexp]
    return *gradients, *[None] * (len(arguments) - len(gradients))


def check_keys_complete(op: str, keys_complete: bool) -> None:
    """The derivative of a logsumexp over keys of other calls is unknown here."""
    if not keys_complete:
        fail(
            op,
            "keys_complete must be True for a second derivative, which is of the attention to the keys of the call "
            "(got False)",
        )
