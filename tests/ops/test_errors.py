"""Bad input: an error that names op, argument, rule and what it got; the same from the reference, from the kernels
and from fake tensors."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import segattn_ops


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


POSITION = {"query": t(2, 8, 5, 7), "key": t(2, 8, 3, 4), "value": t(2, 6, 3, 4), "scale": 1.0}
CHANNEL = {"query": t(2, 8, 5, 7), "key": t(2, 4, 5, 7), "value": t(2, 4, 3), "scale": 1.0}
AFFINITY = {"query": t(2, 8, 5, 7), "key": t(2, 8, 5, 7)}
AGGREGATION = {"attention": t(2, 11, 5, 7), "value": t(2, 6, 5, 7)}
CRISS_CROSS = {"query": t(2, 8, 5, 7), "key": t(2, 8, 5, 7), "value": t(2, 6, 5, 7), "scale": 1.0}

# function, good arguments, what to change, the message
BAD = [
    ("position_attention", POSITION, {"query": t(2, 8)}, "query must have at least 3 dimensions"),
    ("position_attention", POSITION, {"key": t(2, 32, 3, 4)}, "key must have 8 channels like query (got 32)"),
    ("position_attention", POSITION, {"key": t(3, 8, 3, 4)}, "key must have batch size 2 like query (got 3)"),
    ("position_attention", POSITION, {"value": t(1, 6, 3, 4)}, "value must have batch size 2 like query (got 1)"),
    (
        "position_attention",
        POSITION,
        {"value": t(2, 6, 12)},
        "value must have spatial size [3, 4] like key (got [12])",
    ),
    (
        "position_attention",
        POSITION,
        {"key": t(2, 8, 0), "value": t(2, 6, 0)},
        "key must have at least 1 position (got shape [2, 8, 0])",
    ),
    (
        "position_attention",
        POSITION,
        {"query": t(2, 0, 5), "key": t(2, 0, 3, 4)},
        "query must have at least 1 channel (got shape [2, 0, 5])",
    ),
    (
        "position_attention",
        POSITION,
        {"value": t(2, 6, 3, 4, dtype=torch.float64)},
        "value must be float32 like query (got float64)",
    ),
    (
        "position_attention",
        POSITION,
        {"query": t(2, 8, 5, 7, dtype=torch.int64)},
        "query must be float16, bfloat16, float32 or float64 (got another dtype)",
    ),
    ("position_attention", POSITION, {"scale": math.inf}, "scale must be finite (got inf)"),
    ("position_attention", POSITION, {"scale": math.nan}, "scale must be finite (got nan)"),
    ("channel_attention", CHANNEL, {"key": t(2, 4, 7, 5)}, "key must have spatial size [5, 7] like query (got [7, 5])"),
    ("channel_attention", CHANNEL, {"value": t(2, 5, 3)}, "value must have 4 channels like key (got 5)"),
    ("channel_attention", CHANNEL, {"value": t(1, 4, 3)}, "value must have batch size 2 like query (got 1)"),
    ("channel_attention", CHANNEL, {"value": t(2, 4)}, "value must have at least 3 dimensions"),
    ("channel_attention", CHANNEL, {"key": t(2, 4, 5, 7, dtype=torch.float16)}, "key must be float32 like query"),
    ("channel_attention", CHANNEL, {"scale": -math.inf}, "scale must be finite (got -inf)"),
    (
        "channel_attention",
        CHANNEL,
        {"query": t(2, 8, 0), "key": t(2, 4, 0)},
        "query must have at least 1 position (got shape [2, 8, 0])",
    ),
    ("criss_cross_affinity", AFFINITY, {"query": t(2, 8, 35)}, "query must have 4 dimensions"),
    ("criss_cross_affinity", AFFINITY, {"key": t(2, 9, 5, 7)}, "key must have 8 channels like query (got 9)"),
    ("criss_cross_affinity", AFFINITY, {"key": t(2, 8, 7, 5)}, "key must have spatial size [5, 7] like query"),
    (
        "criss_cross_affinity",
        AFFINITY,
        {"query": t(2, 8, 0, 7), "key": t(2, 8, 0, 7)},
        "query must have a height and a width of at least 1 (got shape [2, 8, 0, 7])",
    ),
    (
        "criss_cross_aggregation",
        AGGREGATION,
        {"attention": t(2, 12, 5, 7)},
        "attention must have H + W - 1 = 11 channels (got 12)",
    ),
    ("criss_cross_aggregation", AGGREGATION, {"value": t(1, 6, 5, 7)}, "value must have batch size 2 like attention"),
    ("criss_cross_aggregation", AGGREGATION, {"value": t(2, 0, 5, 7)}, "value must have at least 1 channel"),
    ("criss_cross_attention", CRISS_CROSS, {"value": t(2, 6, 5, 6)}, "value must have spatial size [5, 7] like query"),
    ("criss_cross_attention", CRISS_CROSS, {"value": t(2, 6, 35)}, "value must have 4 dimensions"),
    ("criss_cross_attention", CRISS_CROSS, {"key": t(2, 8, 5, 7, dtype=torch.bfloat16)}, "key must be float32"),
    ("criss_cross_attention", CRISS_CROSS, {"scale": math.nan}, "scale must be finite (got nan)"),
]
IDS = [f"{op}-{'-'.join(change)}-{i}" for i, (op, _, change, _) in enumerate(BAD)]


@pytest.mark.parametrize(("op", "good", "change", "message"), BAD, ids=IDS)
def test_bad_input(backend, op, good, change, message):
    arguments = {
        name: value.to(backend.device) if isinstance(value, torch.Tensor) else value
        for name, value in {**good, **change}.items()
    }
    getattr(segattn_ops, op)(*(v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in good.values()))
    with pytest.raises(RuntimeError) as raised:
        getattr(segattn_ops, op)(**arguments)
    assert f"{op}: {message}" in str(raised.value)


@pytest.mark.parametrize(("op", "good", "change", "message"), BAD, ids=IDS)
def test_bad_fake_input(op, good, change, message):
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as raised:
        arguments = [
            mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for value in {**good, **change}.values()
        ]
        getattr(torch.ops.segattn, op)(*arguments)
    assert f"{op}: {message}" in str(raised.value)


def test_channel_self_attention_checks_its_one_input(backend):
    x = torch.zeros(2, 8, device=backend.device)
    with pytest.raises(RuntimeError, match="channel_self_attention: input must have at least 3 dimensions"):
        segattn_ops.channel_attention(x, x, x)
    x = torch.zeros(2, 8, 4, device=backend.device)
    with pytest.raises(RuntimeError, match=r"channel_self_attention: scale must be finite \(got nan\)"):
        segattn_ops.channel_attention(x, x, x, math.nan)


def test_residual_channel_attention_checks_input_and_gamma(backend):
    x, gamma = torch.zeros(2, 8, 5, 7, device=backend.device), torch.ones(8, device=backend.device)
    call = segattn_ops.residual_channel_attention
    for good in (gamma, gamma[0], gamma[:1], gamma.expand(2, 8), gamma.half(), gamma.double()):
        assert call(x, good).shape == x.shape
    with pytest.raises(RuntimeError, match="residual_channel_attention: input must have at least 3 dimensions"):
        call(x[0, 0], gamma)
    with pytest.raises(RuntimeError, match=r"residual_channel_attention: scale must be finite \(got nan\)"):
        call(x, gamma, math.nan)
    rule = r"gamma must be of a shape that broadcasts to \(batch, channels\) = \[2, 8\] \(got shape \[7\]\)"
    with pytest.raises(RuntimeError, match=f"residual_channel_attention: {rule}"):
        call(x, gamma[:7])
    with pytest.raises(RuntimeError, match=r"gamma must be of a shape that broadcasts.*\(got shape \[1, 8, 1, 1\]\)"):
        call(x, gamma.view(1, 8, 1, 1))
    with pytest.raises(RuntimeError, match=r"gamma must be float16.*\(got another dtype\)"):
        call(x, gamma.long())
    with pytest.raises(RuntimeError, match=r"gamma must be on device .* like input \(got meta\)"):
        call(x, gamma.to("meta"))


def test_bad_fake_gamma():
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as raised:
        torch.ops.segattn.channel_self_attention(mode.from_tensor(t(2, 8, 5)), 1.0, mode.from_tensor(t(2, 7)))
    assert "channel_self_attention: gamma must have shape [2, 8] (got [2, 7])" in str(raised.value)


def test_mixed_devices(backend):
    query = torch.zeros(1, 4, 3, device=backend.device)
    with pytest.raises(RuntimeError, match=r"(key must be on device|meta)"):
        segattn_ops.position_attention(query, query.to("meta"), query)


BACKWARD = {
    "position_attention_backward": (
        [t(2, 6, 5, 7), t(2, 8, 5, 7), t(2, 8, 3), t(2, 6, 3), t(2, 6, 5, 7), t(2, 5, 7), 1.0, t(2, 6, 5, 7)],
        [
            (0, t(2, 6, 5, 8), "grad_output must have shape [2, 6, 5, 7] like output (got [2, 6, 5, 8])"),
            (0, t(2, 6, 5, 7).double(), "grad_output must be float32 like query (got float64)"),
            (4, t(2, 7, 5, 7), "output must have 6 channels like value (got 7)"),
            (5, t(2, 5, 6), "logsumexp must have shape [2, 5, 7] (got [2, 5, 6])"),
            (5, t(2, 5, 7).half(), "logsumexp must be float32 for these inputs (got float16)"),
            (7, t(2, 6, 5, 8), "output_low must have shape [2, 6, 5, 7] like output (got [2, 6, 5, 8])"),
            (7, t(2, 6, 5, 7).half(), "output_low must be float32 like query (got float16)"),
        ],
    ),
    "channel_attention_backward": (
        [t(2, 8, 3), t(2, 8, 5, 7), t(2, 4, 5, 7), t(2, 4, 3), 1.0],
        [(0, t(2, 8, 4), "grad_output must have spatial size [3] like value (got [4])")],
    ),
    "channel_self_attention_backward": (
        [t(2, 8, 5), t(2, 8, 5), 1.0, t(2, 8)],
        [
            (0, t(2, 8, 4), "grad_output must have shape [2, 8, 5] like input (got [2, 8, 4])"),
            (3, t(2, 1), "gamma must have shape [2, 8] (got [2, 1])"),
            (3, t(2, 8).half(), "gamma must be float32 for these inputs (got float16)"),
        ],
    ),
    "criss_cross_affinity_backward": (
        [t(2, 11, 5, 7), t(2, 8, 5, 7), t(2, 8, 5, 7)],
        [(0, t(2, 12, 5, 7), "grad_affinity must have H + W - 1 = 11 channels (got 12)")],
    ),
    "criss_cross_aggregation_backward": (
        [t(2, 6, 5, 7), t(2, 11, 5, 7), t(2, 6, 5, 7)],
        [(0, t(2, 5, 5, 7), "grad_output must have shape [2, 6, 5, 7] like value (got [2, 5, 5, 7])")],
    ),
    "criss_cross_attention_backward": (
        [t(2, 6, 5, 7), t(2, 8, 5, 7), t(2, 8, 5, 7), t(2, 6, 5, 7), t(2, 6, 5, 7), t(2, 5, 7), 1.0],
        [
            (0, t(2, 6, 7, 5), "grad_output must have shape [2, 6, 5, 7] like value (got [2, 6, 7, 5])"),
            (5, t(2, 7, 5), "logsumexp must have shape [2, 5, 7] (got [2, 7, 5])"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("op", "good", "index", "bad", "message"),
    [(op, good, *change) for op, (good, changes) in BACKWARD.items() for change in changes],
)
def test_bad_backward_input(kernels, op, good, index, bad, message):
    good = [v.to(kernels.device) if isinstance(v, torch.Tensor) else v for v in good]
    getattr(kernels.operators, op)(*good)
    arguments = [bad.to(kernels.device) if i == index else v for i, v in enumerate(good)]
    with pytest.raises(RuntimeError) as raised:
        getattr(kernels.operators, op)(*arguments)
    assert f"{op}: {message}" in str(raised.value)


@pytest.mark.parametrize(("index", "bad", "message"), BACKWARD["position_attention_backward"][1][-2:])
def test_bad_fake_output_low(index, bad, message):
    arguments = [bad if i == index else v for i, v in enumerate(BACKWARD["position_attention_backward"][0])]
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as raised:
        arguments = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments]
        torch.ops.segattn.position_attention_backward(*arguments)
    assert f"position_attention_backward: {message}" in str(raised.value)
