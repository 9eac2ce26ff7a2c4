"""What a trial run must not change: random state, training flags, buffers."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """The state of every random number generator that a forward pass may draw from, at the time of construction."""

    def __init__(self, device_types: Iterable[str] = ()) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._devices: dict[tuple[str, int], Tensor] = {}
        for kind in {*device_types, "cuda"} - {"cpu", "meta"}:
            module = torch.get_device_module(kind)
            if hasattr(module, "get_rng_state") and _initialised(module):
                for index in range(module.device_count()):
                    self._devices[kind, index] = module.get_rng_state(*_which(kind, index))

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for (kind, index), state in self._devices.items():
            torch.get_device_module(kind).set_rng_state(state, *_which(kind, index))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and self._python == other._python
            and torch.equal(self._torch, other._torch)
            and _same_numpy(self._numpy, other._numpy)
            and self._devices.keys() == other._devices.keys()
            and all(torch.equal(state, other._devices[key]) for key, state in self._devices.items())
        )

    __hash__ = None  # type: ignore[assignment]


def _initialised(device_module: Any) -> bool:
    return bool(device_module.is_available()) and bool(getattr(device_module, "is_initialized", lambda: True)())


def _which(kind: str, index: int) -> tuple[int, ...]:
    return () if kind == "mps" else (index,)  # there is one mps device, and its functions take no index


def _same_numpy(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a[0] == b[0] and a[2:] == b[2:] and bool((a[1] == b[1]).all())


@contextmanager
def kept(model: nn.Module) -> Iterator[RandomState]:
    """Restores the training flags and buffers of the model and the random state, whatever happens inside.

    Flags are set directly: ``eval()`` and ``train()`` may be the user's, and change more than the flag.
    """
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [
        {
            name: (buffer, None if buffer is None else buffer.detach().clone())
            for name, buffer in module._buffers.items()
        }
        for module in modules
    ]
    state = RandomState({t.device.type for t in (*model.parameters(), *model.buffers())})
    try:
        yield state
    finally:
        state.restore()
        for module, flag, saved in zip(modules, flags, buffers, strict=True):
            module.training = flag
            for name, (buffer, content) in saved.items():
                module._buffers[name] = buffer
                if buffer is not None and content is not None and not buffer.is_meta:
                    _restore(buffer, content)


def _restore(buffer: Tensor, content: Tensor) -> None:
    if not torch.equal(buffer, content):
        with torch.no_grad():
            buffer.copy_(content)
