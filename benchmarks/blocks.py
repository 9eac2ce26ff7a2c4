"""The papers' attention blocks in plain PyTorch, on the parameters of this package's modules.

``written_out(network, rival)`` puts them in the place of the modules, under the same names and with the same
parameters: what a network computes stays the same, and how its blocks compute it is the rival's. ``converted(network)``
is what ``segattn_ops.convert`` makes of the eager network. ``eager`` has the attention maps that the papers' code
stores. ``sdpa`` hands the products around a softmax over all positions to ``scaled_dot_product_attention``. The scale
multiplies the query, which costs an eager block less than scaling its map.

All but the channel and criss-cross blocks take ``queries``: the positions (B, C, K, 1) whose results are wanted, all
without it. ``check`` needs a few rows of a map that as a whole does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor
from torch import nn as torch_nn

from segattn_ops import convert, nn

from . import rivals

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
RIVALS = ("fused", "eager", "sdpa")
POINTS = 64  # positions at which a block is compared with float64


class _Written(torch_nn.Module):
    """Takes over the submodules, the parameters and the scale of a block."""

    def __init__(self, block: torch_nn.Module, attention: Attention):
        super().__init__()
        for name, child in block._modules.items():  # named_children() lists a layer with two names once
            self.add_module(name, child)
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.energy_scale = getattr(block, "scale", 1.0)
        self.attention = attention
        self.train(block.training)


class WrittenPosition(_Written):
    """DANet's PAM: ``gamma * softmax(Q^T K) V + x``."""

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        queries = x if queries is None else queries
        query = self.query_conv(queries) * self.energy_scale if self.energy_scale != 1 else self.query_conv(queries)
        return self.gamma * self.attention(query, self.key_conv(x), self.value_conv(x)) + queries


class WrittenChannelAttention(_Written):
    """DANet's CAM: ``gamma * softmax(rowmax(E) - E) X + x`` with E = X X^T."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * rivals.eager_channel(x) + x


class WrittenCrissCross(_Written):
    """A pass of CCNet's block, with mmcv's einsums."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.attention(self.query_conv(x), self.key_conv(x), self.value_conv(x)) + x


class WrittenRecurrence(_Written):
    """CCNet's block R times."""

    def __init__(self, block: nn.RecurrentCrissCrossAttention, attention: Attention):
        super().__init__(block, attention)  # its names of the parameters come first, so they keep them
        self.recurrence = block.recurrence
        self.once = WrittenCrissCross(block, attention)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = self.once(x)
        return x


class WrittenNonLocal(_Written):
    """The embedded Gaussian: ``x + W(softmax(theta^T phi) g)``."""

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        queries = x if queries is None else queries
        theta = self.theta(queries) * self.energy_scale if self.energy_scale != 1 else self.theta(queries)
        return queries + self.W(self.attention(theta, self.phi(x), self.g(x)))


class WrittenAsymmetric(_Written):
    """A stage of ANN as its authors wrote it: pooled after the projections; a shared projection is computed twice."""

    def forward(self, low: Tensor, high: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        high = low if high is None else high
        query = self.f_query(high if queries is None else queries) * self.energy_scale
        return self.W(self.attention(query, self.psp(self.f_key(low)), self.psp(self.f_value(low))))


class _Stages(torch_nn.Module):
    """Takes over the submodules of a block of ANN."""

    def __init__(self, block: torch_nn.Module):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.train(block.training)


class WrittenFusion(_Stages):
    """ANN's AFNB around its stages."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        context = (stage(low, high) for stage in self.stages)
        return self.conv_bn_dropout(torch.cat([reduce(torch.add, context), high], dim=1))


class WrittenPyramid(_Stages):
    """ANN's APNB around its stages."""

    def forward(self, x: Tensor) -> Tensor:
        context = (stage(x) for stage in self.stages)
        return self.conv_bn_dropout(torch.cat([reduce(torch.add, context), x], dim=1))


WRITTEN: dict[type[torch_nn.Module], type[_Written]] = {
    nn.PositionAttention: WrittenPosition,
    nn.ChannelAttention: WrittenChannelAttention,
    nn.RecurrentCrissCrossAttention: WrittenRecurrence,
    nn.NonLocal2d: WrittenNonLocal,
    nn.AsymmetricAttention: WrittenAsymmetric,
}
AROUND: dict[type[torch_nn.Module], type[_Stages]] = {nn.AFNB: WrittenFusion, nn.APNB: WrittenPyramid}
PAIRWISE = (nn.PositionAttention, nn.NonLocal2d, nn.AsymmetricAttention)  # those that SDPA computes
ATTENTION = {"eager": rivals.eager_position, "sdpa": rivals.sdpa_position}


def found(network: torch_nn.Module) -> dict[str, torch_nn.Module]:
    """The attention blocks of a network by path; "" for a block itself."""
    return {path: module for path, module in network.named_modules() if type(module) in WRITTEN}


def applies(network: torch_nn.Module, rival: str) -> bool:
    """Whether the rival computes some block in another way than eager."""
    return rival != "sdpa" or any(isinstance(block, PAIRWISE) for block in found(network).values())


def written(block: torch_nn.Module, rival: str) -> _Written:
    """One block as ``rival`` computes it. SDPA has neither criss-cross nor channel attention: those stay eager."""
    if isinstance(block, nn.RecurrentCrissCrossAttention):
        return WrittenRecurrence(block, rivals.eager_criss_cross)
    return WRITTEN[type(block)](block, ATTENTION[rival])


def written_out(network: torch_nn.Module, rival: str) -> torch_nn.Module:
    """The network with the rival's blocks, on the same parameters; the network itself for ``fused``."""
    if rival == "fused":
        return network
    for path, block in found(network).items():
        network = _replaced(network, path, written(block, rival))
    for path, block in list(network.named_modules()):
        if type(block) in AROUND:
            network = _replaced(network, path, AROUND[type(block)](block))
    return network


def _replaced(network: torch_nn.Module, path: str, module: torch_nn.Module) -> torch_nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
    return network


def converted(network: torch_nn.Module) -> torch_nn.Module:
    """The eager network, its blocks converted. Raises RuntimeError if one was left alone."""
    count = len(found(network))
    report = convert(written_out(network, "eager"))
    if len(report.converted) != count or report.left:
        raise RuntimeError(f"convert must convert all {count} blocks:\n{report}")
    return report.model


def awaken(network: torch_nn.Module) -> torch_nn.Module:
    """Undoes the initialisation with which the blocks start as the identity: a gamma of 1, and for a last layer that is
    zero PyTorch's own initialisation. Otherwise no result would depend on the attention."""
    for block in found(network).values():
        if hasattr(block, "gamma"):
            torch_nn.init.ones_(block.gamma)
        for layer in block.modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor) and not bool(weight.any()):
                torch_nn.init.ones_(weight) if isinstance(layer, torch_nn.BatchNorm2d) else layer.reset_parameters()
    return network


