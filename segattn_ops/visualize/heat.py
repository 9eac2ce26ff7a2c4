"""Attention as heat: a scale in units of uniform attention, and the colours over an image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

LEAST_TOP = 8.0  # of a scale: uniform attention is then at a third of it, and a nearly uniform map looks uniform
MOST_TOP = 256.0  # uniform attention is then at an eighth of it, and does not vanish beside a single peak
_BEYOND = 0.1  # share of a map's attention that may be beyond the scale
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_DARKENED = 0.55  # brightness of the image below the heat


def in_units_of_uniform(weights: Tensor) -> Tensor:
    """Maps (..., h, w) over their mean, which for a row of an attention map is uniform attention; 0 where that is."""
    mean = weights.mean((-2, -1), keepdim=True)
    return weights / mean.where(mean > 0, mean.new_ones(()))


def top_of(maps: list[Tensor]) -> float:
    """The end of the scale of maps in units of uniform attention: the value above which a tenth of a map's attention
    lies, the largest of all maps, from LEAST_TOP to MOST_TOP."""
    tops = [LEAST_TOP]
    for weights in maps:
        values = weights.flatten().double().sort().values
        below = values.cumsum(0)
        tops.append(float(values[int((below < (1 - _BEYOND) * below[-1]).sum())]))
    return min(max(tops), MOST_TOP)


def heat(weights: Tensor, top: float) -> Tensor:
    """Where on the scale, in [0, 1], values in units of uniform attention are: log2(1 + value), which separates no
    attention from uniform attention, and shows both a few and some hundred times that."""
    return (weights.log1p() / math.log1p(top)).clamp(0, 1)


def ticks(top: float) -> tuple[list[float], list[str]]:
    """Places on the scale in [0, 1], and the values there: 0, and powers of two or four."""
    step = 1 if top <= 32 else 2
    values = [0.0] + [2.0**power for power in range(0, int(math.log2(top)) + 1, step)]
    return [math.log1p(value) / math.log1p(top) for value in values], [f"{value:g}" for value in values]


def over_image(picture: np.ndarray, scaled: Tensor, opacity: float, colormap: Any) -> np.ndarray:
    """picture (H, W, 3) in [0, 1], scaled (h, w) in [0, 1] -> (H, W, 3) uint8."""
    size = (picture.shape[0], picture.shape[1])
    spread = F.interpolate(scaled[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return _blend(_DARKENED * picture @ _GREY, spread, opacity, colormap)


def bar_colours(opacity: float, colormap: Any) -> np.ndarray:
    """(256, 3) in [0, 1]: the colours of a scale over a grey image."""
    scale = np.linspace(0, 1, 256, dtype=np.float32)
    colours: np.ndarray = _blend(np.full_like(scale, _DARKENED / 2), scale, opacity, colormap) / np.float32(255)
    return colours


def _blend(grey: np.ndarray, scaled: np.ndarray, opacity: float, colormap: Any) -> np.ndarray:
    """Colour (..., 3) uint8 of heat in [0, 1] over grey in [0, 1], of one shape."""
    alpha = opacity * np.sqrt(scaled)[..., None]
    colour = np.asarray(colormap(0.15 + 0.85 * scaled), dtype=np.float32)[..., :3]
    blended: np.ndarray = np.rint(255 * ((1 - alpha) * grey[..., None] + alpha * colour))
    return blended.astype(np.uint8)
