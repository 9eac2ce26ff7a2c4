"""A feature map that is sharded over the ranks, as a tensor: it has the shape of the whole map and holds this rank's
part.

Each function of PyTorch that is called with one arrives in ``__torch_function__``. Those with a rule run on the parts;
any other is refused, so that no function can take a part for the whole. Autograd sees the parts only.
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from ._mesh import Group, Space

Handler = Callable[..., Any]
Parts = tuple[int, ...]

HANDLERS: dict[Any, Handler] = {}  # function -> rule, called with the function's arguments
OWN_FUNCTIONS: set[Any] = set()  # functions of the map itself: its shape, dtype, hooks


class Lineage:
    """What the maps of one call of a model share.

    Two maps of the same height are sharded alike: a height that no map had before is sharded in proportion to the map
    that it is computed from.
    """

    def __init__(self, mesh: DeviceMesh, space: Space, root: nn.Module) -> None:
        self.mesh = mesh
        self.space = space
        self.root = weakref.ref(root)
        self.known: tuple[dict[int, Parts], dict[int, Parts]] = ({}, {})
        self.is_over = False  # the model has returned

    def add(self, parts: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
        """Of an argument of the model: maps of its height, or width, are sharded like the first such argument."""
        for known, of_axis in zip(self.known, parts, strict=True):
            known.setdefault(sum(of_axis), of_axis)
        return parts

    def group(self, axis: int) -> Group | None:
        """The ranks along the height (0) or the width (1); None if it is whole."""
        return self.space.along[axis] if axis < len(self.space.along) else None

    def index(self, axis: int) -> int:
        group = self.group(axis)
        return 0 if group is None else group.index

    def parts(self, axis: int, size: int, like: Parts) -> Parts:
        """How a size is sharded. like: how that is which the map is computed from."""
        known = self.known[axis]
        if size not in known:
            total, ends = sum(like), [0]
            for length in like:
                ends.append(ends[-1] + length)
            ends = [(2 * end * size + total) // (2 * total) for end in ends]
            known[size] = tuple(stop - start for start, stop in zip(ends[:-1], ends[1:], strict=True))
        return known[size]


@dataclass(init=False, repr=False, eq=False)  # FSDP2 puts its hooks on the tensors in a dataclass: on the part
class SpatialMap(Tensor):
    """
    Attributes:
        local: this rank's part, with its autograd history.
        lineage: of the model's call.
        parts: the heights and the widths of all ranks' parts; the widths have one entry where rows are whole.
        dims: of height and width from the end, (-2, -1) for (B, C, H, W); one for both where they are flattened; none
            for a tensor that is the same on each rank.
    """

    local: Tensor
    lineage: Lineage
    parts: tuple[Parts, Parts]
    dims: tuple[int, ...]

    @staticmethod
    def __new__(
        cls, local: Tensor, lineage: Lineage, parts: tuple[Parts, Parts], dims: tuple[int, ...]
    ) -> "SpatialMap":
        shape = list(local.shape)
        sizes = [sum(of_axis) for of_axis in parts]
        for dim, size in zip(dims, sizes if len(dims) == 2 else [sizes[0] * sizes[1]], strict=False):
            shape[dim] = size
        with torch._C.DisableTorchFunctionSubclass():
            made: SpatialMap = Tensor._make_wrapper_subclass(
                cls, shape, dtype=local.dtype, device=local.device, layout=local.layout
            )
            made.local, made.lineage, made.parts, made.dims = local, lineage, parts, dims
            made.follow()
        return made

    def follow(self) -> None:
        """Requires a gradient if the part does. A function of torch.autograd.Function that takes the map would see the
        part without its history: it is refused, at once by `part_of`, or when it returns a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.local.requires_grad and not self.requires_grad:
                self.requires_grad_()
                self.register_hook(_no_gradient)  # type: ignore[no-untyped-call]

    @property
    def is_sharded(self) -> bool:
        return bool(self.dims)

    def with_local(self, local: Tensor, dims: tuple[int, ...] | None = None) -> "SpatialMap":
        """Another map with the same parts, or this one if it has this part."""
        if local is self.local and (dims is None or dims == self.dims):
            return self
        return SpatialMap(local, self.lineage, self.parts, self.dims if dims is None else dims)

    def replicated(self, local: Tensor) -> "SpatialMap":
        """A tensor of the same call that is the same on each rank."""
        return SpatialMap(local, self.lineage, self.parts, ())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            kind = f"sharded as {self.parts[0]} x {self.parts[1]}" if self.dims else "the same on each rank"
            return f"SpatialMap({list(self.shape)}, {self.dtype}, {kind})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_compilation()
        if func in OWN_FUNCTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.is_grad_enabled() and func not in _AFTER_THE_CALL:
            _refuse_after_the_call(func, maps_in(*args, kwargs))
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        return on_replicated(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # torch.utils.checkpoint and hooks look at the map, not into it
            return args[0].with_local(args[0].local.detach())
        raise refusal(str(func), [a for a in args if isinstance(a, SpatialMap)])


_AFTER_THE_CALL = {Tensor.detach, Tensor.requires_grad.__get__}  # type: ignore[attr-defined]


def _refuse_after_the_call(func: Any, maps: Sequence["SpatialMap"]) -> None:
    """A loss of a map is the same on each rank, so its gradient would be counted once for each of them. What runs
    again in the backward pass, as a checkpoint, goes on within the model.

    Raises:
        RuntimeError: for maps that have left the model in a hook, an attribute or an object, and require a gradient.
    """
    if any(m.lineage.is_over and m.local.requires_grad for m in maps) and torch._C._current_graph_task_id() < 0:
        raise RuntimeError(
            f"distributed.spatially_parallel: {name_of(func)} is called on a feature map of a model that has returned; "
            "return it from the model, in a tuple, list or dict, or detach it"
        )


def refuse_compilation() -> None:
    """
    Raises:
        RuntimeError: within torch.compile, also where it fell back to eager mode.
    """
    if torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False):
        raise RuntimeError(
            "distributed.spatially_parallel: torch.compile cannot compile a spatially parallel model; call it without "
            "(attention blocks with mesh, and the functions of segattn_ops.distributed, can be compiled)"
        )


