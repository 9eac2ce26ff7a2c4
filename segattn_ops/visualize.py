"""Attention maps over images, for chosen points of an image.

The fused ops do not store the attention map. Only its rows for the chosen points are computed::

    points = [(0.4, 0.55), (0.8, 0.2)]            # (y, x) as fractions of the image
    with record_attention(model, points) as maps:
        model(batch)
    draw_attention(image, {name: m[0] for name, m in maps.items()}, points, "attention.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nn import CrissCrossAttention, NonLocal2d, PositionAttention, RecurrentCrissCrossAttention
from .ops import criss_cross_attention_map, position_attention_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
SOFTMAX_MODES = ("embedded_gaussian", "gaussian")


def grid_positions(points: Points, height: int, width: int) -> Tensor:
    """Points as fractions (y, x) of an image -> (P, 2) integer positions in its (height, width) feature map.

    Raises:
        ValueError: for an empty list, or a point that is not a pair of numbers in [0, 1].
    """
    values = torch.as_tensor(points, dtype=torch.float64)
    if values.dim() != 2 or values.shape[1] != 2 or len(values) == 0:
        raise ValueError(f"visualize: points must be a list of (y, x) pairs (got shape {list(values.shape)})")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"visualize: points must be fractions of the image in [0, 1] (got {values.tolist()})")
    sizes = torch.tensor([height, width])
    return torch.minimum((values * sizes).long(), sizes - 1)


@torch.no_grad()
def attention_maps(module: nn.Module, x: Tensor, points: Points) -> Tensor:
    """The rows of a module's attention map for the points.

    Args:
        module: ``PositionAttention``, ``CrissCrossAttention``, ``RecurrentCrissCrossAttention`` (the
            attention map of all passes together, over the whole image) or ``NonLocal2d`` in a softmax mode.
        x: (B, C, H, W), the module's input.
        points: (y, x) as fractions of the image.

    Returns:
        (B, P, H, W) (H and W halved for a NonLocal2d with ``sub_sample``); each row sums to 1.

    Raises:
        TypeError: for a module without such an attention map.
        ValueError: for points outside the image.
    """
    positions = grid_positions(points, *x.shape[2:])
    if isinstance(module, PositionAttention):
        return position_attention_map(module.query_conv(x), module.key_conv(x), positions, module.scale)
    if isinstance(module, CrissCrossAttention):
        recurrence = module.recurrence if isinstance(module, RecurrentCrissCrossAttention) else 1
        queries, keys = [], []
        for step in range(recurrence):
            if step:
                x = module._attend(x)
            queries.append(module.query_conv(x))
            keys.append(module.key_conv(x))
        return criss_cross_attention_map(queries, keys, positions, recurrence, module.scale)
    if isinstance(module, NonLocal2d) and module.mode in SOFTMAX_MODES:
        query = x if module.mode == "gaussian" else module.theta(x)
        key = module.phi(x) if hasattr(module, "phi") else x
        return position_attention_map(query, key, positions, module.scale)
    raise TypeError(f"visualize: {type(module).__name__} has no map of positions to look at")


def _has_map(module: nn.Module) -> bool:
    if isinstance(module, NonLocal2d):
        return module.mode in SOFTMAX_MODES
    return isinstance(module, PositionAttention | CrissCrossAttention)


@contextmanager
def record_attention(model: nn.Module, points: Points) -> Iterator[dict[str, Tensor]]:
    """Records attention maps of every position, criss-cross and Non-local attention of a model as it runs.

    Args:
        model: any module that contains ``segattn_ops.nn`` modules.
        points: (y, x) as fractions of the image.

    Yields:
        A dictionary filled by each forward: module name -> (B, P, H, W) as :func:`attention_maps`. For a module that
        runs twice it contains the last result.

    Raises:
        ValueError: if the model contains no such module, or for points outside the image.
    """
    grid_positions(points, 1, 1)  # raises for a bad point before the model runs
    found = {name or type(module).__name__: module for name, module in model.named_modules() if _has_map(module)}
    if not found:
        raise ValueError(f"visualize: {type(model).__name__} contains no attention module with a map of positions")
    maps: dict[str, Tensor] = {}
    handles = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            maps[name] = attention_maps(module, inputs[0], points)

        return hook

    try:
        for name, module in found.items():
            handles.append(module.register_forward_pre_hook(recorder(name)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _as_image(image: np.ndarray | Tensor) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1] from (H, W), (H, W, 3) or (3, H, W); uint8 or floats in [0, 1]."""
    pixels: np.ndarray = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.ndim == 3 and pixels.shape[2] != 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"visualize: image must be (H, W), (H, W, 3) or (3, H, W) (got {list(pixels.shape)})")
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"visualize: image must be uint8 or floating point in [0, 1] (got {pixels.dtype})")
    return np.clip(pixels.astype(np.float32), 0, 1)


