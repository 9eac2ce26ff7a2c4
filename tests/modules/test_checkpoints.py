"""Every checkpoint layout, from the published module's own state dict into ours and back, with equal outputs."""

import re

import pytest
import torch
from torch import nn as tnn

from segattn_ops import checkpoints, models, nn

from ..peers import ann, blocks, heads, randomise
from .interop import mmseg_head, mmseg_network, need


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def first(output):
    """The main logits of a head, however it returns them."""
    if isinstance(output, dict):
        return output["out"]
    return output[0] if isinstance(output, tuple) else output


x8, x16, x32 = (torch.randn(2, c, 9, 8, dtype=torch.float64) for c in (8, 16, 32))
STAGES = (4, 6, 8, 10)
stage_maps = tuple(torch.randn(1, c, 16 >> i, 24 >> i, dtype=torch.float64) for i, c in enumerate(STAGES))

THEIRS = {"embedded_gaussian": "embedded", "gaussian": "gaussian", "concatenation": "concatenation"}

# Layout: the published module, ours, inputs, the result of recognise().
LAYOUTS = {
    "danet official head": (
        lambda: heads.DANetHead(32, 5),
        lambda: models.DANetHead(32, 5),
        (x32,),
        ("danet", "official"),
    ),
    "danet tramac head": (
        lambda: heads.TramacHead(32, 5),
        lambda: models.DANetHead(32, 5),
        (x32,),
        ("danet", "tramac"),
    ),
    "ccnet official head": (
        lambda: heads.RCCAModule(32, 6, 5),
        lambda: models.CCNetHead(32, 5, out_channels=6),
        (x32,),
        ("ccnet", "official"),
    ),
    "ann official head": (
        lambda: heads.ANNHead(16, 32, 5),
        lambda: models.ANNHead(16, 32, 5),
        (x16, x32),
        ("ann", "official"),
    ),
    "dfn_seg head": (
        lambda: heads.DFNHead(STAGES, 5),
        lambda: models.DFNHead(STAGES, 5),
        stage_maps,
        ("dfn", "official"),
    ),
    "pam official": (
        lambda: blocks.PAM_Module(16),
        lambda: nn.PositionAttention(16),
        (x16,),
        ("query_key_value", "official"),
    ),
    "pam tramac": (
        lambda: blocks._PositionAttentionModule(16),
        lambda: nn.PositionAttention(16),
        (x16,),
        ("position", "tramac"),
    ),
    "cam official": (lambda: blocks.CAM_Module(16), lambda: nn.ChannelAttention(16), (x16,), ("channel", "official")),
    "cam tramac": (
        lambda: blocks._ChannelAttentionModule(),
        lambda: nn.ChannelAttention(16),
        (x16,),
        ("channel", "tramac"),
    ),
    "criss-cross official": (
        lambda: blocks.CrissCrossAttention(16),
        lambda: nn.CrissCrossAttention(16),
        (x16,),
        ("query_key_value", "official"),
    ),
    "apnb official": (
        lambda: ann.APNB(16, 16, 4, 6, 0.05),
        lambda: nn.APNB(16, 16, 4, 6),
        (x16,),
        ("apnb", "official"),
    ),
    "afnb official": (
        lambda: ann.AFNB(8, 16, 12, 4, 6, 0.05),
        lambda: nn.AFNB(8, 16, 12, 4, 6),
        (x8, x16),
        ("afnb", "official"),
    ),
    "da_module": (
        lambda: blocks.DAModule(8, 3, 9, 8),
        lambda: nn.DAModule(8, H=9, W=8),
        (x8,),
        ("da_module", "external-attention"),
    ),
    "compact position": (
        lambda: blocks.CPAMDec(16),
        lambda: nn.CompactPositionAttention(16),
        (x16, torch.randn(2, 50, 16, dtype=torch.float64)),
        ("compact_position", "official"),
    ),
    "rrb dfn_seg": (
        lambda: blocks.RRB(16, 5),
        lambda: nn.RefinementResidualBlock(16, 5, final_relu=False),
        (x16,),
        ("refinement", "official"),
    ),
    **{
        f"alexhex7 {mode} sub{sub:d} bn{bn:d}": (
            lambda mode=mode, sub=sub, bn=bn: blocks.NONLocalBlock2D(8, sub_sample=sub, bn_layer=bn, mode=THEIRS[mode]),
            lambda mode=mode, sub=sub, bn=bn: nn.NonLocal2d(
                8, mode=mode, sub_sample=sub, norm_layer="batch_norm" if bn else None
            ),
            (x8,),
            ("non_local_block", "alexhex7"),
        )
        for mode in THEIRS
        for sub in (False, True)
        for bn in (False, True)
    },
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.head."], ids=["plain", "parallel", "nested"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_state_dict_loads(name: str, prefix: str) -> None:
    theirs, ours, inputs, (system, layout) = LAYOUTS[name]
    oracle, module = randomise(theirs()).double().eval(), ours().double().eval()
    state = {prefix + key: value for key, value in oracle.state_dict().items()}
    found = checkpoints.recognise(state)
    assert (found.system, found.format) == (system, layout)
    report = checkpoints.load(module, state)
    assert report.complete and len(report.loaded) == len(module.state_dict())
    close(first(module(*inputs)), first(oracle(*inputs)[::-1] if "dfn_seg head" in name else oracle(*inputs)))
    if layout in ("official", "alexhex7", "external-attention"):
        exported = checkpoints.to_official(module)
        assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in oracle.state_dict().items()}
        theirs().double().load_state_dict(exported)


