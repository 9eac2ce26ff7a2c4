"""Conversion of third-party modules, and of transcriptions of repositories that are not packages."""

import copy

import pytest
import torch
from torch import nn as tnn

import segattn_ops
from segattn_ops import models, nn
from segattn_ops.conversion.block import FusedBlock

from ..peers import ann, blocks, heads, randomise
from .interop import mmseg_head, mmseg_network, need


class Wrapped(tnn.Module):
    """A block inside a model."""

    def __init__(self, block: tnn.Module):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return self.block(*inputs)


def mmcv_non_local(**options):
    return lambda: need("mmcv.cnn").NonLocal2d(8, **options)


def shapes(*sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return sizes


PLANE = ((2, 16, 7, 9),)
BLOCKS = {
    "official PAM": (lambda: blocks.PAM_Module(16), PLANE, "position attention"),
    "official CAM": (lambda: blocks.CAM_Module(16), PLANE, "channel attention"),
    "official criss-cross": (lambda: blocks.CrissCrossAttention(16), PLANE, "criss-cross attention"),
    "Tramac PAM": (lambda: blocks._PositionAttentionModule(16), PLANE, "position attention"),
    "Tramac CAM": (lambda: blocks._ChannelAttentionModule(), PLANE, "channel attention"),
    "AlexHex7 embedded": (lambda: blocks.NONLocalBlock2D(16), PLANE, "non-local block"),
    "AlexHex7 dot": (lambda: blocks.NONLocalBlock2D(16, mode="dot"), PLANE, "non-local block"),
    "AlexHex7 gaussian": (
        lambda: blocks.NONLocalBlock2D(16, bn_layer=False, mode="gaussian"),
        PLANE,
        "non-local block",
    ),
    "AlexHex7 concatenation": (lambda: blocks.NONLocalBlock2D(16, mode="concatenation"), PLANE, "non-local block"),
    "AlexHex7 3-D": (lambda: blocks._NonLocalBlockND(8, dimension=3), ((1, 8, 3, 6, 4),), "non-local block"),
    "ANN APNB": (lambda: ann.APNB(16, 16, 4, 6, 0.05), ((2, 16, 11, 9),), "asymmetric attention"),
    "ANN AFNB": (lambda: ann.AFNB(8, 16, 16, 4, 6, 0.05), ((2, 8, 11, 9), (2, 16, 11, 9)), "asymmetric attention"),
    "DAModule": (lambda: blocks.DAModule(8, 3, 5, 6), ((2, 8, 5, 6),), "scaled dot product"),
    "timm NonLocalAttn": (lambda: need("timm.layers").NonLocalAttn(16), PLANE, "non-local block"),
    "mmcv CrissCrossAttention": (
        lambda: need("mmcv.ops.cc_attention").CrissCrossAttention(16),
        PLANE,
        "criss-cross attention",
    ),
    "mmcv NonLocal1d": (lambda: need("mmcv.cnn").NonLocal1d(8), ((2, 8, 19),), "non-local block"),
    "mmcv NonLocal3d": (lambda: need("mmcv.cnn").NonLocal3d(8, sub_sample=True), ((1, 8, 3, 6, 4),), "non-local block"),
    **{
        f"mmcv NonLocal2d {options}": (mmcv_non_local(**options), ((2, 8, 7, 9),), "non-local block")
        for options in (
            {},
            {"use_scale": False, "sub_sample": True},
            {"mode": "gaussian", "sub_sample": True},
            {"mode": "dot_product", "norm_cfg": {"type": "BN"}},
            {"mode": "concatenation"},
        )
    },
    "mmseg PAM": (lambda: need("mmseg.models.decode_heads.da_head").PAM(16, 4), PLANE, "position attention"),
    "mmseg CAM": (lambda: need("mmseg.models.decode_heads.da_head").CAM(), PLANE, "channel attention"),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_converted(name: str, training: bool) -> None:
    make, sizes, kind = BLOCKS[name]
    original = Wrapped(randomise(make())).double().train(training)
    for layer in original.modules():
        if isinstance(layer, tnn.Dropout2d):
            layer.p = 0.0
    model = copy.deepcopy(original)
    parameters = dict(model.named_parameters())
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    report = segattn_ops.convert(model, tuple(x.detach() for x in inputs))
    assert report.converted and not report.left, str(report)
    assert kind in str(report)
    assert report.difference < 1e-9
    # The same parameter objects under the same names.
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.training is training and all(m.training is training for m in model.modules())
    if training and name == "DAModule":
        torch.manual_seed(1)  # the same dropout of the attention map
    expected = original(*inputs)
    if training and name == "DAModule":
        torch.manual_seed(1)
    output = model(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(output)
    if "'mode': 'concatenation'" in name:  # mmcv divides its ReLU's result in place: its own backward raises
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            expected.sum().backward()
        output.sum().backward()
        return
    wanted = torch.autograd.grad((expected * weight).sum(), [*inputs, *original.parameters()])
    got = torch.autograd.grad((output * weight).sum(), [*inputs, *model.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    # Again: nothing to do.
    again = segattn_ops.convert(model)
    assert (again.converted, again.left, again.already) == ([], {}, report.converted)


HEADS = {
    "official DANet": (lambda: heads.DANetHead(32, 5), ((2, 32, 7, 6),), ["sa", "sc"]),
    "official CCNet": (lambda: heads.RCCAModule(32, 8, 5), ((2, 32, 7, 6),), ["cca"]),
    "official ANN": (
        lambda: heads.ANNHead(16, 32, 5),
        ((2, 16, 9, 8), (2, 32, 9, 8)),
        ["fusion.stages.0", "context.2.stages.0"],
    ),
    "Tramac DANet": (lambda: heads.TramacHead(32, 5), ((2, 32, 7, 6),), ["pam", "cam"]),
}


@pytest.mark.parametrize("name", HEADS)
def test_official_head(name: str) -> None:
    make, sizes, blocks_of_head = HEADS[name]
    model = randomise(make()).double()
    report = segattn_ops.convert(model, tuple(torch.randn(s, dtype=torch.float64) for s in sizes), tolerance=1e-9)
    assert sorted(report.converted) == sorted(blocks_of_head)


MMSEG_HEADS = {
    "DAHead": ({"in_channels": 32, "channels": 16, "pam_channels": 4}, ["pam", "cam"], [(2, 32, 9, 8)]),
    "CCHead": ({"in_channels": 32, "channels": 16}, ["cca"], [(2, 32, 9, 8)]),
    "NLHead": ({"in_channels": 32, "channels": 16}, ["nl_block"], [(2, 32, 9, 8)]),
    "ANNHead": (
        {"in_channels": [16, 32], "in_index": [0, 1], "channels": 12, "project_channels": 8},
        ["fusion.stages.0", "context.stages.0"],
        [(2, 16, 9, 8), (2, 32, 9, 8)],
    ),
}


@pytest.mark.parametrize("name", MMSEG_HEADS)
def test_mmsegmentation_head(name: str) -> None:
    options, expected, sizes = MMSEG_HEADS[name]
    head = randomise(mmseg_head(name, num_classes=5, **options)).double()
    report = segattn_ops.convert(head, ([torch.randn(s, dtype=torch.float64) for s in sizes],), tolerance=1e-9)
    assert sorted(report.converted) == sorted(expected)
    assert report.left == {}


def test_whole_mmsegmentation_network_trains_on() -> None:
    config = {"type": "DAHead", "in_channels": 512, "in_index": 3, "channels": 32, "pam_channels": 4, "num_classes": 5}
    model = randomise(mmseg_network(config, depth=18, channels=32), scale=0.3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = segattn_ops.convert(model, torch.randn(1, 3, 33, 40))
    assert report.converted == ["decode_head.pam", "decode_head.cam"]
    assert report.difference < 1e-4
    model.load_state_dict(state)  # the original's checkpoints still load
    before = model.decode_head.pam.query_project.weight.detach().clone()
    model.train()
    sum(t.square().mean() for t in model(torch.randn(2, 3, 33, 40))).backward()
    optimizer.step()  # and its optimizer still has the parameters
    assert not torch.equal(model.decode_head.pam.query_project.weight, before)


def test_dry_run_changes_nothing() -> None:
    model = heads.DANetHead(32, 5)
    classes = [type(m) for m in model.modules()]
    report = segattn_ops.convert(model, dry_run=True)
    assert report.converted == ["sa", "sc"] and report.dry_run
    assert "would convert  sa: PAM_Module -> position attention" in str(report)
    assert [type(m) for m in model.modules()] == classes


def test_model_that_is_a_block_and_one_held_twice() -> None:
    block = randomise(blocks.PAM_Module(16))
    report = segattn_ops.convert(block)
    assert report.model is block and isinstance(block, FusedBlock) and report.converted == [""]
    twice = tnn.ModuleDict({"first": Wrapped(blocks.CrissCrossAttention(16))})
    twice["second"] = twice["first"].block
    segattn_ops.convert(twice)
    assert isinstance(twice["second"], FusedBlock) and twice["first"].block is twice["second"]


def test_own_models_run_fused_already() -> None:
    model = models.DANetHead(32, 5)
    assert segattn_ops.convert(model).already == ["sa", "sc"]
    assert segattn_ops.convert(tnn.Conv2d(3, 3, 1)).entries == []
    assert str(segattn_ops.convert(tnn.Conv2d(3, 3, 1))).startswith("no attention block was found; looked for")


class ScaledPAM(blocks.PAM_Module):
    """PAM's layers, another formula."""

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        return self.gamma * (v @ (q.mT @ k / 5).softmax(-1).mT).view_as(x) + x


class SpatialAttention(tnn.Module):
    """CBAM's: a convolution over two pooled feature maps."""

    def __init__(self):
        super().__init__()
        self.conv = tnn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        return self.conv(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid() * x


class NeedsExtension(blocks.PAM_Module):
    def forward(self, x):
        raise RuntimeError("rcca was not built")


class PAM_Module(NeedsExtension):
    pass


def test_what_is_left_alone_says_why() -> None:
    pab = need("segmentation_models_pytorch.decoders.manet.decoder").PABBlock(16)
    dnl = need("mmseg.models.decode_heads.dnl_head").DisentangledNonLocal2d(
        in_channels=16,
        temperature=0.05,
        reduction=2,
        use_scale=True,
        mode="embedded_gaussian",
        conv_cfg=None,
        norm_cfg=None,
    )
    patched = blocks.PAM_Module(16)
    patched.forward = lambda x: x
    model = tnn.ModuleDict(
        {
            "scaled": ScaledPAM(16),
            "pab": pab,
            "dnl": dnl,
            "spatial": SpatialAttention(),
            "extension": NeedsExtension(16),
            "published": PAM_Module(16),
            "scripted": torch.jit.script(tnn.Sequential(tnn.Conv2d(3, 3, 1))),
            "patched": patched,
        }
    )
    report = segattn_ops.convert(model)
    assert report.converted == ["published"]
    assert "not compared: it does not run here (RuntimeError: rcca was not built)" in str(report)
    reasons = {
        "scaled": "its layers are those of a position attention, but its result differs by",
        "pab": "its softmax runs over all pairs of positions together",
        "dnl": "whitened",
        "spatial": "its layers or its forward are none of the known ones'",
        "extension": "not compared: it does not run here",
        "patched": "its forward was replaced on the instance",
    }
    assert set(report.left) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report.left[name]


def test_models_in_segmentation_models_pytorch_go_on_unchanged() -> None:
    smp = need("segmentation_models_pytorch")
    model = smp.MAnet(
        "resnet18", encoder_weights=None, decoder_channels=(16, 16, 8, 8, 8), decoder_pab_channels=4
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    report = segattn_ops.convert(model, x)
    assert report.converted == [] and any(name.endswith("center") for name in report.left)
    assert torch.equal(model(x), expected)


class Sloppy(tnn.Module):
    """A model that reads its block's class, so that its outputs change with a swap."""

    def __init__(self):
        super().__init__()
        self.block = randomise(blocks.PAM_Module(16))

    def forward(self, x):
        return self.block(x) * (2 if type(self.block) is blocks.PAM_Module else 1)


def test_failing_sample_input_leaves_the_model_as_it_was() -> None:
    model = Sloppy()
    block = model.block
    with pytest.raises(ValueError, match="the model is as it was") as error:
        segattn_ops.convert(model, torch.randn(1, 16, 5, 5))
    assert "converted  block: PAM_Module -> position attention" in str(error.value)
    assert model.block is block and type(block) is blocks.PAM_Module
    with pytest.raises(TypeError, match="convert: model must be a torch.nn.Module"):
        segattn_ops.convert("model")


def test_random_numbers_and_hooks_survive() -> None:
    model = Wrapped(randomise(blocks.PAM_Module(16)))
    seen = []
    handle = model.block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    segattn_ops.convert(model)
    assert torch.equal(torch.rand(1), expected)
    model(torch.randn(1, 16, 4, 4))
    handle.remove()
    model(torch.randn(1, 16, 4, 4))
    assert seen == [(1, 16, 4, 4)]


def test_map_of_a_non_local_block_is_still_to_be_had() -> None:
    original = randomise(blocks.NONLocalBlock2D(8)).eval()
    model = segattn_ops.convert(copy.deepcopy(original)).model
    x = torch.randn(1, 8, 6, 6)
    for got, expected in zip(model(x, return_nl_map=True), original(x, return_nl_map=True), strict=True):
        torch.testing.assert_close(got, expected)


def test_distributed_compiled_and_copied_models(tmp_path) -> None:
    import torch.distributed as dist

    x = torch.randn(2, 32, 7, 6)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tnn.parallel.DistributedDataParallel(Wrapped(randomise(blocks.PAM_Module(32))))
        report = segattn_ops.convert(model, x)
        assert report.converted == ["module.block"]
        model(x).sum().backward()
        assert model.module.block.gamma.grad is not None
    finally:
        dist.destroy_process_group()
    plain = model.module.eval()
    expected = plain(x)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(plain)(x), expected)
    torch.save(plain, tmp_path / "model.pth")
    torch.testing.assert_close(torch.load(tmp_path / "model.pth", weights_only=False)(x), expected)


def test_module_compiled_in_place_before_conversion() -> None:
    block = randomise(blocks.PAM_Module(16)).eval()
    x = torch.randn(1, 16, 5, 5)
    expected = block(x)
    block.compile(backend="eager")
    model = Wrapped(block)
    segattn_ops.convert(model)
    assert model.block._compiled_call_impl is None
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_replacement_of_the_readme() -> None:
    """Replacing a block by hand: one line, the official state dict."""
    old = randomise(blocks.PAM_Module(16))
    new = nn.PositionAttention(16)
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 16, 6, 5)
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)