def _no_gradient(_: Tensor) -> None:
    raise NotImplementedError(
        "distributed.spatially_parallel: a torch.autograd.Function of the model took a feature map that is sharded "
        "over the ranks; write it with functions of PyTorch"
    )


pytree.register_pytree_node(
    SpatialMap,
    lambda sharded: ([sharded.local], (sharded.lineage, sharded.parts, sharded.dims)),
    lambda children, context: SpatialMap(local, *context) if isinstance(local := [*children][0], Tensor) else local,
)


def _requires_grad(func: Any, sharded: SpatialMap) -> bool:
    if sys._getframe(2).f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
        return False  # it shall look into the dataclass
    with torch._C.DisableTorchFunctionSubclass():
        return sharded.requires_grad


HANDLERS[Tensor.requires_grad.__get__] = _requires_grad  # type: ignore[attr-defined]


def _register_hook(func: Any, sharded: SpatialMap, hook: Callable[[Any], Any]) -> Any:
    """The hook gets the gradient as a map. A rank has only a part of the gradient of a tensor that is the same on each
    rank."""
    if not sharded.is_sharded:
        raise refusal("register_hook", [sharded], "it is the same on each rank, so it has no rule")
    return part_of(sharded).register_hook(lambda gradient: part_of(hook(sharded.with_local(gradient))))


HANDLERS[Tensor.register_hook] = _register_hook


def own_shape(sharded: Tensor) -> torch.Size:
    """The shape of the whole map, or of any tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return sharded.shape


def part_of(argument: Any) -> Any:
    """The part of a map; any other argument as it is."""
    if not isinstance(argument, SpatialMap):
        return argument
    with torch._C.DisableTorchFunctionSubclass():
        if argument.grad_fn is not None:
            _no_gradient(argument)
    return argument.local


def maps_in(*arguments: Any) -> list[SpatialMap]:
    found = []
    for argument in arguments:
        if isinstance(argument, SpatialMap):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += maps_in(*argument)
        elif isinstance(argument, dict):
            found += maps_in(*argument.values())
    return found


def mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """The function of each element of nested lists, tuples and dictionaries."""
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*(mapped(function, a) for a in argument))
    if isinstance(argument, (list, tuple)):
        made = [mapped(function, a) for a in argument]
        return made if isinstance(argument, list) else type(argument)(made) if type(argument) is not tuple else (*made,)
    if isinstance(argument, dict):
        return {key: mapped(function, a) for key, a in argument.items()}
    return function(argument)


def on_replicated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A function without a rule: of tensors that are the same on each rank so is the result, if it is not random."""
    maps = maps_in(*args, kwargs)
    if any(m.is_sharded for m in maps) or name_of(func) in _RANDOM:
        raise refusal(name_of(func), maps)
    return run_on(maps, maps[0].replicated, func, args, kwargs)


def run_on(
    maps: Sequence[SpatialMap],
    wrap: Callable[[Tensor], SpatialMap],
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Runs a function on the parts. A result that is one of them, as that of an in-place function, stays that map."""
    result = func(*mapped(part_of, args), **mapped(part_of, kwargs))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for argument in maps:
            if value is argument.local:
                argument.follow()
                return argument
        return wrap(value)

    return mapped(wrapped, result)


_RANDOM = ("rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "normal_", "uniform_", "exponential_",
           "multinomial", "gumbel_softmax", "rrelu", "rrelu_", "feature_alpha_dropout", "alpha_dropout",
           "fractional_max_pool2d", "random_", "poisson", "cauchy_", "geometric_", "log_normal_")  # fmt: skip


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", name) if name in ("__get__", "__set__") else name


def refusal(function: str, maps: Sequence[SpatialMap], why: str = "it has no rule") -> NotImplementedError:
    """The error for a function that is not exact on parts, with the module that calls it."""
    shapes = ", ".join(str(list(own_shape(m))) for m in maps)
    return NotImplementedError(
        f"distributed.spatially_parallel: {_caller(maps)}calls {function} on a feature map that is sharded over the "
        f"ranks ({shapes}), and {why} for one"
    )


def _caller(maps: Sequence[SpatialMap]) -> str:
    """The innermost module of the model that is running."""
    root = maps[0].lineage.root() if maps else None
    names = {} if root is None else {id(module): name for name, module in root.named_modules()}
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if id(module) in names:
            return f"{names[id(module)] or 'the model'} ({type(module).__name__}) "
        frame = frame.f_back
    return "the model "


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Registers a rule, which gets the function and its arguments."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register
