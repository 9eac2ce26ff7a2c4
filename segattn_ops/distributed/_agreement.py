"""What the ranks tell each other before an op communicates: shapes, dtypes, options, or an error.

A rank whose arguments are wrong takes part too, and says so: every rank then raises, where the others would wait for it
until the timeout.
"""

import functools
import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._dynamo import constant_in_graphs
from ._collectives import all_gather_bytes
from ._mesh import Group, Space, cache, space_of

# Bytes that a rank sends. Odd: no message of a graph, on a rank that does not compile again, has this size.
_SIZE = 4095
CALL_SIZE = 16  # bytes that a rank sends before the messages of a backward pass

Shapes = tuple[tuple[int, ...], ...]
Function = TypeVar("Function", bound=Callable[..., Any])


class _Started(threading.local):
    """How many agreements this thread started."""

    count = 0


_started = _Started()


class Described(NamedTuple):
    """An argument, by constants that torch.compile passes on."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    requires_grad: bool


def describe(**tensors: Tensor | None) -> tuple[Described, ...]:
    """The arguments that are given. A gradient is required only where gradients are enabled."""
    enabled = torch.is_grad_enabled()
    described = []
    for name, tensor in tensors.items():
        if tensor is not None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(int(size) for size in tensor.shape)
            described.append(Described(name, shape, dtype, str(tensor.device), enabled and tensor.requires_grad))
    return tuple(described)


@constant_in_graphs
def agree(
    op: str,
    mesh: DeviceMesh,
    arguments: tuple[Described, ...],
    options: tuple[tuple[str, Any], ...],
    check: Callable[..., None],
) -> tuple[Space, tuple[Shapes, ...]]:
    """Exchanges the descriptions of a call. A compiled graph contains the outcome of its compilation.

    Args:
        op: named in errors.
        mesh: as the op got it.
        arguments: of this rank.
        options: what must be the same on each rank.
        check: of the arguments of one rank, as tensors of device meta by name, and of the options.

    Returns:
        The space, and the shapes of the arguments on each rank in the order of ``space.whole``.

    Raises:
        TypeError, ValueError, RuntimeError: as `space_of`.
        RuntimeError, TypeError, ValueError: what the check raises; on the other ranks a RuntimeError with its message.
        RuntimeError: if dtype, batch, channels, options or what requires a gradient is another on some rank, and if an
            earlier call on this mesh failed on this rank between its messages.
    """
    _started.count += 1
    space = space_of(op, mesh, torch.device(arguments[0].device).type)
    group = space.whole
    if group.name in cache().failed:
        raise RuntimeError(
            f"{op}: an earlier call on this mesh failed on rank {group.ranks[group.index]} between its messages "
            f"({cache().failed[group.name]}), so its ranks are out of step; make the process groups again"
        )
    error = _error_of(op, arguments, options, check)
    own = {"op": op, "arguments": arguments, "options": options, "error": None if error is None else str(error)}
    if error is None and len(json.dumps(own, default=str)) > _SIZE:
        error = RuntimeError(f"{op}: the call has too many tensors to be described in {_SIZE} bytes")
        own["error"] = str(error)
    device = torch.device(arguments[0].device)
    with in_step(op, group):
        received = all_gather_bytes(op, group, _encoded(own, device))
    everyone = [json.loads(bytes(data.cpu().numpy()).rstrip(b"\0")) for data in received]
    if error is not None:
        raise error
    for rank, other in zip(group.ranks, everyone, strict=True):
        if other["error"] is not None:
            raise RuntimeError(f"{op}: rank {rank} raised an error: {other['error']}")
    first = _compared(everyone[0])
    for rank, other in zip(group.ranks, everyone, strict=True):
        if _compared(other) != first:
            raise RuntimeError(
                f"{op}: the calls of the ranks must be of the same op and options, with tensors of the same dtypes, "
                "batch and channels, of which the same require a gradient (got on rank "
                f"{group.ranks[0]} {_readable(everyone[0])}; on rank {rank} {_readable(other)})"
            )
    shapes = tuple(tuple(tuple(argument[1]) for argument in other["arguments"]) for other in everyone)
    return space, shapes


def tell(op: str, mesh: object, error: Exception) -> None:
    """Takes part in the agreement of the other ranks with an error that this rank raises before it. Without the mesh,
    as with DTensors, they wait."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2) or mesh.get_coordinate() is None:
        return
    group = space_of(op, mesh, mesh.device_type).whole
    if group.name not in cache().failed:
        description = {"op": op, "arguments": (), "options": (), "error": str(error)}
        with in_step(op, group):
            all_gather_bytes(op, group, _encoded(description, torch.device(mesh.device_type)))


