"""position_attention warns, once, where its arguments are much more likely heads of tokens than feature maps."""

import re
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import segattn_ops
from segattn_ops.ops import _layout

MESSAGE = "position_attention: the query's shape"
TOKENS = [
    ((1, 8, 200, 40), (1, 8, 200, 40), (1, 8, 200, 40)),
    ((1, 12, 197, 64), (1, 12, 197, 64), (1, 12, 197, 64)),  # a vision transformer
    ((1, 1, 120, 32), (1, 1, 120, 32), (1, 1, 120, 32)),
    ((2, 4, 300, 32), (2, 4, 120, 32), (2, 4, 120, 32)),  # other keys
]
MAPS = [
    ((2, 8, 33, 31), (2, 8, 33, 31), (2, 64, 33, 31)),  # DANet: E < C
    ((1, 16, 64, 64), (1, 16, 64, 64), (1, 16, 64, 64)),  # E = C
    ((1, 16, 48, 96), (1, 16, 48, 96), (1, 16, 48, 96)),  # wide
    ((1, 16, 96, 40), (1, 16, 96, 40), (1, 16, 96, 40)),  # portrait format
    ((1, 1, 96, 32), (1, 1, 96, 32), (1, 1, 96, 32)),  # re-identification of pedestrians, 384 x 128 at stride 4
    ((1, 16, 90, 3), (1, 16, 90, 3), (1, 16, 90, 3)),  # a strip
    ((1, 16, 33, 1), (1, 16, 33, 1), (1, 16, 33, 1)),
    ((1, 128, 99, 32), (1, 128, 99, 32), (1, 128, 99, 32)),  # more channels than heads
    ((1, 8, 99, 32), (1, 8, 50), (1, 8, 50)),  # pooled keys
    ((1, 8, 99, 32), (1, 8, 49, 16), (1, 8, 49, 16)),  # sub-sampled keys
    ((1, 8, 96, 16, 16), (1, 8, 96, 16, 16), (1, 8, 96, 16, 16)),
    ((1, 96, 32), (1, 96, 32), (1, 96, 32)),
]


@pytest.fixture(autouse=True)
def _not_yet_warned(monkeypatch):
    monkeypatch.setattr(_layout, "_warned", False)


def attend(shapes):
    return segattn_ops.position_attention(*(torch.randn(shape) for shape in shapes), 0.1)


@pytest.mark.parametrize("shapes", TOKENS, ids=str)
def test_tokens(shapes):
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        attend(shapes)
        attend(shapes)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("shapes", MAPS, ids=str)
def test_feature_maps(shapes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(shapes)


def test_the_recipe_of_the_message():
    q, k, v = torch.randn(3, 2, 4, 99, 16).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    folded = (t.flatten(0, 1).mT for t in (q, k, v))
    out = segattn_ops.position_attention(*folded, 16**-0.5).mT.unflatten(0, (2, 4))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_filter_of_the_message():
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        attend(TOKENS[0])
    _layout._warned = False
    advice = re.search(r'message="(.*)"\)', str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=advice.group(1))
        attend(TOKENS[0])


def test_no_warning_while_a_graph_is_recorded():
    shapes = TOKENS[0]
    tensors = [torch.randn(shape) for shape in shapes]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=MESSAGE)
        torch._dynamo.reset()
        torch.compile(segattn_ops.position_attention, fullgraph=True, backend="eager")(*tensors)
        with FakeTensorMode() as mode:
            segattn_ops.position_attention(*map(mode.from_tensor, tensors))
        torch.jit.trace(segattn_ops.position_attention, tuple(tensors), check_trace=False)
