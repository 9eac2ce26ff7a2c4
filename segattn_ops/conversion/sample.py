"""The model's outputs on a sample before and after the conversion."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .candidates import Candidate
from .compare import coarsest, leaves
from .state import RandomState

# The roles whose zero weights switch a block off.
_LAST = ("gamma", "out", "norm")


class Sample:
    """A model and what it runs on: the same copy of the sample and the same random state for each run.

    Args:
        model: the model.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        state: the random state to start from.
    """

    def __init__(self, model: nn.Module, inputs: Any, state: RandomState) -> None:
        self._model, self._state = model, state
        self._inputs = _copied(inputs)

    def outputs(self) -> dict[str, Any]:
        """The leaves of the model's output in evaluation mode."""
        inputs = _copied(self._inputs)
        self._state.restore()
        for module in self._model.modules():
            module.training = False
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                output = self._model(**inputs)
            else:
                output = self._model(*inputs) if isinstance(inputs, tuple) else self._model(inputs)
        return leaves(output)

    def dtype(self, outputs: Mapping[str, Any]) -> torch.dtype:
        """The coarsest dtype among parameters and outputs."""
        tensors = [*self._model.parameters(), *(v for v in outputs.values() if isinstance(v, Tensor))]
        dtypes = {t.dtype for t in tensors}
        for kind in {t.device.type for t in tensors} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                dtypes.add(torch.get_autocast_dtype(kind))
        return coarsest(iter(dtypes))


def _copied(inputs: Any) -> Any:
    """A deep copy, of tensors with a history too."""
    memo: dict[int, Any] = {
        id(t): t.detach().clone() for t in tree_leaves(inputs) if isinstance(t, Tensor) and not t.is_leaf
    }
    return copy.deepcopy(inputs, memo)


@contextmanager
def switched_on(blocks: Iterable[tuple[str, nn.Module, Candidate]]) -> Iterator[list[str]]:
    """Gives blocks whose last weights are zero others for the time being, since they return their input unchanged:
    gamma and norms 1, convolutions random. Yields the names of these blocks."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    names = []
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        for name, block, candidate in blocks:
            zero = [p for p in _last_weights(block, candidate) if not p.is_meta and p.numel() and not bool(p.any())]
            for parameter in zero:
                saved.append((parameter, parameter.data))
                parameter.data = _switched_on(parameter, generator)
            if zero:
                names.append(name)
        yield names
    finally:
        for parameter, data in saved:
            parameter.data = data


def _last_weights(block: nn.Module, candidate: Candidate) -> Iterator[nn.Parameter]:
    for role in _LAST:
        name = candidate.names.get(role)
        if name is None:
            continue
        parameter = block._parameters.get(name)
        if parameter is not None:
            yield parameter
        elif name not in block._parameters:
            yield from (p for n, p in block.get_submodule(name).named_parameters() if not n.endswith("bias"))


def _switched_on(parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    data = parameter.data
    if data.dim() < 2:
        return torch.ones_like(data)
    values = torch.randn(data.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (values / math.sqrt(data[0].numel())).to(data)
