"""The GPU suite's cells and processes, run on the CPU: measured, wrong, failed, crashed, and timed out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import measure, rivals, validate
from benchmarks.gpu import bench, cells, children, client, native, suite
from benchmarks.gpu.client import Refused, TooLong, Worker, WorkerLost
from benchmarks.gpu.selection import FAMILIES, Selection
from benchmarks.gpu.state import Clock, State
from benchmarks.gpu.worker import Server
from benchmarks.workloads import Workload
from segattn_ops import _backend, _selection

CPU = torch.device("cpu")

# PyTorch warns of the reasons for which a backend of its attention refuses a workload; sdpa_choice asks each.
REASONS = pytest.mark.filterwarnings("ignore:Flash attention:UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: the cells are tiny, and waiting threads are slow when test processes share a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A worker without torch, for the ways in which a worker ends.
FAKE = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    name = request["call"]
    if name == "die": print("a last word", file=sys.stderr); os.kill(os.getpid(), 11)
    if name == "sleep": time.sleep(60)
    answer = {"refuse": {"error": "ValueError: no"}, "lose": {"crashed": "illegal memory access"}}
    print(json.dumps(answer.get(name, {"result": os.getpid()})), flush=True)
    if name == "lose": sys.exit(1)
"""


def chosen(*families: str, **changes) -> Selection:
    small = {"sizes": ((5, 7),), "dtypes": ("float32",), "batches": (3,), "rivals": ("eager", "fused", "sdpa_cudnn")}
    return Selection(families, **(small | changes))


def small(op: str, batch: int = 1) -> Workload:
    return Workload(op, 5, 7, "float32", batch, channels=16, key_channels=4)


@pytest.fixture
def state(tmp_path):
    return State(tmp_path / "gpu.json")


@pytest.fixture
def inside(monkeypatch):
    """Serves the worker's requests in this process, through the same JSON, and records them."""
    asked = []

    class Inside(Worker):
        def ask(self, name, timeout, **arguments):
            asked.append((name, arguments))
            self.server = getattr(self, "server", None) or Server(CPU)
            return client.result_of(json.loads(json.dumps(self.server.answer(name, arguments), default=str)))

    monkeypatch.setattr(bench, "Worker", Inside)
    monkeypatch.setattr(cells, "SECONDS", 0.0)
    return asked


class TestChildren:
    def test_output_and_status(self):
        code = "import sys; print('said'); print('warned', file=sys.stderr); sys.exit(3)"
        first, second = children.run([[sys.executable, "-c", code], ["true"]], 30, {"A": "1"})
        assert (first.status, first.output.split()) == (3, ["said", "warned"])
        assert second.status == 0

    def test_a_signal_and_a_missing_program_are_failures(self):
        died, missing = children.run([["sh", "-c", "kill -11 $$"], ["no-such-program"]], 30)
        assert died.status == 128 + signal.SIGSEGV
        assert missing.status == 127

    def test_the_time_limit_ends_what_the_command_started(self, tmp_path, monkeypatch):
        """Including a grandchild that ignores the interrupt, as a profiled program may."""
        monkeypatch.setattr(children, "GRACE", 0.5)
        mark = tmp_path / "pid"
        code = f"trap '' INT; sh -c 'trap \"\" INT; echo $$ > {mark}; echo begun; sleep 60; sleep 60' & wait"
        (result,) = children.run([["sh", "-c", code]], 1.0)
        assert result.status == children.TIMED_OUT
        assert "begun" in result.output
        assert result.seconds < 1.0 + children.GRACE + 5
        assert _gone(int(mark.read_text()))

    def test_an_interrupt_lets_the_command_write_its_report(self):
        code = (
            "import time\ntry:\n  print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('report')"
        )
        (result,) = children.run([[sys.executable, "-c", code]], 2.0)
        assert (result.status, result.output.split()) == (children.TIMED_OUT, ["begun", "report"])

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
    def test_children_end_with_their_parent(self, tmp_path):
        """The parent is killed with SIGKILL, as at the time limit of a lent machine."""
        mark = tmp_path / "pid"
        code = (
            f"from benchmarks.gpu import children\nchildren.run([['sh', '-c', 'echo $$ > {mark}; sleep 60; true']], 60)"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=children.ROOT)
        try:
            _wait_for(lambda: mark.exists() and mark.read_text().strip())
        finally:
            parent.kill()
            parent.wait()
        assert _gone(int(mark.read_text()))


