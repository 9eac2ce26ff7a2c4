"""The key padding mask of position attention on the emulator, beyond the operator suite: the kept keys alone decide on
bits and work, splits and groups without any kept key, launches and traffic, and the sanitizer builds."""

import math

import pytest
import torch

from ..emulated import assert_same_bits, global_bytes, run_in
from .test_host import HARMLESS, HARMLESS_TORCH
from .test_position import OPERATORS, exact, inputs, launches, relative_error

# Of mma.sync; Hopper's kernels have tests of their own.
pytestmark = pytest.mark.usefixtures("without_wgmma")

RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 2e-6, torch.float64: 1e-13}


def run(query, key, value, grad_output, mask=None, scale=0.3):
    output, logsumexp, *lows = OPERATORS.position_attention(query, key, value, scale, True, mask)
    lows = [t if t.shape[1] > 0 else None for t in lows]
    arguments = (grad_output, query, key, value, output, logsumexp, scale, *lows)
    return (
        output,
        logsumexp,
        *OPERATORS.position_attention_backward(*arguments, key_padding_mask=mask, keys_complete=True),
    )


def poisoned(tensor, mask):
    """NaN and inf in the padding."""
    poison = torch.tensor([math.nan, math.inf], dtype=tensor.dtype).repeat(tensor.shape[2])[: tensor.shape[2]]
    return torch.where(mask[:, None], poison, tensor)


def every_nth(keys, n, batch=1):
    """All keys are padding but one in n."""
    return (torch.arange(keys) % n != 0).repeat(batch, 1)


