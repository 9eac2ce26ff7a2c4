"""What people have as images and attention maps, as arrays of one kind."""

from __future__ import annotations

import math
import os
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import shown

Image = Any  # a path, PIL.Image.Image, numpy.ndarray or Tensor
_WHITES = (1.0, 255.0, 65535.0)
_NORMALISED_WHITE = 3.0  # white is 2.2 to 2.6 after ImageNet's normalisation
# Formats that PIL decodes itself. For PostScript it runs another program.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_OVERSHOOT = 0.05  # of resizing with a bicubic filter, as a share of white


def as_image(image: Image) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]; see :func:`segattn_ops.visualize.overlay` for what is taken and refused."""
    if isinstance(image, str | PathLike):
        image = _open(Path(image))
    pixels = _channels_last(_array("image", _without_palette(image)))
    values = _in_unit_range(pixels)
    colour = np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values[:, :, :3]
    if values.shape[2] == 4:  # opacity: over white
        alpha = values[:, :, 3:]
        colour = alpha * colour + (1 - alpha)
    return np.ascontiguousarray(colour, dtype=np.float32)


def as_map(attention: Any, name: str = "attention", names: str = "(h, w)") -> Tensor:
    """Weights as float32 on the CPU, with the dimensions ``names``.

    Raises:
        TypeError: for what is not an array or a tensor of real numbers.
        ValueError: for another rank, an empty map, and values that are negative or not finite.
    """
    weights = as_response(attention, name, names)
    if bool((weights < 0).any()):
        raise ValueError(f"visualize: {name} must not be negative: weights, not energies (got {weights.min():.3g})")
    return weights


def as_response(given: Any, name: str = "response", names: str = "(C, h, w)") -> Tensor:
    """As :func:`as_map`, of either sign."""
    values = torch.from_numpy(_array(name, given).astype(np.float32))
    if values.dim() != names.count(",") + 1 or values.numel() == 0:
        raise ValueError(f"visualize: {name} must be {names}, not empty (got shape {list(values.shape)})")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"visualize: {name} must be finite (got {int((~torch.isfinite(values)).sum())} NaN or inf)")
    return values


def _open(path: Path) -> Any:
    from PIL import Image as pillow

    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "a device or a pipe" if os.path.exists(path) else "no file"
        raise ValueError(f"visualize: image must be a file (got {found}: {shown(path)})")
    most = pillow.MAX_IMAGE_PIXELS
    pillow.init()
    formats = [name for name in _FORMATS if name in pillow.OPEN]  # PIL may be built without some
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of a size that is refused below
            with pillow.open(path, formats=formats) as opened:
                width, height = opened.size
                if most is not None and width * height > most:
                    raise ValueError(f"it has {width} x {height} pixels, and PIL.Image.MAX_IMAGE_PIXELS is {most}")
                opened.load()
                return opened.copy()
    except Exception as error:  # PIL raises many kinds for damaged files
        reason = shown(str(error) or type(error).__name__)
        raise ValueError(f"visualize: {shown(path)} is not an image that PIL can read ({reason})") from error


def _without_palette(image: Any) -> Any:
    """PIL images in modes other than grey and RGB, in one of those."""
    if not (hasattr(image, "mode") and hasattr(image, "convert")):
        return image
    if image.mode in ("L", "RGB", "RGBA", "I", "F") or image.mode.startswith("I;16"):
        return image
    if image.mode == "1":
        return image.convert("L")
    transparent = "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa")
    return image.convert("RGBA" if transparent else "RGB")


def _array(name: str, given: Any) -> np.ndarray:
    """A numpy array of real numbers of a numpy array, a tensor or what converts itself to an array."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() and given.dtype.itemsize < 4 else given).numpy()
    if not hasattr(given, "__array__") and not hasattr(given, "__array_interface__"):
        kinds = "a path, a PIL image, a numpy array or a tensor" if name == "image" else "a numpy array or a tensor"
        raise TypeError(f"visualize: {name} must be {kinds} (got {type(given).__name__})")
    array = np.asarray(given)
    if array.dtype.kind not in "buif":
        raise TypeError(f"visualize: {name} must be of real numbers (got {array.dtype})")
    return array


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1, 3 or 4) of (H, W), (H, W, C) or (C, H, W). Channels are last where both are possible."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        hint = "; take one image of the batch" if pixels.ndim == 4 else ""
        raise ValueError(
            "visualize: image must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, not empty"
            f"{hint} (got shape {list(pixels.shape)})"
        )
    return pixels


def _in_unit_range(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    low, high = float(pixels.min()), float(pixels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("visualize: image must be finite (got NaN or inf)")
    whites = _WHITES if pixels.dtype.kind == "f" else _WHITES[1:]
    white = next((white for white in whites if high <= white * (1 + _OVERSHOOT)), None)
    normalised = low < -_OVERSHOOT * high or (whites is _WHITES and white != 1 and high < _NORMALISED_WHITE)
    if white is None or normalised:
        raise ValueError(
            "visualize: image must have values in [0, 1], [0, 255] or [0, 65535]; undo a normalisation first, "
            f"image * std + mean (got {low:.4g} to {high:.4g})"
        )
    unit: np.ndarray = np.clip(pixels.astype(np.float32) / np.float32(white), 0, 1)
    return unit
