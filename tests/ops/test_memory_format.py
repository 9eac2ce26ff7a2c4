"""channels_last: results and gradients of the ops and modules have the memory format of their inputs."""

import pytest
import torch
from torch import nn
from torch._prims_common import suggest_memory_format

import segattn_ops
from segattn_ops.nn import (
    AFNB,
    APNB,
    ChannelAttention,
    CompactChannelAttention,
    CompactPositionAttention,
    CrissCrossAttention,
    DAModule,
    NonLocal2d,
    NonLocal3d,
    PositionAttention,
    RecurrentCrissCrossAttention,
)
from segattn_ops.ops import _memory_format

from ..modules.test_models import HEADS

CHANNELS_LAST = torch.channels_last

OPS = {
    "position": lambda q, k, v: segattn_ops.position_attention(q, k, v, 0.3),
    "heads": lambda q, k, v: segattn_ops.position_attention(q, k, v, 0.3, num_heads=2),
    "criss_cross": lambda q, k, v: segattn_ops.criss_cross_attention(q, k, v, 0.3),
    "criss_cross_heads": lambda q, k, v: segattn_ops.criss_cross_attention(q, k, v, 0.3, num_heads=2),
    "affinity": lambda q, k, v: segattn_ops.criss_cross_affinity(q, k),
    "aggregation": lambda q, k, v: segattn_ops.criss_cross_aggregation(q[:, :1].repeat(1, 9, 1, 1), v),
    "channel": lambda q, k, v: segattn_ops.channel_attention(q, k, v, -0.1),
    "channel_self": lambda q, k, v: segattn_ops.channel_attention(q, q, q, -0.1),
    "residual": lambda q, k, v: segattn_ops.residual_channel_attention(q, 0.5, -0.1),
}


