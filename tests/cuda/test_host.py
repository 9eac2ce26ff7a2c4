"""Host code of all CUDA operators, emulated.

Batches beyond the limit of a grid's second dimension, devices that the library was not built for, the engine of
position attention, failing launches, and no waiting for the device, so that calls can be captured in a graph."""

import pytest
import torch

import segattn_ops
from segattn_ops import _position_engine

from ..emulated import register_backend
from ..families import BY_OPERATOR, FAMILIES, Case

# A small odd number of positions that runs every operator's kernels, forward and backward.
SMALL = {family.operator: family.cases[0] for family in FAMILIES}
ONE_POSITION = {
    "position_attention": Case(((1, 2, 1), (1, 2, 1), (1, 3, 1)), 1.0),
    "channel_attention": Case(((1, 2, 1), (1, 2, 1), (1, 2, 1)), 1.0),
    "channel_self_attention": Case(((1, 2, 1),), -1.0),
    "residual_channel_attention": Case(((1, 2, 1), (1, 2)), -1.0),
    "criss_cross_affinity": Case(((1, 2, 1, 2), (1, 2, 1, 2))),
    "criss_cross_aggregation": Case(((1, 2, 1, 2), (1, 2, 1, 2))),
    "criss_cross_attention": Case(((1, 2, 1, 2), (1, 2, 1, 2), (1, 3, 1, 2)), 1.0),
}
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
OPERATORS = torch.ops.segattn_emulated
OPERATOR = pytest.mark.parametrize("operator", SMALL)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def emulated_backend(emulator):
    register_backend()
    with segattn_ops.use_backend("emulated"):
        yield


def forward_and_backward(operator, inputs, scalars):
    """The output and the gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = BY_OPERATOR[operator].function(*leaves, *scalars)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def small_call(operator, dtype):
    case = SMALL[operator]
    inputs = BY_OPERATOR[operator].make(case, dtype)
    return lambda: forward_and_backward(operator, inputs, case.scalars)


@pytest.fixture(params=["bfloat16", "float16", "3xtf32", "tf32", "float64"])
def products(request, emulator):
    """The dtype of a call's tensors, with the float32 products set as named: covers every set of kernels."""
    torch.ops.segattn_emulated._set_allow_tf32(request.param == "tf32")
    return torch.float32 if request.param.endswith("tf32") else getattr(torch, request.param)


@OPERATOR
def test_batches_beyond_65535(emulator, operator):
    """More samples than the y and z dimensions of a grid allow: the first and the last are correct. Only the blocks at
    the ends run, since all 65,538 samples of position attention, forward and backward, took 161 s."""
    case = ONE_POSITION[operator]
    three = [torch.cat([t, 2 * t, 3 * t]) for t in BY_OPERATOR[operator].make(case, torch.float32)]
    expected = forward_and_backward(operator, three, case.scalars)
    many = [t.repeat(21846, *[1] * (t.dim() - 1)) for t in three]
    assert many[0].shape[0] == 65538
    emulator.set_blocks_at_ends(256)
    emulator.reset()
    got = forward_and_backward(operator, many, case.scalars)
    for result, want in zip(got, expected, strict=True):
        assert torch.equal(result[:3], want)
        assert torch.equal(result[-3:], want)
    assert max(launch["grid"][0] for launch in emulator.report()) > 65535


@pytest.mark.parametrize("name", ["query", "key"])
def test_more_positions_than_kernels_count(name):
    """Kernels index positions with int: 2^31 positions are an error, raised before anything is allocated."""
    one = torch.zeros(1, 1, 1)
    many = one.expand(1, 1, 2**31)
    arguments = (many, one, one) if name == "query" else (one, many, many)
    message = rf"position_attention: {name} must have fewer than 2\^31 positions \(got 2147483648\)"
    with pytest.raises(RuntimeError, match=message):
        segattn_ops.position_attention(*arguments)


@OPERATOR
def test_a_device_the_library_was_not_built_for(emulator, operator):
    emulator.set_device(120)
    emulator.set_built_architectures([80, 90])
    message = (
        r"built for sm_80, sm_90, this device is sm_120; build for it with TORCH_CUDA_ARCH_LIST=\"12\.0\" pip install"
    )
    with pytest.raises(RuntimeError, match=message):
        small_call(operator, torch.float32)()
    assert emulator.report() == []


def test_the_compiled_architecture_decides_on_tensor_cores(emulator):
    """sm_86 runs code for sm_80, with tensor cores. Code for architectures before sm_80 has no tensor-core kernels,
    whatever the device supports."""
    for device, built, tensor_cores in ((86, [75, 80], True), (75, [70, 75], False), (90, [80, 90], True)):
        emulator.set_device(device)
        emulator.set_built_architectures(built)
        emulator.reset()
        small_call("position_attention", torch.float16)()
        names = [launch["kernel"] for launch in emulator.report()]
        assert any("Mma16" in name or "wgmma" in name for name in names) == tensor_cores


