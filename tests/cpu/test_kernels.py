"""Internals of the CPU kernels: exp, work, memory, threads, every instruction set that this processor supports."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import segattn_ops
from segattn_ops import _library

CONFIG = segattn_ops.build_config()["cpu"]
pytestmark = pytest.mark.skipif(not CONFIG["native"], reason=f"no native CPU kernels: {CONFIG['why_not']}")
ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = [
    name
    for name in _library.CPU_CAPABILITIES
    if name in CONFIG["built"]
    and _library.CPU_CAPABILITIES.index(name) <= _library.CPU_CAPABILITIES.index(CONFIG["supports"] or "baseline")
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library._path(f"_cpu_{CONFIG['instruction_set']}")))
    library.segattn_cpu_take_multiply_adds.restype = ctypes.c_int64
    library.segattn_cpu_take_packed.restype = ctypes.c_int64
    return library


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def vector_exp(library: ctypes.CDLL, x: numpy.ndarray) -> numpy.ndarray:
    result = numpy.empty_like(x)
    function = {"float32": library.segattn_cpu_exp_float, "float64": library.segattn_cpu_exp_double}[str(x.dtype)]
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(result.ctypes.data), ctypes.c_int64(x.size))
    return result


def arguments_over_the_range(dtype: type, count: int) -> numpy.ndarray:
    """Arguments whose exp is a normal number, spaced evenly in the bit pattern (all exponents) and in value."""
    info = numpy.finfo(dtype)
    lowest, highest = dtype(numpy.log(info.tiny)), dtype(numpy.log(info.max))
    bits = numpy.int32 if dtype is numpy.float32 else numpy.int64
    positive = numpy.linspace(0, highest.view(bits), count).astype(bits).view(dtype)
    negative = -numpy.linspace(0, (-lowest).view(bits), count).astype(bits).view(dtype)
    even = numpy.random.default_rng(0).uniform(lowest, highest, 4 * count).astype(dtype)
    x = numpy.concatenate([positive, negative, even])
    exact = numpy.exp(x.astype(numpy.longdouble))
    return x[(exact >= info.tiny) & (exact <= info.max)]


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_exp_error_bound(library, dtype):
    """The bound that csrc/cpu/common/exp.h states: 1.5 eps relative where the result is normal."""
    x = arguments_over_the_range(dtype, 400_000)
    exact = numpy.exp(x.astype(numpy.longdouble))
    assert numpy.finfo(numpy.longdouble).eps <= numpy.finfo(dtype).eps / 1000
    error = numpy.abs(vector_exp(library, x) - exact) / exact / numpy.finfo(dtype).eps
    assert error.max() <= 1.5


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_exp_of_the_extremes(library, dtype):
    info = numpy.finfo(dtype)
    x = numpy.array([-numpy.inf, numpy.inf, numpy.nan, 0.0, -0.0, info.min, info.max, 2 * numpy.log(info.tiny)], dtype)
    expected = numpy.array([0, numpy.inf, numpy.nan, 1, 1, 0, numpy.inf, 0], dtype)
    numpy.testing.assert_array_equal(vector_exp(library, x), expected)


def position_inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """shape is (B, E, C, N, M); query, key, value, grad_output."""
    batch, e, c, n, m = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, e, n), (batch, e, m), (batch, c, m), (batch, c, n)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def position_forward_backward(query, key, value, grad_output, scale=0.3):
    operators = torch.ops.segattn
    output, logsumexp, *lows = operators.position_attention(query, key, value, scale, True)
    lows = [t if t.shape[1] > 0 else None for t in lows]
    gradients = operators.position_attention_backward(
        grad_output, query, key, value, output, logsumexp, scale, *lows, keys_complete=True
    )
    return output, logsumexp, *gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 24, 40, 1999, 1500), (1, 16, 33, 1500, 110), (3, 8, 20, 97, 50)],  # operands shared by all units
        *[(1, 16, 520, 1500, 1100), (1, 300, 300, 1800, 110)],  # operands packed by each unit
    ],
    ids=str,
)
def test_position_is_bitwise_equal_for_every_number_of_threads(threads, shape, dtype):
    inputs = position_inputs(shape, dtype)
    threads(1)
    expected = position_forward_backward(*inputs)
    for count in (2, 3, 7):
        threads(count)
        for got, want in zip(position_forward_backward(*inputs), expected, strict=True):
            assert torch.equal(got, want), f"{count} threads"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 8, 16, 35, 35), (1, 33, 70, 200, 110), (1, 16, 40, 700, 333), (1, 9, 520, 1500, 1100)], ids=str
)
def test_position_against_float64_autograd(shape, dtype):
    """tests/ops compares too; this test runs for every instruction set (test_instruction_set)."""
    query, key, value, grad_output = position_inputs(shape, dtype)

    def autograd(dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (query, key, value)]
        energy = 0.3 * (leaves[0].mT @ leaves[1])
        output = leaves[2] @ energy.softmax(2).mT
        output.backward(grad_output.to(dtype))
        return output.detach(), energy.detach().logsumexp(2), *(t.grad for t in leaves)

    got = position_forward_backward(query, key, value, grad_output)
    for ours, eager, exact in zip(got, autograd(dtype), autograd(torch.float64), strict=True):
        error = (ours.double() - exact).abs().max()
        eager_error = (eager.double() - exact).abs().max()
        # In float64 the exact result is eager's, whose error is then 0: the floor covers the rounding.
        floor = (64 if ours.dtype == torch.float64 else 16) * torch.finfo(ours.dtype).eps
        assert error <= 2 * eager_error + floor * exact.abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_in_several_groups_is_its_samples(masked):
    """17 samples of 4,096 keys: forward 16 samples share a buffer, backward 7."""
    query, key, value, grad_output = position_inputs((17, 8, 120, 8, 4096), torch.float32)
    mask = torch.rand(17, 4096, generator=torch.Generator().manual_seed(1)) < 0.3 if masked else None

    def results(one):
        tensors = [t[one] for t in (query, key, value, grad_output)]
        own_mask = None if mask is None else mask[one]
        operators = torch.ops.segattn
        output, logsumexp, _, low = operators.position_attention(*tensors[:3], 0.3, True, own_mask)
        gradients = operators.position_attention_backward(
            tensors[3], *tensors[:3], output, logsumexp, 0.3, None, low, None, [True] * 3, own_mask, True
        )
        return output, logsumexp, *gradients

    whole = results(slice(None))
    for sample in (0, 7, 16):
        one = slice(sample, sample + 1)
        for got, expected in zip(whole, results(one), strict=True):
            torch.testing.assert_close(got[one], expected)


def test_energies_of_minus_infinity():
    """Energies of -inf for a whole tile of keys, and finite ones later, give no NaN from -inf - -inf."""
    query, key, value, grad_output = position_inputs((1, 4, 8, 20, 400), torch.float32)
    query = query.abs()
    key[:, :, :300] = -float("inf")
    got = torch.ops.segattn.position_attention(query, key, value, 1.0)
    expected = torch.ops.segattn.position_attention(query, key[:, :, 300:], value[:, :, 300:], 1.0)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [20, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_of_minus_infinity_have_no_gradient(dtype, queries):
    """Their weights are 0. An odd number of queries is padded with 0, and 0 * -inf = NaN must not reach a gradient."""
    query, key, value, grad_output = position_inputs((1, 4, 8, queries, 150), dtype)
    query = query.abs()
    key[:, :, 100:] = -float("inf")
    *_, _, _, grad_value = position_forward_backward(query, key, value, grad_output, 1.0)
    kept = position_forward_backward(query, key[:, :, :100], value[:, :, :100], grad_output, 1.0)[-1]
    torch.testing.assert_close(grad_value[:, :, :100], kept)
    assert not grad_value[:, :, 100:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "overhead"),
    [
        ((1, 64, 512, 33 * 33, 33 * 33), 1.03),  # 1089 queries are 69 vectors of 16
        # 97 queries are 7 vectors of 16: 1.155, and with pairs of keys 1.167; whole panels of 48 would take 1.48
        ((1, 64, 512, 97, 97), 1.17),
        ((1, 64, 256, 97 * 40, 110), 1.05),
    ],
    ids=str,
)
def test_position_work(library, shape, overhead, dtype):
    """Multiply-adds, padding included, against NM(E + C) forward and NM(3E + 2C) backward. Where the keys are complete
    and more than one tile, float32 adds NME for the mean keys."""
    query, key, value, grad_output = position_inputs(shape, dtype)
    _, e, c, n, m = shape
    library.segattn_cpu_take_multiply_adds()
    output, logsumexp, *_ = torch.ops.segattn.position_attention(query, key, value, 0.1)
    forward = library.segattn_cpu_take_multiply_adds()
    assert n * m * (e + c) <= forward <= overhead * n * m * (e + c)
    for complete in (False, True):
        torch.ops.segattn.position_attention_backward(
            grad_output, query, key, value, output, logsumexp, 0.1, keys_complete=complete
        )
        backward = library.segattn_cpu_take_multiply_adds()
        products = (4 if complete and dtype == torch.float32 and m > 128 else 3) * e + 2 * c
        assert n * m * products <= backward <= overhead * n * m * products


SUBSETS = [list(needs) for needs in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
@pytest.mark.parametrize("keys", [96, 480])
def test_position_work_of_the_gradients_that_are_asked_for(library, keys, needs):
    """Multiply-adds and packed elements. Sizes without padding; operands are shared by all units."""
    e, c, n = 16, 48, 480
    inputs = position_inputs((1, e, c, n, keys), torch.float32)
    query, key, value, grad_output = inputs
    output, logsumexp, *_ = torch.ops.segattn.position_attention(query, key, value, 0.1)
    library.segattn_cpu_take_multiply_adds(), library.segattn_cpu_take_packed()
    torch.ops.segattn.position_attention_backward(
        grad_output, query, key, value, output, logsumexp, 0.1, needs_input_grad=needs, keys_complete=True
    )
    for_query, for_key, for_value = needs
    energies, mean_keys = for_query or for_key, for_query and keys > 128
    products = (any(needs) + mean_keys + for_query + for_key) * e + (energies + for_value) * c
    assert library.segattn_cpu_take_multiply_adds() == n * keys * products
    of_a_key = (any(needs) + for_query) * e + energies * c
    of_a_query = (any(needs) + for_key) * e + (energies + for_value) * c
    assert library.segattn_cpu_take_packed() == keys * of_a_key + n * of_a_query


def test_padding_takes_no_arithmetic(library):
    """Keys that are padding cost neither products nor packing: a call with 480 keys of 960 is one with 480."""
    query, key, value, grad_output = position_inputs((2, 16, 48, 480, 960), torch.float32)
    mask = torch.zeros(2, 960, dtype=torch.bool)
    mask[:, 1::2] = True

    def work(key, value, mask) -> list[int]:
        library.segattn_cpu_take_multiply_adds(), library.segattn_cpu_take_packed()
        output, logsumexp, *_ = torch.ops.segattn.position_attention(query, key, value, 0.1, False, mask)
        torch.ops.segattn.position_attention_backward(
            grad_output, query, key, value, output, logsumexp, 0.1, key_padding_mask=mask, keys_complete=True
        )
        return [library.segattn_cpu_take_multiply_adds(), library.segattn_cpu_take_packed()]

    kept = work(key[..., ::2].contiguous(), value[..., ::2].contiguous(), None)
    assert work(key, value, mask) == kept
    assert kept[0] > 0 and kept[1] > 0
    assert work(key, value, torch.ones_like(mask)) == [0, 0]


@pytest.mark.parametrize(
    ("shape", "key_times", "query_times"),
    [
        ((1, 64, 512, 16 * 16, 16 * 16), 1, 1),  # a small feature map: shared by all units
        ((1, 64, 512, 33 * 33, 33 * 33), 1, 1),
        ((1, 256, 256, 97 * 40, 110), 8, 1),  # one key group: each query is in one unit
        ((1, 64, 512, 48 * 48, 48 * 48), 8, 8),
    ],
    ids=str,
)
def test_position_packing(library, shape, key_times, query_times):
    """How often the backward pass packs its operands: 2 E + C elements of a key, 2 E + 2 C of a query."""
    query, key, value, grad_output = position_inputs(shape, torch.float32)
    _, e, c, n, m = shape
    output, logsumexp, *_ = torch.ops.segattn.position_attention(query, key, value, 0.1)
    library.segattn_cpu_take_packed()
    torch.ops.segattn.position_attention_backward(
        grad_output, query, key, value, output, logsumexp, 0.1, keys_complete=True
    )
    assert library.segattn_cpu_take_packed() == key_times * m * (2 * e + c) + query_times * n * (2 * e + 2 * c)


MEASURE_MEMORY = """
import ctypes, sys, torch
from tests.cpu.test_kernels import position_inputs

