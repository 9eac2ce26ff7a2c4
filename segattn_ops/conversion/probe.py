"""Runs a block beside its replacement, on copies, to decide whether the two are the same function."""

import copy
import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import Candidate, pointwise
from .compare import TOLERANCE, difference, leaves
from .fused import Traits, drops, fuse, generated_class
from .state import RandomState

# Spatial sizes by number of dimensions: odd and even, wide and high, a few positions and more than a thousand.
_SMALL = {1: (7,), 2: (5, 4), 3: (3, 4, 5)}
_LARGE = {1: (1221,), 2: (33, 37), 3: (6, 13, 16)}
_PAIRS = {1: (143,), 2: (13, 11), 3: (3, 6, 8)}  # for an original that stores 2E values for each pair of positions
_FURTHER = {1: ((70,),), 2: ((1, 7), (2, 70), (67, 3)), 3: ((2, 3, 35),)}
_MISSING = re.compile(
    r"not compiled with|no cuda gpus|nvidia driver|not (been )?(built|compiled|installed)|extension|same device|"
    r"must be (on )?(a )?cuda|cuda (tensor|device)|undefined symbol|no kernel image|could not run .* backend",
    re.IGNORECASE,
)


class CannotRun(Exception):
    """The original cannot be run here, so nothing can be compared.

    Attributes:
        environment: whether the reason is a missing extension or device, and not the block.
    """

    def __init__(self, reason: str, environment: bool = False) -> None:
        super().__init__(reason)
        self.environment = environment


class Differs(Exception):
    """The two blocks are not the same function. The message completes "its layers are those of a ..., but"."""

    def __init__(self, reason: str, difference: float = math.inf) -> None:
        super().__init__(reason)
        self.difference = difference


@dataclass(frozen=True)
class Outcome:
    """What one run of a block did.

    Attributes:
        result: leaves of the output.
        effects: leaves of the inputs and buffers after the run.
        gradients: of the inputs and parameters; None if they were not asked for or could not be computed.
        written: the plain attributes that the run wrote.
        random: the state of the random number generators after the run.
    """

    result: dict[str, Any]
    effects: dict[str, Any]
    gradients: dict[str, Any] | None
    written: frozenset[str]
    random: RandomState


@dataclass(frozen=True)
class Finding:
    """A replacement that agrees with its original.

    Attributes:
        candidate: which one.
        traits: of the replacement.
        detail: on what and how closely the two agree.
    """

    candidate: Candidate
    traits: Traits
    detail: str


def permissive(module: nn.Module, candidate: Candidate) -> Traits:
    """The traits known without running the original."""
    signature = inspect.signature(type(module).forward)
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in list(signature.parameters.values())[1:] if p.kind in ordinary]
    return Traits(
        inputs=len(candidate.channels),
        ranks=frozenset(dims + 2 for dims in candidate.dims),
        parameters=tuple((p.name, p.default) for p in parameters),
        positional=sum(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters),
        bypassed=_bypassed(module, candidate),
    )


def _bypassed(module: nn.Module, candidate: Candidate) -> tuple[str, ...]:
    """Names of the descendants that the replacement does not call: neither a role's module nor inside one."""
    called: set[int] = set()
    for role, name in candidate.names.items():
        if role != "projection" and not isinstance(getattr(module, name, None), nn.Parameter):
            called.update(id(m) for m in module.get_submodule(name).modules())
    return tuple(name for name, m in module.named_modules() if name and id(m) not in called)


def examine(module: nn.Module, possible: list[Candidate]) -> Finding:
    """The first of the candidates that is the same function as the module.

    The module itself is not run. Copies are, with random parameters: a zero gamma, or weights so small that the softmax
    is uniform, would hide what the block computes.

    Raises:
        CannotRun: if the original does not run on a feature map of small or of large size.
        Differs: if none of the candidates is the same function; that of the one that agrees on most maps.
    """
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise CannotRun("it is on the meta device", environment=True)
    try:
        generated_class(possible[0].kind, type(module))
    except TypeError as error:
        raise Differs(f"no replacement can be made: {error}") from error
    failures: list[tuple[int, float, Differs]] = []
    with torch.inference_mode(False):
        examination = _Examination(module, possible[0])
        for candidate in possible:
            try:
                return examination.compare(candidate)
            except Differs as error:
                failures.append((-examination.agreements, error.difference, error))
    raise min(failures, key=lambda failure: failure[:2])[2]


