"""The attention of two points of the photograph, drawn over it: position attention, criss-cross with R = 1 and 2."""

from __future__ import annotations

from pathlib import Path

import torch

from segattn_ops import nn, position_attention_map, visualize

from .features import FeatureSource, projections
from .workloads import Workload

POINTS = {
    "astronaut": ((0.28, 0.45), (0.72, 0.30)),
    "chelsea": ((0.38, 0.47), (0.80, 0.85)),
    "coffee": ((0.30, 0.50), (0.15, 0.12)),
    "rocket": ((0.55, 0.52), (0.20, 0.30)),
}


def _block(kind: type[torch.nn.Module], workload: Workload, seed: int, **arguments) -> torch.nn.Module:
    """The package's module with the benchmark's projections, so that the picture shows what was timed."""
    block = kind(workload.channels, key_channels=workload.key_channels, **arguments)
    for name, convolution in projections(workload, seed).items():
        getattr(block, f"{name}_conv").load_state_dict(convolution.state_dict())
    torch.nn.init.constant_(block.gamma, 0.5)
    return block.eval()


def draw(
    source: FeatureSource,
    size: tuple[int, int],
    points: tuple[tuple[float, float], ...],
    path: Path,
    caption: str,
    key_channels: int = 64,
) -> Path:
    """Writes the picture: a row for each point, with a caption below."""
    x = source.window(*size)
    workload = Workload("position", *size, channels=x.shape[1], key_channels=key_channels)
    position = _block(nn.PositionAttention, workload, source.seed)
    blocks = {
        "criss-cross, R = 1": _block(nn.RecurrentCrissCrossAttention, workload, source.seed, recurrence=1),
        "criss-cross, R = 2": _block(nn.RecurrentCrissCrossAttention, workload, source.seed, recurrence=2),
    }
    with torch.no_grad():  # without the values, for which the reference backend would store the whole attention map
        rows = position_attention_map(
            position.query_conv(x), position.key_conv(x), visualize.grid_positions(points, *size), position.scale
        )
    maps = {"position attention": rows[0]}
    maps |= {title: visualize.attention_maps(block, x, points)[0] for title, block in blocks.items()}
    visualize.draw_attention(source.picture(*size), maps, points, path, caption)
    return path
