"""Loads a checkpoint of any known layout into a module of segattn_ops."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .files import read
from .translate import Recognised, State, Translation, to_native

# Convolutions before a batch norm that have a bias here and none in mmcv's ConvModule: a bias of zero is the same
# function.
_BIAS_BEFORE_NORM = re.compile(r"(.*\.)?(f_key\.0|f_query\.0|conv_bn_dropout\.0|context\.0|W\.0)\.bias")
_EPSILON = 1e-5  # InPlaceABN's, added to its weight


@dataclass
class LoadReport:
    """The result of a load. Names are the module's; in ``unknown``, ``left_out`` and ``ignored`` the checkpoint's.

    Attributes:
        recognised: the layout of the checkpoint.
        loaded: names that were loaded.
        missing: names of the module that the checkpoint does not have.
        unknown: names of the checkpoint that are not in the module or in the layout.
        mismatched: name, with the two shapes.
        left_out: names of parts that the module does not have (a backbone, for a head alone; an auxiliary head).
        filled: biases that the layout does not have, set to zero.
        folded: biases that the module does not have, subtracted from the running mean of the norm after them.
        ignored: names that the network does not use.
        notes: further remarks.
    """

    recognised: Recognised
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
        layout = f"{self.recognised.format} {self.recognised.system}"
        lines = [f"{layout}: {len(self.loaded)} tensors loaded"]
        for name in ("missing", "unknown", "mismatched", "left_out", "filled", "folded", "ignored", "notes"):
            entries = getattr(self, name)
            if entries:
                lines.append(f"{name.replace('_', ' ')} ({len(entries)}): {', '.join(entries)}")
        return "\n".join(lines)


def load(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    inplace_abn: bool = False,
) -> LoadReport:
    """Loads weights of any known layout into a module of :mod:`segattn_ops.nn` or a head or network of
    :mod:`segattn_ops.models`.

    The checkpoint may hold more than the module (a whole network for a head), or less with ``strict=False``. Wrappers'
    prefixes are removed and one-element tensors take the module's shape. If only one of the two layouts has a bias
    before a batch norm, it is set to zero or folded into the running mean: the same function.

    Args:
        module: takes the weights, in its own dtype and on its own device.
        source: a file (see :func:`~segattn_ops.checkpoints.read`; no pickled code is run) or a state dict, perhaps
            inside a checkpoint.
        strict: raise unless every parameter of the module is found and every name of the checkpoint is known.
        inplace_abn: take norm weights as InPlaceABN does, |weight| + 1e-5. For checkpoints trained by CCNet's own
            code.

    Returns:
        LoadReport: what was loaded, and by name what was not. Nothing is loaded if it raises.

    Raises:
        ValueError: with all names, if ``strict`` and something is missing, unknown or of the wrong shape; and if
            the layout is not known or fits the module in several places.
    """
    checkpoint = source if isinstance(source, Mapping) else read(source)
    translation = to_native(checkpoint)
    report = LoadReport(translation.recognised, ignored=translation.ignored)
    target = module.state_dict()
    if inplace_abn:
        _absolute_norms(translation.state)
    elif translation.recognised.system == "ccnet" and any((w < 0).any() for _, w in _norm_weights(translation.state)):
        report.notes.append("there are negative norm weights: if InPlaceABN trained them, load with inplace_abn=True")
    strip, prepend = _place(translation, target, type(module).__name__)
    found: State = {}
    for name, value in translation.state.items():
        ours = prepend + name[len(strip) :] if name.startswith(strip) else None
        if ours is None or (name.startswith("aux_classifier.") and not _has_part(target, prepend, name)):
            report.left_out.append(translation.source[name])
        elif ours not in target:
            if not _fold(ours, value, found, target, translation, strip, prepend, report):
                report.unknown.append(translation.source[name])
        elif target[ours].shape != value.shape and not target[ours].numel() == value.numel() == 1:
            report.mismatched.append(f"{ours} {tuple(target[ours].shape)}, in the checkpoint {tuple(value.shape)}")
        elif ours not in found:
            found[ours] = value.reshape(target[ours].shape)
    report.unknown += translation.unknown
    _complete(found, target, report)
    report.loaded = list(found)
    if strict and not report.complete:
        raise ValueError(f"checkpoints.load: {type(module).__name__} does not fit the checkpoint.\n{report}")
    with torch.no_grad():
        module.load_state_dict(found, strict=False)
    return report


def _norm_weights(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name.endswith(".weight") and f"{name[:-7]}.running_mean" in state:
            yield name, value


def _absolute_norms(state: State) -> None:
    for name, value in list(_norm_weights(state)):
        state[name] = value.abs() + _EPSILON


def _has_part(target: State, prepend: str, name: str) -> bool:
    return any(key.startswith(prepend + name.split(".")[0] + ".") for key in target)


def _dotted_prefixes(names: Mapping[str, Any]) -> list[str]:
    """ "" and all prefixes ending in a dot, shortest first."""
    found = {""}
    for name in names:
        parts = name.split(".")[:-1]
        found |= {".".join(parts[:n]) + "." for n in range(1, len(parts) + 1)}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _place(translation: Translation, target: State, module: str) -> tuple[str, str]:
    """The prefixes to strip from the translated names and to prepend to them, so that most tensors of the module are
    found. One of them is empty: the checkpoint is of more than the module, or of less; both if it is of the same.
    """
    shapes = {name: tuple(value.shape) for name, value in target.items()}

    def matches(strip: str, prepend: str) -> int:
        count = 0
        for name, value in translation.state.items():
            shape = shapes.get(prepend + name[len(strip) :]) if name.startswith(strip) else None
            count += shape is not None and (shape == tuple(value.shape) or value.numel() == 1)
        return count

    choices = [(strip, "") for strip in _dotted_prefixes(translation.state)]
    choices += [("", prepend) for prepend in _dotted_prefixes(target) if prepend]
    counts = {choice: matches(*choice) for choice in choices}
    best = max(counts.values())
    tied = [choice for choice, count in counts.items() if count == best]
    if best == 0 or ("", "") in tied:
        return "", ""
    if len(tied) > 1:
        places = ", ".join(repr(strip or prepend) for strip, prepend in tied)
        raise ValueError(
            f"checkpoints.load: a checkpoint of {translation.recognised.system} fits {module} equally well in several "
            f"places: {places}"
        )
    return tied[0]


def _fold(
    name: str,
    bias: Tensor,
    found: State,
    target: State,
    translation: Translation,
    strip: str,
    prepend: str,
    report: LoadReport,
) -> bool:
    """Subtracts a bias that the module does not have from the running mean of the batch norm after it."""
    match = re.fullmatch(r"(.*\.)?0\.bias", name)
    mean = f"{match.group(1) or ''}1.running_mean" if match else None
    if mean is None or mean not in target:
        return False
    stored = translation.state.get(strip + mean[len(prepend) :])
    if stored is None:
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
