"""Hopper's kernel of the weighted sum (the output, and grad_value) on the emulator, beyond the operator suite: every
tile, clusters, splits, strides, work and traffic against docs/hopper.md, and the race and address sanitizer builds."""

import pytest
import torch

from ..emulated import assert_same_bits, run_in
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager, assert_norm_as_exact_as_eager
from .test_key_padding_mask import every_nth, poisoned
from .test_key_padding_mask import run as run_masked
from .test_position import FORWARD, N97, OPERATORS, VALUE_GRADIENT, blocks, eager, exact, inputs, position_sum, run
from .test_position import launches as launches_of

KERNEL = "wgmma_weighted_sum_kernel"
SUMS = ("output", "logsumexp", "grad_value")
# E, C, and of the kernel: channels, E rounded up
TILES = [
    (64, 512, 256, 64),
    (8, 16, 128, 64),
    (40, 384, 128, 64),  # three blocks of 128 channels need fewer products than two of 256
    (24, 140, 256, 64),
    (128, 264, 256, 128),
    (72, 40, 128, 128),
]


def sums(results):
    return [results[0], results[1], results[4]]


def launches(emulator, kind):
    return [launch for launch in launches_of(emulator, KERNEL) if position_sum(launch["kernel"]) == kind]


def assert_as_exact(tensors, scale):
    results = (sums(function(*tensors, scale)) for function in (run, eager, exact))
    for name, got, by_eager, in_float64 in zip(SUMS, *results, strict=True):
        if name == "logsumexp":  # float32, eager's is rounded
            assert ((got - in_float64).abs() <= 1e-5 + 2e-6 * in_float64.abs()).all()
        else:
            assert_as_exact_as_eager(name, got, by_eager, in_float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("key_channels", "channels", "tile", "rounded_up"), TILES)
def test_tiles(emulator, key_channels, channels, tile, rounded_up, dtype):
    """Two owned tiles forward, a cluster with 256 channels, and three backward, both with edges."""
    emulator.set_device(90, 1)
    assert_as_exact(inputs(1, key_channels, channels, 150, 300, dtype), key_channels**-0.5)
    for kind, owned in ((FORWARD, 150), (VALUE_GRADIENT, 300)):
        (launch,) = launches(emulator, kind)
        cluster = 2 if tile == 256 and owned == 150 else 1
        assert f", {tile}, {rounded_up}, {cluster}>" in launch["kernel"]
        assert launch["cluster"] == cluster and launch["grid"][0] == blocks(owned, 128) * blocks(channels, tile)


def test_more_steps_than_stages(emulator):
    """Every stage is filled several times, by clusters too."""
    emulator.set_device(90, 1)
    assert_as_exact(inputs(1, 16, 136, 200, 1100, torch.bfloat16), 0.25)


@pytest.mark.parametrize("channels", [40, 136, 520])
def test_split_tiles(emulator, channels):
    """The streamed positions of few tiles are split, and a cluster's tiles are not parted."""
    emulator.set_device(90, 4)
    assert_as_exact(inputs(3, 16, channels, 250, 1500, torch.bfloat16), 0.25)
    tiles = 3 * 2 * blocks(channels, 256 if channels > 128 else 128)
    grids = [launch["grid"][0] for launch in launches(emulator, FORWARD)]
    assert sum(grids) > tiles and all(grid % 2 == 0 for grid in grids)