def _wait_for(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(met)


def _gone(pid: int) -> bool:
    """Whether a process ends, or is a zombie, as an orphan may be in a container."""

    def ended() -> bool:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except (ProcessLookupError, FileNotFoundError):
            return True

    return _wait_for(ended, 10.0)


class TestWorker:
    @pytest.fixture
    def worker(self):
        with Worker("cpu", [sys.executable, "-c", FAKE]) as found:
            yield found

    def test_one_process_serves_until_it_ends(self, worker):
        first = worker.ask("pid", 10)
        with pytest.raises(Refused, match="ValueError: no"):
            worker.ask("refuse", 10)
        assert worker.ask("pid", 10) == first
        with pytest.raises(WorkerLost, match="ended by signal 11: a last word"):
            worker.ask("die", 10)
        second = worker.ask("pid", 10)
        assert second != first
        with pytest.raises(WorkerLost, match="illegal memory access"):
            worker.ask("lose", 10)
        assert worker.ask("pid", 10) not in (first, second)

    def test_timeout_ends_the_process(self, worker):
        pid = worker.ask("pid", 10)
        with pytest.raises(TooLong):
            worker.ask("sleep", 0.3)
        assert _gone(pid)
        assert worker.ask("pid", 10) != pid


class TestServer:
    def test_a_device_that_does_not_respond_is_a_crash(self, monkeypatch):
        """An illegal access raises at the next synchronisation and at every later one."""
        server = Server(CPU)

        def lost():
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        monkeypatch.setattr(server, "synchronize", lost)
        answer = server.answer("require_native", {})
        assert answer == {"crashed": "RuntimeError: CUDA error: an illegal memory access was encountered"}
        monkeypatch.setattr(server, "ceilings", lambda: 1 / 0)
        assert "crashed" in server.answer("ceilings", {})

    def test_exceptions_are_answers(self, monkeypatch):
        server = Server(CPU)
        monkeypatch.setattr(server, "ceilings", lambda: 1 / 0)
        assert server.answer("ceilings", {}) == {"error": "ZeroDivisionError: division by zero"}

    def test_libraries_that_raise_are_reported_as_a_fault(self, monkeypatch):
        """The build still needs the machine's facts."""
        monkeypatch.setattr(native, "fault", lambda device: 1 / 0)
        facts = Server(CPU).answer("identify", {})["result"]
        assert facts["fault"] == "the libraries here cannot be used: ZeroDivisionError: division by zero"
        assert facts["machine"]["device"] == "cpu"

    def test_ceilings_on_a_cpu(self):
        found = Server(CPU).answer("ceilings", {})["result"]
        assert all(value > 0 for value in found.values())


class TestBench:
    @REASONS
    @pytest.mark.parametrize("family", FAMILIES)
    def test_cells_are_recorded_once(self, family, state, inside):
        work = chosen(family)
        assert bench.run(state, Clock(1000), work, "cpu") is True
        assert {entry["op"] for entry in state.cells.values()} == set(FAMILIES[family])
        for entry in state.cells.values():
            if entry["rival"] == "sdpa_cudnn":  # fails on a CPU
                assert entry["status"] == "failed"
                assert "RuntimeError" in entry["reason"]
                continue
            assert entry["status"] == "measured"
            for kind in ("forward", "backward", "forward_backward"):
                assert entry[kind]["median"] > 0
            assert validate.worst(entry["errors"]) < 1e-4
        inside.clear()
        assert bench.run(State(state.path), Clock(1000), work, "cpu") is True
        assert [name for name, _ in inside] == ["require_native"]

    def test_eager_errors_come_from_its_record(self, state, inside):
        work = chosen("channel", rivals=("eager", "fused"))
        assert bench.run(state, Clock(1000), work, "cpu") is True
        (eager,) = [entry for entry in state.cells.values() if entry["rival"] == "eager"]
        last = inside[-1][1]
        assert (last["rival"], last["run_eager"], last["eager_errors"]) == ("fused", False, eager["errors"])

    def test_without_an_eager_record_eager_runs(self, state, inside, monkeypatch):
        seen = []
        check = validate.check
        monkeypatch.setattr(validate, "check", lambda *arguments: seen.append(arguments[3]) or check(*arguments))
        assert bench.run(state, Clock(1000), chosen("channel", rivals=("fused",)), "cpu") is True
        assert 0 < seen[0]["output"] < 1e-5

    def test_out_of_time(self, state, inside):
        assert bench.run(state, Clock(10), chosen("channel"), "cpu") is None
        assert not state.cells

    def test_a_wrong_fused_result_is_final(self, state, inside, monkeypatch):
        right = rivals.fused_channel
        monkeypatch.setitem(rivals._FORMULATIONS["fused"], "channel", lambda x: 1.001 * right(x))
        work = chosen("channel", rivals=("eager", "fused"))
        assert bench.run(state, Clock(1000), work, "cpu") is False
        (entry,) = [entry for entry in state.cells.values() if entry["rival"] == "fused"]
        assert entry["status"] == "wrong"
        assert "output of segattn_ops is wrong" in entry["reason"]
        inside.clear()
        assert bench.run(State(state.path), Clock(1000), work, "cpu") is False
        assert [name for name, _ in inside] == ["require_native"]

    def test_a_cell_that_would_not_fit_is_not_started(self, state, inside, monkeypatch):
        monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
        monkeypatch.setattr(cells, "DeviceCell", lambda *_: pytest.fail("started"))
        assert bench.run(state, Clock(1000), chosen("channel"), "cpu") is True
        assert all(entry["reason"].startswith("would not fit") for entry in state.cells.values())

    @REASONS
    def test_a_failed_rival_is_skipped_at_the_other_sizes(self, state, inside):
        work = chosen("position", sizes=((5, 7), (3, 3)), rivals=("sdpa_cudnn",))
        assert bench.run(state, Clock(1000), work, "cpu") is True
        found = {entry["height"]: entry for entry in state.cells.values() if entry["op"] == "position"}
        assert found[5]["status"] == "failed"
        assert found[3]["status"] == "skipped"
        assert found[3]["reason"].startswith("SDPA cuDNN failed at 5x7 B=3")

    def test_a_crash_ends_one_cell_once(self, state, monkeypatch):
        """The file says "started" while the cell runs, and "crashed" after its process has died."""
        asked, running = [], []

        class Crashing(Worker):
            def ask(self, name, timeout, **arguments):
                if name == "require_native":
                    return {}
                asked.append(arguments["rival"])
                running.append([entry["status"] for entry in json.loads(state.path.read_text())["cells"]])
                raise WorkerLost("its process was ended by signal 11")

        monkeypatch.setattr(bench, "Worker", Crashing)
        work = chosen("channel", rivals=("eager", "fused"), sizes=((5, 7), (3, 3)))
        assert bench.run(state, Clock(1000), work, "cpu") is False
        # Eager crashed and is skipped at the other size; the fused op runs there.
        assert asked == ["eager", "fused", "fused"]
        assert running[:2] == [["started"], ["crashed", "started"]]
        assert bench.run(State(state.path), Clock(1000), work, "cpu") is False
        assert len(asked) == 3

    def test_only_a_cells_own_time_limit_is_final(self, state, monkeypatch):
        class Slow(Worker):
            def ask(self, name, timeout, **arguments):
                if name == "require_native":
                    return {}
                raise TooLong("took longer than it may and was stopped")

        monkeypatch.setattr(bench, "Worker", Slow)
        work = chosen("channel", rivals=("fused",))
        assert bench.run(state, Clock(50), work, "cpu") is None
        assert [entry["status"] for entry in state.cells.values()] == ["stopped"]
        assert bench.run(state, Clock(1000), work, "cpu") is False
        assert [entry["status"] for entry in state.cells.values()] == ["failed"]

    def test_kernels_that_hang_take_the_time_of_one_cell(self, state, monkeypatch):
        asked = []

        class Hanging(Worker):
            def ask(self, name, timeout, **arguments):
                if name == "require_native":
                    return {}
                asked.append(arguments["workload"]["height"])
                raise TooLong("took longer than it may and was stopped")

        monkeypatch.setattr(bench, "Worker", Hanging)
        work = chosen("channel", rivals=("fused",), sizes=((5, 7), (3, 3)))
        assert bench.run(state, Clock(1000), work, "cpu") is False
        assert asked == [5]
        assert [entry["status"] for entry in state.cells.values()] == ["failed", "skipped"]

    def test_without_native_kernels_nothing_is_measured(self, state, inside, monkeypatch, capsys):
        monkeypatch.setitem(_backend.LIBRARIES.missing, "cpu", "no library (a test)")
        assert bench.run(state, Clock(1000), chosen("channel"), "cpu") is False
        assert not state.cells
        assert "no native cpu kernels here" in capsys.readouterr().out
        cell = cells.DeviceCell(small("channel"), CPU)
        with pytest.raises(native.NotNative):
            cell.measure("fused")

    def test_fused_uses_the_native_backend(self, inside):
        cell = cells.DeviceCell(small("channel"), CPU)
        seen = []
        right = rivals.fused_channel

        def remember(x):
            seen.append(_selection.selected())
            return right(x)

        with pytest.MonkeyPatch.context() as patch, _selection.use_backend("reference"):
            patch.setitem(rivals._FORMULATIONS["fused"], "channel", remember)
            cell.measure("fused")
        assert set(seen) == {"native"}

    def test_the_last_sample_of_a_batch_is_checked(self):
        cell = cells.DeviceCell(small("position", batch=4), CPU)
        leaves = tuple(cell.leaves.values())
        output = rivals.formulation("fused", "position")(*leaves)
        gradients = torch.autograd.grad(output, leaves, cell.grad_output)
        assert validate.worst(cell.errors(output, gradients)) < 1e-5
        broken = output.detach().clone()
        broken[3] *= 1.01
        assert cell.errors(broken, gradients)["output"] > 1e-3

    def test_waiting_for_the_host_is_recorded(self, inside):
        cell = cells.DeviceCell(small("channel"), CPU)

        class Timer:
            hidden = False

            def __call__(self, function):
                function()
                return 1.0

        cell.time = Timer()
        assert cell.measure("eager")["host_exposed"] == ["forward", "forward_backward", "backward"]


def test_the_command_with_its_processes(tmp_path, capsys):
    """The whole suite on the CPU: libraries are checked in one process, cells measured in another."""
    if reason := native.fault(CPU):
        pytest.skip(reason)
    path = tmp_path / "gpu.json"
    arguments = ["--device=cpu", "--piece=build", "--piece=bench", "--families=channel", "--sizes=5x7"]
    arguments += ["--dtypes=float32", "--batches=2", "--rivals=eager,fused", f"--output={path}"]
    assert suite.main(arguments) == 0
    stored = json.loads(path.read_text())
    assert stored["commands"] == ["python -m benchmarks.gpu_suite " + " ".join(arguments)]
    assert stored["pieces"]["build"]["libraries"]["built_here"] is False
    assert {entry["status"] for entry in stored["cells"]} == {"measured"}
    assert "| channel | 5x7 | 2 | float32 | segattn_ops |" in path.with_suffix(".md").read_text()
