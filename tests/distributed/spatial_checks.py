"""Checks of spatially parallel models on 2, 3 and 4 processes: ``python -m tests.distributed.spatial_checks`` prints a
JSON object, the name of each check -> its error or null. tests/distributed/test_spatial.py runs it.

One process forks the ranks of all layouts, so that torch and torchvision are imported once.
"""

import copy
import functools
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed import checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import segattn_ops
from segattn_ops import models
from segattn_ops import nn as blocks
from segattn_ops.distributed import reduce_gradients, spatially_parallel

from ..peers import blocks as peer_blocks
from .processes import fork

HEIGHT, WIDTH, CHANNELS = 11, 9, 4
TOLERANCE = 1e-12
TIMEOUT = 20  # seconds, of a collective


class Layout(NamedTuple):
    """Which rank holds which part."""

    name: str
    heights: tuple[int, ...]
    widths: tuple[int, ...] = (WIDTH,)

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        return (len(self.heights),) if len(self.widths) == 1 else (len(self.heights), len(self.widths))


LAYOUTS = {
    2: [Layout("2", (7, 4))],
    3: [Layout("3, one empty", (6, 0, 5)), Layout("3, of one row", (1, 9, 1))],
    4: [Layout("2 x 2", (6, 5), (3, 6)), Layout("2 x 2, one column empty", (10, 1), (9, 0))],
}


class Run(NamedTuple):
    mesh: DeviceMesh
    layout: Layout

    def part(self, whole: Tensor) -> Tensor:
        return self.cut(whole, self.layout.heights, self.layout.widths)

    def cut(self, whole: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
        i, *j = self.mesh.get_coordinate() or ()
        part = whole.split(list(heights), 2)[i]
        return part.split(list(widths), 3)[j[0]].clone() if j else part.clone()

    def parts_of(self, local: Tensor) -> tuple[list[int], list[int]]:
        """Heights and widths of all ranks' parts."""
        sizes: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(sizes, tuple(local.shape[2:]))
        columns = len(self.layout.widths)
        return [h for h, _ in sizes[::columns]], [w for _, w in sizes[:columns]]


CHECKS: dict[str, Callable[[Run], None]] = {}


def images(channels: int = CHANNELS, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(channels + height)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def close(name: str, got: Tensor, expected: Tensor, scale: float = 1) -> None:
    """scale: of the terms of sums whose result may be smaller."""
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    if got.numel():
        error = (got - expected).abs().max().item()
        assert error <= TOLERANCE * max(expected.abs().max().item(), scale), f"{name}: off by {error}"


def results(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for o in (output.values() if isinstance(output, dict) else output) for t in results(o)]


def compare(
    run: Run, model: nn.Module, inputs: Sequence[Tensor], whole: Sequence[int] = (), twin: nn.Module | None = None
) -> None:
    """Outputs, buffers and gradients of a model on parts against those of one process.

    Args:
        whole: which outputs are the same on each rank.
        twin: the model that takes parts; a spatially parallel copy if None.
    """
    model = model.double()
    if twin is None:
        twin = spatially_parallel(copy.deepcopy(model), run.mesh)
    plain = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    local = [(run.part(t) if t.dim() == 4 else t.clone()).requires_grad_(t.is_floating_point()) for t in inputs]
    expected, got = results(model(*plain)), results(twin(*local))
    assert len(expected) == len(got) and not any(type(t) is not Tensor for t in got)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in expected]
    arriving = []
    for i, (e, g) in enumerate(zip(expected, got, strict=True)):
        parts = run.parts_of(g) if g.dim() == 4 else ([], [])
        if i in whole:
            close(f"output {i}", g, e)
            arriving.append(incoming[i])
        else:
            assert (sum(parts[0]), sum(parts[1])) == tuple(e.shape[2:]), f"output {i}: parts {parts} of {e.shape}"
            close(f"output {i}", g, run.cut(e, *parts))
            arriving.append(run.cut(incoming[i], *parts))
    for (name, e), g in zip(model.named_buffers(), twin.buffers(), strict=True):
        close(name, g.double(), e.double())
        first = g.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, g), f"{name}: not the same on each rank"
    if not expected[0].requires_grad:
        return
    torch.autograd.backward(expected, incoming)
    torch.autograd.backward(got, arriving)
    gradients = [t.grad for t in (*plain, *model.parameters()) if t.grad is not None]
    scale = max(1.0, *(g.abs().max().item() for g in gradients))  # that of a bias before a batch norm is 0
    for i, (e, g) in enumerate(zip(plain, local, strict=True)):
        if e.grad is not None:
            if e.dim() != 4:
                dist.all_reduce(g.grad)
            close(f"gradient of input {i}", g.grad, run.part(e.grad) if e.dim() == 4 else e.grad, scale)
    reduce_gradients(twin, run.mesh)
    for (name, e), g in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (e.grad is None) == (g.grad is None), f"gradient of {name}"
        if e.grad is not None:
            close(f"gradient of {name}", g.grad, e.grad, scale)


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.layers)


def check(
    name: str,
    make: Callable[[], nn.Module],
    *,
    training: bool = True,
    whole: Sequence[int] = (),
    inputs: Callable[[], Sequence[Tensor]] = lambda: [images()],
) -> None:
    def run_check(run: Run) -> None:
        compare(run, make().train(training), inputs(), whole)

    CHECKS[name] = run_check


