"""Sharding rules: they fit the schemas, each is exact, and DTensor on processes applies them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import segattn_ops
from segattn_ops import _dtensor
from segattn_ops.ops import OPERATORS

from ..backends import Backend
from . import dtensor_checks

NAMES = [name for operator in OPERATORS for name in (operator.name, f"{operator.name}_backward")]


@pytest.mark.parametrize("name", NAMES)
def test_rules_name_the_tensors_of_the_schema(name: str):
    schema = getattr(torch.ops.segattn, name).default._schema
    rules = _dtensor.RULES[name]
    tensors = [a.name for a in schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
    assert list(rules.inputs) == tensors
    assert len(rules.outputs) == len(schema.returns)
    assert set(rules.summed) <= set(rules.sharded) and rules.added <= set(tensors)


def test_there_are_no_other_rules():
    assert list(_dtensor.RULES) == NAMES


def shards(tensor: Tensor, placement: Placement, ranks: int) -> list[Tensor]:
    if isinstance(placement, Shard):
        return list(tensor.tensor_split(ranks, placement.dim))
    if isinstance(placement, Partial):
        weights = torch.linspace(-0.5, 1, ranks, dtype=torch.float64)
        return [tensor * (w / weights.sum()).item() for w in weights]
    return [tensor] * ranks


def whole(parts: Sequence[Tensor], placement: Placement) -> Tensor:
    if isinstance(placement, Shard):
        return torch.cat(list(parts), placement.dim)
    if isinstance(placement, Partial):
        return torch.stack(list(parts)).sum(0)
    for part in parts:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0)
    return parts[0]


def check_rules(backend: Backend, name: str, tensors: dict[str, Tensor], others: Sequence, tolerance: float) -> int:
    """Every rule of an operator, on three shards one after the other. `others`: needs_input_grad and what follows by
    keyword. Returns the number of rules."""
    operator, keywords = getattr(backend.operators, name), dict(others)
    scale = {} if re.search("affinity|aggregation|energy", name) else {"scale": 0.25}
    needs = keywords.get("needs_input_grad")
    expected = operator(**tensors, **scale, **keywords)
    expected = [expected] if isinstance(expected, Tensor) else expected
    rules = _dtensor.placements(_dtensor.RULES[name], {n: t.dim() for n, t in tensors.items()}, needs)
    for rule in rules:
        results, inputs = rule[: len(expected)], rule[len(expected) :]
        pieces = [shards(t, p, 3) for t, p in zip(tensors.values(), inputs, strict=True)]
        parts = [
            operator(**dict(zip(tensors, piece, strict=True)), **scale, **keywords)
            for piece in zip(*pieces, strict=True)
        ]
        parts = [[part] if isinstance(part, Tensor) else part for part in parts]
        for i, (result, placement) in enumerate(zip(expected, results, strict=True)):
            if needs is None or needs[i]:
                got = whole([part[i] for part in parts], placement)
                limit = tolerance * max(result.abs().max().item(), 1) if result.numel() else 0
                torch.testing.assert_close(got, result, rtol=0, atol=limit)
    return len(rules)


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64).to(device, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
def test_rules_of_position_are_exact(kernels, dtype, tolerance):
    q, k, v = {"query": (3, 5, 4, 6)}, {"key": (3, 5, 7, 2)}, {"value": (3, 6, 7, 2)}
    tensors = drawn({**q, **k, **v}, dtype, kernels.device)
    mask = torch.zeros(3, 7, 2, dtype=torch.bool, device=kernels.device)
    mask[1, 5:] = mask[2, :, 1] = True
    low = dtype == torch.bfloat16
    masked = {**tensors, "key_padding_mask": mask}
    assert check_rules(kernels, "position_attention", masked, {"with_low": low}.items(), tolerance) == 5
    output, logsumexp, *lows = kernels.operators.position_attention(**tensors, scale=0.25, with_low=low)
    gradient = torch.randn(output.shape, dtype=torch.float64).to(kernels.device, dtype)
    saved = {
        "output": output,
        "logsumexp": logsumexp,
        **({"output_low": lows[0]} if low else {"logsumexp_low": lows[1]}),
    }
    saved["grad_logsumexp"] = torch.randn_like(logsumexp)
    arguments = {"grad_output": gradient, **tensors, **saved}
    for keywords in (
        {"keys_complete": True},
        {"keys_complete": False},
        {"needs_input_grad": [True, False, False], "keys_complete": True},
        {"needs_input_grad": [False, True, True], "keys_complete": True},
    ):
        assert check_rules(kernels, "position_attention_backward", arguments, keywords.items(), tolerance) == 5


def test_rules_of_criss_cross_are_exact(kernels):
    dtype = torch.float64
    tensors = drawn({"query": (3, 5, 4, 6), "key": (3, 5, 4, 6), "value": (3, 7, 4, 6)}, dtype, kernels.device)
    assert check_rules(kernels, "criss_cross_attention", tensors, (), 1e-12) == 3
    output, logsumexp, low = kernels.operators.criss_cross_attention(**tensors, scale=0.25)
    saved = {"output": output, "logsumexp": logsumexp, "logsumexp_low": low, "grad_logsumexp": torch.randn_like(low)}
    arguments = {"grad_output": torch.randn_like(output), **tensors, **saved}
    for complete in (True, False):
        keywords = {"keys_complete": complete}
        assert check_rules(kernels, "criss_cross_attention_backward", arguments, keywords.items(), 1e-12) == 3
    value = tensors.pop("value")
    assert check_rules(kernels, "criss_cross_affinity", tensors, (), 1e-12) == 3
    weights = {"attention": torch.randn(3, 9, 4, 6, dtype=dtype, device=kernels.device)}
    affinity = {"grad_affinity": weights["attention"], **tensors}
    assert check_rules(kernels, "criss_cross_affinity_backward", affinity, (), 1e-12) == 3
    assert check_rules(kernels, "criss_cross_aggregation", {**weights, "value": value}, (), 1e-12) == 3
    aggregation = {"grad_output": torch.randn_like(value), **weights, "value": value}
    assert check_rules(kernels, "criss_cross_aggregation_backward", aggregation, (), 1e-12) == 3


def test_rules_of_channel_are_exact(kernels):
    tensors = drawn({"query": (3, 5, 4, 6), "key": (3, 8, 4, 6), "value": (3, 8, 7, 3)}, torch.float64, kernels.device)
    assert check_rules(kernels, "channel_attention", tensors, (), 1e-12) == 5
    gradient = drawn({"grad_output": (3, 5, 7, 3)}, torch.float64, kernels.device)
    assert check_rules(kernels, "channel_attention_backward", {**gradient, **tensors}, (), 1e-12) == 5
    x = drawn({"input": (3, 5, 4, 6), "gamma": (3, 5)}, torch.float64, kernels.device)
    assert check_rules(kernels, "channel_self_attention", x, (), 1e-12) == 2
    gradient = {"grad_output": torch.randn_like(x["input"])}
    assert check_rules(kernels, "channel_self_attention_backward", {**gradient, **x}, (), 1e-12) == 2


def test_rules_of_the_halves_of_channel_are_exact(kernels):
    maps = drawn({"query": (3, 5, 4, 6), "key": (3, 8, 4, 6)}, torch.float64, kernels.device)
    gradient = drawn({"grad_energy": (3, 5, 8)}, torch.float64, kernels.device)
    assert check_rules(kernels, "channel_energy", maps, (), 1e-12) == 4
    assert check_rules(kernels, "channel_energy_backward", {**gradient, **maps}, (), 1e-12) == 4
    x, square = {"query": maps["query"]}, drawn({"grad_energy": (3, 5, 5)}, torch.float64, kernels.device)
    assert check_rules(kernels, "channel_energy", x, (), 1e-12) == 4
    needs = {"needs_input_grad": [True, False]}
    assert check_rules(kernels, "channel_energy_backward", {**square, **x}, needs.items(), 1e-12) == 4
    apply = drawn({"energy": (3, 5, 5), "value": (3, 5, 7, 3), "gamma": (3, 5)}, torch.float64, kernels.device)
    assert check_rules(kernels, "channel_apply", apply, (), 1e-12) == 4
    arguments = {"grad_output": torch.randn_like(apply["value"]), **apply}
    assert check_rules(kernels, "channel_apply_backward", arguments, (), 1e-12) == 4


def test_the_rules_are_registered_with_the_first_import_of_dtensor():
    """Importing segattn_ops imports neither DTensor, 0.4 s, nor Dynamo, 1.3 s."""
    code = """