def engine_of(dtype, key_channels=64):
    return OPERATORS._position_engine(torch.empty(1, key_channels, 3, dtype=dtype))


# Device and architectures of the library; the engines for float16 or bfloat16, float32, float64.
CHOICES = [
    (90, [90], ("wgmma", "mma", "simt")),
    (90, [80, 90], ("wgmma", "mma", "simt")),
    (80, [80, 90], ("mma", "mma", "simt")),
    (86, [80, 90], ("mma", "mma", "simt")),
    (100, [90, 100], ("mma", "mma", "simt")),  # code for sm_90a runs on no later architecture
    (120, [90, 120], ("mma", "mma", "simt")),
    (75, [75, 90], ("simt", "simt", "simt")),
]


@pytest.mark.parametrize(("device", "built", "engines"), CHOICES)
def test_the_engine_of_position_attention(emulator, device, built, engines):
    emulator.set_device(device)
    emulator.set_built_architectures(built)
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    assert tuple(engine_of(dtype) for dtype in dtypes) == engines
    assert engine_of(torch.float16) == engines[0]


def test_wgmma_has_at_most_128_key_channels():
    assert [engine_of(torch.bfloat16, channels) for channels in (1, 128, 129, 1024)] == ["wgmma", "wgmma", "mma", "mma"]


# Device and architectures of the library, the forced engine, dtype and key channels; the engine, or why it cannot
# serve.
FORCED = [
    (90, [90], "mma", torch.bfloat16, 64, "mma"),
    (90, [90], "simt", torch.bfloat16, 64, "simt"),
    (90, [90], "simt", torch.float32, 64, "simt"),
    (90, [90], "wgmma", torch.float16, 128, "wgmma"),
    (90, [90], "wgmma", torch.float32, 64, "mma"),
    (90, [90], "wgmma", torch.float32, 129, "mma"),
    (90, [90], "wgmma", torch.float64, 64, "simt"),
    (90, [90], "mma", torch.float64, 64, "simt"),
    (90, [90], "wgmma", torch.bfloat16, 129, r"query must have at most 128 channels \(got 129\)"),
    (86, [80, 90], "wgmma", torch.bfloat16, 64, "it needs sm_90, and this device is sm_86"),
    (100, [90, 100], "wgmma", torch.bfloat16, 64, "it needs sm_90, and this device is sm_100"),
    (75, [75], "mma", torch.float16, 64, "needs code for sm_80 or later, and the code for this device is for sm_75"),
    (75, [75], "wgmma", torch.float32, 64, "needs code for sm_80 or later, and the code for this device is for sm_75"),
]


@pytest.mark.parametrize(("device", "built", "engine", "dtype", "channels", "expected"), FORCED)
def test_a_forced_engine(emulator, device, built, engine, dtype, channels, expected):
    """It serves, passes on a dtype that it has no kernels for, or raises; none is taken silently in its place."""
    emulator.set_device(device)
    emulator.set_built_architectures(built)
    with _position_engine.forced_position_engine(engine, "segattn_emulated"):
        if expected in _position_engine.ENGINES:
            assert engine_of(dtype, channels) == expected
        else:
            with pytest.raises(
                RuntimeError, match=f"_position_engine: .*{engine if dtype.itemsize == 2 else 'mma'}.*{expected}"
            ):
                engine_of(dtype, channels)
            leaves = [torch.zeros(1, size, 3, dtype=dtype, requires_grad=True) for size in (channels, channels, 5)]
            with pytest.raises(RuntimeError, match=f"position_attention: .*{expected}"):
                segattn_ops.position_attention(*leaves)
            assert emulator.report() == []
    assert OPERATORS._position_engine(torch.empty(1, 1, 1)) == engine_of(torch.float32)


def test_wgmma_without_its_code_in_the_library(emulator):
    """As of another build system that compiles for sm_90 alone: mma.sync serves, and forcing wgmma raises."""
    emulator.set_device(90)
    emulator.set_built_architectures([90])
    assert engine_of(torch.bfloat16) == "wgmma"
    emulator.set_built_for_sm90a(False)
    assert engine_of(torch.bfloat16) == "mma"
    message = 'built without code for sm_90a; build it with TORCH_CUDA_ARCH_LIST="9.0" pip install'
    with (
        _position_engine.forced_position_engine("wgmma", "segattn_emulated"),
        pytest.raises(RuntimeError, match=message),
    ):
        engine_of(torch.bfloat16)