def calls(name: str, function: Callable, *modules: Callable[[], nn.Module], **options: Any) -> None:
    check(name, lambda: Calls(function, *(m() for m in modules)), **options)


def spread(module: nn.Module) -> nn.Module:
    """No parameter of the module is 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.5)
    return module


C = CHANNELS
for _options in (
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 4, "dilation": 4},
    {"kernel_size": 7, "padding": 3, "stride": 2, "groups": 2},
    {"kernel_size": (2, 4), "padding": (1, 0), "stride": (3, 1)},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 1, "padding": 2},
    {"kernel_size": 5, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 5, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 11, "padding": 5},
):  # fmt: skip
    check(
        "Conv2d " + ", ".join(f"{k}={v}" for k, v in _options.items()),
        lambda options=_options: nn.Conv2d(C, 6, **options),
    )
for _options in (
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 2, "stride": 3, "output_padding": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2},
):  # fmt: skip
    check(
        "ConvTranspose2d " + ", ".join(f"{k}={v}" for k, v in _options.items()),
        lambda options=_options: nn.ConvTranspose2d(C, 6, **options),
    )
for _layer in (
    nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, 1, 0, 3),
    nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, True), nn.AvgPool2d(3, 1, 1, False, False),
    nn.AvgPool2d((3, 2), (2, 3), (1, 0), divisor_override=5),
    nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=(2.3, 1.7)), nn.Upsample((5, 20)),
    nn.Upsample((16, 7), mode="nearest-exact"), nn.Upsample((23, 30), mode="bilinear"),
    nn.Upsample((23, 30), mode="bilinear", align_corners=True), nn.Upsample((5, 4), mode="bilinear"),
    nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=(1.7, 2.5), mode="bilinear"),
    nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(C), nn.Softmax(1), nn.LogSoftmax(1), nn.GELU(), nn.Hardswish(),
    nn.ZeroPad2d((1, 2, 3, 1)), nn.ZeroPad2d((-1, 2, -3, 1)), nn.ReflectionPad2d((2, 1, 3, 2)),
    nn.ReplicationPad2d((1, 2, 4, 3)), nn.CircularPad2d((2, 1, 3, 2)), nn.PixelShuffle(2), nn.Identity(),
    nn.Dropout(0.0),
):  # fmt: skip
    check(str(_layer), lambda layer=_layer: copy.deepcopy(layer))
for _layer in (
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, 4)), nn.AdaptiveAvgPool2d((11, 6)), nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool2d((3, 2)),
):  # fmt: skip
    check(str(_layer), lambda layer=_layer: copy.deepcopy(layer), whole=[0])
for _training in (True, False):
    for _norm in (
        lambda: nn.BatchNorm2d(C), lambda: nn.BatchNorm2d(C, affine=False, momentum=None), lambda: nn.GroupNorm(2, C),
        lambda: nn.BatchNorm2d(C, track_running_stats=False), lambda: nn.InstanceNorm2d(C, affine=True),
    ):  # fmt: skip
        check(f"{_norm()}, training={_training}", lambda norm=_norm: spread(norm()), training=_training)

calls("gate of one column", lambda x, a: a(x.mean(3, keepdim=True).sigmoid() * x), lambda: nn.Conv2d(C, C, 3))
for _name, _taken in {
    "interpolate": lambda x: F.interpolate(x, x.shape[2:]),
    "pad": lambda x: F.pad(x, (0, 0, -1, 0)),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (None, None)),
}.items():
    calls(f"in-place after {_name}", lambda x, taken=_taken: (y := x * 2, taken(y).relu_()))
calls(
    "whole tensors of a map's type",
    lambda x: torch.cat(
        [x + torch.arange(C).view(-1, 1, 1).to(x), torch.arange(x.shape[2]).view(-1, 1).expand_as(x[:, :1]).type_as(x)],
        1,
    ),
)
calls("cat and sum", lambda x: torch.cat([x, x.mean(1, keepdim=True), x.amax(dim=1, keepdim=True)], 1))
calls("strided and back", lambda x, a, b: x + F.interpolate(b(F.relu(a(x))), x.shape[2:], mode="bilinear"),
      lambda: nn.Conv2d(C, 8, 3, 2, 1), lambda: nn.Conv2d(8, C, 3, padding=1))  # fmt: skip
calls("global gate", lambda x, a: x * a(F.adaptive_avg_pool2d(x, 1)).sigmoid() + x.mean((2, 3), keepdim=True),
      lambda: nn.Conv2d(C, C, 1))  # fmt: skip
calls("image pooling", lambda x, a: torch.cat(
    [x, F.interpolate(a(F.adaptive_avg_pool2d(x, 1)), x.shape[-2:], mode="bilinear", align_corners=False)], 1),
    lambda: nn.Sequential(nn.Conv2d(C, 3, 1), nn.BatchNorm2d(3, eps=1.0), nn.ReLU()))  # fmt: skip
calls("pyramid pooling", lambda x, a: torch.cat(
    [x] + [F.interpolate(a(F.adaptive_avg_pool2d(x, n)), x.shape[2:], mode="bilinear", align_corners=True)
           for n in (1, 2, 3, 6)], 1), lambda: nn.Conv2d(C, 3, 1))  # fmt: skip
calls("expanded", lambda x: x - F.adaptive_max_pool2d(x, 1).expand_as(x) + x.amax((2, 3), True).expand(-1, -1, 11, 9))
calls("inplace", lambda x, a, b: b(F.relu_(a(x).add_(x).mul_(2))).clamp_(min=-0.1), lambda: nn.Conv2d(C, C, 3, 1, 1),
      lambda: nn.BatchNorm2d(C))  # fmt: skip
calls("channels", lambda x: torch.cat([p * 2 for p in x.chunk(2, 1)] + [x[:, :1], x[:, 2, None]], 1).softmax(dim=1))
calls("channel shuffle", lambda x: x.view(2, 2, 2, *x.shape[2:]).transpose(1, 2).reshape(2, -1, *x.shape[-2:]))
calls("channels last", lambda x, n, a: a(n(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2), lambda: nn.LayerNorm(C),
      lambda: nn.Linear(C, 5))  # fmt: skip
calls("tokens", lambda x, a: a(x.flatten(2).transpose(1, 2)).mT.reshape(2, 5, *x.shape[2:]), lambda: nn.Linear(C, 5))
calls("position embedding", lambda x, e: x + e.weight.view(1, 1, HEIGHT, WIDTH), lambda: nn.Embedding(HEIGHT, WIDTH))
calls("two maps", lambda x, y: x * F.interpolate(y, x.shape[2:], mode="bilinear"), inputs=lambda: [images(), images()])
calls("whole and parts", lambda x: (x.mean(), x.sum((0, 2, 3)), (x * 2).mean((2, 3))), whole=[0, 1, 2])
calls("linear of the means", lambda x, a: a(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)),
      lambda: nn.Linear(C, 5), whole=[0])  # fmt: skip


WIDE = 8


def attended(module: nn.Module) -> nn.Module:
    """The residual factors are not 0, at which no gradient reaches the attention."""
    for name, parameter in module.named_parameters():
        if name.endswith(("gamma", "scale")) or not parameter.any():
            nn.init.uniform_(parameter, 0.2, 0.8)
    return module


for _name, _make in {
    "PositionAttention": lambda: blocks.PositionAttention(WIDE, 3),
    "ChannelAttention": lambda: blocks.ChannelAttention(WIDE, -0.1),
    "CrissCrossAttention": lambda: blocks.CrissCrossAttention(WIDE),
    "RecurrentCrissCrossAttention": lambda: blocks.RecurrentCrissCrossAttention(WIDE),
    "DAModule": lambda: blocks.DAModule(WIDE),
    "NonLocal2d": lambda: blocks.NonLocal2d(WIDE),
    "NonLocal2d, sampled": lambda: blocks.NonLocal2d(WIDE, sub_sample=True, scale=0.3),
    "NonLocal2d, gaussian": lambda: blocks.NonLocal2d(WIDE, mode="gaussian", scale=0.2),
    "NonLocal2d, dot product": lambda: blocks.NonLocal2d(WIDE, mode="dot_product"),
    "APNB": lambda: blocks.APNB(WIDE, WIDE, 4, 4, dropout=0.0, pool_sizes=(1, 3)),
    "CompactPositionEncoder": lambda: blocks.CompactPositionEncoder(WIDE, lambda n: nn.GroupNorm(2, n)),
    "RefinementResidualBlock": lambda: blocks.RefinementResidualBlock(WIDE, 3),
}.items():
    check(
        f"{_name}, parallel", lambda make=_make: attended(make()), inputs=lambda: [images(WIDE)],
        whole=[0] if "Encoder" in _name else (),
    )  # fmt: skip
for _name, _make in {
    "AFNB": lambda: blocks.AFNB(WIDE, WIDE, WIDE, 4, 4, dropout=0.0, pool_sizes=(1, 3)),
    "CompactChannelAttention": lambda: blocks.CompactChannelAttention(),
    "CrossLevelGatingDecoder": lambda: blocks.CrossLevelGatingDecoder(WIDE, 3),
    "ChannelAttentionBlock": lambda: blocks.ChannelAttentionBlock(2 * WIDE, WIDE),
}.items():
    check(f"{_name}, parallel", lambda make=_make: attended(make()), inputs=lambda: [images(WIDE), images(WIDE) * 0.1])
check("CompactPositionAttention, parallel", lambda: attended(blocks.CompactPositionAttention(WIDE)),
      inputs=lambda: [images(WIDE), images(WIDE)[:, :, 0].mT])  # fmt: skip


# Poolings of one dimension


def strips(run: Run) -> None:
    """Over rows, or columns, alone: refused where both are sharded."""
    columns = Calls(lambda x: (F.adaptive_avg_pool2d(x, (None, 4)), x.mean(3, keepdim=True) * x,
                               F.adaptive_max_pool2d(x, (None, 1)), x.sum(-1, keepdim=True)))  # fmt: skip
    rows = Calls(lambda x: (F.adaptive_avg_pool2d(x, (3, None)), x.mean(2), x.amax(-2, keepdim=True),
                            x * F.adaptive_avg_pool2d(x, (1, None))))  # fmt: skip
    if len(run.layout.widths) == 1:
        compare(run, columns, [images()])
        compare(run, rows, [images()], whole=[0, 1, 2])
    else:
        for function in (
            lambda x: F.adaptive_avg_pool2d(x, (None, 4)), lambda x: F.adaptive_avg_pool2d(x, (3, None)),
            lambda x: x.mean(3, keepdim=True), lambda x: x.sum(2),
        ):  # fmt: skip
            model = spatially_parallel(Calls(function), run.mesh)
            raises(NotImplementedError, "the model .Calls. calls .*one of (its )?two", model,
                   run.part(images()))  # fmt: skip


CHECKS["strips"] = strips

# Blocks with mesh

BLOCKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "PositionAttention": (functools.partial(blocks.PositionAttention, WIDE, 3), 1),
    "ChannelAttention": (functools.partial(blocks.ChannelAttention, WIDE, -0.1), 1),
    "CrissCrossAttention": (functools.partial(blocks.CrissCrossAttention, WIDE), 1),
    "RecurrentCrissCrossAttention": (functools.partial(blocks.RecurrentCrissCrossAttention, WIDE), 1),
    "DAModule": (functools.partial(blocks.DAModule, WIDE), 1),
    "NonLocal2d": (functools.partial(blocks.NonLocal2d, WIDE, sub_sample=True), 1),
    "AsymmetricAttention": (functools.partial(blocks.AsymmetricAttention, WIDE, WIDE, 4, 4, WIDE, (1, 3)), 2),
    "APNB": (functools.partial(blocks.APNB, WIDE, WIDE, 4, 4, 0.0, pool_sizes=(1, 3)), 1),
    "CompactChannelAttention": (blocks.CompactChannelAttention, 2),
    "ChannelAttentionBlock": (functools.partial(blocks.ChannelAttentionBlock, 2 * WIDE, WIDE), 2),
    "RefinementResidualBlock": (functools.partial(blocks.RefinementResidualBlock, WIDE, 3), 1),
}


def block_check(make: Callable[..., nn.Module], count: int, run: Run) -> None:
    model = attended(make()).double()
    twin = make(mesh=run.mesh).double()
    twin.load_state_dict(model.state_dict())
    assert list(twin.state_dict()) == list(model.state_dict())
    copied = copy.deepcopy(twin)
    assert copied.mesh is run.mesh and twin.mesh is run.mesh and model.mesh is None
    shape = " x ".join(str(n) for n in run.mesh.shape)
    assert f"mesh={shape}" in repr(twin) and "mesh" not in repr(model)
    compare(run, model, [images(WIDE), images(WIDE) * 0.1][:count], twin=copied)


for _name, (_make, _count) in BLOCKS.items():
    CHECKS[f"{_name} with mesh"] = functools.partial(block_check, _make, _count)


def raises(error: type[Exception], message: str, function: Callable, *arguments: Any, **options: Any) -> None:
    try:
        function(*arguments, **options)
    except error as raised:
        assert re.search(message, str(raised)), f"{raised} is not {message}"
    else:
        raise AssertionError(f"no {error.__name__}: {message}")


def blocks_that_refuse(run: Run) -> None:
    mesh = run.mesh
    raises(TypeError, "PositionAttention: mesh must be a .*DeviceMesh .got int", blocks.PositionAttention, 8, mesh=2)
    raises(NotImplementedError, "NonLocal1d: 1 spatial", blocks.NonLocal1d, 8, mesh=mesh)
    raises(NotImplementedError, "NonLocal3d: 3 spatial", blocks.NonLocal3d, 8, mesh=mesh)
    raises(NotImplementedError, "the mode concat", blocks.NonLocal2d, 8, mode="concatenation", mesh=mesh)
    raises(NotImplementedError, "DAModule: the linear layer", blocks.DAModule, 8, H=7, W=7, mesh=mesh)
    block = blocks.PositionAttention(WIDE, mesh=mesh)
    block.key_conv = nn.Conv2d(WIDE, 1, 3, padding=1)
    raises(NotImplementedError, "PositionAttention: the projections must be 1 x 1", block, run.part(images(WIDE)))


CHECKS["blocks that refuse a mesh"] = blocks_that_refuse


def block_within_a_model(run: Run) -> None:
    """Blocks with mesh in a spatially parallel model."""
    make = {"norm_layer": None}
    plain = nn.Sequential(nn.Conv2d(C, WIDE, 3, 2, 1), blocks.PositionAttention(WIDE), blocks.NonLocal2d(WIDE, **make))
    twin = nn.Sequential(
        nn.Conv2d(C, WIDE, 3, 2, 1),
        blocks.PositionAttention(WIDE, mesh=run.mesh),
        blocks.NonLocal2d(WIDE, mesh=run.mesh, **make),
    )
    twin.load_state_dict(attended(plain).state_dict())
    compare(run, plain, [images()], twin=spatially_parallel(twin.double(), run.mesh))


CHECKS["blocks with mesh within a model"] = block_within_a_model


def converted(run: Run) -> None:
    """Blocks of other packages, whose N x N maps are refused."""
    peers = [p(WIDE) for p in (peer_blocks.PAM_Module, peer_blocks.CAM_Module, peer_blocks.CrissCrossAttention)]
    model = attended(nn.Sequential(nn.Conv2d(C, WIDE, 3, 2, 1), *peers)).double()
    other = spatially_parallel(copy.deepcopy(model), run.mesh)
    raises(NotImplementedError, r"1 .PAM_Module. calls .* sharded", other, run.part(images()))
    assert len(segattn_ops.convert(model).converted) == 3
    compare(run, model, [images()])


CHECKS["converted"] = converted

# Networks


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class Backbone(nn.Module):
    """A small ResNet: strides 4, 4, 8 and 8."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDE, 7, 2, 3), nn.BatchNorm2d(WIDE), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = Residual(WIDE, WIDE, 1, 1)
        self.layer2 = Residual(WIDE, WIDE, 1, 2)
        self.layer3 = Residual(WIDE, WIDE, 2, 1)
        self.layer4 = Residual(WIDE, 2 * WIDE, 1, 2)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(self.stem(x))
        maps = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            layer = getattr(self, name)
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            maps[name] = x
        return maps


