"""The tensors of a call: plain local shards, or DTensors."""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def is_dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shards(
    op: str, mesh: DeviceMesh | None, **tensors: Tensor | None
) -> tuple[DeviceMesh, dict[str, Any], Callable[[Tensor], Tensor]]:
    """
    Args:
        op: named in errors.
        mesh: as the op got it; None for that of the DTensors.
        tensors: feature maps (B, channels, *S) by name, the first one that of the result's placements.

    Returns:
        The mesh of space, the local tensors, and a function that makes a local result (B, channels, *S) what the
        inputs are.

    Raises:
        TypeError: for DTensors beside plain tensors, and for plain tensors without a mesh.
        RuntimeError: for DTensors on different meshes or with different placements, and for placements that are not
            those of a map whose height, or height and width, are sharded.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    kinds = {is_dtensor(tensor) for tensor in given.values()}
    if kinds == {False}:
        if mesh is None:
            raise TypeError(f"{op}: mesh must be given for plain tensors (got None)")
        return mesh, dict(tensors), lambda result: result
    if kinds == {True, False}:
        names = [name for name, tensor in given.items() if not is_dtensor(tensor)]
        raise TypeError(f"{op}: the tensors must be DTensors or plain tensors, not both (plain: {', '.join(names)})")
    like: Any = next(iter(given.values()))
    for name, tensor in given.items():
        other: Any = tensor
        if other.device_mesh != like.device_mesh or other.placements != like.placements:
            raise RuntimeError(
                f"{op}: {name} must be placed as the first tensor, {like.placements} on {like.device_mesh} (got "
                f"{other.placements} on {other.device_mesh})"
            )
    found = _mesh_of_space(op, like)
    if mesh is not None and mesh != found:
        raise RuntimeError(f"{op}: mesh must be that on which the DTensors are sharded, {found} (got {mesh})")
    local = {name: None if t is None else cast(Any, t).to_local() for name, t in tensors.items()}
    return found, local, lambda result: _wrapped(result, like)


def _mesh_of_space(op: str, like: Any) -> DeviceMesh:
    """The dimensions of the mesh that shard the spatial dimensions, which come in their order, 2 then 3. The others
    hold samples or copies."""
    mesh, placements = like.device_mesh, like.placements
    dims = [dim for dim, placement in enumerate(placements) if placement.is_shard() and placement.dim >= 2]
    sharded = [placements[dim].dim for dim in dims]
    others = [p for dim, p in enumerate(placements) if dim not in dims]
    if sharded not in ([2], [2, 3]) or not all(p.is_replicate() or p.is_shard(0) for p in others):
        raise RuntimeError(
            f"{op}: the DTensors must have Shard(2), or Shard(2) and Shard(3) in this order, on the dimensions of the "
            f"mesh that are space, and Shard(0) or Replicate() on the others (got {placements})"
        )
    if len(dims) == mesh.ndim:
        found: DeviceMesh = mesh
        return found
    if mesh.mesh_dim_names is None:
        raise RuntimeError(f"{op}: a mesh of space and other dimensions must have mesh_dim_names (got none)")
    part: DeviceMesh = mesh[tuple(mesh.mesh_dim_names[dim] for dim in dims)]
    return part


def _wrapped(result: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], result.shape[1], *like.shape[2:]))
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(size, 1))
    return DTensor.from_local(
        result, like.device_mesh, like.placements, run_check=False, shape=shape, stride=tuple(stride)
    )
