"""Replaces the attention blocks of an existing model by fused ones on the same parameters."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .. import nn as segattn_nn
from .block import FusedBlock, fuse, has_hooks, unfuse
from .candidates import KNOWN_NAMES, PUBLISHED, candidates
from .compare import TOLERANCE, compared, difference
from .probe import Differs, Finding, examine, permissive
from .report import ConversionReport, Entry
from .sample import Sample, switched_on
from .state import kept
from .suspects import LEFT_ALONE, why_suspect
from .trial import CannotRun

_OWN = tuple(
    getattr(segattn_nn, name)
    for name in segattn_nn.__all__
    if name not in ("PyramidPooling", "ChannelAttentionBlock", "RefinementResidualBlock")
)


def convert(
    model: nn.Module,
    sample_input: Any = None,
    *,
    dry_run: bool = False,
    tolerance: float | None = None,
    mapping: Mapping[str, str] | None = None,
) -> ConversionReport:
    """Replaces the forward of a model's attention blocks by a fused one, in place, on the same parameters.

    Recognised by class and structure: position attention (DANet's PAM, mmsegmentation's, Tramac's, SAGAN-like
    self-attention), channel attention (CAM), criss-cross attention (CCNet's, mmcv's), non-local blocks (mmcv's,
    AlexHex7's, timm's; all modes), ANN's asymmetric stages (the authors' and mmsegmentation's), and the two branches
    of External-Attention's DAModule. Every candidate is run beside its replacement, on copies with random weights and
    on maps of several sizes, in evaluation and in training, with gradients: a block with another formula under a
    familiar name is left alone, with the reason.

    The block stays the same object, of a class that derives from its own: parameter names, hooks, methods and
    ``isinstance`` do not change, and checkpoints, optimizers and DistributedDataParallel keep working. The original's
    forward runs for arguments other than the feature maps, for dropout in training, while an attribute that it reads,
    such as a temperature, has another value than at the conversion, and while a child that the fused forward does not
    call has a hook or is another one than it was. If anything is raised, the model is as it was.

    Args:
        model: any module; also inside DistributedDataParallel or DataParallel. Compile it after converting.
        sample_input: a tensor, a tuple of arguments or a dict of keyword arguments. If given, the model runs on a copy
            of it before and after in evaluation mode, from the same random state, and the outputs are compared. Blocks
            whose gamma is 0 have gamma 1 for the time of this comparison.
        dry_run: change nothing, report what would be done.
        tolerance: of that comparison, relative to the largest output. None: 1e-6 for float64, 1e-3 for float32, 1e-2
            for float16, 5e-2 for bfloat16, by the coarsest dtype among parameters and outputs.
        mapping: names of the layers of blocks written under own names, to the published ones:
            ``{"to_q": "query_conv", "to_k": "key_conv", "to_v": "value_conv", "alpha": "gamma"}``.

    Returns:
        ConversionReport: print it.

    Raises:
        TypeError: if the model is not a module, or an argument is of the wrong type.
        ValueError: if the outputs on the sample input differ by more than ``tolerance``; for a negative tolerance, and
            a mapping to an unknown name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module (got {type(model).__name__})")
    mapping = _checked_mapping(mapping)
    _check_tolerance(tolerance)
    report = ConversionReport(model, dry_run=dry_run)
    findings: list[tuple[str, nn.Module, Finding]] = []
    with kept(model):
        for name, module in _blocks(model, mapping):
            entry, finding = _consider(model, name, module, mapping, dry_run)
            report.entries.append(entry)
            if finding is not None:
                findings.append((name, module, finding))
    if dry_run or not findings:
        return report
    compiled = [module.__dict__.get("_compiled_call_impl") for _, module, _ in findings]
    try:
        if sample_input is None:
            _install(findings)
        else:
            _install_and_compare(model, sample_input, findings, tolerance, report)
    except BaseException:
        for (_, module, _), implementation in zip(findings, compiled, strict=True):
            unfuse(module)
            if implementation is not None:
                module._compiled_call_impl = implementation
        raise
    return report


def _install(findings: list[tuple[str, nn.Module, Finding]]) -> None:
    for _, module, found in findings:
        fuse(module, found.candidate.kind, found.candidate.names, found.candidate.options, found.traits)