def danet(**options: Any) -> nn.Module:
    head = models.heads.DANetHead(2 * WIDE, 3, WIDE, 2, dropout=0.0)
    aux = models.heads.FCNHead(WIDE, 3, 4, dropout=0.0)
    return attended(models.DANet(Backbone(**options), head, aux))


def ccnet() -> nn.Module:
    return attended(models.CCNet(Backbone(), models.heads.CCNetHead(2 * WIDE, 3, WIDE, dropout=0.0), None, True))


def ann() -> nn.Module:
    head = models.heads.ANNHead(WIDE, 2 * WIDE, 3, WIDE, pool_sizes=(1, 2), dropout=0.0)
    return attended(models.ANN(Backbone(), head))


def nonlocal_net() -> nn.Module:
    return attended(models.NonLocalNet(Backbone(), models.heads.NonLocalHead(2 * WIDE, 3, WIDE, dropout=0.0)))


def dfn() -> nn.Module:
    return models.DFN(Backbone(), models.dfn.DFNHead((WIDE, WIDE, WIDE, 2 * WIDE), 3))


def deeplab() -> nn.Module:
    """A head of torchvision, whose dilated convolutions reach further than parts."""
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(4, 3, (2, 4))
    head[0].project[3].p = 0.0
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), head)


def scene() -> list[Tensor]:
    """Parts of the size of images(), 7 times as high."""
    return [images(3, 7 * HEIGHT, 3 * WIDTH)]


