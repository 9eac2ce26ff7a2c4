"""Networks inside what training scripts save: wrappers, training modules, averaged copies, several networks."""

import pytest
import torch
from torch import nn as tnn

from segattn_ops import checkpoints, models, nn

from ..peers import randomise, without_initialisation

CLASSES = 4


def network() -> models.DANet:
    options = {"aux_loss": True, "aux_channels": 8, "stem": "v1c", "inter_channels": 16, "key_channels": 2}
    return without_initialisation(lambda: models.danet_resnet50(CLASSES, **options))


@pytest.fixture(scope="module")
def trained() -> tuple[models.DANet, dict[str, torch.Tensor]]:
    """A network with random weights, and its state dict under mmsegmentation's names."""
    model = randomise(network())
    return model, checkpoints.to_mmseg(model)


@pytest.fixture(scope="module")
def blank() -> models.DANet:
    return network()


def emptied(model: tnn.Module) -> tnn.Module:
    for value in model.state_dict().values():
        value.zero_()
    return model


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def shifted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another set of weights under the same names."""
    return {name: value + 1 for name, value in state.items()}


def same(model: tnn.Module, other: tnn.Module, offset: int = 0) -> bool:
    """Whether every parameter is the other's, auxiliary head included; ``offset`` as after :func:`shifted`."""
    return all(torch.equal(a, b + offset) for a, b in zip(model.parameters(), other.parameters(), strict=True))


WRAPPED = {
    "parallel and compiled": lambda s: under("module._orig_mod.", s),
    "compiled and parallel": lambda s: under("_orig_mod.module.", s),
    "an own attribute": lambda s: under("segmentor.net.", s),
    "compiled parts": lambda s: {name.replace(".", "._orig_mod.", 1): value for name, value in s.items()},
    "FSDP and activation checkpointing": lambda s: {
        name.replace("layer3.", "layer3._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for name, value in s.items()
    },
    "Lightning with a criterion and metrics": lambda s: {
        "state_dict": {**under("model.", s), "loss.weight": torch.ones(CLASSES), "val_iou.confmat": torch.ones(4, 4)},
        "callbacks": {"EMA": {"x": torch.ones(2)}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}],
    },
    "mmengine with its averaged model": lambda s: {
        "meta": {"epoch": 3},
        "state_dict": s,
        "ema_state_dict": {"steps": torch.tensor(7), **under("module.", shifted(s))},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]},
    },
    "DeepSpeed": lambda s: {"module": s, "optimizer": {"fp32": torch.ones(3)}, "ds_version": "0.14"},
    "a best score": lambda s: {"net": under("module.", s), "best_iou": torch.tensor(0.7)},
    "numpy arrays": lambda s: {name: value.numpy() for name, value in s.items()},
    "half precision": lambda s: {name: value.half().float().half() for name, value in s.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_whole_network_is_found(kind: str, trained, blank) -> None:
    model, state = trained
    report = checkpoints.load(emptied(blank), WRAPPED[kind](state))
    assert report.complete and len(report.loaded) == len(blank.state_dict())
    assert report.recognised.stem == "v1c"
    if kind == "half precision":
        assert torch.equal(blank.aux_classifier[4].weight, model.aux_classifier[4].weight.half().float())
    else:
        assert same(blank, model)
    if "criterion" in kind:
        assert sorted(report.left_out) == ["loss.weight", "val_iou.confmat"]
    assert ("prefix='ema_state_dict.'" in str(report)) == ("mmengine" in kind)


def test_names_that_differ_in_wrappers_only_are_refused(trained, blank) -> None:
    """The compiled and the plain name of one parameter with different values: neither is preferred."""
    _, state = trained
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"two tensors for {name}, with and without"):
        checkpoints.load(emptied(blank), {**state, f"_orig_mod.{name}": state[name] + 1})


