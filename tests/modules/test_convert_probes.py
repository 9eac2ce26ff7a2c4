"""What convert() finds out about a block before it replaces its forward: formula, sizes, training, ranks, names."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.utils.prune
from torch import nn as tnn

import segattn_ops
from segattn_ops import visualize
from segattn_ops.conversion.block import FusedBlock

from ..peers import ann, blocks, randomise
from . import convert_blocks as forks


def convert(block: tnn.Module, **options) -> tuple[segattn_ops.ConversionReport, tnn.Module]:
    """The report on a copy of the block inside a model, and that copy."""
    model = tnn.Sequential(copy.deepcopy(block))
    return segattn_ops.convert(model, **options), model[0]


@contextmanager
def counted(block: tnn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the calls of the fused forward."""
    calls: list[int] = []
    fused = type(block).fused_forward
    with monkeypatch.context() as patch:
        patch.setattr(type(block), "fused_forward", lambda self, *x: calls.append(1) or fused(self, *x))
        yield calls


@pytest.mark.parametrize(
    ("fork", "reason"),
    [
        (forks.PoolsLargeMaps, "on 33 x 37 positions in float32"),
        (forks.PoolsLongSides, "on 2 x 70 positions in float32"),
        (forks.PadsOddSides, "its result differs by"),
        (forks.AcrossTheBatch, "its result differs by"),
        (forks.DetachesTheKey, "its gradient differs by"),
        (forks.ReturnsTheMap, "its result differs in kind"),
        (forks.StoresTheMap, "its forward stores last_map"),
        (forks.CollectsTheMaps, "its forward stores maps"),
        (forks.ClampsTheKey, "with inputs 10 times as large"),
        (forks.CountsInABuffer, "its forward changes a buffer or its input"),
        (forks.AlwaysRandom, "in evaluation mode"),
        (forks.ScaledVolumeCAM, "on 3 x 4 x 5 positions in float64"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_function_is_left_alone(fork: type[tnn.Module], reason: str) -> None:
    torch.manual_seed(5)
    report, block = convert(fork())
    assert type(block) is fork
    assert reason in report.left["0"]


@pytest.mark.parametrize(
    "fork",
    [
        forks.FunctionalDropout,
        forks.OutputDropout,
        forks.RareDropPath,
        forks.RareFunctionalDropout,
        forks.NoiseOnTheOutput,
    ],
)
def test_what_a_block_does_only_in_training_is_kept(fork: type[tnn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    original = fork()
    report, block = convert(original)
    assert "the original's forward runs" in str(report) and report.converted == ["0"]
    x = torch.randn(6, 16, 5, 6)
    with counted(block, monkeypatch) as calls:
        for training in (True, False):
            original.train(training), block.train(training)
            torch.manual_seed(3)
            expected = original(x)
            torch.manual_seed(3)
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1  # in evaluation mode


def test_active_dropout_is_seen_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, block = convert(forks.OutputDropout())
    x = torch.randn(2, 16, 4, 4)
    with counted(block, monkeypatch) as calls:
        block.eval()
        block.dropout.train()  # Monte Carlo dropout
        assert not torch.equal(block(x), block(x)) and not calls
        block.train()
        block.dropout.p = 0.0
        block(x)
        assert len(calls) == 1


def test_other_result_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    original = forks.SharperInTraining()
    report, block = convert(original)
    assert "in training: it does there what the replacement does not" in str(report)
    x = torch.randn(2, 16, 4, 4)
    for training in (True, False):
        torch.testing.assert_close(block.train(training)(x), original.train(training)(x), rtol=1e-4, atol=1e-5)


def test_dropout_inside_a_layer_that_is_called_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = forks.Fork()
    original.value_conv = tnn.Sequential(original.value_conv, tnn.Dropout(0.5))
    report, block = convert(original)
    assert "original's" not in str(report)
    x = torch.randn(2, 16, 4, 4)
    with counted(block, monkeypatch) as calls:
        torch.manual_seed(3)
        y = block(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, original(x), rtol=1e-4, atol=1e-5)
    assert calls


class TestPublishedNames:
    """A class name is trusted where an extension or a device is missing, and nowhere else."""

    @staticmethod
    def block(error: Exception) -> tnn.Module:
        class PAM_Module(forks.Fork):
            def forward(self, x):
                raise error

        return PAM_Module()

    @pytest.mark.parametrize(
        "error",
        [
            ImportError("No module named 'rcca'"),
            AssertionError("Torch not compiled with CUDA enabled"),
            RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu"),
        ],
    )
    def test_missing_extension(self, error: Exception) -> None:
        report, block = convert(self.block(error))
        assert report.converted == ["0"] and "not compared" in str(report)
        x = torch.randn(1, 16, 3, 4)
        torch.testing.assert_close(block(x), forks.Fork.forward(block, x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("error", [AssertionError("made for 64 x 64"), RuntimeError("shape '[64]' is invalid")])
    def test_other_failure(self, error: Exception) -> None:
        report, block = convert(self.block(error))
        assert not isinstance(block, FusedBlock)
        assert f"not compared: it does not run here ({type(error).__name__}: {error})" in report.left["0"]

    def test_size_locked(self) -> None:
        class PAM_Module(forks.Fork):
            def forward(self, x):
                if x.shape[2:] != (5, 4):
                    raise ValueError("only 5 x 4")
                return super().forward(x)

        report, _ = convert(PAM_Module())
        assert "on 33 x 37 positions in float32: ValueError: only 5 x 4" in report.left["0"]


@pytest.mark.parametrize(("fork", "label"), [(forks.VolumeCAM, ""), (forks.PaperVolumeCAM, ", softmax of +E")])
def test_volumes(fork: type[tnn.Module], label: str) -> None:
    original = fork()
    report, block = convert(original)
    assert f"-> channel attention{label} (" in str(report)
    x = torch.randn(2, 6, 2, 3, 4)
    torch.testing.assert_close(block(x), original(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"{fork.__name__}: input must have 5 dimensions .*got shape \(2, 6, 3, 4\)"):
        block(x[:, :, 0])


@pytest.mark.parametrize("shape", [(2, 16, 6, 5), (2, 16, 30), (1, 16, 2, 3, 5)])
def test_maps_flattened_for_one_dimensional_layers(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    original = forks.Flattening()
    report, block = convert(original)
    assert "query and key exchanged" in report.entries[0].kind
    x = torch.randn(shape)
    with counted(block, monkeypatch) as calls:
        torch.testing.assert_close(block(x), original(x))
        assert calls
    assert convert(forks.FlatteningOverKeys())[0].left  # its values are summed over the queries


def test_map_of_a_block_that_flattens() -> None:
    original, x = forks.Flattening(), torch.randn(2, 16, 6, 5)
    _, block = convert(original)
    with visualize.record_attention(block, [(0.4, 0.9)]) as maps:
        block(x)
    weights = torch.softmax(original.query(x.flatten(2)).mT @ original.key(x.flatten(2)), dim=1)
    torch.testing.assert_close(maps["FusedFlattening"][:, 0].flatten(1), weights[:, :, 2 * 5 + 4])


def test_input_without_a_batch_dimension() -> None:
    x = torch.randn(16, 5, 6)
    _, block = convert(blocks.PAM_Module(16))
    with pytest.raises(ValueError, match=r"PAM_Module: input must have 4 dimensions .* \(got shape \(16, 5, 6\)\)"):
        block(x)
    original = forks.TakesSingleMaps()
    report, block = convert(original)
    assert report.converted == ["0"]
    torch.testing.assert_close(block(x), original(x))
    torch.testing.assert_close(block(x[None]), original(x[None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_of_the_block(dtype: torch.dtype) -> None:
    report, _ = convert(blocks.NONLocalBlock2D(32).to(dtype))
    assert report.converted == ["0"]
    assert f"in {str(dtype).removeprefix('torch.')}" in str(report)


@pytest.mark.parametrize("scale", [3**-0.5, 12**-0.5, 1 / 3, 0.05])
def test_scaled_variant_is_converted_with_the_scale_that_fits(scale: float) -> None:
    original = forks.OwnNames(scale=scale)
    original.scale = 0.05
    mapping = {"to_q": "query_conv", "to_k": "key_conv", "to_v": "value_conv", "alpha": "gamma"}
    report, block = convert(original, mapping=mapping)
    assert "position attention, energies times " in str(report) and f"= {scale:.4g} (" in str(report)
    x = 3 * torch.randn(2, 12, 5, 4)
    torch.testing.assert_close(block(x), original(x), rtol=1e-4, atol=1e-5)
    assert list(block.state_dict()) == list(original.state_dict())


class AnnStage(ann.SelfAttentionBlock2D):
    """A stage of ANN under a class name of its own, whose energies have any factor."""

    def __init__(self, factor: float, scale: float | None = None):
        super().__init__(8, 8, 4, 6, 8, shared=False)
        self.scale = factor if scale is None else scale
        self.key_channels = factor**-2  # the forward multiplies the energies by key_channels ** -0.5


@pytest.mark.parametrize(
    ("factor", "label"),
    [(4**-0.5, ""), (1.0, ", energies times 1 = 1"), (0.3, ", energies times its scale = 0.3")],
)
def test_ann_stage_is_converted_with_the_scale_that_fits(factor: float, label: str) -> None:
    original = randomise(AnnStage(factor))
    report, block = convert(original)
    assert f"-> asymmetric attention{label} (" in str(report)
    x = torch.randn(1, 8, 12, 10)
    torch.testing.assert_close(block(x), original(x), rtol=1e-4, atol=1e-5)


def test_ann_stage_with_a_pooling_factor_is_reported() -> None:
    class Pooled(AnnStage):
        """The authors' stage with scale > 1: attention at a lower resolution."""

        def forward(self, low, high=None):
            size = low.shape[2:]
            low = tnn.functional.max_pool2d(low, self.scale, ceil_mode=True)
            return tnn.functional.interpolate(super().forward(low), size, mode="bilinear", align_corners=True)

    report, block = convert(randomise(Pooled(0.5, scale=2)))
    assert report.converted == [] and type(block) is Pooled
    assert "its layers are those of an asymmetric attention, but its result differs by" in report.left["0"]


def test_small_weights_and_a_zero_gamma_hide_nothing() -> None:
    class Sharp(forks.Fork):
        def forward(self, x):
            return self.gamma * self.attended(x, 7.0) + x

    original = Sharp(gamma=0.0)
    for layer in original.layers():
        tnn.init.normal_(layer.weight, std=1e-6)
    report, _ = convert(original)
    assert "its result differs by" in report.left["0"]


def test_uncommon_scale_is_left() -> None:
    report, _ = convert(forks.OwnNames(scale=0.123), mapping={"to_q": "query_conv"})
    assert report.converted == []


def test_own_names() -> None:
    report, block = convert(forks.OwnNames())
    assert report.converted == []
    mapping = {"to_q": "query_conv", "to_k": "key_conv", "to_v": "value_conv", "alpha": "gamma"}
    assert f"convert(model, mapping={mapping})" in report.left["0"]  # the near miss says what to call
    report, block = convert(block, mapping=mapping)
    assert report.converted == ["0"]
    x = torch.randn(1, 12, 4, 4)
    torch.testing.assert_close(block(features=x), forks.OwnNames.forward(block, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="convert: mapping must lead from names of the model to one of .*'query_con'"):
        segattn_ops.convert(block, mapping={"to_q": "query_con"})
    with pytest.raises(TypeError, match="convert: mapping must be a dict .*got list"):
        segattn_ops.convert(block, mapping=["to_q"])


def test_own_names_of_channel_attention() -> None:
    class Gate(forks.VolumeCAM):
        def __init__(self):
            super().__init__()
            self.alpha = self.gamma
            del self.gamma

        def forward(self, x):
            f = x.flatten(2)
            return self.alpha * ((-(f @ f.mT)).softmax(-1) @ f).view_as(x) + x

    assert convert(Gate())[0].entries == []
    report, block = convert(Gate(), mapping={"alpha": "gamma"})
    assert report.converted == ["0"]
    for shape in ((2, 5, 7), (2, 5, 4, 3), (2, 5, 2, 3, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(block(x), Gate.forward(block, x), rtol=1e-4, atol=1e-5)


def test_blocks_that_were_looked_at_are_named() -> None:
    report, block = convert(forks.BigGAN())
    assert type(block) is forks.BigGAN
    assert "theta (16 -> 2), phi (16 -> 2), g (16 -> 8), o (8 -> 16), gamma, but no known block has these" in str(
        report
    )
    bottleneck = tnn.ModuleDict({f"conv{n}": tnn.Conv2d(8, 8, 1) for n in range(4)})
    assert segattn_ops.convert(bottleneck).entries == []
    assert "query_conv, key_conv (1 x 1, C -> E), value_conv (1 x 1, C -> C) and a scalar gamma" in str(
        segattn_ops.convert(bottleneck)
    )


def test_class_that_cannot_be_derived_from() -> None:
    class Sealed(forks.Fork):
        def __init_subclass__(cls):
            raise TypeError("Sealed is final")

    class Clashing(forks.Fork):
        def fused_forward(self):
            return None

    assert "no replacement can be made: Sealed is final" in convert(Sealed())[0].left["0"]
    assert "its class defines fused_forward, which the replacement defines too" in convert(Clashing())[0].left["0"]


@pytest.mark.parametrize("around", ["meta", torch.float64, torch.bfloat16, "inference", "autocast"])
def test_context_of_the_call_has_no_influence(around: object) -> None:
    expected, _ = convert(forks.MakesATensor())
    model = tnn.Sequential(forks.MakesATensor())
    assert expected.converted == ["0"]
    default = torch.get_default_dtype()
    try:
        if around == "meta":
            torch.set_default_device("meta")
        elif isinstance(around, torch.dtype):
            torch.set_default_dtype(around)
        with (
            torch.inference_mode(around == "inference"),
            torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"),
        ):
            report = segattn_ops.convert(model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(default)
    assert str(report) == str(expected)


def test_meta_models() -> None:
    with torch.device("meta"):
        model = tnn.ModuleDict({"published": blocks.PAM_Module(16), "fork": forks.Fork()})
    report = segattn_ops.convert(model)
    assert report.converted == ["published"]
    assert "it is on the meta device" in report.left["fork"]


def test_blocks_in_use_can_be_copied() -> None:
    """A stored attention map or a normalised weight has a history, and a hook may hold anything."""

    class Holder:
        def __deepcopy__(self, memo):
            raise AssertionError("hooks are not copied")

        def hook(self, *_):
            return None

    original = forks.Fork()
    tnn.utils.prune.l1_unstructured(original.key_conv, "weight", 0.5)
    original.register_forward_hook(Holder().hook)
    original(torch.randn(1, 16, 3, 3))
    assert not original.key_conv.weight.is_leaf
    report = segattn_ops.convert(tnn.Sequential(original))
    assert report.converted == ["0"]


def test_generators_of_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA is initialised, torch.manual_seed would queue a seed for it, in place of the user's."""

    def fail(*_):
        raise AssertionError("seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    assert convert(blocks.PAM_Module(16))[0].converted == ["0"]


class Slotted(forks.Fork):
    __slots__ = ("extra",)


def test_class_with_slots() -> None:
    report, block = convert(Slotted())
    assert report.converted == ["0"] and isinstance(block, Slotted)


def test_synchronised_batch_norm_is_probed_alone() -> None:
    class Synchronises(tnn.SyncBatchNorm):
        def forward(self, x):
            raise AssertionError("waits for other processes")

    original = blocks.NONLocalBlock2D(16)
    original.W[1] = Synchronises(16)
    report, _ = convert(original)
    assert report.converted == ["0"] and "in training" not in str(report)
