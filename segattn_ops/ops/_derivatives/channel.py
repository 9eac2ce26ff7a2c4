"""channel_attention and channel_self_attention, and their halves, channel_energy and channel_apply."""

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


def energy_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> Tensor | None:
    """The energy is linear in the query and in the key."""
    return _energy_tangent(operators, *arguments, *tangents[:2])


def _energy_tangent(
    operators: Any, query: Tensor, key: Tensor | None, t_query: Tensor | None, t_key: Tensor | None
) -> Tensor | None:
    if key is None:
        half = None if t_query is None else operators.channel_energy(t_query, query)
        return None if half is None else half + half.transpose(1, 2)
    of_query = None if t_query is None else operators.channel_energy(t_query, key)
    return add(of_query, None if t_key is None else operators.channel_energy(query, t_key))


def energy_backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    """The gradients are linear in that of the energy, and in the other input."""
    grad_energy, query, key, needs = arguments
    t_grad_energy, t_query, t_key = tangents[:3]
    of_query, of_key = None, None
    gradients = operators.channel_energy_backward
    if key is None:
        if needs[0]:
            of_query = None if t_grad_energy is None else gradients(t_grad_energy, query, None, [True, False])[0]
            if t_query is not None:
                of_query = add(of_query, gradients(grad_energy, t_query, None, [True, False])[0])
        return [of_query, None]
    if t_grad_energy is not None:
        through_energy = gradients(t_grad_energy, query, key, needs)
        of_query, of_key = (g if needed else None for g, needed in zip(through_energy, needs, strict=True))
    if needs[0] and t_key is not None:
        of_query = add(of_query, gradients(grad_energy, query, t_key, [True, False])[0])
    if needs[1] and t_query is not None:
        of_key = add(of_key, gradients(grad_energy, t_query, key, [False, True])[1])
    return [of_query, of_key]