def network_check(make: Callable[[], nn.Module], training: bool, run: Run) -> None:
    torch.manual_seed(0)
    compare(Run(run.mesh, wide(run.layout)), make().train(training), scene())


for _make in (danet, ccnet, ann, nonlocal_net, dfn, deeplab):
    CHECKS[f"{_make.__name__}, training"] = functools.partial(network_check, _make, True)
    CHECKS[f"{_make.__name__}, evaluated"] = functools.partial(network_check, _make, False)
CHECKS["activation checkpointing"] = functools.partial(network_check, functools.partial(danet, checkpointed=True), True)


# With PyTorch's other ways of being parallel


def wide(layout: Layout) -> Layout:
    """That of scene(), in which the ranks have 7 times as many rows and 3 times as many columns."""
    return layout._replace(heights=tuple(7 * h for h in layout.heights), widths=tuple(3 * w for w in layout.widths))


def target_of(image: Tensor) -> Tensor:
    return (image[:, 0] * 10).long() % 3


def loss_of(outputs: dict[str, Tensor], target: Tensor, count: int) -> Tensor:
    """The sum over these positions, over the number of all."""
    return sum(F.cross_entropy(o, target, reduction="sum") for o in outputs.values()) / count


def trained(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The gradients of one process."""
    loss_of(model(image), target_of(image), image[:, 0].numel()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    scale = max(1.0, *(g.abs().max().item() for g in expected.values()))
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        close(name, gradient, expected[name.removeprefix("module.")], scale)


def data_and_space(run: Run) -> None:
    """DistributedDataParallel over samples and rows averages over all ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "height"))
    space = Run(mesh["height"], Layout("", (42, 35), (3 * WIDTH,)))
    model, (image,) = danet().double(), scene()
    one = image[mesh.get_local_rank("data"), None]
    expected = [trained(copy.deepcopy(model), image[i, None]) for i in range(2)]
    parallel = DistributedDataParallel(spatially_parallel(copy.deepcopy(model), space.mesh))
    outputs = parallel(space.part(one))
    loss = loss_of(outputs, space.part(target_of(one)[:, None])[:, 0], one[:, 0].numel()) * space.mesh.size()
    loss.backward()
    same_gradients(parallel, {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]})