@pytest.mark.parametrize("key_channels", [16, 72])
def test_kept_keys(emulator, key_channels):
    """A key padding mask gives the bits of the kept keys alone, up to the order of the tiles; a sample without any, a
    logsumexp of -inf and zeros."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, key_channels, 140, 150, 400, torch.bfloat16)
    for n in (2, 3, 400):
        mask = every_nth(400, n)
        kept = ~mask[0]
        got = sums(run_masked(query, poisoned(key, mask), poisoned(value, mask), grad_output, mask))
        alone = sums(run_masked(query, key[:, :, kept].contiguous(), value[:, :, kept].contiguous(), grad_output))
        assert torch.equal(got[0], alone[0]) and torch.equal(got[1], alone[1]), n
        assert torch.equal(got[2][:, :, kept], alone[2]) and not got[2][:, :, mask[0]].any()
    nothing = torch.ones(1, 400, dtype=torch.bool)
    got = sums(run_masked(query, key, value, grad_output, nothing))
    assert not got[0].any() and (got[1] == -float("inf")).all() and not got[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key_channels", [32, 96])
def test_a_photograph(emulator, key_channels, dtype):
    """Features of regions: a query attends to many similar keys."""
    emulator.set_device(90, 2)
    query, key, value = (t.flatten(2) for t in region_features(20, 25, key_channels, 136, dtype, 6.0))
    grad_output = torch.randn(1, 136, 500, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = query, key, value, grad_output
    for name, *results in zip(SUMS, *(sums(f(*tensors)) for f in (run, eager, exact)), strict=True):
        if name != "logsumexp":
            assert_norm_as_exact_as_eager(name, *results)
    assert launches(emulator, FORWARD) and launches(emulator, VALUE_GRADIENT)


def test_expanded_tensors(emulator):
    """Stride 0 along batch or channels gives the bits of contiguous tensors: tensor maps get copies."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, 16, 40, 64, 80, torch.bfloat16)
    expanded = [
        query.expand(2, -1, -1), key[:, :1].expand(2, 16, -1), value.expand(2, -1, -1),
        grad_output[:, :1].expand(2, 40, -1),
    ]  # fmt: skip
    copies = [t.contiguous() for t in expanded]
    for got, expected in zip(sums(run(*expanded)), sums(run(*copies)), strict=True):
        assert torch.equal(got, expected)


def test_energies_far_apart(emulator):
    """The maximum grows by more than 2^8 in several steps: the sums are rescaled."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, 16, 136, 150, 600, torch.bfloat16)
    key = (key * torch.linspace(0.1, 20, 600)).to(torch.bfloat16)
    assert_as_exact((query, key, value, grad_output), -0.5)


@pytest.mark.parametrize("position", [149, 70])
def test_infinite_keys(emulator, position):
    """inf and NaN in one key affect no more elements than eager's; the last position is beside the zeros past the
    end."""
    emulator.set_device(90, 1)
    for number in (float("inf"), -float("inf"), float("nan")):
        tensors = inputs(1, 8, 40, 150, 150, torch.bfloat16)
        tensors[1][0, 3, position] = number
        for name, got, by_eager in zip(SUMS, sums(run(*tensors)), sums(eager(*tensors)), strict=True):
            assert torch.equal(got.isfinite() | ~by_eager.isfinite(), torch.ones_like(got, dtype=torch.bool)), name


@pytest.mark.parametrize("channels", [40, 136])
def test_any_schedule_gives_the_same_bits(emulator, channels):
    emulator.set_device(90, 3)
    tensors = inputs(1, 24, channels, 250, 260, torch.bfloat16)
    assert_same_bits(emulator, lambda: run(*tensors))


def test_work_and_traffic(emulator):
    """At 97 x 97, E = 64, C = 512, from four clusters of two blocks and ten steps of 64 keys: products at most 15% more
    than the definition's, 320 bytes of L2 for each key of a block, and 109 bytes of shared memory for each cycle of the
    tensor cores, which do 4,096 FLOP in one (docs/hopper.md)."""
    emulator.set_device(90, 1)
    query, key, value, _ = inputs(1, 64, 512, 512, 640, torch.bfloat16)
    OPERATORS.position_attention(query, key, value, 0.1)
    (launch,) = launches(emulator, FORWARD)
    products = launch["wgmma_flops"] / (4 * 10) * blocks(N97, 128) * blocks(N97, 64)
    needed = 2 * N97**2 * (64 + 512)
    assert needed <= products <= 1.15 * needed
    owned = 8 * 128 * 64 * 2
    assert launch["bulk_copy_bytes"] == owned + 8 * 640 * 320
    assert launch["bulk_delivered_bytes"] == owned + 8 * 640 * 640
    shared = launch["wgmma_shared_a_bytes"] + launch["wgmma_shared_b_bytes"] + 8 * 640 * 640
    assert shared / (launch["wgmma_flops"] / 4096) == pytest.approx(108.8)


def test_no_bank_conflicts(traced):
    traced.set_device(90, 1)
    run(*inputs(1, 64, 256, 256, 256, torch.bfloat16))
    for kind in (FORWARD, VALUE_GRADIENT):
        (launch,) = launches(traced, kind)
        for access in ("shared_read", "shared_write"):
            count = launch["memory"][access]
            assert count["wavefronts"] == count["ideal_wavefronts"] > 0, access


@pytest.mark.slow
def test_race_build(emulator):
    run_in("race", __file__, "(tiles or kept or conflicts or same_bits or expanded) and not float16")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "(tiles or kept or split) and not float16")
