"""needs_input_grad and grad_logsumexp on the emulator: the launches, products and memory of what is asked for, and
nothing else."""

import re
from itertools import product

import pytest
import torch

from ..emulated import global_bytes, run_in

# Of mma.sync; Hopper's kernels have tests of their own.
pytestmark = pytest.mark.usefixtures("without_wgmma")

OPERATORS = torch.ops.segattn_emulated
QUERY, KEY, VALUE = [True, False, False], [False, True, False], [False, False, True]
ALL, NONE = [True] * 3, [False] * 3


def launched(emulator):
    """The kernels' names without namespace and template arguments, in launch order."""
    return [re.search(r"\w+_kernel", r["kernel"])[0] for r in emulator.report()]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def position_call(emulator, dtype, sizes=(16, 24, 64, 96)):
    """A function of the remaining arguments of position_attention_backward."""
    key_channels, channels, queries, keys = sizes
    query, key = random(1, key_channels, queries, dtype=dtype), random(1, key_channels, keys, dtype=dtype)
    value, grad_output = random(1, channels, keys, dtype=dtype), random(1, channels, queries, dtype=dtype)
    output, logsumexp, *lows = OPERATORS.position_attention(query, key, value, 0.5, True)
    lows = [t if t.shape[1] > 0 else None for t in lows]

    def call(needs, keys_complete=True, **more):
        emulator.reset()
        return OPERATORS.position_attention_backward(
            grad_output, query, key, value, output, logsumexp, 0.5, *lows, needs_input_grad=needs,
            keys_complete=keys_complete, **more,
        )  # fmt: skip

    return call


DELTA, SUM, PAIR, PARTIALS = "delta_kernel", "weighted_sum_kernel", "query_key_gradient_kernel", "sum_partials_kernel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_position_on_tensor_cores(emulator, dtype):
    """One kernel computes the gradients of query and key, so only the sum of the partials of one is left out."""
    emulator.set_device(90, 1)
    call = position_call(emulator, dtype)
    for needs, expected in (
        (NONE, []),
        (VALUE, [SUM]),
        (QUERY, [DELTA, PAIR, PARTIALS]),
        (KEY, [DELTA, PAIR, PARTIALS]),
        ([True, True, False], [DELTA, PAIR, PARTIALS, PARTIALS]),
        ([True, False, True], [DELTA, SUM, PAIR, PARTIALS]),
        (ALL, [DELTA, SUM, PAIR, PARTIALS, PARTIALS]),
    ):
        call(needs)
        assert launched(emulator) == expected, needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_position_without_tensor_cores(emulator, dtype):
    """The corrected query gradient of float32 has a forward pass for the mean key."""
    emulator.set_device(75)
    call = position_call(emulator, dtype, (4, 8, 40, 33))
    for complete in (True, False):
        query = 2 if dtype == torch.float32 and complete else 1
        for needs, sums in ((NONE, 0), (VALUE, 1), (QUERY, query), (KEY, 1), (ALL, query + 2)):
            call(needs, complete)
            delta = [DELTA] if needs[0] or needs[1] else []
            assert launched(emulator) == delta + ["simt_sum_kernel"] * sums, needs


def test_only_operands_that_are_read_are_packed(emulator):
    """Rows of 97 elements are not aligned. The value gradient does not read value."""
    call = position_call(emulator, torch.bfloat16, (8, 8, 97, 97))
    for needs, packed in ((VALUE, 3), (QUERY, 4), (ALL, 4)):
        call(needs)
        assert launched(emulator).count("pack_rows_kernel") == packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gradient_of_the_logsumexp_adds_no_launch(emulator, dtype):
    call = position_call(emulator, dtype)
    call(ALL)
    without = launched(emulator)
    call(ALL, grad_logsumexp=random(1, 64))
    assert launched(emulator) == without