def tells_errors(op: str) -> Callable[[Function], Function]:
    """Marks a function with the argument mesh, whose errors before its agreement the other ranks shall know."""

    def decorator(function: Function) -> Function:
        @functools.wraps(function)
        def told(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            started = _started.count
            try:
                return function(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError) as error:
                if _started.count == started:
                    tell(op, kwargs.get("mesh"), error)
                raise

        return cast(Function, told)

    return decorator


def _error_of(
    op: str, arguments: Sequence[Described], options: Sequence[tuple[str, Any]], check: Callable[..., None]
) -> Exception | None:
    device = arguments[0].device
    for argument in arguments[1:]:
        if argument.device != device:
            rule = f"{argument.name} must be on device {device} like {arguments[0].name}"
            return RuntimeError(f"{op}: {rule} (got {argument.device})")
    tensors = {a.name: torch.empty(a.shape, dtype=getattr(torch, a.dtype), device="meta") for a in arguments}
    try:
        check(**tensors, **dict(options))
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    return None


def _encoded(description: dict[str, Any], device: torch.device) -> Tensor:
    text = json.dumps(description, default=str).encode()
    if len(text) > _SIZE:
        error = str(description["error"])[: _SIZE // 8]  # a character is up to 6 bytes
        text = json.dumps({"op": description["op"], "arguments": [], "options": [], "error": error}).encode()
    return torch.frombuffer(bytearray(text.ljust(_SIZE, b"\0")), dtype=torch.uint8).to(device)


def _compared(description: dict[str, Any]) -> Any:
    """All that must be the same: of the sizes batch and channels; a mask has no channels."""
    arguments = [
        (name, len(shape), shape[: 1 if dtype == "bool" else 2], dtype, requires_grad)
        for name, shape, dtype, _, requires_grad in description["arguments"]
    ]
    return description["op"], arguments, description["options"]


def _readable(description: dict[str, Any]) -> str:
    arguments = [
        f"{name} {shape} {dtype}{', which requires a gradient' if requires_grad else ''}"
        for name, shape, dtype, _, requires_grad in description["arguments"]
    ]
    options = [f"{name}={value!r}" for name, value in description["options"]]
    return f"{description['op']}: {'; '.join([*arguments, *options])}"


def number_call(group: Group) -> int:
    """The number of a Function's call among those on the group, the same on each rank."""
    if torch.compiler.is_compiling():
        return 0
    calls = cache().calls
    calls[group.name] = calls.get(group.name, 0) + 1
    return calls[group.name]


def check_call(op: str, group: Group, number: int, device: torch.device) -> None:
    """Before the messages of a backward pass. Ranks whose losses have other terms go backward through their results in
    another order, and messages of the same size would be taken for those of another op.

    Not in graphs. With CUDA the check does not wait for its outcome: PyTorch's assertion on the device raises later.

    Raises:
        RuntimeError: if the ranks are in the backward passes of different calls.
    """
    if torch.compiler.is_compiling() or group.size == 1:
        return
    own = torch.tensor([number, zlib.crc32(op.encode())], device=device)
    received = torch.stack(all_gather_bytes(op, group, own))
    if device.type != "cpu":
        torch._assert_async((received == own).all(), f"{op}: the ranks go backward through different calls")
        return
    for rank, other in zip(group.ranks, received, strict=True):
        if not torch.equal(other, received[0]):
            raise RuntimeError(
                f"{op}: the ranks must go backward through the same calls in the same order (got call "
                f"{int(received[0, 0])} on rank {group.ranks[0]} and call {int(other[0])} on rank {rank}); give each "
                "rank's loss the same terms, with weight 0 where one does not count"
            )


@contextmanager
def in_step(op: str, group: Group) -> Iterator[None]:
    """Around the messages of a call. After a failure among them, messages of this rank could be taken for those of
    another call, so later calls on the group are refused."""
    if torch.compiler.is_compiling():
        yield
        return
    try:
        yield
    except BaseException as error:
        cache().failed[group.name] = f"{op}: {type(error).__name__}"
        raise