def sharded_parameters(before: bool, run: Run) -> None:
    """FSDP2 averages as well. before: applied before spatially_parallel."""
    model, (image,) = danet().double(), scene()
    expected = trained(copy.deepcopy(model), image)
    over = init_device_mesh("cpu", (run.mesh.size(),))
    if not before:
        spatially_parallel(model, run.mesh)
    for module in (model.backbone.layer1, model.backbone.layer4, model.classifier, model):
        fully_shard(module, mesh=over)
    if before:
        spatially_parallel(model, run.mesh)
    parts = Run(run.mesh, wide(run.layout))
    outputs = model(parts.part(image))
    loss = loss_of(outputs, parts.part(target_of(image)[:, None])[:, 0], image[:, 0].numel()) * over.size()
    loss.backward()
    same_gradients(model, expected)


def saved_and_loaded(run: Run) -> None:
    """A checkpoint of 4 ranks, loaded on 2 and on 1."""
    torch.manual_seed(dist.get_rank())
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    torch.manual_seed(0)
    model, (image,) = danet().double().eval(), scene()
    expected = model(image)["out"]
    saved = spatially_parallel(copy.deepcopy(model), run.mesh)
    fully_shard(saved, mesh=init_device_mesh("cpu", (4,)))
    checkpoints.save(get_model_state_dict(saved), checkpoint_id=folder[0])
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "height"))
    pair = pairs["height"]
    torch.manual_seed(1)
    loaded = spatially_parallel(danet().double().eval(), pair)
    fully_shard(loaded, mesh=pair)
    state = get_model_state_dict(loaded)
    checkpoints.load(state, checkpoint_id=folder[0], process_group=pair.get_group())
    set_model_state_dict(loaded, state)
    parts = Run(pair, Layout("", (30, 47), (3 * WIDTH,)))
    close("on 2 ranks", loaded(parts.part(image))["out"], parts.part(expected))
    alone = danet().double().eval()
    state = alone.state_dict()
    checkpoints.load(state, checkpoint_id=folder[0], no_dist=True)
    alone.load_state_dict(state)
    close("on 1 rank", alone(image)["out"], expected)


