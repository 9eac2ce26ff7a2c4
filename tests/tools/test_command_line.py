"""The commands of the source tree: what cannot run ends in one line on stderr and exit status 2, and nothing that an
earlier run wrote is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import __main__ as dispatcher
from benchmarks import ceilings, command_line, features, measure, ops, papers, processes, readme_pictures, report, run
from benchmarks.validate import WrongResult
from benchmarks.workloads import Workload

SMALL = ("--sizes", "4x4", "--ops", "position", "--channels", "8", "--threads", "1", "--backend", "reference")


def refused(main, arguments: list[str], capsys, status: int = 2) -> str:
    """The one line on stderr of a command that cannot run."""
    try:
        got = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        got = stopped.code
    printed = capsys.readouterr()
    assert got == status, printed
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "97"], "argument --sizes: a size is HEIGHTxWIDTH"),
        (["--sizes", "4x4,0x4"], "argument --sizes: a size is HEIGHTxWIDTH"),
        (["--sizes", "²x4"], "argument --sizes: a size is HEIGHTxWIDTH"),
        (["--sizes", " , "], "argument --sizes: at least one size"),
        (["--ops", "conv"], "argument --ops: must be from position, channel"),
        (["--dtypes", "int8"], "argument --dtypes: must be from float32"),
        (["--rivals", ""], "argument --rivals: must be from fused"),
        (["--threads", "0"], "argument --threads: must be a whole number from 1 to"),
        (["--threads", "1000000"], "argument --threads: must be a whole number from 1 to"),
        (["--repeats", "0"], "argument --repeats: must be a whole number of at least 1"),
        (["--repeats", "1.5"], "argument --repeats: must be a whole number of at least 1"),
        (["--batch", "9" * 5000], "argument --batch: must be a whole number"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0"),
        (["--budget", "-1"], "argument --budget: must be a number of seconds"),
        (["--budget", "inf"], "argument --budget: must be a number of seconds"),
        (["--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N"),
        (["--device", "cpu:1"], "argument --device: must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--rivals", "sdpa", "--ops", "channel,rcca"], "none of the rivals sdpa computes channel, rcca"),
        (["--sizes", "4x4", "--batch", "1000000000"], "the operands of position 4x4 B=1000000000"),
        (["--sizes", "900000x900000"], "the features of 900000x900000 positions need at least"),
        (["--photograph", "nothing.png"], "photograph must be one of"),
        (["--weights", "nothing.pth"], "weights nothing.pth: no such file"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, tmp_path):
    given = [*SMALL, *arguments, "--output", tmp_path / "report"]
    assert message in refused(ops.main, given, capsys)
    assert not (tmp_path / "report").exists()


def test_the_dispatcher(capsys, monkeypatch):
    """Every subcommand is described in --help and gets the arguments after its name; without one it is the main job."""
    assert dispatcher.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for number, name in enumerate(dispatcher.SUBCOMMANDS):
        module = dispatcher.module(name)
        assert f"  {name}" in printed and module.SUMMARY in printed
        monkeypatch.setattr(module, "main", lambda arguments, number=number: (number, arguments))
        assert dispatcher.main([name, "--help"]) == (number, ["--help"])
    main_job = list(dispatcher.SUBCOMMANDS).index("ops")
    assert dispatcher.main([]) == (main_job, [])
    assert dispatcher.main(["--sizes", "4x4"]) == (main_job, ["--sizes", "4x4"])
    line = refused(dispatcher.main, ["op"], capsys)
    assert "the subcommand must be one of ops, " in line and "(got 'op'" in line


def test_help_needs_no_package_of_the_extra():
    """What is missing is then named by the command, in a line."""
    program = (
        "import sys\n"
        "for name in ('torchvision', 'skimage', 'scipy', 'matplotlib', 'rich', 'psutil', 'jinja2', 'PIL', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks.__main__ import main\n"
        "main(['--help'])\n"
        "sys.exit(main([]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "ops " in ran.stdout, ran.stderr
    assert ran.returncode == 2 and "pip install 'segattn_ops[bench]'" in ran.stderr.splitlines()[-1]


def test_names_and_sizes_are_taken_once():
    assert command_line.names(("a", "b"))("b, a,b,") == ("b", "a")
    assert command_line.sizes("9x11, 4x4,9x11") == ((9, 11), (4, 4))


def test_files_that_are_not_what_they_should_be(capsys, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({"state_dict": 3}, tmp_path / "nested.pth")
    for option, name, message in [
        ("--photograph", "cut.jpg", "is not an image that PIL can read"),
        ("--photograph", "", "photograph must be one of"),
        ("--weights", "page.pth", "page.pth is an HTML"),
        ("--weights", "tensor.pth", "tensor.pth holds a Tensor, not a state dict"),
        ("--weights", "nested.pth", "nested.pth: the file holds no state dict"),
        ("--weights", "other.pth", "is not a ResNet-50: size mismatch"),
        ("--weights", "", "no such file"),
    ]:
        line = refused(ops.main, [*SMALL, option, tmp_path / name, "--output", tmp_path / "report"], capsys)
        assert message in line, name
    assert not (tmp_path / "report").exists()


def test_outputs_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "report"):
        assert "cannot be made" in refused(ops.main, [*SMALL, "--output", output], capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "is not writable" in refused(ops.main, [*SMALL, "--output", tmp_path], capsys)


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_missing_extras_are_named_before_anything_runs(missing, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused(ops.main, [*SMALL, "--output", tmp_path / "report"], capsys)
    assert f"needs {missing}: pip install 'segattn_ops[bench]'" in line
    assert not (tmp_path / "report").exists()


@pytest.fixture
def quick(monkeypatch):
    """The main job without photograph, network and processes: nothing is measured."""

    class Source:
        height = width = 4

    def extractor(*arguments):
        found = torch.nn.Module()
        found.backbone, found.description = None, "no network"
        return found

    monkeypatch.setattr(features, "load_photograph", lambda name: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(features, "Extractor", extractor)
    monkeypatch.setattr(features, "FeatureSource", lambda *arguments: Source())
    monkeypatch.setattr(ceilings, "reached", lambda device, repeats: {})
    monkeypatch.setattr(measure, "pin", lambda threads: None)
    monkeypatch.setattr(ops, "start_server", lambda: None)
    monkeypatch.setattr(ops, "_draw", lambda records, arguments: {"pictures": []})
    monkeypatch.setattr(run.Runner, "run", lambda self, planned, source: iter([[]]))


def test_an_earlier_report_is_kept(quick, capsys, tmp_path):
    arguments = [*SMALL, "--output", str(tmp_path)]
    (tmp_path / "report.json").write_text("of the first run")
    (tmp_path / "time.png").write_bytes(b"a picture")
    (tmp_path / "notes.txt").write_text("mine")
    os.utime(tmp_path / "report.json", (1_700_000_000, 1_700_000_000))
    assert ops.main(arguments) == 0
    (kept,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert f"The earlier report is kept in {kept}/" in capsys.readouterr().out
    assert {path.name for path in kept.iterdir()} == {"report.json", "time.png"}
    assert (kept / "report.json").read_text() == "of the first run"
    files = {"report.json", "report.md", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, "notes.txt", *files}
    os.utime(tmp_path / "report.json", (1_700_000_000, 1_700_000_000))  # two reports of one second
    second = json.loads((tmp_path / "report.json").read_text())
    assert ops.main(arguments) == 0
    assert json.loads((tmp_path / f"{kept.name}_2" / "report.json").read_text()) == second
    assert (kept / "report.json").read_text() == "of the first run"


def raising(error: BaseException):
    def raise_it(*arguments):
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (WrongResult("position 4x4: output\nis wrong"), 1, "position 4x4: output is wrong"),
        (processes.CellFailed("the cell's process was killed"), 1, "the cell's process was killed"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError("Unable to allocate 1.07 PiB"), 2, "there is not enough memory: Unable to allocate 1.07 PiB"),
    ],
)
def test_a_run_that_stops_says_why_in_a_line(error, status, message, quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Runner, "run", raising(error))
    line = refused(ops.main, [*SMALL, "--output", tmp_path], capsys, status)
    assert line.startswith("python -m benchmarks ops: ") and message in line


def test_the_server_of_the_cells_ignores_interrupts(monkeypatch):
    from multiprocessing import forkserver

    inherited = []
    monkeypatch.setattr(forkserver, "ensure_running", lambda: inherited.append(signal.getsignal(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    processes.start_server()
    assert inherited == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGINT) == before


def test_one_position_has_features():
    source = features.FeatureSource(features.load_photograph("coffee"), [(1, 1)], features.Extractor(channels=8))
    assert source.window(1, 1).shape == (1, 8, 1, 1)
    assert source.window(1, 1).isfinite().all()


def test_one_thread_is_not_several():
    facts = {"processor": "a CPU", "memory_bytes": 2**30, "torch": "2", "python": "3"}
    assert "a CPU, 1 thread, 1 GiB" in report.where({"machine": facts | {"threads": 1}})
    assert "a CPU, 2 threads, 1 GiB" in report.where({"machine": facts | {"threads": 2}})


def test_readme_pictures_refuse_other_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(readme_pictures, "FOLDER", tmp_path / "images")
    assert "is no folder that `python -m benchmarks` has written" in refused(
        readme_pictures.main, [tmp_path / "none"], capsys
    )
    for content, message in [
        ("<html>", "is no folder"),
        ("[]", "is no folder"),
        ('{"cells": []}', "has no memory of position attention"),
    ]:
        (tmp_path / "report.json").write_text(content)
        assert message in refused(readme_pictures.main, [tmp_path], capsys)
    assert "the following arguments are required: report" in refused(readme_pictures.main, [], capsys)
    assert not (tmp_path / "images").exists()


def test_papers_say_what_is_wrong(capsys, tmp_path):
    assert "argument --backend: invalid choice: 'cuda'" in refused(papers.main, ["--backend", "cuda"], capsys)
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(papers.main, ["--output", tmp_path / "file"], capsys)


def test_a_dry_run_lists_the_cells(capsys, tmp_path):
    """With guessed rates, then with those of an earlier report; nothing is written."""
    arguments = ["--sizes", "16x16,97x97", "--ops", "position,channel", "--rivals", "fused,eager,compile,xformers"]
    arguments += ["--backend", "reference", "--output", str(tmp_path), "--dry-run"]
    assert ops.main(arguments) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "14 cells, 10 run" in printed and "guessed rates" in printed
    assert "| position 16x16 float32 | compile |" in printed and "skipped: not compiled below 8192 positions" in printed
    assert "| position 97x97 float32 | xFormers |" in printed and "not available: only for cuda" in printed
    (guess,) = (line for line in printed.splitlines() if line.startswith("| position 97x97 float32 | eager |"))
    entry = run.record(Workload("position", 64, 64), "eager", "measured")
    entry["forward_backward"] = {"median": 0.5}
    report.write_json({"cells": [entry]}, tmp_path / "report.json")
    assert ops.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "rates of 1 cells of" in printed and guess not in printed
    assert f"| position 97x97 float32 | eager | {0.5 * 97**4 / 64**4:.3g} |" in printed


def test_a_resumed_run_measures_what_is_missing(quick, capsys, tmp_path, monkeypatch):
    """The first workload is kept, and only the second one is run."""
    arguments = [*SMALL, "--sizes", "3x4,4x4", "--repeats", "1", "--output", str(tmp_path)]
    planned = ops.workloads_of(ops.parser().parse_args(arguments))
    groups = [[run.record(workload, "eager", "skipped", "a test")] for workload in planned]

    def interrupted(self, left, source):
        yield groups[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Runner, "run", interrupted)
    assert refused(ops.main, arguments, capsys, 130).endswith("interrupted")
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["finished"], len(written["cells"])) == (False, 1)
    asked = []
    monkeypatch.setattr(run.Runner, "run", lambda self, left, source: asked.append(left) or iter(groups[1:]))
    assert ops.main([*arguments, "--resume"]) == 0
    assert asked == [planned[1:]]
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["finished"], [cell["width"] for cell in written["cells"]]) == (True, [4, 4])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # nothing was put aside
    assert "is complete" in refused(ops.main, [*arguments, "--resume"], capsys)


def test_help_is_no_error(capsys):
    for main in (dispatcher.main, ops.main, papers.main, readme_pictures.main):
        with contextlib.suppress(SystemExit):
            main(["--help"])
        printed = capsys.readouterr()
        assert "usage: python -m benchmarks" in printed.out and not printed.err
