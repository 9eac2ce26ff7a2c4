"""Converts a checkpoint of DANet, CCNet, ANN, a non-local network or DFN, or of
its head, to the names of:

  segattn_ops     this package's models: classifier., backbone., aux_classifier.
  official        the authors' repositories: DANet, CCNet, ANN, dfn_seg
  mmsegmentation  DAHead, CCHead, ANNHead, NLHead and their EncoderDecoder

IN is recognised by its names, those of Tramac's DANet too: a state dict, or a
file of a training script with one in it, as torch.save or safetensors wrote it.
No pickled code is run. OUT is safetensors if its name ends so."""

from __future__ import annotations

import argparse
import warnings

from torch import Tensor

from .. import checkpoints
from . import network
from .command_line import Refused, input_file, lines, listed, output_file

SUMMARY = "renames the weights of a network for another repository"
EXAMPLES = 4  # of names that change
FORMATS = {
    "segattn_ops": lambda module: dict(module.state_dict()),
    "official": checkpoints.to_official,
    "mmsegmentation": checkpoints.to_mmseg,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="the checkpoint")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--to", choices=tuple(FORMATS), required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--prefix", help="take the names that begin so: of one network of several")
    parser.add_argument(
        "--inplace-abn", action="store_true", help="take norm weights as InPlaceABN does: CCNet's own training"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def run(arguments: argparse.Namespace) -> int:
    source = input_file(arguments.input)
    target = output_file(arguments.output, arguments.force)
    if target.exists() and target.samefile(source):
        raise Refused("IN and OUT are the same file")
    loaded = network.load(source, arguments.prefix, arguments.inplace_abn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        state = FORMATS[arguments.to](loaded.module)
    checkpoints.save(state, target)
    notes = [*loaded.report.notes, *(str(warning.message) for warning in caught)]
    rows = [("read", _read(loaded)), ("wrote", f"{target}: {arguments.to}, {len(state)} tensors, {_size(state)}")]
    print(lines([*rows, *_changes(loaded, state), *(("note", note) for note in notes)]))
    return 0


def _read(loaded: network.Loaded) -> str:
    found = loaded.translation.recognised
    backbone = f", {loaded.backbone} (stem {found.stem})" if loaded.backbone else ", the head alone"
    auxiliary = ", auxiliary head" if getattr(loaded.module, "aux_classifier", None) is not None else ""
    return f"{found.format} {found.system}{backbone}{auxiliary}, {len(loaded.report.loaded)} tensors"


def _size(state: dict[str, Tensor]) -> str:
    return f"{sum(value.nbytes for value in state.values()) / 1e6:.1f} MB"


def _changes(loaded: network.Loaded, state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """What was renamed, added, changed and dropped, by the names of IN and OUT."""
    report, source = loaded.report, _sources(loaded)
    ours: dict[int, list[str]] = {}  # by storage, which an export shares with the module
    for name, value in loaded.module.state_dict().items():
        ours.setdefault(value.data_ptr(), []).append(name)
    renamed: list[tuple[str, str]] = []
    kept, added, computed = [], [], []
    exported = set()
    for name, value in state.items():
        names = ours.get(value.data_ptr())
        if names is None:
            computed.append(name)
            continue
        native = names.pop(0) if len(names) > 1 else names[0]  # several where parameters are shared (APNB)
        exported.add(native)
        theirs = source.get(native)
        if theirs is None:
            added.append(name)
        elif theirs == name:
            kept.append(name)
        else:
            renamed.append((theirs, name))
    left = (name for name in loaded.module.state_dict() if name in source and name not in exported)
    auxiliary = [name for name in left if name.startswith("aux_classifier.")]  # others are computed under new names
    dropped = [*report.left_out, *report.ignored, *(source[name] for name in auxiliary)]
    rows = [("renamed", f"{len(renamed)}, such as {'; '.join(_examples(renamed))}")] if renamed else []
    rows += [("same name", str(len(kept)))] if kept else []
    rows += [("added", f"{len(added)}, which IN does not have: {listed(added)}")] if added else []
    rows += (
        [("computed", f"{len(computed)}, a bias moved into a norm, or zero: {listed(computed)}")] if computed else []
    )
    rows += [("folded", f"{len(report.folded)}: {listed(report.folded)}")] if report.folded else []
    rows += [("dropped", f"{len(dropped)}: {listed(dropped)}")] if dropped else []
    if report.preprocessing is not None:
        rows.append(("pictures", f"{report.preprocessing}; state dicts do not store this"))
    return rows


def _examples(renamed: list[tuple[str, str]]) -> list[str]:
    """One for each part of the network."""
    found: dict[str, str] = {}
    for theirs, name in renamed:
        found.setdefault(name.split(".")[0], f"{theirs} -> {name}")
    return list(found.values())[:EXAMPLES]


def _sources(loaded: network.Loaded) -> dict[str, str]:
    """IN's name for each name of the module."""
    names = loaded.translation.source
    prefix = "" if loaded.backbone else "classifier."
    return {name.removeprefix(prefix): theirs for name, theirs in names.items()}
