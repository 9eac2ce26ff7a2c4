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
