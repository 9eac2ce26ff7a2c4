"""What a converted model still is and does, and that a failing conversion changes nothing."""

import copy
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import segattn_ops
from segattn_ops.conversion import scripting
from segattn_ops.conversion.block import FusedBlock
from segattn_ops.nn import _pairwise

from ..peers import ann, blocks, randomise
from . import convert_blocks as forks
from .interop import need


def converted(block: tnn.Module) -> tnn.Module:
    """A converted copy of the block."""
    block = copy.deepcopy(block)
    assert segattn_ops.convert(block).converted == [""]
    return block


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestInterface:
    def test_arguments(self) -> None:
        original = forks.Extended()
        block = converted(original)
        x, mask = torch.randn(2, 16, 4, 5), torch.rand(2, 1, 4, 5)
        for args, kwargs in (
            ((x,), {}),
            ((), {"x": x}),
            ((x, None), {"return_attention": False}),
            ((x,), {"mask": mask}),
            ((x, mask, False), {}),
        ):
            close(block(*args, **kwargs), original(*args, **kwargs))
        y, attention = block(x, return_attention=True)
        close(y, original(x))
        assert attention == "attention"
        for args, kwargs in (((), {}), ((x,), {"masks": mask}), ((x, x, False, x), {}), ((x,), {"x": x})):
            with pytest.raises(TypeError, match="forward"):
                block(*args, **kwargs)
        assert inspect.signature(block.forward) == inspect.signature(original.forward)

    def test_class_and_methods(self) -> None:
        block = converted(forks.Extended())
        assert isinstance(block, forks.Extended) and isinstance(block, FusedBlock)
        assert (block.width, block.stride, block.norm_first) == (16, 1, False)
        assert issubclass(block.reset(), forks.Extended) and block.gamma.item() == 0
        close(block.attended(x := torch.randn(1, 16, 3, 3)), forks.Extended.attended(block, x))

    def test_copies_and_files(self, tmp_path) -> None:
        block = converted(forks.OutputDropout()).eval()
        x = torch.randn(1, 16, 4, 4)
        torch.save(block, tmp_path / "block.pth")
        for other in (copy.deepcopy(block), torch.load(tmp_path / "block.pth", weights_only=False)):
            assert type(other) is type(block) and other.gamma is not block.gamma
            close(other(x), block(x))
            assert not torch.equal(other.train()(x), other(x))

    def test_initialisation_by_mmengine(self) -> None:
        base = need("mmengine.model").BaseModule

        class Head(base):
            def __init__(self):
                super().__init__()
                self.block = need("mmcv.cnn").NonLocal2d(8)

        head = Head()
        randomise(head)
        assert segattn_ops.convert(head).converted == ["block"]
        head.init_weights()
        assert not head.block.conv_out.conv.weight.any()

    def test_children_are_called(self) -> None:
        class LoRA(tnn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer, self.down = layer, tnn.Conv2d(layer.in_channels, 1, 1, bias=False)
                self.up = tnn.Conv2d(1, layer.out_channels, 1, bias=False)

            def forward(self, x):
                return self.layer(x) + self.up(self.down(x))

        class Doubled(tnn.Module):
            def forward(self, weight):
                return 2 * weight

        original = randomise(blocks.NONLocalBlock2D(8)).eval()
        block = converted(original)
        x = torch.randn(1, 8, 6, 6)
        for b in (original, block):
            torch.manual_seed(1)
            b.theta = LoRA(b.theta)
            prune.random_unstructured(b.phi[0], "weight", 0.5)
            parametrize.register_parametrization(b.g[0], "weight", Doubled())
            b.W[0].register_forward_hook(lambda module, args, output: 3 * output)
        close(block(x), original(x))

    def test_replicas_of_data_parallel_have_no_parameters(self) -> None:
        for original in (blocks.PAM_Module(8), blocks.CAM_Module(8), blocks.NONLocalBlock2D(8).eval()):
            block = converted(randomise(original))
            replicas = {}
            for module in (*block.modules(),):
                replicas[module] = replica = module._replicate_for_data_parallel()
                for name, parameter in module._parameters.items():
                    setattr(replica, name, None if parameter is None else parameter.detach().clone())
            for module, replica in replicas.items():
                for name, child in module._modules.items():
                    replica._modules[name] = replicas[child]
            x = torch.randn(1, 8, 4, 4)
            assert not list(replicas[block].parameters())
            close(replicas[block](x), block(x))

    def test_compiled_before_the_conversion(self) -> None:
        model = tnn.Sequential(randomise(blocks.PAM_Module(16)))
        compiled = torch.compile(model, backend="eager")
        x = torch.randn(1, 16, 4, 4)
        expected = compiled(x)
        segattn_ops.convert(compiled)
        close(compiled(x), expected)
        with pytest.raises(ValueError, match="PAM_Module: input must have 4 dimensions"):
            compiled(x[0])  # the compiled code is the new one

    @pytest.mark.parametrize(
        "make", [lambda: blocks.PAM_Module(16), lambda: blocks.CAM_Module(16), lambda: blocks.NONLocalBlock2D(16)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_under_autocast(self, make, dtype: torch.dtype) -> None:
        original = randomise(make()).eval()
        block, x = converted(original), torch.randn(1, 16, 4, 4).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = block(x), original(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y.float(), expected.float(), rtol=0.1, atol=0.1)

    def test_export_by_name_of_the_argument(self) -> None:
        block = converted(randomise(blocks.PAM_Module(16)))
        height = torch.export.Dim("height", min=2, max=64)
        exported = torch.export.export(block, (), {"x": torch.randn(1, 16, 6, 5)}, dynamic_shapes={"x": {2: height}})
        x = torch.randn(1, 16, 9, 5)
        close(exported.module()(x=x), block(x))


class TestHooks:
    def test_hook_on_a_child_that_the_fused_forward_skips(self) -> None:
        original = forks.Fork()
        maps = []
        original.softmax.register_forward_hook(lambda module, args, output: maps.append(output))
        model = tnn.Sequential(original)
        report = segattn_ops.convert(model)
        assert "while a hook stands on softmax" in str(report) and "record_attention" in str(report)
        assert not maps  # convert itself calls no hook
        model(torch.randn(1, 16, 3, 4))
        assert maps[0].shape == (1, 12, 12)

    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hook_that_comes_later(self, register: str) -> None:
        block = converted(randomise(blocks.DAModule(8, 3, 3, 4)).eval().position_attention_module)
        seen = []
        handle = getattr(block.pa, register)(lambda *_: seen.append(1))
        block(torch.randn(1, 8, 3, 4))
        handle.remove()
        block(torch.randn(1, 8, 3, 4))
        assert seen == [1]

    def test_hooks_of_this_package_watch_the_fused_forward(self) -> None:
        """visualize.record_attention puts hooks on every module, and takes the map from the op."""

        def hook(*_):
            seen.append(1)

        block, seen = converted(forks.Fork()), []
        hook.__module__ = "segattn_ops.visualize.record"
        block.softmax.register_forward_hook(hook)
        block(torch.randn(1, 16, 3, 4))
        assert not seen

    def test_child_that_is_replaced_later(self) -> None:
        original = forks.Fork()
        block = converted(original)
        for b in (original, block):
            b.softmax = tnn.Sigmoid()
        x = torch.randn(1, 16, 3, 4)
        close(block(x), original(x))

    @pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    def test_backward_hook(self, register: str) -> None:
        block = converted(forks.Fork())
        seen = []
        getattr(block.softmax, register)(lambda *_: seen.append(1) or None)
        block(torch.randn(1, 16, 3, 4)).sum().backward()
        assert seen == [1]


class Trunk(tnn.Module):
    """A convolution, a batch norm, a block."""

    def __init__(self, block: tnn.Module | None = None):
        super().__init__()
        self.conv, self.norm = tnn.Conv2d(3, 16, 1), tnn.BatchNorm2d(16)
        self.block = forks.Fork() if block is None else block

    def forward(self, x):
        return self.block(self.norm(self.conv(x)))


class FailsAfterwards(Trunk):
    """Runs until its block is converted, and updates its statistics in evaluation mode."""

    error: type[BaseException] = RuntimeError

    def forward(self, x):
        self.norm.train()
        y = super().forward(x) * torch.rand(()) * random.random() * np.random.rand()
        if isinstance(self.block, FusedBlock):
            raise self.error("second run")
        return y


class TestAllOrNothing:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_second_run_fails(self, error: type[BaseException]) -> None:
        model = FailsAfterwards()
        model.error = error
        model.train()
        model.block.eval()
        block, state = model.block, copy.deepcopy(model.state_dict())
        sample = torch.rand(2, 3, 6, 6)
        attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
        torch.manual_seed(4), random.seed(4), np.random.seed(4)
        expected = torch.rand(1), random.random(), np.random.rand()
        torch.manual_seed(4), random.seed(4), np.random.seed(4)
        with pytest.raises(error, match="second run"):
            segattn_ops.convert(model, sample)
        assert model.block is block and type(block) is forks.Fork
        assert model.training and model.norm.training and not block.training
        assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert (torch.rand(1), random.random(), np.random.rand()) == expected

    def test_root_is_the_block(self) -> None:
        class Fussy(forks.Fork):
            def __call__(self, *args):
                if args[0].shape[0] == 5 and isinstance(self, FusedBlock):
                    raise RuntimeError("second run")
                return super().__call__(*args)

        block = Fussy()
        block.compile(backend="eager")
        implementation = block._compiled_call_impl
        with pytest.raises(RuntimeError, match="second run"):
            segattn_ops.convert(block, torch.randn(5, 16, 4, 4))
        assert type(block) is Fussy and block._compiled_call_impl is implementation

    def test_successful_conversion_changes_no_statistics_and_no_random_state(self) -> None:
        model = Trunk(blocks.NONLocalBlock2D(16)).train()
        state, sample = copy.deepcopy(model.state_dict()), torch.rand(2, 3, 6, 6)
        torch.manual_seed(4)
        expected = torch.rand(1)
        torch.manual_seed(4)
        segattn_ops.convert(model, sample)
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class TestSample:
    def check(self, model: tnn.Module, sample=None, **options) -> segattn_ops.ConversionReport:
        report = segattn_ops.convert(model, torch.rand(1, 3, 6, 7) if sample is None else sample, **options)
        assert report.converted == ["block"]
        return report

    def test_sample_is_copied_for_each_run(self) -> None:
        class InPlace(Trunk):
            def forward(self, x):
                return super().forward(x.sub_(0.5).mul_(4))

        sample = torch.rand(1, 3, 6, 7)
        before = sample.clone()
        assert self.check(InPlace(), {"x": sample}).difference < 1e-4
        assert torch.equal(sample, before)
        with_history = (torch.rand(1, 3, 6, 7, requires_grad=True) * 2,)
        self.check(Trunk(), with_history)

    def test_random_numbers_are_the_same_in_both_runs(self) -> None:
        class Noisy(Trunk):
            def forward(self, x):
                scale = random.random() + np.random.rand()
                return F.dropout(super().forward(x), 0.5) * scale

        assert self.check(Noisy()).difference < 1e-4

    def test_equal_nan_and_infinity(self) -> None:
        class Special(Trunk):
            bad = float("nan")

            def forward(self, x):
                y = super().forward(x)
                bad = torch.tensor([float("nan"), float("inf"), 1.0])
                return {"out": y, "boxes": bad, "more": [bad[:1], None, "text"]}

        assert self.check(Special()).difference < 1e-4

        class New(Special):
            def forward(self, x):
                return super().forward(x)["out"] * (float("nan") if isinstance(self.block, FusedBlock) else 1)

        with pytest.raises(ValueError, match="differ by inf"):
            segattn_ops.convert(New(), torch.rand(1, 3, 6, 7))

    @pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.02), (torch.float32, 1.0005)])
    def test_tolerance_by_dtype(self, dtype: torch.dtype, factor: float) -> None:
        class Slightly(Trunk):
            def forward(self, x):
                return super().forward(x) * (factor if isinstance(self.block, FusedBlock) else 1)

        model = Slightly().to(dtype)
        with pytest.raises(ValueError, match="the tolerance 1.0e-04"):
            segattn_ops.convert(model, torch.rand(1, 3, 6, 7).to(dtype), tolerance=1e-4)
        self.check(model, torch.rand(1, 3, 6, 7).to(dtype))
        model = Slightly().double()
        with pytest.raises(ValueError, match="the tolerance 1.0e-06"):
            segattn_ops.convert(model, torch.rand(1, 3, 6, 7).double())

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"convert: tolerance must be finite and not negative \(got -1\)"):
            segattn_ops.convert(Trunk(), tolerance=-1)
        with pytest.raises(TypeError, match="convert: tolerance must be a number or None"):
            segattn_ops.convert(Trunk(), tolerance="1e-3")

    def test_gamma_zero(self) -> None:
        class Branch(Trunk):
            """Its output has the attended features alone, doubled after the conversion."""

            def forward(self, x):
                y = self.conv(x)
                return (self.block(y) - y) * (2 if isinstance(self.block, FusedBlock) else 1)

        model = Branch(forks.Fork(gamma=0.0))
        gamma, data = model.block.gamma, model.block.gamma.data_ptr()
        with pytest.raises(ValueError, match="differ by 1.0e\\+00"):
            segattn_ops.convert(model, torch.rand(1, 3, 6, 7))
        assert model.block.gamma is gamma and gamma.item() == 0 and gamma.data_ptr() == data
        report = self.check(Trunk(blocks.NONLocalBlock2D(16, bn_layer=False)))
        assert "other than 0" not in str(report)
        zero = Trunk(blocks.NONLocalBlock2D(16, bn_layer=False))
        tnn.init.zeros_(zero.block.W.weight)
        report = self.check(zero)
        assert "compared with gamma or the last layer of block other than 0" in str(report)
        assert not zero.block.W.weight.any()

    def test_output_without_numbers(self) -> None:
        class Labels(Trunk):
            def forward(self, x):
                return super().forward(x).argmax(1)

        assert "no output is a floating-point tensor" in str(self.check(Labels()))

    def test_short_form_of_the_report(self) -> None:
        report = self.check(Trunk())
        assert repr(report).startswith("<ConversionReport: 1 converted, 0 left, 0 already, outputs differ by ")
        assert len(repr(report)) < 100


