"""What of the GPU suite needs no GPU: the list of work, resuming, verdicts, tables; cells, on the CPU in its place."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_cells, gpu_driver, gpu_suite, report, rivals, run, validate
from benchmarks.workloads import OPS, Workload
from segattn_ops import use_backend

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def small(op: str, batch: int = 1, dtype: str = "float32") -> Workload:
    return Workload(op, 5, 7, dtype, batch, channels=16, key_channels=4)


@pytest.fixture
def state(tmp_path):
    return gpu_suite.State(tmp_path / "gpu" / "gpu.json")


@pytest.fixture
def short(monkeypatch):
    """Small workloads, two rivals, a few repeats."""
    monkeypatch.setattr(gpu_suite, "workloads_of", lambda family: [small(op, 3) for op in gpu_driver.FAMILIES[family]])
    monkeypatch.setattr(gpu_suite, "RIVALS", ("eager", "fused", "sdpa_cudnn"))
    monkeypatch.setattr(gpu_cells, "SECONDS", 0.0)
    with use_backend("reference"):
        yield


@without_gpu
def test_without_a_gpu_it_says_so_and_exits_cleanly(tmp_path, capsys):
    assert gpu_suite.main(["--output", str(tmp_path / "gpu.json")]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_dry_run_lists_the_work_of_every_piece(tmp_path, capsys):
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path / "gpu.json")]) == 0
    printed = capsys.readouterr().out
    for piece in gpu_suite.PIECES:
        assert f"{piece}:" in printed
    for expected in (
        "position 128x256 B=8 float16",
        "criss_cross 97x97 B=32 bfloat16",
        "rcca 97x97",
        "tests/test_ops.py",
    ):
        assert expected in printed
    assert "sdpa_efficient" in printed
    assert "flex" in printed


def test_every_op_belongs_to_one_family():
    assert sorted(op for ops in gpu_driver.FAMILIES.values() for op in ops) == sorted(OPS)


class TestResuming:
    def test_cells_and_steps_survive_in_the_file(self, state):
        workload = small("channel")
        state.set_cell(run.record(workload, "fused", "measured"))
        state.set_cell(run.record(workload, "eager", "wrong"))
        state.set_step("build", "sm_90", "passed", seconds=1.0)
        state.set_step("tests", "a", "failed")
        again = gpu_suite.State(state.path)
        assert again.cell(workload, "fused")["status"] == "measured"
        assert again.cell(workload, "eager") is None  # a wrong result is tried again
        assert again.cell(small("channel", dtype="bfloat16"), "fused") is None
        assert again.step("build", "sm_90")["seconds"] == 1.0
        assert again.step("tests", "a") is None
        assert gpu_suite.State(state.path, again=True).cell(workload, "fused") is None

    def test_other_sources_are_measured_again(self, state, monkeypatch):
        state.set_cell(run.record(small("channel"), "fused", "measured"))
        state.set_step("build", "sm_90", "passed")
        monkeypatch.setattr(gpu_suite, "fingerprint", lambda: "another")
        changed = gpu_suite.State(state.path)
        assert changed.cell(small("channel"), "fused") is None
        assert changed.step("build", "sm_90") is None

    def test_another_schema_is_refused(self, state):
        state.save()
        state.path.write_text(json.dumps({"schema": 99}))
        with pytest.raises(ValueError, match="schema 99"):
            gpu_suite.State(state.path)

    def test_the_fingerprint_follows_the_sources(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
        (tmp_path / "csrc").mkdir()
        for name in ("setup.py", "csrc/kernel.cuh"):
            (tmp_path / name).write_text("1")
        first = gpu_suite.fingerprint()
        assert gpu_suite.fingerprint() == first
        (tmp_path / "csrc/kernel.cuh").write_text("2")
        assert gpu_suite.fingerprint() != first


class TestSteps:
    def step(self, state, code, clock=None):
        command = [sys.executable, "-c", code]
        return gpu_suite._step(state, "tests", "step", command, clock or gpu_suite.Clock(100))

    def test_passed_steps_are_not_run_again(self, state):
        assert self.step(state, "print('fine')") is True
        assert state.pieces["tests"]["step"]["output"] == ["fine"]
        assert self.step(state, "raise SystemExit(5)") is True

    def test_failures_keep_their_output_and_are_run_again(self, state):
        assert self.step(state, "print('why'); raise SystemExit(3)") is False
        stored = gpu_suite.State(state.path).pieces["tests"]["step"]
        assert (stored["status"], stored["exit_status"], stored["output"]) == ("failed", 3, ["why"])
        assert self.step(state, "pass") is True

    def test_the_time_limit_stops_and_is_not_a_failure(self, state, monkeypatch):
        assert self.step(state, "pass", gpu_suite.Clock(10)) is None  # not worth starting
        assert "step" not in state.pieces.get("tests", {})
        monkeypatch.setattr(gpu_suite.Clock, "left", property(lambda self: 21 if not state.pieces else 0))
        run_ = gpu_suite._run
        monkeypatch.setattr(gpu_suite, "_run", lambda command, seconds, environment=None: run_(command, 1, environment))
        assert self.step(state, "import time; print('begun', flush=True); time.sleep(30)") is None
        assert state.pieces["tests"]["step"]["status"] == "stopped"

    def test_the_build_names_the_device(self, state, monkeypatch):
        seen = {}

        def remember(command, seconds, environment=None):
            seen.update(environment)
            return 0, "built", 1.0

        monkeypatch.setattr(gpu_suite, "_run", remember)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        assert gpu_suite.build(state, gpu_suite.Clock(100), CPU) is True
        assert seen["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert state.step("build", "sm_90")

    def test_sanitizers_look_at_our_kernels_only(self, state, monkeypatch):
        commands = []

        def remember(command, seconds, environment=None):
            commands.append(command)
            return 0, "options: --kernel-name" if "--help" in command else "ERROR SUMMARY: 0 errors", 1.0

        monkeypatch.setattr(gpu_suite, "_run", remember)
        monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/bin/{name}")
        assert gpu_suite.sanitize(state, gpu_suite.Clock(100), CPU) is True
        tools = {command[command.index("--tool") + 1] for command in commands if "--tool" in command}
        assert tools == set(gpu_suite.SANITIZERS)
        assert all("kns=segattn" in command for command in commands if "--tool" in command)
        assert len(commands) == 1 + 3 * 3 * 4

    def test_missing_tools_are_failures(self, state, monkeypatch):
        monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
        assert gpu_suite.sanitize(state, gpu_suite.Clock(100), CPU) is False
        assert gpu_suite.profile(state, gpu_suite.Clock(100), CPU) is False

    def test_a_module_without_gpu_tests_is_fine(self, state, monkeypatch):
        monkeypatch.setattr(gpu_suite, "test_files", lambda: ["tests/test_a.py"])
        monkeypatch.setattr(gpu_suite, "_run", lambda *_: (5, "no tests ran", 1.0))
        assert gpu_suite.tests(state, gpu_suite.Clock(100), CPU) is True
        monkeypatch.setattr(gpu_suite, "test_files", lambda: ["tests/test_b.py"])
        monkeypatch.setattr(gpu_suite, "_run", lambda *_: (1, "1 failed", 1.0))
        assert gpu_suite.tests(state, gpu_suite.Clock(100), CPU) is False

    @pytest.mark.parametrize("verdicts, whole", [([True, True], True), ([True, None], None), ([None, False], False)])
    def test_verdicts(self, verdicts, whole):
        assert gpu_suite._all(verdicts) is whole


class TestBench:
    @pytest.mark.parametrize("family", gpu_driver.FAMILIES)
    def test_cells_are_recorded_once(self, family, state, short, monkeypatch):
        assert gpu_suite.bench(family, state, gpu_suite.Clock(1000), CPU) is True
        for entry in state.cells.values():
            if entry["rival"] == "sdpa_cudnn":  # not on a CPU: a line, not a crash
                assert entry["status"] == "failed"
                assert "RuntimeError" in entry["reason"]
            else:
                assert entry["status"] == "measured"
                for kind in ("forward", "backward", "forward_backward"):
                    assert entry[kind]["median"] > 0
                assert validate.worst(entry["errors"]) < 1e-4
        monkeypatch.setattr(gpu_cells, "cell_record", lambda *_: pytest.fail("measured again"))
        assert gpu_suite.bench(family, state, gpu_suite.Clock(1000), CPU) is True

    def test_no_time_left_means_more_to_do(self, state, short):
        assert gpu_suite.bench("channel", state, gpu_suite.Clock(30), CPU) is None
        assert not state.cells

    def test_a_wrong_fused_result_is_a_failure(self, state, short, monkeypatch):
        right = rivals.fused_channel
        monkeypatch.setitem(rivals._FORMULATIONS["fused"], "channel", lambda x: 1.001 * right(x))
        assert gpu_suite.bench("channel", state, gpu_suite.Clock(1000), CPU) is False
        (entry,) = [entry for entry in state.cells.values() if entry["rival"] == "fused"]
        assert entry["status"] == "wrong"
        assert "output of segattn_ops is wrong" in entry["reason"]

    def test_what_would_not_fit_is_not_started(self, state, short, monkeypatch):
        monkeypatch.setattr(gpu_suite.measure, "available_bytes", lambda device: 1000)
        monkeypatch.setattr(gpu_cells, "DeviceCell", lambda *_: pytest.fail("started"))
        assert gpu_suite.bench("channel", state, gpu_suite.Clock(1000), CPU) is True
        assert all(entry["reason"].startswith("would not fit") for entry in state.cells.values())

    def test_the_last_sample_of_a_batch_is_checked(self):
        with use_backend("reference"):
            cell = gpu_cells.DeviceCell(small("position", batch=4), CPU)
            leaves = tuple(cell.leaves.values())
            output = rivals.formulation("fused", "position")(*leaves)
            gradients = torch.autograd.grad(output, leaves, cell.grad_output)
        assert validate.worst(cell.errors(output, gradients)) < 1e-5
        broken = output.detach().clone()
        broken[3] *= 1.01
        assert cell.errors(broken, gradients)["output"] > 1e-3

    def test_the_whole_command(self, tmp_path, short, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        path = tmp_path / "gpu.json"
        arguments = ["--device", "cpu", "--piece", "bench-channel", "--output", str(path)]
        assert gpu_suite.main(arguments) == 0
        stored = json.loads(path.read_text())
        assert stored["commands"] == ["python -m benchmarks.gpu_suite " + " ".join(arguments)]
        assert {entry["status"] for entry in stored["cells"]} == {"measured"}
        assert "| channel | 5x7 | 3 | float32 | segattn_ops |" in path.with_suffix(".md").read_text()
        assert gpu_suite.main([*arguments, "--limit", "0"]) == 0  # nothing is left to do
        assert gpu_suite.main([*arguments, "--limit", "0", "--again"]) == gpu_suite.MORE_TO_DO


class TestTable:
    def entry(self, rival, forward, backward, **changes):
        def timing(seconds):
            return {"median": seconds, "spread": 0.0, "seconds": [seconds]}

        return run.record(Workload("position", 97, 97, "bfloat16", 8), rival, "measured") | {
            "forward": timing(forward),
            "backward": timing(backward),
            "forward_backward": timing(forward + backward),
            "memory": {"forward_backward": 3 * 2**20},
            "errors": {"output": 1e-3, "grad_query": 2e-3, "energy": 0.0},
            **changes,
        }

    def test_figures(self):
        rows = gpu_suite.table([self.entry("eager", 0.004, 0.008), self.entry("fused", 0.002, 0.004)])
        ours = dict(zip(gpu_suite.COLUMNS[:7], rows[0][:7], strict=True))
        assert ours[""] == "segattn_ops"
        assert float(ours["TFLOP/s"]) == pytest.approx(8 * 101.99e9 / 0.002 / 1e12, rel=1e-3)
        assert rows[0][7] == f"{2 * 8 * 9409 * (64 + 64 + 512 + 512) / 0.002 / 1e9:.0f}"
        assert float(rows[0][10]) == pytest.approx(2 * 8 * 101.99e9 / 0.004 / 1e12, rel=1e-3)
        assert rows[1][11] == "2.00"
        assert rows[0][12:] == ["3.0", "2e-03"]

    def test_what_did_not_run_says_why(self):
        entry = run.record(Workload("position", 128, 256), "eager", "skipped", "would not fit: needs 17 GiB")
        (row,) = gpu_suite.table([entry])
        assert row[5] == "skipped: would not fit: needs 17 GiB"
        assert len(row) == len(gpu_suite.COLUMNS)

    @pytest.mark.parametrize("op", OPS)
    def test_least_bytes_are_the_operands(self, op):
        workload = Workload(op, 6, 5, "float16", 2, 24, 4)
        assert gpu_suite.least_bytes(run.record(workload, "fused", "measured")) == workload.operand_bytes()

    def test_everything_is_in_the_markdown(self, state):
        state.machine = report.machine("cpu", 1) | {"gpu": "a GPU", "cuda": "13.0"}
        state.pieces["sdpa"] = {"position bfloat16": {"default": "MATH", "FLASH_ATTENTION": "refused: head_dim"}}
        state.set_step("ceilings", "device", "passed", copy_bytes_per_second=4.1e12)
        state.set_cell(self.entry("fused", 0.002, 0.004))
        text = gpu_suite.write_table(state).read_text()
        for expected in ("a GPU", "| copy_bytes_per_second | 4.10 |", "refused: head_dim", "| position | 97x97 | 8 |"):
            assert expected in text


@pytest.mark.parametrize("family", gpu_driver.FAMILIES)
def test_the_driver_checks_every_op_of_a_family(family, capsys):
    if not _native(family):
        pytest.skip("no native CPU kernels of this family in this build")
    assert gpu_driver.main(["--op", family, "--device", "cpu", "--dtypes", "float32,bfloat16", "--size", "5x7"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 * len(gpu_driver.FAMILIES[family])
    assert all(line.endswith(": right") for line in lines)


def _native(family: str) -> bool:
    name = {"position": "position_attention", "criss-cross": "criss_cross_attention", "channel": "channel_attention"}
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"segattn::{name[family]}", "CPU")
