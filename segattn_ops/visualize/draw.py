"""Attention maps as heat over images."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from .._files import replacing
from .images import Image, as_image, as_map
from .record import Points, fractions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NEEDS = "visualize: drawing needs matplotlib (pip install matplotlib)"


def overlay(
    image: Image, attention: np.ndarray | Tensor, opacity: float = 0.85, colormap: str = "inferno"
) -> np.ndarray:
    """An attention map as heat over the darkened image in grey.

    Args:
        image: the path of an image file, a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or (C, H, W)
            of 1, 3 or 4 channels (the fourth is opacity, over white). bool, uint8, or numbers in [0, 1] (floating point
            only), [0, 255] or [0, 65535], whichever is the smallest that holds all values.
        attention: (h, w), not negative, of any size, any real dtype and device. The 98th percentile of its positive
            values gets the hottest colour; it is interpolated to the image's size.
        opacity: of the hottest colour, in [0, 1].
        colormap: of matplotlib, by name.

    Returns:
        (H, W, 3) uint8.

    Raises:
        TypeError: for an image or a map of another type.
        ValueError: for other shapes, values that are not finite or outside these ranges (a normalised image), a file
            that is not an image or has more pixels than
            PIL.Image.MAX_IMAGE_PIXELS (each takes up to 36 bytes), an opacity or a colormap that does not exist.
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib import colormaps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NEEDS, name=error.name) from error

    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity must be in [0, 1] (got {opacity})")
    if colormap not in colormaps:
        raise ValueError(f"overlay: colormap must be one of matplotlib's, such as 'inferno' (got {colormap!r})")
    return _blend(as_image(image), as_map(attention), opacity, colormaps[colormap])


def _blend(picture: np.ndarray, weights: Tensor, opacity: float, colormap: Any) -> np.ndarray:
    """picture (H, W, 3) in [0, 1], weights (h, w) -> (H, W, 3) uint8."""
    attended = weights[weights > 0]
    top = float(attended.quantile(0.98)) if 0 < attended.numel() <= 2**24 else float(weights.max())
    weights = (weights / top).clamp_(0, 1) if top > 0 else weights
    size = (picture.shape[0], picture.shape[1])
    heat = F.interpolate(weights[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    grey = (0.55 * picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[:, :, None]
    alpha = opacity * np.sqrt(heat)[:, :, None]
    colour = np.asarray(colormap(0.15 + 0.85 * heat), dtype=np.float32)[:, :, :3]
    blended: np.ndarray = np.rint(255 * ((1 - alpha) * grey + alpha * colour))
    return blended.astype(np.uint8)


def draw_attention(
    image: Image,
    maps: Mapping[str, np.ndarray | Tensor],
    points: Points,
    path: str | PathLike[str] | None = None,
    caption: str | None = None,
) -> Figure:
    """A figure with one row for each point: the image with the point marked, then each attention map over the image.

    Args:
        image: as :func:`overlay`.
        maps: title -> (P, h, w), the attention maps of the P points in one image.
        points: (y, x) as fractions of the image, at least one.
        path: file to save the figure to; not saved if None.
        caption: a line below.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        TypeError: for an image or a map of another type, or maps that are not a mapping.
        ValueError: as :func:`overlay`; if there are no points or no attention maps, or one does not have a row for each
            point.
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NEEDS, name=error.name) from error

    if not isinstance(maps, Mapping):
        raise TypeError(f"draw_attention: maps must be a dictionary, title -> (P, h, w) (got {type(maps).__name__})")
    marks = fractions(points, 2).tolist()
    if not maps or not marks:
        raise ValueError(f"draw_attention: there are no {'points' if maps else 'maps'} to draw")
    picture = as_image(image)
    rows_of = {title: _rows(title, rows, len(marks)) for title, rows in maps.items()}
    height, width = picture.shape[:2]
    columns = 1 + len(maps)
    panel = 3.4
    figure = Figure(figsize=(panel * columns, panel * height / width * len(marks) + 0.7), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(marks), columns, squeeze=False)
    for row, (y, x) in enumerate(marks):
        shown = [_blend(picture, rows[row], 0.85, colormaps["inferno"]) for rows in rows_of.values()]
        for ax, title, pixels in zip(axes[row], ["point", *rows_of], [picture, *shown], strict=True):
            ax.imshow(pixels, interpolation="bilinear")
            ax.plot(x * width, y * height, marker="o", markersize=9, markerfacecolor="none", color="white", mew=3)
            ax.plot(x * width, y * height, marker="o", markersize=9, markerfacecolor="none", color="#00b7c7", mew=1.6)
            ax.set_axis_off()
            ax.set_title(title if row == 0 else "", fontsize=10)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#555555")
    if path is not None:
        with replacing(path) as part:
            figure.savefig(part)
    return figure


def _rows(title: str, maps: np.ndarray | Tensor, count: int) -> Tensor:
    """(count, h, w) float32 on the CPU."""
    shape = list(getattr(maps, "shape", ()))
    hint = ""
    if len(shape) == 4:
        hint = "; take one image of the batch, maps[0]"
    elif len(shape) == 5:
        hint = "; take one image of the batch and one head, maps[0, 0]"
    elif len(shape) == 2 and shape[0] == count:
        hint = "; weights of pooled keys have no positions, see spread_pooled"
    if shape and (len(shape) != 3 or shape[0] != count):
        raise ValueError(f"draw_attention: {title} must be ({count}, h, w){hint} (got shape {shape})")
    return as_map(maps, title, 3)
