"""Runs copies of a block on random maps and records everything that a run did."""

import copy
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import FusedBlock, drops
from .candidates import Candidate, pointwise
from .compare import leaves
from .settings import reads, shake
from .state import RandomState


class CannotRun(Exception):
    """The original cannot be run here, so nothing can be compared.

    Attributes:
        environment: whether the reason is a missing extension or device, and not the block.
    """

    def __init__(self, reason: str, environment: bool = False) -> None:
        super().__init__(reason)
        self.environment = environment


class Mode(NamedTuple):
    """How a block runs."""

    training: bool = False
    gradient: bool = False
    gain: float = 1.0  # of the inputs
    shaken: bool = False  # with other values in the tensors that are no parameters
    negative: bool = False  # with gamma of the other sign
    autocast: bool = False  # to bfloat16


EVALUATION = Mode()
# The default dtype is the process's: of two conversions in threads, one would restore what the other had set.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Outcome:
    """What one run of a block did.

    Attributes:
        result: leaves of the output.
        effects: leaves of the inputs and buffers after the run.
        gradients: of the inputs and parameters; None if they were not asked for or could not be computed.
        written: the plain attributes that the run wrote.
        random: the state of the random number generators after the run.
        read: (descendant, attribute) of what the original read from itself and the bypassed descendants.
    """

    result: dict[str, Any]
    effects: dict[str, Any]
    gradients: dict[str, Any] | None
    written: frozenset[str]
    random: RandomState
    read: frozenset[tuple[str, str]]


class Trials:
    """Copies of a block with random parameters, which hide nothing: with a zero gamma, or weights so small that the
    softmax is uniform, another formula would have the same result.

    Args:
        module: the block, which is not run itself.
        candidate: one of the blocks that it may be.
        model: the modules of which a block refers to, for instance its parent in a list, are not copied with it.
    """

    def __init__(self, module: nn.Module, candidate: Candidate, model: nn.Module) -> None:
        parameter = next(module.parameters())
        self._module, self._roles = module, candidate
        self.device, self.dtype = parameter.device, parameter.dtype
        self._prepared: dict[torch.dtype, nn.Module] = {}
        inside = set(map(id, module.modules()))
        self._outside = {id(m): m for m in model.modules() if id(m) not in inside}

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """A copy for one run: its own buffers, the parameters shared with the other copies of this dtype."""
        if dtype not in self._prepared:
            self._prepared[dtype] = self._prepare(dtype)
        prepared = self._prepared[dtype]
        return _copy(prepared, {id(p): p for p in prepared.parameters()} | self._outside)

    def run(
        self, module: nn.Module, candidate: Candidate, dtype: torch.dtype, shape: tuple[int, ...], mode: Mode
    ) -> Outcome:
        """One run of a copy.

        Args:
            module: from :meth:`twin`, with the original's or the fused forward.
            candidate: gives the channels of the inputs.
            dtype: of the copy.
            shape: batch and spatial sizes of the inputs; without a batch dimension if the first is 0.
            mode: of the run.
        """
        batch, *spatial = shape
        sizes = [(batch, channels, *spatial) if batch else (channels, *spatial) for channels in candidate.channels]
        inputs = [
            (_normal(size, seed) * (mode.gain * _amplitude(candidate, size)))
            .to(self.device, dtype)
            .requires_grad_(mode.gradient)
            for seed, size in enumerate(sizes)
        ]
        for m in module.modules():
            m.training = mode.training
        watched = ["", *(name for name, _ in bypassed(module, candidate))]
        for name in watched[1:]:  # active dropout is seen at each call
            child = module.get_submodule(name)
            if drops(child):
                child.training = False
        if mode.shaken:
            generator = torch.Generator("cpu").manual_seed(0)
            shake(module, watched, lambda tensor: _uniform(tensor, generator))
        observed = [] if isinstance(module, FusedBlock) else watched
        gamma = _scalars(module, candidate) if mode.negative else []
        kept = RandomState({self.device.type})
        with _neutral(self.device, dtype, mode.autocast), _negated(gamma):
            try:
                before = _plain_attributes(module)
                with torch.set_grad_enabled(mode.gradient), reads(module, observed) as read:
                    output = module(*[x.clone() for x in inputs] if mode.gradient else inputs)
                result, effects = leaves(output), leaves([inputs, dict(module.named_buffers())])
                random = RandomState({self.device.type})
                after = _plain_attributes(module)
                written = frozenset(name for name in after if not _unwritten(before.get(name), after[name]))
                gradients = _gradients(module, inputs, output) if mode.gradient else None
            finally:
                kept.restore()
        return Outcome(result, effects, gradients, written, random, frozenset(read))

    def _prepare(self, dtype: torch.dtype) -> nn.Module:
        try:
            prepared = _copy(self._module, self._outside)
        except Exception as error:
            raise CannotRun(f"it cannot be copied: {in_one_line(error)}") from error
        if dtype != self.dtype:
            prepared.to(dtype)
        _silence(prepared)
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad():
            for name, parameter in prepared.named_parameters():
                parameter.requires_grad_(True)
                parameter.copy_(_random(name, parameter, generator))
            for role in ("query", "key"):
                conv = pointwise(prepared.get_submodule(self._roles.names[role])) if role in self._roles.names else None
                if conv is not None:  # energies of the order of 1: neither a uniform softmax nor one with a single 1
                    for parameter in conv.parameters():
                        parameter.mul_(conv.out_channels**-0.25)
        return prepared


