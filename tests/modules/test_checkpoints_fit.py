"""What load says of a checkpoint that does not fit, or fits a module that computes something else; preprocessing."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn as tnn
from torch.nn.utils import parametrizations, prune

from segattn_ops import checkpoints, models, nn

from ..peers import heads, randomise, without_initialisation
from .interop import need


def refused(module: tnn.Module, saved, **options) -> tuple[str, str]:
    """The first line of the error of a load, and the rest."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        checkpoints.load(module, saved, **options)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    first, _, rest = str(error.value).partition("\n")
    return first, rest


def resnet(depth: int = 50, stem: str = "torchvision", **options) -> models.DANet:
    build = models.danet_resnet50 if depth == 50 else models.danet_resnet101
    options = {"num_classes": 3, "stem": stem, "inter_channels": 16, "key_channels": 2, **options}
    return without_initialisation(lambda: build(**options))


def ccnet(**options) -> models.CCNet:
    options = {"num_classes": 3, "stem": "ccnet", "inter_channels": 16, "align_corners": True, **options}
    return without_initialisation(lambda: models.ccnet_resnet50(**options))


@pytest.fixture(scope="module")
def networks() -> dict[str, models.DANet]:
    return {stem: resnet(stem=stem) for stem in ("torchvision", "v1c", "deep", "ccnet")}


@pytest.mark.parametrize("theirs", ["torchvision", "v1c", "deep"])
@pytest.mark.parametrize("ours", ["torchvision", "v1c", "deep"])
def test_another_stem_is_named(theirs: str, ours: str, networks) -> None:
    if theirs == ours:
        return
    saved = checkpoints.to_mmseg(networks[theirs]) if theirs == "v1c" else checkpoints.to_official(networks[theirs])
    first, rest = refused(networks[ours], saved)
    assert f'build the module with stem="{theirs}" (it has "{ours}")' in first
    assert "missing" not in rest and "unknown" not in rest and "mismatched" not in rest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = checkpoints.load(networks[ours], saved, strict=False)
    assert f'stem="{theirs}"' in "".join(report.notes)
    assert any("backbone" in name for name in (*report.missing, *report.mismatched))  # the report lists them all


def test_another_depth_is_named(networks) -> None:
    deeper = resnet(101, num_classes=4)
    first, rest = refused(networks["torchvision"], checkpoints.to_official(deeper))
    assert "the backbone is a resnet101 in the checkpoint, a resnet50 in the module" in first
    assert "num_classes=4 in the checkpoint, 3 in the module" in first
    assert "layer3" not in rest and "conv8" not in rest
    first, _ = refused(deeper, checkpoints.to_official(networks["v1c"]))
    assert "a resnet50 in the checkpoint, a resnet101 in the module" in first and "stem=" in first


def test_another_head_is_named(networks) -> None:
    first, rest = refused(ccnet(stem="v1c"), checkpoints.to_mmseg(networks["v1c"]))
    assert first.endswith("does not fit the checkpoint: the head in the checkpoint is one of danet")
    assert "missing" not in rest and "unknown" not in rest


def test_pruned_and_parametrized_layers_are_named() -> None:
    for rewrite, name in (
        (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), "weight_orig"),
        (parametrizations.weight_norm, "parametrizations.weight.original0"),
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
    ):
        block = nn.PositionAttention(16)
        rewrite(block.query_conv)
        first, rest = refused(nn.PositionAttention(16), {f"attend.{k}": v for k, v in block.state_dict().items()})
        assert f"attend.query_conv.{name} is of a pruned or parametrized layer" in first
        assert "missing (1): query_conv.weight" in rest