def kernel_names(emulator):
    return [r["kernel"].split("<")[0].removeprefix("segattn::cuda::") for r in emulator.report()]


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(16, 40, 70, 300), (64, 136, 33, 200), (100, 24, 130, 260)], ids=str)
def test_same_bits_as_the_kept_keys_alone(emulator, sizes, dtype):
    """On one multiprocessor, where the number of keys decides on no splits."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, *sizes, dtype)
    for n in (2, 3, sizes[-1]):
        mask = every_nth(sizes[-1], n)
        got = run(query, poisoned(key, mask), poisoned(value, mask), grad_output, mask)
        kept = ~mask[0]
        alone = run(query, key[:, :, kept].contiguous(), value[:, :, kept].contiguous(), grad_output)
        for name, a, b in zip(RESULTS, got, alone, strict=True):
            if name in ("grad_key", "grad_value"):
                assert not a[:, :, ~kept].any(), name
                a = a[:, :, kept]
            assert torch.equal(a, b), (name, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [75, 86, 90])
def test_splits_and_groups_without_keys(emulator, architecture, dtype):
    """Samples with no, few and all keys of 600: most splits and groups of the first two have none."""
    emulator.set_device(architecture)
    query, key, value, grad_output = inputs(3, 16, 40, 64, 600, dtype)
    mask = torch.zeros(3, 600, dtype=torch.bool)
    mask[0] = True
    mask[1, :300], mask[1, 303:] = True, True
    got = run(query, poisoned(key, mask), poisoned(value, mask), grad_output, mask)
    tensor_cores = architecture >= 80 and dtype != torch.float64
    if tensor_cores:
        (merge,) = launches(emulator, "merge_splits_kernel")
        (gradients,) = launches(emulator, "query_key_gradient_kernel")
        assert "Keys)1" in merge["kernel"] and gradients["grid"][0] > 3
    assert (got[1][0] == -math.inf).all()
    assert not any(got[i][0].any() for i in (0, 2, 3, 4))
    for sample in (1, 2):
        kept = ~mask[sample]
        one = slice(sample, sample + 1)
        expected = exact(query[one], key[one][..., kept], value[one][..., kept], grad_output[one], 0.3)
        for name, a, b in zip(RESULTS, got, expected, strict=True):
            a = a[one]
            if name in ("grad_key", "grad_value"):
                assert not a[..., ~kept].any()
                a = a[..., kept]
            assert relative_error(a, b) < TOLERANCE[dtype], (name, sample)


def test_more_keys_than_a_block_numbers_at_once(emulator):
    """key_slots_kernel numbers 1,024 keys at a time."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(1, 4, 8, 16, 2500, torch.float32)
    mask = torch.rand(1, 2500, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, 1024:2048] = True
    got = run(query, key, value, grad_output, mask)
    alone = run(query, key[:, :, ~mask[0]].contiguous(), value[:, :, ~mask[0]].contiguous(), grad_output)
    for a, b in zip(got[:3], alone[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_schedule_gives_the_same_bits(emulator, dtype):
    tensors = inputs(2, 24, 40, 100, 300, dtype)
    mask = every_nth(300, 3, 2)
    mask[1, 40:] = True
    assert_same_bits(emulator, lambda: run(*tensors, mask))


# ---- work ------------------------------------------------------------------------------------------------------------


def test_padding_takes_no_products(emulator):
    """Forward and the query and key gradient do the products of the kept keys. The value gradient owns keys: it does
    those of all, and the results of padding are left out."""
    emulator.set_device(90, 1)
    tensors = inputs(1, 64, 256, 128, 512, torch.bfloat16)
    run(*tensors, every_nth(512, 4))
    flops = {name: launches(emulator, name)[0]["mma_flops"] for name in ("weighted_sum", "query_key_gradient")}
    value_gradient = launches(emulator, "weighted_sum")[1]["mma_flops"]
    emulator.reset()
    run(*inputs(1, 64, 256, 128, 128, torch.bfloat16))
    assert flops == {name: launches(emulator, name)[0]["mma_flops"] for name in flops}
    assert value_gradient == 4 * launches(emulator, "weighted_sum")[1]["mma_flops"]


def test_launches(emulator):
    """Without a mask, none of the instances for kept keys; with one, the numbering and two copies, and after the
    backward pass two more."""
    emulator.set_device(90, 1)
    tensors = inputs(1, 16, 40, 64, 64, torch.bfloat16)
    run(*tensors)
    plain = kernel_names(emulator)
    assert not any("Keys)1" in r["kernel"] for r in emulator.report())
    gradients = ["delta_kernel", "weighted_sum_kernel", "query_key_gradient_kernel", *["sum_partials_kernel"] * 2]
    assert plain == ["weighted_sum_kernel", *gradients]
    emulator.reset()
    run(*tensors, every_nth(64, 2))
    before = ["key_slots_kernel", "gather_kept_kernel", "gather_kept_kernel"]
    assert kernel_names(emulator) == [*before, *plain[:1], *before, *plain[1:], *["scatter_kept_kernel"] * 2]


@pytest.mark.parametrize("architecture", [75, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nothing_waits_for_the_device(emulator, architecture, dtype):
    """The numbers of kept keys are never read back, so that calls can be captured in a CUDA graph."""
    emulator.set_device(architecture)
    tensors, mask = inputs(1, 16, 24, 64, 64, dtype), every_nth(64, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*tensors, mask)
    assert emulator.report() and set(emulator.calls()) <= HARMLESS
    assert {event.name for event in profile.events() if event.name.startswith("aten::")} <= HARMLESS_TORCH


def test_traffic(traced):
    """Beside the attention, a masked call moves the mask, a slot a key, and key and value twice: O(M)."""
    traced.set_device(90, 1)
    key_channels, channels, keys = 16, 64, 2048
    query, key, value, _ = inputs(1, key_channels, channels, 64, keys, torch.bfloat16)
    mask = every_nth(keys, 2)
    OPERATORS.position_attention(query, key, value, 1.0, False, mask)
    (numbering,) = launches(traced, "key_slots_kernel")
    assert global_bytes(numbering) == {"global_read": keys, "global_write": 4 * keys + 32}
    gathers = [global_bytes(launch, sectors=False) for launch in launches(traced, "gather_kept_kernel")]
    for rows, moved in zip((key_channels, channels), gathers, strict=True):
        kept, slots = 2 * rows * keys // 2, 8 * keys * math.ceil(rows / 16)  # a slot and the count, every 16 rows
        assert moved == {"global_read": kept + slots, "global_write": 2 * rows * keys}


# ---- sanitizer builds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_race_build(emulator):
    """Shared-memory races fail; memory accesses are counted."""
    run_in("race", __file__, "traffic or numbers_at_once or (splits_and_groups and 90 and not float16 and not float64)")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "numbers_at_once or (splits_and_groups and not 86 and not float16)")
