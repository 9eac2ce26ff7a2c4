"""Models whose feature maps are sharded over the ranks of a mesh."""

import zlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from ._agreement import agree, describe, in_step, tell
from ._collectives import all_reduce
from ._tensors import is_dtensor
from .criss_cross import extents
from .spatial_map import Lineage, SpatialMap, mapped, maps_in, part_of, refuse_compilation

# Rules register themselves.
from . import spatial_attention, spatial_layers, spatial_norms, spatial_pointwise  # noqa: F401  isort: skip

_OP = "distributed.spatially_parallel"
Model = TypeVar("Model", bound=nn.Module)


def spatially_parallel(model: Model, mesh: DeviceMesh) -> Model:
    """Makes a model take and return parts of feature maps: each rank of the mesh calls it with its part of the images
    and gets its part of the results, which are those of one process with whole images.

    Within the model's forward pass a map is a tensor with the shape of the whole map, of which a rank holds its part.
    Convolutions, poolings and resampling get the rows and columns that they need from the ranks that hold them; norms
    and global poolings take statistics over all ranks; attention is that of this module. What works on each position
    by itself runs on the part. Any other function is refused.

    A gradient of a parameter is this rank's part of it: the sum over the ranks is the gradient of one process for a
    loss that is the sum of the ranks' losses. See :func:`reduce_gradients`. The backward pass communicates: each rank's
    loss must be of the same results, with weight 0 where one does not count.

    Args:
        model: its parameters and submodules stay as they are; forward hooks are added to it.
        mesh: of one dimension, over which the rows of all maps are sharded, or of two, over which rows and columns are.

    Returns:
        The model. Each tensor of four dimensions among its arguments is a rank's part of a map, of any height and
        width, perhaps 0; other tensors are the same on each rank. Of its results, maps are this rank's parts: a map of
        the height and width of an argument is sharded like it, any other one in proportion. Results that are no maps,
        as global poolings, are the same on each rank, and so must be the gradient that comes back for them.

    Raises:
        TypeError: for a model that is not a module, or a mesh that is not a DeviceMesh.
        ValueError: for a mesh of three dimensions or more.
        NotImplementedError: when the model is called, for a function that has no rule for parts; names it and the
            module that calls it. A ``torch.nn.SyncBatchNorm`` is refused at once.
        RuntimeError: when the model is called, for parts that do not form a map, and within torch.compile.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a module (got {type(model).__name__})")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{_OP}: mesh must be a torch.distributed.DeviceMesh (got {type(mesh).__name__})")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"{_OP}: mesh must have 1 or 2 dimensions (got {mesh.ndim}: {list(mesh.shape)})")
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise NotImplementedError(
                f"{_OP}: {name or 'the model'} is a SyncBatchNorm, which knows no parts of maps; use BatchNorm2d, "
                "whose statistics are those of all ranks of the mesh"
            )
    for hooks, with_kwargs in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, model._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key], with_kwargs[key]
    model.register_forward_pre_hook(_Enter(mesh), with_kwargs=True)
    model.register_forward_hook(_Leave(mesh), with_kwargs=True)
    return model


class _Hook:
    """Copies of the model share it, and so the mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return self


class _Enter(_Hook):
    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        refuse_compilation()
        if maps_in(*args, kwargs):  # within another spatially parallel model
            return None
        tensors: list[Tensor] = []
        mapped(lambda a: tensors.append(a) if isinstance(a, Tensor) else None, [*args, *kwargs.values()])
        maps = [t for t in tensors if t.dim() == 4]
        if not maps:
            error = RuntimeError(f"{_OP}: the model must be called with a tensor (B, C, H, W) (got none)")
            tell(_OP, self.mesh, error)
            raise error
        described = describe(**{f"input {number}": t for number, t in enumerate(maps)})
        kind = self.mesh.device_type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        options = (("training", model.training), ("grad_enabled", torch.is_grad_enabled()), ("autocast", autocast))
        space, shapes = agree(_OP, self.mesh, described, options, _no_check)
        parts = [extents(_OP, space, [of_rank[number][2:] for of_rank in shapes]) for number in range(len(maps))]
        lineage = Lineage(self.mesh, space, model)
        of_map = {id(t): lineage.add(p) for t, p in zip(maps, parts, strict=True)}

        def entered(argument: Any) -> Any:
            if id(argument) in of_map:
                return SpatialMap(argument, lineage, of_map[id(argument)], (-2, -1))
            if isinstance(argument, Tensor) and argument.is_floating_point():
                return SpatialMap(argument, lineage, parts[0], ())
            return argument

        return mapped(entered, args), mapped(entered, kwargs)


def _no_check(**_: Any) -> None:
    """Any shapes, dtypes and options; that they fit together is checked by `agree`."""


class _Leave(_Hook):
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        maps = maps_in(*args, kwargs)
        if not maps or maps[0].lineage.root() is not model:
            return output
        group = maps[0].lineage.space.whole
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if isinstance(buffer, SpatialMap) and not buffer.is_sharded:  # statistics of maps
                    module._buffers[name] = part_of(buffer)

        def left(value: Any) -> Any:
            if isinstance(value, SpatialMap) and value.is_sharded:
                return part_of(value)
            if isinstance(value, Tensor) and value.requires_grad:
                return _SameOnEachRank.apply(part_of(value), group.index == 0)
            return part_of(value)

        results = pytree.tree_map_only(Tensor, left, output, is_leaf=lambda value: isinstance(value, SpatialMap))
        maps[0].lineage.is_over = True
        return results


class _SameOnEachRank(torch.autograd.Function):
    """A result that is the same on each rank, and whose gradient is. The gradients of a parameter are summed over the
    ranks, so the first rank's alone is passed on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, is_first: bool) -> Tensor:
        ctx.is_first = is_first
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient if ctx.is_first else torch.zeros_like(gradient), None


def reduce_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sums the gradients of a model's parameters over the ranks of a mesh, in place: after the backward pass of a
    spatially parallel model they are those of one process, the same bits on each rank.

    Not for a model in DistributedDataParallel or FSDP over these ranks, which average the gradients themselves:
    multiply the loss by ``mesh.size()`` there.

    Args:
        model: of whose parameters the same have gradients on each rank.
        mesh: as of :func:`spatially_parallel`.

    Raises:
        TypeError: for gradients that are DTensors, as FSDP2's.
        RuntimeError: if the gradients of the ranks differ in name, shape or dtype; if communication fails.
    """
    op = "distributed.reduce_gradients"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        if is_dtensor(gradient):
            raise TypeError(f"{op}: the gradient of {name} must not be a DTensor; FSDP2 reduces its own")
    device = next(iter(gradients.values())).device if gradients else torch.device(mesh.device_type)
    named = [(name, tuple(g.shape), str(g.dtype)) for name, g in gradients.items()]
    summary = torch.tensor([len(named), zlib.crc32(repr(named).encode())], device=device)
    space, _ = agree(op, mesh, describe(gradients=summary), (("count and checksum", summary.tolist()),), _no_check)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients.values():
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    with torch.no_grad(), in_step(op, space.whole):
        for of_dtype in by_dtype.values():
            total = all_reduce(op, space.whole, torch.cat([g.flatten() for g in of_dtype]))
            for gradient, part in zip(of_dtype, total.split([g.numel() for g in of_dtype]), strict=True):
                gradient.copy_(part.view(gradient.shape))
