"""How the Python side of an operator is described and registered."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from .._backend import DIRECT
from .._inductor import registering
from .._transforms import FUNCTIONS, has_tangent, in_dual_level, under_transform
from ._direct import direct_backward, direct_forward
from ._memory_format import like_inputs


@dataclass(frozen=True)
class Operator:
    """What PyTorch needs besides the kernels for an operator and for its gradient, ``<name>_backward``.

    Attributes:
        name: of the operator, without the namespace.
        fake: checks the arguments and allocates the results; for meta and fake tensors.
        fake_backward: the same for ``<name>_backward``.
        setup_context: saves for the backward pass, as ``torch.library.register_autograd`` takes it.
        backward: the gradients, from the operator ``<name>_backward``, the context and the gradient of each result.
        flops: FLOP of a call, two for a multiply-add, from the shapes of its tensor arguments in order.
        flops_backward: the same for ``<name>_backward``, with its ``needs_input_grad`` by keyword.
        jvp: the tangents of the results, from a namespace of operators, the arguments and the tangent of each. Without
            it, forward mode is refused.
        backward_jvp: the same for ``<name>_backward``.
        double_backward: the gradients for the arguments of ``<name>_backward``, from a namespace of operators, these
            arguments, the gradient of each result, and which are wanted. Without it, a gradient of the gradient is
            refused.
        adjust_vmap: from the arguments with the mapped dimensions folded into the batch, those of the call. None if
            they are the same.
    """

    name: str
    fake: Callable[..., Any]
    fake_backward: Callable[..., Any]
    setup_context: Callable[[Any, Any, Any], None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    flops: Callable[..., int]
    flops_backward: Callable[..., int]
    jvp: Callable[..., Any] | None = None
    backward_jvp: Callable[..., list[Tensor | None]] | None = None
    double_backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    adjust_vmap: Callable[..., tuple[Any, ...]] | None = None


class _ReverseMode(Library):
    """A fragment of a namespace whose autograd rules refuse forward mode. The rules that torch.library makes call the
    kernel and drop the tangents, so that the result has the derivative 0."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        def refusing(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
            if in_dual_level() and has_tangent(*arguments):
                raise NotImplementedError(
                    f"{op_name}: the operator has no forward-mode derivative; call the function of segattn_ops instead "
                    "(around a compiled function, put the transform inside of it)"
                )
            return fn(keyset, *arguments, **keywords)

        super().impl(op_name, refusing, dispatch_key, **options)  # type: ignore[no-untyped-call]


_libraries: list[Library] = []  # a Library that is collected takes its registrations away