CHECKS["FSDP2 before"] = functools.partial(sharded_parameters, True)
CHECKS["FSDP2 after"] = functools.partial(sharded_parameters, False)
ON_FOUR = {"DistributedDataParallel over data and space": data_and_space, "distributed checkpoint": saved_and_loaded}
CHECKS.update(ON_FOUR)

# What is refused, and other arguments


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones(1, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.expand(2, C, HEIGHT, WIDTH)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "Flatten": lambda x: nn.Flatten()(x),
    "Linear over columns": lambda x: nn.Linear(WIDTH, 3).double()(x),
    "LayerNorm over positions": lambda x: nn.LayerNorm((HEIGHT, WIDTH)).double()(x),
    "Unfold": lambda x: F.unfold(x, 3),
    "Conv3d": lambda x: nn.Conv3d(1, 1, 1).double()(x[:, None]),
    "Conv2d of an unbatched map": lambda x: nn.Conv2d(C, 1, 1).double()(x[0]),
    "MultiheadAttention": lambda x: nn.MultiheadAttention(C, 1).double()(*[x.flatten(2).permute(2, 0, 1)] * 3)[0],
    "matmul": lambda x: x.flatten(2) @ x.flatten(2).mT,
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "softmax over positions": lambda x: x.flatten(2).softmax(-1),
    "softmax over rows": lambda x: F.softmax(x, dim=2),
    "softmin over rows": lambda x: F.softmin(x, 2),
    "softmax of an implied dim": lambda x: F.softmax(x),
    "glu": lambda x: F.glu(x),
    "squeeze": lambda x: x.squeeze(),
    "cat of rows": lambda x: torch.cat([x, x], 2),
    "crop": lambda x: x[:, :, 1:],
    "one row": lambda x: x[..., 0, :],
    "mask": lambda x: x[x > 0],
    "assignment": lambda x: x.clone().__setitem__((0, 0, 0, 0), 1.0),
    "flip": lambda x: torch.flip(x, (2,)),
    "roll": lambda x: x.roll(1, 2),
    "cumsum over rows": lambda x: x.cumsum(2),
    "sort": lambda x: x.sort(1),
    "nonzero": lambda x: torch.where(x > 0),
    "item": lambda x: x.sum(1).max().item(),
    "var": lambda x: x.var((2, 3)),
    "argmax of all": lambda x: x.argmax(),
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, dtype=x.dtype)),
    "bicubic": lambda x: F.interpolate(x, (20, 20), mode="bicubic"),
    "antialias": lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "instance_norm with running statistics": lambda x: nn.InstanceNorm2d(C, track_running_stats=True).double()(x),
    "in place of a whole": lambda x: torch.zeros(2, C, HEIGHT, WIDTH, dtype=x.dtype).add_(x),
    "in place of a mean": lambda x: x.mean((2, 3), keepdim=True).expand(2, C, HEIGHT + 1, WIDTH).clone().add_(x),
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "a map of another size": lambda x: x + torch.zeros(HEIGHT + 1, WIDTH),
    "reshape to pixels": lambda x: x.reshape(-1, C),
    "numpy": lambda x: x.detach().numpy(),
    "Function": lambda x: Doubled.apply(x) + 1,
    "Function to a whole": lambda x: Summed.apply(x).sum().backward(),
    "reentrant checkpoint": lambda x: checkpoint(nn.Conv2d(C, 1, 1).double(), x, use_reentrant=True).exp(),
    "LPPool2d": lambda x: nn.LPPool2d(2, 3)(x).sum().item(),
    "concatenation": lambda x: blocks.NonLocal2d(C, mode="concatenation").double()(x),
    "criss_cross_attention_map": lambda x: segattn_ops.criss_cross_affinity(x, x),
    "position_attention_map": lambda x: segattn_ops.position_attention_map(x, x, torch.zeros(1, 2).long()),
    "channel_attention of parts and a whole": lambda x: segattn_ops.channel_attention(
        x, torch.ones(2, C, HEIGHT, WIDTH, dtype=x.dtype), x
    ),
}  # fmt: skip


def refused(name: str, run: Run) -> None:
    """The error names the module that calls the function."""
    model = nn.Sequential()
    model.inner = Calls(REFUSED[name])
    spatially_parallel(model, run.mesh)
    message = r"(inner.*? \(\w+\) calls .* sharded over the ranks|autograd.Function)"
    raises(NotImplementedError, message, model, run.part(images()).requires_grad_())


