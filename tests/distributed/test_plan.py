"""The plan: its bytes and memory are those of the ops on 2, 3 and 4 gloo processes, and its answers are sound."""

import json
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from segattn_ops.distributed import __main__ as command
from segattn_ops.distributed import plan

from . import plan_checks
from .processes import run_module

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
SCENE = {"height": 96, "width": 80, "channels": 64, "key_channels": 8}


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ops_do_what_is_planned(ranks):
    errors = run_module("tests.distributed.plan_checks", str(ranks))
    failed = {name: error for name, error in errors.items() if error}
    assert errors and not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


@pytest.mark.slow
@needs_gloo
def test_memory_of_a_rank_stays_when_map_and_ranks_double():
    peaks: Any = run_module("tests.distributed.plan_checks", "weak")
    for op in ("position", "criss_cross"):
        three, six = peaks[op]
        assert abs(six - three) <= 0.03 * three, op


def test_a_rank_alone_sends_nothing():
    found = plan.plan(**SCENE, ranks=1)
    assert [e.mesh for e in found.estimates] == [(1,)] * 4
    assert all(e.sent.total == 0 and e.seconds.total > 0 for e in found.estimates)


@pytest.mark.parametrize("ranks", [2, 6, 7, 64])
def test_flop_of_all_ranks_are_those_of_one(ranks):
    whole = {e.op: e.flop for e in plan.plan(**SCENE, ranks=1).estimates}
    for mesh in plan.meshes(ranks):
        for op in plan.OPS:
            layout = plan.even_layout(op, "ring", mesh, 96, 80, 64, 8, torch.float32)
            found = [plan.flop(layout, rank) for rank in range(ranks)]
            assert sum(f.forward for f in found) == whole[op].forward
            assert sum(f.backward for f in found) == whole[op].backward


def test_different_ranks_have_all_costs():
    for mesh in ((7,), (3, 5), (5, 3), (1, 6), (20,)):
        for op, method in plan_checks.CASES:
            layout = plan.even_layout(op, method, mesh, 17, 19, 5, 3, torch.bfloat16)
            for costs in (plan.sent, plan.memory, plan.flop):
                of_all = {costs(layout, rank) for rank in range(layout.ranks)}
                assert of_all == {costs(layout, rank) for rank in layout.different_ranks}, (mesh, op, costs)


def test_layouts_that_do_not_fit_come_last():
    found = plan.plan(height=1024, width=1024, channels=512, ranks=64, device="h100", memory=1.0, op="position")
    fits = [e.fits for e in found.estimates]
    assert fits == sorted(fits, reverse=True) and set(fits) == {True, False}
    assert found.best("position").method == "ring" and "fits in 1 GiB" in found.reason("position")
    too_small = plan.plan(height=1024, width=1024, channels=512, ranks=2, memory=1.0)
    for op in plan.OPS:
        enough = too_small.enough_ranks[op]
        assert enough is not None and f"{enough} ranks are enough" in too_small.reason(op)
        options = {"height": 1024, "width": 1024, "channels": 512, "memory": 1.0, "op": op}
        assert plan.plan(**options, ranks=enough).best(op).fits
        assert not plan.plan(**options, ranks=enough // 2).best(op).fits


def test_rates_that_are_given():
    slow, fast = (plan.plan(**SCENE, ranks=4, link=link, flops=1.0) for link in (1, 100.0))
    for op in plan.OPS:
        assert slow.best(op).seconds.total > fast.best(op).seconds.total
    assert plan.plan(**SCENE, ranks=4, link="ethernet100").machine.link == 12.5e9
    assert plan.plan(**SCENE, ranks=4).machine.link_name == "nvlink4"
    assert plan.plan(**SCENE, ranks=16).machine.link_name == "infiniband400"
    assert plan.plan(**SCENE, ranks=4, device="cpu").machine.memory is None
    one = plan.plan(**SCENE, ranks=1, flops=2.0, op="channel").best("channel")
    assert one.seconds.forward == one.flop.forward / 2e12


def test_page_and_json(capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SCENE.items()]
    assert command.main(["plan", *options, "--ranks", "6", "--dtype", "bfloat16"]) == 0
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) < 45
    assert lines[3] == "Take" and lines[4].startswith("  position ")
    assert command.main(["plan", *options, "--ranks", "6", "--mesh", "3x2", "--op", "criss_cross", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (estimate,) = content["estimates"]
    assert estimate["mesh"] == [3, 2] and content["recommended"]["criss_cross"]["mesh"] == [3, 2]
    layout = plan.even_layout("criss_cross", "", (3, 2), 96, 80, 64, 8, torch.float32)
    assert estimate["memory"]["peak"] == plan.memory(layout, 0).peak


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"height": 0}, ValueError, "height must be at least 1"),
        ({"width": 2.0}, TypeError, "width must be an integer (got float)"),
        ({"channels": True}, TypeError, "channels must be an integer (got bool)"),
        ({"key_channels": -1}, ValueError, "key_channels must be at least 1"),
        ({"ranks": 2**41}, ValueError, "ranks must be at least 1 and at most"),
        ({"batch": "2"}, TypeError, "batch must be an integer (got str)"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of"),
        ({"device": "tpu"}, ValueError, "device must be one of"),
        ({"op": "pooling"}, ValueError, "op must be one of"),
        ({"mesh": (3, 2)}, ValueError, "mesh must have 1 or 2 dimensions and 4 ranks (got 3x2)"),
        ({"mesh": (2, 2, 1)}, ValueError, "mesh must have 1 or 2 dimensions and 4 ranks (got 2x2x1)"),
        ({"link": 0}, ValueError, "link must be positive and finite (got 0)"),
        ({"link": "wire"}, ValueError, "link must be GB/s or one of"),
        ({"flops": math.nan}, ValueError, "flops must be positive and finite (got nan)"),
        ({"memory": "80"}, TypeError, "memory must be a number (got str)"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=re.escape(f"plan: {message}")):
        plan.plan(**{**SCENE, "ranks": 4, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (["--ranks", "0"], "plan: ranks must be at least 1"),
        (["--ranks", "x"], "plan: argument --ranks: invalid int value: 'x'"),
        (["--ranks", "4", "--dtype", "float8"], "plan: dtype must be one of"),
        (["--ranks", "4", "--mesh", "2by2"], "plan: argument --mesh: must be ROWS or ROWSxCOLUMNS"),
        (["--ranks", "4", "--mesh", "2x3"], "plan: mesh must have 1 or 2 dimensions and 4 ranks"),
        ([], "plan: the following arguments are required: --ranks"),
    ],
)
def test_wrong_options_are_a_line_and_status_2(change, message, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SCENE.items()]
    try:
        status = command.main(["plan", *options, *change])
    except SystemExit as stopped:
        status = stopped.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and f"{command.PROG} {message}" in line, line
