"""mmsegmentation, mmcv, timm and segmentation_models_pytorch for the tests of conversion."""

import importlib
import os
import sys
import types
import warnings
from importlib.machinery import ModuleSpec

import pytest


class _NoExtension(types.ModuleType):
    """Stands in for mmcv's compiled extension, which mmcv-lite lacks and none of the heads under test calls."""

    __all__: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # mmengine asks for its loader

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def need(name: str) -> types.ModuleType:
    """Imports a package of requirements/interop.txt; skips the test without it, or fails where it is required."""
    if name.split(".")[0] in ("mmcv", "mmseg"):
        sys.modules.setdefault("mmcv._ext", _NoExtension("mmcv._ext"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("SEGATTN_REQUIRE_INTEROP") == "1":
            raise
        pytest.skip(f"{error}; pip install --no-deps -r requirements/interop.txt")


def mmseg_head(kind: str, **arguments):
    """A decode head of mmsegmentation with batch norm, in evaluation mode."""
    heads = need("mmseg.models.decode_heads")
    return getattr(heads, kind)(norm_cfg={"type": "BN"}, align_corners=False, **arguments).eval()


def mmseg_network(decode_head: dict, depth: int = 50, channels: int = 256):
    """EncoderDecoder with a ResNetV1c at output stride 8 and an auxiliary FCN head, in evaluation mode."""
    need("mmseg.models")
    from mmseg.registry import MODELS

    norm = {"type": "BN"}
    config = {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "ResNetV1c",
            "depth": depth,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "dilations": (1, 1, 2, 4),
            "strides": (1, 2, 1, 1),
            "norm_cfg": norm,
            "norm_eval": False,
            "style": "pytorch",
            "contract_dilation": True,
        },
        "decode_head": {"norm_cfg": norm, "align_corners": False, **decode_head},
        "auxiliary_head": {
            "type": "FCNHead",
            "in_channels": 1024 if depth >= 50 else 256,
            "in_index": 2,
            "channels": channels,
            "num_convs": 1,
            "concat_input": False,
            "num_classes": decode_head["num_classes"],
            "norm_cfg": norm,
            "align_corners": False,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    return MODELS.build(config).eval()