for _name in REFUSED:
    CHECKS[f"refused: {_name}"] = functools.partial(refused, _name)


def arguments(run: Run) -> None:
    model = nn.Conv2d(C, 1, 3)
    raises(TypeError, "model must be a module .got int", spatially_parallel, 3, run.mesh)
    raises(TypeError, "mesh must be a .*DeviceMesh .got list", spatially_parallel, model, [0, 1])
    raises(NotImplementedError, "0.1 is a SyncBatchNorm", spatially_parallel,
           nn.Sequential(nn.Sequential(nn.Identity(), nn.SyncBatchNorm(3))), run.mesh)  # fmt: skip
    spatially_parallel(spatially_parallel(model.double(), run.mesh), run.mesh)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    raises(RuntimeError, r"must be called with a tensor .B, C, H, W", model, torch.ones(3))
    raises(RuntimeError, r"kernel must not be larger .*2, 4, 2, 9", model, torch.ones(
        2, C, 2 * (run.mesh.get_coordinate()[0] == 0), 9 if len(run.layout.widths) == 1 else 9 * (
            run.mesh.get_coordinate()[1] == 0), dtype=torch.float64))  # fmt: skip
    part = run.part(images())
    if dist.get_rank() == 1:
        model.eval()
    raises(RuntimeError, "calls of the ranks must be of the same op and options.*training", model, part)
    model.train()
    wrong = part[:, :3] if dist.get_rank() == 1 else part
    raises(RuntimeError, "of the same dtypes, batch and channels", model, wrong)
    if len(run.layout.widths) == 1:
        raises(RuntimeError, "must have a part of", model, part[..., : 8 + (dist.get_rank() == 0)])


CHECKS["arguments"] = arguments


def compiled(run: Run) -> None:
    """A model is refused, also if a part of it is compiled; a block with mesh is not."""
    message = "torch.compile cannot compile a spatially parallel model"
    layer, part = nn.Conv2d(C, C, 3, padding=1).double(), run.part(images())
    model = spatially_parallel(nn.Sequential(layer), run.mesh)
    raises(RuntimeError, message, torch.compile(model, backend="eager"), part)
    raises(RuntimeError, message, spatially_parallel(torch.compile(layer, backend="eager"), run.mesh), part)
    block = attended(blocks.ChannelAttention(scale=-0.1, mesh=run.mesh)).double()
    got = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)(part)
    close("compiled", got, block(part))


CHECKS["compiled"] = compiled
ON_TWO = {"compiled", "gate of one column"}  # the width is whole


def dropped(run: Run) -> None:
    """Dropout2d drops whole maps, and what is the same on each rank stays so."""
    model = Calls(lambda x: (F.dropout2d(torch.ones_like(x), 0.5), F.dropout(x.mean((2, 3)), 0.5),
                             x.new_ones(2, 1, 1, 1).bernoulli_(0.5) * torch.ones_like(x)))  # fmt: skip
    spatially_parallel(model, run.mesh)
    torch.manual_seed(dist.get_rank())
    channels, means, samples = model(run.part(images()))
    everyone: list[Any] = [None] * run.mesh.size()
    dist.all_gather_object(everyone, means)
    assert all(torch.equal(m, means) for m in everyone) and 0 in means
    for one in (channels, samples[:, :1]):
        dist.all_gather_object(everyone, one.flatten(2))
        joined = torch.cat(everyone, 2)
        assert joined.shape[2] == HEIGHT * WIDTH and torch.equal(joined, joined[..., :1].expand_as(joined))


CHECKS["dropout"] = dropped


def dtypes(run: Run) -> None:
    """Results have the dtypes of one process, and are close to those of float64."""
    torch.manual_seed(0)
    model, (image,) = danet().double(), scene()
    expected = copy.deepcopy(model)(image)["out"]
    parts = Run(run.mesh, wide(run.layout))
    for dtype, autocast, tolerance in (
        (torch.float32, False, 1e-4),
        (torch.bfloat16, False, 0.3),
        (torch.float32, True, 0.3),
    ):
        twin = spatially_parallel(copy.deepcopy(model).to(dtype), run.mesh)
        plain = copy.deepcopy(model).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, one = twin(parts.part(image.to(dtype)))["out"], plain(image.to(dtype))["out"]
        assert got.dtype == one.dtype
        error = (got.double() - parts.part(expected)).abs().amax().item() if got.numel() else 0
        assert error < tolerance * expected.abs().max(), f"{dtype}: off by {error}"
        got.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.classifier.conv8.parameters())


CHECKS["dtypes"] = dtypes


calls("names of arguments", lambda x: torch.cat([
    F.normalize(x), x.sum(axis=1, keepdim=True), x.mean(axis=1, keepdim=True), *x.chunk(chunks=2, dim=1),
    *x.split(split_size=3, dim=1), *torch.split(x, split_size_or_sections=[1, 3], dim=1)], 1))  # fmt: skip
calls("amax of ties", lambda x: (x.amax((2, 3), keepdim=True), x.amax((1, 2, 3))),
      inputs=lambda: [images().clamp(-1, 1)], whole=[0, 1])  # fmt: skip


