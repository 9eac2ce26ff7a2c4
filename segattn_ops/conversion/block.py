"""The base of converted blocks, and how a block of the user's model becomes one."""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .scripting import scriptable
from .settings import Settings, changed

_PACKAGE = f"{__name__.partition('.')[0]}."
_GENERATED: dict[tuple[type[nn.Module], type[nn.Module]], Any] = {}  # the classes made so far


@dataclass(frozen=True)
class Traits:
    """What the check of a block found out about its original.

    Attributes:
        inputs: number of feature maps that the fused forward takes.
        ranks: numbers of dimensions of an input, on which the two forwards agree.
        original_ranks: those on which only the original's forward is right.
        original_in_training: whether the original does something in training that the fused forward does not.
        original_in_autocast: whether the original disables autocast, or returns another dtype under it.
        parameters: name and default of every parameter of the original's forward, in order.
        positional: how many of them can be given by position.
        bypassed: name and class of the descendants that the fused forward does not call.
        settings: the attributes that the original's forward reads, as they were.
    """

    inputs: int
    ranks: frozenset[int]
    original_ranks: frozenset[int] = frozenset()
    original_in_training: bool = False
    original_in_autocast: bool = False
    parameters: tuple[tuple[str, Any], ...] = ()
    positional: int = 0
    bypassed: tuple[tuple[str, type[nn.Module]], ...] = ()
    settings: Settings = ()


class FusedBlock(nn.Module):
    """A block of the user's model with its forward replaced: the base of the classes that :func:`fuse` generates.

    A generated class derives from a subclass of this one and from the block's own class, so that ``isinstance``, the
    original's methods, properties and class attributes, and its own forward stay available. The object, its parameters,
    children, hooks and attributes are the original's.

    The original's forward runs for whatever the fused one cannot do: other arguments than the feature maps, what the
    original does only in training, attributes that it reads and that have changed, and hooks, active dropout and a
    replacement on children that the fused forward does not call.

    Raises:
        ValueError: for an input of a rank that the original does not take.
    """

    fused_kind = ""
    _original_class: type[nn.Module]
    _fused_names: Mapping[str, str]
    _fused_options: Mapping[str, Any]
    _fused_traits: Traits  # None for a block that was not converted but made from a generated class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._fused_traits is None:  # made by the original's own code, as type(self)(...)
            return self._original_class.forward(self, *args, **kwargs)
        inputs = self._fused_inputs(args, kwargs)
        if inputs is None or self._fused_needs_original():
            return self._original_class.forward(self, *args, **kwargs)
        for x in inputs:
            if isinstance(x, Tensor) and x.dim() not in self._fused_traits.ranks:
                if x.dim() in self._fused_traits.original_ranks:
                    return self._original_class.forward(self, *args, **kwargs)
                expected = " or ".join(str(rank) for rank in sorted(self._fused_traits.ranks))
                rule = f"must have {expected} dimensions (batch, channels, *spatial)"
                raise ValueError(f"{self._original_class.__name__}: input {rule} (got shape {tuple(x.shape)})")
        return self.fused_forward(*inputs)

    def fused_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The result of the original's forward for these feature maps."""
        raise NotImplementedError

    def _fused_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The feature maps of a call; None for a call with anything else that is not its default."""
        traits = self._fused_traits
        if not kwargs and len(args) == traits.inputs:
            return None if any(x is None for x in args) else args
        if len(args) > traits.positional:
            return None
        given: dict[str, Any] = {}
        for (name, _), value in zip(traits.parameters, args, strict=False):
            given[name] = value
        defaults = dict(traits.parameters)
        for name, value in kwargs.items():
            if name in given or name not in defaults:
                return None
            given[name] = value
        inputs = []
        for n, (name, default) in enumerate(traits.parameters):
            if n < traits.inputs:
                if given.get(name) is None:
                    return None
                inputs.append(given[name])
            elif name in given and not _is_default(given[name], default):
                return None
        return tuple(inputs) if len(inputs) == traits.inputs else None

    def _fused_needs_original(self) -> bool:
        if self.training and self._fused_traits.original_in_training:
            return True
        if self._fused_traits.original_in_autocast:
            parameter = next(self.parameters())
            if torch.is_autocast_enabled(parameter.device.type):
                return True
        for name, kind in self._fused_traits.bypassed:
            child = self.get_submodule(name)
            if type(child) is not kind or has_hooks(child) or (child.training and drops(child)):
                return True
        return bool(changed(self, self._fused_traits.settings))

    def _fused_drops(self) -> bool:
        """Whether training drops something that the fused forward does not."""
        return any(drops(self.get_submodule(name)) for name, _ in self._fused_traits.bypassed)

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script.

        Raises:
            RuntimeError: for a block that cannot be scripted; torch.jit.trace and torch.export take every block.
        """
        body = self._fused_script()
        replaced = [
            name
            for name, kind in self._fused_traits.bypassed
            if type(self.get_submodule(name)) is not kind or has_hooks(self.get_submodule(name))
        ]
        other = changed(self, self._fused_traits.settings)
        if body is None or replaced or other:
            reason = "it has no scriptable form"
            if replaced:
                reason = f"{', '.join(replaced)} has a hook or was replaced"
            elif other:
                reason = f"{', '.join(other)} has changed since the conversion"
            raise RuntimeError(f"{self._original_class.__name__}: {reason}; use torch.jit.trace or torch.export")
        return scriptable(self, body, ["x", "y"][: self._fused_traits.inputs])

    def _fused_script(self) -> list[str] | None:
        """The lines of a scriptable forward; None if there is none."""
        return None

    def _fused_layer(self, role: str) -> str:
        return f"self.{self._fused_names[role]}"

    def _fused_script_residual(self) -> str:
        gamma = self._fused_layer("gamma")
        is_module = isinstance(getattr(self, self._fused_names["gamma"]), nn.Module)
        return f"return {gamma}(attended) + x" if is_module else f"return {gamma} * attended + x"

    def _fused_script_of(self, function: str) -> list[str]:
        query, key, value = (self._fused_layer(role) for role in ("query", "key", "value"))
        attended = f"{function}({query}(x), {key}(x), {value}(x), {self._fused_options['scale']!r})"
        return [f"attended = {attended}", self._fused_script_residual()]

    def _fused_call(self, role: str, *inputs: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(self._fused_names[role])(*inputs)
        return result

    def _fused_residual(self, attended: Tensor, x: Tensor) -> Tensor:
        """x + gamma * attended, gamma a parameter (official) or a module (mmcv's Scale)."""
        gamma = getattr(self, self._fused_names["gamma"])
        scaled: Tensor = gamma(attended) if isinstance(gamma, nn.Module) else gamma * attended
        return scaled + x

    def extra_repr(self) -> str:
        return f"{self.fused_kind} of {self._original_class.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Generated classes have no importable name: pickle and copy.deepcopy generate them again."""
        return _new, (_kind_of(self), self._original_class), self.__getstate__()  # type: ignore[no-untyped-call]


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called when the module is, other than hooks of this package, which watch the ops."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_PACKAGE)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def is_dropout(module: nn.Module) -> bool:
    """Whether the module is a dropout or a drop path."""
    return "drop" in type(module).__name__.lower()


def drops(module: nn.Module) -> bool:
    """Whether the module is one, with a rate other than 0."""
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return is_dropout(module) and (rate is None or rate > 0)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and bool(value == default))


