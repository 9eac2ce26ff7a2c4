"""Properties that need a device: streams and memory reuse, CUDA graphs, a second device, TF32 rounding.

The tests also run on the CPU kernels and the emulator, with torch.cpu's streams, which do nothing, and a graph that
calls its function again. There they only check the test code itself."""

import math

import pytest
import torch

from segattn_ops import _precision

from ..families import FAMILIES, Case, Family

CASES = [
    pytest.param(family, case, id=f"{family.operator}-{case}")
    for family in FAMILIES
    for case in (family.cases[0], next(c for c in family.cases if c.large))
    if torch.cuda.is_available() or not case.large  # for overlapping launches
]
FIRST_CASES = [pytest.param(family, family.cases[0], id=family.operator) for family in FAMILIES]
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d).removeprefix("torch."))
DELAY_CYCLES = 40_000_000  # about 20 ms, far longer than the host takes to enqueue a test's work


@pytest.fixture
def streams(kernels):
    """The module with the device's streams and synchronisation: torch.cuda, or torch.cpu, which has the same names."""
    return getattr(torch, kernels.device)


def delay(kernels) -> None:
    """Delays the current stream, so that work which does not wait for it runs too early."""
    if kernels.device == "cuda":
        torch.cuda._sleep(DELAY_CYCLES)


def results(family: Family, case: Case, inputs: list, grad_output=None) -> list[torch.Tensor]:
    """The output and the gradient of every input, for a fixed random grad_output if none is given."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = family.function(*leaves, *case.scalars)
    if grad_output is None:
        grad_output = grad_output_like(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def grad_output_like(output: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


@pytest.fixture
def prepared(kernels, family, case, dtype):
    """(inputs, grad_output, expected results), all computed and on the device."""
    if case.large and kernels.device != "cuda":
        pytest.skip("the large case is for overlapping launches, which need a device")
    inputs = family.make(case, dtype, kernels.device)
    grad_output = grad_output_like(family.function(*inputs, *case.scalars))
    expected = results(family, case, inputs, grad_output)
    getattr(torch, kernels.device).synchronize()
    return inputs, grad_output, expected


def spoiled(tensors) -> list[torch.Tensor]:
    """Tensors of the same sizes filled with NaN. The allocator reuses memory freed on this stream for them, if any."""
    return [torch.full_like(t, math.nan) for t in tensors]


def assert_same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a.cpu(), b.cpu()), f"result {index} differs"


class TestStreams:
    @DTYPE
    @pytest.mark.parametrize(("family", "case"), CASES)
    def test_a_stream_that_lags_behind(self, kernels, streams, family, case, dtype, prepared):
        """The inputs are written on the stream long after the call returns, and their memory is reused after it. A
        launch on another stream would read NaN or overwrite reused memory."""
        inputs, grad_output, expected = prepared
        side = streams.Stream()
        got = []
        with streams.stream(side):
            for _ in range(3):
                delay(kernels)
                arriving = spoiled(inputs)
                for target, source in zip(arriving, inputs, strict=True):
                    target.copy_(source)
                got.append(results(family, case, arriving, grad_output))
                del arriving, target
                spoiled([*inputs, grad_output, *expected])
        streams.synchronize()
        for each in got:
            assert_same_bits(each, expected)

    @DTYPE
    @pytest.mark.parametrize(("family", "case"), CASES)
    def test_inputs_of_another_stream(self, kernels, streams, family, case, dtype, prepared):
        """The inputs are allocated on the default stream and freed there while the side stream is still delayed."""
        inputs, grad_output, expected = prepared
        side = streams.Stream()
        borrowed = [t.clone() for t in inputs]
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            delay(kernels)
            got = results(family, case, borrowed, grad_output)
        if kernels.device == "cuda":  # PyTorch requires this for memory used on a stream other than its own
            for t in borrowed:
                t.record_stream(side)
        del borrowed
        spoiled([*inputs, *inputs])
        streams.synchronize()
        assert_same_bits(got, expected)

    @DTYPE
    @pytest.mark.parametrize(("family", "case"), FIRST_CASES)
    def test_the_backward_runs_on_the_forwards_stream(self, kernels, streams, family, case, dtype, prepared):
        """Autograd runs the backward on the forward's stream, in its own thread, whatever the caller's stream is."""
        inputs, grad_output, expected = prepared
        side = streams.Stream()
        leaves = [t.detach().requires_grad_() for t in inputs]
        with streams.stream(side):
            delay(kernels)
            output = family.function(*leaves, *case.scalars)
        gradients = torch.autograd.grad(output, leaves, grad_output)
        streams.synchronize()
        assert_same_bits([output.detach(), *gradients], expected)


def capture(kernels, function):
    """(results of ``function``, a function that recomputes them in place): a CUDA graph, or another call on the CPU."""
    if kernels.device != "cuda":
        captured = function()

        def replay():
            for target, again in zip(captured, function(), strict=True):
                target.copy_(again)

        return captured, replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    return captured, graph.replay


@DTYPE
@pytest.mark.parametrize(("family", "case"), CASES)
def test_forward_and_backward_in_a_graph(kernels, streams, family, case, dtype, prepared):
    """Captured once and replayed with other inputs while other memory is reused."""
    inputs, grad_output, expected = prepared
    other = [t.flip(0, -1) * 0.75 for t in inputs]
    expected_of_other = results(family, case, other, grad_output)
    static = [t.clone() for t in other]
    captured, replay = capture(kernels, lambda: results(family, case, static, grad_output))
    for source, want in ((inputs, expected), (other, expected_of_other), (inputs, expected)):
        for target, t in zip(static, source, strict=True):
            target.copy_(t)
        spoiled([*inputs, *expected])
        replay()
        streams.synchronize()
        assert_same_bits(captured, want)


@DTYPE
@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_another_device_than_the_current_one(kernels, family, case, dtype, prepared):
    devices = ("cpu", "cpu")
    if kernels.device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device")
        if torch.cuda.get_device_properties(0).name != torch.cuda.get_device_properties(1).name:
            pytest.skip("two devices of different kinds: the results need not have the same bits")
        devices = ("cuda:0", "cuda:1")
        current = torch.cuda.current_device()
    inputs, grad_output, expected = prepared
    for device in devices:
        got = results(family, case, [t.to(device) for t in inputs], grad_output.to(device))
        assert {str(t.device) for t in got} == {device}
        assert_same_bits(got, expected)
    if kernels.device == "cuda":
        assert torch.cuda.current_device() == current


@pytest.fixture
def choose_products(kernels):
    """Sets the precision of float32 matrix products by either of torch's two settings; restores it afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision

    def follow():
        if kernels.name == "emulated":  # calls with CPU tensors do not read the CUDA settings
            _precision.follow_tf32_setting(kernels.namespace)

    def choose(way: str, tf32: bool) -> None:
        if way == "allow_tf32":
            settings.allow_tf32 = tf32
        else:
            settings.fp32_precision = "tf32" if tf32 else "ieee"
        follow()

    yield choose
    settings.fp32_precision = before
    follow()