def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) * 1024

def forward_backward(size):
    query, key, value, grad_output = position_inputs((1, 64, 512, size, size), getattr(torch, sys.argv[1]))
    operators = torch.ops.segattn
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # heap memory left by the inputs would hide the same amount
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # resets the peak
    before = memory("VmRSS")
    output, logsumexp, *_ = operators.position_attention(query, key, value, 0.1)
    gradients = operators.position_attention_backward(
        grad_output, query, key, value, output, logsumexp, 0.1, keys_complete=True
    )
    return memory("VmHWM") - before - sum(t.nbytes for t in (output, logsumexp, *gradients))

torch.set_num_threads(2)
forward_backward(64)  # starts the threads and loads the libraries
print(forward_backward(97 * 97))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("dtype", "eager", "part"), [("float32", 1367, 25), ("bfloat16", 664, 15)])
def test_position_memory(dtype, eager, part):
    """Extra memory of forward and backward at 97 x 97, E = 64, C = 512, at most a `part`-th of eager's, in MiB."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, dtype], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert int(out.stdout) <= eager / part * 2**20


@pytest.mark.skipif("SEGATTN_CPU_CAPABILITY" in os.environ, reason="SEGATTN_CPU_CAPABILITY selects one instruction set")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_set(name):
    """Runs this file's other tests with that instruction set's library, in a separate process."""
    if name == CONFIG["instruction_set"]:
        pytest.skip("the tests of this process use this instruction set")
    tests = ["-k", "exp or autograd or threads or infinity or work or packing", str(Path(__file__))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=os.environ | {"SEGATTN_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
