"""torch.fx, torch.jit.trace, torch.export and meta tensors: every module, and right at another size than recorded."""

import copy
import io

import pytest
import torch

from segattn_ops import models, nn

from ..peers import randomise
from .test_nn import BLOCKS

# A module of each class, NonLocal2d in all modes.
NAMES = [
    *("position", "channel", "criss_cross", "recurrent", "apnb", "afnb", "compact_encoder", "compact_position"),
    *("compact_channel", "channel_attention_block", "refinement"),
    *(n for n in BLOCKS if n.startswith("non_local") and n.endswith("2d_sub1_batch_norm")),
    *("non_local_concatenation_1d_sub0_batch_norm", "non_local_concatenation_3d_sub0_batch_norm"),
]
MODULES = {name: (BLOCKS[name][0], BLOCKS[name][2]) for name in NAMES}
MODULES["da_module"] = (lambda: nn.DAModule(8), ((2, 8, 5, 6),))
MODULES["gating"] = (lambda: nn.CrossLevelGatingDecoder(8, 6), ((2, 8, 5, 6), (2, 8, 3, 3)))
each_module = pytest.mark.parametrize("name", MODULES)


def tokens(shape):
    return shape[1:] == (50, 16)


def made(name):
    """The module, inputs to record it with, and inputs of another batch size and another size."""
    make, shapes = MODULES[name]
    others = [(s[0] + 1, *s[1:]) if tokens(s) else (s[0] + 1, s[1], *(n + 4 for n in s[2:])) for s in shapes]
    return randomise(make()).eval(), [torch.randn(s) for s in shapes], [0.5 * torch.randn(s) for s in others]


@each_module
def test_fx(name):
    module, _, other = made(name)
    recorded = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(recorded(*other), module(*other))
    called = {module.get_submodule(node.target) for node in recorded.graph.nodes if node.op == "call_module"}
    layers = {m for m in module.modules() if m.__module__.startswith("torch.nn") and not list(m.children())}
    assert layers <= called


@each_module
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace(name):
    """Also after a file: no Python is called in a saved trace."""
    module, inputs, other = made(name)
    traced = torch.jit.trace(module, tuple(inputs))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    expected = module(*other)
    for call in (traced, torch.jit.load(file)):
        torch.testing.assert_close(call(*other), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_in_float64_computes_in_float64():
    """DAModule's scale is a power of the number of positions, which a trace computes."""
    module, inputs, other = made("da_module")
    traced = torch.jit.trace(module.double(), tuple(x.double() for x in inputs))
    other = [x.double() for x in other]
    torch.testing.assert_close(traced(*other), module(*other), rtol=1e-12, atol=1e-12)


RECORDED = {
    "trace": torch.jit.trace,
    "export": lambda module, inputs: torch.export.export(module, inputs).module(),
    "strict export": lambda module, inputs: torch.export.export(module, inputs, strict=True).module(),
}


@each_module
@pytest.mark.parametrize("way", RECORDED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_recorded_program_has_the_gradients_of_the_module(name, way):
    """torch.export with strict=True loses the backward of a torch.autograd.Function without a word."""
    module, inputs, _ = made(name)
    module = module.double()
    leaves = [x.double().requires_grad_() for x in inputs]

    def gradients(function):
        output = function(*leaves)
        return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), leaves)

    program = RECORDED[way](module, tuple(x.detach() for x in leaves))
    torch.testing.assert_close(gradients(program), gradients(module), rtol=1e-9, atol=1e-10)


EXPORTED = [
    *("position", "channel", "recurrent", "afnb", "compact_position", "da_module", "gating"),
    "non_local_concatenation_2d_sub1_batch_norm",
]


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name):
    module, inputs, other = made(name)
    auto = torch.export.Dim.AUTO
    dims = tuple({0: auto} if tokens(x.shape) else dict.fromkeys((0, *range(2, x.dim())), auto) for x in inputs)
    exported = torch.export.export(module, tuple(inputs), dynamic_shapes=dims).module()
    torch.testing.assert_close(exported(*other), module(*other))


@each_module
def test_meta(name):
    module, inputs, _ = made(name)
    expected = module(*inputs)
    leaves = [x.to("meta").requires_grad_() for x in inputs]
    output = copy.deepcopy(module).to("meta")(*leaves)
    assert output.device.type == "meta"
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
    output.sum().backward()
    assert all(leaf.grad.shape == x.shape for leaf, x in zip(leaves, inputs, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_in_16_bits_can_be_trained():
    """with_low is the same in the trace, in its check without gradients and in training."""
    module = randomise(nn.PositionAttention(16)).bfloat16()
    x = torch.randn(2, 16, 7, 9).bfloat16()
    traced = torch.jit.trace(module, x)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for call, leaf in zip((module, traced), leaves, strict=True):
        call(leaf).float().square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("name", ["danet_resnet50", "dfn_resnet50"])
def test_fx_of_a_network(name):
    """torchvision's feature extraction, on an image of another size than that of any default."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    network = randomise(getattr(models, name)(3)).eval()
    image = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        expected = network(image)
        recorded = torch.fx.symbolic_trace(network)(image)
        assert list(recorded) == list(expected)
        for key, logits in expected.items():
            torch.testing.assert_close(recorded[key], logits)
        _, names = extraction.get_graph_node_names(network)
        (logits,) = extraction.create_feature_extractor(network, names[-1:])(image).values()
    torch.testing.assert_close(logits, list(expected.values())[-1])


HEADS = {
    "ccnet": lambda: models.CCNetHead(32, 3),
    "nonlocal": lambda: models.NonLocalHead(32, 3),
    "ann": lambda: models.ANNHead(16, 32, 3),
}


@pytest.mark.parametrize("name", HEADS)
def test_fx_of_a_head(name):
    head = randomise(HEADS[name]()).eval()
    maps = [torch.randn(2, channels, 6, 5) for channels in ((16, 32) if name == "ann" else (32,))]
    torch.testing.assert_close(torch.fx.symbolic_trace(head)(*maps), head(*maps))


def test_a_layer_of_dfn_that_is_not_affine_is_not_pooled_first():
    head = randomise(models.DFNHead((4, 4, 4, 8), 3)).eval()
    maps = [torch.randn(1, channels, n, n) for channels, n in ((4, 9), (4, 5), (4, 3), (8, 2))]
    plain = head(*maps)["smooth_4"]
    seen = []
    head.out_conv = torch.nn.Sequential(head.out_conv, torch.nn.Tanh())
    head.out_conv.register_forward_hook(lambda layer, inputs, output: seen.append(tuple(output.shape[2:])))
    assert not torch.allclose(head(*maps)["smooth_4"], plain)
    assert seen == [(2, 2)]


@each_module
def test_script_is_refused(name):
    with pytest.raises(RuntimeError, match=r"^\w+: torch.jit.script cannot compile this module; use torch.export"):
        torch.jit.script(made(name)[0])


@pytest.mark.parametrize("head", [models.DANetHead, models.CCNetHead, models.NonLocalHead])
def test_script_of_a_network_is_refused(head):
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile this module; use torch.export"):
        torch.jit.script(head(64, 5))
