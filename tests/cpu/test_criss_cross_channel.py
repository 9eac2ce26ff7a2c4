"""Internals of the CPU kernels of criss-cross and channel attention: threads, work, memory, long lines."""

import ctypes
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segattn_ops
from segattn_ops import _library, reference

from ..families import eager_criss_cross
from ..tolerance import assert_as_exact_as_eager

CONFIG = segattn_ops.build_config()["cpu"]
pytestmark = pytest.mark.skipif(not CONFIG["native"], reason=f"no native CPU kernels: {CONFIG['why_not']}")
ROOT = Path(__file__).parents[2]
OPERATORS = torch.ops.segattn


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def multiply_adds():
    """The multiply-adds of a call, padding included."""
    library = ctypes.CDLL(str(_library._path(f"_cpu_{CONFIG['instruction_set']}")))
    take = library.segattn_cpu_take_multiply_adds
    take.restype = ctypes.c_int64

    def of(function, *args, **kwargs) -> int:
        take()
        function(*args, **kwargs)
        return take()

    return of


def feature_maps(*channels: int, height: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(1, c, height, width).to(dtype) for c in channels]


def run_criss_cross(height: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    q, k, v, grad = feature_maps(12, 12, 37, 37, height=height, width=width, dtype=dtype)
    output, logsumexp, low = OPERATORS.criss_cross_attention(q, k, v, 0.5)
    grads = OPERATORS.criss_cross_attention_backward(grad, q, k, v, output, logsumexp, 0.5, low, keys_complete=True)
    affinity = OPERATORS.criss_cross_affinity(q, k)
    results = [output, logsumexp, *grads, affinity, OPERATORS.criss_cross_aggregation(affinity, v)]
    results += OPERATORS.criss_cross_affinity_backward(affinity, q, k)
    results += OPERATORS.criss_cross_aggregation_backward(grad, affinity, v)
    return results


def run_channel(height: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    q, k, v, grad = feature_maps(90, 75, 75, 90, height=height, width=width, dtype=dtype)
    output, logsumexp = OPERATORS.channel_attention(q, k, v, -0.1)
    results = [output, logsumexp]
    results += OPERATORS.channel_attention_backward(grad, q, k, v, -0.1)
    gamma = logsumexp  # (B, C)
    for optional in ((), (gamma,)):
        results += OPERATORS.channel_self_attention(q, -0.1, *optional)
        results += OPERATORS.channel_self_attention_backward(grad, q, -0.1, *optional)
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "run, height, width",
    [(run_criss_cross, 35, 150), (run_criss_cross, 20, 16), (run_criss_cross, 1, 16), (run_channel, 43, 51)],
)
def test_bitwise_equal_for_every_thread_count(threads, run, height, width, dtype):
    """Where a sum runs across work units, the cut must not depend on the threads, nor may a sum start early."""
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(run(height, width, dtype))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_self_attention_computes_half_of_the_energy(multiply_adds):
    """C = 240, N = 2000. One input computes half of the energy, in whole blocks of 48 on the diagonal."""
    x = torch.randn(1, 240, 2000)
    product = 240 * 240 * 2000
    forward = multiply_adds(OPERATORS.channel_self_attention, x, -0.01)
    backward = multiply_adds(OPERATORS.channel_self_attention_backward, x, x, -0.01)
    assert 1.5 * product <= forward <= 1.65 * product
    assert 3.5 * product <= backward <= 3.65 * product
    rectangular = multiply_adds(OPERATORS.channel_attention, x, x, x, -0.01)
    assert 2 * product <= rectangular <= 2.02 * product


@pytest.mark.parametrize(
    "dtype, size, padding",
    [
        (torch.float32, 96, 1.0),
        (torch.bfloat16, 96, 1.0),
        (torch.float32, 97, 1.02),
        (torch.bfloat16, 97, 1.08),
    ],
)
def test_criss_cross_work_is_the_arithmetic(multiply_adds, dtype, size, padding):
    """N (H + W) pairs times E + C forward, times 3 E + 2 C backward, plus N W E for the rows' mean key. The 97th column
    takes 4 lanes, not 16. The 97th position of a row is padded to a vector only where results are rounded."""
    q, k, v, grad = feature_maps(32, 32, 64, 64, height=size, width=size, dtype=dtype)
    output, logsumexp, low = OPERATORS.criss_cross_attention(q, k, v, 1.0)
    pairs = 2 * size**3
    forward = multiply_adds(OPERATORS.criss_cross_attention, q, k, v, 1.0)
    assert pairs * 96 <= forward <= pairs * 96 * padding
    arguments = (grad, q, k, v, output, logsumexp, 1.0, low)
    for complete in (False, True):
        backward = multiply_adds(OPERATORS.criss_cross_attention_backward, *arguments, keys_complete=complete)
        products = pairs * (3 * 32 + 2 * 64) + complete * size**3 * 32
        assert products <= backward <= products * padding


SUBSETS = [list(needs) for needs in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_criss_cross_work_of_the_gradients_that_are_asked_for(multiply_adds, needs):
    size = 48
    q, k, v, grad = feature_maps(32, 32, 64, 64, height=size, width=size, dtype=torch.float32)
    output, logsumexp, low = OPERATORS.criss_cross_attention(q, k, v, 1.0)
    arguments = (grad, q, k, v, output, logsumexp, 1.0, low, None, needs, True)
    for_query, for_key, for_value = needs
    channels = (any(needs) + for_query + for_key) * 32 + ((for_query or for_key) + for_value) * 64
    expected = 2 * size**3 * channels + for_query * size**3 * 32  # the rows' mean key
    assert multiply_adds(OPERATORS.criss_cross_attention_backward, *arguments) == expected


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_channel_work_of_the_gradients_that_are_asked_for(multiply_adds, needs):
    q, k, v, grad = (torch.randn(1, 96, 480) for _ in range(4))
    for_query, for_key, for_value = needs
    products = any(needs) + (for_query or for_key) + sum(needs)
    assert multiply_adds(OPERATORS.channel_attention_backward, grad, q, k, v, 0.1, needs) == products * 96 * 96 * 480


def test_work_of_the_gradients_of_two_inputs(multiply_adds):
    """Half of the symmetric energy is computed, in blocks of up to 48 on the diagonal."""
    x, grad = torch.randn(1, 96, 480), torch.randn(1, 96, 480)
    gamma = torch.ones(1, 96)
    work = {
        needs: multiply_adds(OPERATORS.channel_self_attention_backward, grad, x, 0.1, gamma, list(needs))
        for needs in itertools.product([False, True], repeat=2)
    }
    product = 96 * 96 * 480
    assert work[False, False] == 0
    assert 1.5 * product <= work[False, True] <= 1.8 * product  # energy, dP
    assert work[True, True] == work[True, False] == work[False, True] + 2 * product
    q, k, v, grad = feature_maps(32, 32, 64, 64, height=48, width=48, dtype=torch.float32)
    affinity = OPERATORS.criss_cross_affinity(q, k)
    pairs = 2 * 48**3
    for needs in itertools.product([False, True], repeat=2):
        count = sum(needs)
        function = OPERATORS.criss_cross_affinity_backward
        assert multiply_adds(function, affinity, q, k, list(needs)) == count * pairs * 32
        function = OPERATORS.criss_cross_aggregation_backward
        assert multiply_adds(function, grad, affinity, v, list(needs)) == count * pairs * 64


@pytest.mark.parametrize("shape", [(1, 3, 5, 300, 6), (1, 3, 5, 7, 600), (1, 2, 3, 1, 257), (1, 2, 3, 129, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_long_lines_go_in_blocks_of_queries(shape, dtype):
    """Beyond 105 rows or 256 columns weights are computed in blocks of queries, and gradients summed over blocks."""
    batch, e, c, height, width = shape
    inputs = [torch.randn(batch, n, height, width).to(dtype) for n in (e, e, c)]
    grad = torch.randn(batch, c, height, width).to(dtype)

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        output = function(*leaves, 0.7)
        return output, *torch.autograd.grad(output, leaves, grad.to(dtype))

    got = run(segattn_ops.criss_cross_attention, dtype)
    eager = run(eager_criss_cross, dtype)
    exact = run(lambda *a: reference.criss_cross_attention(*a)[0], torch.float64)
    for name, *tensors in zip(("output", "grad_query", "grad_key", "grad_value"), got, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *tensors)


def test_a_batch_in_several_groups_is_its_samples():
    """512 x 512 energies of 17 samples: forward 16 samples share a buffer, backward 5."""
    x, grad = (torch.randn(17, 512, 2, 2) for _ in range(2))
    gamma = torch.linspace(-1, 1, 17 * 512).reshape(17, 512)

    def results(x, grad, gamma):
        output, logsumexp = OPERATORS.channel_self_attention(x, -0.3, gamma)
        energy = OPERATORS.channel_energy(x, x.flip(1))
        return (
            output,
            logsumexp,
            *OPERATORS.channel_self_attention_backward(grad, x, -0.3, gamma),
            *OPERATORS.channel_attention_backward(grad, x, x.flip(1), x, 0.3),
            *OPERATORS.channel_energy_backward(energy, x, x.flip(1)),
            *OPERATORS.channel_apply(energy, x, 0.3, gamma),
            *OPERATORS.channel_apply_backward(grad, energy, x, 0.3, gamma),
        )

    whole = results(x, grad, gamma)
    for sample in (0, 5, 16):
        one = slice(sample, sample + 1)
        for got, expected in zip(whole, results(x[one], grad[one], gamma[one]), strict=True):
            assert torch.equal(got[one], expected)


PEAK = """
import resource, sys, torch, segattn_ops
op, channels, height, width = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)
x = torch.ones(1, channels, height, width)
q = torch.ones(1, 8, height, width)
operators = torch.ops.segattn

def run(x, q):
    if op == "criss_cross":
        output, *statistics = operators.criss_cross_attention(q, q, x, 1.0)
        backward = operators.criss_cross_attention_backward
        return output, backward(x, q, q, x, output, statistics[0], 1.0, statistics[1], keys_complete=True)
    output, logsumexp = operators.channel_self_attention(x, -1.0)
    return output, operators.channel_self_attention_backward(x, x, -1.0)

run(x[:, :, :4, :4], q[:, :, :4, :4])  # loads the code and starts the threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = run(x, q)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = [result[0], *result[1]]
print((after - before) * 1024 - sum(t.nbytes for t in kept))
"""


@pytest.mark.parametrize(
    "op, channels, height, width, limit",
    [
        # The weights, H + W - 1 channels, would take 170 MB; gradients and output take 42.
        ("criss_cross", 64, 192, 384, 40),
        ("criss_cross", 64, 97, 97, 12),
        # N is 512 times C: a temporary of the input's size would take 32 MB.
        ("channel_self", 128, 256, 256, 8),
    ],
)
def test_extra_memory_is_bounded(op, channels, height, width, limit):
    """The peak in MiB beyond inputs, output and gradients, of forward and backward on two threads."""
    command = [sys.executable, "-c", PEAK, op, str(channels), str(height), str(width)]
    extra = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert extra <= limit * 2**20
