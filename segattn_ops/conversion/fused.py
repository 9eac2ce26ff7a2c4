"""Replacements of published blocks: the block's own children, parameters and names, with a fused forward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import _pairwise
from ..ops.channel import channel_attention, residual_channel_attention
from ..ops.criss_cross import criss_cross_attention
from ..ops.position import position_attention


class FusedBlock(nn.Module):
    """Another module with its forward replaced.

    Parameters, buffers, children, hooks and plain attributes are the original's objects under their original names: the
    state dict does not change, optimizers and DistributedDataParallel keep their parameters, and the block's attributes
    stay readable.

    Args:
        original: the block; not to be used afterwards.
        names: its attribute for each role of the computation.
        options: further settings of the computation.
    """

    fused_kind = ""

    def __init__(self, original: nn.Module, names: Mapping[str, str], options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.__dict__.update(original.__dict__)
        self._compiled_call_impl = None  # the original's compiled forward, if it was compiled
        self._original_class = type(original)
        self._fused_names = dict(names)
        self._fused_options = dict(options or {})

    def _call(self, role: str, *inputs: Tensor) -> Tensor:
        result: Tensor = getattr(self, self._fused_names[role])(*inputs)
        return result

    def _residual(self, attended: Tensor, x: Tensor) -> Tensor:
        """x + gamma * attended, gamma a parameter (official) or a module (mmcv's Scale)."""
        gamma = getattr(self, self._fused_names["gamma"])
        scaled: Tensor = gamma(attended) if isinstance(gamma, nn.Module) else gamma * attended
        return scaled + x

    def extra_repr(self) -> str:
        return f"{self.fused_kind} of {self._original_class.__name__}"


class FusedPositionAttention(FusedBlock):
    """gamma * softmax_j(q_i . k_j) v_j + x: DANet's PAM and the self-attention of SAGAN."""

    fused_kind = "position attention"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        query, key, value = (self._call(role, x) for role in ("query", "key", "value"))
        return self._residual(position_attention(query, key, value, 1.0), x)


class FusedChannelAttention(FusedBlock):
    """gamma * softmax(max - E) x + x, E = x x^T: DANet's CAM."""

    fused_kind = "channel attention"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        gamma = getattr(self, self._fused_names["gamma"])
        if isinstance(gamma, nn.Parameter):
            return residual_channel_attention(x, gamma, -1.0)
        return self._residual(channel_attention(x, x, x, -1.0), x)


class FusedCrissCrossAttention(FusedBlock):
    """One pass of CCNet's criss-cross attention."""

    fused_kind = "criss-cross attention"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        query, key, value = (self._call(role, x) for role in ("query", "key", "value"))
        return self._residual(criss_cross_attention(query, key, value, 1.0), x)


class FusedNonLocal(FusedBlock):
    """A non-local block of any mode; options: mode, and scale of the energies."""

    fused_kind = "non-local block"

    def forward(self, x: Tensor, return_nl_map: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, *spatial) -> x + out(y); with ``return_nl_map``, the original's own forward, which stores the
        attention map."""
        if return_nl_map:
            result: tuple[Tensor, Tensor] = self._original_class.forward(self, x, return_nl_map=True)
            return result
        y = self._call("out", self._aggregate(x))
        return (self._call("norm", y) if "norm" in self._fused_names else y) + x

    def _aggregate(self, x: Tensor) -> Tensor:
        mode, scale = self._fused_options["mode"], self._fused_options.get("scale", 1.0)
        g = self._call("value", x)
        if mode == "gaussian":
            return position_attention(x, self._call("key", x) if "key" in self._fused_names else x, g, scale)
        theta, phi = self._call("query", x), self._call("key", x)
        if mode == "embedded_gaussian":
            return position_attention(theta, phi, g, scale)
        theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
        if mode == "dot_product":
            y = _pairwise.dot_product(theta, phi, g)
        else:
            projection = next(self.get_submodule(self._fused_names["projection"]).parameters()).flatten()
            query_weight, key_weight = projection.split(theta.shape[1])
            parts = torch.einsum("ben,e->bn", theta, query_weight), torch.einsum("bem,e->bm", phi, key_weight)
            y = _pairwise.concatenation(*parts, g)
        return y.reshape(x.shape[0], -1, *x.shape[2:])


class FusedAsymmetricAttention(FusedBlock):
    """A stage of ANN: queries at every position, keys and values pooled; options: scale, and the order of the
    arguments."""

    fused_kind = "asymmetric attention"

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """ANN: (x) or (low, high). mmsegmentation: (high, low). -> (B, out, H, W) of high's size."""
        if second is None:
            high = low = first
        else:
            high, low = (first, second) if self._fused_options["query_first"] else (second, first)
        query, key, value = self._call("query", high), self._call("key", low), self._call("value", low)
        pooled = (self._call("pool", key), self._call("pool", value)) if "pool" in self._fused_names else (key, value)
        context = position_attention(query, *pooled, self._fused_options["scale"])
        return self._call("out", context) if "out" in self._fused_names else context


class FusedDotProductPosition(FusedBlock):
    """The position branch of External-Attention's DAModule: (B, C, H, W) -> (B, H * W, C).

    Its dropout acts on the attention map, which is not stored: in training with dropout the original's forward runs.
    """

    fused_kind = "position attention (scaled dot product)"
    cnn: nn.Module
    pa: Any  # a module with fc_q, fc_k, fc_v, fc_o and dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, H * W, C)."""
        if self.training and self.pa.dropout.p > 0:
            original: Tensor = self._original_class.forward(self, x)
            return original
        y = self.cnn(x).flatten(2).mT  # (B, N, C)
        query, key, value = (layer(y).mT for layer in (self.pa.fc_q, self.pa.fc_k, self.pa.fc_v))
        output: Tensor = self.pa.fc_o(position_attention(query, key, value, query.shape[1] ** -0.5).mT)
        return output


class FusedDotProductChannel(FusedBlock):
    """The channel branch of External-Attention's DAModule: (B, C, H, W) -> (B, C, H * W). Dropout as in the other."""

    fused_kind = "channel attention (scaled dot product)"
    cnn: nn.Module
    pa: Any  # a module with fc_o and dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H * W)."""
        if self.training and self.pa.dropout.p > 0:
            original: Tensor = self._original_class.forward(self, x)
            return original
        y = self.cnn(x).flatten(2)
        output: Tensor = self.pa.fc_o(channel_attention(y, y, y, y.shape[2] ** -0.5))
        return output
