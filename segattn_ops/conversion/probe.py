"""Runs a block beside its replacement, on copies, to decide whether the two are the same function."""

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .block import Traits, fuse, generated_class, is_dropout
from .candidates import Candidate
from .compare import TOLERANCE, difference
from .settings import Settings, settings
from .trial import EVALUATION, CannotRun, Mode, Outcome, Trials, bypassed, in_one_line

# Spatial sizes by number of dimensions: odd and even, wide and high, a few positions and more than a thousand.
_SMALL = {1: (7,), 2: (5, 4), 3: (3, 4, 5)}
_LARGE = {1: (1221,), 2: (33, 37), 3: (6, 13, 16)}
_PAIRS = {1: (143,), 2: (13, 11), 3: (3, 6, 8)}  # for an original that stores 2E values for each pair of positions
_FURTHER = {1: ((70,),), 2: ((1, 7), (2, 70), (67, 3)), 3: ((2, 3, 35),)}
_LOUD = 1e-4  # tolerance for large energies: a float32 softmax in a float64 block errs by 1e-5 where they are 100
_MISSING = re.compile(
    r"not compiled with|no cuda gpus|nvidia driver|not (been )?(built|compiled|installed)|extension|same device|"
    r"must be (on )?(a )?cuda|cuda (tensor|device)|undefined symbol|no kernel image|could not run .* backend",
    re.IGNORECASE,
)


class Differs(Exception):
    """The two blocks are not the same function. The message completes "its layers are those of a ..., but"."""

    def __init__(self, reason: str, difference: float = math.inf) -> None:
        super().__init__(reason)
        self.difference = difference


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
        bypassed=bypassed(module, candidate),
    )


