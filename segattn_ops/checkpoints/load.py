"""Loads a checkpoint of any known layout into a module of segattn_ops."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._files import bounded
from .containers import State, unwrap, unwrapped
from .explain import Hint, differences, hints
from .files import Source, read
from .names import Naming
from .preprocessing import Preprocessing
from .translate import Found, Recognised, Translation, candidates, dotted_prefixes, several, translate

# Convolutions before a batch norm that have a bias here and none in mmcv's ConvModule: a bias of zero is the same
# function.
_BIAS_BEFORE_NORM = re.compile(r"(.*\.)?(f_key\.0|f_query\.0|conv_bn_dropout\.0|context\.0|W\.0)\.bias")
_EPSILON = 1e-5  # InPlaceABN's, added to its weight


@dataclass
class LoadReport:
    """The result of a load. Names are the module's; in ``unknown``, ``left_out`` and ``ignored`` the checkpoint's,
    without the prefix that was asked for.

    Attributes:
        recognised: the layout of the checkpoint.
        preprocessing: what the layout's weights expect of a picture; None where it is not known.
        loaded: names that were loaded.
        missing: names of the module that the checkpoint does not have. They keep their values.
        unknown: names of the checkpoint that are not in the module or in the layout.
        mismatched: name, with the two shapes or dtypes; or with a name that the module has for the same parameter and
            the checkpoint for another tensor.
        left_out: names of parts that the module does not have (a backbone, for a head alone; an auxiliary head; a
            criterion beside the network).
        filled: biases that the layout does not have, set to zero.
        folded: biases that the module does not have, subtracted from the running mean of the norm after them.
        ignored: names that the network does not use.
        notes: further remarks.
    """

    recognised: Recognised
    preprocessing: Preprocessing | None = None
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every parameter was loaded and every name of the checkpoint was used."""
        return not (self.missing or self.unknown or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.recognised.format} {self.recognised.system}: {len(self.loaded)} tensors loaded"]
        for name in ("missing", "unknown", "mismatched", "left_out", "filled", "folded", "ignored", "notes"):
            entries = getattr(self, name)
            if entries:
                lines.append(bounded(f"{name.replace('_', ' ')} ({len(entries)}): {', '.join(entries)}"))
        if self.preprocessing is not None:
            lines.append(f"preprocessing: {self.preprocessing}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint belongs in a module, or a module in a checkpoint.

    Attributes:
        strip, prepend: removed from the translated names, put before the rest. One of them is empty: the checkpoint is
            of more than the module, or of less; both if it is of the same.
        matches: tensors of the module that are found.
        extras: names of the stripped or the prepended part that have no counterpart.
    """

    strip: str
    prepend: str
    matches: int
    extras: int

    def ours(self, name: str) -> str | None:
        return self.prepend + name[len(self.strip) :] if name.startswith(self.strip) else None


def load(
    module: nn.Module,
    source: Source | Mapping[str, Any] | nn.Module,
    *,
    strict: bool = True,
    inplace_abn: bool = False,
    prefix: str | None = None,
) -> LoadReport:
    """Loads weights of any known layout into a module of :mod:`segattn_ops.nn` or a head or network of
    :mod:`segattn_ops.models`.

    The checkpoint may hold more than the module (a whole network for a head), or less with ``strict=False``. Prefixes
    of wrappers and training modules are found, and one-element tensors take the module's shape. If only one of the two
    layouts has a bias before a batch norm, it is set to zero or folded into the running mean: the same function.

    A network's ``preprocessing`` becomes that of the layout. A backbone does not know its network: after a load into
    ``model.backbone``, set ``model.preprocessing = report.preprocessing``.

    What a state dict does not store but the layout implies (position or criss-cross attention, the activation, the
    scale of a non-local block, ``align_corners``, InPlaceABN's norms) is compared with the module: a ``UserWarning``
    and the report's notes name what differs, and tensors with NaN or infinite values.

    Args:
        module: takes the weights, in its own dtype and on its own device.
        source: a file or file object (see :func:`~segattn_ops.checkpoints.read`; no pickled code is run), a state dict
            of tensors or numpy arrays, perhaps inside a checkpoint, or a module, whose state dict is taken.
        strict: raise unless every parameter of the module is found and every name of the checkpoint is known.
        inplace_abn: take norm weights as InPlaceABN does, |weight| + 1e-5. For checkpoints trained by CCNet's own
            code.
        prefix: load only the names that begin so. For checkpoints of several networks ("student.", "state_dict_ema.",
            "ema_") or blocks; "" for the names without a prefix where there are prefixed copies.

    Returns:
        LoadReport: what was loaded, and by name what was not. Nothing is loaded if it raises.

    Raises:
        TypeError: if ``source`` or ``module`` is of another type.
        ValueError: with the names, if ``strict`` and something is missing, unknown or of the wrong shape; if nothing
            fits the module; if the layout is not known or fits the module in several places; if there are several
            networks in the checkpoint and no ``prefix``; and for tensors on the meta device, quantized or sparse.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"checkpoints.load: module must be a torch.nn.Module (got {type(module).__name__})")
    checkpoint = source if isinstance(source, (Mapping, nn.Module)) else read(source)
    state, notes = unwrap(checkpoint, prefix)
    module = unwrapped(module)
    target = module.state_dict()
    _require_values(module, target, state)
    translation, place = _best(*candidates(state, prefix), checkpoint, prefix, target, type(module).__name__)
    report = LoadReport(translation.recognised, translation.preprocessing, ignored=translation.ignored, notes=notes)
    if inplace_abn:
        _absolute_norms(translation.state)
    mismatches: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    found: State = {}
    for name, value in translation.state.items():
        ours = place.ours(name)
        auxiliary = name.startswith("aux_classifier.") and not place.strip
        if ours is None or (auxiliary and not _has_part(target, place.prepend)):
            report.left_out.append(translation.source[name])
        elif ours not in target:
            if not _fold(ours, value, found, target, translation, place, report):
                report.unknown.append(translation.source[name])
        elif not _castable(value.dtype, target[ours].dtype):
            report.mismatched.append(f"{ours} {target[ours].dtype}, in the checkpoint {value.dtype}")
        elif target[ours].shape != value.shape and not target[ours].numel() == value.numel() == 1:
            mismatches[ours] = tuple(target[ours].shape), tuple(value.shape)
        elif ours not in found:
            found[ours] = value.reshape(target[ours].shape)
    report.mismatched += [f"{name} {ours}, in the checkpoint {theirs}" for name, (ours, theirs) in mismatches.items()]
    report.mismatched += _disagreeing(found, target)
    for name in translation.unknown:
        outside = bool(place.strip) and not name.startswith(translation.recognised.prefix)
        (report.left_out if outside else report.unknown).append(name)
    report.left_out += translation.beside
    _complete(found, target, report)
    report.loaded = list(found)
    reasons = hints(translation, target, mismatches)
    report.notes += [hint.text for hint in reasons]
    if strict and not report.complete:
        raise ValueError(_does_not_fit(module, report, reasons, translation))
    different = _not_finite(found) + differences(translation, module, found, inplace_abn)
    report.notes += different
    for text in different:
        warnings.warn(bounded(f"checkpoints.load: {text}"), UserWarning, stacklevel=2)
    report.notes += _overflows(found, target)
    with torch.no_grad():
        module.load_state_dict(found, strict=False)
    if hasattr(module, "preprocessing") and any(name.startswith("backbone.") for name in found):
        if translation.preprocessing is not None:
            setattr(module, "preprocessing", translation.preprocessing)  # noqa: B010 (an attribute of some modules)
        else:
            report.notes.append(
                "the checkpoint does not say how its pictures were normalised; the network keeps its preprocessing "
                f"({module.preprocessing})"
            )
    return report


def _best(
    state: State, found: list[Found], checkpoint: Any, prefix: str | None, target: State, module: str
) -> tuple[Translation, _Place]:
    """The translation of what fits the module best among what was found in the checkpoint.

    Two heads of one system are not ranked: a student and a teacher that differ in an auxiliary head are both wanted.
    """
    systems = [one.naming.system for one in found if isinstance(one.naming, Naming) and one.naming.head]
    if len(set(systems)) < len(systems):
        raise several(found, prefix)
    translations = [translate(state, one, checkpoint) for one in found]
    places = [_place(translation, target, module) for translation in translations]
    ranks = [(place.matches, -place.extras) for place in places]
    best = [index for index, rank in enumerate(ranks) if rank == max(ranks)]
    if places[best[0]].matches == 0:
        layouts = ", ".join(sorted({f"{one.recognised.format} {one.recognised.system}" for one in found}))
        raise ValueError(f"checkpoints.load: nothing in the checkpoint ({layouts}) fits {module}")
    if len(best) > 1:
        raise several([found[index] for index in best], prefix)
    return translations[best[0]], places[best[0]]


def _require_values(module: nn.Module, target: State, state: State) -> None:
    """Raises ValueError for a module or a checkpoint on the meta device and for quantized and sparse tensors."""
    empty = next((name for name, value in target.items() if value.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"checkpoints.load: {empty} of {type(module).__name__} is on the meta device, which holds no values: "
            "module.to_empty(device='cpu') first"
        )
    for name, value in state.items():
        if value.is_meta:
            raise ValueError(f"checkpoints.load: {name} of the checkpoint is on the meta device, which holds no values")
        if value.layout != torch.strided:
            raise ValueError(f"checkpoints.load: {name} of the checkpoint is sparse ({value.layout}); save it dense")
        if value.is_quantized:
            raise ValueError(
                f"checkpoints.load: {name} of the checkpoint is quantized ({value.dtype}); load the checkpoint of the "
                "network before its quantization"
            )


def _castable(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast keeps the meaning: not from integers and 8-bit floats, which come with a scale, to floating
    point."""
    if source.is_complex:
        return target.is_complex
    return not target.is_floating_point or (source.is_floating_point and source.itemsize >= 2)


def _disagreeing(found: State, target: State) -> list[str]:
    """Takes from ``found`` the second names of parameters that the module shares (APNB's f_key and f_query) where the
    checkpoint's two tensors differ, and returns a remark on each."""
    first: dict[tuple[int, torch.Size], str] = {}
    remarks = []
    for name in list(found):
        other = first.setdefault((target[name].data_ptr(), target[name].shape), name)
        if other != name and not torch.equal(found[other], found[name]):
            del found[name]
            remarks.append(f"{name} is the same parameter as {other}, in the checkpoint another tensor")
    return remarks


def _not_finite(found: State) -> list[str]:
    """A remark on NaN and infinite values: of a training that diverged, or a damaged file."""
    names = [name for name, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    return [f"there are NaN or infinite values in {', '.join(names)}"] if names else []


def _overflows(found: State, target: State) -> list[str]:
    """A remark on finite values that are infinite in the module's dtype (float16)."""
    names = [
        name
        for name, value in found.items()
        if target[name].dtype == torch.float16 and value.dtype != torch.float16 and (value.abs() > 65504).any()
    ]
    return [f"values above 65504 become infinite in float16: {', '.join(names)}"] if names else []


def _does_not_fit(module: nn.Module, report: LoadReport, reasons: list[Hint], translation: Translation) -> str:
    """The message of a strict load: the reasons, and the names that they do not explain."""
    because = f": {'; '.join(hint.text for hint in reasons)}" if reasons else "."
    rest = LoadReport(report.recognised, loaded=report.loaded, ignored=report.ignored, notes=list(report.notes))
    rest.notes = [note for note in report.notes if note not in [hint.text for hint in reasons]]
    ours = {theirs: name for name, theirs in translation.source.items()}
    for kind in ("missing", "unknown", "mismatched", "left_out", "filled", "folded"):
        names = [
            name
            for name in getattr(report, kind)
            if not any(hint.explains(ours.get(name, name).split(" ")[0]) for hint in reasons)
        ]
        setattr(rest, kind, names)
    return f"checkpoints.load: {type(module).__name__} does not fit the checkpoint{because}\n{rest}"


def _norm_weights(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name.endswith(".weight") and f"{name[:-7]}.running_mean" in state and value.is_floating_point():
            yield name, value


def _absolute_norms(state: State) -> None:
    for name, value in list(_norm_weights(state)):
        state[name] = value.abs() + _EPSILON


def _has_part(target: State, prepend: str) -> bool:
    """Whether the module has an auxiliary head."""
    return any(key.startswith(f"{prepend}aux_classifier.") for key in target)


def _place(translation: Translation, target: State, module: str) -> _Place:
    """Where most tensors of the module are found; of equals, where there is the least else.

    One step through each name of the checkpoint for each of its dots, and the same for the module: with a step through
    all names for each prefix, a file of many names would take hours.
    """
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    state = translation.state

    def fits(name: str, ours: str) -> bool:
        return ours in shapes and (shapes[ours] == tuple(state[name].shape) or state[name].numel() == 1)

    matches: Counter[str] = Counter()  # prefix of the checkpoint -> names that fit without it, and names under it
    for name in state:
        matches.update(strip for strip in dotted_prefixes([name]) if fits(name, name[len(strip) :]))
    inside = Counter(strip for name in state for strip in dotted_prefixes([name]) if strip in matches)
    places = [_Place("", "", matches[""], len(state) - matches[""])]
    places += [
        _Place(strip, "", matches[strip], inside[strip] - matches[strip])
        for strip in sorted(matches, key=lambda prefix: (prefix.count("."), prefix))
        if strip
    ]
    ours_inside: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for ours in shapes:
        for prepend in dotted_prefixes([ours])[1:]:
            ours_inside[prepend] += 1
            name = ours[len(prepend) :]
            found[prepend] += name in state and fits(name, ours)
    places += [
        _Place("", prepend, found[prepend], len(state) - found[prepend] + ours_inside[prepend] - found[prepend])
        for prepend in dotted_prefixes(target)[1:]
    ]
    best = max(one.matches for one in places)
    tied = [one for one in places if one.matches == best]
    if best == 0 or tied[0].strip == tied[0].prepend == "":
        return places[0]
    least = min(one.extras for one in tied)
    tied = [one for one in tied if one.extras == least]
    if len(tied) > 1:
        choices = bounded(", ".join(repr(one.strip or one.prepend) for one in tied))
        raise ValueError(
            f"checkpoints.load: a checkpoint of {translation.recognised.system} fits {module} equally well in several "
            f"places: {choices}; load into the part itself, or choose a part of the checkpoint with prefix="
        )
    return tied[0]


def _fold(
    name: str,
    bias: Tensor,
    found: State,
    target: State,
    translation: Translation,
    place: _Place,
    report: LoadReport,
) -> bool:
    """Subtracts a bias that the module does not have from the running mean of the batch norm after it."""
    match = re.fullmatch(r"(.*\.)?0\.bias", name)
    mean = f"{match.group(1) or ''}1.running_mean" if match else None
    if mean is None or mean not in target:
        return False
    stored = translation.state.get(place.strip + mean[len(place.prepend) :])
    if stored is None or not stored.shape == bias.shape == target[mean].shape:
        return False
    if not (_castable(stored.dtype, target[mean].dtype) and _castable(bias.dtype, target[mean].dtype)):
        return False
    found[mean] = stored - bias
    report.folded.append(f"{name} into {mean}")
    return True


def _complete(found: State, target: State, report: LoadReport) -> None:
    """Fills the biases that may be zero and lists the other missing names."""
    wrong = {entry.split(" ")[0] for entry in report.mismatched}
    for name, value in target.items():
        if name in found or name in wrong:
            continue
        if name.endswith(".num_batches_tracked"):
            continue  # absent before PyTorch 0.4.1 and in InPlaceABN; only cumulative averages use it
        if report.recognised.format in ("mmsegmentation", "mmcv") and _BIAS_BEFORE_NORM.fullmatch(name):
            found[name] = torch.zeros_like(value)
            report.filled.append(name)
        else:
            report.missing.append(name)
