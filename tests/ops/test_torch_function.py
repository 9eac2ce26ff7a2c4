"""The public functions follow the `__torch_function__` protocol: FX, tensor subclasses and modes see one call."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import segattn_ops

from ..families import BY_OPERATOR

FUNCTIONS = {
    "position_attention": ("query", "key", "value", "scale"),
    "channel_attention": ("query", "key", "value", "scale"),
    "residual_channel_attention": ("input", "gamma", "scale"),
    "criss_cross_attention": ("query", "key", "value", "scale"),
    "criss_cross_affinity": ("query", "key"),
    "criss_cross_aggregation": ("attention", "value"),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def arguments(name: str) -> list:
    if name == "residual_channel_attention":
        return [torch.randn(2, 8, 5, 4), torch.tensor(0.7), -0.3]
    family = BY_OPERATOR[name]
    case = family.cases[0]
    return [*family.make(case, torch.float32), *case.scalars]


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@each_function
def test_a_mode_sees_the_call_with_all_arguments(name):
    function, inputs = getattr(segattn_ops, name), arguments(name)
    with Recorder() as recorder:
        got = function(**dict(zip(FUNCTIONS[name], inputs, strict=True)))
    seen = [args for func, args in recorder.calls if func is function]
    assert len(seen) == 1 and len(seen[0]) == len(inputs)
    assert all(a is b for a, b in zip(seen[0], inputs, strict=True))
    torch.testing.assert_close(got, function(*inputs), rtol=0, atol=0)


@each_function
def test_fx_records_one_node(name):
    function, inputs = getattr(segattn_ops, name), arguments(name)
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    scalars = inputs[len(tensors) :]

    class Caller(nn.Module):
        def forward(self, first, second, third=None):
            return function(*(first, second, third)[: len(tensors)], *scalars)

    traced = torch.fx.symbolic_trace(Caller())
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    torch.testing.assert_close(traced(*tensors), function(*inputs), rtol=0, atol=0)


class Marked(torch.Tensor):
    """A subclass with the default `__torch_function__`."""


@each_function
def test_a_subclass_is_kept(name):
    function, inputs = getattr(segattn_ops, name), arguments(name)
    got = function(inputs[0].as_subclass(Marked), *inputs[1:])
    assert type(got) is Marked
    torch.testing.assert_close(got.as_subclass(torch.Tensor), function(*inputs), rtol=0, atol=0)


KEYWORDS = {
    "position_attention": {"num_heads": 2, "key_padding_mask": torch.zeros(2, 5, 7, dtype=torch.bool)},
    "criss_cross_attention": {"num_heads": 2},
}
each_with_keywords = pytest.mark.parametrize("name", KEYWORDS)


@each_with_keywords
def test_a_mode_sees_the_keywords(name):
    function, keywords = getattr(segattn_ops, name), {**KEYWORDS[name], "return_logsumexp": True}
    seen = []

    class Keywords(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is function:
                seen.append(kwargs)
            return func(*args, **(kwargs or {}))

    with Keywords():
        got = function(*arguments(name), **keywords)
    assert len(seen) == 1 and seen[0].keys() == keywords.keys()
    assert all(seen[0][key] is keywords[key] for key in keywords)
    for a, b in zip(got, function(*arguments(name), **keywords), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_with_keywords
def test_fx_keeps_the_keywords(name):
    function, inputs = getattr(segattn_ops, name), arguments(name)
    heads = KEYWORDS[name]["num_heads"]

    class Caller(nn.Module):
        def forward(self, q, k, v):
            output, logsumexp = function(q, k, v, num_heads=heads, return_logsumexp=True)
            return output + logsumexp.sum()

    traced = torch.fx.symbolic_trace(Caller())
    (node,) = [node for node in traced.graph.nodes if node.target is function]
    assert node.kwargs["num_heads"] == heads and node.kwargs["return_logsumexp"] is True
    torch.testing.assert_close(traced(*inputs[:3]), Caller()(*inputs[:3]), rtol=0, atol=0)


@each_with_keywords
def test_a_subclass_is_kept_in_both_results(name):
    function, inputs = getattr(segattn_ops, name), arguments(name)
    got = function(inputs[0].as_subclass(Marked), *inputs[1:], return_logsumexp=True, **KEYWORDS[name])
    assert [type(result) for result in got] == [Marked, Marked]


def test_a_mask_of_a_subclass_is_dispatched():
    inputs = arguments("position_attention")
    mask = KEYWORDS["position_attention"]["key_padding_mask"].as_subclass(Marked)
    assert type(segattn_ops.position_attention(*inputs, key_padding_mask=mask)) is Marked