@pytest.mark.parametrize("way", ["allow_tf32", "fp32_precision"])
@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_tf32_is_used_where_torch_allows_it(kernels, choose_products, family, case, way):
    """Output and gradients have float32's error unless TF32 is allowed, and TF32's error if it is."""
    inputs = family.make(case, torch.float32, kernels.device)
    exact_inputs = [t.double().cpu() for t in inputs]
    leaves = [t.requires_grad_() for t in exact_inputs]
    exact_output = family.definition(*leaves, *case.scalars)
    grad_output = grad_output_like(exact_output.detach()).float()
    exact = [exact_output.detach(), *torch.autograd.grad(exact_output, leaves, grad_output.double())]
    follows = kernels.name != "cpu" and not family.operator.startswith(("channel", "residual"))
    if kernels.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        follows = False
    for tf32 in (False, True, False):
        choose_products(way, tf32)
        got = results(family, case, inputs, grad_output.to(kernels.device))
        errors = [
            ((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True) if b.norm() > 0
        ]
        coarse = tf32 and kernels.device == "cuda" or tf32 and follows
        assert max(errors) < (5e-3 if coarse else 3e-6), errors
        if tf32 and follows:  # channel attention uses torch.bmm for float32, which may choose otherwise
            assert errors[0] > 2e-5, errors
            assert max(errors[1:]) > 2e-5, errors
