"""What the op families share when they register their Python side for an operator namespace."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import has_autocast


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as for a matmul of PyTorch. (A
    registered autocast rule would need one dtype fixed beforehand, where autocast lets the user choose.)"""
    device_type = tensors[0].device.type
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype != torch.float64 and t.is_floating_point() else t for t in tensors)


def register_flops(op, formula) -> None:
    """`formula` takes the shapes of the op's tensors, in order, and returns FLOP, two for a multiply-add."""

    def of_shapes(*shapes, out_shape=None, **kwargs) -> int:
        return formula(*(s for s in shapes if isinstance(s, (tuple, list, torch.Size))))

    register_flop_formula(op)(of_shapes)


def register_vmap(qualified_name: str, adjust: Callable[..., tuple] | None = None) -> None:
    """Samples are independent in every op, so a mapped dimension becomes a part of the batch. ``adjust`` takes the op's
    arguments with the batches folded, and returns those it is called with."""
    op = getattr(torch.ops, qualified_name.split("::")[0])
    op = getattr(op, qualified_name.split("::")[1])

    def rule(info, in_dims, *args):
        def fold(argument, dim):
            if not isinstance(argument, Tensor):
                return argument
            mapped = argument.movedim(dim, 0) if dim is not None else argument.expand(info.batch_size, *argument.shape)
            return mapped.flatten(0, 1)

        folded = [fold(argument, dim) for argument, dim in zip(args, in_dims, strict=True)]
        result = op(*(folded if adjust is None else adjust(*folded)))
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in result), (0,) * len(result)

    torch.library.register_vmap(qualified_name, rule)


def register_once_differentiable(qualified_name: str) -> None:
    """A `*_backward` op has no gradient of its own: asking for one is an error that says what to do instead."""
    name = qualified_name.split("::")[1]

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name}: the fused kernels are differentiable once; "
            'compute under segattn_ops.use_backend("reference") for second derivatives'
        )

    torch.library.register_autograd(qualified_name, backward)
