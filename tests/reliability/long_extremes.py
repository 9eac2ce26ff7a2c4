"""Sizes that take minutes or gigabytes: pytest collects this file only by name. One process at a time, 7 GiB."""

import resource
import time

import pytest
import torch

import segattn_ops
from segattn_ops.ops import channel_energy

from ..families import FAMILIES
from ..ops.test_extremes import ONES, compare
from ..ops.test_non_finite import POISONS, TILES, Problem


def peak_kilobytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(autouse=True)
def _native():
    with segattn_ops.use_backend("native"):
        yield


def test_all_pairs_of_262144_positions(record_property):
    """512 x 512 positions attend to as many: 6.9e10 energies in O(N) memory. One query in 4096 is compared."""
    query, key = (torch.randn(1, 2, 512, 512, dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(1, 2, 512, 512, dtype=torch.bfloat16)
    segattn_ops.position_attention(query[..., :8, :8], key, value)
    before, start = peak_kilobytes(), time.perf_counter()
    output = segattn_ops.position_attention(query, key, value)
    used = peak_kilobytes() - before
    record_property("seconds of all pairs", round(time.perf_counter() - start))
    record_property("KiB of all pairs", used)
    assert used <= 64 * 1024  # the attention map takes 137 GB in bfloat16
    chosen = torch.arange(0, 512 * 512, 4096)
    energy = query.flatten(2)[0][:, chosen].float().T @ key.flatten(2)[0].float()
    exact = value.flatten(2)[0].double() @ energy.double().softmax(1).T
    got = output.flatten(2)[0][:, chosen].double()
    assert (got - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    record_property("inputs tried", 1)


def test_2_to_the_31_elements_of_the_query(record_property):
    """2^21 queries of 1025 channels (4.3 GB), whose last channel decides: the first and the last query attend to one of
    two keys each, those between to both."""
    queries, channels = 2**21, 2**10 + 1
    query = torch.zeros(1, channels, queries, dtype=torch.float16)
    assert query.numel() > 2**31
    query[0, -1, 0], query[0, -1, -1] = -10, 10
    key = torch.zeros(1, channels, 2, dtype=torch.float16)
    key[0, -1, 1] = 10
    value = torch.tensor([[[4.0, 8.0]]], dtype=torch.float16)
    output = segattn_ops.position_attention(query, key, value)[0, 0]
    assert output[0] == 4 and output[-1] == 8 and (output[1:-1] == 6).all()
    record_property("inputs tried", 1)


def test_2_to_the_31_elements_of_criss_cross_maps(record_property):
    """An aggregation whose weights have 2^31 elements and more in one sample after the other (4.3 GB): the last
    sample's result is that of the sample alone."""
    height, width = 64, 64
    one = torch.rand(1, height + width - 1, height, width).softmax(1).half()
    samples = 2**31 // one.numel() + 1
    attention = torch.zeros(samples, *one.shape[1:], dtype=torch.float16)
    attention[0] = attention[-1] = one[0]
    assert attention.numel() > 2**31
    value = torch.randn(1, 1, height, width).half().expand(samples, -1, -1, -1)
    output = segattn_ops.criss_cross_aggregation(attention, value)
    expected = segattn_ops.criss_cross_aggregation(one, value[:1])
    assert torch.equal(output[0], expected[0]) and torch.equal(output[-1], expected[0])
    assert not output[1:-1].any()
    record_property("inputs tried", 1)


def test_2_to_the_31_elements_of_channels(record_property):
    """Energies of 2 channels over 2^30 + 2^20 positions (4.3 GB), whole numbers, so that float32 sums them exactly."""
    x = torch.zeros(1, 2, 2**30 + 2**20, dtype=torch.float16)
    assert x.numel() > 2**31
    x[0, 0, 0], x[0, 0, -1], x[0, 1, -1] = 2, 3, 1
    assert channel_energy(x)[0].tolist() == [[13.0, 3.0], [3.0, 1.0]]
    record_property("inputs tried", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_every_element_of_a_kind(backend, family, dtype, record_property):
    """NaN and infinities in 200 elements of each tensor, one at a time."""
    if not backend.runs_large:
        pytest.skip("hours on the emulator")
    problem = Problem.make(family, TILES[family.operator], dtype)
    generator = torch.Generator().manual_seed(2)
    count = 0
    for which in range(len(problem.inputs) + 1):
        for _ in range(200):
            poison = POISONS[count % 3]
            tensors = problem.tensors()
            flat = tensors[which].view(-1)
            flat[torch.randint(flat.numel(), (), generator=generator)] = poison
            problem.assert_as_eager(backend, tensors, f"{poison} in tensor {which}", kinds_of_output=False)
            count += 1
    record_property("inputs tried", count)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_100000_samples(backend, family):
    """Forward and backward; a sample is the smallest feature map."""
    if not backend.runs_large:
        pytest.skip("hours on the emulator")
    one = ONES[family.operator][0]
    case = type(one)(tuple((100_000, *shape[1:]) for shape in one.shapes), one.scale)
    compare(backend, family, case, family.make(case, torch.float32))