def overlay(
    image: np.ndarray | Tensor, attention: Tensor, opacity: float = 0.85, colormap: str = "inferno"
) -> np.ndarray:
    """An attention map as heat over the darkened image in grey.

    Args:
        image: (H, W), (H, W, 3) or (3, H, W); uint8, or floating point in [0, 1].
        attention: (h, w), not negative, of any size. The 98th percentile of its positive values gets the hottest
            colour; it is interpolated to the image's size.
        opacity: of the hottest colour, in [0, 1].
        colormap: of matplotlib, by name.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: for shapes or dtypes other than these.
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib import colormaps

    picture = _as_image(image)
    if attention.dim() != 2 or attention.numel() == 0:
        raise ValueError(f"visualize: attention must be (h, w), not empty (got {list(attention.shape)})")
    weights = attention.detach().float().cpu()
    attended = weights[weights > 0]
    top = float(attended.quantile(0.98)) if 0 < attended.numel() <= 2**24 else float(weights.max())
    weights = (weights / top).clamp_(0, 1) if top > 0 else weights
    size = (picture.shape[0], picture.shape[1])
    heat = F.interpolate(weights[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    grey = (0.55 * picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[:, :, None]
    alpha = opacity * np.sqrt(heat)[:, :, None]
    colour = np.asarray(colormaps[colormap](0.15 + 0.85 * heat), dtype=np.float32)[:, :, :3]
    blended: np.ndarray = np.rint(255 * ((1 - alpha) * grey + alpha * colour))
    return blended.astype(np.uint8)


def draw_attention(
    image: np.ndarray | Tensor,
    maps: Mapping[str, Tensor],
    points: Points,
    path: str | PathLike[str] | None = None,
    caption: str | None = None,
) -> Figure:
    """A figure with one row for each point: the image with the point marked, then each attention map over the image.

    Args:
        image: as :func:`overlay`.
        maps: title -> (P, h, w), the attention maps of the P points.
        points: (y, x) as fractions of the image.
        path: file to save the figure to; not saved if None.
        caption: a line below.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if there are no attention maps, or one does not have a row for each point.
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not maps:
        raise ValueError("visualize: no maps to draw")
    for title, rows in maps.items():
        if rows.dim() != 3 or len(rows) != len(points):
            raise ValueError(f"visualize: {title} must be ({len(points)}, h, w) (got {list(rows.shape)})")
    picture = _as_image(image)
    height, width = picture.shape[:2]
    columns = 1 + len(maps)
    panel = 3.4
    figure = Figure(
        figsize=(panel * columns, panel * height / width * len(points) + 0.7), layout="constrained", dpi=110
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(points), columns, squeeze=False)
    for row, (y, x) in enumerate(points):
        panels = {"point": picture} | {title: overlay(picture, rows[row]) for title, rows in maps.items()}
        for ax, (title, shown) in zip(axes[row], panels.items(), strict=True):
            ax.imshow(shown, interpolation="bilinear")
            ax.plot(x * width, y * height, marker="o", markersize=9, markerfacecolor="none", color="white", mew=3)
            ax.plot(x * width, y * height, marker="o", markersize=9, markerfacecolor="none", color="#00b7c7", mew=1.6)
            ax.set_axis_off()
            ax.set_title(title if row == 0 else "", fontsize=10)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#555555")
    if path is not None:
        figure.savefig(path)
    return figure
