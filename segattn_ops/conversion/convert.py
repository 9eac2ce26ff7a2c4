"""Replaces the attention blocks of an existing model by fused ones on the same parameters."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as segattn_nn
from .candidates import LEFT_ALONE, PUBLISHED, Candidate, candidates, why_suspect
from .fused import FusedBlock
from .report import ConversionReport, Entry

_OWN = tuple(
    getattr(segattn_nn, name)
    for name in segattn_nn.__all__
    if name not in ("PyramidPooling", "ChannelAttentionBlock", "RefinementResidualBlock")
)
# Relative to the largest output. Blocks are compared in float64 if they run in it: only another formula exceeds 1e-6.
_BLOCK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def convert(
    model: nn.Module, sample_input: Any = None, *, dry_run: bool = False, tolerance: float = 1e-3
) -> ConversionReport:
    """Replaces the attention blocks of a model by fused ones, in place, on the same parameters.

    Recognised by class and structure: position attention (DANet's PAM, mmsegmentation's, Tramac's, SAGAN-like
    self-attention), channel attention (CAM), criss-cross attention (CCNet's, mmcv's), non-local blocks (mmcv's,
    AlexHex7's, timm's; all modes), ANN's asymmetric stages (the authors' and mmsegmentation's), and the two branches
    of External-Attention's DAModule. Every candidate is run beside its replacement on random input of a few positions,
    with its zero-initialised weights made random: a block with another formula under a familiar name is left alone.

    Parameter names do not change: checkpoints, optimizers and DistributedDataParallel keep working.

    Args:
        model: any module; also inside DistributedDataParallel or DataParallel. Compile it after converting.
        sample_input: a tensor, a tuple of arguments or a dict of keyword arguments. If given, the model runs on it
            before and after in evaluation mode, and the outputs are compared.
        dry_run: change nothing, report what would be done.
        tolerance: of that comparison, relative to the largest output.

    Returns:
        ConversionReport: print it; ``report.model`` is the model.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if the outputs on the sample input differ by more than ``tolerance``; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module (got {type(model).__name__})")
    report = ConversionReport(model, dry_run=dry_run)
    replacements: dict[int, FusedBlock] = {}
    for name, module in _blocks(model):
        entry, replacement = _consider(name, module, dry_run)
        report.entries.append(entry)
        if replacement is not None:
            replacements[id(module)] = replacement
    if dry_run or not replacements:
        return report
    before = None if sample_input is None else _run(model, sample_input)
    swapped = _swap(model, replacements)
    report.model = replacements.get(id(model), model)
    if sample_input is not None:
        report.difference = _difference(_run(report.model, sample_input), before)
        if not report.difference <= tolerance:
            for parent, name, original in swapped:
                parent._modules[name] = original
            raise ValueError(
                f"convert: the outputs on the sample input differ by {report.difference:.1e} of the largest, more than "
                f"the tolerance {tolerance:.1e}; the model is as it was. The blocks were:\n{report}"
            )
    return report


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every attention block with its first name, once, outermost first; nothing inside a block."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        own = isinstance(module, (FusedBlock, *_OWN))
        if own or candidates(module) or type(module).__name__ in LEFT_ALONE:
            yield name, module
            return
        inside = [
            found for child, m in module.named_children() for found in walk(f"{name}.{child}" if name else child, m)
        ]
        if not inside and why_suspect(module) is not None:
            yield name, module
        yield from inside

    yield from walk("", model)


def _consider(name: str, module: nn.Module, dry_run: bool) -> tuple[Entry, FusedBlock | None]:
    """What to do with one block."""
    class_name = type(module).__name__
    if isinstance(module, (FusedBlock, *_OWN)):
        return Entry(name, class_name, "already"), None
    possible = candidates(module)
    if not possible or class_name in LEFT_ALONE:
        return Entry(name, class_name, "left", detail=why_suspect(module) or ""), None
    if "forward" in vars(module):
        return Entry(name, class_name, "left", detail="its forward was replaced on the instance"), None
    nearest = float("inf")
    for candidate in possible:
        try:
            difference, dtype = _compare(module, candidate)
        except _CannotRun as error:
            detail = f"not compared: the original does not run here ({error})"
            if class_name not in PUBLISHED:
                return Entry(name, class_name, "left", detail=detail), None
            break  # a missing extension or hard-coded device: a published class is converted unverified
        nearest = min(nearest, difference)
        if difference <= _BLOCK_TOLERANCE[dtype]:
            detail = f"differs by {difference:.0e} in {str(dtype).removeprefix('torch.')}"
            break
    else:
        kind = possible[0].fused.fused_kind
        detail = f"its layers are those of a {kind}, but its result differs by {nearest:.0e} of the largest"
        return Entry(name, class_name, "left", detail=detail), None
    action = "would convert" if dry_run else "converted"
    return Entry(name, class_name, action, candidate.fused.fused_kind, detail), candidate.build(module)


class _CannotRun(Exception):
    """The original block raised on the random input."""


def _compare(module: nn.Module, candidate: Candidate) -> tuple[float, torch.dtype]:
    """Largest difference of the two blocks on random input, relative to the largest output, and the dtype used."""
    reason: Exception | None = None
    for dtype in _BLOCK_TOLERANCE:
        try:
            original = copy.deepcopy(module).to(dtype).eval()
        except Exception as error:
            raise _CannotRun(f"it cannot be copied: {error}") from error
        _silence(original)
        device = next(original.parameters()).device
        generator = torch.Generator().manual_seed(0)  # leaves the user's random state unchanged
        with torch.no_grad():
            for parameter in original.parameters():
                if not parameter.any():  # gamma and the last norm start at zero, and would hide the attention
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in candidate.inputs]
            try:
                expected = original(*inputs)
            except Exception as error:
                reason = error
                continue
            got = candidate.build(original)(*inputs)
        return _difference(got, expected), dtype
    raise _CannotRun(f"{type(reason).__name__}: {reason}")


def _silence(module: nn.Module) -> None:
    """Removes a copy's hooks, except those of torch.nn.utils, which compute a normalised weight."""
    for m in module.modules():
        m._forward_hooks.clear()
        for key, hook in list(m._forward_pre_hooks.items()):
            if not type(hook).__module__.startswith("torch.nn.utils"):
                del m._forward_pre_hooks[key]


def _run(model: nn.Module, sample: Any) -> Any:
    """The model's output on the sample in evaluation mode; the mode of every module is restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(sample, Mapping):
                return model(**sample)
            return model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _difference(got: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected value; infinite for other shapes, or NaN where none was."""
    largest = 0.0
    ours, theirs = list(_tensors(got)), list(_tensors(expected))
    if len(ours) != len(theirs):
        return float("inf")
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel():
            scale = b.abs().max().double().clamp_min(torch.finfo(torch.float32).tiny)
            difference = ((a.double() - b.double()).abs().max() / scale).item()
            if difference != difference:
                return float("inf")
            largest = max(largest, difference)
    return largest


def _swap(model: nn.Module, replacements: Mapping[int, FusedBlock]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Installs the replacements under every parent of a block; returns what is needed to undo it."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                swapped.append((parent, name, child))
                parent._modules[name] = replacements[id(child)]
    return swapped
