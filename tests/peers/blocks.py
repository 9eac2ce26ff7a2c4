"""DANet, CCNet, Non-local, DRANet, DAModule and DFN blocks with stored attention maps, under their original names."""

import torch
from torch import Tensor, nn


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2)


class PAM_Module(nn.Module):
    """junfu1115/DANet: y = gamma * (softmax_j(q_i . k_j) v_j) + x."""

    def __init__(self, in_dim: int):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        q, k, v = (_flat(conv(x)) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = self.softmax(torch.einsum("bei,bej->bij", q, k))
        return self.gamma * torch.einsum("bij,bcj->bci", attention, v).view_as(x) + x


class CAM_Module(nn.Module):
    """junfu1115/DANet: E = x x^T, softmax over each row of (max of the row - E)."""

    def __init__(self, in_dim: int):
        super().__init__()
        self.chanel_in = in_dim
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        energy = torch.einsum("bcn,bkn->bck", _flat(x), _flat(x))
        attention = self.softmax(energy.amax(-1, keepdim=True) - energy)
        return self.gamma * torch.einsum("bck,bkn->bcn", attention, _flat(x)).view_as(x) + x


class _PositionAttentionModule(nn.Module):
    """Tramac, GluonCV: PAM under other names."""

    def __init__(self, in_channels: int, **kwargs):
        super().__init__()
        self.conv_b = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.conv_c = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.conv_d = nn.Conv2d(in_channels, in_channels, 1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        attention = self.softmax(torch.einsum("bei,bej->bij", _flat(self.conv_b(x)), _flat(self.conv_c(x))))
        return self.alpha * torch.einsum("bij,bcj->bci", attention, _flat(self.conv_d(x))).view_as(x) + x


class _ChannelAttentionModule(nn.Module):
    """Tramac, GluonCV: CAM under another name."""

    def __init__(self, **kwargs):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        energy = torch.einsum("bcn,bkn->bck", _flat(x), _flat(x))
        attention = self.softmax(energy.amax(-1, keepdim=True) - energy)
        return self.beta * torch.einsum("bck,bkn->bcn", attention, _flat(x)).view_as(x) + x


class CrissCrossAttention(nn.Module):
    """CCNet: of all pairs of positions, only those in one row or one column take part in the softmax."""

    def __init__(self, in_dim: int):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        height, width = x.shape[2:]
        y = torch.arange(height, device=x.device).repeat_interleave(width)
        column = torch.arange(width, device=x.device).repeat(height)
        crossing = (y[:, None] == y) | (column[:, None] == column)
        energy = torch.einsum("bei,bej->bij", _flat(self.query_conv(x)), _flat(self.key_conv(x)))
        attention = energy.masked_fill(~crossing, -torch.inf).softmax(-1)
        return self.gamma * torch.einsum("bij,bcj->bci", attention, _flat(self.value_conv(x))).view_as(x) + x


class _NonLocalBlockND(nn.Module):
    """AlexHex7/Non-local_pytorch: one class for its four files; `mode` chooses the file."""

    def __init__(self, in_channels, inter_channels=None, dimension=2, sub_sample=True, bn_layer=True, mode="embedded"):
        super().__init__()
        self.in_channels, self.sub_sample, self.mode = in_channels, sub_sample, mode
        self.inter_channels = inter = inter_channels or max(in_channels // 2, 1)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 1]
        pool = (nn.MaxPool1d(2), nn.MaxPool2d(2), nn.MaxPool3d((1, 2, 2)))[dimension - 1]
        self.g = conv(in_channels, inter, 1)
        self.W = (
            nn.Sequential(conv(inter, in_channels, 1), norm(in_channels)) if bn_layer else conv(inter, in_channels, 1)
        )
        if mode != "gaussian":
            self.theta, self.phi = conv(in_channels, inter, 1), conv(in_channels, inter, 1)
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inter, 1, 1, bias=False), nn.ReLU())
        if sub_sample:
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)

    def forward(self, x, return_nl_map=False):
        g = _flat(self.g(x))
        if self.mode == "gaussian":
            theta, phi = _flat(x), _flat(self.phi(x)) if self.sub_sample else _flat(x)
        else:
            theta, phi = _flat(self.theta(x)), _flat(self.phi(x))
        if self.mode == "concatenation":
            pairs = torch.cat(
                [theta[..., None].expand(-1, -1, -1, phi.shape[2]), phi[:, :, None].expand(-1, -1, theta.shape[2], -1)],
                1,
            )
            f = self.concat_project(pairs)[:, 0] / phi.shape[2]
        else:
            f = torch.einsum("bei,bej->bij", theta, phi)
            f = f / phi.shape[2] if self.mode == "dot" else f.softmax(-1)
        y = torch.einsum("bij,bcj->bci", f, g).view(x.shape[0], -1, *x.shape[2:])
        z = self.W(y) + x
        return (z, f) if return_nl_map else z


class NONLocalBlock2D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, sub_sample=True, bn_layer=True, mode="embedded"):
        super().__init__(in_channels, inter_channels, 2, sub_sample, bn_layer, mode)


