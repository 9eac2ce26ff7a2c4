"""Forks of published blocks, each with one deviation, for the tests of conversion."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fork(nn.Module):
    """A position attention block with a place for every deviation."""

    def __init__(self, channels: int = 16, gamma: float = 0.7):
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 4, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.tensor(gamma))
        self.softmax = nn.Softmax(dim=-1)

    def attended(self, x: Tensor, scale: float = 1.0) -> Tensor:
        q, k, v = (conv(self.keys(x) if n else x).flatten(2) for n, conv in enumerate(self.layers()))
        attention = self.on_map(self.softmax(scale * torch.einsum("bei,bej->bij", q, self.on_key(k))))
        return torch.einsum("bij,bcj->bci", attention, v).view_as(x)

    def layers(self) -> tuple[nn.Module, ...]:
        return self.query_conv, self.key_conv, self.value_conv

    def keys(self, x: Tensor) -> Tensor:
        return x

    def on_key(self, key: Tensor) -> Tensor:
        return key

    def on_map(self, attention: Tensor) -> Tensor:
        return attention

    def forward(self, x: Tensor):
        return self.gamma * self.attended(x) + x


class PoolsLargeMaps(Fork):
    def keys(self, x):
        return F.avg_pool2d(x, 2) if x.shape[2] * x.shape[3] > 1000 else x


class PoolsLongSides(Fork):
    def keys(self, x):
        return F.avg_pool2d(x, (1, 2)) if x.shape[3] > 64 else x


class PadsOddSides(Fork):
    def keys(self, x):
        return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))


class AcrossTheBatch(Fork):
    def keys(self, x):
        return x.flip(0)


class DetachesTheKey(Fork):
    def on_key(self, key):
        return key.detach()


class ReturnsTheMap(Fork):
    def forward(self, x):
        return super().forward(x), None


class StoresTheMap(Fork):
    def on_map(self, attention):
        self.last_map = attention
        return attention


class CollectsTheMaps(Fork):
    def __init__(self):
        super().__init__()
        self.maps = []

    def on_map(self, attention):
        self.maps.append(attention.detach())
        return attention


class ClampsTheKey(Fork):
    def on_key(self, key):
        return key.clamp(-8, 8)


class MakesATensor(Fork):
    """Multiplies by 1, made on the default device in the default dtype; bfloat16's third is 0.2% off."""

    def on_key(self, key):
        return key * (3 * torch.full((1,), 1 / 3).double()).to(key.dtype)


class CountsInABuffer(Fork):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class AlwaysRandom(Fork):
    def on_map(self, attention):
        return F.dropout(attention, 1e-4)


class SharperInTraining(Fork):
    def forward(self, x):
        return self.gamma * self.attended(x, 2.0 if self.training else 1.0) + x


class FunctionalDropout(Fork):
    def on_map(self, attention):
        return F.dropout(attention, 0.3, self.training)


class OutputDropout(Fork):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout2d(0.4)

    def forward(self, x):
        return self.gamma * self.dropout(self.attended(x)) + x


