"""Adaptive average pooling that can be exported for all sizes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autocast import without_autocast


def adaptive_avg_pool2d(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size).

    An exported program computes it as products with the cells' weights: AOTInductor and torch.onnx decompose PyTorch's
    pooling for the sizes of the export only. A position that is not finite then makes other cells NaN as well.
    """
    if not torch.compiler.is_exporting() or size == 1:
        return F.adaptive_avg_pool2d(x, size)
    height, width = x.shape[2:]
    with without_autocast(x.device.type):
        upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        pooled = _cell_weights(height, size, upcast) @ upcast @ _cell_weights(width, size, upcast).mT
    return pooled.to(x.dtype)


def _cell_weights(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length): cell i averages the positions [floor(i * length / cells), ceil((i + 1) * length / cells))."""
    cell = torch.arange(cells, device=like.device)[:, None]
    position = torch.arange(length, device=like.device)
    within = (cell * length < (position + 1) * cells) & (position * cells < (cell + 1) * length)
    weights = within.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)
