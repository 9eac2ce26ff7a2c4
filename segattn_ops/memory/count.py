"""Counts the bytes of the tensors that exist while code runs, by what they belong to."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, WORKSPACE = "weights", "gradients", "workspace"


class Count(TorchDispatchMode):
    """Sees the result of every operator below autograd, so that a storage counts from its creation until nothing refers
    to it: a module, a variable, or autograd, which saved it for the backward pass. Tensors that share a storage count
    once.

    Under a ``FakeTensorMode`` nothing is computed, and storages have sizes without memory. Not seen is what a kernel
    allocates and frees inside one operator.

    Attributes:
        live: bytes by part, now.
        events: ``live`` after each allocation since the last :meth:`start`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.events: list[dict[str, int]] = []
        self._part = WORKSPACE
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}  # by id

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within the block, new storages belong to this part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def start(self) -> None:
        """Forgets the events."""
        self.events = [dict(self.live)]

    def follow(self, module: nn.Module, name: str) -> None:
        """What is created while the module runs forward belongs to the part ``name``."""
        blocks: list[Any] = []

        def before(*_: Any) -> None:
            blocks.append(self.part(name))
            blocks[-1].__enter__()

        def after(*_: Any) -> None:
            blocks.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def parameters_of(self, module: nn.Module) -> None:
        """Counts the parameters and buffers as weights, and gradients of the parameters as such once autograd has
        stored them."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.add(tensor, WEIGHTS)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.add(parameter.grad, GRADIENTS)

    def add(self, tensor: Tensor, part: str) -> None:
        """Counts the tensor's storage as of this part, also one that is counted as of another."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is not None:
            reference, old, size = known
            self._storages[key] = reference, part, size
            self.live[old] -= size
            self.live[part] += size
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, self._forget(key)), part, size
        self.live[part] += size
        self.events.append(dict(self.live))

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            _, part, size = self._storages.pop(key)
            self.live[part] -= size

        return forget

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        part = self._part
        if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
            part = WEIGHTS  # autocast's copy in 16 bits
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._storages:
                self.add(leaf, part)
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        known = self._storages.get(id(tensor.untyped_storage()))
        return known is not None and known[1] == WEIGHTS
