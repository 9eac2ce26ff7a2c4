"""The examples run, their curves coincide, a resumed training is the uninterrupted one, and the weights in
examples/weights attend to what the scenes are about."""

import datetime
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from skimage import io
from torch import nn

import segattn_ops
from benchmarks import command_line
from examples import (
    convert_mmseg_danet,
    draw_attention,
    full_size_inference,
    large_scene,
    shapes,
    train_shapes,
)
from segattn_ops import checkpoints, models

from ..peers import without_initialisation
from .interop import need

SHORT = ["--size", "48", "--batch-size", "2", "--validate-every", "4", "--save-every", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both networks on both backends, six steps each."""
    out = tmp_path_factory.mktemp("trained")
    return out, train_shapes.main([*SHORT, "--steps", "6", "--out", str(out), "--weights", str(out)])


def test_fused_and_eager_curves_coincide(trained) -> None:
    out, runs = trained
    for system, by_backend in runs.items():
        assert set(by_backend) == {"fused", "eager"}
        assert train_shapes.largest_gap(by_backend["eager"], by_backend["fused"]) < 2e-3, system
        assert [step for step, _ in by_backend["fused"].validation] == [4, 6]
    assert io.imread(out / "train_shapes.png").std() > 5  # something was drawn


def test_resumed_training_is_the_uninterrupted_one(trained, tmp_path, capsys) -> None:
    out, runs = trained
    options = [*SHORT, "--systems", "danet", "--backends", "eager", "--out", str(tmp_path), "--total-steps", "6"]
    train_shapes.main([*options, "--steps", "4", "--resume"])
    resumed = train_shapes.main([*options, "--steps", "6", "--resume"])["danet"]["eager"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "danet_eager.pt is missing: the run starts at step 0" in printed and "is overwritten" not in printed
    assert resumed.losses == runs["danet"]["eager"].losses
    assert resumed.validation == runs["danet"]["eager"].validation
    # What would be another run is refused.
    for other, message in (
        (["--steps", "6", "--size", "64", "--lr", "0.1"], "danet_eager.pt has --size 48, --lr 0.002 (got 64, 0.1)"),
        (["--steps", "5"], "danet_eager.pt is after step 6 (got --steps 5)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            train_shapes.main([*options, *other, "--resume"])
    torch.save({"model": {}}, tmp_path / "danet_eager.pt")
    with pytest.raises(ValueError, match="this program did not write it"):
        train_shapes.main([*options, "--steps", "6", "--resume"])


def test_written_weights_say_how_they_were_made(trained) -> None:
    out, _ = trained
    for system in ("danet", "ccnet"):
        path = out / f"{system}.safetensors"
        expected = checkpoints.read(out / f"{system}_fused.pt")["model"]
        for name, tensor in checkpoints.read(path).items():
            assert torch.equal(tensor, expected[name]), name
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["command"].startswith("python -m examples.train_shapes --size 48 --batch-size 2")
        assert 0 <= float(metadata["miou"]) <= 1 and metadata["torch"] == torch.__version__
        datetime.date.fromisoformat(metadata["date"])


def test_ccnet_starts_from_danet(trained, tmp_path) -> None:
    out, _ = trained
    danet, model = checkpoints.read(out / "danet.safetensors"), shapes.small_network("ccnet")
    shapes.start_from(model, danet)
    for name, source in [
        ("backbone.stem.0.0.weight", "backbone.stem.0.0.weight"),
        ("classifier.conva.0.weight", "classifier.conv5a.0.weight"),
        ("classifier.cca.query_conv.weight", "classifier.sa.query_conv.weight"),
        ("classifier.convb.1.running_var", "classifier.conv51.1.running_var"),
    ]:
        assert torch.equal(model.state_dict()[name], danet[source])
    with pytest.raises(ValueError, match="not those of a small DANet"):
        shapes.start_from(model, {"weight": torch.zeros(1)})
    options = [*SHORT, "--systems", "ccnet", "--backends", "fused", "--steps", "2", "--out", str(tmp_path)]
    started = train_shapes.main([*options, "--start", str(out / "danet.safetensors")])
    assert started["ccnet"]["fused"].losses != trained[1]["ccnet"]["fused"].losses[:2]
    with pytest.raises(ValueError, match=r"ccnet_fused.pt has --start .*danet.safetensors \(got None\)"):
        train_shapes.main([*options, "--resume"])


def test_weights_are_those_of_the_fused_backend(capsys, tmp_path) -> None:
    with pytest.raises(SystemExit):
        train_shapes.main(["--backends", "eager", "--weights", str(tmp_path)])
    assert "--weights are those of the fused backend (got --backends eager)" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["danet", "ccnet"])
def test_the_trained_networks_need_their_attention(system) -> None:
    """They reach what the files say, and without attention the fragments of the scenes are guesses."""
    model = shapes.trained_network(system)
    with safe_open(shapes.WEIGHTS / f"{system}.safetensors", "pt") as file:
        metadata = file.metadata()
    gamma = shapes.attention_of(model).gamma.item()
    found = train_shapes.scores(model, torch.device("cpu"), 72)
    assert gamma > 0.1 and shapes.attention_of(model).gamma.item() == gamma and not model.training
    for name in ("miou", "fragments", "fragments_without_attention"):
        assert getattr(found, name) == pytest.approx(float(metadata[name]), abs=2e-3), name
    assert found.miou > 0.9 and found.fragments > 0.9 > 0.5 > found.fragments_without_attention
    document = (Path(__file__).parents[2] / "docs" / "systems.md").read_text()
    assert f"{found.fragments:.1%}" in document and f"{found.fragments_without_attention:.1%}" in document
    assert metadata["command"] in " ".join(train_shapes.__doc__.replace("\\", "").split())


def test_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in shapes.WEIGHTS.iterdir()) < 2_000_000


def test_points_on_fragments_attend_to_whole_shapes_of_their_kind(tmp_path) -> None:
    shares = draw_attention.main(["--out", str(tmp_path)])
    assert set(shares) == set(shapes.CLASSES[1:])
    for name, share in shares.items():
        assert share["of the scene"] < 0.05
        assert share["DANet, position attention"] > 0.5 and share["CCNet, R = 2"] > 0.5, name
    # Of a fragment that shares neither row nor column with a whole shape of its kind, the second pass finds them.
    (unreached, *_) = shares.values()
    assert unreached["CCNet, R = 1"] < 0.1 and unreached["CCNet, R = 2"] > 0.9
    for name in draw_attention.NAMES:
        picture = tmp_path / name
        assert picture.stat().st_size < 200_000 and io.imread(picture).std() > 20, name


def test_mixed_precision_training_stays_near(trained, tmp_path) -> None:
    _, runs = trained
    options = [*SHORT, "--systems", "danet", "--backends", "fused", "--out", str(tmp_path), "--steps", "6", "--amp"]
    half = train_shapes.main(options)["danet"]["fused"]
    exact = runs["danet"]["fused"]
    assert half.losses != exact.losses
    np.testing.assert_allclose(half.losses, exact.losses, rtol=0.1)


def test_full_size_inference(tmp_path) -> None:
    result = full_size_inference.main(["--height", "130", "--width", "262", "--out", str(tmp_path), "--device", "cpu"])
    assert result["positions"] == 33 * 66
    assert result["miou"] > 0.65  # 0.95 at sizes that are multiples of the stride
    assert io.imread(tmp_path / "full_size.png").std() > 5


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_a_photograph_gets_the_preprocessing_of_the_weights(order: str, tmp_path, monkeypatch) -> None:
    """CCNet's own weights take BGR without a deviation, mmsegmentation's RGB with one."""
    options = {"stem": "ccnet", "align_corners": True} if order == "BGR" else {"stem": "v1c"}
    model = without_initialisation(lambda: models.ccnet_resnet50(3, activation=nn.ReLU, **options))
    export = checkpoints.to_official if order == "BGR" else checkpoints.to_mmseg
    checkpoints.save(export(model), tmp_path / "ccnet.pth")
    rgb = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    io.imsave(tmp_path / "photograph.png", rgb)
    monkeypatch.setattr(full_size_inference, "draw", lambda panels, path: None)
    seen = []
    monkeypatch.setattr(
        full_size_inference,
        "segment",
        lambda model, image: (seen.append(image), (torch.zeros(24, 40).long(), 1.0, None))[1],
    )
    arguments = ["--network", "ccnet_resnet50", "--classes", "3", "--stem", options["stem"], "--height", "24"]
    arguments += [
        "--width",
        "40",
        "--checkpoint",
        str(tmp_path / "ccnet.pth"),
        "--image",
        str(tmp_path / "photograph.png"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of align_corners and the activation
        full_size_inference.main([*arguments, "--out", str(tmp_path), "--device", "cpu"])
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    if order == "BGR":
        expected = pixels.flip(1) - torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]
    else:
        mean, deviation = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
        expected = (pixels - mean) / deviation
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-3)


def test_grey_and_transparent_photographs(tmp_path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    io.imsave(tmp_path / "grey.png", grey)
    io.imsave(tmp_path / "rgba.png", np.dstack([grey, grey, grey, np.full_like(grey, 9)]), check_contrast=False)
    for name in ("grey.png", "rgba.png"):
        picture = full_size_inference.photograph(tmp_path / name, 8, 9)
        np.testing.assert_allclose(picture, np.dstack([grey] * 3) / 255, atol=1e-6)


def test_conversion_of_mmsegmentation() -> None:
    need("mmseg.models")
    report = convert_mmseg_danet.main(["--size", "48", "--depth", "18", "--repeats", "1", "--device", "cpu"])
    assert report.converted == ["decode_head.pam", "decode_head.cam"]
    assert report.difference < 1e-3


def test_conversion_refuses_a_checkpoint_of_another_network(tmp_path) -> None:
    need("mmseg.models")
    checkpoints.save(models.DANetHead(32, 5).state_dict(), tmp_path / "head.pth")
    with pytest.raises(SystemExit, match=r"is not of a danet_r18-d8: missing .*unknown conv5a\.0\.weight"):
        convert_mmseg_danet.main(["--size", "48", "--depth", "18", "--checkpoint", str(tmp_path / "head.pth")])


@pytest.mark.parametrize("example", [train_shapes, full_size_inference, draw_attention, convert_mmseg_danet])
def test_bad_arguments_are_named_in_a_line(example, capsys, tmp_path) -> None:
    """Exit status 2, before anything runs."""
    (tmp_path / "file").write_text("")
    cases = [(["--device", "tpu"], "--device: must be cpu"), (["--size", "0"], "--size: must be a whole number")]
    cases += [(["--device", "cuda:99"], "CUDA devices"), (["--out", tmp_path / "file"], "cannot be made")]
    if example is full_size_inference:
        cases[1:2] = [(["--width", "x"], "--width: must be a whole number"), (["--network", "unet"], "invalid choice")]
        cases += [(["--checkpoint", tmp_path / "file"], "--checkpoint needs a ResNet network")]
        cases += [(["--network", "dilated_resnet"], "invalid choice")]
        cases += [(["--network", "danet_resnet50", "--image", tmp_path / "file", "--out", tmp_path], "cannot identify")]
    if example is convert_mmseg_danet:
        cases[-1:] = [(["--image", tmp_path / "file"], "cannot identify"), (["--image", tmp_path / "none"], "No such")]
    if example is draw_attention:
        cases[:3] = [(["--seed", "-1"], "--seed: must be a whole number"), (["--size", "96"], "--size: ")]
        cases += [(["--size", "16x16"], "scene 12 of 16x16 has no fragment of a kind of which there is a whole shape")]
    for arguments, message in cases:
        given = [str(argument) for argument in arguments]
        try:
            status = command_line.example(example.PROG, lambda given=given: example.main(given))
        except SystemExit as stopped:
            status = stopped.code
        (line,) = capsys.readouterr().err.splitlines()
        assert status == 2 and message in line and line.startswith(example.PROG), line


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("large")
    return large_scene.main(["--quick", "--out", str(out)]), out


def test_large_scene_in_shards_is_that_of_one_process(large) -> None:
    result, out = large
    assert [own["rows"] for own in result["ranks"]] == [1200, 800]
    assert result["equal_labels"] > 0.9999 and result["difference"] < 1e-3 * result["largest"]
    assert all(own["sent_mib"] > 1 for own in result["ranks"])
    assert io.imread(out / "large_scene.png").std() > 5


def test_large_scene_has_seams_in_tiles_alone(large) -> None:
    result, _ = large
    assert result["accuracy"] > 0.95
    assert result["seams"] < 1.3 < 2 < result["tiled_seams"]


def test_rows_of_a_scene_are_drawn_alone() -> None:
    """And the same."""
    scene = large_scene.Scene(600, 400, 3)
    whole = large_scene.patches(scene, range(600))
    part = large_scene.patches(scene, range(200, 400))
    for all_rows, rows in zip(whole, part, strict=True):
        assert torch.equal(all_rows[:, :, 25:50], rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--ranks", "5"],
            "--check must have at least a row of tiles of 400 pixels for each of 5 ranks (got 1600x800)",
        ),
        (["--tile", "300"], "--tile must be a multiple of 200 pixels (got 300)"),
        (["--check", "2000x1500"], "--check must be a multiple of the tile, 400 pixels (got 2000x1500)"),
        (["--ranks", "0"], "--ranks: must be a whole number from 1 to 64"),
    ],
)
def test_wrong_options_of_large_scene(arguments, message, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stopped:
        large_scene.main(["--quick", "--out", str(tmp_path), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line and line.startswith(large_scene.PROG), line


def test_scenes_need_context() -> None:
    """Every kind has one colour in a scene, which its whole shapes and its fragments share; it differs among scenes."""
    colours = []
    for seed in range(8):
        image, labels, fragments = shapes.scene(seed, 72, 90)
        assert image.shape == (72, 90, 3) and 0 <= image.min() <= image.max() <= 1
        assert set(np.unique(labels)) == set(range(len(shapes.CLASSES)))
        assert fragments.any() and not fragments[labels == 0].any()
        of_kind = [image[(labels == kind) & ~fragments].mean(0) for kind in range(1, len(shapes.CLASSES))]
        for kind in np.unique(labels[fragments]):
            colour = image[(labels == kind) & fragments].mean(0)
            assert np.argmin([np.abs(colour - other).sum() for other in of_kind]) == kind - 1
        colours.append(np.round(of_kind, 1))
    assert any(np.abs(colours[0] - other).max() > 0.3 for other in colours[1:])
    again = shapes.scene(7, 72, 90)
    assert all((part == other).all() for part, other in zip(again, (image, labels, fragments), strict=True))
    few = shapes.scene(0, 24, 24)  # too small for all
    assert few[0].shape == (24, 24, 3) and len(np.unique(few[1])) > 1


def test_score_and_networks() -> None:
    labels = torch.from_numpy(shapes.scene(3, 40, 70)[1])
    assert shapes.mean_iou(labels, labels) == 1.0
    halves = torch.tensor([0, 0, 1, 1])
    assert shapes.mean_iou(torch.tensor([0, 1, 1, 1]), halves) == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="system must be danet or ccnet"):
        shapes.small_network("ann")
    assert segattn_ops.convert(shapes.small_network("danet")).already == ["classifier.sa", "classifier.sc"]
    for system in ("danet", "ccnet"):
        attention = shapes.attention_of(shapes.small_network(system))
        assert torch.equal(attention.query_conv.weight, attention.key_conv.weight) and attention.gamma.item() == 0.5