def criss_cross_call(emulator, dtype, side=20):
    query, key = random(1, 8, side, side + 1, dtype=dtype), random(1, 8, side, side + 1, dtype=dtype)
    value, grad_output = random(1, 32, side, side + 1, dtype=dtype), random(1, 32, side, side + 1, dtype=dtype)
    output, logsumexp, low = OPERATORS.criss_cross_attention(query, key, value, 0.5)

    def call(needs, keys_complete=True, **more):
        emulator.reset()
        return OPERATORS.criss_cross_attention_backward(
            grad_output, query, key, value, output, logsumexp, 0.5, low, needs_input_grad=needs,
            keys_complete=keys_complete, **more,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_criss_cross(emulator, dtype):
    """A pass over columns and one over rows each; several gradients share theirs. The mean key and the correction are
    the query gradient's."""
    line, together, correction = "line_sum_kernel", "line_backward_kernel", "correct_query_gradient_kernel"
    call = criss_cross_call(emulator, dtype)
    for needs, complete, expected in (
        (NONE, True, []),
        (VALUE, True, [line] * 2),
        (KEY, True, [DELTA] + [line] * 2),
        (QUERY, True, [DELTA] + [line] * 4 + [correction]),
        (QUERY, False, [DELTA] + [line] * 2),
        ([True, True, False], False, [DELTA] + [together] * 2),
        ([False, True, True], True, [DELTA] + [together] * 2),
        ([True, False, True], True, [DELTA] + [line, together] * 2 + [correction]),
        (ALL, True, [DELTA] + [line, together] * 2 + [correction]),
        (ALL, False, [DELTA] + [together] * 2),
    ):
        call(needs, complete)
        assert launched(emulator) == expected, (needs, complete)


def test_affinity_and_aggregation(emulator):
    attention, features = random(1, 11, 6, 6), random(1, 8, 6, 6)
    for operator, names in (
        ("criss_cross_affinity_backward", ["line_sum_kernel", "line_sum_kernel"]),
        ("criss_cross_aggregation_backward", ["line_product_kernel", "line_sum_kernel"]),
    ):
        first = (attention, features, features) if "affinity" in operator else (features, attention, features)
        for needs in ([True, False], [False, True], [False, False]):
            emulator.reset()
            getattr(OPERATORS, operator)(*first, needs_input_grad=needs)
            assert launched(emulator) == [n for n, need in zip(names, needs, strict=True) for _ in range(2) if need]


def matrix_products(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name == "aten::bmm" for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channel(emulator, dtype):
    """cuBLAS computes the products of float32, and applies the weights of both types."""
    query, key, value, grad_output = (random(1, 8, 40, dtype=dtype) for _ in range(4))
    grams = 0 if dtype == torch.float32 else 1
    for needs, products, applied, softmax in (
        (NONE, 0, 0, []),
        (VALUE, 1, 1, ["channel_softmax_kernel"]),
        (QUERY, 2, 1, ["channel_softmax_backward_kernel"]),
        (ALL, 2, 3, ["channel_softmax_backward_kernel"]),
    ):
        emulator.reset()
        count = matrix_products(
            lambda needs=needs: OPERATORS.channel_attention_backward(grad_output, query, key, value, 0.3, needs)
        )
        assert launched(emulator) == ["gram_kernel"] * products * grams + softmax
        assert count == applied + products * (1 - grams)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channel_self_attention(emulator, dtype):
    x, grad_output, gamma = random(1, 8, 40, dtype=dtype), random(1, 8, 40, dtype=dtype), random(1, 8)
    names = {}
    for needs in ([False, False], [False, True], [True, False], [True, True]):
        emulator.reset()
        count = matrix_products(
            lambda needs=needs: OPERATORS.channel_self_attention_backward(grad_output, x, 0.3, gamma, needs)
        )
        names[tuple(needs)] = [*launched(emulator), *["bmm"] * count]
    assert names[False, False] == []
    assert names[True, False] == names[True, True]
    assert not {"symmetrise_kernel", "channel_combine_kernel", "add_kernel"} & set(names[False, True])
    assert names[False, True].count("bmm") == (2 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("attention", [position_call, criss_cross_call])
def test_memory_traffic(traced, attention):
    """Each gradient less moves less. None moves nothing."""
    traced.set_device(90, 1)
    call = attention(traced, torch.bfloat16)
    moved = {}
    for needs in product([False, True], repeat=3):
        call(list(needs))
        moved[needs] = sum(sum(global_bytes(launch).values()) for launch in traced.report())
    assert moved[False, False, False] == 0
    for needs, other in product(moved, repeat=2):
        if needs != other and all(x <= y for x, y in zip(needs, other, strict=True)):
            assert moved[needs] < moved[other], (needs, other, moved)


@pytest.mark.slow
def test_race_build(emulator):
    """Counts memory accesses."""
    run_in("race", __file__, "traffic")
