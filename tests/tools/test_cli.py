"""`python -m segattn_ops` as a user meets it: what the subcommands print, write and refuse."""

import json
import os
import sys

import numpy as np
import pytest
import torch

import segattn_ops
from examples.shapes import PREPROCESSING, WEIGHTS, trained_network
from segattn_ops import _cli, checkpoints, memory, models, use_backend, visualize
from segattn_ops._cli import self_test, self_test_cases
from segattn_ops.models.networks import _assemble

COMMANDS = tuple(_cli.COMMANDS)


def ran(arguments: list[object], capsys, status: int = 0) -> str:
    """What a command prints, in lines that fit a terminal of 80 columns."""
    try:
        got = _cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        got = stopped.code
    printed = capsys.readouterr()
    assert got == status, printed
    assert not printed.err
    return printed.out


def refused(arguments: list[object], capsys) -> str:
    """The one line on stderr of a command that cannot run."""
    try:
        got = _cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        got = stopped.code
    printed = capsys.readouterr()
    assert got == 2, printed
    assert not printed.out
    (line,) = printed.err.splitlines()
    return line


def fits_80_columns(text: str) -> bool:
    return all(len(line) <= 80 for line in text.splitlines())


def network(name: str, head: type, classes: int = 3, aux_loss: bool = False) -> torch.nn.Module:
    """On a ResNet-18 with random statistics."""
    torch.manual_seed(0)
    options = {"weights": None, "output_stride": 32, "stem": "torchvision"}
    made = _assemble(getattr(models, name), "resnet18", head, classes, aux_loss, None, True, options, {})
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point() and tensor.numel() == 1:
            torch.nn.init.constant_(tensor, 0.5)  # gamma
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture, a DANet and its head, an ANN, a block, and files that are no checkpoints."""
    from PIL import Image

    path = tmp_path_factory.mktemp("cli")
    gradient = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    Image.fromarray(gradient).save(path / "picture.png")
    danet = network("DANet", models.DANetHead, aux_loss=True)
    checkpoints.save(danet.state_dict(), path / "danet.pth")
    checkpoints.save(danet.classifier.state_dict(), path / "head.pth")
    checkpoints.save(network("ANN", models.ANNHead).state_dict(), path / "ann.safetensors")
    checkpoints.save(segattn_ops.nn.PositionAttention(16).state_dict(), path / "block.pth")
    (path / "page.pth").write_text("<!doctype html>")
    return path


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = ran([*([command] if command else []), "--help"], capsys)
    assert printed.startswith("usage: python -m segattn_ops") and fits_80_columns(printed)
    assert all(name in printed for name in (COMMANDS if command is None else [command]))


def test_info_is_the_default(capsys):
    pages = [ran(arguments, capsys) for arguments in ([], ["info"])]
    assert pages[0] == pages[1] and segattn_ops.__version__ in pages[0]
    facts = [json.loads(ran(arguments, capsys)) for arguments in (["--json"], ["info", "--json"])]
    assert facts[0] == facts[1] and facts[0]["version"] == segattn_ops.__version__


SIZE = ("--height", 64, "--width", 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "argument COMMAND: invalid choice: 'nothing'"),
        (["--what"], "unrecognized arguments: --what"),
        (["memory"], "memory: the following arguments are required: --height, --width"),
        (["memory", "--height", 0, "--width", 5], "argument --height: must be a whole number of at least 1"),
        (["memory", "--height", "²", "--width", 5], "argument --height: must be a whole number of at least 1"),
        (["memory", "--height", 10**9, "--width", 10**9], "a batch must have at most"),
        (["memory", "--height", 1, "--width", 1], "Expected more than 1 value per channel when training"),
        (["memory", *SIZE, "--model", "danet"], "argument --model: invalid choice: 'danet'"),
        (["memory", *SIZE, "--budget", "8,x"], "argument --budget: must be positive numbers of GiB"),
        (["memory", *SIZE, "--budget", "nan"], "argument --budget: must be positive numbers of GiB"),
        (["memory", *SIZE, "--budget", "1e300"], "1e+300 GiB is more than any device has"),
        (["memory", *SIZE, "--train", "--inference"], "not allowed with argument"),
        (["convert-checkpoint"], "the following arguments are required: IN, OUT, --to"),
        (["convert-checkpoint", "danet.pth", "o.pth", "--to", "caffe"], "argument --to: invalid choice: 'caffe'"),
        (["convert-checkpoint", "none.pth", "o.pth", "--to", "official"], "there is no file none.pth"),
        (["convert-checkpoint", ".", "o.pth", "--to", "official"], ". is a folder, not a file"),
        (["convert-checkpoint", "danet.pth", "none/o.pth", "--to", "official"], "there is no folder none for o.pth"),
        (["convert-checkpoint", "danet.pth", ".", "--to", "official"], ". is a folder: name a file in it"),
        (["convert-checkpoint", "danet.pth", "head.pth", "--to", "official"], "head.pth exists: --force overwrites it"),
        (["convert-checkpoint", "danet.pth", "danet.pth", "--to", "official", "--force"], "are the same file"),
        (["convert-checkpoint", "page.pth", "o.pth", "--to", "official"], "page.pth is an HTML"),
        (["convert-checkpoint", "block.pth", "o.pth", "--to", "official"], "holds a block (query key value) alone"),
        (
            ["convert-checkpoint", "danet.pth", "o.pth", "--to", "official", "--prefix", "a"],
            "no name begins with prefix",
        ),
        (["visualize", "picture.png", "--checkpoint", "danet.pth"], "pass either --points or --channels"),
        (["visualize", "picture.png", "--checkpoint", "danet.pth", "--points", "3"], "points are y,x;y,x (got '3')"),
        (["visualize", "none.png", "--checkpoint", "danet.pth", "--points", "0,0"], "there is no file none.png"),
        (["visualize", "page.pth", "--checkpoint", "danet.pth", "--points", "0,0"], "is not an image"),
        (
            ["visualize", "picture.png", "--checkpoint", "danet.pth", "--points", "2,0"],
            "must be fractions of the image",
        ),
        (
            ["visualize", "picture.png", "--checkpoint", "danet.pth", "--points", "40,0", "--units", "pixels"],
            "must be whole numbers within the image, (0 to 39, 0 to 59)",
        ),
        (
            ["visualize", "picture.png", "--checkpoint", "head.pth", "--points", "0,0"],
            "head.pth has no backbone with the names of a ResNet",
        ),
        (
            ["visualize", "picture.png", "--checkpoint", "ann.safetensors", "--channels"],
            "ANN called no channel attention",
        ),
        (["visualize", "picture.png", "--points", "0,0"], "pass --checkpoint, --network or both"),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "f"],
            "must be MODULE:FUNCTION (got 'f')",
        ),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "no_such:f"],
            "--network: no_such cannot be imported (No module named 'no_such')",
        ),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "math:tau"],
            "--network: math has no function tau",
        ),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "builtins:dict"],
            "--network: builtins:dict must return a torch.nn.Module (got a dict)",
        ),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "torch.nn:Identity"],
            "set its attribute `preprocessing` to a segattn_ops.checkpoints.Preprocessing",
        ),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "torch.nn:Identity", "--prefix", "a"],
            "pass it without --network",
        ),
        (
            ["visualize", "picture.png", "--points", "0,0", "--network", "examples.shapes:danet"]
            + ["--checkpoint", "danet.pth"],
            "danet.pth is not of examples.shapes:danet",
        ),
        (["self-test", "--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N"),
        (["self-test", "--device", "cuda:99"], "argument --device: torch sees"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(arguments, message, capsys, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    assert message in refused(arguments, capsys)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("missing", ["matplotlib", "PIL", "torchvision"])
def test_missing_packages_are_named(missing, capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    package = {"PIL": "pillow"}.get(missing, missing)
    arguments = ["visualize", folder / "picture.png", "--checkpoint", folder / "danet.pth", "--points", "0,0"]
    line = refused([*arguments, "--output", folder / "never.png"], capsys)
    assert f"needs {missing}: pip install {package}" in line


def test_checkpoints_go_round_in_a_circle(capsys, folder, tmp_path):
    """Our names to the authors', to mmsegmentation's where there are such, and back: the same tensors."""
    for name, formats in [("danet.pth", ("official", "mmsegmentation")), ("ann.safetensors", ("official",))]:
        given = checkpoints.read(folder / name)
        at = folder / name
        for number, layout in enumerate((*formats, "segattn_ops")):
            written = tmp_path / f"{number}_{name}"
            printed = ran(["convert-checkpoint", at, written, "--to", layout], capsys)
            assert f": {layout}, " in " ".join(printed.split()) and "renamed" in printed
            at = written
        back = checkpoints.read(at)
        lost = {key for key in given if key not in back}
        assert {key.split(".")[0] for key in lost} <= {"aux_classifier"}  # which the official DANet does not have
        assert lost or name != "danet.pth"
        assert all(torch.equal(back[key], value) for key, value in given.items() if key not in lost)


def test_a_conversion_says_what_it_did(capsys, folder, tmp_path):
    printed = ran(["convert-checkpoint", folder / "danet.pth", tmp_path / "out.pth", "--to", "official"], capsys)
    text = " ".join(printed.split())
    assert "read segattn_ops danet, resnet18 (stem torchvision), auxiliary head" in text
    assert "backbone.conv1.weight -> pretrained.conv1.weight" in text
    assert "classifier.conv5a.0.weight -> head.conv5a.0.weight" in text
    assert "dropped 8: aux_classifier.0.weight" in text and "has no auxiliary head" in text
    head = ran(["convert-checkpoint", folder / "head.pth", tmp_path / "h.pth", "--to", "mmsegmentation"], capsys)
    assert "official danet, the head alone" in head and "pam_in_conv.conv.weight" in head
    assert "pam_in_conv.conv.weight" in checkpoints.read(tmp_path / "h.pth")


def test_force_overwrites(capsys, folder, tmp_path):
    (tmp_path / "out.pth").write_text("earlier")
    arguments = ["convert-checkpoint", folder / "head.pth", tmp_path / "out.pth", "--to", "official"]
    assert "--force" in refused(arguments, capsys)
    assert (tmp_path / "out.pth").read_text() == "earlier"
    ran([*arguments, "--force"], capsys)
    assert "conv5a.0.weight" in checkpoints.read(tmp_path / "out.pth")


@pytest.mark.parametrize(
    ("checkpoint", "options", "attention"),
    [
        ("danet.pth", ["--points", "0.2,0.3;0.9,1"], "classifier.sa"),
        ("danet.pth", ["--points", "0,0;39,59", "--units", "pixels", "--longest", "48"], "classifier.sa"),
        ("danet.pth", ["--channels"], "classifier.sc"),
        ("ann.safetensors", ["--points", ".5,.5"], "classifier.fusion.stages.0, classifier.context.2.stages.0"),
    ],
)
def test_pictures_of_attention(checkpoint, options, attention, capsys, folder, tmp_path):
    from PIL import Image

    output = tmp_path / "attention.png"
    arguments = ["visualize", folder / "picture.png", "--checkpoint", folder / checkpoint, *options]
    printed = ran([*arguments, "--output", output], capsys)
    assert attention in printed and "resnet18" in printed
    with Image.open(output) as drawn:
        assert min(drawn.size) > 100
    assert "exists: --force overwrites it" in refused([*arguments, "--output", output], capsys)


@pytest.mark.parametrize("name", ["danet", "ccnet"])
def test_the_networks_of_the_examples(name, capsys, folder, tmp_path):
    """As docs/command_line.md calls it."""
    arguments = ["visualize", folder / "picture.png", "--network", f"examples.shapes:{name}", "--points", "0.4,0.55"]
    printed = ran([*arguments, "--output", tmp_path / "attention.png"], capsys)
    assert f"of examples.shapes:{name}" in printed and (tmp_path / "attention.png").exists()


@pytest.mark.parametrize("weights", [[], ["--checkpoint", WEIGHTS / "ccnet.safetensors"]])
def test_a_network_of_ones_own(weights, capsys, folder, tmp_path, monkeypatch):
    """Found in the current folder, and with the weights of the checkpoint in the place of its own."""
    from PIL import Image

    (tmp_path / "mine.py").write_text(
        "from examples import shapes\n"
        "def network():\n"
        f"    return shapes.{'small_network' if weights else 'trained_network'}('ccnet')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["visualize", folder / "picture.png", "--network", "mine:network", *weights, "--points", "5,7"]
    printed = ran([*arguments, "--units", "pixels"], capsys)
    sys.modules.pop("mine")
    assert "CCNet of mine:network" in printed and "classifier.cca" in printed
    x = PREPROCESSING(Image.open(folder / "picture.png"))
    model = trained_network("ccnet")
    with torch.inference_mode(), visualize.record_attention(model, [(5, 7)], units="pixels", size=x.shape[2:]) as maps:
        model(x)
    visualize.draw_attention(
        folder / "picture.png", {"classifier.cca": maps["classifier.cca"][0]}, [(5, 7)], "expected.png", units="pixels"
    )
    assert np.array_equal(*(np.asarray(Image.open(name)) for name in ("attention.png", "expected.png")))


def test_memory_says_what_fits(capsys):
    arguments = ["memory", "--height", 256, "--width", 128, "--batch", 2, "--inference", "--attention", "fused"]
    expected = memory.estimate("danet_resnet50", 256, 128, 2, train=False)
    gib = expected.total / 2**30
    page = ran([*arguments, "--budget", f"8,{1.05 * gib:.6f},{0.5 * gib:.6f}"], capsys)
    assert fits_80_columns(page)
    assert f"{gib:.3f}" in next(line for line in page.splitlines() if line.startswith("total"))
    answers = [line.split("GiB")[1] for line in page.splitlines() if line[:1].isdecimal()]
    words = [answer.split(",")[0].strip() for answer in answers]
    assert words == ["fits", "tight", "does not fit"]
    assert f"largest batch {expected.largest_batch(int(0.9 * 8 * 2**30))}" in answers[0]
    facts = json.loads(ran([*arguments, "--json", "--headroom", 0], capsys))
    assert facts["fused"]["parts"] == expected.parts
    assert facts["fused"]["largest_batch"]["8"] == expected.largest_batch(8 * 2**30)


def test_memory_compares_with_maps(capsys):
    printed = ran(["memory", *SIZE, "--dtype", "bfloat16", "--batch", 2, "--inference"], capsys)
    assert fits_80_columns(printed)
    assert "fused       eager" in printed and "bfloat16 autocast" in printed and "inference" in printed


def test_the_self_test_passes(capsys):
    printed = ran(["self-test", "--device", "cpu"], capsys)
    assert fits_80_columns(printed.partition("\ncpu: ")[2])
    assert printed.splitlines()[-1].startswith("passed: ")
    capability = segattn_ops.build_config()["cpu"]["instruction_set"]
    assert f"{capability} kernels" in printed and "no kernels" not in printed
    tested = {line.split("  ")[0] for line in printed.splitlines()}
    public = {name for name in segattn_ops.__all__ if "attention" in name or "criss_cross" in name}
    assert public <= tested
    assert {"criss_cross_rows", "criss_cross_columns", "channel_energy", "channel_apply"} <= tested


@pytest.mark.parametrize("case", [case for case in self_test_cases.CASES if case.eager is not None], ids=str)
def test_the_eager_formulas_are_the_definitions(case):
    """The self-test allows twice their error."""
    exact, eager = (self_test_cases._results(function, case.inputs()) for function in (case.exact, case.eager))
    assert exact.keys() == eager.keys()
    for name, expected in exact.items():
        torch.testing.assert_close(eager[name], expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def one_op(monkeypatch):
    """The self-test of one op at one shape."""
    cases = [case for case in self_test_cases.CASES if case.op == "criss_cross_affinity"][:1]
    monkeypatch.setattr(self_test, "CASES", cases)


def test_a_wrong_kernel_fails(one_op, capsys, monkeypatch):
    right = segattn_ops.criss_cross_affinity
    monkeypatch.setattr(segattn_ops, "criss_cross_affinity", lambda q, k: right(q, k) * (1 + 1e-4))
    printed = ran(["self-test"], capsys, status=1)
    assert "FAILED: " in printed.splitlines()[-1] and "(criss_cross_affinity)" in printed
    assert "FAILED criss_cross_affinity of 2x8x5x7, 2x8x5x7: output has error" in printed and "in float32" in printed
    facts = json.loads(ran(["self-test", "--json"], capsys, status=1))
    assert facts["passed"] is False and facts["devices"][0]["failures"]


@pytest.mark.parametrize("wrong", [lambda x: x * torch.nan, lambda x: x[:, :1], lambda x: x.detach() + 0 * x])
def test_nan_shapes_and_gradients_are_compared(wrong, one_op, capsys, monkeypatch):
    right = segattn_ops.criss_cross_affinity
    monkeypatch.setattr(segattn_ops, "criss_cross_affinity", lambda q, k: wrong(right(q, k)))
    assert "FAILED" in ran(["self-test"], capsys, status=1)


def test_an_error_of_an_op_fails(one_op, capsys, monkeypatch):
    def raises(q, k):
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    monkeypatch.setattr(segattn_ops, "criss_cross_affinity", raises)
    printed = ran(["self-test"], capsys, status=1)
    assert "CUDA error: an illegal memory access" in printed


def test_the_self_test_says_that_the_reference_serves(one_op, capsys):
    with use_backend("reference"):
        printed = ran(["self-test", "--device", "cpu"], capsys)
    assert "cpu: the plain PyTorch reference, which is selected" in printed
    assert "on cpu (the reference: no kernels)" in printed.splitlines()[-1]
