"""Failures around a call: every allocation in turn, interrupts, errors of other code in the backward pass, threads that
cannot be started. tests/reliability/long_failures.py has all calls and dtypes."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import segattn_ops
from segattn_ops._out_of_memory import out_of_memory
from segattn_ops.ops import OPERATORS
from segattn_ops.ops._direct import direct_backward, direct_forward
from tools.compilers import ROOT

from ..families import FAMILIES
from . import failing_allocations
from .every_call import CALLS
from .failing_allocations import same_bits

# One call of each family's host code, with the code around it: masks, copies, gamma, parts.
SAMPLE = {
    "cpu": (
        "position_attention backward",
        "channel_attention backward",
        "residual_channel_attention backward",
        "criss_cross_affinity backward",
        "criss_cross_aggregation backward",
        "criss_cross_attention backward",
        "position_attention with padding and heads",
        "channel_energy and channel_apply with gamma",
        "position_attention_partial",
        "criss_cross_rows",
    ),
    "emulated": ("position_attention with padding and heads", "criss_cross_rows"),
}


def check_allocations(record_property, folder, backend, dtype, names, threads=1, step=1):
    report = failing_allocations.in_new_process(folder, backend, dtype, names, threads, step)
    record_property("allocations failed", sum(found["failed"] for found in report.values()))
    record_property("leaks in torch's boxing", sum(found["leaks in boxing"] for found in report.values()))
    assert {name: found["problems"] for name, found in report.items() if found["problems"]} == {}
    assert all(found["failed"] > 0 for found in report.values())


def test_every_allocation_fails_in_turn(kernels, record_property, tmp_path):
    if kernels.name == "cuda":
        pytest.skip("fails host memory only")
    step = {"cpu": 1, "emulated": 5}[kernels.name]
    check_allocations(record_property, tmp_path, kernels.name, "float32", SAMPLE[kernels.name], step=step)


@pytest.mark.parametrize("operator", ["position_attention", "criss_cross_attention"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_result_larger_than_the_memory(kernels, operator, needs_gradient):
    """16 TiB. On a GPU the error is that of torch's ops, for callers that try a smaller batch."""
    query = torch.zeros(1, 1, 1, 1, device=kernels.device).expand(1, 4, 1, 1 << 12).requires_grad_(needs_gradient)
    value = torch.zeros(1, 1, 1, 1, device=kernels.device).expand(1, 1 << 30, 1, 1 << 12)
    error, device = (torch.OutOfMemoryError, "cuda:0") if kernels.device == "cuda" else (RuntimeError, "the CPU")
    message = rf"^segattn_ops: cannot allocate 16777216.0 MiB, shape \(1, 1073741824, 1, 4096\), on {device}: "
    with pytest.raises(RuntimeError, match=message) as raised:
        getattr(segattn_ops, operator)(query, query, value)
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("device", "message", "responds", "is_out_of_memory"),
    [
        ("cuda:1", "CUDA out of memory. Tried to allocate 96.00 MiB.", False, True),
        ("cuda:1", "CUDA error: no kernel image (originally from a call API call failed at ops.h)", True, False),
        ("cuda:1", 'torch_call_dispatcher( "aten::new_empty") API call failed at ops.h, line 9', True, True),
        ("cuda:1", 'torch_call_dispatcher( "aten::new_empty") API call failed at ops.h, line 9', False, False),
        ("the CPU", "DefaultCPUAllocator: can't allocate memory", True, False),
    ],
)
def test_what_is_out_of_memory(monkeypatch, device, message, responds, is_out_of_memory):
    """torch before 2.13 passes no message on: an allocation fails there for lack of memory if the device responds."""

    def mem_get_info(index):
        assert index == 1
        if not responds:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    text = f"segattn_ops: cannot allocate 96.0 MiB, shape (2, 512, 97, 97), on {device}: {message}"
    replacement = out_of_memory(RuntimeError(text))
    assert (type(replacement) is torch.OutOfMemoryError and str(replacement) == text) == is_out_of_memory
    assert (replacement is None) != is_out_of_memory
    assert out_of_memory(RuntimeError("position_attention: query must have 3 dimensions, on cuda:1: ")) is None


