"""The attributes on which a forward depends, so that a later change of one is not ignored.

A converted block computes what its original computed when it was converted. An original that divides its energies by
``self.temperature``, or skips the attention unless ``self.enabled``, computes something else once that is set.
"""

import enum
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Settings = tuple[tuple[str, str, Any], ...]  # name of the descendant, name of its attribute, snapshot of the value

_OWN = frozenset(dir(nn.Module()))
_MISSING = inspect.Parameter.empty
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_VALUES = (numbers.Number, str, bytes, type(None), enum.Enum, type, torch.dtype, *_FUNCTIONS)


@contextmanager
def reads(module: nn.Module, names: Iterable[str]) -> Iterator[set[tuple[str, str]]]:
    """Collects (name, attribute) of what is read from the module's descendants ``names`` ("" for itself)."""
    found: set[tuple[str, str]] = set()
    watched: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name in names:
            child = module.get_submodule(name)
            original = type(child)
            try:
                child.__class__ = _watching(original, name, found)
            except TypeError:  # a class that cannot be derived from
                continue
            watched.append((child, original))
        yield found
    finally:
        for child, original in watched:
            child.__class__ = original


def _watching(original: type[nn.Module], name: str, found: set[tuple[str, str]]) -> type[nn.Module]:
    def __getattribute__(self: nn.Module, attribute: str) -> Any:
        found.add((name, attribute))
        return original.__getattribute__(self, attribute)

    body = {"__getattribute__": __getattribute__, "__module__": original.__module__, "__slots__": ()}
    return types.new_class(original.__name__, (original,), exec_body=lambda namespace: namespace.update(body))


def settings(module: nn.Module, read: Iterable[tuple[str, str]]) -> Settings:
    """Those of the reads whose value can change, with a snapshot: what is not a method, parameter, buffer or child."""
    found = []
    for name, attribute in sorted(read):
        if attribute in _OWN or attribute.startswith("__"):
            continue
        child = module.get_submodule(name)
        if any(registered.get(attribute) is not None for registered in _registries(child)):
            continue
        on_class = inspect.getattr_static(type(child), attribute, None)
        if attribute not in vars(child) and hasattr(on_class, "__get__"):
            continue
        found.append((name, attribute, snapshot(child, attribute)))
    return tuple(found)


def _registries(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def snapshot(module: nn.Module, attribute: str) -> Any:
    """The value of an attribute; what has no plain value is represented by its type, and ``_modules`` by its names."""
    if attribute == "_modules":
        return tuple(module._modules)
    return _plain(getattr(module, attribute, _MISSING))


def _plain(value: Any) -> Any:
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items())
    if isinstance(value, functools.partial):
        return value.func, _plain(value.args), _plain(value.keywords)
    if isinstance(value, types.MethodType):
        return value.__func__
    return type(value)


def changed(module: nn.Module, taken: Settings) -> list[str]:
    """The attributes that differ from their snapshots."""
    return [
        f"{name}.{attribute}" if name else attribute
        for name, attribute, value in taken
        if snapshot(module.get_submodule(name), attribute) != value
    ]


def shake(module: nn.Module, names: Iterable[str], uniform: Callable[[Tensor], Tensor]) -> None:
    """Gives other values to the tensors of the descendants that are no parameters: a temperature of 1 in a buffer, or a
    mask without an entry, has no effect until it is set."""
    for name in names:
        child = module.get_submodule(name)
        for tensor in (*child._buffers.values(), *vars(child).values()):
            if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
                continue
            if tensor.is_floating_point():
                tensor.copy_(uniform(tensor) + 0.5)
            elif tensor.dtype == torch.bool:
                tensor.copy_(uniform(tensor) < 0.5)