def _install_and_compare(
    model: nn.Module,
    sample_input: Any,
    findings: list[tuple[str, nn.Module, Finding]],
    tolerance: float | None,
    report: ConversionReport,
) -> None:
    blocks = [(name, module, found.candidate) for name, module, found in findings]
    with kept(model) as state, switched_on(blocks) as off:
        sample = Sample(model, sample_input, state)
        before = sample.outputs()
        _install(findings)
        after = sample.outputs()
        tolerance = TOLERANCE[sample.dtype(before)] if tolerance is None else tolerance
    report.difference = difference(after, before)
    if off:
        names = ", ".join(name or "the model itself" for name in off)
        report.notes.append(
            f"compared with gamma or the last layer of {names} other than 0: with 0 a block returns its input"
        )
    if not compared(before):
        report.notes.append("no output is a floating-point tensor: only their structure was compared")
    if not report.difference <= tolerance:
        raise ValueError(
            f"convert: the outputs on the sample input differ by {report.difference:.1e} of the largest, more than "
            f"the tolerance {tolerance:.1e}; the model is as it was. The blocks were:\n{report}"
        )


def _checked_mapping(mapping: Mapping[str, str] | None) -> Mapping[str, str]:
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise TypeError(f"convert: mapping must be a dict from own to published names (got {type(mapping).__name__})")
    for own, known in mapping.items():
        if not isinstance(own, str) or known not in KNOWN_NAMES:
            names = ", ".join(sorted(KNOWN_NAMES))
            raise ValueError(f"convert: mapping must lead from names of the model to one of {names} (got {mapping!r})")
    return mapping


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"convert: tolerance must be a number or None (got {type(tolerance).__name__})")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"convert: tolerance must be finite and not negative (got {tolerance})")


def _blocks(model: nn.Module, mapping: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Every attention block with its first name, once, outermost first; nothing inside a block."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        own = isinstance(module, (FusedBlock, *_OWN))
        if own or candidates(module, mapping) or type(module).__name__ in LEFT_ALONE:
            yield name, module
            return
        inside = [
            found for child, m in module.named_children() for found in walk(f"{name}.{child}" if name else child, m)
        ]
        if not inside and why_suspect(module) is not None:
            yield name, module
        yield from inside

    yield from walk("", model)


def _consider(
    model: nn.Module, name: str, module: nn.Module, mapping: Mapping[str, str], dry_run: bool
) -> tuple[Entry, Finding | None]:
    """What to do with one block."""
    class_name = type(module).__name__
    if isinstance(module, (FusedBlock, *_OWN)):
        return Entry(name, class_name, "already"), None
    possible = candidates(module, mapping)
    if not possible or class_name in LEFT_ALONE:
        return Entry(name, class_name, "left", detail=why_suspect(module) or ""), None
    if "forward" in vars(module):
        return Entry(name, class_name, "left", detail="its forward was replaced on the instance"), None
    try:
        finding = examine(module, possible, model)
    except CannotRun as error:
        if class_name not in PUBLISHED or not error.environment:
            return Entry(name, class_name, "left", detail=f"not compared: it does not run here ({error})"), None
        finding = Finding(possible[0], permissive(module, possible[0]), f"not compared: it does not run here ({error})")
    except Differs as error:
        kind = possible[0].kind.fused_kind
        article = "an" if kind[0] in "aeiou" else "a"
        return Entry(name, class_name, "left", detail=f"its layers are those of {article} {kind}, but {error}"), None
    action = "would convert" if dry_run else "converted"
    kind = finding.candidate.kind.fused_kind
    if finding.candidate.label:
        kind += f", {finding.candidate.label}"
    return Entry(name, class_name, action, kind, finding.detail + _hook_note(module, finding)), finding


def _hook_note(module: nn.Module, finding: Finding) -> str:
    hooked = [name for name, _ in finding.traits.bypassed if has_hooks(module.get_submodule(name))]
    if not hooked:
        return ""
    return (
        f"; the original's forward runs while a hook stands on {', '.join(hooked)}: "
        "segattn_ops.visualize.record_attention gives maps without one"
    )