class CPAMEnc(nn.Module):
    """DRANet: 1 + 4 + 9 + 36 tokens."""

    def __init__(self, in_channels, norm_layer=nn.BatchNorm2d):
        super().__init__()
        for i in range(1, 5):
            setattr(
                self,
                f"conv{i}",
                nn.Sequential(nn.Conv2d(in_channels, in_channels, 1, bias=False), norm_layer(in_channels), nn.ReLU()),
            )

    def forward(self, x):
        pooled = [nn.functional.adaptive_avg_pool2d(x, size) for size in (1, 2, 3, 6)]
        return torch.cat([_flat(getattr(self, f"conv{i + 1}")(p)) for i, p in enumerate(pooled)], 2)


class CPAMDec(nn.Module):
    """DRANet: every position attends to the tokens y (B, K, C)."""

    def __init__(self, in_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.conv_query = nn.Conv2d(in_channels, in_channels // 4, 1)
        self.conv_key = nn.Linear(in_channels, in_channels // 4)
        self.conv_value = nn.Linear(in_channels, in_channels)

    def forward(self, x, y):
        attention = torch.einsum("ben,bke->bnk", _flat(self.conv_query(x)), self.conv_key(y)).softmax(-1)
        return self.scale * torch.einsum("bnk,bkc->bcn", attention, self.conv_value(y)).view_as(x) + x


class CCAMDec(nn.Module):
    """DRANet: every channel attends to gathered channels y (B, K, H, W)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        energy = torch.einsum("bcn,bkn->bck", _flat(x), _flat(y))
        attention = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
        return x + self.scale * torch.einsum("bck,bkn->bcn", attention, _flat(y)).view_as(x)


class ScaledDotProductAttention(nn.Module):
    """External-Attention-pytorch: multi-head attention on (B, N, C)."""

    def __init__(self, d_model, d_k, d_v, h, dropout=0.1):
        super().__init__()
        self.fc_q, self.fc_k = nn.Linear(d_model, h * d_k), nn.Linear(d_model, h * d_k)
        self.fc_v, self.fc_o = nn.Linear(d_model, h * d_v), nn.Linear(h * d_v, d_model)
        self.dropout = nn.Dropout(dropout)
        self.d_model, self.d_k, self.d_v, self.h = d_model, d_k, d_v, h

    def forward(self, queries, keys, values):
        q, k, v = (
            layer(x).unflatten(2, (self.h, -1)).transpose(1, 2)
            for layer, x in ((self.fc_q, queries), (self.fc_k, keys), (self.fc_v, values))
        )
        attention = self.dropout((q @ k.mT / self.d_k**0.5).softmax(-1))
        return self.fc_o((attention @ v).transpose(1, 2).flatten(2))


class SimplifiedScaledDotProductAttention(nn.Module):
    """External-Attention-pytorch: the same without the input projections."""

    def __init__(self, d_model, h, dropout=0.1):
        super().__init__()
        self.fc_o = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.d_model, self.h = d_model, h

    def forward(self, queries, keys, values):
        attention = self.dropout((queries @ keys.mT / queries.shape[2] ** 0.5).softmax(-1))
        return self.fc_o(attention @ values)


class PositionAttentionModule(nn.Module):
    def __init__(self, d_model=512, kernel_size=3, H=7, W=7):
        super().__init__()
        self.cnn = nn.Conv2d(d_model, d_model, kernel_size, padding=(kernel_size - 1) // 2)
        self.pa = ScaledDotProductAttention(d_model, d_k=d_model, d_v=d_model, h=1)

    def forward(self, x):
        y = _flat(self.cnn(x)).mT
        return self.pa(y, y, y)


class ChannelAttentionModule(nn.Module):
    def __init__(self, d_model=512, kernel_size=3, H=7, W=7):
        super().__init__()
        self.cnn = nn.Conv2d(d_model, d_model, kernel_size, padding=(kernel_size - 1) // 2)
        self.pa = SimplifiedScaledDotProductAttention(H * W, h=1)

    def forward(self, x):
        y = _flat(self.cnn(x))
        return self.pa(y, y, y)


class DAModule(nn.Module):
    """External-Attention-pytorch; unlike the original's, its arguments have an effect."""

    def __init__(self, d_model=512, kernel_size=3, H=7, W=7):
        super().__init__()
        self.position_attention_module = PositionAttentionModule(d_model, kernel_size, H, W)
        self.channel_attention_module = ChannelAttentionModule(d_model, kernel_size, H, W)

    def forward(self, x):
        return self.position_attention_module(x).mT.reshape(x.shape) + self.channel_attention_module(x).view_as(x)


class CAB(nn.Module):
    """lxtGH/dfn_seg: takes [high, low]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, out_channels, 1), nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x):
        high, low = x
        gate = self.conv2(self.conv1(torch.cat([high, low], 1).mean((2, 3), keepdim=True)).relu()).sigmoid()
        return gate * low + high


class RRB(nn.Module):
    """lxtGH/dfn_seg: without the paper's last ReLU."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.conv3 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv1(x)
        return x + self.conv3(self.bn(self.conv2(x)).relu())