SIZES = {
    "classes of DANet": (lambda n: models.DANetHead(32, n, 8, 2), 5, 7, "num_classes"),
    "classes of CCNet": (lambda n: models.CCNetHead(32, n), 5, 7, "num_classes"),
    "classes of ANN": (lambda n: models.ANNHead(16, 32, n), 5, 7, "num_classes"),
    "classes of DFN": (lambda n: models.DFNHead((4, 4, 4, 4), n), 5, 7, "num_classes"),
    "inner channels": (lambda n: models.DANetHead(32, 5, n, 2), 8, 16, "inter_channels"),
    "inner channels of CCNet": (lambda n: models.CCNetHead(32, 5, n), 8, 16, "inter_channels"),
    "keys": (lambda n: models.DANetHead(32, 5, 16, n), 2, 4, "key_channels"),
}


@pytest.mark.parametrize("kind", SIZES)
def test_other_sizes_are_named_by_their_argument(kind: str) -> None:
    make, ours, theirs, argument = SIZES[kind]
    first, rest = refused(make(ours), make(theirs).state_dict())
    assert first.endswith(f"does not fit the checkpoint: {argument}={theirs} in the checkpoint, {ours} in the module")
    assert "mismatched" not in rest


def test_other_sizes_of_an_auxiliary_head(networks) -> None:
    saved = resnet(aux_loss=True, aux_channels=8).state_dict()
    first, rest = refused(resnet(aux_loss=True, aux_channels=4), saved)
    assert first.endswith(": aux_channels=8 in the checkpoint, 4 in the module") and "mismatched" not in rest


def test_settings_that_a_state_dict_does_not_store(networks) -> None:
    def remarks(module, saved, **options) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = checkpoints.load(module, saved, **options)
        texts = [str(warning.message).removeprefix("checkpoints.load: ") for warning in caught]
        assert [text for text in report.notes if "does not say" not in text] == texts  # a note warns too
        return " ".join(texts)

    official = {f"module.{k}": v for k, v in checkpoints.to_official(networks["deep"]).items()}
    assert "with align_corners=True, this module has False" in remarks(networks["deep"], official)
    aligned = resnet(stem="deep", align_corners=True)
    assert remarks(aligned, official) == ""
    assert "with align_corners=False" in remarks(
        resnet(stem="v1c", align_corners=True), checkpoints.to_mmseg(networks["v1c"])
    )
    # The same names and shapes, but CCNet's backbone dilates and pools otherwise.
    assert 'needs stem="deep"' in remarks(resnet(stem="ccnet", align_corners=True), official)
    module = ccnet()
    saved = checkpoints.to_official(module)
    assert remarks(module, saved) == ""
    assert 'needs stem="ccnet"' in remarks(ccnet(stem="deep"), saved)
    saved["head.conva.1.weight"] = saved["head.conva.1.weight"] - 1
    assert "inplace_abn=True" in remarks(module, saved)
    assert remarks(module, saved, inplace_abn=True) == ""
    # mmsegmentation's CCHead has another activation.
    relu = models.CCNetHead(32, 5, activation=tnn.ReLU)
    exported = checkpoints.to_mmseg(relu)
    assert "build it with activation=nn.ReLU" in remarks(models.CCNetHead(32, 5), exported)
    assert remarks(relu, exported) == ""
    with pytest.warns(UserWarning, match="act_cfg"):
        checkpoints.to_mmseg(models.CCNetHead(32, 5))
    with pytest.warns(UserWarning, match="this module 3 times: build CCHead with recurrence=3"):
        checkpoints.to_mmseg(models.CCNetHead(32, 5, recurrence=3, activation=tnn.ReLU))


def test_scales_of_non_local_blocks() -> None:
    scaled, unscaled = nn.NonLocal2d(8, scale=0.5), nn.NonLocal2d(8)  # 4 inner channels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = checkpoints.to_mmseg(scaled)
        checkpoints.load(scaled, saved)
        checkpoints.to_mmseg(nn.NonLocal2d(8, mode="dot_product"))
        checkpoints.load(unscaled, checkpoints.to_official(unscaled))
    with pytest.warns(UserWarning, match=r"inter_channels \*\* -0.5 unless use_scale=False"):
        checkpoints.load(unscaled, saved)
    with pytest.warns(UserWarning, match="build it with use_scale=False"):
        checkpoints.to_mmseg(unscaled)
    timm = need("timm.layers").NonLocalAttn(16, rd_channels=8)
    with pytest.warns(UserWarning, match=r"timm's block scales by in_channels \*\* -0.5"):
        checkpoints.load(nn.NonLocal2d(16, inter_channels=8), timm.state_dict())


