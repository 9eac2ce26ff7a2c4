"""position_attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._check import accumulation_dtype
from . import of_backward
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
    return *attention.jvp(tangents[:3], output_shape), None, None


def backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    return of_backward.jvp(_of_backward(arguments), _without_low(arguments), _without_low(tangents))


def double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    attention = _of_backward(arguments)
    gradients = of_backward.double_backward(attention, _without_low(arguments), cotangents, _without_low(wanted))
    return *gradients[:_LOW], None, *gradients[_LOW:]


_LOW = 8  # the place of logsumexp_low, the second low part, among the arguments of position_attention_backward


def _without_low(arguments: Sequence[Any]) -> list[Any]:
    """The arguments in the order of `of_backward`."""
    return [*arguments[:_LOW], *arguments[_LOW + 1 :]]


def _of_backward(arguments: Sequence[Any]) -> Attention:
    _, query, key, value, _, _, scale, *_, key_padding_mask, keys_complete = arguments
    of_backward.check_keys_complete("position_attention_backward", keys_complete)
    return _attention(query, key, value, scale, key_padding_mask)
