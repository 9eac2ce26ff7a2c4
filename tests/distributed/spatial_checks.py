"""Checks of spatially parallel models on 2, 3 and 4 processes: ``python -m tests.distributed.spatial_checks`` prints a
JSON object, the name of each check -> its error or null. tests/distributed/test_spatial.py runs it.

A fresh process imports torch once and forks, as tests/ops/dtensor_checks.py does.
"""

import copy
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import segattn_ops
from segattn_ops import nn as blocks
from segattn_ops.distributed import reduce_gradients, spatially_parallel

HEIGHT, WIDTH, CHANNELS = 11, 9, 4
TOLERANCE = 1e-12


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


def compare(run: Run, model: nn.Module, inputs: Sequence[Tensor], whole: Sequence[int] = ()) -> None:
    """Outputs, buffers and gradients of a model on parts against those of one process.

    whole: which outputs are the same on each rank.
    """
    model = model.double()
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


def _run(rank: int, ranks: int, folder: str, names: Sequence[str], results: Any) -> None:
    torch.set_num_threads(1)
    segattn_ops.set_default_backend("reference")
    store = dist.FileStore(f"{folder}/errors", ranks)
    errors: dict[str, str | None] = {}
    groups = 0
    for layout in LAYOUTS[ranks]:
        run: Run | None = None
        for name in names:
            if run is None:
                groups += 1
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/{groups}", rank=rank, world_size=ranks,
                    timeout=timedelta(seconds=10),
                )  # fmt: skip
                dims = ("height", "width")[: len(layout.mesh_shape)]
                run = Run(init_device_mesh("cpu", layout.mesh_shape, mesh_dim_names=dims), layout)
            torch.manual_seed(0)
            key = f"{name} [{layout.name}]"
            start = time.time()
            try:
                CHECKS[name](run)
                error = ""
            except Exception:
                error = traceback.format_exc()
            store.set(f"{key} {rank}", error)
            found = [store.get(f"{key} {other}").decode() for other in range(ranks)]
            errors[key] = next((e for e in found if e and "communication failed" not in e), None) or max(found) or None
            if time.time() - start > 0.5 and rank == 0:
                print(f"{key}: {time.time() - start:.1f} s", file=sys.stderr)
            if errors[key]:  # the ranks are out of step
                dist.destroy_process_group()
                run = None
        if run is not None:
            dist.destroy_process_group()
    if rank == 0:
        results.put(errors)


def main(names: Sequence[str]) -> None:
    context = multiprocessing.get_context("fork")
    errors: dict[str, str | None] = {}
    for ranks in LAYOUTS:
        results = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, folder, names or list(CHECKS), results)
            processes = [context.Process(target=_run, args=(rank, *arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            errors.update(results.get(timeout=200))
            for process in processes:
                process.join()
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main([name for name in CHECKS if any(word in name for word in sys.argv[1:])])
