r"""Directional derivatives of softmax attention and of its gradients, block by block of queries.

With the energies Z, weights P = softmax(Z), output O and logsumexp L, the backward pass computes for the gradients dO
and dL of the results

    dP = dO V^T,  dS = P * (dP - sum_j P dP + dL),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.

With T = scale (tQ K^T + Q tK^T) for tangents tQ and tK, and r = sum_j P T, the tangents of weights and logsumexp are
P * (T - r) and r. All others follow from the product rule.

The same tangents serve the double backward. (dQ, dK, dV) is the gradient of psi = <dO, O> + <dL, L>. For cotangents
(GQ, GK, GV) of it, the gradient for (Q, K, V) is the Hessian of psi, which is symmetric, times (GQ, GK, GV): the
tangent of (dQ, dK, dV) in that direction. psi is linear in dO and dL, so their gradients are the tangents of O and L.

All steps are PyTorch functions, none in place, so that autograd and torch.func differentiate the results further.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..._autocast import without_autocast
from .._check import accumulation_dtype

MaybeTensors = Sequence[Tensor | None]

# Entries of a block of the attention map, in all samples together: 4 MiB in float32, of which about ten live at a time.
# A gradient penalty at 64 x 64 (E 64, C 512, one thread) takes 1.9 s and 120 MiB with 2**19, 1.8 s and 204 MiB with
# 2**20; larger blocks are no faster.
_ENTRIES_OF_BLOCK = 2**20


class Pairs(Protocol):
    """The pairs of a block's queries with the keys. A map (batch, keys, queries of the block) has an entry for each.
    Tensors of queries and of keys are (batch, channels, ...)."""

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Dot products over the channels -> map."""

    def weighted(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Sums over the keys of each query -> as queries."""

    def transposed(self, weights: Tensor, queries: Tensor) -> Tensor:
        """Sums over the queries of the block for each key -> as keys."""

    def softmax(self, energy: Tensor) -> Tensor:
        """The weights, 0 where the query does not attend to the key."""


class DensePairs:
    """All pairs: queries (B, E, n), keys (B, E, M).

    Args:
        padding: (B, M, 1), True for a key that is padding.
    """

    def __init__(self, padding: Tensor | None = None) -> None:
        self.padding = padding

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        return keys.transpose(1, 2) @ queries

    def weighted(self, weights: Tensor, keys: Tensor) -> Tensor:
        return keys @ weights

    def transposed(self, weights: Tensor, queries: Tensor) -> Tensor:
        return queries @ weights.transpose(1, 2)

    def softmax(self, energy: Tensor) -> Tensor:
        if self.padding is None:
            return energy.softmax(1)
        only_padding = self.padding.all(1, keepdim=True)  # where a softmax over -inf would be NaN
        return energy.masked_fill(self.padding & ~only_padding, -torch.inf).softmax(1).masked_fill(only_padding, 0)


class Layout(ABC):
    """How the tensors of a call become (batch, channels, positions, ...) in the dtype of accumulation, and back.

    Attributes:
        rows: the size of dimension 2 of queries, which is split into blocks.
        entries: of the map for one of `rows`, in all samples.
    """

    rows: int
    entries: int

    @abstractmethod
    def queries(self, tensor: Tensor) -> Tensor:
        """query, output, logsumexp as one channel, or tensors like them."""

    @abstractmethod
    def keys(self, tensor: Tensor) -> Tensor:
        """key, value, or tensors like them."""

    @abstractmethod
    def restored(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of both, still in the dtype of accumulation."""

    @abstractmethod
    def pairs(self, rows: slice) -> Pairs: ...

    def blocks(self) -> list[slice]:
        size = max(1, _ENTRIES_OF_BLOCK // max(1, self.entries))
        return [slice(i, min(i + size, self.rows)) for i in range(0, self.rows, size)]


@dataclass(frozen=True)
class Attention:
    """A call of softmax attention, in the layout of its arguments."""

    layout: Layout
    scale: float
    query: Tensor
    key: Tensor
    value: Tensor

    def jvp(
        self, tangents: MaybeTensors, output_shape: Sequence[int], with_logsumexp: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The tangents of output and logsumexp, from those of query, key and value."""
        wanted = (True, with_logsumexp, False, False, False)
        output, logsumexp, *_ = self._derivatives((*tangents, None, None), None, wanted)
        return self._restored(output, output_shape), self._restored_logsumexp(logsumexp) if with_logsumexp else None

    def backward_jvp(
        self,
        tangents: MaybeTensors,
        grad_output: Tensor,
        grad_logsumexp: Tensor | None,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """The tangents of the gradients of query, key and value, from those of query, key, value, grad_output and
        grad_logsumexp. None for one that is not wanted."""
        _, _, *found = self._derivatives(tangents, (grad_output, grad_logsumexp), (False, False, *wanted))
        return self._restored_inputs(found, wanted)

    def double_backward(
        self,
        cotangents: MaybeTensors,
        grad_output: Tensor,
        grad_logsumexp: Tensor | None,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients for query, key, value, grad_output and grad_logsumexp, from those of the gradients of query,
        key and value. None for one that is not wanted."""
        gradients = (grad_output, grad_logsumexp) if any(wanted[:3]) else None
        output, logsumexp, *inputs = self._derivatives((*cotangents, None, None), gradients, (*wanted[3:], *wanted[:3]))
        return [
            *self._restored_inputs(inputs, wanted[:3]),
            self._restored(output, grad_output.shape) if wanted[3] else None,
            self._restored_logsumexp(logsumexp) if wanted[4] else None,
        ]

    def _restored(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        if tensor is None:
            return self.query.new_zeros(shape)
        return self.layout.restored(tensor, shape).to(self.query.dtype)

    def _restored_inputs(self, found: MaybeTensors, wanted: Sequence[bool]) -> list[Tensor | None]:
        shapes = (self.query.shape, self.key.shape, self.value.shape)
        return [self._restored(t, shape) if w else None for t, shape, w in zip(found, shapes, wanted, strict=True)]

    def _restored_logsumexp(self, tensor: Tensor | None) -> Tensor:
        batch, _, *spatial = self.query.shape
        if tensor is None:
            return self.query.new_zeros((batch, *spatial), dtype=accumulation_dtype(self.query.dtype))
        return self.layout.restored(tensor, (batch, 1, *spatial)).squeeze(1)

    def _derivatives(
        self,
        tangents: MaybeTensors,
        gradients: tuple[Tensor, Tensor | None] | None,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """The tangents of output, logsumexp and the gradients of query, key and value, from those of query, key, value,
        grad_output and grad_logsumexp. In the layout; None for zero and for what is not wanted."""
        queries, keys = self.layout.queries, self.layout.keys
        with without_autocast(self.query.device.type):
            query, key, value = queries(self.query), keys(self.key), keys(self.value)
            t_query, t_key, t_value, t_grad_output, t_grad_logsumexp = tangents
            of_queries = [_apply(queries, t) for t in (t_query, t_grad_output, _channel(t_grad_logsumexp))]
            of_keys = [_apply(keys, t) for t in (t_key, t_value)]
            of_gradients = (
                (None, None) if gradients is None else (queries(gradients[0]), _apply(queries, _channel(gradients[1])))
            )
            parts: list[list[Tensor]] = [[], [], []]
            sums: list[Tensor | None] = [None, None]
            for rows in self.layout.blocks():
                output, logsumexp, *inputs = _of_block(
                    self.layout.pairs(rows),
                    self.scale,
                    (some(query, rows), key, value),
                    of_keys,
                    [None if t is None else some(t, rows) for t in of_queries],
                    [None if t is None else some(t, rows) for t in of_gradients],
                    wanted,
                )
                for part, found in zip(parts, (output, logsumexp, inputs[0]), strict=True):
                    if found is not None:
                        part.append(found)
                sums = [add(total, part) for total, part in zip(sums, inputs[1:], strict=True)]
            of_output, of_logsumexp, of_query = (torch.cat(part, 2) if part else None for part in parts)
            return [of_output, of_logsumexp, of_query, *sums]


def _of_block(
    pairs: Pairs,
    scale: float,
    inputs: tuple[Tensor, Tensor, Tensor],
    tangents_of_keys: MaybeTensors,
    tangents_of_queries: MaybeTensors,
    gradients: MaybeTensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """`Attention._derivatives` for the queries of one block; for key and value, its part of the sums."""
    query, key, value = inputs
    t_key, t_value = tangents_of_keys
    t_query, t_grad_output, t_grad_logsumexp = tangents_of_queries
    grad_output, grad_logsumexp = gradients
    weights = pairs.softmax(scale * pairs.products(query, key))
    t_weights, t_logsumexp = None, None
    t_energy = add(_apply(pairs.products, t_query, key), _apply(pairs.products, query, t_key))
    if t_energy is not None:
        t_energy = scale * t_energy
        t_logsumexp = (weights * t_energy).sum(1, keepdim=True)
        t_weights = weights * (t_energy - t_logsumexp)
    found: list[Tensor | None] = [None] * 5
    if wanted[0]:
        found[0] = add(_apply(pairs.weighted, t_weights, value), _apply(pairs.weighted, weights, t_value))
    if wanted[1]:
        found[1] = t_logsumexp
    if grad_output is None:
        return found

    # dS = P * shifted, with shifted = dP - sum_j P dP + dL
    grad_weights = pairs.products(grad_output, value)
    shifted = grad_weights - (weights * grad_weights).sum(1, keepdim=True)
    if grad_logsumexp is not None:
        shifted = shifted + grad_logsumexp
    t_shifted = add(_apply(pairs.products, t_grad_output, value), _apply(pairs.products, grad_output, t_value))
    t_delta = add(_apply(torch.mul, t_weights, grad_weights), _apply(torch.mul, weights, t_shifted))
    if t_delta is not None:
        t_shifted = add(t_shifted, -t_delta.sum(1, keepdim=True))
    t_shifted = add(t_shifted, t_grad_logsumexp)
    t_grad_energy = add(_apply(torch.mul, t_weights, shifted), _apply(torch.mul, weights, t_shifted))
    grad_energy = weights * shifted if t_query is not None or t_key is not None else None
    if wanted[2]:
        of_query = add(_apply(pairs.weighted, t_grad_energy, key), _apply(pairs.weighted, grad_energy, t_key))
        found[2] = None if of_query is None else scale * of_query
    if wanted[3]:
        of_key = add(_apply(pairs.transposed, t_grad_energy, query), _apply(pairs.transposed, grad_energy, t_query))
        found[3] = None if of_key is None else scale * of_key
    if wanted[4]:
        found[4] = add(
            _apply(pairs.transposed, t_weights, grad_output), _apply(pairs.transposed, weights, t_grad_output)
        )
    return found


def _apply(function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor | None:
    """A linear function, of which None is the zero."""
    return None if any(a is None for a in arguments) else function(*arguments)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two terms, of which None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _channel(logsumexp: Tensor | None) -> Tensor | None:
    return None if logsumexp is None else logsumexp.unsqueeze(1)


def in_dtype_of(like: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def flat(tensor: Tensor) -> Tensor:
    """(B, channels, *S) -> (B, channels, N). Here and below, the ops are those that torch.autograd.functional can
    vectorise: it cannot flatten and slice."""
    return tensor.reshape(*tensor.shape[:2], tensor.shape[2:].numel())


def some(tensor: Tensor, rows: slice, dim: int = 2) -> Tensor:
    return tensor.narrow(dim, rows.start, rows.stop - rows.start)
