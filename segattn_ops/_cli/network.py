"""The network or head that a checkpoint is of, built from the names and shapes of its tensors."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoints
from .._files import shown
from ..checkpoints.explain import _depth, _stem
from ..checkpoints.translate import Translation
from .command_line import Refused, require

_HEADS = ("danet", "ccnet", "ann", "non_local", "dfn")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in the module that it is of.

    Attributes:
        module: a network or a head of :mod:`segattn_ops.models`, with the weights.
        backbone: of a network: the ResNet, as ``resnet101``.
        translation: of the names.
        report: of the load, with its warnings among the notes.
    """

    module: nn.Module
    backbone: str | None
    translation: Translation
    report: checkpoints.LoadReport


def load(path: Path, prefix: str | None = None, inplace_abn: bool = False) -> Loaded:
    """Reads a checkpoint of any known layout into the module that it is of.

    Raises:
        Refused: for a checkpoint of something else than a network or its head.
        OSError, TypeError, ValueError, ImportError: as :func:`segattn_ops.checkpoints.load`.
    """
    checkpoint = checkpoints.read(path)
    translation = checkpoints.to_native(checkpoint, prefix)
    system = translation.recognised.system
    if system not in _HEADS:
        what = "a ResNet" if system == "backbone" else f"a block ({system.replace('_', ' ')})"
        raise Refused(
            f"{path} holds {what} alone; networks and heads ({', '.join(_HEADS)}) are built here. "
            "Build the module, and call segattn_ops.checkpoints.load(module, file)"
        )
    require("torchvision")
    backbone = _backbone(translation)
    module = _build(translation, backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are among the report's notes
        report = checkpoints.load(module, checkpoint, inplace_abn=inplace_abn, prefix=prefix)
    return Loaded(module, backbone, translation, report)


def made_by(name: str) -> nn.Module:
    """What the function MODULE:FUNCTION returns. Modules of the current folder are found, as by ``python -m``.

    Raises:
        Refused: for a name that is none, and a function that does not return a module.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function.isidentifier():
        raise Refused(f"--network must be MODULE:FUNCTION (got {shown(name, 80)!r})")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module_name), function, None)
    except ImportError as error:
        raise Refused(f"--network: {module_name} cannot be imported ({error})") from error
    finally:
        sys.path.remove("")
    if not callable(make):
        raise Refused(f"--network: {module_name} has no function {function}")
    made = make()
    if not isinstance(made, nn.Module):
        raise Refused(f"--network: {name} must return a torch.nn.Module (got a {type(made).__name__})")
    return made


def _backbone(translation: Translation) -> str | None:
    names = [name for name in translation.state if name.startswith("backbone.")]
    if not names:
        return None
    depth = _depth(names, "backbone.")
    if not depth.startswith("resnet"):
        raise Refused(f"the backbone is a {depth}, which is not one of ResNet-18, 34, 50, 101, 152")
    return depth


def _build(translation: Translation, backbone: str | None) -> nn.Module:
    from .. import models
    from ..models.networks import _assemble

    system = translation.recognised.system
    state = {n.removeprefix("classifier."): v for n, v in translation.state.items() if n.startswith("classifier.")}
    settings = _settings(system, state, translation.recognised.format)
    classes = settings.pop("num_classes")
    name = {"danet": "DANet", "ccnet": "CCNet", "ann": "ANN", "non_local": "NonLocal", "dfn": "DFN"}[system]
    head_class = getattr(models, f"{name}Head")
    inputs = settings.pop("inputs")
    if backbone is None:
        head: nn.Module = head_class(*inputs, classes, **settings)
        return head
    hidden = translation.state.get("aux_classifier.0.weight")
    dilated = system != "dfn" and backbone not in ("resnet18", "resnet34")  # which torchvision does not dilate
    options = {"weights": None, "output_stride": 8 if dilated else 32, "stem": _stem_of(translation)}
    network: nn.Module = _assemble(
        getattr(models, "NonLocalNet" if system == "non_local" else name),
        backbone,
        head_class,
        classes,
        hidden is not None,
        None if hidden is None else hidden.shape[0],
        translation.recognised.format in ("official", "segattn_ops") and system != "dfn",
        options,
        settings,
    )
    return network


def _stem_of(translation: Translation) -> str:
    """CCNet's stem has the shapes of the deep one, but other dilations follow it, except in ANN."""
    if translation.recognised.stem == "ccnet" and translation.recognised.system != "ann":
        return "ccnet"
    return _stem(translation.state, "backbone.")


def _settings(system: str, state: Mapping[str, Tensor], layout: str) -> dict[str, Any]:
    """The arguments of the head: ``inputs``, its first ones, ``num_classes``, and others by name."""

    def size(name: str, axis: int = 0) -> int:
        if f"{name}.weight" not in state or state[f"{name}.weight"].dim() <= axis:
            raise Refused(f"the checkpoint is not a whole {system} head: there is no {name}.weight")
        return state[f"{name}.weight"].shape[axis]

    if system == "danet":
        return {"inputs": [size("conv5a.0", 1)], "num_classes": size("conv8.1")} | {
            "inter_channels": size("conv5a.0"),
            "key_channels": size("sa.query_conv"),
        }
    if system == "ann":
        return {"inputs": [size("fusion.stages.0.f_key.0", 1), size("fusion.stages.0.f_query.0", 1)]} | {
            "num_classes": size("cls"),
            "channels": size("context.0"),
            "key_channels": size("fusion.stages.0.f_key.0"),
            "value_channels": size("fusion.stages.0.f_value"),
        }
    if system == "dfn":
        paper = "smooth_cls_1.weight" in state
        width = size("out_conv")
        return {"inputs": [[size(f"rrb_d_{stage}.{_first(state, stage)}", 1) for stage in (1, 2, 3, 4)]]} | {
            "num_classes": size("smooth_cls_1") if paper else width,
            "channels": width if paper else None,
        }
    joined = {"inputs": [size("conva.0", 1)], "num_classes": size("bottleneck.3")} | {
        "inter_channels": size("conva.0"),
        "out_channels": size("bottleneck.0"),
    }
    if system == "non_local":
        if any(name.startswith("nl.concat_project") for name in state):
            return joined | {"mode": "concatenation"}
        return joined | {"mode": "embedded_gaussian" if "nl.theta.weight" in state else "gaussian"}
    return joined | ({"activation": nn.ReLU} if layout == "mmsegmentation" else {})


def _first(state: Mapping[str, Tensor], stage: int) -> str:
    """The name of the first convolution of a refinement block."""
    start = f"rrb_d_{stage}."
    names = (name.removeprefix(start).removesuffix(".weight") for name in state if name.startswith(start))
    return next(names, "conv1")