def energy_double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients are those of <grad_energy, energy>, so that theirs are its derivatives in the direction of the
    cotangents."""
    grad_energy, query, key, _ = arguments
    of_grad_energy = _energy_tangent(operators, query, key, *cotangents) if wanted[0] else None
    of_query, of_key = energy_backward_jvp(operators, (grad_energy, query, key, list(wanted[1:3])), (None, *cotangents))
    return of_grad_energy, of_query, of_key, None


class _Applied:
    """gamma * softmax(scale * energy) value + value, or without gamma and residual, in the dtype of accumulation."""

    def __init__(self, energy: Tensor, value: Tensor, scale: float, gamma: Tensor | None) -> None:
        self._scale, self._residual = scale, gamma is not None
        self._value = self._flat(value)
        self._gamma = None if gamma is None else gamma.unsqueeze(2)
        self._weights = (scale * energy).softmax(2)

    @staticmethod
    def _flat(tensor: Tensor) -> Tensor:
        return flat(tensor).to(accumulation_dtype(tensor.dtype))

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self._gamma is None else self._gamma * tensor

    def _through_softmax(self, tensor: Tensor) -> Tensor:
        """A tangent of the energies to that of the weights, or a gradient of the weights to that of the energies: the
        softmax's Jacobian is symmetric."""
        return self._scale * self._weights * (tensor - (self._weights * tensor).sum(2, keepdim=True))

    def output_tangent(self, t_energy: Tensor | None, t_value: Tensor | None, t_gamma: Tensor | None) -> Tensor | None:
        """(B, C, N)"""
        result = None
        if t_energy is not None:
            result = self._scaled(self._through_softmax(t_energy) @ self._value)
        if t_value is not None:
            t_value = self._flat(t_value)
            result = add(result, self._scaled(self._weights @ t_value))
            if self._residual:
                result = add(result, t_value)
        if t_gamma is not None:
            result = add(result, t_gamma.unsqueeze(2) * (self._weights @ self._value))
        return result

    def gradient_tangents(
        self,
        grad_output: Tensor,
        t_grad_output: Tensor | None,
        t_energy: Tensor | None,
        t_value: Tensor | None,
        t_gamma: Tensor | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tangents of the gradients of energy (B, C, K), value (B, K, N) and gamma (B, C)."""
        grad_output = self._flat(grad_output)
        t_grad_output = None if t_grad_output is None else self._flat(t_grad_output)
        t_weights = None if t_energy is None else self._through_softmax(t_energy)
        of_energy, of_value, of_gamma = None, None, None
        if wanted[0] or wanted[2]:
            products = grad_output @ self._value.transpose(1, 2)  # (B, C, K), the gradient of the weights without gamma
            t_products = None if t_grad_output is None else t_grad_output @ self._value.transpose(1, 2)
            if t_value is not None:
                t_products = add(t_products, grad_output @ self._flat(t_value).transpose(1, 2))
            if wanted[0]:
                scaled = self._scaled(products)
                t_scaled = None if t_products is None else self._scaled(t_products)
                if t_gamma is not None:
                    t_scaled = add(t_scaled, t_gamma.unsqueeze(2) * products)
                if t_scaled is not None:
                    of_energy = self._through_softmax(t_scaled)
                if t_weights is not None:
                    centred = scaled - (self._weights * scaled).sum(2, keepdim=True)
                    t_mean = (t_weights * scaled).sum(2, keepdim=True)
                    of_energy = add(of_energy, self._scale * (t_weights * centred - self._weights * t_mean))
            if wanted[2]:
                if t_weights is not None:
                    of_gamma = (t_weights * products).sum(2)
                if t_products is not None:
                    of_gamma = add(of_gamma, (self._weights * t_products).sum(2))
        if wanted[1]:
            t_factors = None if t_weights is None else self._scaled(t_weights)
            if t_gamma is not None:
                t_factors = add(t_factors, t_gamma.unsqueeze(2) * self._weights)
            if t_factors is not None:
                of_value = t_factors.transpose(1, 2) @ grad_output
            if t_grad_output is not None:
                of_value = add(of_value, self._scaled(self._weights).transpose(1, 2) @ t_grad_output)
                if self._residual:
                    of_value = add(of_value, t_grad_output)
        return of_energy, of_value, of_gamma


def _restored(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, channels, N) as a feature map with the positions and the dtype of `like`."""
    return None if tensor is None else tensor.reshape(*tensor.shape[:2], *like.shape[2:]).to(like.dtype)


def apply_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> tuple[Tensor | None, ...]:
    energy, value, scale, gamma = arguments
    applied = _Applied(energy, value, scale, gamma)
    return _restored(applied.output_tangent(tangents[0], tangents[1], tangents[3]), value), None


def apply_backward_jvp(operators: Any, arguments: Sequence[Any], tangents: MaybeTensors) -> list[Tensor | None]:
    grad_output, energy, value, scale, gamma, needs = arguments
    of_energy, of_value, of_gamma = _Applied(energy, value, scale, gamma).gradient_tangents(
        grad_output, tangents[0], tangents[1], tangents[2], tangents[4], needs
    )
    return [of_energy, _restored(of_value, value), of_gamma]


def apply_double_backward(
    operators: Any, arguments: Sequence[Any], cotangents: MaybeTensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients are those of <grad_output, output>, so that theirs are its derivatives in the direction of the
    cotangents."""
    grad_output, energy, value, scale, gamma, _ = arguments
    t_energy, t_value, t_gamma = cotangents
    applied = _Applied(energy, value, scale, gamma)
    of_grad_output = applied.output_tangent(t_energy, t_value, t_gamma) if wanted[0] else None
    of_energy, of_value, of_gamma = applied.gradient_tangents(
        grad_output, None, t_energy, t_value, t_gamma, (wanted[1], wanted[2], wanted[4])
    )
    restored = _restored(of_grad_output, grad_output), of_energy, _restored(of_value, value)
    return *restored, None, of_gamma, None
