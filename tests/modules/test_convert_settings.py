"""What a converted block does after an attribute, tensor or parameter that its forward reads has changed."""

import copy
import functools
import pickle
import threading

import numpy
import pytest
import torch
from torch import nn as tnn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import segattn_ops
from segattn_ops.conversion.block import FusedBlock

from ..peers import blocks
from . import convert_blocks as forks


def pair(block: tnn.Module) -> tuple[tnn.Module, tnn.Module]:
    """The block and a converted copy."""
    converted = copy.deepcopy(block)
    report = segattn_ops.convert(converted)
    assert isinstance(converted, FusedBlock), str(report)
    return block, converted


def result(block: tnn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(2)
    return block(x)


def divided(key: torch.Tensor, by: float) -> torch.Tensor:
    return key / by


def set_norm(block: tnn.Module) -> None:
    block.norm = tnn.InstanceNorm2d(16)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "temperature", 0.25),
        lambda block: setattr(block, "enabled", False),
        lambda block: setattr(block, "mask", torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]),
        lambda block: setattr(block, "rate", 0.5),
        lambda block: setattr(block, "sharpness", numpy.float32(3.0)),
        lambda block: setattr(block, "adapt", functools.partial(divided, by=4.0)),
        lambda block: setattr(block.softmax, "dim", 1),
        lambda block: setattr(block, "softmax", tnn.Softmax(dim=1)),
        lambda block: block.after.append(tnn.ReLU()),
        set_norm,
    ],
    ids=[
        "number",
        "switch",
        "mask",
        "rate",
        "class attribute",
        "partial",
        "child's attribute",
        "child",
        "grandchild",
        "norm",
    ],
)
def test_later_changes_have_the_same_effect(change, training: bool) -> None:
    x = torch.randn(2, 16, 6, 5)
    original, converted = (block.train(training) for block in pair(forks.Tempered()))
    torch.testing.assert_close(result(converted, x), result(original, x))
    before = result(original, x)
    for copied in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        twin = copy.deepcopy(original)
        change(twin)
        change(copied)
        torch.testing.assert_close(result(copied, x), result(twin, x))
    if training or twin.rate == 0:  # dropout is for training
        assert not torch.allclose(result(twin, x), before)


def test_setting_back_runs_fused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, converted = pair(forks.Tempered())
    calls: list[int] = []
    fused = type(converted).fused_forward
    monkeypatch.setattr(type(converted), "fused_forward", lambda self, x: calls.append(1) or fused(self, x))
    x = torch.randn(1, 16, 4, 4)
    for temperature, expected in ((2.0, 1), (1.0, 1), (2.0, 2)):
        converted.temperature = temperature
        converted(x)
        assert len(calls) == expected
    converted.unread = 1
    converted(x)
    assert len(calls) == 3


def test_compiled_and_scripted_blocks_see_a_change() -> None:
    x = torch.randn(1, 16, 4, 4)
    original, converted = pair(forks.Tempered().eval())
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    for temperature in (2.0, 0.5):
        original.temperature = converted.temperature = temperature
        torch.testing.assert_close(compiled(x), original(x))
    with pytest.raises(RuntimeError, match="temperature has changed since the conversion"):
        torch.jit.script(converted)


@pytest.mark.parametrize(
    ("fork", "reason"),
    [
        (forks.BufferTemperature, "depends on a buffer or another tensor"),
        (forks.MaskOfFalse, "depends on a buffer or another tensor"),
        (forks.AbsoluteGamma, "differs where gamma is negative"),
    ],
)
def test_what_has_no_effect_yet_is_left(fork: type[tnn.Module], reason: str) -> None:
    block = fork()
    assert reason in segattn_ops.convert(block).left[""]
    assert type(block) is fork


def test_dtype_of_the_result() -> None:
    block = forks.ReturnsFloat32().bfloat16()
    assert "it returns float32 where the replacement returns bfloat16" in segattn_ops.convert(block).left[""]
    pair(forks.ReturnsFloat32())


@pytest.mark.parametrize("channels", [16, 48, 320])
def test_softmax_in_float32_is_no_difference(channels: int) -> None:
    pair(forks.SoftmaxInFloat32(channels))


def test_channel_attention_bound_to_its_channels() -> None:
    original, converted = pair(forks.BoundCAM())
    x = torch.randn(2, 20, 5, 4)
    torch.testing.assert_close(converted(x), original(x))
    original.gamma = converted.gamma = tnn.Parameter(torch.rand(20, 1, 1))
    torch.testing.assert_close(converted(x), original(x))


class Parent(tnn.Module):
    """Its block refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = forks.Fork()
        self.block.owner = [self]

    def __deepcopy__(self, memo):
        raise AssertionError("the whole model is copied")

    def forward(self, x):
        return self.block(x)


def test_what_a_block_refers_to_is_not_copied() -> None:
    assert segattn_ops.convert(Parent()).converted == ["block"]


def test_conversions_in_threads_leave_the_default_dtype() -> None:
    reports = []
    models = [tnn.Sequential(forks.Fork(), forks.Fork()) for _ in range(4)]
    threads = [threading.Thread(target=lambda m: reports.append(segattn_ops.convert(m)), args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() == torch.float32
    assert [report.converted for report in reports] == [["0", "1"]] * 4


class Tanh(tnn.Module):
    def forward(self, x):
        return torch.tanh(x)


@pytest.mark.parametrize("block", [forks.Fork, blocks.CAM_Module])
def test_parametrized_gamma(block: type[tnn.Module]) -> None:
    """Afterwards it has its effect; before, no class can be generated that remove_parametrizations restores."""
    x = torch.randn(2, 16, 5, 4)
    original, converted = pair(block(16))
    for module in (original, converted):
        register_parametrization(module, "gamma", Tanh())
    torch.testing.assert_close(converted(x), original(x))
    torch.testing.assert_close(copy.deepcopy(converted)(x), original(x))
    assert "its gamma is parametrized" in segattn_ops.convert(original).left[""]
    remove_parametrizations(converted, "gamma")
    assert isinstance(converted, FusedBlock)


@pytest.mark.parametrize(
    ("fork", "reason"),
    [(forks.WithoutAutocast, "it disables it"), (forks.AutocastDtype, "it returns another dtype there")],
)
def test_a_block_with_its_own_autocast_keeps_it(fork: type[tnn.Module], reason: str) -> None:
    original, x = fork(), torch.randn(2, 16, 5, 4)
    converted = copy.deepcopy(original)
    assert reason in segattn_ops.convert(converted).entries[0].detail
    assert type(converted).fused_forward(converted, x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(converted(x), original(x), rtol=0, atol=0)
    torch.testing.assert_close(converted(x), original(x))


def test_published_blocks_stay_fused_under_autocast() -> None:
    for block in (blocks.PAM_Module(16), blocks.CAM_Module(16), blocks.CrissCrossAttention(16)):
        assert not pair(block)[1]._fused_traits.original_in_autocast


def test_a_block_made_by_calling_the_class_runs_the_original() -> None:
    _, converted = pair(forks.Fork())
    twin = type(converted)(16)
    twin.load_state_dict(converted.state_dict())
    x = torch.randn(2, 16, 5, 4)
    for block in (twin, copy.deepcopy(twin)):
        torch.testing.assert_close(block(x), converted(x))