def draw(layout=torch.contiguous_format, device="cpu", dtype=torch.float32):
    return [torch.randn(2, 6, 4, 6).to(device, dtype, memory_format=layout).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops(backend, op, dtype):
    contiguous = draw(device=backend.device, dtype=dtype)
    permuted = [t.detach().to(memory_format=CHANNELS_LAST).requires_grad_() for t in contiguous]
    expected, output = OPS[op](*contiguous), OPS[op](*permuted)
    kernels = backend.namespace is not None  # the reference's other layouts are those of PyTorch's operators
    assert expected.is_contiguous() or not kernels
    assert not output.is_contiguous() and output.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(output, expected)
    used = [i for i, t in enumerate(contiguous) if op not in ("channel_self", "residual") or i == 0]
    if op == "affinity":
        used = used[:2]
    if op == "aggregation":
        used = [2]
    wanted = torch.autograd.grad(expected.square().sum(), [contiguous[i] for i in used])
    got = torch.autograd.grad(output.square().sum(), [permuted[i] for i in used])
    for gradient, right in zip(got, wanted, strict=True):
        assert right.is_contiguous() or not kernels
        if kernels and not op.endswith("heads"):  # heads are copied, and the copy's gradient is contiguous
            assert gradient.is_contiguous(memory_format=CHANNELS_LAST)
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("op", ["position", "criss_cross"])
def test_query_or_value_alone_decides(op):
    q, k, v = draw()
    for tensors, expected in (
        ((q.to(memory_format=CHANNELS_LAST), k, v), True),
        ((q, k, v.to(memory_format=CHANNELS_LAST)), True),
        ((q, k.to(memory_format=CHANNELS_LAST), v), False),
    ):
        assert OPS[op](*tensors).is_contiguous(memory_format=CHANNELS_LAST) == expected


def test_pooled_keys_and_volumes():
    query = torch.randn(1, 4, 3, 5).to(memory_format=CHANNELS_LAST)
    pooled = torch.randn(1, 4, 7)
    assert segattn_ops.position_attention(query, pooled, pooled).is_contiguous(memory_format=CHANNELS_LAST)
    volume = torch.randn(1, 4, 2, 3, 5).to(memory_format=torch.channels_last_3d)
    output = segattn_ops.position_attention(volume, volume, volume)
    assert output.is_contiguous(memory_format=torch.channels_last_3d) and not output.is_contiguous()
    assert segattn_ops.position_attention(pooled, query, query).shape == pooled.shape


SIZES = [
    (2, 3, 4, 5),
    (2, 1, 4, 5),
    (2, 3, 1, 1),
    (1, 3, 1, 5),
    (1, 1, 1, 1),
    (1, 3, 4, 1),
    (0, 3, 4, 5),
    (2, 3, 2, 4, 5),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_format_that_pytorch_suggests(size):
    """Also where a size of 1 makes a tensor contiguous in both formats: an interpolation that follows goes by the
    strides."""
    last = CHANNELS_LAST if len(size) == 4 else torch.channels_last_3d
    base = torch.randn(size)
    layouts = [base, base.clone(memory_format=last), base.mT, base.clone(memory_format=last)[..., :1]]
    layouts += [base.repeat_interleave(2, 1).clone(memory_format=last)[:, : size[1]], base[:, :, :1].expand(size)]
    for tensor in layouts:
        suggested = suggest_memory_format(tensor)
        assert _memory_format.is_channels_last(tensor) == (suggested == last)
        if tensor.numel() > 0:
            output = segattn_ops.position_attention(tensor, tensor, tensor)
            assert output.stride() == torch.empty_like(output, memory_format=suggested).stride()


@pytest.mark.parametrize("op", OPS)
def test_fake_and_meta_tensors_and_compiled_graphs(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch._dynamo.reset()
    tensors = [t.detach() for t in draw(CHANNELS_LAST)]
    output = OPS[op](*tensors)
    assert OPS[op](*(t.to("meta") for t in tensors)).stride() == output.stride()
    with FakeTensorMode() as mode:
        assert OPS[op](*map(mode.from_tensor, tensors)).stride() == output.stride()
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert compiled(*leaves).stride() == output.stride()
    torch.testing.assert_close(compiled(*leaves), output)


@pytest.mark.parametrize("op", ["position", "criss_cross", "residual"])
def test_vmap(op):
    tensors = [t.detach() for t in draw(CHANNELS_LAST)]
    each = [torch.stack([t, 2 * t]) for t in tensors]
    mapped = torch.func.vmap(OPS[op])(*each)
    for i in range(2):
        torch.testing.assert_close(mapped[i], OPS[op](*(t[i] for t in each)))


@pytest.mark.parametrize("op", ["position", "heads", "criss_cross", "residual"])
def test_derivatives_of_torch_func(op):
    tensors = [t.detach() for t in draw(CHANNELS_LAST)]
    leaf = tensors[0].clone().requires_grad_()

    def loss(q):
        return OPS[op](q, *tensors[1:]).square().sum()

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(tensors[0]), expected)
    _, tangent = torch.func.jvp(loss, (tensors[0],), (tensors[1],))
    torch.testing.assert_close(tangent, (expected * tensors[1]).sum(), rtol=1e-4, atol=1e-4)


class Two(nn.Module):
    """A block of two inputs, the second of which is derived from the first."""

    def __init__(self, block, second):
        super().__init__()
        self.block, self.second = block, second

    def forward(self, x):
        return self.block(x, self.second(x))


class Compact(Two):
    def forward(self, x):
        return self.block(x, self.second(x).flatten(2).mT)


MODULES = {
    "PositionAttention": lambda: PositionAttention(16),
    "ChannelAttention": lambda: ChannelAttention(16),
    "CrissCrossAttention": lambda: CrissCrossAttention(16),
    "RecurrentCrissCrossAttention": lambda: RecurrentCrissCrossAttention(16),
    "DAModule": lambda: DAModule(16),
    "DAModule_fixed": lambda: DAModule(16, H=6, W=5),
    **{
        f"NonLocal2d_{mode}": lambda mode=mode: NonLocal2d(16, mode=mode)
        for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
    },
    "NonLocal2d_sub_sample": lambda: NonLocal2d(16, sub_sample=True),
    "APNB": lambda: APNB(16, 16, 8, 8),
    "AFNB": lambda: Two(AFNB(16, 16, 16, 8, 8), nn.Conv2d(16, 16, 1)),
    "CompactPositionAttention": lambda: Compact(CompactPositionAttention(16), nn.AdaptiveAvgPool2d(2)),
    "CompactChannelAttention": lambda: Two(CompactChannelAttention(), nn.Conv2d(16, 4, 1)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_modules(name, autocast):
    module = MODULES[name]().to(memory_format=CHANNELS_LAST).eval()
    for parameter in module.parameters():  # attention that starts at zero takes part
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, 6, 5).to(memory_format=CHANNELS_LAST).requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        y = module(x)
    assert y.is_contiguous(memory_format=CHANNELS_LAST) and not y.is_contiguous()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.is_contiguous(memory_format=CHANNELS_LAST)


def test_a_volume():
    module = NonLocal3d(16).to(memory_format=torch.channels_last_3d).eval()
    x = torch.randn(1, 16, 2, 3, 4).to(memory_format=torch.channels_last_3d)
    assert module(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    make, _, shapes, _ = HEADS[name]
    head = make().to(memory_format=CHANNELS_LAST).eval()
    outputs = head(*(torch.randn(shape).to(memory_format=CHANNELS_LAST) for shape in shapes))
    if isinstance(outputs, torch.Tensor):
        outputs = [outputs]
    for y in outputs.values() if isinstance(outputs, dict) else outputs:
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
