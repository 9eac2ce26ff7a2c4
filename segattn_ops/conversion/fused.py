"""Replacements of published blocks: the block's own children, parameters and names, with a fused forward."""

from torch import Tensor, nn

from ..nn import _pairwise
from ..ops.channel import channel_attention, residual_channel_attention
from ..ops.criss_cross import criss_cross_attention
from ..ops.position import position_attention
from .block import FusedBlock


class FusedPositionAttention(FusedBlock):
    """gamma * softmax_j(scale * q_i . k_j) v_j + x: DANet's PAM and the self-attention of SAGAN. Options: scale; flat
    for layers that take (B, C, N)."""

    fused_kind = "position attention"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> (B, C, *spatial)."""
        if self._fused_options.get("flat"):
            flat: Tensor = self._fused_attended(x.flatten(2)).unflatten(2, x.shape[2:])
            return flat
        return self._fused_attended(x)

    def _fused_attended(self, x: Tensor) -> Tensor:
        query, key, value = (self._fused_call(role, x) for role in ("query", "key", "value"))
        return self._fused_residual(position_attention(query, key, value, self._fused_options["scale"]), x)

    def _fused_script(self) -> list[str] | None:
        return None if self._fused_options.get("flat") else self._fused_script_of("position")


class FusedChannelAttention(FusedBlock):
    """gamma * softmax(scale * E) x + x, E = x x^T: DANet's CAM with scale -1. Option: scale."""

    fused_kind = "channel attention"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> (B, C, *spatial)."""
        gamma, scale = getattr(self, self._fused_names["gamma"]), self._fused_options["scale"]
        other = isinstance(gamma, nn.Module) or gamma.dim() > 1 or gamma.numel() != 1
        if other or (isinstance(x, Tensor) and gamma.dtype != x.dtype):  # the sum is in gamma's dtype
            return self._fused_residual(channel_attention(x, x, x, scale), x)
        return residual_channel_attention(x, gamma, scale)

    def _fused_script(self) -> list[str]:
        return [f"attended = channel(x, {self._fused_options['scale']!r})", self._fused_script_residual()]


class FusedCrissCrossAttention(FusedBlock):
    """One pass of CCNet's criss-cross attention. Option: scale."""

    fused_kind = "criss-cross attention"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        query, key, value = (self._fused_call(role, x) for role in ("query", "key", "value"))
        return self._fused_residual(criss_cross_attention(query, key, value, self._fused_options["scale"]), x)

    def _fused_script(self) -> list[str]:
        return self._fused_script_of("criss_cross")


class FusedNonLocal(FusedBlock):
    """A non-local block of any mode; options: mode, and scale of the energies."""

    fused_kind = "non-local block"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial) -> x + out(y)."""
        y = self._fused_call("out", self._fused_aggregate(x))
        return (self._fused_call("norm", y) if "norm" in self._fused_names else y) + x

    def _fused_aggregate(self, x: Tensor) -> Tensor:
        mode, scale = self._fused_options["mode"], self._fused_options.get("scale", 1.0)
        g = self._fused_call("value", x)
        if mode == "gaussian":
            return position_attention(x, self._fused_call("key", x) if "key" in self._fused_names else x, g, scale)
        theta, phi = self._fused_call("query", x), self._fused_call("key", x)
        if mode == "embedded_gaussian":
            return position_attention(theta, phi, g, scale)
        theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
        if mode == "dot_product":
            y = _pairwise.dot_product(theta, phi, g)
        else:
            y = _pairwise.concatenation(self.get_submodule(self._fused_names["projection"]), theta, phi, g)
        unflattened: Tensor = y.unflatten(2, x.shape[2:])
        return unflattened

    def _fused_script(self) -> list[str] | None:
        mode, scale = self._fused_options["mode"], self._fused_options.get("scale", 1.0)
        if mode == "concatenation":
            return None
        query = f"{self._fused_layer('query')}(x)" if "query" in self._fused_names else "x"
        key = f"{self._fused_layer('key')}(x)" if "key" in self._fused_names else "x"
        operands = f"{query}, {key}, {self._fused_layer('value')}(x)"
        attended = f"dot_product({operands})" if mode == "dot_product" else f"position({operands}, {scale!r})"
        result = f"{self._fused_layer('out')}({attended})"
        return [
            f"return {self._fused_layer('norm')}({result}) + x"
            if "norm" in self._fused_names
            else f"return {result} + x"
        ]


class FusedAsymmetricAttention(FusedBlock):
    """A stage of ANN: queries at every position, keys and values pooled; options: scale, and the order of the
    arguments."""

    fused_kind = "asymmetric attention"

    def fused_forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """ANN: (x) or (low, high). mmsegmentation: (high, low). -> (B, out, H, W) of high's size."""
        if second is None:
            high = low = first
        else:
            high, low = (first, second) if self._fused_options["query_first"] else (second, first)
        query, key, value = (
            self._fused_call("query", high),
            self._fused_call("key", low),
            self._fused_call("value", low),
        )
        pooled = (
            (self._fused_call("pool", key), self._fused_call("pool", value))
            if "pool" in self._fused_names
            else (key, value)
        )
        context = position_attention(query, *pooled, self._fused_options["scale"])
        return self._fused_call("out", context) if "out" in self._fused_names else context

    def _fused_script(self) -> list[str]:
        high, low = ("x", "y") if self._fused_options["query_first"] else ("y", "x")
        if self._fused_traits.inputs == 1:
            high = low = "x"
        key, value = f"{self._fused_layer('key')}({low})", f"{self._fused_layer('value')}({low})"
        if "pool" in self._fused_names:
            key, value = f"{self._fused_layer('pool')}({key})", f"{self._fused_layer('pool')}({value})"
        attended = f"position({self._fused_layer('query')}({high}), {key}, {value}, {self._fused_options['scale']!r})"
        return [
            f"return {self._fused_layer('out')}({attended})" if "out" in self._fused_names else f"return {attended}"
        ]


class FusedDotProductPosition(FusedBlock):
    """The position branch of External-Attention's DAModule: (B, C, H, W) -> (B, H * W, C)."""

    fused_kind = "position attention (scaled dot product)"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, H * W, C)."""
        y = self._fused_call("in", x).flatten(2).mT  # (B, N, C)
        query, key, value = (self._fused_call(role, y).mT for role in ("query", "key", "value"))
        return self._fused_call("out", position_attention(query, key, value, query.shape[1] ** -0.5).mT)


class FusedDotProductChannel(FusedBlock):
    """The channel branch of External-Attention's DAModule: (B, C, H, W) -> (B, C, H * W)."""

    fused_kind = "channel attention (scaled dot product)"

    def fused_forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H * W)."""
        y = self._fused_call("in", x).flatten(2)
        return self._fused_call("out", channel_attention(y, y, y, y.shape[2] ** -0.5))
