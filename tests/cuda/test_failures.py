"""Launches and calls of the CUDA runtime that fail in turn, emulated.

tests/cuda/test_host.py fails each launch of every op, forward and backward; here are parts, padding, the engines, and
calls of the runtime. tests/reliability/long_cuda_failures.py has all calls, engines and dtypes."""

import pytest
import torch

import segattn_ops
from segattn_ops import _position_engine

from ..emulated import register_backend
from ..ops.every_call import BY_NAME
from ..ops.failing_allocations import same_bits

# The name of a set of kernels: the dtype, and the engine of position attention or the float32 products.
KERNELS = {
    "wgmma": (torch.bfloat16, "wgmma"),
    "mma": (torch.bfloat16, "mma"),
    "3xtf32": (torch.float32, "mma"),
    "simt": (torch.float32, "simt"),
    "float64": (torch.float64, "simt"),
}
SAMPLE = [
    ("position_attention with padding and heads", "wgmma"),
    ("position_attention with padding and heads", "mma"),
    ("position_attention_partial", "simt"),
    ("position_attention double backward", "wgmma"),
    ("channel_energy and channel_apply with gamma", "mma"),
    ("criss_cross_rows", "mma"),
    ("criss_cross_columns", "3xtf32"),
]


@pytest.fixture(autouse=True)
def emulated_backend(emulator):
    register_backend()
    with segattn_ops.use_backend("emulated"):
        yield


def check_launches(emulator, record_property, name, chosen, after_each=False):
    """Each launch of a call fails: an error with the kernel's name, none left behind, and the next call is right."""
    dtype, engine = KERNELS[chosen]
    call = BY_NAME[name]
    inputs = call.make(dtype)
    with _position_engine.forced_position_engine(engine, "segattn_emulated"):
        emulator.reset()
        expected = call.run(*inputs)
        launched = [launch["kernel"].split("<")[0].removeprefix("segattn::cuda::") for launch in emulator.report()]
        assert launched
        for number, kernel in enumerate(launched):
            emulator.set_failing_launch(number)
            with pytest.raises(RuntimeError, match=rf"segattn_ops: .*{kernel}.* failed: too many resources requested"):
                call.run(*inputs)
            assert emulator.pending_error() == ""
            if after_each or number == len(launched) - 1:
                assert same_bits(call.run(*inputs), expected)
    record_property("launches failed", len(launched))


def check_runtime_calls(emulator, record_property, name, chosen):
    """Each call of the runtime API fails: an error with the function's name, or that of the kernel whose shared memory
    is set."""
    dtype, engine = KERNELS[chosen]
    call = BY_NAME[name]
    inputs = call.make(dtype)
    with _position_engine.forced_position_engine(engine, "segattn_emulated"):
        call.run(*inputs)
        emulator.reset()
        expected = call.run(*inputs)
        made = sum(count for function, count in emulator.calls().items() if function != "cudaGetLastError")
        for number in range(made):
            emulator.set_failing_call(number)
            with pytest.raises(RuntimeError, match=r"segattn_ops: .* failed(: invalid argument| with error 1$)"):
                call.run(*inputs)
            assert emulator.pending_error() == ""
        assert same_bits(call.run(*inputs), expected)
    record_property("runtime calls failed", made)


@pytest.mark.parametrize(("name", "chosen"), SAMPLE)
def test_each_launch_fails(emulator, record_property, name, chosen):
    check_launches(emulator, record_property, name, chosen)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("position_attention backward", "wgmma"),
        ("channel_attention backward", "3xtf32"),
        ("criss_cross_attention backward", "mma"),
    ],
)
def test_each_call_of_the_runtime_fails(emulator, record_property, name, chosen):
    check_runtime_calls(emulator, record_property, name, chosen)
