"""Recognises the layout of a state dict from its keys, and translates it into ours."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._files import bounded
from .containers import State, unwrap
from .names import AUXILIARY, BLOCKS, HEADS, IGNORED, PREFIXES, STAGES, STEMS, Naming, Pairs
from .preprocessing import Preprocessing, of_layout

_MOST = 256  # ResNets, and heads or blocks of a kind, among which a choice is looked for


@dataclass(frozen=True)
class Recognised:
    """Layout of a state dict.

    Attributes:
        system: danet, ccnet, ann, non_local, dfn; a block (position, channel, criss_cross, query_key_value for the
            official position and criss-cross blocks, which have the same names, non_local_block, apnb, afnb,
            da_module, ...); or backbone for a ResNet alone.
        format: official, mmsegmentation, mmcv, tramac, alexhex7, timm, external-attention, segattn_ops or torchvision.
        prefix: of the head's or block's names.
        stem: of the backbone, as :func:`segattn_ops.models.dilated_resnet` names it; None without a backbone.
    """

    system: str
    format: str
    prefix: str = ""
    stem: str | None = None


@dataclass
class Translation:
    """A state dict in our names: ``classifier.``, ``backbone.``, ``aux_classifier.`` for heads, plain for blocks.

    Attributes:
        recognised: the layout it came in.
        state: tensors by our names.
        source: the checkpoint's name for each of ours.
        unknown: names of the checkpoint that have no place in the layout, or whose place another name has taken.
        ignored: names that the network does not use (the ImageNet classifier).
        beside: names outside the network (a criterion beside it in a training module).
        preprocessing: what the layout's published weights expect of a picture; None where it is not known.
        notes: remarks on the checkpoint.
    """

    recognised: Recognised
    state: State
    source: dict[str, str]
    unknown: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A head, a block or a backbone (naming None) among the names of a state dict.

    Attributes:
        naming: of the head or block.
        prefix: of its names; of the backbone's for a backbone alone.
        root: prefix of the network, with its backbone and auxiliary head.
        backbone: prefix and stem of the network's ResNet.
    """

    naming: Naming | None
    prefix: str
    root: str
    backbone: tuple[str, str] | None = None

    @property
    def recognised(self) -> Recognised:
        stem = None if self.backbone is None else self.backbone[1]
        if self.naming is None:
            return Recognised("backbone", "torchvision", self.prefix, stem)
        ours = self.naming.head and self.naming.format == "official" and self.prefix.endswith("classifier.")
        return Recognised(self.naming.system, "segattn_ops" if ours else self.naming.format, self.prefix, stem)


def rename(key: str, pairs: Pairs) -> str | None:
    """``key`` with the longest matching left side of ``pairs`` replaced by its right side; None if none matches."""
    best: tuple[int, str] | None = None
    for theirs, ours in pairs:
        pattern = re.escape(theirs).replace(r"\#", r"(\d+)").replace("#", r"(\d+)")
        match = re.match(rf"{pattern}(?=\.|$)", key)
        if match and (best is None or match.end() > best[0]):
            for number in match.groups():
                ours = ours.replace("#", number, 1)
            best = match.end(), ours + key[match.end() :]
    return None if best is None else best[1]


def dotted_prefixes(names: Iterable[str]) -> list[str]:
    """ "" and all prefixes ending in a dot, shortest first."""
    found = {""}
    for name in names:
        parts = name.split(".")[:-1]
        found |= {".".join(parts[:n]) + "." for n in range(1, len(parts) + 1)}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _prefixes(keys: Iterable[str], name: str) -> list[str]:
    """Prefixes under which ``name`` is a parameter or the stem of one, shortest first."""
    pattern = re.compile(rf"^((?:.*\.)?){re.escape(name)}(?:\.(?:weight|bias))?$")
    return sorted({m.group(1) for key in keys if (m := pattern.match(key))}, key=lambda prefix: (len(prefix), prefix))