class _Examination:
    """The original on probes; what it did is kept for the next candidate."""

    def __init__(self, module: nn.Module, candidate: Candidate) -> None:
        parameter = next(module.parameters())
        self._module, self._roles = module, candidate
        self._device, self._dtype = parameter.device, parameter.dtype
        self._prepared: dict[torch.dtype, nn.Module] = {}
        self._outcomes: dict[Any, Outcome | Exception] = {}
        self.agreements = 0  # of the candidate compared last

    def compare(self, candidate: Candidate) -> Finding:
        self.agreements = 0
        traits = permissive(self._module, candidate)
        precise = self._precise(candidate)
        worst: dict[torch.dtype, float] = {}
        maps: list[tuple[int, ...]] = []
        agreeing: set[int] = set()
        unlike: Differs | None = None
        for dims in candidate.dims:
            small = self._small(candidate, dims)
            original = self._original(candidate, precise, small)
            if isinstance(original, Exception):
                continue
            try:
                self._agree(candidate, traits, precise, small, worst, required=True)
            except Differs as error:
                unlike = error
                continue
            agreeing.add(dims + 2)
            maps.append(small[1:])
            fast = torch.float32 if self._dtype in (torch.float16, torch.bfloat16) else self._dtype
            fast = precise if precise == torch.float32 else fast
            if self._dtype != precise:
                self._agree(candidate, traits, self._dtype, small, worst, required=False)
            for shape, required in self._further(candidate, dims):
                if self._agree(candidate, traits, fast, shape, worst, required=required):
                    maps.append(shape[1:])
        if not agreeing:
            if unlike is not None:
                raise unlike
            self._give_up(candidate, precise)
        traits = replace(traits, ranks=frozenset(agreeing))
        traits = replace(traits, original_ranks=self._other_ranks(candidate, precise, traits))
        traits, note = self._training(candidate, traits, precise)
        precision = ", ".join(f"{error:.0e} in {str(d).removeprefix('torch.')}" for d, error in worst.items())
        detail = f"differs by {precision} on {len(maps)} maps of {_range(maps)}{note}"
        return Finding(candidate, traits, detail)

    def _precise(self, candidate: Candidate) -> torch.dtype:
        """float64 if the original runs in it."""
        for dtype in (torch.float64, self._dtype, torch.float32):
            for dims in candidate.dims:
                if not isinstance(self._original(candidate, dtype, self._small(candidate, dims)), Exception):
                    return dtype
        return torch.float64

    def _small(self, candidate: Candidate, dims: int) -> tuple[int, ...]:
        """Batch and spatial sizes of the first map."""
        return (2, *(candidate.sizes[0] if candidate.sizes else _SMALL[dims]))

    def _further(self, candidate: Candidate, dims: int) -> Iterator[tuple[tuple[int, ...], bool]]:
        """More batch and spatial sizes, and whether the original must take them."""
        if candidate.sizes:
            yield from (((1, *size), False) for size in candidate.sizes)
            return
        pairs = "projection" in candidate.names
        yield (1, *(_PAIRS if pairs else _LARGE)[dims]), True
        for n, size in enumerate(_FURTHER[dims]):
            if not pairs or math.prod(size) < 200:
                yield (1 + n % 3, *size), False

    def _give_up(self, candidate: Candidate, dtype: torch.dtype) -> None:
        errors = [e for e in self._outcomes.values() if isinstance(e, Exception)]
        first = self._original(candidate, self._dtype, self._small(candidate, candidate.dims[0]))
        error = first if isinstance(first, Exception) else errors[0]
        raise CannotRun(_in_one_line(error), environment=all(_is_environment(e) for e in errors)) from error

    def _agree(
        self,
        candidate: Candidate,
        traits: Traits,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        worst: dict[torch.dtype, float],
        required: bool,
    ) -> bool:
        """Whether the two could be compared in evaluation mode, in which case they agree.

        Raises:
            CannotRun: if the original does not run, but must.
            Differs: if the two differ.
        """
        where = f"{_sizes(shape[1:])} positions in {str(dtype).removeprefix('torch.')}"
        original = self._original(candidate, dtype, shape)
        if isinstance(original, Exception):
            if required:
                raise CannotRun(f"on {where}: {_in_one_line(original)}", _is_environment(original)) from original
            return False
        fused = self._fused(candidate, traits, dtype, shape)
        if fused.random != original.random:
            raise Differs("it draws random numbers in evaluation mode")
        error = difference(fused.result, original.result)
        if not error <= TOLERANCE[dtype]:
            size = "in kind" if math.isinf(error) else f"by {error:.0e} of the largest"
            raise Differs(f"its result differs {size} on {where}", error)
        self.agreements += 1
        effects = difference(fused.effects, original.effects)
        lost = sorted(original.written - fused.written)
        if lost or not effects <= TOLERANCE[dtype]:
            what = f"stores {', '.join(lost)}" if lost else "changes a buffer or its input"
            raise Differs(f"its forward {what}, which the replacement would not")
        worst[dtype] = max(worst.get(dtype, 0.0), error)
        return True

    def _training(self, candidate: Candidate, traits: Traits, dtype: torch.dtype) -> tuple[Traits, str]:
        """Adds to the traits what differs in training; with a note for the report.

        Raises:
            Differs: if the gradients differ.
        """
        dims = min(traits.ranks, key=lambda rank: rank != candidate.dims[0] + 2) - 2
        shape = self._small(candidate, dims)
        original = self._original(candidate, dtype, shape, training=True)
        if isinstance(original, Exception):
            reason = f"its result in training was not compared ({_in_one_line(original)})"
            return replace(traits, original_in_training=True), f"; the original's forward runs in training: {reason}"
        fused = self._fused(candidate, traits, dtype, shape, training=True)
        if (
            not difference(fused.result, original.result) <= TOLERANCE[dtype]
            or not difference(fused.effects, original.effects) <= TOLERANCE[dtype]
            or fused.random != original.random
            or original.written - fused.written
        ):
            reason = "it does there what the replacement does not (dropout, noise, another result)"
            return replace(traits, original_in_training=True), f"; the original's forward runs in training: {reason}"
        if original.gradients is not None:
            if fused.gradients is None:
                raise Differs("the gradient of the replacement cannot be computed")
            error = _gradient_difference(fused.gradients, original.gradients)
            if not error <= TOLERANCE[dtype]:
                raise Differs(f"its gradient differs by {error:.0e} of the largest", error)
        dropouts = [
            name for name in traits.bypassed if "drop" in type(self._module.get_submodule(name)).__name__.lower()
        ]
        if dropouts:
            return traits, f"; the original's forward runs while {', '.join(dropouts)} drops values in training"
        return traits, ""

    def _other_ranks(self, candidate: Candidate, dtype: torch.dtype, traits: Traits) -> frozenset[int]:
        """Ranks that the original takes and the replacement does not."""
        found = set()
        for rank in {2, 3, 4, 5} - traits.ranks:
            batched = None if rank == 2 else (2, *_SMALL[rank - 2])
            for shape in (batched, *([] if rank == 5 else [(0, *_SMALL[rank - 1])])):  # 0: without a batch dimension
                if shape is not None and not isinstance(self._original(candidate, dtype, shape), Exception):
                    found.add(rank)
        return frozenset(found)

    def _original(
        self, candidate: Candidate, dtype: torch.dtype, shape: tuple[int, ...], training: bool = False
    ) -> Outcome | Exception:
        key = (dtype, shape, training)
        if key not in self._outcomes:
            try:
                self._outcomes[key] = self._run(self._twin(dtype), candidate, dtype, shape, training)
            except CannotRun:
                raise
            except Exception as error:
                self._outcomes[key] = error
        return self._outcomes[key]

    def _fused(
        self, candidate: Candidate, traits: Traits, dtype: torch.dtype, shape: tuple[int, ...], training: bool = False
    ) -> Outcome:
        twin = self._twin(dtype)
        fuse(twin, candidate.kind, candidate.names, candidate.options, traits)
        try:
            return self._run(twin, candidate, dtype, shape, training)
        except Exception as error:
            raise Differs(f"the replacement raises {_in_one_line(error)} on {_sizes(shape[1:])} positions") from error

    def _run(
        self, module: nn.Module, candidate: Candidate, dtype: torch.dtype, shape: tuple[int, ...], training: bool
    ) -> Outcome:
        batch, *spatial = shape
        sizes = [(batch, channels, *spatial) if batch else (channels, *spatial) for channels in candidate.channels]
        inputs = [
            (_normal(size, seed) * _amplitude(candidate, size)).to(self._device, dtype).requires_grad_(training)
            for seed, size in enumerate(sizes)
        ]
        for m in module.modules():
            m.training = training
        for name in _bypassed(module, candidate):  # active dropout is seen at each call
            child = module.get_submodule(name)
            if drops(child):
                child.training = False
        kept = RandomState({self._device.type})
        with _neutral(self._device, dtype):
            try:
                torch.manual_seed(2)
                before = _plain_attributes(module)
                with torch.set_grad_enabled(training):
                    output = module(*[x.clone() for x in inputs] if training else inputs)
                result, effects = leaves(output), leaves([inputs, dict(module.named_buffers())])
                random = RandomState({self._device.type})
                after = _plain_attributes(module)
                written = frozenset(n for n, value in after.items() if n not in before or value is not before[n])
                gradients = _gradients(module, inputs, output) if training else None
            finally:
                kept.restore()
        return Outcome(result, effects, gradients, written, random)

    def _twin(self, dtype: torch.dtype) -> nn.Module:
        """A copy for one run: its own buffers, the parameters shared with the other copies of this dtype."""
        if dtype not in self._prepared:
            self._prepared[dtype] = self._prepare(dtype)
        prepared = self._prepared[dtype]
        return _copy(prepared, {id(p): p for p in prepared.parameters()})

    def _prepare(self, dtype: torch.dtype) -> nn.Module:
        try:
            prepared = _copy(self._module, {})
            if dtype != self._dtype:
                prepared.to(dtype)
        except Exception as error:
            raise CannotRun(f"it cannot be copied: {_in_one_line(error)}") from error
        silence(prepared)
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
    return torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5


