"""The benchmarks: formulas against counts, memory against known allocations, skipped cells, reports."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import drawing, features, measure, ops, plots, report, rivals, run, schedule, validate, workloads
from benchmarks.cell import CellSpec, save_inputs
from benchmarks.processes import CellFailed, CellProcess
from benchmarks.workloads import Workload
from examples import draw_attention
from segattn_ops import reference, use_backend
from segattn_ops.ops import position

MIB = 2**20


def small(op: str, height: int = 9, width: int = 11, **changes) -> Workload:
    return Workload(op, height, width, **{"channels": 16, "key_channels": 4, "dtype": "float64"} | changes)


def operands(workload: Workload, gain: float = 1.0) -> tuple[dict, torch.Tensor]:
    x = torch.randn(workload.batch, workload.channels, workload.height, workload.width).relu()
    leaves = {name: (gain * leaf).requires_grad_() for name, leaf in features.operands(workload, x).items()}
    return leaves, features.grad_output(workload)


def results(workload: Workload, leaves: dict, grad_output: torch.Tensor, rival: str = "eager"):
    with use_backend("reference"):
        output = rivals.formulation(rival, workload.op)(*leaves.values())
        return output, torch.autograd.grad(output, list(leaves.values()), grad_output)


class TestFormulas:
    @pytest.mark.parametrize("op", workloads.OPS)
    def test_flops_match_the_counter(self, op):
        workload = small(op, batch=2)
        leaves, grad_output = operands(workload)
        function = rivals.formulation("eager", op)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            function(*leaves.values())
        with FlopCounterMode(display=False) as both:
            torch.autograd.grad(function(*leaves.values()), list(leaves.values()), grad_output)
        counted = forward.get_total_flops(), both.get_total_flops()
        expected = workloads.flops(workload)
        if op in ("criss_cross", "rcca"):  # eager has each position twice among its H + W keys, one of them masked
            n, side = workload.positions, workload.height + workload.width
            attention = 2 * 2 * n * (side - 1) * 20 * (2 if op == "rcca" else 1)  # batch 2, E + C = 20
            expected = [f + k * (attention * side // (side - 1) - attention) for f, k in zip(expected, (1, 3))]  # noqa: B905
        assert list(counted) == list(expected)

    def test_figures_at_97x97(self):
        forward, both = workloads.flops(Workload("position", 97, 97))
        assert forward / 1e9 == pytest.approx(101.99, abs=0.01)
        assert (workloads.recomputing_flops(Workload("position", 97, 97)) - forward) / 1e9 == pytest.approx(
            215, abs=0.5
        )
        assert workloads.flops(Workload("channel", 97, 97))[0] / 1e9 == pytest.approx(9.87, abs=0.01)
        assert workloads.flops(Workload("criss_cross", 97, 97))[0] / 1e9 == pytest.approx(2.09, abs=0.01)
        assert workloads.attention_map_bytes(Workload("position", 97, 97)) / MIB == pytest.approx(338, abs=0.5)
        assert workloads.attention_map_bytes(Workload("position", 128, 256)) == 4 * 2**30

    def test_recomputing_flops_match_the_operators(self):
        workload = Workload("position", 97, 97)
        shapes = [torch.Size(shape) for shape in workload.leaves().values()]
        declared = position._flops(*shapes) + position._flops_backward(None, *shapes, None, None)
        assert workloads.recomputing_flops(workload) == declared

    @pytest.mark.parametrize("text", ["97", "97x", "x97", "0x4", "axb", "-1x3", "4x4x4"])
    def test_bad_sizes(self, text):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            workloads.parse_size(text)

    @pytest.mark.parametrize("changes", [{"op": "conv"}, {"dtype": "int8"}, {"height": 0}, {"batch": 0}])
    def test_bad_workloads(self, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            dataclasses.replace(Workload("position", 4, 4), **changes)


class TestRivals:
    @pytest.mark.parametrize("rival", ["eager", "sdpa", "sdpa_flash_split", "fused"])
    @pytest.mark.parametrize("op", workloads.OPS)
    def test_every_formulation_is_the_same_attention(self, op, rival):
        if op not in rivals.APPLICABLE[rival]:
            with pytest.raises(ValueError, match="no formulation"):
                rivals.formulation(rival, op)
            return
        workload = small(op, batch=2)
        leaves, grad_output = operands(workload)
        output, gradients = results(workload, leaves, grad_output, rival)
        inputs = list(leaves.values())
        if op == "channel":
            expected = reference.channel_attention(*inputs * 3, -1.0)[0]
        elif op == "criss_cross":
            expected = reference.criss_cross_attention(*inputs, 1.0)[0]
        elif op == "rcca":
            expected = rivals.recurrent_block(lambda q, k, v: reference.criss_cross_attention(q, k, v, 1.0)[0], *inputs)
        else:
            expected = reference.position_attention(*inputs, 1.0)[0]
        torch.testing.assert_close(output, expected)
        for got, exact in zip(gradients, torch.autograd.grad(expected, inputs, grad_output), strict=True):
            torch.testing.assert_close(got, exact)

    @pytest.mark.slow
    @pytest.mark.parametrize("op", ["position", "channel", "criss_cross"])
    def test_compiled_is_eager(self, op):
        workload = small(op, dtype="float32")
        leaves, grad_output = operands(workload)
        got, exact = (results(workload, leaves, grad_output, rival) for rival in ("compile", "eager"))
        torch.testing.assert_close(got, exact)

    def test_bad_names(self):
        with pytest.raises(ValueError, match="rival must be one of"):
            rivals.formulation("cudnn", "position")


class TestValidation:
    @pytest.mark.parametrize("op", workloads.OPS)
    def test_correct_results_have_no_error(self, op):
        workload = small(op, height=13)  # 143 positions: position attention is sampled
        leaves, grad_output = operands(workload, gain=2.0)
        expected = validate.expected(workload, leaves, grad_output)
        found = validate.errors(workload, leaves, grad_output, expected, *results(workload, leaves, grad_output))
        assert validate.worst(found) < 1e-12
        validate.check(workload, "eager", found, None)

    @pytest.mark.parametrize("op", workloads.OPS)
    @pytest.mark.parametrize("fault", ["scaled", "one position", "nan", "zero", "swapped"])
    def test_every_wrong_result_is_found(self, op, fault):
        workload = small(op, height=5, width=7)  # fewer positions than samples: all are checked
        leaves, grad_output = operands(workload, gain=2.0)
        expected = validate.expected(workload, leaves, grad_output)
        output, gradients = results(workload, leaves, grad_output)
        right = validate.errors(workload, leaves, grad_output, expected, output, gradients)
        names = ["output", *(name for name in leaves if not name.endswith("_bias"))]
        for name in names:
            tensors = dict(zip(["output", *leaves], [output.detach(), *gradients], strict=True))
            broken = tensors[name].clone(memory_format=torch.contiguous_format)
            if fault == "scaled":
                broken *= 1 + 1e-4
            elif fault == "one position":
                broken.view(-1)[broken.numel() // 2] += 0.01 * broken.norm()
            elif fault == "nan":
                broken.view(-1)[-1] = math.nan
            elif fault == "zero":
                broken.zero_()
            else:
                broken = broken.flip(-1) if broken.shape[-1] > 1 else broken.flip(0) if len(broken) > 1 else -broken
            tensors[name] = broken
            wrong_output, *wrong_gradients = tensors.values()
            found = validate.errors(workload, leaves, grad_output, expected, wrong_output, tuple(wrong_gradients))
            for eager in (right, None):
                with pytest.raises(validate.WrongResult, match="is wrong"):
                    validate.check(workload, "fused", found, eager)

    def test_a_wrong_shape_is_named(self):
        workload = small("position")
        leaves, grad_output = operands(workload)
        expected = validate.expected(workload, leaves, grad_output)
        output, gradients = results(workload, leaves, grad_output)
        with pytest.raises(validate.WrongResult, match="output has shape"):
            validate.errors(workload, leaves, grad_output, expected, output[..., :-1], gradients)

    def test_errors_are_compared_with_eager(self):
        workload = small("position", dtype="float32")
        found = {"output": 1e-4, "energy": 0.0}
        validate.check(workload, "fused", found, {"output": 6e-5})
        with pytest.raises(validate.WrongResult):
            validate.check(workload, "fused", found, {"output": 4e-5})
        with pytest.raises(validate.WrongResult):  # a NaN of eager does not raise the limit
            validate.check(workload, "fused", {"output": 2e-4, "energy": 0.0}, {"output": math.inf})


REUSED = """
import resource, torch
from benchmarks import measure
measure.return_freed_memory_at_once()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**22)  # 4096 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
returned = faults()
measure.keep_freed_memory()
faults()
print(returned, faults())
"""


def test_timed_calls_have_no_page_faults():
    done = subprocess.run([sys.executable, "-c", REUSED], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 8 or returned < 64  # (not glibc, or huge pages)


KNOWN_ALLOCATION = """
import torch
from benchmarks import measure
measure.return_freed_memory_at_once()
torch.zeros(2**20).sum()
measure.populate_code()
meter = measure.HostMemory()
temporary = torch.ones(64 * 2**20 // 4)
del temporary
kept = torch.ones(16 * 2**20 // 4)
print(meter.peak())
"""


@pytest.mark.skipif(not measure.host_memory_is_measurable(), reason="needs Linux's /proc/self/clear_refs")
class TestMemory:
    def test_a_known_allocation(self):
        done = subprocess.run([sys.executable, "-c", KNOWN_ALLOCATION], capture_output=True, text=True, check=True)
        assert int(done.stdout) / MIB == pytest.approx(64, abs=1.5)

    @pytest.mark.parametrize("rival", ["eager", "sdpa", pytest.param("compile", marks=pytest.mark.slow)])
    def test_needed_bytes_match_the_measurement(self, rival, tmp_path):
        """The formula against a measured process, within 25%. (torch.compile keeps two or three attention maps,
        depending on the size; the formula assumes three, as at 97 x 97.)"""
        workload = Workload("position", 57, 71, channels=64, key_channels=32)
        path = str(tmp_path / "inputs.pt")
        save_inputs(path, workload, *operands(workload))
        cell = CellProcess(CellSpec(workload, rival, path))
        try:
            cell.call("warm_up")
            extra = cell.call("first_pass")["memory"]["forward_backward"]
        finally:
            cell.close()
        predicted = workloads.peak_bytes(workload, rival) - workload.operand_bytes() - workload.result_bytes()
        assert (0.5 if rival == "compile" else 0.8) * predicted < extra < 1.25 * predicted

    def test_available_memory_is_plausible(self):
        assert 2**27 < measure.available_bytes() <= report._total_memory()


class TestCells:
    @pytest.fixture
    def spec(self, tmp_path):
        workload = small("position", dtype="float32")
        path = str(tmp_path / "inputs.pt")
        save_inputs(path, workload, *operands(workload))
        return CellSpec(workload, "fused", path, threads=1, backend="reference")

    def test_a_cell_measures_and_checks(self, spec):
        cell = CellProcess(spec)
        assert cell.call("warm_up") > 0
        first = cell.call("first_pass")
        assert first["forward_backward"] > first["forward"] > 0
        assert validate.worst(first["errors"]) < 1e-4
        for kind in ("forward", "forward_backward"):
            assert 0 < cell.call("timed_pass", kind) < 10
        cell.close()

    def test_an_error_keeps_its_message(self, spec):
        with pytest.raises(CellFailed, match="FileNotFoundError"):
            CellProcess(dataclasses.replace(spec, inputs=spec.inputs + ".missing"))

    def test_a_cell_that_dies_is_reported(self, spec):
        cell = CellProcess(spec)
        cell._process.kill()
        cell._process.join()
        with pytest.raises(CellFailed, match="killed"):
            cell.call("first_pass")
        cell.close()

    def test_a_cell_that_hangs_is_stopped(self, spec):
        cell = CellProcess(spec)
        with pytest.raises(CellFailed, match="took more than 0 s"):
            cell.call("timed_pass", "forward", timeout=0)
        cell.close()
        assert not cell._process.is_alive()


class TestSchedule:
    def test_an_attention_map_beyond_the_memory_is_skipped(self):
        plan = schedule.Schedule(None)
        workload = Workload("position", 128, 256)
        reason = plan.verdict(workload, "eager", 8 * 2**30, [])
        assert reason.startswith("would not fit: needs 16.")
        assert plan.verdict(workload, "eager", 64 * 2**30, []) is None
        assert plan.verdict(workload, "fused", 2 * 2**30, []) is None

    def test_time_is_reserved_for_the_fused_op_at_later_sizes(self):
        plan = schedule.Schedule(100.0)
        now, later = Workload("position", 32, 32), Workload("position", 128, 256)
        plan.learn(now, "eager", workloads.flops(now)[1] / 100e9)
        plan.learn(now, "fused", workloads.flops(now)[1] / 200e9)
        assert plan.predict(now, "eager") == pytest.approx(workloads.flops(now)[1] / 100e9)
        assert plan.verdict(now, "eager", 2**40, [later]) is None
        assert plan.verdict(later, "fused", 2**40, []) is None
        assert plan.verdict(later, "eager", 2**40, []) is None  # 37 s of 100
        assert "over the time budget" in plan.verdict(later, "eager", 2**40, [later] * 4)
        assert schedule.Schedule(None).verdict(later, "eager", 2**40, [later] * 4) is None

    def test_short_workloads_repeat_more(self):
        plan = schedule.Schedule(None)
        small = Workload("position", 32, 32)
        rounds = [plan.rounds(small, seconds, []) for seconds in (0.001, 1.0, 10.0, 100.0)]
        assert rounds == [schedule.ROUNDS[1], 5, 3, 0]
        assert schedule.Schedule(25.0).rounds(small, 10.0, []) == 1  # no time for more
        assert schedule.Schedule(100.0).rounds(small, 0.1, [Workload("position", 256, 256)]) == 9  # cheap: always
        assert schedule.Schedule(5.0).rounds(small, 10.0, []) == 0

    def test_the_papers_size_is_repeated_whatever_the_budget(self):
        """At 97 x 97 eager and SDPA run and are repeated; time for them is kept back at smaller sizes."""
        plan = schedule.Schedule(100.0, rivals=("fused", "eager", "sdpa", "compile"))
        small, focus = Workload("position", 64, 64), Workload("position", 97, 97)
        for name in plan.rivals:
            plan.learn(focus, name, 3.0)
        assert plan.least(focus) == pytest.approx(sum(plan.cost(focus, name) for name in ("fused", "eager", "sdpa")))
        assert plan.spare([focus]) == pytest.approx(100 - plan.least(focus), abs=1)
        assert plan.least(focus) > 3 * 3 * 4
        plan.started -= 90
        assert "over the time budget" in plan.verdict(small, "eager", 2**40, [focus] * 2)
        assert plan.verdict(focus, "eager", 2**40, []) is None
        assert "over the time budget" in plan.verdict(focus, "compile", 2**40, [])
        assert plan.rounds(focus, 30.0, []) == schedule.ROUNDS[0]
        assert plan.verdict(focus, "eager", 2**20, []).startswith("would not fit")

    def test_a_forward_alone_takes_a_third(self):
        plan = schedule.Schedule(None)
        workload = Workload("position", 64, 64)
        plan.learn(workload, "onnxruntime", 1.0)
        assert plan.predict(workload, "onnxruntime") == pytest.approx(1.0)
        assert plan.predict(workload, "sdpa") == pytest.approx(3 * plan.predict(workload, "onnx_attention"))
        assert plan.left([(workload, "onnxruntime")]) == plan.cost(workload, "onnxruntime")
        assert plan.cost(workload, "xformers") == 0.0  # is not available on a CPU


class FakeCell:
    """A stand-in for a process that answers at once and records the calls."""

    log: list = []
    error = 1e-7

    def __init__(self, spec, timeout=0.0):
        self.spec = spec

    def call(self, name, *arguments, timeout=0.0):
        self.log.append((self.spec.rival, name, *arguments))
        if name == "warm_up":
            return 0.1
        if name == "timed_pass":
            return {"forward": 0.5, "forward_backward": 1.5}[arguments[0]]
        error = self.error if self.spec.rival == "fused" else 1e-7
        memory = {"forward": MIB, "forward_backward": 2 * MIB}
        errors = {"output": error, "energy": 0.0}
        return {"errors": errors, "memory": memory, "forward": 0.5, "forward_backward": 1.5}

    def close(self):
        self.log.append((self.spec.rival, "close"))


@pytest.fixture
def fake_cells(monkeypatch):
    monkeypatch.setattr(run, "CellProcess", FakeCell)
    monkeypatch.setattr(FakeCell, "log", [])
    monkeypatch.setattr(FakeCell, "error", 1e-7)
    return FakeCell


SOURCE = SimpleNamespace(leaves=lambda workload: operands(workload)[0])


class TestRunner:
    def run(self, *workloads_, **options):
        options = run.Options(("fused", "eager", "sdpa"), **options)
        groups = run.Runner(options, schedule.Schedule(None)).run(workloads_, SOURCE)
        return [entry for group in groups for entry in group]

    def test_rivals_are_interleaved_round_by_round(self, fake_cells):
        records = self.run(small("position", dtype="float32"), repeats=2)
        timed = [(rival, kind[0]) for rival, name, *kind in fake_cells.log if name == "timed_pass"]
        one_round = [(r, k) for r in ("eager", "fused", "sdpa") for k in ("forward", "forward_backward")]
        assert timed == one_round * 3  # the first round is discarded
        assert [entry["rival"] for entry in records] == ["fused", "eager", "sdpa"]
        assert records[0]["forward"] == {"times": [0.5, 0.5], "median": 0.5, "low": 0.5, "high": 0.5}
        assert records[0]["ratio"] == {}
        for entry in records[1:]:
            assert entry["ratio"]["forward"]["verdict"] == "level"
        assert sum(name == "close" for _, name, *_ in fake_cells.log) == 3

    def test_a_wrong_fused_result_stops_the_run(self, fake_cells, monkeypatch):
        monkeypatch.setattr(fake_cells, "error", 1e-3)
        with pytest.raises(validate.WrongResult, match="output of segattn_ops is wrong"):
            self.run(small("position", dtype="float32"))
        assert not any(name == "timed_pass" for _, name, *_ in fake_cells.log)
        assert sum(name == "close" for _, name, *_ in fake_cells.log) == 2

    def test_a_cell_that_would_not_fit_is_reported(self, fake_cells, monkeypatch):
        monkeypatch.setattr(measure, "available_bytes", lambda device: 2**20)
        records = self.run(small("position", 32, 32, dtype="float32"), repeats=1)
        reasons = {entry["rival"]: entry["reason"] for entry in records}
        assert reasons["fused"] is None
        assert reasons["eager"].startswith("would not fit")
        assert reasons["sdpa"].startswith("would not fit")
        assert {rival for rival, *_ in fake_cells.log} == {"fused"}

    def test_a_failing_rival_is_reported(self, monkeypatch, fake_cells):
        def call(self, name, *arguments, timeout=0.0):
            if self.spec.rival == "sdpa" and name == "first_pass":
                raise CellFailed("the cell's process was killed")
            return original(self, name, *arguments)

        original = FakeCell.call
        monkeypatch.setattr(FakeCell, "call", call)
        records = self.run(small("position", dtype="float32"), repeats=1)
        assert [entry["status"] for entry in records] == ["measured", "measured", "failed"]
        assert report.rows(records)[-1][:4] == ["9x11", "99", "SDPA", "failed"]
        assert any("sdpa" in line.lower() and "killed" in line for line in report.remarks(records))


@pytest.mark.parametrize("ends", [(100, 107), (11, 95), (12, 150), (88, 300), (0.02, 5), (3, 40000)])
def test_every_time_axis_has_numbers_to_read(ends, tmp_path, monkeypatch):
    """Ranges of less than a decade, and of several."""
    cells = [
        {"op": "position", "dtype": "float32", "rival": rival, "status": "measured", "positions": 64, "height": 8}
        | {"width": 8, "batch": 1, **dict.fromkeys(("forward", "forward_backward"), {"median": milliseconds / 1e3})}
        for rival, milliseconds in zip(("fused", "eager"), ends, strict=True)
    ]
    figures = []
    monkeypatch.setattr(drawing, "finish", lambda figure, *_: figures.append(figure))
    plots.draw_time(cells, tmp_path / "time.png")
    (figure,) = figures
    figure.canvas.draw()
    for ax in figure.axes:
        low, high = ax.get_ylim()
        ticks = [tick for which in (True, False) for tick in ax.yaxis.get_ticklabels(minor=which)]
        read = [float(tick.get_text()) for tick in ticks if tick.get_text() and low <= tick.get_position()[1] <= high]
        assert 2 <= len(read) <= 12, read


@pytest.mark.slow
def test_main_job_writes_a_report(tmp_path, capsys):
    folder = tmp_path / "report"
    status = ops.main(
        ["--sizes", "8x8,9x12", "--channels", "16", "--rivals", "fused,eager,sdpa", "--backend", "reference"]
        + ["--repeats", "1", "--threads", "1", "--output", str(folder)]
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    result = json.loads((folder / "report.json").read_text())
    measured = [cell for cell in result["cells"] if cell["status"] == "measured"]
    assert len(result["cells"]) == len(measured) == 2 * (5 * 2 + 2)
    for cell in measured:
        assert cell["forward_backward"]["median"] > cell["forward"]["median"] > 0
        assert validate.worst(cell["errors"]) < 1e-4
    assert result["machine"]["threads"] == 1
    assert result["command"].startswith("python -m benchmarks ops --sizes 8x8,9x12")
    assert "random weights" in result["features"]
    text = (folder / "report.md").read_text()
    assert "## Position attention (DANet), float32" in text
    assert "| 9x12 | 108 | SDPA |" in text
    assert "In short" in printed
    from matplotlib.image import imread

    for name in ("time.png", "memory.png", *draw_attention.NAMES):
        assert f"({name})" in text
        picture = imread(folder / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02