def fuse(block: nn.Module, kind: type[FusedBlock], names: Mapping[str, str], options: Any, traits: Traits) -> None:
    """Replaces the forward of a block in place, by changing its class.

    Args:
        block: any module whose structure fits.
        kind: a class of ``fused.py``.
        names: the block's attribute for each role of the computation.
        options: further settings of the computation.
        traits: see :class:`Traits`.
    """
    generated = generated_class(kind, type(block))
    block.__dict__.update(
        _original_class=type(block), _fused_names=dict(names), _fused_options=dict(options), _fused_traits=traits
    )
    block.__dict__.pop("_compiled_call_impl", None)  # the original's compiled forward, if it was compiled
    block.__class__ = generated


def unfuse(block: nn.Module) -> None:
    """Undoes :func:`fuse`, wherever it was interrupted."""
    original = block.__dict__.pop("_original_class", None)
    for name in ("_fused_names", "_fused_options", "_fused_traits"):
        block.__dict__.pop(name, None)
    if isinstance(block, FusedBlock):
        block.__class__ = original


def generated_class(kind: type[FusedBlock], original: type[nn.Module]) -> type[FusedBlock]:
    """The class of a converted block.

    Raises:
        TypeError: if no class can derive from both, or the original's uses a name that :class:`FusedBlock` needs.
    """
    known: type[FusedBlock] | None = _GENERATED.get((kind, original))
    if known is not None:
        return known
    ours = {name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base)}
    theirs = {name for base in original.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    clash = sorted(
        name for name in ours & theirs if not name.startswith("__") and name not in ("forward", "extra_repr")
    )
    if clash:
        raise TypeError(f"its class defines {', '.join(clash)}, which the replacement defines too")

    @functools.wraps(original.forward)  # the original's signature, for torch.export, torch.fx and help()
    def forward(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        return FusedBlock.forward(self, *args, **kwargs)

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(forward=forward, __module__=__name__, __doc__=original.__doc__)
        namespace.update(_original_class=original, _fused_traits=None)

    generated: type[FusedBlock] = types.new_class(f"Fused{original.__name__}", (kind, original), exec_body=body)
    _GENERATED[kind, original] = generated
    return generated


def _new(kind: type[FusedBlock], original: type[nn.Module]) -> FusedBlock:
    generated = generated_class(kind, original)
    return generated.__new__(generated)


def _kind_of(block: FusedBlock) -> type[FusedBlock]:
    """The class that its generated class was made from."""
    return next(base for base in type(block).__mro__ if "fused_kind" in vars(base))
