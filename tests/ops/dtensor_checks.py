"""Checks of DTensor on four processes: ``python -m tests.ops.dtensor_checks`` prints a JSON object, the name of each
check -> its error or null. tests/ops/test_dtensor.py runs it.

A fresh process imports torch once and forks: four imports would take longer than all checks, and a process whose
parent ran a backward pass cannot run one.
"""

import copy
import functools
import json
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import segattn_ops
from segattn_ops import nn

RANKS = 4
R, P = Replicate(), Partial()
B, S2, S3, C = Shard(0), Shard(2), Shard(3), Shard(1)

CHECKS: dict[str, Callable[[DeviceMesh], None]] = {}


def compare(
    mesh: DeviceMesh,
    function: Callable,
    tensors: Sequence[Tensor],
    placements: Sequence[Placement | tuple[Placement, ...]],
    *,
    output: Placement | tuple[Placement, ...],
    gradients: Sequence[Placement | tuple[Placement, ...]] | None = None,
    communicates: bool | None = False,
    tolerance: float = 1e-12,
    without_gradient: Sequence[int] = (),
) -> None:
    """Results, gradients and placements of a call with DTensors against the call with plain tensors.

    communicates: whether the call does, before the backward pass. None: not looked at, since the hooks of
    CommDebugMode fail in torch 2.11 on a module that calls others in a loop."""

    def along(placement: Placement | tuple[Placement, ...]) -> tuple[Placement, ...]:
        return placement if isinstance(placement, tuple) else (placement,) * mesh.ndim

    def requires_gradient(i: int) -> bool:
        return tensors[i].is_floating_point() and i not in without_gradient

    plain = [t.detach().clone().requires_grad_(requires_gradient(i)) for i, t in enumerate(tensors)]
    sharded = [
        distribute_tensor(t.detach(), mesh, along(p)).requires_grad_(requires_gradient(i))
        for i, (t, p) in enumerate(zip(tensors, placements, strict=True))
    ]
    expected = function(*plain)
    counter = CommDebugMode()
    with nullcontext() if communicates is None else counter:
        got = function(*sharded)
    expected, got = [list(r) if isinstance(r, tuple) else [r] for r in (expected, got)]
    incoming = [torch.randn_like(t) for t in expected]
    torch.autograd.backward(expected, incoming)
    arriving = [
        distribute_tensor(g, mesh, [R if p.is_partial() else p for p in t.placements])
        for g, t in zip(incoming, got, strict=True)
    ]
    torch.autograd.backward(got, arriving)

    assert got[0].placements == along(output), f"output: {got[0].placements}"
    if communicates is not None:
        assert bool(counter.get_total_counts()) == communicates, f"communication: {dict(counter.get_comm_counts())}"
    results = [*zip(got, expected, strict=True)]
    wanted = [(d.grad, t.grad) for d, t in zip(sharded, plain, strict=True) if t.grad is not None]
    assert len(wanted) == sum(d.grad is not None for d in sharded)
    for i, (d, t) in enumerate([*results, *wanted]):
        error = (d.full_tensor() - t).abs().max().item()
        assert error <= tolerance * max(t.abs().max().item(), 1), f"tensor {i}: off by {error}"
    if gradients is not None:
        found = [d.placements for d, _ in wanted]
        assert found == [along(p) for p in gradients], f"gradients: {found}"


def check(name: str, *arguments: object, **options: object) -> None:
    CHECKS[name] = functools.partial(_compare, arguments, options)


def _compare(arguments: Sequence, options: dict, mesh: DeviceMesh) -> None:
    compare(mesh, *arguments, **options)