COPIES = {
    "student and teacher": (
        lambda s: {**under("student.", s), **under("teacher.", shifted(s))},
        {"student.": 0, "teacher.": 1, "teacher": 1},
    ),
    "module and module_ema": (
        lambda s: {**under("module.", s), **under("module_ema.", shifted(s))},
        {"module.": 0, "module_ema.": 1},
    ),
    "plain and ema": (lambda s: {**s, **under("ema.", shifted(s))}, {"": 0, "ema.": 1}),
    "plain and ema_": (lambda s: {**s, **under("ema_", shifted(s))}, {"": 0, "ema_": 1}),
    "timm": (
        lambda s: {"state_dict": s, "state_dict_ema": shifted(s), "arch": "danet", "optimizer": {"state": {}}},
        {"state_dict.": 0, "state_dict_ema.": 1, "state_dict_ema": 1},
    ),
    "mmcv's EMAHook": (
        lambda s: {**s, **{f"ema_{k.replace('.', '_')}": v + 1 for k, v in s.items() if "running" not in k}},
        {"": 0, "ema_": 1},
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_must_be_chosen(kind: str, trained, blank) -> None:
    model, state = trained
    make, choices = COPIES[kind]
    saved = make(state)
    for call in (checkpoints.recognise, checkpoints.to_native, lambda s: checkpoints.load(blank, s, strict=False)):
        with pytest.raises(ValueError, match=r"several of|two copies") as error:
            call(saved)
        assert all(repr(choice) in str(error.value) for choice in choices if choice[-1:] in ("", "_", "."))
    for prefix, offset in choices.items():
        assert checkpoints.recognise(saved, prefix=prefix).system == "danet"
        report = checkpoints.load(emptied(blank), saved, prefix=prefix)
        assert report.complete and same(blank, model, offset), prefix
    if "" not in choices:
        with pytest.raises(ValueError, match="several of"):
            checkpoints.load(blank, saved, prefix="")
    with pytest.raises(ValueError, match=r"no name begins with prefix 'generator\.' \(they begin "):
        checkpoints.load(blank, saved, prefix="generator.")


def test_mmengine_weights_without_averaging(trained, blank) -> None:
    model, state = trained
    saved = {"state_dict": state, "ema_state_dict": {"steps": torch.tensor(7), **under("module.", shifted(state))}}
    assert checkpoints.load(emptied(blank), saved, prefix="ema_state_dict.").complete
    assert same(blank, model, 1)
    del saved["ema_state_dict"]["steps"]  # another program's file does not say which of the two is averaged
    with pytest.raises(ValueError, match=r"one of 'state_dict\.', 'ema_state_dict\.module\.'"):
        checkpoints.load(blank, saved)
    with pytest.raises(TypeError, match=r"prefix must be a string or None \(got int\)"):
        checkpoints.load(blank, saved, prefix=3)


def test_backbone_and_auxiliary_head_of_a_network_with_an_unknown_head(trained, blank) -> None:
    model, state = trained
    saved = {name: value for name, value in state.items() if not name.startswith("decode_head.")}
    saved["decode_head.ppm.0.weight"] = torch.ones(3)
    report = checkpoints.load(emptied(blank), under("model.", saved), strict=False)
    assert report.recognised.system == "backbone" and report.unknown == ["model.decode_head.ppm.0.weight"]
    assert report.missing and all(name.startswith("classifier.") for name in report.missing)
    assert torch.equal(blank.aux_classifier[4].weight, model.aux_classifier[4].weight)
    assert checkpoints.load(blank.backbone, saved).complete
    assert len(checkpoints.load(emptied(blank.aux_classifier), state).loaded) == 8  # an auxiliary head alone
    assert torch.equal(blank.aux_classifier[0].weight, model.aux_classifier[0].weight)


def test_an_auxiliary_head_that_is_not_in_the_checkpoint_is_missing(trained, blank) -> None:
    _, state = trained
    lone = under("student.", {name: value for name, value in state.items() if "auxiliary" not in name})
    report = checkpoints.load(blank, lone, strict=False)
    names = [name for name in blank.state_dict() if name.startswith("aux_classifier.")]
    assert report.missing == [name for name in names if "num_batches" not in name]
    misplaced = {**lone, **under("teacher.", {k: v for k, v in state.items() if k.startswith("auxiliary")})}
    report = checkpoints.load(blank, misplaced, strict=False)
    assert any(name.startswith("aux_classifier.") for name in report.missing)


def test_a_channel_attention_out_of_a_whole_network(trained) -> None:
    model, state = trained
    for saved in (state, model.state_dict(), under("module.", checkpoints.to_native(state).state)):
        block = nn.ChannelAttention()
        report = checkpoints.load(block, saved)
        assert report.loaded == ["gamma"] and block.gamma == model.classifier.sc.gamma
        assert any("conv6" in name or "pam_conv_seg" in name for name in report.left_out)
    # and a channel attention's own checkpoint belongs to the channel attention of a head
    head = models.DANetHead(32, 5)
    block.gamma.data.fill_(3.0)
    assert checkpoints.load(head, block.state_dict(), strict=False).loaded == ["sc.gamma"]
    assert head.sc.gamma == 3.0 and head.sa.gamma == 0.0


def test_a_block_of_a_network_with_an_unknown_rest() -> None:
    block = randomise(nn.PositionAttention(16))
    rest = {"encoder.0.weight": torch.ones(3), "head.weight": torch.ones(2)}
    other = nn.PositionAttention(16)
    report = checkpoints.load(other, {**under("attend.", block.state_dict()), **rest})
    assert report.complete and sorted(report.left_out) == sorted(rest)
    assert torch.equal(other.value_conv.weight, block.value_conv.weight)


def test_the_block_that_fits_among_several() -> None:
    small, large, third = (randomise(nn.PositionAttention(c)) for c in (16, 32, 32))
    saved = {**under("a.", small.state_dict()), **under("b.", large.state_dict())}
    module = nn.PositionAttention(32)
    assert len(checkpoints.load(module, saved).loaded) == 7
    assert torch.equal(module.key_conv.bias, large.key_conv.bias)
    saved |= under("c.", third.state_dict())
    with pytest.raises(ValueError, match=r"several of .* prefix=, one of 'b\.', 'c\.'"):
        checkpoints.load(module, saved)
    checkpoints.load(module, saved, prefix="c.")
    assert torch.equal(module.key_conv.bias, third.key_conv.bias)


def test_a_head_on_an_unknown_backbone_and_two_systems_in_one_file() -> None:
    danet, ccnet = randomise(models.DANetHead(32, 5)), randomise(models.CCNetHead(32, 5))
    saved = {"backbone.stage1.0.weight": torch.ones(3), **under("head.", danet.state_dict())}
    report = checkpoints.load(models.DANetHead(32, 5), saved)
    assert report.left_out == ["backbone.stage1.0.weight"]
    both = {**under("first.", danet.state_dict()), **under("second.", ccnet.state_dict())}
    module = models.CCNetHead(32, 5)
    checkpoints.load(module, both)
    assert torch.equal(module.cca.key_conv.weight, ccnet.cca.key_conv.weight)


def test_an_auxiliary_head_with_attention_is_not_a_second_network(trained, blank) -> None:
    model, state = trained
    extra = under("auxiliary_head.", {k[12:]: v for k, v in state.items() if k.startswith("decode_head.")})
    plain = {name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}
    report = checkpoints.load(emptied(blank), {**plain, **extra}, strict=False)
    assert torch.equal(blank.classifier.conv8[1].weight, model.classifier.conv8[1].weight)
    assert any(name.startswith("aux_classifier.") for name in report.missing)


def test_nothing_that_fits_is_an_error_even_if_not_strict() -> None:
    with pytest.raises(ValueError, match=r"nothing in the checkpoint \(official ccnet\) fits DANetHead"):
        checkpoints.load(models.DANetHead(32, 5), models.CCNetHead(32, 5).state_dict(), strict=False)


def test_modules_as_sources_and_targets_in_wrappers(trained, blank) -> None:
    model, _ = trained
    wrapped = tnn.DataParallel(emptied(blank))
    report = checkpoints.load(wrapped, tnn.DataParallel(model))
    assert report.complete and same(blank, model)
    assert checkpoints.to_official(tnn.DataParallel(model.classifier)).keys() == model.classifier.state_dict().keys()
    averaged = torch.optim.swa_utils.AveragedModel(model.classifier)
    assert checkpoints.load(blank.classifier, averaged).complete


def test_choices_inside_a_prefix_and_names_that_only_begin_like_it() -> None:
    block = nn.PositionAttention(16)
    saved = under("net.a.", block.state_dict()) | under("net.b.", block.state_dict())
    for prefix in ("net", "net."):
        with pytest.raises(ValueError, match=r"one of 'net\.a\.', 'net\.b\.'"):
            checkpoints.load(block, saved, prefix=prefix)
    assert checkpoints.load(block, saved, prefix="net.a.").complete
    for other in ({"model_ema": block.state_dict()}, under("model_ema.", block.state_dict())):
        with pytest.raises(ValueError, match=r"no name begins with prefix 'model' \(they begin model_ema\.\)"):
            checkpoints.load(block, other, prefix="model")
        assert checkpoints.load(block, other, prefix="model_ema").complete
