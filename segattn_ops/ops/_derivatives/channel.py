"""channel_attention and channel_self_attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._check import accumulation_dtype
from .attention import Attention, DensePairs, Layout, MaybeTensors, add, flat, in_dtype_of


class _Channels(Layout):
    """(B, channels, *S) -> (B, N, channels): channels attend, contracted over positions."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self._dtype = accumulation_dtype(query.dtype)
        self.rows = query.shape[1]
        self.entries = key.shape[0] * key.shape[1]

    def queries(self, tensor: Tensor) -> Tensor:
        return flat(tensor).transpose(1, 2).to(self._dtype)

    def keys(self, tensor: Tensor) -> Tensor:
        return flat(tensor).transpose(1, 2).to(self._dtype)

    def restored(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor.transpose(1, 2).reshape(shape)

    def pairs(self, rows: slice) -> DensePairs:
        return DensePairs()


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attention:
    return Attention(_Channels(query, key), scale, query, key, value)


def jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> tuple[Tensor | None, ...]:
    query, key, value, scale = arguments
    output_shape = (*query.shape[:2], *value.shape[2:])
    return _attention(query, key, value, scale).jvp(tangents[:3], output_shape, with_logsumexp=False)


def backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    grad_output, query, key, value, scale, needs = arguments
    direction = (*tangents[1:4], tangents[0], None)
    return _attention(query, key, value, scale).backward_jvp(direction, grad_output, None, needs)


def double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    grad_output, query, key, value, scale, _ = arguments
    *inputs, of_grad_output, _ = _attention(query, key, value, scale).double_backward(
        cotangents, grad_output, None, (*wanted[1:4], wanted[0], False)
    )
    return of_grad_output, *inputs, None, None


class _SelfAttention:
    """gamma * attention(x, x, x) + x, or the attention alone without gamma, in the dtype of accumulation."""

    def __init__(self, operators: Any, x: Tensor, scale: float, gamma: Tensor | None) -> None:
        self._operators, self._scale, self._residual = operators, scale, gamma is not None
        self._x = self._converted(x)
        self._gamma = self._factor(gamma)
        self._attention = _attention(self._x, self._x, self._x, scale)

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(accumulation_dtype(tensor.dtype))

    def _factor(self, gamma: Tensor | None) -> Tensor | None:
        return None if gamma is None else gamma.reshape(*gamma.shape, *[1] * (self._x.dim() - 2))

    def _attended(self) -> Tensor:
        attended: Tensor = self._operators.channel_self_attention(self._x, self._scale)[0]
        return attended

    def _attention_tangent(self, t_x: Tensor) -> Tensor:
        return self._attention.jvp((t_x, t_x, t_x), self._x.shape, with_logsumexp=False)[0]

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self._gamma is None else self._gamma * tensor

    def output_tangent(self, t_x: Tensor | None, t_gamma: Tensor | None) -> Tensor | None:
        result = None
        if t_x is not None:
            t_x = self._converted(t_x)
            result = self._scaled(self._attention_tangent(t_x))
            if self._residual:
                result = result + t_x
        t_factor = self._factor(t_gamma)
        return result if t_factor is None else add(result, t_factor * self._attended())

    def gradient_tangents(
        self,
        grad_output: Tensor,
        t_grad_output: Tensor | None,
        t_x: Tensor | None,
        t_gamma: Tensor | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tangents of the gradients of x and gamma."""
        of_x, of_gamma = None, None
        grad_output = self._converted(grad_output)
        if t_grad_output is not None:
            t_grad_output = self._converted(t_grad_output)
        if t_x is not None:
            t_x = self._converted(t_x)
        if wanted[0]:
            t_factor = self._factor(t_gamma)
            t_scaled = None if t_grad_output is None else self._scaled(t_grad_output)
            if t_factor is not None:
                t_scaled = add(t_scaled, t_factor * grad_output)
            for part in self._attention.backward_jvp(
                (t_x, t_x, t_x, t_scaled, None), self._scaled(grad_output), None, (True, True, True)
            ):
                of_x = add(of_x, part)
            if self._residual:
                of_x = add(of_x, t_grad_output)
        if wanted[1]:
            positions = list(range(2, self._x.dim()))
            if t_grad_output is not None:
                of_gamma = (t_grad_output * self._attended()).sum(positions)
            if t_x is not None:
                of_gamma = add(of_gamma, (grad_output * self._attention_tangent(t_x)).sum(positions))
        return of_x, of_gamma


def self_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> tuple[Tensor | None, ...]:
    x, scale, gamma = arguments
    tangent = _SelfAttention(operators, x, scale, gamma).output_tangent(tangents[0], tangents[2])
    return in_dtype_of(x, tangent), None


def self_backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    grad_output, x, scale, gamma, needs = arguments
    of_x, of_gamma = _SelfAttention(operators, x, scale, gamma).gradient_tangents(
        grad_output, tangents[0], tangents[1], tangents[3], needs
    )
    return [in_dtype_of(x, of_x), of_gamma]


def self_double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    grad_output, x, scale, gamma, _ = arguments
    attention = _SelfAttention(operators, x, scale, gamma)
    of_grad_x, of_grad_gamma = cotangents
    of_grad_output = attention.output_tangent(of_grad_x, of_grad_gamma) if wanted[0] else None
    of_x, of_gamma = attention.gradient_tangents(grad_output, None, of_grad_x, of_grad_gamma, (wanted[1], wanted[3]))
    return in_dtype_of(x, of_grad_output), in_dtype_of(x, of_x), None, of_gamma, None
