"""How the pictures of each layout's published weights were normalised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """What a network's weights expect of a picture: ``(scale * pixels - mean) / std``, channel by channel.

    Attributes:
        order: of the network's input channels, "RGB" or "BGR"; also that of ``mean`` and ``std``.
        mean, std: in the units of ``scale * pixels``.
        scale: applied to pixels of 0 to 255: 1 / 255 as torchvision's ToTensor, or 1.
    """

    order: str
    mean: Triple
    std: Triple
    scale: float

    def __post_init__(self) -> None:
        if self.order not in ("RGB", "BGR"):
            raise ValueError(f"Preprocessing: order must be 'RGB' or 'BGR' (got {self.order!r})")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(
                f"Preprocessing: mean and std must have 3 values, those of std above 0 (got {self.mean} and {self.std})"
            )

    def __call__(self, image: Any, order: str = "RGB") -> Tensor:
        """The network's input.

        Args:
            image: a PIL image of 8 bits a channel; an array (H, W, 3); or a tensor (3, H, W) or (B, 3, H, W), on any
                device. uint8 of 0 to 255, or floating point of 0 to 1.
            order: of the channels of arrays and tensors. "BGR" for OpenCV's ``imread`` and mmcv's. It cannot be seen in
                the pixels: an array of OpenCV without ``order="BGR"`` gives another result.

        Returns:
            (B, 3, H, W) float32, B = 1 for a single picture.

        Raises:
            TypeError: for another type of picture or of pixels.
            ValueError: for other channels, another shape, an empty picture, floating-point pixels outside 0 to 1, a
                PIL image of more than 8 bits a channel, and order="BGR" with a PIL image, which is RGB.
        """
        pixels, order = _pixels(image, order)
        if order != self.order:
            pixels = pixels.flip(1)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels * self.scale - mean) / std

    def __str__(self) -> str:
        scaled = "pixels of 0 to 255" if self.scale == 1 else f"{self.scale:.4g} * pixels of 0 to 255"
        return f"{self.order}, ({scaled} - {self.mean}) / {self.std}"


def _pixels(image: Any, order: str) -> tuple[Tensor, str]:
    """The picture as float32 (B, 3, H, W) of 0 to 255, and the order of its channels."""
    import numpy as np  # here: the Hugging Face build may import torch alone

    if order not in ("RGB", "BGR"):
        raise ValueError(f"Preprocessing: order must be 'RGB' or 'BGR' (got {order!r})")
    if hasattr(image, "convert") and hasattr(image, "getbands"):  # PIL
        if order != "RGB":
            raise ValueError("Preprocessing: a PIL image is RGB (got order='BGR'); pass the array for BGR pixels")
        if image.mode.startswith(("I", "F")):  # convert("RGB") would cut them off at 255
            raise ValueError(
                f"Preprocessing: a PIL image must have 8 bits a channel (got mode {image.mode!r}); scale its values to "
                "0 to 255 first"
            )
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"Preprocessing: an array must have shape (H, W, 3) and pixels (got shape {image.shape})")
        x = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    elif isinstance(image, Tensor):
        x = image
    else:
        raise TypeError(
            f"Preprocessing: image must be a PIL image, a numpy array or a tensor (got {type(image).__name__})"
        )
    x = x[None] if x.dim() == 3 else x
    if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
        raise ValueError(
            "Preprocessing: a tensor must have shape (3, H, W) or (B, 3, H, W) and pixels (got shape "
            f"{tuple(image.shape)})"
        )
    if x.dtype == torch.uint8:
        return x.float(), order
    if not x.is_floating_point():
        raise TypeError(f"Preprocessing: pixels must be uint8 or floating point (got {x.dtype})")
    low, high = (v.item() for v in x.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Preprocessing: floating-point pixels must lie in 0 to 1 (got {low:.4g} to {high:.4g}); divide pixels of "
            "0 to 255 by 255, and do not normalise them before"
        )
    return x.float() * 255, order


# torchvision's weights, and PyTorch-Encoding's DANet (junfu1115/DANet, experiments/segmentation/test.py) and Tramac's
# (scripts/demo.py): ToTensor, then ImageNet's mean and deviation.
IMAGENET = Preprocessing("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)
# mmsegmentation, configs/_base_/models/*_r50-d8.py: mmcv reads BGR, and the preprocessor's bgr_to_rgb=True swaps.
MMSEGMENTATION = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 1.0)
# speedinghzl/CCNet, evaluate.py (IMG_MEAN) and dataset/datasets.py: cv2.imread, no swap, no deviation.
CCNET = Preprocessing("BGR", (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0), 1.0)
# MendelXu/ANN, hypes/seg/cityscapes/fs_annn_cityscapes_seg.json: input_mode BGR, div_value 1.
ANN = Preprocessing("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), 1.0)

_PUBLISHED = {
    ("danet", "official"): IMAGENET,
    ("danet", "tramac"): IMAGENET,
    ("ccnet", "official"): CCNET,
    ("ann", "official"): ANN,
    **{(system, "mmsegmentation"): MMSEGMENTATION for system in ("danet", "ccnet", "ann", "non_local")},
}
_NUMBER = r"([-+]?[\d.]+(?:e[-+]?\d+)?)"
_NUMBERS = rf"\s*=\s*[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,?\s*[\])]"


def of_layout(system: str, layout: str, stem: str | None, checkpoint: Any) -> Preprocessing | None:
    """That of the weights of a layout; what the checkpoint's own configuration says (mmsegmentation's ``meta``) counts
    more. None where it is not known: single blocks, dfn_seg, which has no published weights, backbones with a deep
    stem, and checkpoints of this package, which do not store it."""
    if layout == "mmsegmentation" and isinstance(checkpoint, Mapping):
        configured = _of_configuration(checkpoint.get("meta"))
        if configured is not None:
            return configured
    if system == "backbone":
        return IMAGENET if stem == "torchvision" else None
    return _PUBLISHED.get((system, layout))


def _of_configuration(meta: Any) -> Preprocessing | None:
    """From the text of the configuration in a checkpoint's meta: ``cfg`` (mmengine) or ``config`` (mmcv)."""
    text = meta.get("cfg", meta.get("config")) if isinstance(meta, Mapping) else None
    if not isinstance(text, str):
        return None
    mean, std = (re.search(rf"\b{name}{_NUMBERS}", text) for name in ("mean", "std"))
    if not (mean and std):
        return None
    values = [(float(m[1]), float(m[2]), float(m[3])) for m in (mean, std)]
    swaps = re.findall(r"\b(?:bgr_to_rgb|rgb_to_bgr|to_rgb)\s*=\s*(True|False)", text)
    # Without the argument mmengine's preprocessor keeps BGR, mmcv's Normalize swaps.
    swapped = "True" in swaps if swaps else "SegDataPreProcessor" not in text
    return Preprocessing("RGB" if swapped else "BGR", values[0], values[1], 1.0)