MMSEG = {
    "DAHead": (
        lambda: mmseg_head("DAHead", in_channels=32, channels=16, pam_channels=4, num_classes=5),
        lambda: models.DANetHead(32, 5, inter_channels=16, key_channels=4),
        ("danet", "mmsegmentation"),
        [(2, 32, 9, 8)],
    ),
    "CCHead": (
        lambda: mmseg_head("CCHead", in_channels=32, channels=16, recurrence=2, num_classes=5),
        lambda: models.CCNetHead(32, 5, inter_channels=16, activation=tnn.ReLU),
        ("ccnet", "mmsegmentation"),
        [(2, 32, 9, 8)],
    ),
    "ANNHead": (
        lambda: mmseg_head(
            "ANNHead", in_channels=[16, 32], in_index=[0, 1], channels=12, project_channels=8, num_classes=5
        ),
        lambda: models.ANNHead(16, 32, 5, channels=12, key_channels=8, value_channels=8),
        ("ann", "mmsegmentation"),
        [(2, 16, 9, 8), (2, 32, 9, 8)],
    ),
    "NLHead": (
        lambda: mmseg_head("NLHead", in_channels=32, channels=16, num_classes=5),
        lambda: models.NonLocalHead(32, 5, inter_channels=16),
        ("non_local", "mmsegmentation"),
        [(2, 32, 9, 8)],
    ),
    "NLHead dot product": (
        lambda: mmseg_head("NLHead", in_channels=32, channels=16, num_classes=5, mode="dot_product"),
        lambda: models.NonLocalHead(32, 5, inter_channels=16, mode="dot_product"),
        ("non_local", "mmsegmentation"),
        [(2, 32, 9, 8)],
    ),
}


@pytest.mark.parametrize("name", MMSEG)
def test_mmsegmentation_head_both_ways(name: str) -> None:
    theirs, ours, expected, shapes = MMSEG[name]
    oracle, head = randomise(theirs()).double(), ours().double().eval()
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found = checkpoints.recognise(oracle.state_dict())
    assert (found.system, found.format) == expected
    report = checkpoints.load(head, {f"module.decode_head.{k}": v for k, v in oracle.state_dict().items()})
    assert report.complete
    close(first(head(*inputs)), first(oracle(inputs)))
    # Back, after the biases that mmsegmentation lacks have got values, as in training.
    randomise(head)
    fresh = theirs().double()
    fresh.load_state_dict(checkpoints.to_mmseg(head))
    close(first(fresh(inputs)), first(head(*inputs)))


def mmcv_non_local(mode: str, sub: bool, norm: bool, dims: int = 2) -> tnn.Module:
    cls = getattr(need("mmcv.cnn.bricks.non_local"), f"NonLocal{dims}d")
    return cls(8, mode=mode, sub_sample=sub, norm_cfg={"type": f"BN{dims}d"} if norm else None).eval()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("sub", [False, True], ids=["full", "sub_sample"])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product", "concatenation"])
def test_mmcv_non_local_both_ways(mode: str, sub: bool, norm: bool) -> None:
    oracle = randomise(mmcv_non_local(mode, sub, norm)).double()
    module = nn.NonLocal2d(
        8,
        mode=mode,
        sub_sample=sub,
        scale=4**-0.5 if mode == "embedded_gaussian" else 1.0,
        norm_layer="batch_norm" if norm else None,
    )
    module = module.double().eval()
    found = checkpoints.recognise(oracle.state_dict())
    assert (found.system, found.format) == ("non_local_block", "mmcv")
    checkpoints.load(module, oracle.state_dict())
    close(module(x8), oracle(x8))
    randomise(module)
    fresh = mmcv_non_local(mode, sub, norm).double()
    fresh.load_state_dict(checkpoints.to_mmseg(module))
    close(fresh(x8), module(x8))


