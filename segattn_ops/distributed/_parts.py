"""The operators for parts of the keys, or their definitions where the reference serves. Without autograd: the ops of
this package have their own backward passes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from .._autocast import without_autocast
from ..ops._register import empty_gradients
from ._merge import Partial

Gradients = tuple[Tensor, Tensor, Tensor]


def forward(operators: Any, name: str, *arguments: Any) -> Partial:
    """Calls an operator: position_attention_partial, criss_cross_rows or criss_cross_columns.

    Args:
        operators: the namespace that serves the call; None for the reference.
        name: of the operator.
        arguments: all of its arguments.
    """
    if operators is None:
        with without_autocast(arguments[0].device.type):
            output, logsumexp, low = getattr(reference, name)(*arguments)
        return output.contiguous(), logsumexp.contiguous(), low.contiguous()
    result: Partial = getattr(operators, name)(*arguments)
    return result


def backward(
    operators: Any, name: str, arguments: Sequence[Any], needs_input_grad: Sequence[bool], *masks: Tensor | None
) -> Gradients:
    """Calls the gradient of an operator: those of query, key and value in the dtype of accumulation, of shape (0) where
    not needed.

    Args:
        operators, name: as in `forward`, the name without ``_backward``.
        arguments: up to the scale.
        needs_input_grad: which gradients are.
        masks: the key padding mask, of position_attention_partial.
    """
    if operators is None:
        with without_autocast(arguments[0].device.type):
            found = getattr(reference, f"{name}_backward")(*arguments, *masks)
        empty = empty_gradients(found, (False,) * 3)
        query, key, value = (f if n else e for f, e, n in zip(found, empty, needs_input_grad, strict=True))
    else:
        query, key, value = getattr(operators, f"{name}_backward")(*arguments, list(needs_input_grad), *masks)
    return query, key, value
