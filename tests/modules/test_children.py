"""The modules call their children, so that what a user puts in a layer's place, or hooks to it, has its effect."""

import copy
import importlib

import pytest
import torch
from torch import nn as tnn

from segattn_ops import nn

from ..peers import randomise
from .test_nn import BLOCKS

MODULES = {name: (ours, shapes) for name, (ours, _, shapes) in BLOCKS.items() if not name.endswith("single")}
MODULES["da_module_of_any_size"] = (lambda: nn.DAModule(8), ((2, 8, 5, 6),))
MODULES["gating"] = (lambda: nn.CrossLevelGatingDecoder(8, 6), ((2, 8, 5, 6), (2, 8, 3, 3)))
each_module = pytest.mark.parametrize("name", MODULES)


def made(name):
    make, shapes = MODULES[name]
    return randomise(make()).eval(), [torch.randn(shape) for shape in shapes]


@each_module
def test_every_leaf_is_called(name):
    module, inputs = made(name)
    leaves = {child: path for path, child in module.named_modules() if path and not list(child.children())}
    called = set()
    for leaf in leaves:
        leaf.register_forward_hook(lambda leaf, *_: called.add(leaf))
    module(*inputs)
    assert {leaves[leaf] for leaf in leaves if leaf not in called} == set()


class Wrapper(tnn.Module):
    """A layer that is affine no longer, of another type than the one it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x).tanh()


def with_layer(module, path, layer):
    """A copy of the module with another layer at the path."""
    module = copy.deepcopy(module)
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)
    return module


@pytest.mark.parametrize("name", ["da_module", "da_module_of_any_size", "apnb", "afnb", "compact_position"])
def test_the_effect_of_a_layer_in_the_place_of_another(name):
    """Scaling what a layer returns is scaling its weight and bias."""
    module, inputs = made(name)
    before = module(*inputs)
    layers = [p for p, m in module.named_modules() if isinstance(m, (tnn.Linear, tnn.Conv2d))]
    assert len(layers) > 2
    for path in layers:
        layer = copy.deepcopy(module.get_submodule(path))
        doubled = copy.deepcopy(layer)
        for parameter in doubled.parameters():
            parameter.data *= 2
        layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
        got, expected = with_layer(module, path, layer)(*inputs), with_layer(module, path, doubled)(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, before, rtol=1e-4, atol=1e-5), path


def test_a_value_layer_that_is_not_affine_is_not_pooled_first():
    module = randomise(nn.AsymmetricAttention(8, 8, 4, 6, 8)).double().eval()
    low, high = (torch.randn(2, 8, 9, 7, dtype=torch.float64) for _ in range(2))
    plain = module(low, high)
    sizes = []
    module.f_value.register_forward_hook(lambda layer, inputs, output: sizes.append(tuple(output.shape[2:])))
    torch.testing.assert_close(module(low, high), plain)
    module.f_value = Wrapper(module.f_value)
    got = module(low, high)
    assert sizes == [(110, 1), (9, 7)]
    query, key, value = module.f_query(high), module.psp(module.f_key(low)), module.psp(module.f_value(low))
    weights = (module.scale * query.flatten(2).mT @ key).softmax(2)
    torch.testing.assert_close(got, module.W((value @ weights.mT).unflatten(2, (9, 7))))
    assert not torch.allclose(got, plain)


@pytest.mark.parametrize("name", ["da_module", "compact_position"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation(name):
    """8-bit linear layers: near the result, and not the result."""
    module, inputs = made(name)
    quantised = torch.ao.quantization.quantize_dynamic(module, {tnn.Linear})
    linear = [m for m in module.modules() if isinstance(m, tnn.Linear)]
    assert linear and not any(isinstance(m, tnn.Linear) for m in quantised.modules())
    with torch.no_grad():
        expected, got = module(*inputs), quantised(*inputs)
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()


@each_module
def test_replicas_of_data_parallel(name, monkeypatch):
    """A replica has the tensors as attributes and no parameters(). The broadcast to the devices is replaced."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    module, inputs = made(name)
    expected = module(*inputs)
    for replica in replicate.replicate(module, [0, 1]):
        assert not list(replica.parameters())
        torch.testing.assert_close(replica(*inputs), expected)