import sys, segattn_ops
before = [name for name in ("torch.distributed.tensor", "torch._dynamo") if name in sys.modules]
finders = len(sys.meta_path)
import torch.distributed.tensor as dtensor
import inspect, torch
assert len(sys.meta_path) == finders - 1 and "DTensor" in inspect.getsource(dtensor)
functions = dtensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
print(before, sum(str(op).startswith("segattn.") for op in functions))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == f"[] {len(NAMES)}", done.stderr


def test_the_rules_are_registered_if_dtensor_is_imported_before(monkeypatch):
    functions = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    for operator in [op for op in functions if str(op).startswith("segattn.")]:
        monkeypatch.delitem(functions, operator)
    finders = list(sys.meta_path)
    _dtensor.register()
    assert sum(str(op).startswith("segattn.") for op in functions) == len(NAMES)
    assert sys.meta_path == finders


def test_another_dtensor_is_no_error(monkeypatch):
    def missing() -> None:
        raise ImportError("cannot import name 'RuntimeSchemaInfo'")

    monkeypatch.setattr(_dtensor, "_register", missing)
    with pytest.warns(RuntimeWarning, match="DTensor does not serve the ops with torch .*RuntimeSchemaInfo"):
        _dtensor.register()


@pytest.fixture
def fake_mesh() -> Iterator[DeviceMesh]:
    """Rank 0 of four, alone: collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_compiled(fake_mesh):
    q, k, v = dtensor_checks.QKV
    function = torch.compile(dtensor_checks.with_logsumexp, backend="aot_eager", fullgraph=True)
    query, key, value = (
        DTensor.from_local(t, fake_mesh, [p], run_check=False).requires_grad_()
        for t, p in ((q[:, :, :1], Shard(2)), (k, Replicate()), (v, Replicate()))
    )
    output, logsumexp = function(query, key, value)
    assert output.placements == (Shard(2),) and logsumexp.placements == (Shard(2),)
    (output.sum() + logsumexp.square().sum()).backward()
    plain = [t.clone().requires_grad_() for t in (q[:, :, :1], k, v)]
    expected = dtensor_checks.with_logsumexp(*plain)
    (expected[0].sum() + expected[1].square().sum()).backward()
    torch.testing.assert_close(output.to_local(), expected[0], rtol=0, atol=1e-12)
    for got, wanted in zip((query, key, value), plain, strict=True):
        torch.testing.assert_close(got.grad.to_local(), wanted.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(5, 7), (1, 4, 7)])
def test_the_documented_merge_of_keys(backend, sizes):
    """Results and gradients, over parts of the keys, are those over all."""
    q, k, v = [t.to(backend.device).flatten(2).requires_grad_() for t in dtensor_checks.QKV]
    k, v = k[:, :, : sum(sizes)], v[:, :, : sum(sizes)]
    got = dtensor_checks.documented()["merged"](q, k.split(sizes, 2), v.split(sizes, 2), 0.5)
    expected = segattn_ops.position_attention(q, k, v, 0.5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Of the checks on processes, which one process for all of them runs."""
    command = [sys.executable, "-m", "tests.ops.dtensor_checks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])  # gloo of torch 2.10 writes lines before it
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("name", dtensor_checks.CHECKS)
def test_on_four_processes(errors, name):
    assert errors[name] is None, errors[name]


def test_the_cache_distinguishes_the_gradients_that_are_wanted(fake_mesh):
    def distribute(tensor: Tensor, placement: Placement) -> DTensor:
        return DTensor.from_local(tensor, fake_mesh, [placement], run_check=False)

    q, k, v = dtensor_checks.QKV
    output, logsumexp, *_ = torch.ops.segattn.position_attention(q, k, v, 1.0)
    arguments = [distribute(t, Shard(2)) for t in (output, q)] + [distribute(t, Replicate()) for t in (k, v)]
    arguments += [distribute(output, Shard(2)), distribute(logsumexp, Shard(1)), 1.0, None, None, None]
    for needs in ([True, True, True], [True, False, True], [False, False, True]):
        results = torch.ops.segattn.position_attention_backward(*arguments, needs)
        placements = [r.placements[0] for r in results]
        wanted = (arguments[1].shape, k.shape, v.shape)
        assert [r.shape for r in results] == [s if n else (0,) for s, n in zip(wanted, needs, strict=True)]
        expected = [p if n else Replicate() for p, n in zip((Shard(2), Partial(), Partial()), needs, strict=True)]
        assert placements == expected


def test_a_scale_of_the_cache_is_not_that_of_the_call(fake_mesh):
    """The scale is no part of the key under which DTensor caches placements."""
    q, k, v = (DTensor.from_local(t, fake_mesh, [Shard(0)], run_check=False) for t in dtensor_checks.QKV)
    for scale in (1.0, 0.25):
        got = segattn_ops.position_attention(q, k, v, scale).to_local()
        expected = segattn_ops.position_attention(*(t.to_local() for t in (q, k, v)), scale)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
