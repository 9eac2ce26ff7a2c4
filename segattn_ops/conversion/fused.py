"""Replacements of published blocks: the block's own object, children, parameters and names, with a fused forward."""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import _pairwise
from ..ops.channel import channel_attention, residual_channel_attention
from ..ops.criss_cross import criss_cross_attention
from ..ops.position import position_attention
from .scripting import scriptable


@dataclass(frozen=True)
class Traits:
    """What the check of a block found out about its original.

    Attributes:
        inputs: number of feature maps that the fused forward takes.
        ranks: numbers of dimensions of an input, on which the two forwards agree.
        original_ranks: those on which only the original's forward is right.
        original_in_training: whether the original does something in training that the fused forward does not.
        parameters: name and default of every parameter of the original's forward, in order.
        positional: how many of them can be given by position.
        bypassed: names of the descendants that the fused forward does not call.
    """

    inputs: int
    ranks: frozenset[int]
    original_ranks: frozenset[int] = frozenset()
    original_in_training: bool = False
    parameters: tuple[tuple[str, Any], ...] = ()
    positional: int = 0
    bypassed: tuple[str, ...] = ()


class FusedBlock(nn.Module):
    """A block of the user's model with its forward replaced: the base of the classes that :func:`fuse` generates.

    A generated class derives from one of the classes below and from the block's own class, so that ``isinstance``, the
    original's methods, properties and class attributes, and its own forward stay available. The object, its parameters,
    children, hooks and attributes are the original's.

    The original's forward runs for whatever the fused one cannot do: other arguments than the feature maps, what the
    original does only in training, and hooks and active dropout on children that the fused forward does not call.

    Raises:
        ValueError: for an input of a rank that the original does not take.
    """

    fused_kind = ""
    _original_class: type[nn.Module]
    _fused_names: Mapping[str, str]
    _fused_options: Mapping[str, Any]
    _fused_traits: Traits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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

    def fused_forward(self, *inputs: Tensor) -> Tensor:
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
        for name in self._fused_traits.bypassed:
            child = self.get_submodule(name)
            if has_hooks(child) or (child.training and drops(child)):
                return True
        return False

    def _fused_drops(self) -> bool:
        """Whether training drops something that the fused forward does not."""
        return any(drops(self.get_submodule(name)) for name in self._fused_traits.bypassed)

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script.

        Raises:
            RuntimeError: for a block that cannot be scripted; torch.jit.trace and torch.export take every block.
        """
        body = self._script()
        hooked = [name for name in self._fused_traits.bypassed if has_hooks(self.get_submodule(name))]
        if body is None or hooked:
            reason = (
                f"a hook stands on {', '.join(hooked)}" if hooked else f"a {self.fused_kind} has no scriptable form"
            )
            raise RuntimeError(f"{self._original_class.__name__}: {reason}; use torch.jit.trace or torch.export")
        return scriptable(self, body, ["x", "y"][: self._fused_traits.inputs])

    def _script(self) -> list[str] | None:
        """The lines of a scriptable forward; None if there is none."""
        return None

    def _layer(self, role: str) -> str:
        return f"self.{self._fused_names[role]}"

    def _script_residual(self) -> str:
        gamma = getattr(self, self._fused_names["gamma"])
        scaled = (
            f"{self._layer('gamma')}(attended)"
            if isinstance(gamma, nn.Module)
            else f"{self._layer('gamma')} * attended"
        )
        return f"return {scaled} + x"

    def _script_of(self, function: str) -> list[str]:
        query, key, value = (self._layer(role) for role in ("query", "key", "value"))
        attended = f"{function}({query}(x), {key}(x), {value}(x), {self._fused_options['scale']!r})"
        return [f"attended = {attended}", self._script_residual()]

    def _call(self, role: str, *inputs: Tensor) -> Tensor:
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
        return _new, (_kind_of(self), self._original_class), self.__getstate__()


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called when the module is."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def drops(module: nn.Module) -> bool:
    """Whether the module is a dropout or drop path with a rate other than 0."""
    if "drop" not in type(module).__name__.lower():
        return False
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return rate is None or rate > 0


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and bool(value == default))


def fuse(block: nn.Module, kind: type[FusedBlock], names: Mapping[str, str], options: Any, traits: Traits) -> None:
    """Replaces the forward of a block in place, by changing its class.

    Args:
        block: any module whose structure fits.
        kind: one of the classes below.
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


@functools.cache
def generated_class(kind: type[FusedBlock], original: type[nn.Module]) -> type[FusedBlock]:
    """The class of a converted block.

    Raises:
        TypeError: if no class can derive from both, or the original's uses a name that :class:`FusedBlock` needs.
    """
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

    return types.new_class(f"Fused{original.__name__}", (kind, original), exec_body=body)


def _new(kind: type[FusedBlock], original: type[nn.Module]) -> FusedBlock:
    generated = generated_class(kind, original)
    return generated.__new__(generated)


def _kind_of(block: FusedBlock) -> type[FusedBlock]:
    """The class below that the block's generated class derives from."""
    return next(base for base in type(block).__mro__ if base.__module__ == __name__ and "fused_kind" in vars(base))


class FusedPositionAttention(FusedBlock):
    """gamma * softmax_j(scale * q_i . k_j) v_j + x: DANet's PAM and the self-attention of SAGAN. Option: scale."""

    fused_kind = "position attention"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        query, key, value = (self._call(role, x) for role in ("query", "key", "value"))
        return self._fused_residual(position_attention(query, key, value, self._fused_options["scale"]), x)

    def _script(self) -> list[str]:
        return self._script_of("position")


