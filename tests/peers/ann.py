"""ANN's blocks with stored attention maps, under MendelXu/ANN's names."""

import torch
from torch import nn


def bn_relu(channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class PSPModule(nn.Module):
    def __init__(self, sizes=(1, 3, 6, 8)):
        super().__init__()
        self.stages = nn.ModuleList(nn.AdaptiveAvgPool2d(size) for size in sizes)

    def forward(self, x):
        return torch.cat([stage(x).flatten(2) for stage in self.stages], 2)


class _SelfAttentionBlock(nn.Module):
    """softmax(q_i . pool(k)_s / sqrt(key_channels)) pool(v)_s, then W. Pools after the projections, as the
    authors do."""

    def __init__(self, low, high, key_channels, value_channels, out_channels, shared, psp_size=(1, 3, 6, 8)):
        super().__init__()
        self.scale, self.key_channels, self.value_channels = 1, key_channels, value_channels
        self.f_key = nn.Sequential(nn.Conv2d(low, key_channels, 1), bn_relu(key_channels))
        self.f_query = self.f_key if shared else nn.Sequential(nn.Conv2d(high, key_channels, 1), bn_relu(key_channels))
        self.f_value = nn.Conv2d(low, value_channels, 1)
        self.W = nn.Conv2d(value_channels, out_channels, 1)
        self.psp = PSPModule(psp_size)

    def forward(self, low, high=None):
        high = low if high is None else high
        key, value = self.psp(self.f_key(low)), self.psp(self.f_value(low))
        query = self.f_query(high)
        energy = torch.einsum("ben,bes->bns", query.flatten(2), key) * self.key_channels**-0.5
        context = torch.einsum("bns,bcs->bcn", energy.softmax(-1), value)
        return self.W(context.view(query.shape[0], -1, *query.shape[2:]))


class SelfAttentionBlock2D(_SelfAttentionBlock):
    pass


class APNB(nn.Module):
    def __init__(self, in_channels, out_channels, key_channels, value_channels, dropout, sizes=(1,)):
        super().__init__()
        self.stages = nn.ModuleList(
            SelfAttentionBlock2D(in_channels, in_channels, key_channels, value_channels, out_channels, True)
            for _ in sizes
        )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(2 * in_channels, out_channels, 1), bn_relu(out_channels), nn.Dropout2d(dropout)
        )

    def forward(self, x):
        return self.conv_bn_dropout(torch.cat([torch.stack([s(x) for s in self.stages]).sum(0), x], 1))


class AFNB(nn.Module):
    def __init__(self, low, high, out_channels, key_channels, value_channels, dropout, sizes=(1,)):
        super().__init__()
        self.stages = nn.ModuleList(
            SelfAttentionBlock2D(low, high, key_channels, value_channels, out_channels, False) for _ in sizes
        )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(out_channels + high, out_channels, 1), nn.BatchNorm2d(out_channels), nn.Dropout2d(dropout)
        )

    def forward(self, low, high):
        return self.conv_bn_dropout(torch.cat([torch.stack([s(low, high) for s in self.stages]).sum(0), high], 1))
