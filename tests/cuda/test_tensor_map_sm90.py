"""The tensor maps of Hopper's kernels (csrc/cuda/common/tensor_map.cu), on the emulator, whose encoder refuses what the
driver's documentation forbids: layouts of the operands, and what is copied before it can be mapped."""

import pytest
import torch

from .test_position import OPERATORS, exact, inputs, launches, relative_error, run


def offset(t):
    """Starts 2 bytes after a multiple of 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def in_wider_rows(t, gap):
    """Rows with a gap between them."""
    return torch.nn.functional.pad(t, (0, gap))[..., : t.shape[-1]]


def in_wider_samples(t, gap):
    """Samples with a gap between them, whose rows are adjacent."""
    return torch.nn.functional.pad(t.flatten(1), (0, gap))[:, : t[0].numel()].unflatten(1, t.shape[1:])


def channels_outermost(t):
    """The stride of the samples is smaller than that of the channels."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def samples_expanded(t):
    return t[:1].expand(t.shape)


# The layout of query, key, value and grad_output, and whether they are copied. Rows of 72 positions start on 16 bytes.
LAYOUTS = {
    "contiguous": (lambda t: t, False),
    "rows with an aligned gap": (lambda t: in_wider_rows(t, 8), False),
    "channels outermost": (channels_outermost, True),
    "rows with a gap of 2 bytes": (lambda t: in_wider_rows(t, 1), True),
    "samples with an aligned gap": (lambda t: in_wider_samples(t, 8), False),
    "samples with a gap of 2 bytes": (lambda t: in_wider_samples(t, 1), True),
    "offset": (offset, True),
    "samples expanded": (samples_expanded, True),
}


@pytest.mark.parametrize(("layout", "copied"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(emulator, layout, copied):
    """Every layout gives the bits of contiguous operands."""
    tensors = inputs(2, 16, 40, 72, 72, torch.bfloat16)
    tensors = [layout(t) for t in tensors]
    expected = run(*(t.contiguous() for t in tensors))
    emulator.reset()
    for got, want in zip(run(*tensors), expected, strict=True):
        assert torch.equal(got, want)
    assert len(launches(emulator, "wgmma_weighted_sum_kernel")) >= 2
    assert bool(launches(emulator, "pack_rows_kernel")) == copied
    # Forward: query, key, value. Backward: key, query and grad_output for grad_value, and all four for the others.
    assert emulator.calls()["cuTensorMapEncodeTiled"] >= 3 + 3 + 4


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 1, 1, 7, 72), (1, 8, 1, 72, 9), (3, 1, 40, 5, 5)], ids=str)
def test_dimensions_of_size_1(emulator, sizes):
    """Their strides are arbitrary, and must still be ones that the driver accepts."""
    tensors = inputs(*sizes, torch.float16)
    for got, want in zip(run(*tensors), exact(*tensors), strict=True):
        assert relative_error(got, want) < 5e-3 or want.abs().max() < 1e-3
    strange = [
        t.as_strided(t.shape, [s if n > 1 else 3 for n, s in zip(t.shape, t.stride(), strict=True)]) for t in tensors
    ]
    for got, want in zip(run(*strange), run(*tensors), strict=True):
        assert torch.equal(got, want)


def test_other_engines_encode_no_map(emulator, without_wgmma):
    run(*inputs(1, 16, 40, 72, 72, torch.bfloat16))
    assert "cuTensorMapEncodeTiled" not in emulator.calls()
    assert OPERATORS._position_engine(torch.empty(1, 16, 72, dtype=torch.bfloat16)) == "mma"
