"""position_attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._check import accumulation_dtype, fail
from .attention import Attention, DensePairs, Layout, MaybeTensors, flat


class _Positions(Layout):
    """(B, channels, *S) -> (B, channels, N). What padded keys and values hold, NaN too, is replaced by 0."""

    def __init__(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> None:
        self._dtype = accumulation_dtype(query.dtype)
        self._padding = None if key_padding_mask is None else key_padding_mask.flatten(1).unsqueeze(1)
        self.rows = query.shape[2:].numel()
        self.entries = key.shape[0] * key.shape[2:].numel()

    def queries(self, tensor: Tensor) -> Tensor:
        return flat(tensor).to(self._dtype)

    def keys(self, tensor: Tensor) -> Tensor:
        keys = flat(tensor).to(self._dtype)
        return keys if self._padding is None else keys.masked_fill(self._padding, 0)

    def restored(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor.reshape(shape)

    def pairs(self, rows: slice) -> DensePairs:
        return DensePairs(None if self._padding is None else self._padding.mT)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, key_padding_mask: Tensor | None) -> Attention:
    return Attention(_Positions(query, key, key_padding_mask), scale, query, key, value)


def jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> tuple[Tensor | None, ...]:
    query, key, value, scale, _, key_padding_mask = arguments
    output_shape = (*value.shape[:2], *query.shape[2:])
    attention = _attention(query, key, value, scale, key_padding_mask)
    return *attention.jvp(tangents[:3], output_shape), None


def backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    attention, grad_output, grad_logsumexp, needs = _of_backward(arguments)
    return attention.backward_jvp((*tangents[1:4], tangents[0], tangents[8]), grad_output, grad_logsumexp, needs)


def double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    attention, grad_output, grad_logsumexp, _ = _of_backward(arguments)
    query, key, value, of_grad_output, of_grad_logsumexp = attention.double_backward(
        cotangents, grad_output, grad_logsumexp, (*wanted[1:4], wanted[0], wanted[8])
    )
    return of_grad_output, query, key, value, None, None, None, None, of_grad_logsumexp, None, None, None


def _of_backward(arguments: Sequence[Any]) -> tuple[Attention, Tensor, Tensor | None, Sequence[bool]]:
    grad_output, query, key, value, _, _, scale, _, grad_logsumexp, needs, key_padding_mask, complete = arguments
    if not complete:
        fail(
            "position_attention_backward",
            "keys_complete must be True for a second derivative, which is of the attention to the keys of the call "
            "(got False)",
        )
    return _attention(query, key, value, scale, key_padding_mask), grad_output, grad_logsumexp, needs