def register(namespace: str, operators: Iterable[Operator]) -> None:
    """Registers fake, autograd, vmap and FLOP rules of the operators and of their gradients in a namespace, and makes
    the functions for transforms."""
    packets = getattr(torch.ops, namespace)
    direct = DIRECT[namespace] = SimpleNamespace()
    functions = FUNCTIONS[namespace] = SimpleNamespace()
    library = _ReverseMode(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for operator in operators:
        backward_name = f"{operator.name}_backward"
        forward, backward = getattr(packets, operator.name), getattr(packets, backward_name)
        torch.library.register_fake(f"{namespace}::{operator.name}", registering(forward.default, operator.fake))
        torch.library.register_fake(f"{namespace}::{backward_name}", operator.fake_backward)
        rules = _Rules(operator, packets, functions)
        for name, setup_context, rule in (
            (operator.name, operator.setup_context, rules.backward),
            (backward_name, rules.setup_double_backward, rules.double_backward),
        ):
            torch.library.register_autograd(f"{namespace}::{name}", rule, setup_context=setup_context, lib=library)
        _register_vmap(f"{namespace}::{operator.name}", forward, operator.adjust_vmap)
        _register_vmap(f"{namespace}::{backward_name}", backward)
        setattr(functions, operator.name, _with_defaults(rules.function(forward), forward))
        setattr(functions, backward_name, _with_defaults(rules.function_of_backward(backward), backward))
        _register_flops(forward, operator.flops)
        _register_flops(backward, operator.flops_backward)
        gradient = direct_backward(backward.default, getattr(functions, backward_name))
        setattr(direct, backward_name, gradient)
        rule = _rule_of(operator, gradient)
        setattr(direct, operator.name, direct_forward(forward.default, operator.setup_context, rule))


def _rule_of(operator: Operator, gradient: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward rule with this gradient operator. A function, because compiled autograd traces no `partial`."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return operator.backward(gradient, ctx, *gradients)

    return backward


class _Rules:
    """The derivatives of an operator and of its `*_backward`: as rules of the operators, and as Functions.

    Args:
        operator: the description.
        packets: the operators of the namespace.
        functions: their twins.
    """

    def __init__(self, operator: Operator, packets: Any, functions: SimpleNamespace) -> None:
        self._operator, self._packets, self._functions = operator, packets, functions

    def _current(self) -> Any:
        """The namespace to call."""
        return self._functions if under_transform() else self._packets

    def backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = getattr(self._current(), f"{self._operator.name}_backward")
        return self._operator.backward(gradient, ctx, *gradients)

    @staticmethod
    def setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        ctx.constants = _constants(inputs)
        ctx.save_for_backward(*_tensors(inputs))
        ctx.mark_non_differentiable(*(g for g, needed in zip(output, _mask(inputs), strict=True) if not needed))
        ctx.set_materialize_grads(False)

    def double_backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in gradients):
            return (None,) * len(ctx.constants)
        arguments = _merged(ctx.saved_tensors, ctx.constants)
        if self._operator.double_backward is None:
            raise NotImplementedError(f"{self._operator.name}_backward: the operator has no second derivative")
        return self._operator.double_backward(self._current(), arguments, gradients, ctx.needs_input_grad)

    def function(self, packet: Any) -> Any:
        """The operator as a Function."""
        operator, rules = self._operator, self

        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return packet(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                operator.setup_context(ctx, inputs, output)
                ctx.set_materialize_grads(False)
                ctx.constants = _constants(inputs)
                ctx.save_for_forward(*_tensors(inputs))

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
                return rules.backward(ctx, *gradients)

            @staticmethod
            def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
                if operator.jvp is None:
                    raise NotImplementedError(f"{operator.name}: the operator has no forward-mode derivative")
                with forward_ad._set_fwd_grad_enabled(True):
                    return operator.jvp(rules._current(), _primals(ctx), tangents)

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
                return rules._vmap(operator.name, operator.adjust_vmap, info, in_dims, arguments)

        return Forward

    def function_of_backward(self, packet: Any) -> Any:
        """The operator `*_backward` as a Function."""
        operator, rules = self._operator, self

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return tuple(packet(*arguments))

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
                rules.setup_double_backward(ctx, inputs, output)
                ctx.save_for_forward(*_tensors(inputs))

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
                return rules.double_backward(ctx, *gradients)

            @staticmethod
            def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
                if operator.backward_jvp is None:
                    raise NotImplementedError(f"{operator.name}_backward: the operator has no forward-mode derivative")
                with forward_ad._set_fwd_grad_enabled(True):
                    return tuple(operator.backward_jvp(rules._current(), _primals(ctx), tangents))

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
                return rules._vmap(f"{operator.name}_backward", None, info, in_dims, arguments)

        return Backward

    def _vmap(
        self,
        name: str,
        adjust: Callable[..., tuple[Any, ...]] | None,
        info: Any,
        in_dims: tuple[Any, ...],
        arguments: tuple[Any, ...],
    ) -> tuple[Any, Any]:
        return apply_to_batch(getattr(self._current(), name), adjust, info.batch_size, in_dims, arguments)


def _with_defaults(function: Any, packet: Any) -> Callable[..., Any]:
    """A Function as the operator's twin: trailing arguments that are not given have the schema's defaults."""
    defaults = [argument.default_value for argument in packet.default._schema.arguments]

    def call(*arguments: Any) -> Any:
        return function.apply(*arguments, *defaults[len(arguments) :])

    return call


def _constants(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if isinstance(a, Tensor) else a for a in arguments)


def _tensors(arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    return tuple(a if isinstance(a, Tensor) else None for a in arguments)


def _merged(tensors: Sequence[Tensor | None], constants: Sequence[Any]) -> list[Any]:
    """The inverse of `_tensors` and `_constants` together."""
    return [c if t is None else t for t, c in zip(tensors, constants, strict=True)]


def _primals(ctx: Any) -> list[Any]:
    """The arguments of a Function in its jvp, without the tangents of this level. Those of outer levels stay, and are
    differentiated in turn once forward mode, which PyTorch turns off for a jvp, is on."""
    tensors = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
    return _merged(tensors, ctx.constants)


def _mask(arguments: Sequence[Any]) -> Sequence[bool]:
    """needs_input_grad, the only sequence among the arguments of a backward operator."""
    mask: Sequence[bool] = next(a for a in arguments if isinstance(a, (list, tuple)))
    return mask


def empty_gradients(inputs: Sequence[Tensor], needs_input_grad: Sequence[bool]) -> list[Tensor]:
    """What a backward operator returns, uninitialised: contiguous gradients of the inputs, of shape (0,) for those that
    are not wanted."""
    return [t.new_empty(t.shape if needed else (0,)) for t, needed in zip(inputs, needs_input_grad, strict=True)]


def wanted(
    gradients: Sequence[Tensor], needs_input_grad: Sequence[bool], feature_maps: Sequence[Tensor]
) -> list[Tensor | None]:
    """The results of a backward operator as autograd takes them: None for those that are not wanted, and the first ones
    in the memory formats of the feature maps that they are the gradients of."""
    results: list[Tensor | None] = [
        g if needed else None for g, needed in zip(gradients, needs_input_grad, strict=True)
    ]
    for i, feature_map in enumerate(feature_maps):
        if feature_map.stride(1) == 1 and needs_input_grad[i]:
            results[i] = like_inputs(gradients[i], feature_map)
    return results


def channels_of_products(energy: int, values: int, needs_input_grad: Sequence[bool]) -> int:
    """The channels over which the backward of an attention multiplies each query with each key: for the energies and
    the gradients of query and key `energy` each, for the gradients of the weights and of the values `values` each."""
    query, key, value = needs_input_grad
    if not any(needs_input_grad):
        return 0
    return energy * (1 + query + key) + values * ((query or key) + value)


def fold_into_batch(batch_size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments of a function of independent samples with the dimension that vmap maps folded into the batch."""

    def fold(argument: Any, dim: int | None) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        mapped = argument.movedim(dim, 0) if dim is not None else argument.expand(batch_size, *argument.shape)
        return mapped.flatten(0, 1)

    return [fold(argument, dim) for argument, dim in zip(arguments, in_dims, strict=True)]


def apply_to_batch(
    function: Callable[..., Any],
    adjust: Callable[..., tuple[Any, ...]] | None,
    batch_size: int,
    in_dims: tuple[Any, ...],
    arguments: tuple[Any, ...],
) -> tuple[Any, Any]:
    """The vmap rule of a function of independent samples: results, and the mapped dimension of each."""
    folded = fold_into_batch(batch_size, in_dims, arguments)
    result = function(*(folded if adjust is None else adjust(*folded)))
    if isinstance(result, Tensor):
        return result.unflatten(0, (batch_size, -1)), 0
    return tuple(r.unflatten(0, (batch_size, -1)) for r in result), (0,) * len(result)


def _register_vmap(name: str, packet: Any, adjust: Callable[..., tuple[Any, ...]] | None = None) -> None:
    """Samples are independent in every operator, so a mapped dimension is folded into the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return apply_to_batch(packet, adjust, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(name, rule)


def _is_mask(argument: Sequence[Any]) -> bool:
    return len(argument) > 0 and all(isinstance(entry, bool) for entry in argument)


def _register_flops(packet: Any, formula: Callable[..., int]) -> None:
    def of_shapes(*arguments: Any, out_shape: Any = None, **kwargs: Any) -> int:
        lists = [a for a in arguments if isinstance(a, (tuple, list, torch.Size))]
        shapes = [a for a in lists if not _is_mask(a)]
        masks = [a for a in lists if _is_mask(a)]
        return formula(*shapes, **({"needs_input_grad": masks[0]} if masks else {}))

    register_flop_formula(packet)(of_shapes)
