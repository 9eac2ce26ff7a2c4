"""How the Python side of an operator is described and registered."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from .._backend import DIRECT
from .._forward_mode import has_tangent, in_dual_level
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
    adjust_vmap: Callable[..., tuple[Any, ...]] | None = None


class _ReverseMode(Library):
    """A fragment of a namespace whose autograd rules refuse forward mode. The rules that torch.library makes call the
    kernel and drop the tangents, so that the result has the derivative 0."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        def refusing(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
            if in_dual_level() and has_tangent(*arguments):
                raise NotImplementedError(
                    f"{op_name}: the fused kernels have no forward-mode derivative; call the function of segattn_ops, "
                    "not compiled before, which takes the plain PyTorch reference for it"
                )
            return fn(keyset, *arguments, **keywords)

        super().impl(op_name, refusing, dispatch_key, **options)  # type: ignore[no-untyped-call]


_libraries: list[Library] = []  # a Library that is collected takes its registrations away


def register(namespace: str, operators: Iterable[Operator]) -> None:
    """Registers fake, autograd, vmap and FLOP rules of the operators and of their gradients in a namespace."""
    packets = getattr(torch.ops, namespace)
    direct = DIRECT[namespace] = SimpleNamespace()
    library = _ReverseMode(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for operator in operators:
        forward, backward = getattr(packets, operator.name), getattr(packets, f"{operator.name}_backward")
        name, backward_name = f"{namespace}::{operator.name}", f"{namespace}::{operator.name}_backward"
        torch.library.register_fake(name, operator.fake)
        torch.library.register_fake(backward_name, operator.fake_backward)
        _register_autograd(library, name, operator, backward)
        _register_once_differentiable(library, backward_name)
        _register_vmap(name, forward, operator.adjust_vmap)
        _register_vmap(backward_name, backward)
        _register_flops(forward, operator.flops)
        _register_flops(backward, operator.flops_backward)
        rule = partial(operator.backward, direct_backward(backward.default))
        setattr(direct, operator.name, direct_forward(forward.default, operator.setup_context, rule))


def _register_autograd(library: Library, name: str, operator: Operator, backward_packet: Any) -> None:
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return operator.backward(backward_packet, ctx, *gradients)

    torch.library.register_autograd(name, backward, setup_context=operator.setup_context, lib=library)


def _register_once_differentiable(library: Library, name: str) -> None:
    """Makes the backward of a `*_backward` operator raise, with the remedy."""
    unqualified = name.split("::")[1]

    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise RuntimeError(
            f"{unqualified}: the fused kernels are differentiable once; "
            'compute under segattn_ops.use_backend("reference") for second derivatives'
        )

    torch.library.register_autograd(name, backward, lib=library)


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


def _register_vmap(name: str, packet: Any, adjust: Callable[..., tuple[Any, ...]] | None = None) -> None:
    """Samples are independent in every operator, so a mapped dimension is folded into the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        folded = fold_into_batch(info.batch_size, in_dims, arguments)
        result = packet(*(folded if adjust is None else adjust(*folded)))
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in result), (0,) * len(result)

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