def backbones(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Prefix and stem of every ResNet among the keys."""
    keys = set(keys)
    found = []
    for prefix in _prefixes(keys, "layer1.0.conv1"):
        if f"{prefix}layer4.0.conv1.weight" not in keys:
            continue
        marks = (("v1c", "stem.0"), ("deep", "conv1.0"), ("ccnet", "conv3"), ("torchvision", "conv1"))
        stem = next((stem for stem, mark in marks if f"{prefix}{mark}.weight" in keys), None)
        if stem is not None:
            found.append((prefix, stem))
    if len(found) > _MOST:
        raise ValueError(f"checkpoints: there are {len(found)} ResNets in this checkpoint; choose some with prefix=")
    return found


def recognise(state: Mapping[str, Any] | nn.Module, prefix: str | None = None) -> Recognised:
    """Identifies the layout of a state dict (or of the one inside a checkpoint, or a module's) from its keys.

    Args:
        state: the state dict, checkpoint or module.
        prefix: look only at names that begin so ("student."), without it. "" chooses the names that have no prefix
            where there are prefixed copies beside them.

    Raises:
        TypeError: if ``state`` is of another type.
        ValueError: if no layout fits; the message lists the first keys and the layouts known. If several networks or
            blocks fit, and no prefix chooses one; the message lists the choices.
    """
    names, _ = unwrap(state, prefix)
    return choose(names, prefix)[1].recognised


def choose(state: State, prefix: str | None) -> tuple[State, Found]:
    """The only network, block or backbone of a state dict, with the state dict without copies that ``prefix`` excludes.

    Raises:
        ValueError: as :func:`recognise`.
    """
    state, found = candidates(state, prefix)
    blocks = [one for one in found if one.naming is not None]
    remaining = blocks or found
    if len(remaining) > 1:
        raise several(remaining, prefix)
    return state, remaining[0]


def candidates(state: State, prefix: str | None) -> tuple[State, list[Found]]:
    """Everything of a known layout in a state dict: heads with their networks; without a head, blocks and ResNets."""
    found = _candidates(state)
    if prefix == "" and len(found) > 1 and "" in labels(found):
        others = tuple(label for label in labels(found) if label)
        state = {key: value for key, value in state.items() if not key.startswith(others)}
        found = _candidates(state)
    if not found:
        known = sorted({f"{naming.format} {naming.system}" for naming in (*HEADS, *BLOCKS)})
        raise ValueError(
            f"checkpoints: the layout of this state dict is not known (its keys begin {', '.join(list(state)[:4])}); "
            f"known are {', '.join(known)}"
        )
    return state, found


def several(found: Sequence[Found], prefix: str | None) -> ValueError:
    """The choices, as values of ``prefix``; those found are inside the one given."""
    outer = f"{prefix}." if prefix and prefix[-1].isalnum() else prefix or ""
    what = {f"{one.recognised.format} {one.recognised.system}" for one in found}
    choices = ", ".join(repr(outer + label) for label in labels(found))
    return ValueError(
        bounded(
            f"checkpoints: there are several of {', '.join(sorted(what))} in this checkpoint; choose with prefix=, one "
            f"of {choices}"
        )
    )


def labels(found: Sequence[Found]) -> list[str]:
    """A prefix for each that chooses it: of its network where these differ, else what differs in its own prefix."""
    roots = [one.root for one in found]
    if len(set(roots)) == len(roots) and all(roots):
        return roots
    prefixes = [one.prefix for one in found]
    shortest = min(prefixes, key=len)
    for start in range(len(shortest)):
        fronts = [prefix.removesuffix(shortest[start:]) for prefix in prefixes]
        whole = all(front != prefix for front, prefix in zip(fronts, prefixes, strict=True))
        if whole and all(front[-1:] in ("", ".", "_") for front in fronts):
            return fronts
    return prefixes


def _candidates(state: State) -> list[Found]:
    keys = list(state)
    resnets = backbones(keys)
    heads = [(naming, prefix) for naming in HEADS for prefix in _find(state, naming)]
    main = [head for head in heads if not head[1].endswith(tuple(AUXILIARY))]
    if heads:
        return [_network(naming, prefix, resnets, keys) for naming, prefix in main or heads]
    blocks: list[tuple[Naming, str]] = []
    for naming in BLOCKS:
        for prefix in _find(state, naming):
            inside = any(_contains(*block, prefix + naming.anchors[0]) for block in blocks)
            if not inside:
                blocks = [block for block in blocks if not _contains(naming, prefix, block[1] + block[0].anchors[0])]
                blocks.append((naming, prefix))
    found = [Found(naming, prefix, prefix) for naming, prefix in blocks]
    return [*found, *(Found(None, prefix, _around(prefix, keys), (prefix, stem)) for prefix, stem in resnets)]


def _around(prefix: str, keys: Iterable[str]) -> str:
    """The root of a ResNet with a head that is not known: where there is an auxiliary head, else its own prefix."""
    parent = dotted_prefixes([prefix])[max(prefix.count(".") - 1, 0)]
    return parent if any(key.startswith(tuple(parent + name for name in AUXILIARY)) for key in keys) else prefix


def _find(state: State, naming: Naming) -> list[str]:
    """The prefixes under which a layout's anchors all are."""
    keys = list(state)
    found = [set(_prefixes(keys, anchor)) for anchor in naming.anchors]
    together = sorted(set.intersection(*found), key=lambda prefix: (len(prefix), prefix))
    if len(together) > _MOST:
        raise ValueError(f"checkpoints: there are {len(together)} of {naming.system}; choose some with prefix=")
    return [
        prefix
        for prefix in together
        if not any(_has(keys, prefix + name) for name in naming.absent) and _fits(naming, state, prefix)
    ]


def _has(keys: Iterable[str], name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in keys)


def _contains(naming: Naming, prefix: str, name: str) -> bool:
    return name.startswith(prefix) and rename(name[len(prefix) :], naming.pairs) is not None


def _fits(naming: Naming, state: State, prefix: str) -> bool:
    """Distinctions that anchors alone do not make. mmsegmentation's APNB and AFNB have the same names, but APNB's query
    and key are one module, stored twice. A gamma or scale alone is a block only if it has one element."""
    if naming.exact:
        inside = [key for key in state if key.startswith(prefix)]
        if any(rename(key[len(prefix) :], naming.pairs) is None for key in inside):
            return False
        if naming.system in ("channel", "compact_channel"):
            # mmcv's Scale, the gamma of its blocks, has the name "scale" too, without dimensions.
            return state[inside[0]].numel() == 1 and (naming.system == "channel" or state[inside[0]].dim() == 1)
        return True
    if naming.system not in ("afnb", "apnb"):
        return True
    query, key = (
        ("query_project.conv", "key_project.conv") if naming.format == "mmsegmentation" else ("f_query.0", "f_key.0")
    )
    q, k = (state.get(f"{prefix}stages.0.{name}.weight") for name in (query, key))
    shared = q is not None and k is not None and q.shape == k.shape and (q.is_meta or torch.equal(q, k))
    return shared == (naming.system == "apnb")


def _network(naming: Naming, prefix: str, resnets: Sequence[tuple[str, str]], keys: Sequence[str]) -> Found:
    """A head with the network around it: the longest part of its prefix under which there is a ResNet or an auxiliary
    head."""
    for root in reversed(dotted_prefixes([prefix])):
        inside = [resnet for resnet in resnets if resnet[0].startswith(root)]
        if len(inside) > 1:
            usual = PREFIXES.get((naming.system, naming.format), ("", "backbone.", None))[1]
            inside = [resnet for resnet in inside if resnet[0] == root + usual] or inside
        if len(inside) > 1:
            choices = ", ".join(repr(resnet[0]) for resnet in inside)
            raise ValueError(
                bounded(
                    f"checkpoints: the head {prefix!r} has several backbones beside it ({choices}); choose with "
                    "prefix=, or leave out the names of the others"
                )
            )
        auxiliary = tuple(root + name for name in AUXILIARY)
        if inside or any(key.startswith(auxiliary) for key in keys):
            return Found(naming, prefix, root, inside[0] if inside else None)
    return Found(naming, prefix, dotted_prefixes([prefix])[max(prefix.count(".") - 1, 0)])


def to_native(checkpoint: Mapping[str, Any] | nn.Module, prefix: str | None = None) -> Translation:
    """Translates a checkpoint of any known layout into our names.

    Names only; :func:`~segattn_ops.checkpoints.load` fits the tensors to a module.

    Args:
        checkpoint, prefix: as in :func:`recognise`.

    Raises:
        TypeError, ValueError: as :func:`recognise`; ValueError if there is no state dict in it.
    """
    state, notes = unwrap(checkpoint, prefix)
    state, found = choose(state, prefix)
    result = translate(state, found, checkpoint)
    result.notes += notes
    return result


def translate(state: State, found: Found, checkpoint: Any) -> Translation:
    """The state dict in our names, as what was found in it. ``checkpoint`` is what it came in."""
    recognised = found.recognised
    result = Translation(recognised, {}, {})
    result.preprocessing = of_layout(recognised.system, recognised.format, recognised.stem, checkpoint)
    for key, value in state.items():
        name = _native_name(key, found)
        if name is not None and name not in result.state:
            result.state[name] = value
            result.source[name] = key
        elif name is not None:
            result.unknown.append(key)  # a second value for one parameter (dsn. beside aux_classifier.)
        elif not key.startswith(found.root):
            result.beside.append(key)
        elif any(re.fullmatch(pattern, key[len(found.root) :]) for pattern in IGNORED):
            result.ignored.append(key)
        else:
            result.unknown.append(key)
    return result


def _native_name(key: str, found: Found) -> str | None:
    naming, root, backbone = found.naming, found.root, found.backbone
    if naming is not None and key.startswith(found.prefix):
        name = rename(key[len(found.prefix) :], naming.pairs)
        if name is not None:
            return f"classifier.{name}" if naming.head else name
    for prefix, pairs in AUXILIARY.items() if key.startswith(root) else ():
        if key.startswith(root + prefix):
            name = rename(key[len(root + prefix) :], pairs)
            if name is not None:
                return f"aux_classifier.{name}"
    if backbone is not None and key.startswith(backbone[0]):
        name = rename(key[len(backbone[0]) :], (*STEMS[backbone[1]], *STAGES))
        if name is not None:
            return f"backbone.{name}"
    return None
