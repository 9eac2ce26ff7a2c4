"""Training losses of the models' output dictionaries."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def segmentation_loss(
    outputs: Mapping[str, Tensor],
    target: Tensor,
    weights: Mapping[str, float] | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Weighted sum of the cross-entropies of every output.

    Args:
        outputs: logits (B, classes, H, W) by name, as a model returns them.
        target: (B, H, W) int64 class indices.
        weights: of the outputs by name; by default 0.4 for "aux" and 1 for the others. An output of weight 0 is left
            out.
        ignore_index: label of the pixels that do not count.

    Raises:
        ValueError: if a weight names no output, or sizes do not match.
    """
    weights = {"aux": 0.4, **(weights or {})}
    unknown = set(weights) - set(outputs) - {"aux"}
    if unknown:
        raise ValueError(
            f"segmentation_loss: no output is named {', '.join(sorted(unknown))} (got {', '.join(outputs)})"
        )
    total = target.new_zeros((), dtype=torch.float32)
    for name, logits in outputs.items():
        weight = weights.get(name, 1.0)
        if logits.shape[2:] != target.shape[1:]:
            raise ValueError(
                f"segmentation_loss: {name} must have the size of target {tuple(target.shape[1:])} "
                f"(got {tuple(logits.shape[2:])})"
            )
        if weight:
            total = total + weight * F.cross_entropy(logits, target, ignore_index=ignore_index)
    return total


def semantic_border(target: Tensor, radius: int = 1, ignore_index: int = 255) -> Tensor:
    """Where labels change: True for pixels with another (not ignored) label within ``radius`` in both directions.

    Args:
        target: (B, H, W) int64 class indices.
        radius: in pixels, at least 1; the border is 2 * radius wide.
        ignore_index: label of ignored pixels, which are not border and do not create one.

    Returns:
        (B, H, W) bool.
    """
    if radius < 1:
        raise ValueError(f"semantic_border: radius must be at least 1 (got {radius!r})")
    ignored = target == ignore_index
    labels = target[:, None].double()  # max_pool2d takes no integers

    def largest(x: Tensor) -> Tensor:
        return F.max_pool2d(x.masked_fill(ignored[:, None], -torch.inf), 2 * radius + 1, 1, radius)[:, 0]

    return (largest(labels) != -largest(-labels)) & ~ignored


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, valid: Tensor | None = None) -> Tensor:
    """Binary focal loss, -(1 - p_t)^gamma log p_t, averaged over the valid entries.

    Args:
        logits: any shape.
        target: same shape, bool: True where the probability should be 1.
        gamma: exponent; 0 gives the cross-entropy.
        valid: bool, broadcastable to that shape; entries that count. All of them if None.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Yu et al., CVPR 2018, equation 4.
    """
    log_probability = F.logsigmoid(torch.where(target, logits, -logits))
    loss = -((1 - log_probability.exp()) ** gamma) * log_probability
    if valid is None:
        return loss.mean()
    valid = valid.expand_as(loss)
    return (loss * valid).sum() / valid.sum().clamp_min(1)


def dfn_loss(
    outputs: Mapping[str, Tensor],
    target: Tensor,
    border_weight: float = 0.1,
    gamma: float = 2.0,
    radius: int = 1,
    ignore_index: int = 255,
) -> Tensor:
    """DFN's loss: softmax losses of the smooth network's four stages, plus 0.1 of the border network's focal loss.

    Args:
        outputs: of :class:`~segattn_ops.models.DFN`.
        target: (B, H, W) int64 class indices. The border's target is where they change. A border output of one channel
            learns it regardless of class, one of ``num_classes`` channels the border of each class.
        border_weight: lambda of the paper's equation 5.
        gamma: of the focal loss.
        radius: of :func:`semantic_border`.
        ignore_index: label of the pixels that do not count.

    Source: Yu et al., CVPR 2018, section 3.4.
    """
    smooth = {name: logits for name, logits in outputs.items() if name != "border"}
    border = outputs["border"]
    edge = semantic_border(target, radius, ignore_index)[:, None]
    if border.shape[1] > 1:
        edge = edge & (target[:, None] == torch.arange(border.shape[1], device=target.device)[None, :, None, None])
    valid = (target != ignore_index)[:, None]
    return segmentation_loss(smooth, target, ignore_index=ignore_index) + border_weight * focal_loss(
        border, edge, gamma, valid
    )
