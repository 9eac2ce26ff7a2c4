"""A user's code, which mypy and pyright check (test_types.py). `assert_type` fails for Any too. The ignored errors are
mistakes that must be found: without the error, mypy reports the comment as unused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import assert_type

import segattn_ops
from segattn_ops import checkpoints, models, visualize


def ops(query: Tensor, key: Tensor, value: Tensor, gamma: Tensor) -> None:
    assert_type(segattn_ops.position_attention(query, key, value, 0.5), Tensor)
    assert_type(segattn_ops.channel_attention(query, key, value, scale=-1), Tensor)
    assert_type(segattn_ops.residual_channel_attention(query, gamma), Tensor)
    assert_type(segattn_ops.criss_cross_attention(query, key, value), Tensor)
    assert_type(segattn_ops.criss_cross_affinity(query, key), Tensor)
    assert_type(segattn_ops.criss_cross_aggregation(query, value), Tensor)
    assert_type(segattn_ops.position_attention_map(query, key, torch.tensor([[0, 1]])), Tensor)
    assert_type(segattn_ops.position_attention(query, key, value, return_logsumexp=True), tuple[Tensor, Tensor])
    assert_type(segattn_ops.criss_cross_attention(query, key, value, return_logsumexp=True), tuple[Tensor, Tensor])
    segattn_ops.position_attention(query, key)  # type: ignore[call-overload]
    segattn_ops.position_attention(query, key, value, scale="0.5")  # type: ignore[call-overload]
    segattn_ops.criss_cross_affinity(query, "key")  # type: ignore[arg-type]


def modules(x: Tensor, high: Tensor) -> None:
    assert_type(segattn_ops.nn.PositionAttention(64)(x), Tensor)
    assert_type(segattn_ops.nn.ChannelAttention()(x), Tensor)
    assert_type(segattn_ops.nn.CrissCrossAttention(64)(x), Tensor)
    assert_type(segattn_ops.nn.RecurrentCrissCrossAttention(64)(x), Tensor)
    assert_type(segattn_ops.nn.NonLocal2d(64)(x), Tensor)
    assert_type(segattn_ops.nn.DAModule(64)(x), Tensor)
    assert_type(segattn_ops.nn.APNB(64, 64, 32, 32)(x), Tensor)
    assert_type(segattn_ops.nn.AFNB(64, 64, 64, 32, 32)(x, high), Tensor)
    segattn_ops.nn.PositionAttention(64)(x, high)  # type: ignore[call-arg]


def networks(image: Tensor, target: Tensor) -> None:
    danet = models.danet_resnet50(21, aux_loss=True, output_stride=16)
    assert_type(danet, models.DANet)
    assert_type(models.ccnet_resnet101(), models.CCNet)
    assert_type(models.ann_resnet50(), models.ANN)
    assert_type(models.nonlocal_resnet50(), models.NonLocalNet)
    assert_type(models.dfn_resnet101(), models.DFN)
    assert_type(danet(image), dict[str, Tensor])
    assert_type(danet.preprocessing, checkpoints.Preprocessing)
    assert_type(models.segmentation_loss(danet(image), target), Tensor)
    assert_type(models.dilated_resnet("resnet50")(image), dict[str, Tensor])
    models.danet_resnet50("21")  # type: ignore[arg-type]


def systems(model: nn.Module, image: Tensor, file: Path) -> None:
    report = segattn_ops.convert(model, image)
    assert_type(report, segattn_ops.ConversionReport)
    assert_type(checkpoints.load(model, file), checkpoints.LoadReport)
    assert_type(checkpoints.read(file), Mapping[str, Any])
    assert_type(checkpoints.to_official(model), dict[str, Tensor])
    with visualize.record_attention(model, [(0.5, 0.5)]) as maps:
        model(image)
    assert_type(maps, dict[str, Tensor])
    assert_type(visualize.overlay(image, maps["head"]), NDArray[Any])
    with visualize.record_channel_attention(model) as channels:
        model(image)
    assert_type(channels["head"].image(0), visualize.ChannelMaps)


def settings() -> None:
    with segattn_ops.use_backend("reference"):
        torch.zeros(1)
    assert_type(segattn_ops.build_config(), dict[str, Any])
    segattn_ops.use_backend(1)  # type: ignore[arg-type]