def test_mmcv_criss_cross_and_mmseg_blocks_both_ways() -> None:
    da_head = need("mmseg.models.decode_heads.da_head")
    pairs = (
        (need("mmcv.ops.cc_attention").CrissCrossAttention(16), nn.CrissCrossAttention(16), "criss_cross"),
        (da_head.PAM(16, 2), nn.PositionAttention(16), "position"),
        (da_head.CAM(), nn.ChannelAttention(16), "channel"),
    )
    for oracle, module, system in pairs:
        oracle, module = randomise(oracle).double(), module.double()
        assert checkpoints.recognise(oracle.state_dict()).system == system
        checkpoints.load(module, oracle.state_dict())
        assert module.gamma.shape == (1,)
        # mmcv adds float32's -inf to the diagonal, and its einsum is done in the input's dtype
        close(module(x16), oracle(x16))
        oracle.load_state_dict(checkpoints.to_mmseg(module))
        assert oracle.gamma.scale.shape == ()


def test_mmseg_asymmetric_blocks_both_ways() -> None:
    ann_head = need("mmseg.models.decode_heads.ann_head")
    need("mmcv.cnn")
    common = {
        "channels": 4,
        "query_scales": (1,),
        "key_pool_scales": (1, 3, 6, 8),
        "conv_cfg": None,
        "norm_cfg": {"type": "BN"},
        "act_cfg": {"type": "ReLU"},
    }
    apnb = randomise(ann_head.APNB(in_channels=16, out_channels=16, **common)).double().eval()
    afnb = randomise(ann_head.AFNB(low_in_channels=8, high_in_channels=16, out_channels=12, **common)).double().eval()
    for oracle, module, inputs, system in (
        (apnb, nn.APNB(16, 16, 4, 4), (x16,), "apnb"),
        (afnb, nn.AFNB(8, 16, 12, 4, 4), (x8, x16), "afnb"),
    ):
        module = module.double().eval()
        assert checkpoints.recognise(oracle.state_dict()).system == system
        report = checkpoints.load(module, oracle.state_dict())
        assert "conv_bn_dropout.0.bias" in report.filled
        close(module(*inputs), oracle(*inputs))
        randomise(module)
        oracle.load_state_dict(checkpoints.to_mmseg(module))
        close(module(*inputs), oracle(*inputs))


def test_timm_non_local_attention() -> None:
    oracle = randomise(need("timm.layers").NonLocalAttn(16, rd_channels=8)).double().eval()
    module = nn.NonLocal2d(16, inter_channels=8, scale=16**-0.5).double().eval()
    report = checkpoints.load(module, oracle.state_dict())
    assert report.recognised.format == "timm"
    close(module(x16), oracle(x16))


def test_whole_mmsegmentation_danet_both_ways() -> None:
    config = {"type": "DAHead", "in_channels": 2048, "in_index": 3, "channels": 64, "pam_channels": 8, "num_classes": 5}
    oracle = randomise(mmseg_network(config, channels=32), scale=0.3)
    model = models.danet_resnet50(5, aux_loss=True, aux_channels=32, stem="v1c", inter_channels=64, key_channels=8)
    report = checkpoints.load(model.eval(), {"meta": {"epoch": 3}, "state_dict": oracle.state_dict()})
    assert report.complete and report.recognised.stem == "v1c"
    image = torch.randn(1, 3, 57, 66)
    with torch.no_grad():
        outputs, features = model(image), oracle.extract_feat(image)
        expected = oracle.decode_head(features)
        auxiliary = oracle.auxiliary_head(features)
    for got, want in ((outputs["out"], expected[0]), (outputs["position"], expected[1]), (outputs["aux"], auxiliary)):
        want = torch.nn.functional.interpolate(want, (57, 66), mode="bilinear", align_corners=False)
        close(got, want, torch.float32)
    fresh = mmseg_network(config, channels=32)
    fresh.load_state_dict(checkpoints.to_mmseg(model))
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), oracle.state_dict().values(), strict=True)
    )
    # A head, or a single block, out of the same file.
    head = models.DANetHead(2048, 5, 64, 8)
    assert "backbone.stem.0.weight" in checkpoints.load(head, oracle.state_dict()).left_out
    block = nn.PositionAttention(64)
    assert len(checkpoints.load(block, oracle.state_dict()).loaded) == 7
    assert torch.equal(block.query_conv.weight, oracle.decode_head.pam.query_project.weight)