def bypassed(module: nn.Module, candidate: Candidate) -> tuple[tuple[str, type[nn.Module]], ...]:
    """Name and class of the descendants that the replacement does not call: neither a role's module nor inside one."""
    called: set[int] = set()
    for role, name in candidate.names.items():
        if role != "projection" and not isinstance(getattr(module, name, None), nn.Parameter):
            called.update(id(m) for m in module.get_submodule(name).modules())
    return tuple((name, type(m)) for name, m in module.named_modules() if name and id(m) not in called)


def _normal(size: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    def normal() -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")

    if like.dim() >= 2:
        return normal() / math.sqrt(max(1, math.prod(like.shape[1:])))
    if name.endswith("bias"):
        return normal() / 2
    return _uniform(like, generator) + (1.5 if like.numel() == 1 else 0.5)  # gamma > 1, so that a clamp to 1 shows


def _scalars(module: nn.Module, candidate: Candidate) -> list[nn.Parameter]:
    """The parameters of the role gamma."""
    gamma = getattr(module, candidate.names["gamma"]) if "gamma" in candidate.names else None
    return list(gamma.parameters()) if isinstance(gamma, nn.Module) else [] if gamma is None else [gamma]


@contextmanager
def _negated(parameters: list[nn.Parameter]) -> Iterator[None]:
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.neg_()
        yield
    finally:
        with torch.no_grad():
            for parameter in parameters:
                parameter.neg_()


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu")


def _amplitude(candidate: Candidate, size: tuple[int, ...]) -> float:
    """Of the input, so that energies formed from the input itself are of the order of 1."""
    if "query" in candidate.names or "in" in candidate.names:
        return 1.0
    summed = math.prod(size[2:]) if "value" not in candidate.names else size[1]  # channel attention; gaussian mode
    return 1 / math.sqrt(math.sqrt(max(summed, 1)))


@contextmanager
def _neutral(device: torch.device, dtype: torch.dtype, autocast: bool) -> Iterator[None]:
    """Without the caller's autocast, inference mode, default device and default dtype."""
    with _ONE_AT_A_TIME:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                yield
        finally:
            torch.set_default_dtype(default)


def _copy(module: nn.Module, shared: Mapping[int, Any]) -> nn.Module:
    """A deep copy. Hooks are not copied, because a bound method would take its object along; tensors with a history,
    such as a stored attention map or a normalised weight, are copied without it."""
    memo: dict[int, Any] = dict(shared)
    for m in module.modules():
        for name, value in m.__dict__.items():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif name.endswith("_hooks") and isinstance(value, dict):
                memo.update((id(hook), hook) for hook in value.values())
    return copy.deepcopy(module, memo)


def _silence(module: nn.Module) -> None:
    """Removes the hooks of a copy, except those of torch.nn.utils, which compute a weight; and lets synchronised batch
    norms compute on this process alone."""
    for m in module.modules():
        m._forward_hooks.clear()
        m._backward_hooks.clear()
        m._backward_pre_hooks.clear()
        for key, hook in list(m._forward_pre_hooks.items()):
            if not type(hook).__module__.startswith("torch.nn.utils"):
                del m._forward_pre_hooks[key]
        if isinstance(m, nn.SyncBatchNorm):
            m.__class__ = _LocalBatchNorm  # type: ignore[assignment]


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _plain_attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """Attributes that are not torch.nn.Module's own, of the module and its descendants, with their length."""
    own = nn.Module().__dict__
    return {
        f"{prefix}.{name}" if prefix else name: (value, len(value) if isinstance(value, (list, dict, set)) else 0)
        for prefix, m in module.named_modules()
        for name, value in m.__dict__.items()
        if name not in own
    }


def _unwritten(before: tuple[Any, int] | None, after: tuple[Any, int]) -> bool:
    return before is not None and before[0] is after[0] and before[1] == after[1]


def _gradients(module: nn.Module, inputs: list[Tensor], output: Any) -> dict[str, Any] | None:
    """Of a random sum of the output; None if the block has no backward."""
    if not isinstance(output, Tensor):
        return None
    wanted = {f"input {n}": x for n, x in enumerate(inputs)} | dict(module.named_parameters())
    if not output.requires_grad:
        return dict.fromkeys(wanted)
    weight = _normal(tuple(output.shape), 3).to(output)
    try:
        gradients = torch.autograd.grad(output, list(wanted.values()), weight, allow_unused=True)
    except RuntimeError:  # mmcv's concatenation mode overwrites what its backward needs
        return None
    return dict(zip(wanted, gradients, strict=True))


def in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