SCRIPTABLE = {
    "PAM": (lambda: blocks.PAM_Module(16), (2, 16, 5, 4)),
    "CAM": (lambda: blocks.CAM_Module(16), (2, 16, 5, 4)),
    "criss-cross": (lambda: blocks.CrissCrossAttention(16), (2, 16, 5, 4)),
    "mmcv criss-cross": (lambda: need("mmcv.ops.cc_attention").CrissCrossAttention(16), (2, 16, 5, 4)),
    "embedded": (lambda: blocks.NONLocalBlock2D(16), (2, 16, 5, 4)),
    "gaussian": (lambda: blocks.NONLocalBlock2D(16, mode="gaussian"), (2, 16, 5, 4)),
    "dot": (lambda: blocks._NonLocalBlockND(8, dimension=1, mode="dot"), (2, 8, 9)),
    "timm": (lambda: need("timm.layers").NonLocalAttn(16), (2, 16, 5, 4)),
    "dropout": (lambda: forks.OutputDropout(), (2, 16, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
class TestScripting:
    @pytest.mark.parametrize("name", SCRIPTABLE)
    def test_script(self, name: str, tmp_path) -> None:
        make, size = SCRIPTABLE[name]
        model = tnn.Sequential(converted(randomise(make()))).eval()
        x = torch.randn(size, requires_grad=True)
        expected = model(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
        scripted = torch.jit.script(model)
        assert list(scripted.state_dict()) == list(model.state_dict())
        torch.jit.save(scripted, tmp_path / "model.pt")
        for module in (scripted, torch.jit.load(tmp_path / "model.pt"), model):
            y = module(x)
            close(y, expected)
            close(torch.autograd.grad(y.square().sum(), x)[0], gradient)
        with pytest.raises((ValueError, torch.jit.Error), match="input must have"):
            scripted(x[None, None])
        if name == "dropout":
            with pytest.raises(torch.jit.Error, match="its dropout in training is not scripted"):
                scripted.train()(x)
        else:
            scripted.train()(x)

    def test_script_of_two_inputs(self) -> None:
        """ANN's stage takes (low, high), and its queries are of high."""
        block = converted(randomise(ann.AFNB(8, 16, 16, 4, 6, 0.05).stages[0]).eval())
        low, high = torch.randn(2, 8, 11, 9), torch.randn(2, 16, 7, 5)
        close(torch.jit.script(block)(low, high), block(low, high))

    def test_dot_products_in_half_precision_are_summed_in_float32(self) -> None:
        """Sums over 2,000 positions of values of 30 overflow float16."""
        scripted = torch.jit.script(scripting.dot_product)
        theta, phi, g = (30 * torch.randn(1, 8, 40, 50).half() for _ in range(3))
        expected = _pairwise.dot_product(theta.flatten(2), phi.flatten(2), g.flatten(2)).unflatten(2, (40, 50))
        assert expected.isfinite().all()
        torch.testing.assert_close(scripted(theta, phi, g), expected, rtol=0, atol=0)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_trace(self) -> None:
        model = tnn.Sequential(converted(randomise(blocks.CAM_Module(16))))
        x = torch.randn(1, 16, 4, 5)
        close(torch.jit.trace(model, x)(x), model(x))

    def test_what_cannot_be_scripted_says_so(self) -> None:
        block = converted(blocks.NONLocalBlock2D(8, mode="concatenation"))
        with pytest.raises(RuntimeError, match=r"NONLocalBlock2D: .*; use torch.jit.trace or torch.export"):
            torch.jit.script(block)
        block = converted(forks.Fork())
        block.softmax.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="Fork: softmax has a hook or was replaced"):
            torch.jit.script(block)