STEM_INDICES = ("0", "1", "3", "4", "6", "7")
STEM_NAMES = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")


def official_network(system: str) -> tuple[dict[str, torch.Tensor], tnn.Module]:
    """The state dict of an official network, and our network for it."""
    if system == "danet":
        model = models.danet_resnet50(5, inter_channels=16, align_corners=True)
        parts = {"pretrained.": model.backbone, "head.": model.classifier}
    elif system == "ccnet":
        model = models.ccnet_resnet50(5, inter_channels=16, stem="ccnet", aux_loss=True, align_corners=True)
        stem = dict(zip(STEM_INDICES, STEM_NAMES, strict=True))
        backbone = {
            re.sub(r"^stem\.(\d)", lambda m: stem[m.group(1)], k): v for k, v in model.backbone.state_dict().items()
        }
        aux = {re.sub(r"^4\.", "3.", k): v for k, v in model.aux_classifier.state_dict().items()}
        aux["0.bias"] = torch.randn(256)
        parts = {"": backbone, "head.": model.classifier, "dsn.": aux}
    else:
        model = models.ann_resnet50(5, channels=16, aux_loss=True, align_corners=True)
        numbers = {"0": "0", "1": "1.0", "4": "3"}
        aux = {
            re.sub(r"^(\d)", lambda m: numbers[m.group(1)], k): v for k, v in model.aux_classifier.state_dict().items()
        }
        aux["0.bias"] = torch.randn(256)
        parts = {"backbone.": model.backbone, "": model.classifier, "dsn.": aux}
    state = {}
    for prefix, part in parts.items():
        part = part.state_dict() if isinstance(part, tnn.Module) else part
        state |= {prefix + k: v.clone() for k, v in part.items()}
    state["fc.weight" if system == "ccnet" else "backbone.fc.weight"] = torch.zeros(1000, 2048)
    return state, model


@pytest.mark.parametrize("system", ["danet", "ccnet", "ann"])
def test_whole_official_network_both_ways(system: str) -> None:
    state, model = official_network(system)
    for key, value in state.items():
        if key.startswith("context.2.stages.0.f_query"):  # one module under two names
            value.copy_(state[key.replace("f_query", "f_key")])
        elif value.is_floating_point():
            value.copy_(torch.rand_like(value))
    report = checkpoints.load(model, {f"module.{k}": v for k, v in state.items()})
    assert report.complete and (report.recognised.system, report.recognised.format) == (system, "official")
    assert [name.split("fc")[1] for name in report.ignored] == [".weight"]
    exported = checkpoints.to_official(model)
    assert set(exported) == {k for k in state if "fc." not in k}
    folded = {"dsn.0.bias", "dsn.1.running_mean", "dsn.1.0.running_mean"}
    for key, value in exported.items():
        if key not in folded:
            assert torch.equal(value, state[key]), key
    if system != "danet":
        mean = "dsn.1.running_mean" if system == "ccnet" else "dsn.1.0.running_mean"
        torch.testing.assert_close(exported[mean] - exported["dsn.0.bias"], state[mean] - state["dsn.0.bias"])
        assert len(report.folded) == 1


def test_dfn_seg_network_with_its_doubled_backbone() -> None:
    model = models.dfn_resnet50(5, stem="ccnet")
    stem = dict(zip(STEM_INDICES, STEM_NAMES, strict=True))
    backbone = {
        re.sub(r"^stem\.(\d)", lambda m: stem[m.group(1)], k): torch.rand(v.shape)
        for k, v in model.backbone.state_dict().items()
    }
    head = {k: torch.rand(v.shape) for k, v in model.classifier.state_dict().items()}
    state = {f"resnet_features.{k}": v for k, v in backbone.items()} | head
    state |= {"layer0.0.weight": backbone["conv1.weight"], "layer1.1.0.conv1.weight": backbone["layer1.0.conv1.weight"]}
    report = checkpoints.load(model, state)
    assert report.complete and report.recognised.system == "dfn"
    assert sorted(report.ignored) == ["layer0.0.weight", "layer1.1.0.conv1.weight"]
    assert torch.equal(model.backbone.stem[6].weight, backbone["conv3.weight"])


