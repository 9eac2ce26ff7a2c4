"""Heads of the published networks, under the repositories' names."""

import torch
from torch import nn

from .ann import AFNB, APNB, bn_relu
from .blocks import (
    CAB,
    RRB,
    CAM_Module,
    CrissCrossAttention,
    PAM_Module,
    _ChannelAttentionModule,
    _PositionAttentionModule,
)


def conv_block(inputs, outputs, activation=nn.ReLU):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), activation())


def seg(inputs, classes):
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(inputs, classes, 1))


class DANetHead(nn.Module):
    """junfu1115/DANet."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        inter = in_channels // 4
        self.conv5a, self.conv5c = conv_block(in_channels, inter), conv_block(in_channels, inter)
        self.sa, self.sc = PAM_Module(inter), CAM_Module(inter)
        self.conv51, self.conv52 = conv_block(inter, inter), conv_block(inter, inter)
        self.conv6, self.conv7, self.conv8 = (seg(inter, out_channels) for _ in range(3))

    def forward(self, x):
        p, c = self.conv51(self.sa(self.conv5a(x))), self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(p + c), self.conv6(p), self.conv7(c)


class TramacHead(nn.Module):
    """Tramac/awesome-semantic-segmentation-pytorch, GluonCV."""

    def __init__(self, in_channels, nclass):
        super().__init__()
        inter = in_channels // 4
        self.conv_p1, self.conv_c1 = conv_block(in_channels, inter), conv_block(in_channels, inter)
        self.pam, self.cam = _PositionAttentionModule(inter), _ChannelAttentionModule()
        self.conv_p2, self.conv_c2 = conv_block(inter, inter), conv_block(inter, inter)
        self.out, self.conv_p3, self.conv_c3 = (seg(inter, nclass) for _ in range(3))

    def forward(self, x):
        p, c = self.conv_p2(self.pam(self.conv_p1(x))), self.conv_c2(self.cam(self.conv_c1(x)))
        return self.out(p + c), self.conv_p3(p), self.conv_c3(c)


class InPlaceABN(nn.BatchNorm2d):
    """CCNet's norm: batch norm and leaky ReLU in one module."""

    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x), 0.01)


class RCCAModule(nn.Module):
    """speedinghzl/CCNet."""

    def __init__(self, in_channels, out_channels, num_classes, recurrence=2):
        super().__init__()
        inter, self.recurrence = in_channels // 4, recurrence
        self.conva = nn.Sequential(nn.Conv2d(in_channels, inter, 3, padding=1, bias=False), InPlaceABN(inter))
        self.cca = CrissCrossAttention(inter)
        self.convb = nn.Sequential(nn.Conv2d(inter, inter, 3, padding=1, bias=False), InPlaceABN(inter))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels + inter, out_channels, 3, padding=1, bias=False),
            InPlaceABN(out_channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, num_classes, 1),
        )

    def forward(self, x):
        y = self.conva(x)
        for _ in range(self.recurrence):
            y = self.cca(y)
        return self.bottleneck(torch.cat([x, self.convb(y)], 1))


class ANNHead(nn.Module):
    """MendelXu/ANN, asymmetric_non_local_network without its backbone."""

    def __init__(self, low, high, num_classes):
        super().__init__()
        inner, keys = high // 4, high // 8
        self.fusion = AFNB(low, high, high, keys, keys, 0.05)
        self.context = nn.Sequential(
            nn.Conv2d(high, inner, 3, padding=1), bn_relu(inner), APNB(inner, inner, keys, keys, 0.05)
        )
        self.cls = nn.Conv2d(inner, num_classes, 1)

    def forward(self, low, high):
        return self.cls(self.context(self.fusion(low, high)))


class DFNHead(nn.Module):
    """lxtGH/dfn_seg, DFN without its backbone; returns (border, smooth)."""

    def __init__(self, in_channels, num_class):
        super().__init__()
        self.out_conv = nn.Conv2d(in_channels[3], num_class, 1)
        for i in range(1, 5):
            setattr(self, f"cab{i}", CAB(2 * num_class, num_class))
            setattr(self, f"rrb_d_{i}", RRB(in_channels[i - 1], num_class))
            setattr(self, f"rrb_u_{i}", RRB(num_class, num_class))
            setattr(self, f"rrb_db_{i}", RRB(in_channels[i - 1], num_class))
        for i in range(1, 4):
            setattr(self, f"rrb_trans_{i}", RRB(num_class, num_class))

    def forward(self, f1, f2, f3, f4):
        def up(x, factor):
            return nn.functional.interpolate(x, scale_factor=factor, mode="bilinear")

        border = self.rrb_trans_1(self.rrb_db_1(f1) + up(self.rrb_db_2(f2), 2))
        border = self.rrb_trans_2(border + up(self.rrb_db_3(f3), 4))
        border = self.rrb_trans_3(border + up(self.rrb_db_4(f4), 8))
        smooth = self.out_conv(f4).mean((2, 3), keepdim=True).expand(-1, -1, *f4.shape[2:])
        smooth = self.rrb_u_1(self.cab4([smooth, self.rrb_d_4(f4)]))
        smooth = self.rrb_u_2(self.cab3([up(smooth, 2), self.rrb_d_3(f3)]))
        smooth = self.rrb_u_3(self.cab2([up(smooth, 2), self.rrb_d_2(f2)]))
        return border, self.rrb_u_4(self.cab1([up(smooth, 2), self.rrb_d_1(f1)]))
