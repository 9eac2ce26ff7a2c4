"""DFN's head: the smooth network, from the deepest stage to the finest, and the border network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import ChannelAttentionBlock, RefinementResidualBlock
from ..nn._checks import feature_map, is_pointwise, is_recorded, positive_int


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear to the size of ``like``. dfn_seg's fixed factors would need sides divisible by 32."""
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    recorded = tracing or is_recorded(x)  # for other sizes as well
    if not recorded and x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class DFNHead(nn.Module):
    r"""DFN's smooth and border networks over the four stages of a ResNet.

    Smooth network: the globally pooled last stage, then from stage 4 to stage 1 a refinement block on the stage, a
    channel attention block that joins it with the deeper features, and another refinement block. Border network:
    refinement blocks on every stage, summed from stage 1 to stage 4 at the finest size.

    Source: Yu et al., "Learning a Discriminative Feature Network for Semantic Segmentation", CVPR 2018, figure 2.
    Names are dfn_seg's: ``out_conv, cab1 ... cab4, rrb_d_*, rrb_u_*, rrb_db_*, rrb_trans_*``.

    Args:
        in_channels: channels of the four stages, finest first.
        num_classes: channels of the logits.
        channels: of the inner feature maps. None is dfn_seg's layout: as many as classes, so that they are the
            logits, and no ReLU at the end of a refinement block. A number is the paper's (512): the ReLU, and a 1 x 1
            classifier for every stage (``smooth_cls_*``) and for the border (``border_cls``, one channel).

    Shape:
        four feature maps (B, in_channels[i], H_i, W_i) of any sizes -> {"out", "smooth_2", "smooth_3", "smooth_4": (B,
        num_classes, H_i, W_i), "border": (B, 1 or num_classes, H_1, W_1)}; "out" is the smooth network's stage 1.
    """

    inputs: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")
    rrb_db_1: RefinementResidualBlock

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int | None = None) -> None:
        super().__init__()
        if len(in_channels) != 4:
            raise ValueError(f"DFNHead: in_channels must have 4 entries, one for each stage (got {len(in_channels)})")
        self.in_channels = tuple(positive_int("DFNHead", "in_channels", c) for c in in_channels)
        self.num_classes = positive_int("DFNHead", "num_classes", num_classes)
        self.channels = None if channels is None else positive_int("DFNHead", "channels", channels)
        width, relu = self.channels or self.num_classes, self.channels is not None
        self.out_conv = nn.Conv2d(self.in_channels[3], width, 1)
        for stage, inputs in enumerate(self.in_channels, start=1):
            self.add_module(f"cab{stage}", ChannelAttentionBlock(2 * width, width))
            self.add_module(f"rrb_d_{stage}", RefinementResidualBlock(inputs, width, relu))
            self.add_module(f"rrb_u_{stage}", RefinementResidualBlock(width, width, relu))
            self.add_module(f"rrb_db_{stage}", RefinementResidualBlock(inputs, width, relu))
            if stage < 4:
                self.add_module(f"rrb_trans_{stage}", RefinementResidualBlock(width, width, relu))
            if relu:
                self.add_module(f"smooth_cls_{stage}", nn.Conv2d(width, self.num_classes, 1))
        if relu:
            self.border_cls = nn.Conv2d(width, 1, 1)

    def forward(self, *maps: Tensor) -> dict[str, Tensor]:
        """Four feature maps (B, in_channels[i], H_i, W_i), finest first -> logits by name."""
        if len(maps) != 4:
            raise ValueError(f"DFNHead: needs the maps of 4 stages (got {len(maps)})")
        for stage, (x, channels) in enumerate(zip(maps, self.in_channels, strict=True), start=1):
            feature_map("DFNHead", f"map {stage}", x, channels)
        return {**self._smooth(maps), "border": self._border(maps)}

    if TYPE_CHECKING:

        def __call__(self, *maps: Tensor) -> dict[str, Tensor]: ...

    def _smooth(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The four feature maps -> logits of every stage, each at its stage's size."""
        if is_pointwise(self.out_conv):
            # The mean of a 1 x 1 convolution is the convolution of the mean, which has one position, not H_4 * W_4.
            x = self.out_conv(F.adaptive_avg_pool2d(maps[3], 1))
        else:
            x = F.adaptive_avg_pool2d(self.out_conv(maps[3]), 1)
        x = x.expand(-1, -1, maps[3].shape[2], maps[3].shape[3])
        logits = {}
        for stage in (4, 3, 2, 1):
            low = getattr(self, f"rrb_d_{stage}")(maps[stage - 1])
            x = getattr(self, f"cab{stage}")(_resize(x, low), low)
            x = getattr(self, f"rrb_u_{5 - stage}")(x)
            name = "out" if stage == 1 else f"smooth_{stage}"
            logits[name] = x if self.channels is None else getattr(self, f"smooth_cls_{stage}")(x)
        return dict(reversed(logits.items()))

    def _border(self, maps: Sequence[Tensor]) -> Tensor:
        """The four feature maps -> border logits at the finest size."""
        x: Tensor = self.rrb_db_1(maps[0])
        for stage in (2, 3, 4):
            deeper = getattr(self, f"rrb_db_{stage}")(maps[stage - 1])
            x = getattr(self, f"rrb_trans_{stage - 1}")(x + _resize(deeper, x))
        if self.channels is not None:
            x = self.border_cls(x)
        return x
