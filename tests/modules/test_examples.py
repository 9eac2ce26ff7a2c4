"""The examples run, their curves coincide, and a resumed training is the uninterrupted one."""

import numpy as np
import pytest
import torch
from skimage import io

import segattn_ops
from examples import convert_mmseg_danet, full_size_inference, shapes, train_shapes

from .interop import need

SHORT = ["--size", "48", "--batch-size", "2", "--validate-every", "4", "--save-every", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both networks on both backends, six steps each."""
    out = tmp_path_factory.mktemp("trained")
    return out, train_shapes.main([*SHORT, "--steps", "6", "--out", str(out)])


def test_fused_and_eager_curves_coincide(trained) -> None:
    out, runs = trained
    for system, by_backend in runs.items():
        assert set(by_backend) == {"fused", "eager"}
        assert train_shapes.largest_gap(by_backend["eager"], by_backend["fused"]) < 2e-3, system
        assert [step for step, _ in by_backend["fused"].validation] == [4, 6]
    assert io.imread(out / "train_shapes.png").std() > 5  # something was drawn


def test_resumed_training_is_the_uninterrupted_one(trained, tmp_path) -> None:
    out, runs = trained
    options = [*SHORT, "--systems", "danet", "--backends", "eager", "--out", str(tmp_path), "--total-steps", "6"]
    train_shapes.main([*options, "--steps", "4"])
    resumed = train_shapes.main([*options, "--steps", "6", "--resume"])["danet"]["eager"]
    assert resumed.losses == runs["danet"]["eager"].losses
    assert resumed.validation == runs["danet"]["eager"].validation


def test_mixed_precision_training_stays_near(trained, tmp_path) -> None:
    _, runs = trained
    options = [*SHORT, "--systems", "danet", "--backends", "fused", "--out", str(tmp_path), "--steps", "6", "--amp"]
    half = train_shapes.main(options)["danet"]["fused"]
    exact = runs["danet"]["fused"]
    assert half.losses != exact.losses
    np.testing.assert_allclose(half.losses, exact.losses, rtol=0.1)


def test_full_size_inference(trained) -> None:
    out, _ = trained
    result = full_size_inference.main(["--height", "130", "--width", "262", "--out", str(out), "--device", "cpu"])
    assert result["positions"] == 33 * 66
    assert 0 <= result["miou"] <= 1
    assert io.imread(out / "full_size.png").std() > 5


def test_conversion_of_mmsegmentation() -> None:
    need("mmseg.models")
    report = convert_mmseg_danet.main(["--size", "48", "--depth", "18", "--repeats", "1", "--device", "cpu"])
    assert report.converted == ["decode_head.pam", "decode_head.cam"]
    assert report.difference < 1e-3


def test_scene_and_score() -> None:
    image, labels = shapes.scene(3, 40, 70)
    assert image.shape == (40, 70, 3) and 0 <= image.min() <= image.max() <= 1
    assert set(np.unique(labels)) <= set(range(len(shapes.CLASSES))) and len(np.unique(labels)) > 1
    labels = torch.from_numpy(labels)
    assert shapes.mean_iou(labels, labels) == 1.0
    halves = torch.tensor([0, 0, 1, 1])
    assert shapes.mean_iou(torch.tensor([0, 1, 1, 1]), halves) == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="system must be danet or ccnet"):
        shapes.small_network("ann")
    assert segattn_ops.convert(shapes.small_network("danet")).already == ["classifier.sa", "classifier.sc"]