def maps(*channels: int, batch: int = 4, spatial: Sequence[int] = (4, 6), dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(sum(channels))
    return [torch.randn(batch, c, *spatial, generator=generator, dtype=torch.float64).to(dtype) for c in channels]


QKV = maps(8, 8, 16)


def position(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: object) -> object:
    return segattn_ops.position_attention(q, k, v, 0.5, key_padding_mask=mask, **options)


def criss_cross(q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
    return segattn_ops.criss_cross_attention(q, k, v, 0.5, **options)


def channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return segattn_ops.channel_attention(q, k, v, 0.1)


with_logsumexp = functools.partial(position, return_logsumexp=True)
with_heads = functools.partial(position, num_heads=4, return_logsumexp=True)

check("position, batch", with_logsumexp, QKV, [B, B, B], output=B, gradients=[B, B, B])
check("position, rows of queries", with_logsumexp, QKV, [S2, R, R], output=S2, gradients=[S2, P, P])
check("position, columns of queries", with_logsumexp, QKV, [S3, R, R], output=S3, gradients=[S3, P, P])
check("position, value channels", with_logsumexp, QKV, [R, R, C], output=C, gradients=[P, P, C])
check("position, replicated", with_logsumexp, QKV, [R, R, R], output=R, gradients=[R, R, R])
check("position, batch of the query alone", with_logsumexp, QKV, [B, R, R], output=B)
check("position, all spatial", with_logsumexp, QKV, [S2, S2, S2], output=S2, communicates=True)
check("position, all channels", with_logsumexp, QKV, [C, C, C], output=C, communicates=True)
check("position, keys", with_logsumexp, QKV, [R, S2, S2], output=R, communicates=True)
check("position without a gradient of the key", position, QKV, [S2, R, R], output=S2, without_gradient=[1])
check("position without a gradient of the query", position, QKV, [S2, R, R], output=S2, without_gradient=[0])
check("position, gradient of the value alone", position, QKV, [R, R, C], output=C, without_gradient=[0, 1])
check("position, all spatial, another scale", lambda *t: segattn_ops.position_attention(*t, 0.125), QKV, [S2, S2, S2],
      output=S2, communicates=True)  # fmt: skip


def with_partial_query(q: Tensor, k: Tensor, v: Tensor) -> object:
    if isinstance(q, DTensor):
        q = DTensor.from_local(q.to_local() / RANKS, q.device_mesh, [P])
    return position(q, k, v)


check("position, partial query", with_partial_query, QKV, [R, R, R], output=B, communicates=True, without_gradient=[0])
check("position, heads, batch", with_heads, QKV, [B, B, B], output=B, gradients=[B, B, B])
check("position, heads, queries", with_heads, QKV, [S2, R, R], output=S2, gradients=[S2, P, P])
check("criss-cross, heads, batch", functools.partial(criss_cross, num_heads=4), QKV, [B, B, B], output=B)

MASK = torch.rand(4, 4, 6, generator=torch.Generator().manual_seed(3)) > 0.6
check("position, mask, batch", position, [*QKV, MASK], [B, B, B, B], output=B)
check("position, mask, replicated mask", position, [*QKV, MASK], [B, B, B, R], output=B)
check("position, mask sharded elsewhere", position, [*QKV, MASK], [B, B, B, Shard(1)], output=B, communicates=True)
check("position, mask, queries", position, [*QKV, MASK], [S2, R, R, R], output=S2)
check("position, mask, value channels", position, [*QKV, MASK], [R, R, C, R], output=C)
check("position, mask, heads", functools.partial(position, num_heads=2), [*QKV, MASK], [B, B, B, B], output=B)

UNEVEN = [*maps(5, batch=5, spatial=(5, 7)), *maps(5, 5, batch=5, spatial=(3,))]
check("position, 5 samples on 4 ranks", position, UNEVEN, [B, B, B], output=B)
check("position, 5 rows on 4 ranks", position, UNEVEN, [S2, R, R], output=S2)
check("position, 7 columns on 4 ranks", position, UNEVEN, [S3, R, R], output=S3)
check("position, 5 channels on 4 ranks", position, UNEVEN, [R, R, C], output=R, communicates=True)

BF16 = maps(8, 8, 16, dtype=torch.bfloat16)
SINGLE = maps(8, 8, 16, dtype=torch.float32)
check("bfloat16, batch", position, BF16, [B, B, B], output=B, tolerance=0)
check("bfloat16, queries", position, BF16, [S2, R, R], output=S2, tolerance=2**-6)
check("bfloat16, value channels", position, BF16, [R, R, C], output=C, tolerance=2**-6)


def under_autocast(*tensors: Tensor) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return position(*tensors)


check("autocast, batch", under_autocast, SINGLE, [B, B, B], output=B, tolerance=0)
check("autocast, queries", under_autocast, SINGLE, [S2, R, R], output=S2, tolerance=2**-6)

cc_logsumexp = functools.partial(criss_cross, return_logsumexp=True)
check("criss-cross, batch", cc_logsumexp, QKV, [B, B, B], output=B, gradients=[B, B, B])
check("criss-cross, value channels", cc_logsumexp, QKV, [R, R, C], output=C, gradients=[P, P, C])
check("criss-cross, rows", cc_logsumexp, QKV, [S2, S2, S2], output=R, communicates=True)
affinity, aggregation = segattn_ops.criss_cross_affinity, segattn_ops.criss_cross_aggregation
check("affinity, batch", affinity, QKV[:2], [B, B], output=B, gradients=[B, B])
check("affinity, channels", affinity, QKV[:2], [C, C], output=P, gradients=[C, C])
check("affinity, rows", affinity, QKV[:2], [S2, S2], output=R, communicates=True)
WEIGHTS = maps(9)[0]
check("aggregation, batch", aggregation, [WEIGHTS, QKV[2]], [B, B], output=B, gradients=[B, B])
check("aggregation, channels", aggregation, [WEIGHTS, QKV[2]], [R, C], output=C, gradients=[P, C])

CHANNELS = maps(12, 8, 8)
check("channel, batch", channel, CHANNELS, [B, B, B], output=B, gradients=[B, B, B])
check("channel, channels of the query", channel, CHANNELS, [C, R, R], output=C, gradients=[C, P, P])
check("channel, rows of the value", channel, CHANNELS, [R, R, S2], output=S2, gradients=[P, P, S2])
check("channel, columns of the value", channel, CHANNELS, [R, R, S3], output=S3, gradients=[P, P, S3])
check("channel, contracted positions", channel, CHANNELS, [S2, S2, R], output=R, communicates=True)
check("self, batch", lambda x: channel(x, x, x), maps(8), [B], output=B, gradients=[B])
check("self, channels", lambda x: channel(x, x, x), maps(8), [C], output=R, communicates=True)
residual = functools.partial(segattn_ops.residual_channel_attention, scale=0.1)
GAMMA = torch.tensor([0.7], dtype=torch.float64)
check("residual, batch", residual, [*maps(8), GAMMA], [B, R], output=B, gradients=[B, P])
check("residual, number", lambda x: residual(x, 0.7), maps(8), [B], output=B, gradients=[B])
check("residual, rows", residual, [*maps(8), GAMMA], [S2, R], output=R, communicates=True)


def by_reference(*tensors: Tensor) -> object:
    with segattn_ops.use_backend("reference"):
        return position(*tensors)


check("reference, batch", by_reference, QKV, [B, B, B], output=B)


@functools.cache
def documented() -> dict[str, Callable]:
    """The functions of the examples in docs/distributed.md. tests/distributed runs the scripts."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    names: dict[str, Callable] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not block.startswith('"""torchrun'):
            exec(block, names)
    return names


def heads_on_ranks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads on each rank."""
    if not isinstance(q, DTensor):
        return segattn_ops.position_attention(q, k, v, num_heads=2 * RANKS)
    return documented()["attention_with_heads_on_ranks"](q, k, v, 2)


check("heads on the ranks", heads_on_ranks, QKV, [C, C, C], output=C, gradients=[C, C, C])


def example_of_samples(mesh: DeviceMesh) -> None:
    output = documented()["samples_on_each_rank"](torch.randn(4, 64, 5, 6), mesh)
    assert output.placements == (B,) and output.shape == (4, 64, 5, 6)


CHECKS["the documented example of samples"] = example_of_samples


@functools.cache
def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2))


def on_two_dimensions(name: str, *arguments: object, **options: object) -> None:
    CHECKS[f"2 x 2: {name}"] = lambda mesh: compare(two_by_two(), *arguments, **options)


on_two_dimensions("batch and queries", with_logsumexp, QKV, [(B, S2), (B, R), (B, R)], output=(B, S2),
                  gradients=[(B, S2), (B, P), (B, P)])  # fmt: skip
on_two_dimensions("queries and channels", with_logsumexp, QKV, [(S2, R), (R, R), (R, C)], output=(S2, C),
                  gradients=[(S2, P), (P, P), (P, C)])  # fmt: skip
on_two_dimensions("rows and columns of queries", position, QKV, [(S2, S3), R, R], output=(S2, S3))
on_two_dimensions("batch twice", criss_cross, QKV, [B, B, B], output=B)
on_two_dimensions("5 channels twice", position, UNEVEN, [R, R, C], output=C)
on_two_dimensions("batch and value channels", criss_cross, QKV, [(B, R), (B, R), (B, C)], output=(B, C))


def messages_name_the_op(mesh: DeviceMesh) -> None:
    query, key, value = (distribute_tensor(t, mesh, [B]) for t in (QKV[0], QKV[0][:, :4].contiguous(), QKV[2]))
    try:
        position(query, key, value)
    except RuntimeError as error:
        assert "position_attention: key must have 8 channels like query (got 4)" in str(error), str(error)
    else:
        raise AssertionError("no error")


CHECKS["messages name the op"] = messages_name_the_op


def fully_sharded(mesh: DeviceMesh) -> None:
    """FSDP2: the parameters are DTensors, gathered for the forward pass, in which the ops get plain tensors."""
    module = nn.PositionAttention(16).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sharded = fully_shard(copy.deepcopy(module), mesh=mesh)
    (x,) = maps(16)
    module(x).square().mean().backward()
    sharded(x[mesh.get_rank() :][:1]).square().mean().backward()  # FSDP averages the gradients of the ranks
    for (name, expected), got in zip(module.named_parameters(), sharded.parameters(), strict=True):
        error = (got.grad.full_tensor() - expected.grad).abs().max().item()
        assert error <= 1e-12 * max(expected.grad.abs().max().item(), 1), f"{name}: off by {error}"


CHECKS["fully_shard"] = fully_sharded


def plain_tensors_are_refused(mesh: DeviceMesh) -> None:
    query = distribute_tensor(QKV[0], mesh, [B])
    try:
        position(query, QKV[1], QKV[2])
    except RuntimeError as error:
        assert "mixed torch.Tensor and DTensor" in str(error)
    else:
        raise AssertionError("no error")


CHECKS["plain tensors are refused"] = plain_tensors_are_refused

MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "PositionAttention": lambda: nn.PositionAttention(16),
    "CrissCrossAttention": lambda: nn.CrissCrossAttention(16),
    "RecurrentCrissCrossAttention": lambda: nn.RecurrentCrissCrossAttention(16),
    "ChannelAttention": lambda: nn.ChannelAttention(),
    "DAModule": lambda: nn.DAModule(16),
    "NonLocal2d": lambda: nn.NonLocal2d(16, norm_layer=None),
}


def module_check(make: Callable[[], torch.nn.Module], mesh: DeviceMesh) -> None:
    """Replicated parameters and sharded samples: outputs and all gradients."""
    module = make().double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # gamma starts as 0
    distributed = distribute_module(copy.deepcopy(module), mesh)
    (x,) = maps(16)
    compare(mesh, _call_one_of(module, distributed), [x], [B], output=B, gradients=[B], communicates=None)
    for (name, expected), got in zip(module.named_parameters(), distributed.parameters(), strict=True):
        error = (got.grad.full_tensor() - expected.grad).abs().max().item()
        assert error <= 1e-12 * max(expected.grad.abs().max().item(), 1), f"{name}: off by {error}"


def _call_one_of(module: torch.nn.Module, distributed: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (distributed if isinstance(x, DTensor) else module)(x)


for _name, _make in MODULES.items():
    CHECKS[_name] = functools.partial(module_check, _make)


def _run(rank: int, rendezvous: str, results: "multiprocessing.Queue[dict[str, str | None]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    errors: dict[str, str | None] = {}
    for name, run in CHECKS.items():
        torch.manual_seed(0)
        try:
            run(mesh)
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
    gathered: list[dict[str, str | None]] = [{} for _ in range(RANKS)]
    dist.all_gather_object(gathered, errors)
    if rank == 0:
        results.put({name: next((e[name] for e in gathered if e[name]), None) for name in CHECKS})
    dist.destroy_process_group()


def main() -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_run, args=(r, f"{folder}/rendezvous", results)) for r in range(RANKS)]
        for process in ranks:
            process.start()
        json.dump(results.get(timeout=300), sys.stdout)
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
