"""The sums of the concatenation mode against the pairs written out."""

import copy

import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import parametrize, prune

import segattn_ops
from segattn_ops import nn
from segattn_ops.nn._pairwise import concatenation, relu_sum

from ..peers import blocks, randomise


def parts(queries=5, keys=7, channels=3, batch=2):
    """a, b, g in float64; more channels than are summed at once where asked for."""
    shapes = ((batch, queries), (batch, keys), (batch, channels, keys))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def written_out(a, b, g):
    return torch.einsum("bij,bcj->bci", (a[:, :, None] + b[:, None]).relu() / b.shape[1], g)


def cube(function):
    return lambda a, b, g: function(a, b, g).pow(3).sum()


def assert_all_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_the_first_and_second_order():
    a, b, g = parts(3, 4, channels=34, batch=1)  # two chunks of channels
    torch.testing.assert_close(relu_sum(a, b, g), written_out(a, b, g))
    assert torch.autograd.gradcheck(relu_sum, (a, b, g), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(relu_sum, parts(), check_fwd_over_rev=True)


def test_ties():
    a = torch.tensor([[1.0, -1.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)  # a + b is 0 for several pairs
    b = torch.tensor([[-1.0, 1.0, -1.0, 0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    expected, output = written_out(a, b, g), relu_sum(a, b, g)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(output)
    wanted = torch.autograd.grad((expected * weight).sum(), (a, b, g))
    assert_all_close(torch.autograd.grad((output * weight).sum(), (a, b, g)), wanted)


class ReluSum(tnn.Module):
    def forward(self, a, b, g):
        return relu_sum(a, b, g)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    """An exported program counts the keys below a query in another way, which ONNX has."""
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 2: auto})
    sample = tuple(t.detach() for t in parts())
    program = torch.export.export(ReluSum(), sample, dynamic_shapes=shapes, strict=strict).module()
    ties = [torch.randint(-5, 6, (3, n)).double().requires_grad_() for n in (60, 70)]  # more than any sort keeps stable
    for a, b, g in (parts(queries=9, keys=6, batch=3), (*ties, parts(keys=70, batch=3)[2])):
        expected, output = written_out(a, b, g), program(a, b, g)
        torch.testing.assert_close(output, expected)
        weight = torch.randn_like(output)
        wanted = torch.autograd.grad((expected * weight).sum(), (a, b, g))
        assert_all_close(torch.autograd.grad((output * weight).sum(), (a, b, g)), wanted)


def test_transforms_of_torch_func():
    tensors = [t.detach() for t in parts()]
    gradient = torch.func.grad(cube(relu_sum), argnums=(0, 1, 2))
    expected = torch.func.grad(cube(written_out), argnums=(0, 1, 2))(*tensors)
    assert_all_close(gradient(*tensors), expected)
    # Samples are independent: those of the mapped function are those of the batch.
    mapped = torch.vmap(torch.func.grad(lambda *each: cube(relu_sum)(*(t[None] for t in each)), argnums=(0, 1, 2)))
    assert_all_close(mapped(*tensors), expected)
    a, b, g = tensors
    shared = torch.vmap(relu_sum, in_dims=(None, 0, None))(a, torch.stack([b, -b]), g)
    torch.testing.assert_close(shared[1], written_out(a, -b, g))

    def of_a(function):
        return lambda t: cube(function)(t, b, g)

    hessian = torch.func.hessian(of_a(written_out))(a)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(outer(torch.func.grad(of_a(relu_sum)))(a), hessian)

    def third(function):
        second = lambda t: torch.func.grad(function)(t).sin().sum()  # noqa: E731
        return torch.func.grad(lambda t: torch.func.grad(second)(t).sin().sum())(a)

    torch.testing.assert_close(third(of_a(relu_sum)), third(of_a(written_out)))


class Pairs(tnn.Module):
    """A NonLocal2d in the concatenation mode, with the projection on all pairs."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        theta, phi, g = (layer(x).flatten(2) for layer in (self.block.theta, self.block.phi, self.block.g))
        pairs = torch.cat(torch.broadcast_tensors(theta[..., None], phi[:, :, None]), 1)
        energies = self.block.concat_project(pairs)[:, 0] / phi.shape[2]
        return x + self.block.W((g @ energies.mT).unflatten(2, x.shape[2:]))


def block(**changes):
    """In float64, with weights that are not zero; ``changes`` are further layers of the projection."""
    module = randomise(nn.NonLocal2d(6, 4, mode="concatenation")).double().eval()
    for name, layer in changes.items():
        setattr(module.concat_project, name, layer.double())
    return module


def test_a_gradient_penalty():
    """The gradient of a function of the gradient."""
    module = block()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)

    def penalty(f):
        (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        wanted = (x, module.theta.weight, module.phi.weight, module.g.weight, module.concat_project[0].weight)
        return torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().mean(), wanted)

    assert_all_close(penalty(module), penalty(Pairs(module)))


def test_an_ensemble_by_vmap():
    modules = [block() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    got = torch.vmap(lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([m(x) for m in modules]))


class Adapter(tnn.Module):
    """What a fine-tuning library puts in a layer's place, with the weight still readable."""

    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, tnn.Conv2d(base.in_channels, base.out_channels, 1)
        tnn.init.normal_(self.delta.weight)

    weight = property(lambda self: self.base.weight)

    def forward(self, x):
        return self.base(x) + self.delta(x).tanh()


class Halved(tnn.Module):
    def forward(self, weight):
        return weight / 2


def parametrised():
    module = block()
    parametrize.register_parametrization(module.concat_project[0], "weight", Halved())
    return module


def pruned():
    module = block()
    prune.random_unstructured(module.concat_project[0], "weight", 0.5)
    return module


PROJECTIONS = {
    "plain": block,
    "with a bias": lambda: block(**{"0": randomise(tnn.Conv2d(8, 1, 1))}),
    "an adapter": lambda: block(**{"0": Adapter(block().concat_project[0])}),
    "another activation": lambda: block(**{"1": tnn.LeakyReLU(0.1)}),
    "a third layer": lambda: block(**{"2": tnn.Hardtanh(0, 0.3)}),
    "parametrised": parametrised,
    "pruned": pruned,
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_projection_is_called_whatever_it_is(name):
    module = PROJECTIONS[name]()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    expected = Pairs(module)(x)
    torch.testing.assert_close(module(x), expected)
    for layer in module.concat_project.children():  # each is part of the result
        kept, layer.forward = layer.forward, lambda t, *_: torch.zeros_like(t[:, :1] if t.dim() == 4 else t)
        assert not torch.allclose(module(x), expected)
        layer.forward = kept


def test_only_what_is_exact_is_shortened():
    """A 1 x 1 convolution and a ReLU see N + M + 1 columns and N energies; any other projection all pairs."""

    def seen(module):
        sizes, x = [], torch.randn(1, 6, 4, 5, dtype=torch.float64)
        for layer in module.concat_project:
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
        module(x)
        return sizes

    assert seen(PROJECTIONS["with a bias"]()) == [41, 20]
    assert seen(PROJECTIONS["parametrised"]()) == [41, 20]
    assert seen(PROJECTIONS["an adapter"]()) == [400, 400]
    assert seen(PROJECTIONS["another activation"]()) == [400, 400]
    assert seen(block(**{"0": tnn.Conv2d(8, 1, 3, padding=1)})) == [400, 400]


def test_weights_at_zero_have_a_gradient():
    """Where the bias makes the energies positive, as in the blocks with the pairs written out."""
    module = PROJECTIONS["with a bias"]()
    convolution = module.concat_project[0]
    tnn.init.zeros_(convolution.weight)
    tnn.init.ones_(convolution.bias)
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(f(x).square().sum(), (convolution.weight, convolution.bias))
        for f in (module, Pairs(module))
    )
    assert expected[0].abs().max() > 1e-3
    assert_all_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_that_of_eager(dtype):
    projection = randomise(block().concat_project).to(dtype)
    theta, phi, g = (torch.randn(2, 4, n).to(dtype) for n in (30, 40, 40))
    exact = concatenation(projection.double(), theta.double(), phi.double(), g.double())
    projection = projection.to(dtype)
    pairs = torch.cat(torch.broadcast_tensors(theta[..., None], phi[:, :, None]), 1)
    eager = g @ (projection(pairs)[:, 0] / 40).mT
    error, eager_error = ((t.double() - exact).abs().max() for t in (concatenation(projection, theta, phi, g), eager))
    assert error <= 2 * eager_error


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_converted_block_follows_its_projection(dims):
    """Pruning after the conversion, and a gradient penalty through it."""
    original = randomise(blocks._NonLocalBlockND(6, None, dims, False, True, "concatenation")).double().eval()
    model = tnn.Sequential(copy.deepcopy(original))
    segattn_ops.convert(model)
    assert type(model[0]) is not type(original)
    x = torch.randn(2, 6, *(5, 4, 3)[:dims], dtype=torch.float64, requires_grad=True)
    before = model(x)
    for module in (original, model[0]):
        prune.l1_unstructured(module.concat_project[0], "weight", 0.5)
    torch.testing.assert_close(model(x), original(x))
    assert not torch.allclose(model(x), before)

    def penalty(module):
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(penalty(model), penalty(original))


def test_mmcvs_projection():
    """ConvModule: its ReLU is in place, and its layers have names of their own."""
    bricks = pytest.importorskip("mmcv.cnn.bricks")
    module = block()
    expected = module(x := torch.randn(2, 6, 4, 5, dtype=torch.float64))
    projection = bricks.ConvModule(8, 1, 1, bias=False, act_cfg={"type": "ReLU"}).double()
    projection.conv.weight.data.copy_(module.concat_project[0].weight)
    module.concat_project = projection
    sizes = []
    projection.conv.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    torch.testing.assert_close(module(x), expected)
    assert sizes == [2 * 41]
    module.concat_project = bricks.ConvModule(8, 1, 1, norm_cfg={"type": "BN"}).double().eval()
    torch.testing.assert_close(module(x), Pairs(module)(x))