def test_the_engine_that_is_forced_launches(emulator):
    launched = {}
    for engine in ("wgmma", "mma", "simt"):
        emulator.reset()
        with _position_engine.forced_position_engine(engine, "segattn_emulated"):
            small_call("position_attention", torch.bfloat16)()
        launched[engine] = {launch["kernel"] for launch in emulator.report()}
    assert any("simt_sum" in name for name in launched["simt"])
    assert not any("Mma16" in name or "wgmma" in name for name in launched["simt"])
    assert any("Mma16" in name for name in launched["mma"])
    assert not any("simt_sum" in name or "wgmma" in name for name in launched["mma"])
    assert any("wgmma" in name for name in launched["wgmma"])
    assert not any("simt_sum" in name or "Mma16" in name for name in launched["wgmma"])


def test_mma_that_is_forced_and_has_no_tile(emulator):
    """A query with more channels than shared memory holds is passed to the SIMT kernels, unless mma is forced."""
    wide = [torch.zeros(1, 2048, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    output = segattn_ops.position_attention(*wide)
    assert "simt_sum" in emulator.report()[0]["kernel"]
    message = "no tile of it has room for 2048 channels of query and key"
    with _position_engine.forced_position_engine("mma", "segattn_emulated"):
        with pytest.raises(RuntimeError, match=f"position_attention: .*{message}"):
            segattn_ops.position_attention(*wide)
        with pytest.raises(RuntimeError, match=f"position_attention_backward: .*{message}"):
            output.sum().backward()


def test_a_wrong_engine_is_named():
    for function in (_position_engine.set_position_engine, OPERATORS._set_position_engine):
        with pytest.raises((ValueError, RuntimeError), match="name must be one of .*got .?wgma"):
            function("wgma")


@OPERATOR
@DTYPE
def test_a_failed_launch_names_its_kernel(emulator, operator, dtype):
    call = small_call(operator, dtype)
    expected = call()
    names = [launch["kernel"].split("<")[0].removeprefix("segattn::cuda::") for launch in emulator.report()]
    assert names
    for number, name in enumerate(names):
        emulator.set_failing_launch(number)
        with pytest.raises(RuntimeError, match=rf"{name}.* failed: too many resources requested for launch"):
            call()
    for a, b in zip(call(), expected, strict=True):
        assert torch.equal(a, b)


# Calls of the CUDA runtime that are allowed during stream capture and do not wait for the device.
HARMLESS = {
    "cudaGetDevice",
    "cudaDeviceGetAttribute",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetLastError",
    "cudaGetDriverEntryPointByVersion",
    "cuTensorMapEncodeTiled",
}
# Operators of torch that the host code and autograd may call: allocations, views and device work. None reads a value
# back, except that aten::_to_copy is also the name of a copy to the host.
HARMLESS_TORCH = {
    "aten::new_empty", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::contiguous", "aten::clone",
    "aten::copy_", "aten::to", "aten::_to_copy", "aten::view", "aten::transpose", "aten::as_strided", "aten::bmm",
    "aten::zero_", "aten::fill_", "aten::detach", "aten::resolve_conj", "aten::expand",
    "aten::ones_like", "aten::zeros", "aten::select",
}  # fmt: skip


@OPERATOR
@pytest.mark.parametrize("architecture", [75, 90])
def test_nothing_waits_for_the_device(emulator, operator, products, architecture):
    """No synchronisation, no copy to the host, and all memory from torch's allocator: calls can be captured in a CUDA
    graph and overlap with the host."""
    emulator.set_device(architecture)
    call = small_call(operator, products)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert emulator.report() and set(emulator.calls()) <= HARMLESS
    called = {event.name for event in profile.events() if event.name.startswith("aten::")}
    assert "aten::new_empty" in called
    assert called <= HARMLESS_TORCH


@OPERATOR
@pytest.mark.parametrize("architecture", [75, 90])
def test_launches_go_to_the_current_stream(emulator, operator, products, architecture):
    """Forward and backward launch every kernel on the stream that is current in PyTorch at the time of the call, and
    none on the default stream 0."""
    emulator.set_device(architecture)
    case = SMALL[operator]
    leaves = [t.requires_grad_() for t in BY_OPERATOR[operator].make(case, products)]
    emulator.set_current_stream(7)
    output = BY_OPERATOR[operator].function(*leaves, *case.scalars)
    forward = emulator.report()
    emulator.set_current_stream(11)
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    backward = emulator.report()[len(forward) :]
    assert {launch["stream"] for launch in forward} == {7}
    assert {launch["stream"] for launch in backward} == {11}