def nearest(run: Run) -> None:
    """The index is computed in float32 for float32, and rounds to another one than that in float64."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        image = images().to(dtype)
        for size in ((22, 222), (5, 237)):
            for mode in ("nearest", "nearest-exact"):
                layer = nn.Upsample(size, mode=mode)
                got = spatially_parallel(copy.deepcopy(layer), run.mesh)(run.part(image))
                close(f"{mode} {dtype}", got, run.cut(layer(image), *run.parts_of(got)))


CHECKS["nearest"] = nearest


def gradients_of_other_parameters(run: Run) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)).double()
    model[1 if dist.get_rank() == 0 else 0](images()).sum().backward()
    raises(RuntimeError, "count and checksum", reduce_gradients, model, run.mesh)


CHECKS["gradients of other parameters"] = gradients_of_other_parameters


def after_the_call(run: Run) -> None:
    """A feature map that a hook keeps."""
    twin = spatially_parallel(nn.Sequential(nn.Conv2d(C, C, 3), nn.ReLU()).double(), run.mesh)
    kept: list[Tensor] = []
    twin[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    parts = Run(run.mesh, wide(run.layout)).part(scene()[0][:, :1].expand(-1, C, -1, -1))
    twin(parts).sum().backward()
    raises(RuntimeError, "square is called on a feature map of a model that has returned", lambda: kept[0].square())
    kept[0].detach().square().mean()
    with torch.no_grad():
        kept[0].square().mean()


CHECKS["a map after the call"] = after_the_call


def scaled_gradient(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x)
    y.register_hook(lambda gradient: gradient * 3 + gradient.mean())
    return y * 2


calls("hook of a map", scaled_gradient, lambda: nn.Conv2d(C, C, 3, padding=1))


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean((0, 2, 3), keepdim=True) * 0.1
        return x - self.mean


def assigned_buffer(run: Run) -> None:
    compare(run, RunningMean(), [images()], twin=(twin := spatially_parallel(RunningMean().double(), run.mesh)))
    assert type(twin.mean) is Tensor


CHECKS["a buffer that is assigned"] = assigned_buffer


def autocast_on_one_rank(run: Run) -> None:
    twin = spatially_parallel(nn.Conv2d(C, C, 3), run.mesh)
    part = run.part(images().float())
    with torch.autocast("cpu", torch.bfloat16, enabled=dist.get_rank() == 0):
        raises(RuntimeError, "autocast", twin, part)


CHECKS["autocast on one rank"] = autocast_on_one_rank


def the_same_bits(run: Run) -> None:
    model, (image,) = danet().double(), scene()
    parts = Run(run.mesh, wide(run.layout))
    found = []
    for _ in range(2):
        twin = spatially_parallel(copy.deepcopy(model), run.mesh)
        x = parts.part(image).requires_grad_()
        outputs = twin(x)
        sum(o.square().sum() for o in outputs.values()).backward()
        reduce_gradients(twin, run.mesh)
        found.append([x.grad, *outputs.values(), *(p.grad for p in twin.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CHECKS["the same bits"] = the_same_bits


# Checks that run on some layouts only: of whole models, and those that communicate little.
ON_ONE_LAYOUT = {name for name in CHECKS if name.startswith("refused") or name in (
    "activation checkpointing", "FSDP2 before", "FSDP2 after", "dropout", "dtypes", "the same bits", "arguments",
    "converted", "blocks that refuse a mesh") or name.endswith((", training", ", evaluated"))}  # fmt: skip


def runs(name: str, layout: Layout) -> bool:
    ranks = next(ranks for ranks, layouts in LAYOUTS.items() if layout in layouts)
    if name in ON_FOUR or name in ON_TWO:
        return layout is LAYOUTS[4 if name in ON_FOUR else 2][0]
    return name not in ON_ONE_LAYOUT or layout is LAYOUTS[ranks][0]


NAMES = [f"{name} [{layout.name}]" for layouts in LAYOUTS.values() for layout in layouts for name in CHECKS
         if runs(name, layout)]  # fmt: skip


def _run(folder: str, names: Sequence[str]) -> dict[str, str | None]:
    """On a rank. After an error the ranks may be out of step: they make the process groups again."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.FileStore(f"{folder}/errors", ranks)
    errors: dict[str, str | None] = {}
    for layout in LAYOUTS[ranks]:
        run: Run | None = None
        for name in names:
            if not runs(name, layout):
                continue
            if run is None:
                dims = ("height", "width")[: len(layout.mesh_shape)]
                run = Run(init_device_mesh("cpu", layout.mesh_shape, mesh_dim_names=dims), layout)
            torch.manual_seed(0)
            key = f"{name} [{layout.name}]"
            try:
                CHECKS[name](run)
                error = ""
            except Exception:
                error = traceback.format_exc()
            store.set(f"{key} {rank}", error)
            found = [store.get(f"{key} {other}").decode() for other in range(ranks)]
            errors[key] = next((e for e in found if e and "communication failed" not in e), None) or max(found) or None
            if errors[key]:
                dist.destroy_process_group()
                rendezvous = f"file://{folder}/rendezvous {len(errors)} {ranks}"
                timeout = timedelta(seconds=TIMEOUT)
                dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout)
                run = None
    return errors


def main(names: Sequence[str]) -> None:
    errors: dict[str, str | None] = {}
    for ranks in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            errors.update(fork(ranks, _run, (folder, names or list(CHECKS)), TIMEOUT)[0])
    print(json.dumps(errors))


if __name__ == "__main__":
    main([name for name in CHECKS if any(word in name for word in sys.argv[1:])])