def test_weights_of_position_attention_in_criss_cross_attention() -> None:
    """Their parameters have the same names and shapes; the layout around them tells which they are."""
    position, criss_cross = nn.PositionAttention(16), nn.CrissCrossAttention(16)
    danet, ccnet_head = models.DANetHead(64, 5).state_dict(), models.CCNetHead(64, 5).state_dict()
    block = checkpoints.to_mmseg(position)
    for module, saved in (
        (criss_cross, danet),
        (criss_cross, block),
        (nn.RecurrentCrissCrossAttention(16), danet),
        (tnn.ModuleDict({"cca": criss_cross}), block),
    ):
        with pytest.warns(UserWarning, match="weights of position attention, the module is criss-cross attention"):
            checkpoints.load(module, saved)
    for saved in (ccnet_head, checkpoints.to_mmseg(criss_cross)):
        with pytest.warns(UserWarning, match="weights of criss-cross attention, the module is position attention"):
            checkpoints.load(position, saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.load(position, danet)
        checkpoints.load(criss_cross, ccnet_head)
        checkpoints.load(position, criss_cross.state_dict())  # plain query_conv, key_conv: of either


@pytest.mark.parametrize("kind", [nn.PositionAttention, nn.CrissCrossAttention])
def test_a_scale_has_no_place_in_danet_and_ccnet(kind) -> None:
    plain, scaled = kind(16), kind(16, scale=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = checkpoints.to_mmseg(plain)
        checkpoints.to_official(plain)
        checkpoints.load(plain, saved)
        checkpoints.load(scaled, scaled.state_dict())
    with pytest.warns(UserWarning, match="has no scale, this module scales by 0.25"):
        checkpoints.load(scaled, saved)
    for export in (checkpoints.to_mmseg, checkpoints.to_official):
        with pytest.warns(UserWarning, match=f"{export.__name__}: this {kind.__name__} scales its energies by 0.25"):
            exported = export(scaled)
    # What the warning advises is the same function.
    x = torch.randn(2, 16, 5, 6)
    tnn.init.ones_(scaled.gamma)
    for name in ("weight", "bias"):
        exported[f"query_conv.{name}"] = scaled.query_conv.state_dict()[name] * 0.25
    checkpoints.load(plain, exported)
    torch.testing.assert_close(plain(x), scaled(x))


@pytest.mark.parametrize("layout", ["official", "mmsegmentation"])
def test_two_tensors_for_one_parameter(layout: str) -> None:
    """APNB's query and key are one convolution under two names."""
    head = models.ANNHead(16, 32, 5)
    saved = head.state_dict() if layout == "official" else checkpoints.to_mmseg(head)
    query = "f_query.0" if layout == "official" else "query_project.conv"
    name = next(key for key in saved if "context" in key and key.endswith(f"{query}.weight"))
    changed = {**saved, name: saved[name] + 1}
    _, rest = refused(head, changed)
    ours = "context.2.stages.0.f_query.0.weight"
    assert f"{ours} is the same parameter as {ours.replace('query', 'key')}, in the checkpoint another tensor" in rest
    report = checkpoints.load(head, changed, strict=False)
    assert len(report.mismatched) == 1 and ours not in report.loaded
    assert torch.equal(head.state_dict()[ours], saved[name])


def test_two_names_for_one_parameter() -> None:
    model = ccnet(aux_loss=True)
    saved = checkpoints.to_official(model)
    saved["aux_classifier.0.weight"] = saved["dsn.0.weight"] + 1
    _, rest = refused(model, saved)
    assert "unknown (1): aux_classifier.0.weight" in rest


# Every block and head: (constructor, whether mmsegmentation has one).
MODULES = {
    "PositionAttention": (lambda: nn.PositionAttention(16), True),
    "ChannelAttention": (lambda: nn.ChannelAttention(), True),
    "CrissCrossAttention": (lambda: nn.CrissCrossAttention(16), True),
    "RecurrentCrissCrossAttention": (lambda: nn.RecurrentCrissCrossAttention(16), True),
    "NonLocal1d": (lambda: nn.NonLocal1d(8, scale=0.5), True),
    "NonLocal2d": (lambda: nn.NonLocal2d(8, scale=0.5), True),
    "NonLocal3d": (lambda: nn.NonLocal3d(8, scale=0.5, norm_layer=None), True),
    "NonLocal2d gaussian": (lambda: nn.NonLocal2d(8, mode="gaussian", sub_sample=True), True),
    "APNB": (lambda: nn.APNB(16, 16, 4, 6), True),
    "AFNB": (lambda: nn.AFNB(8, 16, 12, 4, 6), True),
    "AsymmetricAttention": (lambda: nn.AsymmetricAttention(8, 16, 4, 6, 12), False),
    "CompactPositionEncoder": (lambda: nn.CompactPositionEncoder(8), False),
    "CompactPositionAttention": (lambda: nn.CompactPositionAttention(8), False),
    "CompactChannelAttention": (lambda: nn.CompactChannelAttention(), False),
    "CrossLevelGatingDecoder": (lambda: nn.CrossLevelGatingDecoder(8, 6), False),
    "DAModule": (lambda: nn.DAModule(8, H=5, W=4), False),
    "ChannelAttentionBlock": (lambda: nn.ChannelAttentionBlock(8, 4), False),
    "RefinementResidualBlock": (lambda: nn.RefinementResidualBlock(8, 4), False),
    "DANetHead": (lambda: models.DANetHead(32, 5), True),
    "CCNetHead": (lambda: models.CCNetHead(32, 5, activation=tnn.ReLU), True),
    "NonLocalHead": (lambda: models.NonLocalHead(16, 5), True),
    "ANNHead": (lambda: models.ANNHead(16, 32, 5), True),
    "DFNHead": (lambda: models.DFNHead((4, 6, 8, 10), 5), False),
}


def test_the_table_has_every_module() -> None:
    names = {name.split()[0] for name in MODULES}
    parts = {"PyramidPooling", "FCNHead"}  # without parameters; a part of a network
    assert names == (set(nn.__all__) | {n for n in models.__all__ if n.endswith("Head")}) - parts


@pytest.mark.parametrize("name", MODULES)
def test_round_trip_of_every_module(name: str) -> None:
    make, mmseg = MODULES[name]
    module = randomise(make())
    exports = [checkpoints.to_official] if name != "NonLocalHead" else []
    exports += [checkpoints.to_mmseg] if mmseg else []
    assert exports
    for export in exports:
        for prefix in ("", "module.", "net.attention."):
            other = randomise(make())
            report = checkpoints.load(other, {prefix + key: value for key, value in export(module).items()})
            assert report.complete and report.recognised.prefix == prefix
            for key, value in other.state_dict().items():
                if export is checkpoints.to_official or not re.search(r"(bias|running_mean)$", key):
                    assert torch.equal(value, module.state_dict()[key]), key  # biases are folded into means
    if not mmseg:
        with pytest.raises(ValueError, match="mmsegmentation has no counterpart"):
            checkpoints.to_mmseg(module)


@pytest.mark.parametrize("name", ["danet_resnet50", "dfn_resnet50"])
def test_a_network_without_an_official_auxiliary_head_exports_without_it(name: str) -> None:
    model = without_initialisation(lambda: getattr(models, name)(3, aux_loss=True, align_corners=True))
    with pytest.warns(UserWarning, match="no auxiliary head: aux_classifier is left out"):
        exported = checkpoints.to_official(model)
    report = checkpoints.load(model, exported, strict=False)
    assert report.missing and all(name.startswith("aux_classifier.") for name in report.missing)
    model.aux_classifier = None
    assert checkpoints.load(model, exported).complete


# Pictures: what the original code makes of a BGR picture of 0 to 255, as its cv2.imread or mmcv reads it.
def imagenet(bgr: np.ndarray) -> np.ndarray:
    return (bgr[..., ::-1] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


ORIGINALS = {
    "danet": (lambda: heads.DANetHead(32, 5), "DANetHead", imagenet),
    "tramac": (lambda: heads.TramacHead(32, 5), "DANetHead", imagenet),
    "ccnet": (
        lambda: heads.RCCAModule(32, 8, 5),
        "CCNetHead",
        lambda bgr: bgr - np.array([104.00698793, 116.66876762, 122.67891434]),
    ),
}


@pytest.mark.parametrize("system", ORIGINALS)
def test_preprocessing_is_the_originals(system: str) -> None:
    theirs, ours, original = ORIGINALS[system]
    report = checkpoints.load(getattr(models, ours)(32, 5), theirs().state_dict())
    rgb = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    expected = torch.from_numpy(original(rgb[..., ::-1].astype(np.float64))).permute(2, 0, 1)[None].float()
    sources = {
        "PIL": (Image.fromarray(rgb), {}),
        "array": (rgb, {}),
        "OpenCV": (np.ascontiguousarray(rgb[..., ::-1]), {"order": "BGR"}),
        "floats": (rgb.astype(np.float32) / 255, {}),
        "tensor": (torch.from_numpy(rgb).permute(2, 0, 1), {}),
        "batch": (torch.from_numpy(rgb).permute(2, 0, 1)[None].double() / 255, {}),
    }
    for kind, (source, options) in sources.items():
        got = report.preprocessing(source, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, kind=kind: f"{kind}: {m}")
    assert report.preprocessing.order in str(report)


def test_preprocessing_of_mmsegmentation_is_its_preprocessors() -> None:
    need("mmseg.models")
    from mmseg.models.data_preprocessor import SegDataPreProcessor

    theirs = SegDataPreProcessor(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
    rgb = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    bgr = torch.from_numpy(np.ascontiguousarray(rgb[..., ::-1])).permute(2, 0, 1)
    expected = theirs({"inputs": [bgr]})["inputs"]
    torch.testing.assert_close(checkpoints.MMSEGMENTATION(Image.fromarray(rgb)), expected)
    torch.testing.assert_close(checkpoints.IMAGENET(rgb), checkpoints.MMSEGMENTATION(rgb), rtol=1e-4, atol=1e-4)


def test_a_network_carries_the_preprocessing_of_its_weights() -> None:
    model = ccnet()
    assert model.preprocessing == checkpoints.IMAGENET
    official = checkpoints.to_official(model)
    checkpoints.load(model, official)
    assert model.preprocessing == checkpoints.CCNET
    report = checkpoints.load(model, model.state_dict())  # our own layout does not say
    assert report.preprocessing is None and model.preprocessing == checkpoints.CCNET
    assert "does not say how its pictures were normalised" in report.notes[0]
    # A head's checkpoint says nothing of the backbone that sees the pictures.
    other = ccnet()
    head = {name: value for name, value in official.items() if name.startswith("head.")}
    checkpoints.load(other, head, strict=False)
    assert other.preprocessing == checkpoints.IMAGENET
    ann = without_initialisation(lambda: models.ann_resnet50(3, channels=16, align_corners=True))
    checkpoints.load(ann, checkpoints.to_official(ann))
    assert ann.preprocessing == checkpoints.ANN and ann.preprocessing.order == "BGR"


CONFIGURATIONS = {
    "mmengine": {
        "cfg": "data_preprocessor = dict(\n    bgr_to_rgb=False,\n    mean=[\n        103.53,\n        116.28,\n"
        "        123.675,\n    ],\n    std=[1.0, 1.0, 1.0],\n    type='SegDataPreProcessor')"
    },
    "mmcv": {"config": "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"},
    "mmengine's default": {
        "cfg": "dict(type='SegDataPreProcessor', mean=[103.53, 116.28, 123.675], std=[1, 1e0, 1.0], size=(9, 9))"
    },
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_the_configuration_in_a_checkpoint_counts_more(kind: str) -> None:
    head = models.DANetHead(32, 5)
    saved = {"meta": CONFIGURATIONS[kind], "state_dict": checkpoints.to_mmseg(head)}
    expected = checkpoints.Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), 1.0)
    assert checkpoints.load(head, saved).preprocessing == expected
    assert checkpoints.load(head, {**saved, "meta": {"epoch": 3}}).preprocessing == checkpoints.MMSEGMENTATION


def test_mmcv_swaps_channels_by_default() -> None:
    saved = {"meta": {"config": "img_norm_cfg = dict(mean=[-1.5, 2.0, 3], std=[4.0, 5.0, 6.0])"}}
    saved["state_dict"] = checkpoints.to_mmseg(models.DANetHead(32, 5))
    expected = checkpoints.Preprocessing("RGB", (-1.5, 2.0, 3.0), (4.0, 5.0, 6.0), 1.0)
    assert checkpoints.to_native(saved).preprocessing == expected


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 5), np.uint8), ValueError, "an array must have shape (H, W, 3) and pixels (got shape (4, 5))"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, "an array must have shape (H, W, 3)"),
        (torch.zeros(4, 5, 3), ValueError, "a tensor must have shape (3, H, W) or (B, 3, H, W)"),
        (torch.full((3, 4, 5), 200.0), ValueError, "must lie in 0 to 1 (got 200 to 200)"),
        (torch.full((3, 4, 5), -1.0), ValueError, "do not normalise them before"),
        (torch.full((3, 4, 5), torch.nan), ValueError, "must lie in 0 to 1"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), TypeError, "uint8 or floating point (got torch.int64)"),
        ("picture.png", TypeError, "a PIL image, a numpy array or a tensor (got str)"),
        (torch.zeros(0, 3, 4, 5), ValueError, "and pixels (got shape (0, 3, 4, 5))"),
        (np.zeros((0, 5, 3), np.float32), ValueError, "and pixels (got shape (0, 5, 3))"),
        (Image.fromarray(np.full((4, 5), 300, np.uint16)), ValueError, "8 bits a channel (got mode 'I;16')"),
        (Image.fromarray(np.full((4, 5), 300, np.int32)), ValueError, "8 bits a channel (got mode 'I')"),
        (Image.fromarray(np.full((4, 5), 0.5, np.float32)), ValueError, "8 bits a channel (got mode 'F')"),
    ],
)
def test_pictures_of_another_kind(image, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        checkpoints.IMAGENET(image)
    with pytest.raises(ValueError, match="order must be 'RGB' or 'BGR'"):
        checkpoints.IMAGENET(np.zeros((4, 5, 3), np.uint8), order="rgb")
    with pytest.raises(ValueError, match="a PIL image is RGB"):
        checkpoints.CCNET(Image.new("RGB", (5, 4)), order="BGR")


@pytest.mark.parametrize(("mean", "std"), [((1, 2), (1, 1, 1)), ((1, 2, 3), (1, 0, 1)), ((1, 2, 3), (1, 1, np.nan))])
def test_constants_of_a_preprocessing_are_checked(mean, std) -> None:
    with pytest.raises(ValueError, match="mean and std must have 3 values"):
        checkpoints.Preprocessing("RGB", mean, std, 1.0)