class DropPath(nn.Module):
    """Stochastic depth, timm's attribute."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.drop_prob)


class RareDropPath(OutputDropout):
    def __init__(self):
        super().__init__()
        self.dropout = DropPath(0.01)


class RareFunctionalDropout(Fork):
    """Drops nothing in the runs of a test, and draws random numbers all the same."""

    def on_map(self, attention):
        return F.dropout(attention, 1e-9, self.training)


class NoiseOnTheOutput(Fork):
    def forward(self, x):
        y = super().forward(x)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class VolumeCAM(nn.Module):
    """Channel attention of volumes only."""

    sign = -1.0

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        batch, channels, _depth, _height, _width = x.shape
        f = x.reshape(batch, channels, -1)
        attention = (self.sign * torch.einsum("bcn,bkn->bck", f, f)).softmax(-1)
        return self.gamma * (attention @ f).view_as(x) + x


class PaperVolumeCAM(VolumeCAM):
    sign = 1.0


class ScaledVolumeCAM(VolumeCAM):
    sign = -0.02


class Extended(Fork):
    """A block with further arguments, methods, a property and class attributes."""

    stride = 1

    def __init__(self):
        super().__init__()
        self.norm_first = False

    def forward(self, x, mask=None, return_attention: bool = False):
        y = super().forward(x)
        if mask is not None:
            y = y * mask
        return (y, "attention") if return_attention else y

    @property
    def width(self):
        return self.value_conv.out_channels

    def reset(self):
        nn.init.zeros_(self.gamma)
        return type(self)


class TakesSingleMaps(Fork):
    """Without a batch dimension too."""

    def forward(self, x):
        return super().forward(x if x.dim() == 4 else x[None]).reshape(x.shape)


class OwnNames(nn.Module):
    """Position attention under names of its own."""

    def __init__(self, channels: int = 12, scale: float = 1.0):
        super().__init__()
        self.to_q, self.to_k = nn.Conv2d(channels, 3, 1), nn.Conv2d(channels, 3, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Parameter(torch.ones(()))
        self.factor = scale

    def forward(self, features):
        q, k, v = (layer(features).flatten(2) for layer in (self.to_q, self.to_k, self.to_v))
        attention = (self.factor * torch.einsum("bei,bej->bij", q, k)).softmax(-1)
        return features + self.alpha * torch.einsum("bij,bcj->bci", attention, v).view_as(features)


class BigGAN(nn.Module):
    """Self-attention of BigGAN: pooled keys and values, a projection behind."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.theta, self.phi = nn.Conv2d(channels, 2, 1, bias=False), nn.Conv2d(channels, 2, 1, bias=False)
        self.g, self.o = nn.Conv2d(channels, 8, 1, bias=False), nn.Conv2d(8, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        theta = self.theta(x).flatten(2)
        phi, g = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
        beta = torch.einsum("bei,bej->bij", theta, phi).softmax(-1)
        return self.gamma * self.o(torch.einsum("bij,bcj->bci", beta, g).unflatten(2, x.shape[2:])) + x


class Tempered(Fork):
    """Reads a number, a class attribute, an optional mask, an optional norm, and a switch."""

    sharpness = 1.0

    def __init__(self):
        super().__init__()
        self.temperature, self.enabled, self.mask, self.rate = 2.0, True, None, 0.0
        self.adapt = partial(torch.mul, other=1.0)
        self.after = nn.Sequential()

    def on_key(self, key):
        key = self.adapt(key) * float(self.sharpness) / self.temperature
        return key if self.mask is None else key * self.mask

    def on_map(self, attention):
        return F.dropout(attention, self.rate, self.training)

    def forward(self, x):
        if not self.enabled:
            return x
        attended = self.after(self.attended(x))
        norm = getattr(self, "norm", None)
        return self.gamma * (attended if norm is None else norm(attended)) + x


class BufferTemperature(Fork):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    def on_key(self, key):
        return key / self.temperature


class MaskOfFalse(Fork):
    def __init__(self):
        super().__init__()
        self.masked = torch.zeros(1, 4, 1, dtype=torch.bool)

    def on_key(self, key):
        return key.masked_fill(self.masked, 0.0)


class AbsoluteGamma(Fork):
    def forward(self, x):
        return self.gamma.abs() * self.attended(x) + x


class ReturnsFloat32(Fork):
    def forward(self, x):
        return (self.gamma * self.attended(x) + x).float()


class WithoutAutocast(Fork):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class AutocastDtype(Fork):
    """A result of the dtype of autocast."""

    def forward(self, x):
        result = super().forward(x)
        return result.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else result


class SoftmaxInFloat32(Fork):
    def attended(self, x, scale=1.0):
        q, k, v = (conv(x).flatten(2) for conv in self.layers())
        attention = torch.softmax(torch.einsum("bei,bej->bij", q, k), -1, dtype=torch.float32).to(x.dtype)
        return torch.einsum("bij,bcj->bci", attention, v).view_as(x)


class Flattening(nn.Module):
    """fastai's SelfAttention: 1-D convolutions, and a softmax over the index of the one that is called query."""

    over = 1

    def __init__(self, channels=16):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv1d(channels, c, 1, bias=False) for c in (2, 2, channels))
        self.gamma = nn.Parameter(torch.tensor([0.4]))

    def forward(self, x):
        flat = x.view(*x.shape[:2], -1)
        weights = torch.softmax(self.query(flat).mT @ self.key(flat), dim=self.over)
        return (self.gamma * (self.value(flat) @ weights) + flat).view(x.shape).contiguous()


class FlatteningOverKeys(Flattening):
    over = 2


class BoundCAM(nn.Module):
    """A CAM that takes its own number of channels only."""

    def __init__(self, in_dim=20):
        super().__init__()
        self.chanel_in, self.gamma = in_dim, nn.Parameter(torch.full((1, 1, 1, 1), 0.3))

    def forward(self, x):
        flat = x.view(len(x), self.chanel_in, x.shape[2] * x.shape[3])
        energy = flat @ flat.mT
        attention = torch.softmax(energy.max(-1, keepdim=True)[0] - energy, -1)
        return self.gamma * (attention @ flat).view_as(x) + x
