"""`python -m benchmarks modules` and `models`: the blocks written out, what a pass costs, the runner, the tables."""

import copy
import json
import math

import pytest
import torch

from benchmarks import (
    blocks,
    measure,
    network_run,
    page,
    page_subjects,
    report,
    subject_command,
    subject_tables,
    subjects,
)
from benchmarks.__main__ import main
from benchmarks.network_cell import NetworkCell, NetworkSpec, image_of, save_inputs
from benchmarks.processes import CellFailed, CellProcess
from benchmarks.subjects import MODELS, MODULES, PASSES, Cost, Subject
from benchmarks.validate import WrongResult
from segattn_ops import use_backend
from segattn_ops.conversion.block import FusedBlock

GIB = 2**30
PHOTOGRAPH = torch.arange(3 * 40 * 60, dtype=torch.int64).remainder(251).to(torch.uint8).view(40, 60, 3).numpy()


def small(name: str) -> Subject:
    return Subject("module", name, 5, 6)


class TestBlocks:
    @pytest.mark.parametrize("name", MODULES)
    def test_written_out_they_compute_the_same(self, name):
        subject = small(name)
        inputs = [torch.randn(shape) for shape in subject.shapes()]
        for rival in ("fused", "sdpa") if blocks.applies(subject.make(), "sdpa") else ("fused",):
            with use_backend("reference"):
                found = blocks.small_errors(subject.network("eager"), subject.network(rival), *inputs)
            assert {"output", "grad_input_0"} <= set(found)
            assert max(found.values()) < 1e-9

    @pytest.mark.parametrize("name", MODULES)
    def test_no_block_is_the_identity_and_none_is_left(self, name):
        network = small(name).make().eval()
        inputs = [torch.randn(shape) for shape in small(name).shapes()]
        for block in blocks.found(network).values():
            factors = [value for name, value in block.named_parameters() if value.dim() > 1 or name.endswith("gamma")]
            assert all(bool(value.any()) for value in factors)
        with use_backend("reference"), torch.no_grad():
            expected = network(*inputs)
            written = blocks.written_out(network, "eager")
            assert blocks.found(written) == {}
            torch.testing.assert_close(written(*inputs), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", MODELS)
    def test_models_are_converted(self, name):
        """Every block of the eager network, on its parameters, under their names."""
        subject = Subject("model", name, 48, 64)
        made = subject.make()
        names = [path for path, _ in made.named_parameters()]
        paths = set(blocks.found(made))
        network = subject.computed(made, "fused")
        assert [path for path, _ in network.named_parameters()] == names
        replaced = {path for path, module in network.named_modules() if isinstance(module, FusedBlock)}
        assert {path.removesuffix(".once") for path in replaced} == paths

    def test_a_block_that_is_not_converted_is_refused(self, monkeypatch):
        monkeypatch.setattr(blocks.WrittenNonLocal, "forward", lambda self, x, queries=None: x)
        with pytest.raises(RuntimeError, match="convert must convert all 1 blocks:\n *left  classifier.nl"):
            Subject("model", "nonlocal", 48, 64).network("fused")

    @pytest.mark.parametrize("name", MODULES)
    def test_a_wrong_output_is_found(self, name):
        network = small(name).make().eval()
        inputs = [torch.randn(shape) for shape in small(name).shapes()]
        references = blocks.References(network)
        with use_backend("reference"):
            assert max(references.errors(network, *inputs).values()) < 1e-5
            (block, *_) = blocks.found(network).values()
            block.register_forward_hook(lambda module, arguments, output: output * (1 + 1e-3))
            wrong = copy.copy(references)
            assert max(wrong.errors(network, *inputs).values()) == pytest.approx(1e-3, rel=0.1)
            block.register_forward_hook(lambda module, arguments, output: output * math.nan)
            assert max(wrong.errors(network, *inputs).values()) == math.inf

    def test_a_wrong_gradient_is_found(self):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return 1.01 * gradient

        eager, rival = (small("pam").network(name) for name in ("eager", "sdpa"))
        rival.key_conv.register_forward_hook(lambda module, arguments, output: Wrong.apply(output))
        found = blocks.small_errors(eager, rival, torch.randn(1, 512, 5, 6))
        assert found["output"] < 1e-9 and max(found.values()) > 1e-3


class TestCosts:
    def test_the_flop_are_those_of_the_paper(self):
        """CCNet's table: 108 GFLOP of the Non-local block, 16.5 of RCCA at R = 2."""
        for name, published, tolerance in (("pam", 108.0, 0.5), ("rcca", 16.5, 0.1)):
            found = subjects.predicted(Subject("module", name, 97, 97), "eager")["forward"]
            assert found.flop / 1e9 == pytest.approx(published, abs=tolerance)

    def test_the_attention_maps_count(self):
        fused, eager, sdpa = (subjects.predicted(Subject("module", "pam", 64, 64), r) for r in blocks.RIVALS)
        a_map = 4 * 4096**2
        for kind, maps in (("forward", 2), ("forward_backward", 3)):
            assert eager[kind].peak_bytes - fused[kind].peak_bytes > (maps - 0.5) * a_map
        assert sdpa["forward"].flop == eager["forward"].flop

    def test_a_model_of_a_large_image_needs_more_than_this(self):
        subject = Subject("model", "ccnet", 128, 256)
        found = subjects.predicted(subject, "fused")
        parameters = sum(p.numel() for p in subject.of.make().parameters())
        assert found["forward_backward"].peak_bytes > found["forward"].peak_bytes + 4 * parameters
        assert network_run.fits(found["forward"], 8 * GIB) is None
        assert network_run.fits(Cost(1, 8 * GIB), 8 * GIB) == "would not fit: needs 10.0 GiB, 8.0 GiB available"

    def test_sdpa_applies_to_pairs_of_positions(self):
        applicable = {
            name: network_run.applicable(blocks.RIVALS, small(name)) for name in ("pam", "cam", "rcca", "apnb")
        }
        assert [len(applicable[name]) for name in ("pam", "cam", "rcca", "apnb")] == [3, 2, 2, 3]


class TestCells:
    def test_a_module_in_a_process(self, tmp_path):
        path = str(tmp_path / "inputs.pt")
        save_inputs(path, small("pam"), None)
        cell = CellProcess(NetworkSpec(small("pam"), "eager", path, threads=1))
        found = cell.call("check")
        assert max(found["blocks"].values()) < 1e-5 and found["small"]["output"] == 0.0
        assert cell.call("warm_up") == 4 * (512 * 512 + 512 + 2 * (512 * 64 + 64) + 1)
        for kind in PASSES:
            assert cell.call("first_pass", kind)["seconds"] > 0
            assert cell.call("timed_pass", kind) > 0
        with pytest.raises(CellFailed, match="check runs once"):
            cell.call("check")
        cell.close()

    def test_a_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr(measure, "populate_code", lambda: None)
        monkeypatch.setattr("benchmarks.network_cell.CALIBRATION", (64, 64))
        path = str(tmp_path / "inputs.pt")
        subject = Subject("model", "ccnet", 64, 96)
        save_inputs(path, subject, PHOTOGRAPH)
        cell = NetworkCell(NetworkSpec(subject, "eager", path))
        try:
            before = {name: value.clone() for name, value in cell.network.named_parameters()}
            state = cell.warm_up()
            assert any(not torch.equal(before[name], value) for name, value in cell.network.named_parameters())
            parameters = sum(value.numel() * 4 for value in before.values())
            assert state > 2 * parameters  # the momentum too
            assert all(value.grad is None for value in cell.network.parameters())
            assert cell.timed_pass("forward") > 0
        finally:
            import gc

            gc.unfreeze()

    def test_the_image_is_the_photograph(self):
        image = image_of(PHOTOGRAPH, 20, 30)
        assert image.shape == (1, 3, 20, 30)
        assert -3 < float(image.min()) < float(image.max()) < 3


class FakeCell:
    """A stand-in for a process that answers at once and records the calls."""

    log: list = []
    errors = {"fused": 1e-7, "eager": 1e-7, "sdpa": 1e-7}
    small = 1e-9
    failing = ""

    def __init__(self, spec, timeout=0.0):
        self.spec = spec

    def call(self, name, *arguments, timeout=0.0):
        self.log.append((self.spec.rival, name, *arguments))
        if self.spec.rival == self.failing:
            raise CellFailed("the cell's process was killed")
        if name == "check":
            return {"blocks": {"": self.errors[self.spec.rival]}, "small": {"output": 0.0, "grad_gamma": self.small}}
        if name == "warm_up":
            return 1000
        slower = 1.0 if self.spec.rival == "fused" else 3.0
        if name == "first_pass":
            return {"seconds": slower, "bytes": int(slower * GIB)}
        return slower if name == "timed_pass" else None

    def close(self):
        self.log.append((self.spec.rival, "close"))


@pytest.fixture
def fake_cells(monkeypatch):
    monkeypatch.setattr(network_run, "CellProcess", FakeCell)
    monkeypatch.setattr(network_run, "save_inputs", lambda *arguments: None)
    for name, value in (("log", []), ("small", 1e-9), ("failing", ""), ("errors", dict(FakeCell.errors))):
        monkeypatch.setattr(FakeCell, name, value)
    return FakeCell


def run(*planned: Subject, **options) -> list[dict]:
    options = network_run.Options(**{"rivals": ("fused", "eager"), "rounds": 6} | options)
    return [entry for group in network_run.Runner(options).run(planned) for entry in group]


class TestRunner:
    def test_rounds_are_interleaved_and_the_first_is_discarded(self, fake_cells):
        records = run(small("pam"), rounds=2)
        timed = [(rival, *kind) for rival, name, *kind in fake_cells.log if name == "timed_pass"]
        assert timed == [(rival, kind) for rival in ("eager", "fused") for kind in PASSES] * 3
        assert [entry["rival"] for entry in records] == ["fused", "eager"]
        assert records[0]["forward"]["times"] == [1.0, 1.0]
        assert records[1]["memory"] == {"forward": 3 * GIB, "forward_backward": 3 * GIB}

    def test_a_pass_that_does_not_fit_says_so(self, fake_cells, monkeypatch):
        cost = {"forward": Cost(10**9, 2**20), "forward_backward": Cost(10**9, 8 * GIB)}
        monkeypatch.setattr(subjects, "predicted", lambda subject, rival: cost)
        monkeypatch.setattr(measure, "available_bytes", lambda device: 4 * GIB)
        (entry, _) = run(small("pam"))
        assert entry["not_run"] == {"forward_backward": "would not fit: needs 10.0 GiB, 4.0 GiB available"}
        assert "forward" in entry and "forward_backward" not in entry
        monkeypatch.setattr(measure, "available_bytes", lambda device: 2**20)
        (entry, _) = run(small("pam"))
        assert entry["status"] == "skipped" and entry["reason"].startswith("would not fit")

    def test_a_pass_without_time_says_so(self, fake_cells):
        (entry, _) = run(Subject("module", "pam", 97, 97), budget=1.0)
        assert entry["status"] == "skipped" and entry["reason"].startswith("over the time budget: about 4 s")

    @pytest.mark.parametrize(
        ("budget", "rounds"), [(None, [3, 3, 3]), (64.0, [3, 3, 3]), (48.0, [1, 3, 3]), (33.0, [0, 1, 3])]
    )
    def test_a_subject_leaves_time_for_those_that_follow(self, budget, rounds, fake_cells, monkeypatch):
        """Passes of 8 s in all, of a clock that stands still."""
        cost = dict.fromkeys(PASSES, Cost(10**9, 2**20))
        monkeypatch.setattr(subjects, "predicted", lambda subject, rival: cost)
        monkeypatch.setattr(network_run.Clock, "left", property(lambda clock: clock.budget or math.inf))
        records = run(small("pam"), small("rcca"), small("non_local"), rounds=None, budget=budget)
        assert [entry["rounds"] for entry in records if entry["rival"] == "fused"] == rounds

    def test_wrong_results_stop_the_run(self, fake_cells, monkeypatch):
        fake_cells.errors["fused"] = 1e-3
        with pytest.raises(WrongResult, match="the output of pam is wrong: relative error 0.001"):
            run(small("pam"))
        assert not any(name == "timed_pass" for _, name, *_ in fake_cells.log)
        fake_cells.errors["fused"] = 1e-7
        monkeypatch.setattr(fake_cells, "small", 1e-3)
        with pytest.raises(WrongResult, match="grad_gamma is wrong in float64"):
            run(small("pam"))

    def test_a_rival_that_fails_has_a_row_and_ours_stops_the_run(self, fake_cells, monkeypatch):
        monkeypatch.setattr(fake_cells, "failing", "eager")
        records = run(small("pam"))
        assert [entry["status"] for entry in records] == ["measured", "failed"]
        monkeypatch.setattr(fake_cells, "failing", "fused")
        with pytest.raises(CellFailed):
            run(small("pam"))


def content(kind: str, records: list[dict]) -> dict:
    machine = {
        "processor": "A processor",
        "threads": 2,
        "memory_bytes": 0,
        "torch": "2",
        "python": "3",
        "device": "cpu",
    }
    command = f"python -m benchmarks {kind} --sizes 8x8 --threads 2"
    return {
        "kind": kind,
        "date": "2026-11-28",
        "command": command,
        "commit": None,
        "machine": machine,
        "cells": records,
    }


class TestTables:
    def test_rows_of_modules(self, fake_cells):
        result = content("modules", run(small("pam"), small("cam")))
        text = subject_tables.markdown(result)
        flop = subjects.predicted(small("pam"), "eager")["forward"].flop
        ratio = "3.00 (3.00-3.00), faster"
        row = f"3000 | {ratio} | 3000 | {ratio} | 3072 (3.00x) | 1e-07 |"
        assert f"| 5x6 | eager | {flop / 1e9:.3g} | {row}" in text
        assert "## DANet's CAM, float32" in text

    def test_rows_of_models(self, fake_cells, monkeypatch):
        monkeypatch.setattr(measure, "available_bytes", lambda device: 4 * GIB)
        cost = {"forward": Cost(10**9, 2**20), "forward_backward": Cost(10**9, 8 * GIB)}
        monkeypatch.setattr(subjects, "predicted", lambda subject, rival: cost)
        monkeypatch.setattr(network_run, "applicable", lambda rivals, subject: list(rivals))
        result = content("models", run(Subject("model", "danet", 512, 1024, batch=2)))
        text = subject_tables.markdown(result)
        assert "| 512x1024 | segattn_ops | 2 |  | not run |  | 1024 | not run | 1e-07 |" in text
        assert "- 512x1024 eager, training step: not run, would not fit: needs 10.0 GiB" in text
        (line,) = page_subjects.summary(result)
        assert "inference 2 images a second in 1 GiB (eager 0.667 in 3 GiB)" in line

    @pytest.mark.parametrize(("kind", "heading"), [("modules", "Modules"), ("models", "Networks")])
    def test_the_page(self, kind, heading, fake_cells, tmp_path, monkeypatch):
        monkeypatch.setattr(network_run, "applicable", lambda rivals, subject: list(rivals))
        cost = Cost(10**9, 2**20)
        monkeypatch.setattr(subjects, "predicted", lambda subject, rival: dict.fromkeys(PASSES, cost))
        known = {"modules": ("module", "pam"), "models": ("model", "danet")}[kind]
        result = content(kind, run(Subject(*known, 16, 24)))
        text = page.render([(tmp_path / f"{kind}.json", result)])
        assert f"<h2>{heading}</h2>" in text
        command = f"python -m benchmarks {kind} --{kind} {known[1]} --sizes 16x24 --dtypes float32 --rivals fused,eager"
        assert f"<pre>{command} --threads 2 --budget 0</pre>" in text


class TestCommand:
    def test_dry_run(self, capsys):
        assert main(["modules", "--dry-run", "--modules", "pam,cam", "--sizes", "97x97", "--rivals", "eager"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + 4
        assert lines[2].startswith("| pam 97x97 float32 | eager | forward | 108.2 |")

    def test_a_run_is_written_and_resumed(self, fake_cells, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(subject_command, "start_server", lambda: None)
        monkeypatch.setattr(measure, "pin", lambda threads: None)
        arguments = ["modules", "--backend", "reference", "--modules", "pam,cam", "--sizes", "5x6", "--rounds", "2"]
        arguments += ["--rivals", "fused,eager", "--output", str(tmp_path)]
        assert main(arguments) == 0
        path = tmp_path / "modules.json"
        written = json.loads(path.read_text())
        assert written["kind"] == "modules" and len(written["cells"]) == 4
        assert all((tmp_path / name).exists() for name in ("modules.md", "modules.html"))
        report.write_json(written | {"cells": written["cells"][:2], "finished": False}, path)
        fake_cells.log.clear()
        assert main([*arguments, "--resume"]) == 0
        assert len(json.loads(path.read_text())["cells"]) == 4
        assert sum(name == "check" for _, name, *_ in fake_cells.log) == 2
        assert main([*arguments, "--resume"]) == 2
        assert "is complete" in capsys.readouterr().err

    def test_every_model_and_module_has_a_title(self):
        titles = [kind.title for kind in (*MODULES.values(), *MODELS.values())]
        assert len(set(titles)) == len(titles)

    def test_single_passes_have_no_verdict(self, fake_cells):
        records = run(small("pam"), rounds=None, budget=20.0)
        assert records[1]["rounds"] < 3 and records[1]["ratio"]["forward"]["verdict"] == "unclear"
        one = {"forward": {"median": 3.0, "low": None, "high": None, "verdict": "unclear"}}
        assert "unclear: one pass" in subject_tables.rows("module", [records[0], records[1] | {"ratio": one}])[1][4]