def test_inplace_abn_weights() -> None:
    oracle = randomise(heads.RCCAModule(32, 8, 5))
    oracle.conva[1].weight.data[0] = -0.5
    head = models.CCNetHead(32, 5)
    with pytest.warns(UserWarning, match="inplace_abn=True"):
        assert "inplace_abn=True" in checkpoints.load(head, oracle.state_dict()).notes[0]
    assert head.conva[1].weight[0] == -0.5
    assert checkpoints.load(head, oracle.state_dict(), inplace_abn=True).notes == []
    torch.testing.assert_close(head.conva[1].weight, oracle.conva[1].weight.abs() + 1e-5)


def test_own_checkpoint_and_torchvision_backbone() -> None:
    from torchvision.models import resnet50

    model = models.danet_resnet50(3, inter_channels=16)
    other = models.danet_resnet50(3, inter_channels=16)
    assert checkpoints.load(other, model.state_dict()).recognised.format == "segattn_ops"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    resnet = resnet50()
    report = checkpoints.load(model, resnet.state_dict(), strict=False)
    assert report.recognised.system == "backbone" and report.ignored == ["fc.weight", "fc.bias"]
    assert report.missing and all(name.startswith("classifier.") for name in report.missing)
    assert torch.equal(model.backbone.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)
    assert checkpoints.load(model.backbone, resnet.state_dict()).complete


def test_every_wrong_name_is_listed() -> None:
    head = models.DANetHead(32, 5)
    state = dict(head.state_dict())
    before = {k: v.clone() for k, v in state.items()}
    state["sa.key_conv.scale"] = state.pop("sa.key_conv.bias")
    state["conv9.weight"] = torch.zeros(3)
    state["conv8.1.weight"] = torch.zeros(7, 8, 1, 1)
    with pytest.raises(ValueError) as error:
        checkpoints.load(head, state)
    for part in ("missing (1): sa.key_conv.bias", "sa.key_conv.scale", "conv9.weight", "num_classes=7"):
        assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())  # nothing was loaded
    report = checkpoints.load(head, state, strict=False)
    assert (report.missing, sorted(report.unknown)) == (["sa.key_conv.bias"], ["conv9.weight", "sa.key_conv.scale"])
    assert report.mismatched == ["conv8.1.weight (5, 8, 1, 1), in the checkpoint (7, 8, 1, 1)"]


BAD = [
    (lambda: checkpoints.recognise({"features.0.weight": torch.zeros(1)}), "layout of this state dict is not known"),
    (lambda: checkpoints.recognise({"epoch": 3, "optimizer": {}}), "no state dict found"),
    (lambda: checkpoints.to_mmseg(models.DFNHead(STAGES, 5)), "mmsegmentation has no counterpart of DFNHead"),
    (lambda: checkpoints.to_official(models.NonLocalHead(16, 5)), "no official repository of NonLocalHead"),
    (lambda: checkpoints.to_official(models.DFNHead(STAGES, 5, channels=8)), "dfn_seg has no smooth_cls"),
    (lambda: checkpoints.to_mmseg(tnn.Conv2d(3, 4, 1)), "Conv2d is no block, head or network of segattn_ops"),
    (lambda: checkpoints.to_official(nn.PyramidPooling()), "PyramidPooling has no parameters"),
    (
        lambda: checkpoints.to_official(tnn.Sequential(nn.PositionAttention(16), tnn.Conv2d(3, 4, 1))),
        "its part '0' is; export that alone",
    ),
    (
        lambda: checkpoints.load(
            models.DFNHead((4, 4, 4, 4), 5), nn.RefinementResidualBlock(4, 5).state_dict(), strict=False
        ),
        "in several places: 'rrb_d_1.', 'rrb_d_2.'",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(tmp_path, suffix: str) -> None:
    module = randomise(nn.APNB(16, 16, 4, 6))  # f_key and f_query share their storage
    path = tmp_path / f"apnb{suffix}"
    checkpoints.save(checkpoints.to_official(module), path)
    other = nn.APNB(16, 16, 4, 6)
    assert checkpoints.load(other, path).complete
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


class Payload:
    """Unpickles to a side effect, as a hostile checkpoint would."""

    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_file_with_pickled_code_is_refused(tmp_path) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": nn.ChannelAttention().state_dict(), "hook": Payload()}, path)
    with pytest.raises(ValueError, match="has pickled objects beyond tensors"):
        checkpoints.load(nn.ChannelAttention(), path)
    assert not Payload.ran
    checkpoints.read(path, weights_only=False)
    assert Payload.ran