def test_out_of_memory_in_the_direct_call_and_its_backward():
    """As where the operator raises what a GPU's does."""
    message = "segattn_ops: cannot allocate 96.0 MiB, shape (2, 512, 97, 97), on cuda:0: CUDA out of memory."

    def forward(x):
        if x.numel() == 0:
            raise RuntimeError(message)
        return x.clone()

    def backward(gradient):
        raise RuntimeError(message)

    forward.__name__ = backward.__name__ = "operator.default"
    differentiate = direct_backward(backward, twin=backward)
    call = direct_forward(forward, lambda ctx, inputs, output: None, lambda ctx, gradient: differentiate(gradient))
    for failing in (
        lambda: call(torch.zeros(0)),
        lambda: call(torch.zeros(0, requires_grad=True)),
        lambda: call(torch.zeros(1, requires_grad=True)).sum().backward(),
    ):
        with pytest.raises(torch.OutOfMemoryError, match="on cuda:0: CUDA out of memory."):
            failing()


def run_script(script: str, seconds: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """`seconds` is a guard, for a process that hangs."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


# A process that a shell starts in the background ignores SIGINT, and so do its children.
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
LARGE = """
import os, sys, threading
import torch
import segattn_ops
torch.manual_seed(0)
inputs = [torch.randn(1, 16, 40, 40, requires_grad=True) for _ in range(3)]
def call():
    output = segattn_ops.position_attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output.sum(), inputs)]
def check(expected):
    assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))
"""
INTERRUPTED = (
    INTERRUPTIBLE
    + LARGE
    + """
expected = call()
pid = os.getpid()
interrupts = 0
for _ in range(20):
    timer = threading.Timer(0.01, os.kill, (pid, signal.SIGINT))
    timer.start()
    try:
        while True:
            call()
    except KeyboardInterrupt:
        interrupts += 1
    timer.join()
    check(expected)
print(interrupts)
"""
)


def test_an_interrupt_ends_the_call_and_leaves_nothing_behind(record_property):
    """SIGINT in the middle of calls, at moments that differ: KeyboardInterrupt, and the next call is right."""
    done = run_script(INTERRUPTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20"]
    record_property("interrupts", 20)


LOADER = (
    INTERRUPTIBLE
    + """
import os
import torch
import segattn_ops
from torch.utils.data import DataLoader, Dataset
class Attended(Dataset):
    def __len__(self):
        return 100_000
    def __getitem__(self, index):
        x = torch.full((1, 8, 12, 12), float(index % 3))
        return segattn_ops.position_attention(x, x, x)[0]
loader = DataLoader(Attended(), num_workers=2, multiprocessing_context="fork")
batches = 0
try:
    for batch in loader:
        batches += 1
        if batches == 10:
            os.killpg(os.getpgid(0), signal.SIGINT)
except KeyboardInterrupt:
    del loader
    x = torch.full((1, 8, 12, 12), 1.0)
    assert torch.equal(segattn_ops.position_attention(x, x, x), x)
    print("interrupted")
"""
)


def test_an_interrupt_of_a_data_loader():
    """As Ctrl-C in a terminal: the loader and its workers get the signal."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["interrupted"]


def fails_in_hook(gradient):
    raise LookupError("of the hook")


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise LookupError("of the function")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_an_error_of_other_code_in_the_backward_pass(backend, family):
    """Of a hook on an op's input, and of a Function before and behind the op: it comes through as it is, and the next
    backward pass is right."""
    case = family.cases[0]

    def gradients(before, behind):
        leaves = [t.requires_grad_() for t in family.make(case, torch.float32)]
        first, *others = (t.clone() for t in leaves)
        output = family.function(before(first), *others, *case.scalars)
        return torch.autograd.grad(behind(output).square().sum(), leaves)

    def hooked(tensor):
        tensor.register_hook(fails_in_hook)
        return tensor

    def same(tensor):
        return tensor

    expected = gradients(same, same)
    for before, behind in ((hooked, same), (FailsBackward.apply, same), (same, FailsBackward.apply)):
        with pytest.raises(LookupError, match="of the"):
            gradients(before, behind)
        assert same_bits(gradients(same, same), expected)


THREADS_FAIL = (
    LARGE
    + """
import ctypes
torch.set_num_threads(4)
ctypes.CDLL(None).segattn_fail_threads(1)
for run in (lambda: torch.ones(1 << 22).exp(), call):
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
)


def test_threads_that_cannot_be_started(tmp_path):
    """OpenMP's library ends the process with a message of its own, in torch's ops and in ours; there is no hang and no
    wrong result."""
    done = run_script(THREADS_FAIL, **failing_allocations.preload(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]
    assert done.stderr.count("Thread creation failed") == 2


def test_calls_are_a_complete_list():
    """Every operator is in a call, so that none is left out of these tests."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.name().removeprefix("segattn::"))
            return function(*args, **(kwargs or {}))

    for call in CALLS:
        inputs = call.make(torch.float32)
        with Record():
            call.run(*inputs)
    expected = {o.name for o in OPERATORS} | {f"{o.name}_backward" for o in OPERATORS}
    assert expected <= called, expected - called
