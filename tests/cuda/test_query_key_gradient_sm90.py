"""Hopper's kernel of the gradients of query and key on the emulator, beyond the operator suite: every tile, several
blocks, groups and ranges, work and traffic against docs/hopper.md, and the race and address sanitizer builds."""

import pytest
import torch

from ..emulated import assert_same_bits, conflicts, global_bytes, run_in
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager, assert_norm_as_exact_as_eager
from .test_key_padding_mask import every_nth, poisoned
from .test_key_padding_mask import run as run_masked
from .test_position import OPERATORS, eager, exact, inputs, launches, relative_error, run

KERNEL = "wgmma_query_key_gradient_kernel"
GRADIENTS = ("grad_query", "grad_key")
# E, C, and of the kernel: E rounded up, whether grad_output is resident
TILES = [
    (64, 512, 64, True),
    (40, 97, 64, True),
    (16, 24, 64, True),  # fewer chunks than stages
    (24, 520, 64, False),
    (72, 40, 128, False),
    (128, 264, 128, False),
]


def gradients(results):
    return results[2:4]


def assert_as_exact(tensors, scale):
    results = (gradients(function(*tensors, scale)) for function in (run, eager, exact))
    for name, got, by_eager, in_float64 in zip(GRADIENTS, *results, strict=True):
        assert_as_exact_as_eager(name, got, by_eager, in_float64)


@pytest.mark.parametrize(
    ("key_channels", "channels", "resident"), [(64, 512, True), (64, 544, False), (128, 128, False)]
)
def test_work(emulator, key_channels, channels, resident):
    """No more products than the definition: 2 (C + 3 E) FLOP a query and key. The bytes copied from L2 are those of
    docs/hopper.md."""
    emulator.set_device(90, 1)
    run(*inputs(1, key_channels, channels, 256, 384, torch.bfloat16))
    (launch,) = launches(emulator, KERNEL)
    tiles, query_blocks = 6, 2
    assert launch["wgmma_flops"] == tiles * 128**2 * 2 * (channels + 3 * key_channels)
    grad_output = channels * (query_blocks if resident else tiles)
    rows = grad_output + channels * tiles + key_channels * (tiles + query_blocks)
    assert launch["bulk_copy_bytes"] == 2 * 128 * rows


def test_traffic(traced):
    """A tile reads and writes 32 KB of grad_key's partial, in whole sectors; dS is stored without bank conflicts. wgmma
    and the copies move 125 bytes of shared memory a cycle of the tensor cores, which have 128."""
    traced.set_device(90, 1)
    run(*inputs(1, 64, 512, 256, 256, torch.bfloat16))
    (launch,) = launches(traced, KERNEL)
    statistics, partial = 2 * 4 * 4 * 256, 4 * 64 * 128  # four lanes read the statistics of a query
    assert global_bytes(launch, sectors=False) == {
        "global_read": statistics + 2 * partial,
        "global_write": (4 + 2) * partial,
    }
    assert global_bytes(launch)["global_write"] == (4 + 2) * partial
    assert conflicts(launch) == 1
    shared = (
        launch["wgmma_shared_a_bytes"] + launch["wgmma_shared_b_bytes"] + launch["bulk_copy_bytes"] - 2 * 2 * 128 * 576
    )
    shared += launch["memory"]["shared_write"]["bytes"]
    assert 124 < shared / (4 * 5632) < 126


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("key_channels", "channels", "rounded_up", "resident"), TILES)
def test_tiles(emulator, key_channels, channels, rounded_up, resident, dtype):
    """On one multiprocessor one block processes two query blocks and three key blocks, with edges."""
    emulator.set_device(90, 1)
    assert_as_exact(inputs(1, key_channels, channels, 150, 300, dtype), key_channels**-0.5)
    (launch,) = launches(emulator, KERNEL)
    assert launch["grid"][0] == 1
    assert f", {rounded_up}, (segattn::cuda::GradOutput){int(resident)}>" in launch["kernel"]