class FusedChannelAttention(FusedBlock):
    """gamma * softmax(scale * E) x + x, E = x x^T: DANet's CAM with scale -1. Option: scale."""

    fused_kind = "channel attention"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> (B, C, *spatial)."""
        gamma, scale = getattr(self, self._fused_names["gamma"]), self._fused_options["scale"]
        if isinstance(gamma, nn.Module):
            return self._fused_residual(channel_attention(x, x, x, scale), x)
        return residual_channel_attention(x, gamma, scale)

    def _script(self) -> list[str]:
        return [f"attended = channel(x, {self._fused_options['scale']!r})", self._script_residual()]


class FusedCrissCrossAttention(FusedBlock):
    """One pass of CCNet's criss-cross attention. Option: scale."""

    fused_kind = "criss-cross attention"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        query, key, value = (self._call(role, x) for role in ("query", "key", "value"))
        return self._fused_residual(criss_cross_attention(query, key, value, self._fused_options["scale"]), x)

    def _script(self) -> list[str]:
        return self._script_of("criss_cross")


class FusedNonLocal(FusedBlock):
    """A non-local block of any mode; options: mode, and scale of the energies."""

    fused_kind = "non-local block"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> x + out(y)."""
        y = self._call("out", self._aggregate(x))
        return (self._call("norm", y) if "norm" in self._fused_names else y) + x

    def _aggregate(self, x: Tensor) -> Tensor:
        mode, scale = self._fused_options["mode"], self._fused_options.get("scale", 1.0)
        g = self._call("value", x)
        if mode == "gaussian":
            return position_attention(x, self._call("key", x) if "key" in self._fused_names else x, g, scale)
        theta, phi = self._call("query", x), self._call("key", x)
        if mode == "embedded_gaussian":
            return position_attention(theta, phi, g, scale)
        theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
        if mode == "dot_product":
            y = _pairwise.dot_product(theta, phi, g)
        else:
            projection = next(self.get_submodule(self._fused_names["projection"]).parameters()).flatten()
            query_weight, key_weight = projection.split(theta.shape[1])
            parts = torch.einsum("ben,e->bn", theta, query_weight), torch.einsum("bem,e->bm", phi, key_weight)
            y = _pairwise.concatenation(*parts, g)
        return y.reshape(x.shape[0], -1, *x.shape[2:])

    def _script(self) -> list[str] | None:
        mode, scale = self._fused_options["mode"], self._fused_options.get("scale", 1.0)
        if mode == "concatenation":
            return None
        query = f"{self._layer('query')}(x)" if "query" in self._fused_names else "x"
        key = f"{self._layer('key')}(x)" if "key" in self._fused_names else "x"
        operands = f"{query}, {key}, {self._layer('value')}(x)"
        attended = f"dot_product({operands})" if mode == "dot_product" else f"position({operands}, {scale!r})"
        result = f"{self._layer('out')}({attended})"
        return [
            f"return {self._layer('norm')}({result}) + x" if "norm" in self._fused_names else f"return {result} + x"
        ]


class FusedAsymmetricAttention(FusedBlock):
    """A stage of ANN: queries at every position, keys and values pooled; options: scale, and the order of the
    arguments."""

    fused_kind = "asymmetric attention"

    def fused_forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """ANN: (x) or (low, high). mmsegmentation: (high, low). -> (B, out, H, W) of high's size."""
        if second is None:
            high = low = first
        else:
            high, low = (first, second) if self._fused_options["query_first"] else (second, first)
        query, key, value = self._call("query", high), self._call("key", low), self._call("value", low)
        pooled = (self._call("pool", key), self._call("pool", value)) if "pool" in self._fused_names else (key, value)
        context = position_attention(query, *pooled, self._fused_options["scale"])
        return self._call("out", context) if "out" in self._fused_names else context

    def _script(self) -> list[str]:
        high, low = ("x", "y") if self._fused_options["query_first"] else ("y", "x")
        if self._fused_traits.inputs == 1:
            high = low = "x"
        key, value = f"{self._layer('key')}({low})", f"{self._layer('value')}({low})"
        if "pool" in self._fused_names:
            key, value = f"{self._layer('pool')}({key})", f"{self._layer('pool')}({value})"
        attended = f"position({self._layer('query')}({high}), {key}, {value}, {self._fused_options['scale']!r})"
        return [f"return {self._layer('out')}({attended})" if "out" in self._fused_names else f"return {attended}"]


class FusedDotProductPosition(FusedBlock):
    """The position branch of External-Attention's DAModule: (B, C, H, W) -> (B, H * W, C)."""

    fused_kind = "position attention (scaled dot product)"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, H * W, C)."""
        y = self._call("in", x).flatten(2).mT  # (B, N, C)
        query, key, value = (self._call(role, y).mT for role in ("query", "key", "value"))
        return self._call("out", position_attention(query, key, value, query.shape[1] ** -0.5).mT)


class FusedDotProductChannel(FusedBlock):
    """The channel branch of External-Attention's DAModule: (B, C, H, W) -> (B, C, H * W)."""

    fused_kind = "channel attention (scaled dot product)"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H * W)."""
        y = self._call("in", x).flatten(2)
        return self._call("out", channel_attention(y, y, y, y.shape[2] ** -0.5))