class References:
    """Float64 copies of a network's blocks, and the largest error of the blocks' outputs in a forward pass.

    Blocks over all pairs of positions are compared at :data:`POINTS` positions, the others everywhere. The network is
    in evaluation mode: in training the norms take statistics of all positions.
    """

    def __init__(self, network: torch_nn.Module):
        self.blocks = {
            path: written(copy.deepcopy(block), "eager").double().eval() for path, block in found(network).items()
        }

    @torch.no_grad()
    def errors(self, network: torch_nn.Module, *inputs: Tensor) -> dict[str, float]:
        """The relative L2 error of each block's output, by its path."""
        seen: dict[str, float] = {}

        def compare(path: str):
            def hook(module, arguments, output):
                seen[path] = self._error(self.blocks[path], arguments, output)

            return hook

        hooks = [network.get_submodule(path).register_forward_hook(compare(path)) for path in self.blocks]
        was_training = network.training
        try:
            network.eval()(*inputs)
        finally:
            network.train(was_training)
            for hook in hooks:
                hook.remove()
        return seen

    def _error(self, reference: _Written, arguments: tuple[Tensor, ...], output: Tensor) -> float:
        inputs = [arguments[0].double(), *arguments[1:]]  # of a second map, only the picked positions are read
        result = output.double()
        if isinstance(reference, (WrittenChannelAttention, WrittenRecurrence)):
            expected = reference(*inputs)
        else:
            count = output.shape[2] * output.shape[3]
            generator = torch.Generator().manual_seed(0)
            index = torch.randperm(count, generator=generator)[:POINTS].to(output.device)
            expected = reference(*inputs, queries=pick(inputs[-1], index).double())
            result = pick(result, index)
        if not bool(torch.isfinite(result).all()):
            return float("inf")
        return float((result - expected).norm() / expected.norm())


def pick(x: Tensor, index: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, K, 1): the positions of ``index``."""
    return x.flatten(2).index_select(2, index).unsqueeze(3)


def small_errors(eager: torch_nn.Module, rival: torch_nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Relative errors of the output and of all gradients of a network with a rival's blocks against the eager network
    of the same weights, in float64 on one small input: the gradients, which at full size nothing else computes where
    eager does not fit."""
    results = []
    for network in (eager, rival):
        network.double().train()
        for module in network.modules():
            if isinstance(module, (torch_nn.Dropout, torch_nn.Dropout2d)):
                module.p = 0.0
        leaves = [x.double().requires_grad_() for x in inputs]
        output = network(*leaves)
        if isinstance(output, dict):
            output = torch.cat(list(output.values()), dim=1)
        names = ["output", *(f"grad_input_{i}" for i in range(len(leaves)))]
        names += [f"grad_{path}" for path, _ in network.named_parameters()]
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
        gradients = torch.autograd.grad(output, [*leaves, *network.parameters()], weights, materialize_grads=True)
        results.append(dict(zip(names, (output.detach(), *gradients), strict=True)))
    exact, got = results
    largest = max(float(value.norm()) for value in exact.values())
    # A gradient that is zero in exact arithmetic (a bias before a batch norm) is rounding: relative to the others.
    return {
        name: float((got[name] - value).norm() / max(float(value.norm()), 1e-6 * largest))
        for name, value in exact.items()
    }