@pytest.mark.parametrize("sizes", [(16, 40, 700, 600), (16, 40, 64, 1100), (16, 40, 1100, 64), (72, 40, 2, 3)], ids=str)
def test_groups_and_ranges(emulator, sizes):
    """Two samples on 132 multiprocessors: blocks with one key block and one query block each."""
    assert_as_exact(inputs(2, *sizes, torch.bfloat16), 0.25)
    (launch,) = launches(emulator, KERNEL)
    query_blocks, key_blocks = ((size + 127) // 128 for size in sizes[2:])
    assert launch["grid"][0] == 2 * query_blocks * key_blocks


@pytest.mark.parametrize("key_channels", [16, 72])
def test_kept_keys(emulator, key_channels):
    """A key padding mask gives the bits of the kept keys alone; a sample without any, zeros."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, key_channels, 40, 150, 400, torch.bfloat16)
    for n in (2, 3, 400):
        mask = every_nth(400, n)
        kept = ~mask[0]
        got = gradients(run_masked(query, poisoned(key, mask), poisoned(value, mask), grad_output, mask))
        alone = gradients(run_masked(query, key[:, :, kept].contiguous(), value[:, :, kept].contiguous(), grad_output))
        assert torch.equal(got[0], alone[0]) and torch.equal(got[1][:, :, kept], alone[1]), n
        assert not got[1][:, :, mask[0]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key_channels", [32, 96])
def test_gradients_of_a_photograph(emulator, key_channels, dtype):
    """Features of regions. Those of query are delta's, whose error does not average out (docs/decisions.md)."""
    emulator.set_device(90, 2)
    query, key, value = (t.flatten(2) for t in region_features(20, 25, key_channels, 128, dtype, 6.0))
    grad_output = torch.randn(1, 128, 500, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = query, key, value, grad_output
    for name, *results in zip(GRADIENTS, *(gradients(f(*tensors)) for f in (run, eager, exact)), strict=True):
        assert_norm_as_exact_as_eager(name, *results)
    assert launches(emulator, KERNEL)


@pytest.mark.parametrize(("operand", "expected"), [(0, (1, 150)), (1, (150, 1)), (2, (150, 1)), (3, (1, 150))])
def test_infinite_operands_affect_no_other_position(emulator, operand, expected):
    """inf in one position of query, key, value or grad_output: of the gradients of query and key, those of queries and
    keys beside it are finite where eager's are."""
    emulator.set_device(90, 1)
    tensors = inputs(1, 8, 40, 150, 150, torch.bfloat16)
    tensors[operand][0, 3, 149] = float("inf")
    for name, got, by_eager in zip(GRADIENTS, gradients(run(*tensors)), gradients(eager(*tensors)), strict=True):
        assert torch.equal(got.isfinite() | ~by_eager.isfinite(), torch.ones_like(got, dtype=torch.bool)), name


@pytest.mark.parametrize("queries", [33, 130])
@pytest.mark.parametrize("key_channels", [8, 72])
def test_keys_of_minus_infinity(emulator, key_channels, queries):
    """Energies of -inf: such keys have no weight, and their gradient is 0, also where a tile extends past the last
    query: queries are 0 there, and 0 times -inf is NaN."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, key_channels, 24, queries, 150, torch.bfloat16)
    query = query.abs() + 0.25
    dropped, kept = [3, 90, 149], [i for i in range(150) if i not in (3, 90, 149)]
    key[:, :, dropped] = -float("inf")
    grad_key = run(query, key, value, grad_output, 0.1)[3]
    expected = exact(query, key[:, :, kept], value[:, :, kept], grad_output, 0.1)[3]
    assert relative_error(grad_key[:, :, kept], expected) < 2e-2
    assert not grad_key[:, :, dropped].any()


def test_expanded_operands(emulator):
    """Strides of 0, which tensor maps may not have: such operands are copied."""
    emulator.set_device(90, 1)
    tensors = inputs(2, 16, 40, 64, 72, torch.bfloat16)
    for operand in range(4):
        one = tensors[operand][:1]
        changed = [one.repeat(2, 1, 1) if i == operand else t for i, t in enumerate(tensors)]
        expanded = [one.expand(2, -1, -1) if i == operand else t for i, t in enumerate(tensors)]
        for a, b in zip(gradients(run(*changed)), gradients(run(*expanded)), strict=True):
            assert torch.equal(a, b), operand


def test_any_schedule_gives_the_same_bits(emulator):
    emulator.set_device(90, 3)
    tensors = inputs(1, 24, 136, 300, 260, torch.bfloat16)
    assert_same_bits(emulator, lambda: run(*tensors))


def test_forced_engine(emulator):
    OPERATORS._set_position_engine("mma")
    try:
        run(*inputs(1, 16, 40, 33, 33, torch.bfloat16))
        assert not launches(emulator, KERNEL)
    finally:
        OPERATORS._set_position_engine("auto")


# ---- sanitizer builds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_race_build(emulator):
    run_in("race", __file__, "not build and not photograph and not float16")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "(tiles or groups or kept) and not float16")
