"""criss_cross_affinity, criss_cross_aggregation and criss_cross_attention.

The first two are bilinear: with the operator of their transpose, of which the gradients consist, they are closed under
differentiation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._check import accumulation_dtype
from . import of_backward
from .attention import Attention, Layout, MaybeTensors, add, some


class _CrissCrossPairs:
    """Some rows of queries (B, E, h, W) with the keys (B, E, H, W) of their rows and columns. Maps (B, W + H, h, W):
    the row, then the column, self included but without weight."""

    def __init__(self, rows: slice, height: int, width: int, device: torch.device) -> None:
        self._rows, self._height, self._width = rows, height, width
        key_row = torch.arange(height, device=device)
        self._is_self = key_row[:, None, None] == key_row[rows, None]  # (H, h, 1)

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        row = _by_row(some(keys, self._rows)).transpose(2, 3) @ _by_row(queries)  # (B, h, keys, W)
        column = _by_column(keys).transpose(2, 3) @ _by_column(queries)  # (B, W, keys, h)
        return torch.cat([_from_row(row), _from_column(column)], 1)

    def weighted(self, weights: Tensor, keys: Tensor) -> Tensor:
        row, column = self._split(weights)
        in_row = _by_row(some(keys, self._rows)) @ _by_row(row)
        return _from_row(in_row) + _from_column(_by_column(keys) @ _by_column(column))

    def transposed(self, weights: Tensor, queries: Tensor) -> Tensor:
        row, column = self._split(weights)
        in_row = _from_row(_by_row(queries) @ _by_row(row).transpose(2, 3))
        in_row = F.pad(in_row, (0, 0, self._rows.start, self._height - self._rows.stop))
        return in_row + _from_column(_by_column(queries) @ _by_column(column).transpose(2, 3))

    def _split(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        return weights.narrow(1, 0, self._width), weights.narrow(1, self._width, self._height)

    def softmax(self, energy: Tensor) -> Tensor:
        row, column = self._split(energy)
        return torch.cat([row, column.masked_fill(self._is_self, -torch.inf)], 1).softmax(1)


def _by_row(image: Tensor) -> Tensor:
    """(B, channels, h, W) -> (B, h, channels, W)"""
    return image.permute(0, 2, 1, 3)


def _from_row(image: Tensor) -> Tensor:
    """The inverse of `_by_row`."""
    return image.permute(0, 2, 1, 3)


def _by_column(image: Tensor) -> Tensor:
    """(B, channels, h, W) -> (B, W, channels, h)"""
    return image.permute(0, 3, 1, 2)


def _from_column(image: Tensor) -> Tensor:
    """The inverse of `_by_column`."""
    return image.permute(0, 2, 3, 1)


class _Images(Layout):
    """(B, channels, H, W), unchanged but for the dtype."""

    def __init__(self, query: Tensor) -> None:
        self._dtype, self._device = accumulation_dtype(query.dtype), query.device
        batch, _, self.rows, self._width = query.shape
        self.entries = batch * (self.rows + self._width) * self._width

    def queries(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype)

    def keys(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype)

    def restored(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor

    def pairs(self, rows: slice) -> _CrissCrossPairs:
        return _CrissCrossPairs(rows, self.rows, self._width, self._device)


def jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> tuple[Tensor | None, ...]:
    query, key, value, scale = arguments
    return *Attention(_Images(query), scale, query, key, value).jvp(tangents[:3], value.shape), None


def backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    return of_backward.jvp(_of_backward(arguments), arguments, tangents)


def double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return of_backward.double_backward(_of_backward(arguments), arguments, cotangents, wanted)


def _of_backward(arguments: Sequence[Any]) -> Attention:
    _, query, key, value, _, _, scale, *_, keys_complete = arguments
    of_backward.check_keys_complete("criss_cross_attention_backward", keys_complete)
    return Attention(_Images(query), scale, query, key, value)


class _Bilinear:
    """The three maps with <weights, affinity(query, key)> = <query, aggregation(weights, key)> = <key,
    transposed(weights, query)>, by the operators. None is zero."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators

    def affinity(self, query: Tensor | None, key: Tensor | None) -> Tensor | None:
        if query is None or key is None:
            return None
        affinity: Tensor = self._operators.criss_cross_affinity(query, key)
        return affinity

    def aggregation(self, weights: Tensor | None, value: Tensor | None) -> Tensor | None:
        if weights is None or value is None:
            return None
        output: Tensor = self._operators.criss_cross_aggregation(weights, value)
        return output

    def transposed(self, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """As the gradient of the key of an affinity, which does not depend on the key."""
        if weights is None or query is None:
            return None
        grad_key: Tensor = self._operators.criss_cross_affinity_backward(weights, query, query, [False, True])[1]
        return grad_key


def affinity_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> Tensor | None:
    maps = _Bilinear(operators)
    (query, key), (t_query, t_key) = arguments, tangents
    return add(maps.affinity(t_query, key), maps.affinity(query, t_key))


def affinity_backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    maps = _Bilinear(operators)
    gradient, query, key, needs = arguments
    t_gradient, t_query, t_key, _ = tangents
    return [
        add(maps.aggregation(t_gradient, key), maps.aggregation(gradient, t_key)) if needs[0] else None,
        add(maps.transposed(t_gradient, query), maps.transposed(gradient, t_query)) if needs[1] else None,
    ]


def affinity_double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    maps = _Bilinear(operators)
    (gradient, query, key, _), (c_query, c_key) = arguments, cotangents
    return (
        add(maps.affinity(c_query, key), maps.affinity(query, c_key)) if wanted[0] else None,
        maps.aggregation(gradient, c_key) if wanted[1] else None,
        maps.transposed(gradient, c_query) if wanted[2] else None,
        None,
    )


def aggregation_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> Tensor | None:
    maps = _Bilinear(operators)
    (weights, value), (t_weights, t_value) = arguments, tangents
    return add(maps.aggregation(t_weights, value), maps.aggregation(weights, t_value))


def aggregation_backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    maps = _Bilinear(operators)
    gradient, weights, value, needs = arguments
    t_gradient, t_weights, t_value, _ = tangents
    return [
        add(maps.affinity(t_gradient, value), maps.affinity(gradient, t_value)) if needs[0] else None,
        add(maps.transposed(t_weights, gradient), maps.transposed(weights, t_gradient)) if needs[1] else None,
    ]


def aggregation_double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    maps = _Bilinear(operators)
    (gradient, weights, value, _), (c_weights, c_value) = arguments, cotangents
    return (
        add(maps.aggregation(c_weights, value), maps.aggregation(weights, c_value)) if wanted[0] else None,
        maps.affinity(gradient, c_value) if wanted[1] else None,
        maps.transposed(c_weights, gradient) if wanted[2] else None,
        None,
    )