def examine(module: nn.Module, possible: list[Candidate], model: nn.Module) -> Finding:
    """The first of the candidates that is the same function as the module.

    The module itself is not run. Copies are, with random parameters: a zero gamma, or weights so small that the softmax
    is uniform, would hide what the block computes. What else of ``model`` the module refers to is not copied.

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
        examination = _Examination(module, possible[0], model)
        for candidate in possible:
            try:
                return examination.compare(candidate)
            except Differs as error:
                failures.append((-examination.agreements, error.difference, error))
    raise min(failures, key=lambda failure: failure[:2])[2]


class _Examination:
    """The original on probes; what it did is kept for the next candidate."""

    def __init__(self, module: nn.Module, candidate: Candidate, model: nn.Module) -> None:
        self._module, self._trials = module, Trials(module, candidate, model)
        self._dtype = self._trials.dtype
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
            loud = Mode(gain=10.0)  # energies a hundred times as large
            self._agree(candidate, traits, precise, small, worst, required=False, mode=loud)
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
        traits, under_autocast = self._autocast(candidate, traits)
        note += under_autocast
        self._other_values(candidate, traits, precise)
        traits = replace(traits, settings=self._settings(traits))
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
        raise CannotRun(in_one_line(error), environment=all(_is_environment(e) for e in errors)) from error

    def _agree(
        self,
        candidate: Candidate,
        traits: Traits,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        worst: dict[torch.dtype, float],
        required: bool,
        mode: Mode = EVALUATION,
    ) -> bool:
        """Whether the two could be compared in evaluation mode, in which case they agree.

        Raises:
            CannotRun: if the original does not run, but must.
            Differs: if the two differ.
        """
        where = f"{_sizes(shape[1:])} positions in {str(dtype).removeprefix('torch.')}"
        where += "" if mode.gain == 1 else f" with inputs {mode.gain:g} times as large"
        original = self._original(candidate, dtype, shape, mode)
        if isinstance(original, Exception):
            if required:
                raise CannotRun(f"on {where}: {in_one_line(original)}", _is_environment(original)) from original
            return False
        fused = self._fused(candidate, traits, dtype, shape, mode)
        if fused.random != original.random:
            raise Differs("it draws random numbers in evaluation mode")
        error = difference(fused.result, original.result)
        if not error <= (TOLERANCE[dtype] if mode.gain == 1 else max(TOLERANCE[dtype], _LOUD)):
            size = "in kind" if math.isinf(error) else f"by {error:.0e} of the largest"
            raise Differs(f"its result differs {size} on {where}", error)
        if dtype == self._dtype and _dtypes(fused.result) != _dtypes(original.result):
            ours, theirs = (", ".join(_dtypes(o.result)) for o in (fused, original))
            raise Differs(f"it returns {theirs} where the replacement returns {ours}", error)
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
        dims = candidate.dims[0] if candidate.dims[0] + 2 in traits.ranks else max(traits.ranks) - 2
        shape, mode, reason = self._small(candidate, dims), Mode(training=True, gradient=True), ""
        original = self._original(candidate, dtype, shape, mode)
        if isinstance(original, Exception):
            reason = f"its result there was not compared ({in_one_line(original)})"
        else:
            fused = self._fused(candidate, traits, dtype, shape, mode)
            if (
                not difference(fused.result, original.result) <= TOLERANCE[dtype]
                or not difference(fused.effects, original.effects) <= TOLERANCE[dtype]
                or fused.random != original.random
                or original.written - fused.written
            ):
                reason = "it does there what the replacement does not (dropout, noise, another result)"
        if reason:
            traits = replace(traits, original_in_training=True)
            note, mode = f"; the original's forward runs in training: {reason}", Mode(gradient=True)
            original = self._original(candidate, dtype, shape, mode)
            fused = self._fused(candidate, traits, dtype, shape, mode)
        else:
            dropouts = [name for name, _ in traits.bypassed if is_dropout(self._module.get_submodule(name))]
            note = f"; the original's forward runs while {', '.join(dropouts)} drops values" if dropouts else ""
        if not isinstance(original, Exception) and original.gradients is not None:
            if fused.gradients is None:
                raise Differs("the gradient of the replacement cannot be computed")
            error = _gradient_difference(fused.gradients, original.gradients)
            if not error <= TOLERANCE[dtype]:
                raise Differs(f"its gradient differs by {error:.0e} of the largest", error)
        return traits, note

    def _autocast(self, candidate: Candidate, traits: Traits) -> tuple[Traits, str]:
        """Adds to the traits whether autocast acts on the original otherwise than on the replacement; with a note.

        Both are not compared with each other: the original's own error in bfloat16 may be larger than the tolerance.
        """
        small = self._small(candidate, min(traits.ranks) - 2)
        on = Mode(autocast=True)
        theirs = self._original(candidate, torch.float32, small)
        if self._dtype != torch.float32 or isinstance(theirs, Exception):
            return traits, ""
        theirs_on = self._original(candidate, torch.float32, small, on)
        if isinstance(theirs_on, Exception):
            return replace(traits, original_in_autocast=True), "; the original's forward runs under autocast"
        ours, ours_on = (self._fused(candidate, traits, torch.float32, small, mode) for mode in (EVALUATION, on))
        acts = [
            difference(with_it.result, without.result) > TOLERANCE[torch.float64]
            for with_it, without in ((theirs_on, theirs), (ours_on, ours))
        ]
        if acts[0] == acts[1] and _dtypes(theirs_on.result) == _dtypes(ours_on.result):
            return traits, ""
        reason = "returns another dtype there" if acts[0] else "disables it"
        note = f"; the original's forward runs under autocast: it {reason}"
        return replace(traits, original_in_autocast=True), note

    def _other_values(self, candidate: Candidate, traits: Traits, dtype: torch.dtype) -> None:
        """Raises Differs if the two differ for other tensors than the block's own or for a negative gamma."""
        small = self._small(candidate, min(traits.ranks) - 2)
        for mode, reason in (
            (Mode(shaken=True), "its result depends on a buffer or another tensor, whose changes would be ignored"),
            (Mode(negative=True), "its result differs where gamma is negative"),
        ):
            original = self._original(candidate, dtype, small, mode)
            if isinstance(original, Exception):
                continue
            error = difference(self._fused(candidate, traits, dtype, small, mode).result, original.result)
            if not error <= TOLERANCE[dtype]:
                raise Differs(reason, error)

    def _settings(self, traits: Traits) -> Settings:
        """What the original read in any run, and the children of the bypassed descendants."""
        read = {r for outcome in self._outcomes.values() if isinstance(outcome, Outcome) for r in outcome.read}
        dropouts = {name for name, _ in traits.bypassed if is_dropout(self._module.get_submodule(name))}
        found = settings(self._module, (r for r in read if r[0] not in dropouts))
        children = [(name, self._module.get_submodule(name)) for name, _ in traits.bypassed]
        return found + tuple((name, "_modules", tuple(child._modules)) for name, child in children)

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
        self, candidate: Candidate, dtype: torch.dtype, shape: tuple[int, ...], mode: Mode = EVALUATION
    ) -> Outcome | Exception:
        key = (dtype, shape, mode)
        if key not in self._outcomes:
            try:
                self._outcomes[key] = self._trials.run(self._trials.twin(dtype), candidate, dtype, shape, mode)
            except CannotRun:
                raise
            except Exception as error:
                self._outcomes[key] = error
        return self._outcomes[key]

    def _fused(
        self, candidate: Candidate, traits: Traits, dtype: torch.dtype, shape: tuple[int, ...], mode: Mode = EVALUATION
    ) -> Outcome:
        twin = self._trials.twin(dtype)
        try:
            fuse(twin, candidate.kind, candidate.names, candidate.options, traits)
            return self._trials.run(twin, candidate, dtype, shape, mode)
        except Exception as error:
            raise Differs(f"the replacement raises {in_one_line(error)} on {_sizes(shape[1:])} positions") from error


def _dtypes(result: dict[str, Any]) -> list[str]:
    return [str(value.dtype).removeprefix("torch.") for value in result.values() if isinstance(value, torch.Tensor)]


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


def _sizes(spatial: tuple[int, ...]) -> str:
    return " x ".join(map(str, spatial))


def _range(maps: list[tuple[int, ...]]) -> str:
    small, large = min(maps, key=math.prod), max(maps, key=math.prod)
    return _sizes(small) if small == large else f"{_sizes(small)} to {_sizes(large)} positions"
