"""The mesh of a sharded feature map: which ranks hold which part, and whether their calls fit together."""

import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Group:
    """The ranks along a dimension of a mesh, or of a whole mesh, in the order of the mesh.

    Attributes:
        name: of the process group.
        index: of this process.
        size: how many they are.
        ranks: the global rank of each.
        order: each one's rank in the process group, which is another number if the mesh permutes the ranks.
    """

    name: str
    index: int
    size: int
    ranks: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """A mesh as the ops use it.

    Attributes:
        shape: of the mesh.
        whole: all its ranks, the last dimension of the mesh fastest.
        along: the ranks of each dimension of the mesh, in whose row or column of the mesh this process is.
    """

    shape: tuple[int, ...]
    whole: Group
    along: tuple[Group, ...]


@dataclass
class _Cache:
    """What is known of the process groups. It keeps none alive: one that outlives ``destroy_process_group`` ends the
    process with an abort at its exit.

    Attributes:
        world: of the group of all ranks when the others were filled.
        spaces: of each mesh.
        groups: those of whole meshes, by device type and ranks.
        failed: the groups, by name, in which a call of this rank failed between its messages.
        calls: how many Functions were called on each group, by name.
    """

    world: Callable[[], Any] = lambda: None
    spaces: dict[DeviceMesh, "Space"] = field(default_factory=dict)
    groups: MutableMapping[tuple[str, tuple[int, ...]], Any] = field(default_factory=weakref.WeakValueDictionary)
    failed: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


_cache = _Cache()


def cache() -> _Cache:
    """The cache, empty again after the process groups were destroyed and made again."""
    global _cache
    world = dist.group.WORLD
    if world is None or _cache.world() is not world:
        _cache = _Cache() if world is None else _Cache(weakref.ref(world))
    return _cache


def space_of(op: str, mesh: DeviceMesh, device_type: str) -> Space:
    """
    Raises:
        TypeError: for a mesh that is not a DeviceMesh.
        ValueError: for a mesh of another number of dimensions than 1 or 2, or without this process.
        RuntimeError: for a mesh of another device type than the tensors.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{op}: mesh must be a torch.distributed.DeviceMesh (got {type(mesh).__name__})")
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"{op}: mesh must have 1 dimension, which splits the height, or 2, which split height and width (got "
            f"{mesh.ndim}: {list(mesh.shape)}); take the dimensions of space from it: mesh['height', 'width']"
        )
    if mesh.device_type != device_type:
        raise RuntimeError(f"{op}: mesh must be of device type {device_type}, as the tensors (got {mesh.device_type})")
    spaces = cache().spaces
    space = spaces.get(mesh)
    if space is None:
        if mesh.get_coordinate() is None:
            raise ValueError(f"{op}: mesh must contain this process, rank {dist.get_rank()} (got {mesh})")
        spaces[mesh] = space = _space(mesh)
    return space


def _space(mesh: DeviceMesh) -> Space:
    coordinate = mesh.get_coordinate() or ()
    along = tuple(_group(mesh.get_group(dim), _ranks_along(mesh, dim), coordinate[dim]) for dim in range(mesh.ndim))
    if mesh.ndim == 1:
        return Space(tuple(mesh.shape), along[0], along)
    ranks = tuple(mesh.mesh.flatten().tolist())
    index = ranks.index(dist.get_rank())
    return Space(tuple(mesh.shape), _group(_whole_group(mesh, ranks), ranks, index), along)


def _ranks_along(mesh: DeviceMesh, dim: int) -> tuple[int, ...]:
    coordinate = list(mesh.get_coordinate() or ())
    index = tuple(slice(None) if d == dim else c for d, c in enumerate(coordinate))
    return tuple(mesh.mesh[index].tolist())


def _whole_group(mesh: DeviceMesh, ranks: tuple[int, ...]) -> Any:
    """A group for all ranks of a mesh of two dimensions, which has none. Only these ranks create it, so that the meshes
    of other replicas need not be in step."""
    part = mesh.get_group(0)
    backend = dist.get_backend(part)
    if len(ranks) == dist.get_world_size() and backend == dist.get_backend():
        return dist.group.WORLD
    groups = cache().groups
    key = mesh.device_type, tuple(sorted(ranks))
    group = groups.get(key)
    if group is None:
        timeout = part._get_backend(torch.device(mesh.device_type)).options._timeout
        groups[key] = group = dist.new_group(list(key[1]), timeout, backend, use_local_synchronization=True)
    return group


def _group(group: Any, ranks: tuple[int, ...], index: int) -> Group:
    in_group = dist.get_process_group_ranks(group)
    return Group(group.group_name, index, len(ranks), ranks, tuple(in_group.index(rank) for rank in ranks))