def _amplitude(candidate: Candidate, size: tuple[int, ...]) -> float:
    """Of the input, so that energies formed from the input itself are of the order of 1."""
    if "query" in candidate.names or "in" in candidate.names:
        return 1.0
    summed = math.prod(size[2:]) if "value" not in candidate.names else size[1]  # channel attention; gaussian mode
    return float(max(summed, 1)) ** -0.25


@contextmanager
def _neutral(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Without the caller's autocast, inference mode, default device and default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def _copy(module: nn.Module, shared: dict[int, Any]) -> nn.Module:
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


def silence(module: nn.Module) -> None:
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
            m.__class__ = _LocalBatchNorm


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that are not torch.nn.Module's own, of the module and its descendants."""
    own = nn.Module().__dict__
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, m in module.named_modules()
        for name, value in m.__dict__.items()
        if name not in own
    }


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


def _gradient_difference(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """Relative to the largest gradient of all: some are zero but for rounding. No gradient is a gradient of zero."""
    largest = max((g.abs().max().item() for g in expected.values() if g is not None and g.numel()), default=0.0)
    error = 0.0
    for name, theirs in expected.items():
        ours = got[name]
        a, b = (torch.zeros(()) if g is None else g.detach().to("cpu", torch.float64) for g in (ours, theirs))
        error = max(error, (a - b).abs().max().item() if max(a.numel(), b.numel()) else 0.0)
    return error / max(largest, torch.finfo(torch.float32).tiny)


def _is_environment(error: BaseException) -> bool:
    """Whether an extension, a package or a device is missing."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ImportError) or (
            isinstance(chain, (RuntimeError, AssertionError, OSError)) and _MISSING.search(str(chain))
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _sizes(spatial: tuple[int, ...]) -> str:
    return " x ".join(map(str, spatial))


def _range(maps: list[tuple[int, ...]]) -> str:
    small, large = min(maps, key=math.prod), max(maps, key=math.prod)
    return _sizes(small) if small == large else f"{_sizes(small)} to {_sizes(large)} positions"
