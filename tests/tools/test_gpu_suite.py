"""The parts of the GPU suite that need no GPU: selection, resuming, build, commands, plan, table."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rivals, run
from benchmarks.gpu import bench, build, children, driver, native, plan, profile, report, sanitize, smoke, suite, tests
from benchmarks.gpu import state as gpu_state
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.children import Finished
from benchmarks.gpu.selection import FAMILIES, RIVALS, SIZES, Selection
from benchmarks.report import machine
from benchmarks.workloads import OPS, Workload
from segattn_ops import _backend
from tools import compilers

CPU = torch.device("cpu")
ALL = Selection()
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def small(op: str, batch: int = 1, dtype: str = "float32") -> Workload:
    return Workload(op, 5, 7, dtype, batch, channels=16, key_channels=4)


@pytest.fixture
def state(tmp_path):
    return gpu_state.State(tmp_path / "gpu" / "gpu.json")


@without_gpu
def test_without_a_gpu_it_exits_cleanly(tmp_path, capsys):
    assert suite.main(["--output", str(tmp_path / "gpu.json")]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_no_library_is_loaded_before_the_build(tmp_path):
    """The build cannot replace a loaded library, and without one "fused" would be the reference."""
    code = (
        "import sys; sys.modules['segattn_ops'] = None; from benchmarks.gpu import suite\n"
        f"assert suite.main(['--dry-run', '--output', {str(tmp_path / 'gpu.json')!r}]) == 0\n"
        "assert suite.main(['--plan']) == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=compilers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for piece in suite.PIECES:
        assert f"{piece}:" in done.stdout
    for expected in (
        "position 97x97 B=8 bfloat16: eager, fused, fused_mma, sdpa",
        "position 128x256 B=8 float16",
        "criss_cross 97x97 B=32 bfloat16",
        "channel racecheck",
        "Call 3, sanitize",
    ):
        assert expected in done.stdout


def test_pieces_on_the_host(capsys, tmp_path):
    output = ["--output", str(tmp_path / "gpu.json")]
    assert suite.main(["--device", "cpu", "--dry-run", *output]) == 0
    printed = capsys.readouterr().out
    assert "bench:" in printed
    assert "sanitize:" not in printed
    with pytest.raises(SystemExit):
        suite.main(["--device", "cpu", "--piece", "tests", *output])
    assert "--device cpu rehearses build, smoke, ceilings, bench (got --piece tests)" in capsys.readouterr().err


class TestSelection:
    def test_every_op_belongs_to_one_family(self):
        assert sorted(op for ops in FAMILIES.values() for op in ops) == sorted(OPS)

    def test_every_rival_with_eager_first(self):
        """Of a GPU: not those that only a CPU has."""
        assert set(RIVALS) == {*rivals.RIVALS, "fused_mma"} - {*rivals.ONEDNN, *rivals.RUNTIMES}
        assert RIVALS[:3] == ("eager", "fused", "fused_mma")

    def test_engines_are_compared_in_16_bit_position_attention(self):
        compared = {
            (work.op, work.dtype) for work in Selection().workloads() if "fused_mma" in Selection().rivals_of(work)
        }
        assert {op for op, _ in compared} == {"position", "non_local", "ann"}
        assert {dtype for _, dtype in compared} == {"bfloat16", "float16"}

    def test_order_without_duplicates(self):
        planned = ALL.workloads()
        assert {(w.op, w.size, w.dtype, w.batch) for w in planned[:3]} == {
            (op, "97x97", "bfloat16", 8) for op in ("position", "criss_cross", "channel")
        }
        assert len(set(planned)) == len(planned)
        assert {w.op for w in planned} == set(OPS)
        assert {w.batch for w in planned if w.op == "criss_cross"} == {1, 8, 32}

    def test_compilers_run_at_one_size_dtype_and_batch(self):
        for workload in ALL.workloads():
            main = (workload.size, workload.dtype, workload.batch) == ("97x97", "bfloat16", 8)
            assert ("compile" in ALL.rivals_of(workload)) == main
        chosen = Selection(sizes=((5, 7), (9, 9)), dtypes=("float32",), batches=(2,), rivals=("eager", "compile"))
        assert [w.size for w in chosen.workloads() if "compile" in chosen.rivals_of(w) and w.op == "channel"] == ["5x7"]

    def test_the_command_line_selects(self):
        arguments = suite.parser().parse_args(
            [
                "--families",
                "channel",
                "--rivals",
                "fused",
                "--sizes",
                "5x7,9x9",
                "--dtypes",
                "float32",
                "--batches",
                "3",
            ]
        )
        assert arguments.sizes == ((5, 7), (9, 9))
        chosen = Selection(arguments.families, arguments.sizes, arguments.dtypes, arguments.batches, arguments.rivals)
        assert chosen.workloads() == [Workload("channel", *size, "float32", 3) for size in ((5, 7), (9, 9))]
        assert chosen.rivals_of(chosen.workloads()[0]) == ["fused"]

    @pytest.mark.parametrize(
        "option, value",
        [
            ("--rivals", "eager,mine"),
            ("--sizes", "97"),
            ("--sizes", ""),
            ("--dtypes", "int8"),
            ("--batches", "0"),
            ("--families", ","),
            ("--device", "tpu"),
            ("--limit", "nan"),
        ],
    )
    def test_unknown_values_are_rejected(self, option, value, capsys):
        with pytest.raises(SystemExit) as stopped:
            suite.main([option, value])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"argument {option}: " in line

    def test_foreign_files_are_refused_in_a_line(self, tmp_path, capsys):
        output = tmp_path / "gpu.json"
        for text, message in [
            ("<html>", "is not JSON"),
            ("[1]", "is not a result of benchmarks.gpu_suite"),
            ('{"schema": 1, "cells": []}', "is not a result of benchmarks.gpu_suite"),
            ('{"schema": 9, "cells": [], "pieces": {}}', "is of schema 9"),
        ]:
            output.write_text(text)
            for option in ("--output", "--resume"):
                other = ["--output", str(tmp_path / "new.json")] if option == "--resume" else []
                assert suite.main(["--device", "cpu", option, str(output), *other, "--piece", "smoke"]) == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert message in line
            assert output.read_text() == text
        assert suite.main(["--device", "cpu", "--resume", str(tmp_path / "none.json"), "--dry-run"]) == 2
        assert "no such file" in capsys.readouterr().err
        assert suite.main(["--device", "cpu", "--output", str(output / "gpu.json"), "--piece", "smoke"]) == 2
        assert "cannot be made" in capsys.readouterr().err

    def test_a_resume_that_is_not_read_is_mentioned(self, tmp_path, capsys):
        text = json.dumps({"schema": 1, "pieces": {}, "cells": []})
        for name in ("gpu.json", "last.json"):
            (tmp_path / name).write_text(text)
        options = ["--output", str(tmp_path / "gpu.json"), "--resume", str(tmp_path / "last.json")]
        assert suite.main(["--device", "cpu", "--dry-run", *options]) == 0
        assert f"--resume {tmp_path / 'last.json'} is not read" in capsys.readouterr().out

    def test_default_output(self, monkeypatch, tmp_path):
        monkeypatch.setenv("OUT", str(tmp_path))
        assert suite.default_output() == tmp_path / "gpu.json"
        monkeypatch.delenv("OUT")
        assert suite.default_output() == Path("report/gpu/gpu.json")


class TestResuming:
    def test_cells_and_steps_are_stored(self, state):
        workload = small("channel")
        state.set_cell(run.record(workload, "fused", "measured"))
        state.set_cell(run.record(workload, "eager", "stopped"))
        state.set_step("smoke", "channel", "passed", seconds=1.0)
        state.set_step("tests", "cuda", "failed")
        again = gpu_state.State(state.path)
        assert again.cell(workload, "fused")["status"] == "measured"
        assert again.cell(workload, "eager") is None  # the suite's time limit is not a result of the cell
        assert again.cell(small("channel", dtype="bfloat16"), "fused") is None
        assert again.step("smoke", "channel")["seconds"] == 1.0
        assert again.step("tests", "cuda") is None
        assert gpu_state.State(state.path, again=True).cell(workload, "fused") is None

    @pytest.mark.parametrize("status", ["wrong", "crashed", "failed", "skipped"])
    def test_final_statuses(self, state, status):
        state.set_cell(run.record(small("channel"), "fused", status, "why"))
        assert gpu_state.State(state.path).cell(small("channel"), "fused")["status"] == status

    def test_other_sources_are_measured_again(self, state, monkeypatch):
        state.set_cell(run.record(small("channel"), "fused", "wrong"))
        state.set_step("smoke", "channel", "passed")
        monkeypatch.setattr(gpu_state, "fingerprint", lambda: "another")
        changed = gpu_state.State(state.path)
        assert changed.cell(small("channel"), "fused") is None
        assert changed.step("smoke", "channel") is None

    def test_another_device_is_measured_again(self, state):
        state.machine = {"gpu": "an H100"}
        state.set_cell(run.record(small("channel"), "fused", "measured"))
        state.set_step("ceilings", "device", "passed")
        assert state.cell(small("channel"), "fused")
        state.machine = {"gpu": "an H200"}
        assert state.cell(small("channel"), "fused") is None
        assert state.step("ceilings", "device") is None

    def test_a_cell_that_ends_the_suite_runs_twice(self, state):
        workload = small("channel")
        for _ in range(gpu_state.STARTS):
            assert gpu_state.State(state.path).start_cell(workload, "fused")
            assert json.loads(state.path.read_text())["cells"][0]["status"] == "started"
        assert not gpu_state.State(state.path).start_cell(workload, "fused")
        assert gpu_state.State(state.path).cell(workload, "fused")["status"] == "crashed"

    def test_a_failed_rival_is_skipped_for_the_op_and_dtype(self, state):
        state.set_cell(run.record(small("position", 2), "sdpa_flash", "failed", "no kernel"))
        state.set_cell(run.record(small("position", 2), "eager", "failed", "out of memory: 80 GiB"))
        state.set_cell(run.record(small("position", 2), "sdpa", "skipped", "would not fit"))
        assert "SDPA flash failed at 5x7 B=2: no kernel" in state.refusal(small("position"), "sdpa_flash")
        assert state.refusal(small("position", dtype="bfloat16"), "sdpa_flash") is None
        assert state.refusal(small("non_local"), "sdpa_flash") is None
        assert state.refusal(small("position", 1), "eager") is None  # smaller, so it may fit
        assert state.refusal(small("position", 3), "eager")
        assert state.refusal(small("position"), "sdpa") is None

    def test_resume_from_another_file(self, state, tmp_path):
        state.set_cell(run.record(small("channel"), "fused", "measured"))
        other = tmp_path / "other" / "gpu.json"
        resumed = gpu_state.State(other, resume=state.path)
        assert resumed.cell(small("channel"), "fused")
        resumed.save()
        state.path.unlink()
        assert gpu_state.State(other, resume=state.path).cell(small("channel"), "fused")  # --output takes precedence

    def test_another_schema_is_rejected(self, state):
        state.save()
        state.path.write_text(json.dumps({"schema": 99}))
        with pytest.raises(ValueError, match="schema 99"):
            gpu_state.State(state.path)

    def test_stored_output_is_bounded(self, state):
        state.set_step("tests", "cuda", "failed", output=["x" * 10**6] * 1000)
        assert state.path.stat().st_size < 2 * gpu_state.OUTPUT_LINES * gpu_state.OUTPUT_WIDTH


@pytest.fixture
def commands(monkeypatch):
    """Records commands and answers them by ``respond`` instead of running them."""

    class Remembered(list):
        environment: dict | None = None
        together: list[int] = []

        def respond(self, command):
            return Finished(0, "fine", 1.0)

    seen = Remembered()
    seen.together = []

    def remember(commands, seconds, environment=None):
        seen.extend(commands)
        seen.together.append(len(commands))
        seen.environment = environment
        return [seen.respond(command) for command in commands]

    monkeypatch.setattr(children, "run", remember)
    return seen


class TestBuild:
    CLOCK = gpu_state.Clock(86400)  # from when this file was imported, long before the tests run

    def identified(self, monkeypatch, *faults):
        """Makes ``identify`` report these faults in turn."""
        answers = iter(faults)
        facts = {"capability": [9, 0], "build": {"torch_at_build": "2.14.1"}}
        monkeypatch.setattr(build, "identify", lambda *_: facts | {"fault": next(answers)})

    def test_matching_libraries_are_not_rebuilt(self, state, monkeypatch, commands):
        self.identified(monkeypatch, None)
        assert build.run(state, self.CLOCK, ALL, "cuda") is True
        assert not commands

    def test_a_recorded_build_does_not_replace_the_libraries(self, state, monkeypatch, commands):
        state.set_step("build", "libraries", "passed")
        self.identified(monkeypatch, "the CUDA kernels were not built", None)
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        assert build.run(state, self.CLOCK, ALL, "cuda") is True
        assert [command[1:] for command in commands] == [["setup.py", "build_ext", "--inplace", "--force"]]
        assert commands.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert commands.environment["FORCE_CUDA"] == "1"

    def test_a_build_that_does_not_load_has_failed(self, state, monkeypatch, commands):
        self.identified(monkeypatch, "stale", "the CUDA library did not load")
        assert build.run(state, self.CLOCK, ALL, "cuda") is False
        assert state.pieces["build"]["libraries"]["output"][-1] == "the CUDA library did not load"

    def test_a_build_that_fails_keeps_its_output(self, state, monkeypatch, commands):
        commands.respond = lambda command: Finished(1, "error: expected ;\n", 1.0)
        self.identified(monkeypatch, "stale")
        assert build.run(state, self.CLOCK, ALL, "cuda") is False
        assert state.pieces["build"]["libraries"]["output"] == ["error: expected ;"]

    def test_nothing_runs_without_libraries(self, tmp_path, monkeypatch, capsys):
        self.identified(monkeypatch, "_C_cuda was built of other sources")
        monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))
        arguments = ["--device", "cpu", "--piece", "bench", "--output", str(tmp_path / "gpu.json")]
        assert suite.main(arguments) == 1
        assert "built of other sources; run the piece build first" in capsys.readouterr().out


class TestNative:
    def test_a_missing_library_is_an_error(self, monkeypatch):
        native.require_native("cpu")
        monkeypatch.setitem(_backend.LIBRARIES.missing, "cuda", "the CUDA kernels were not built (a test)")
        with pytest.raises(native.NotNative, match="no native cuda kernels.*a test"):
            native.require_native("cuda")
        assert "a test" in native.fault(torch.device("cuda"))

    def test_the_driver_stops(self, monkeypatch, capsys):
        monkeypatch.setitem(_backend.LIBRARIES.missing, "cuda", "the CUDA kernels were not built (a test)")
        assert driver.main(["--op", "channel", "--device", "cuda"]) == 2
        assert "no native cuda kernels" in capsys.readouterr().err

    def test_libraries_of_other_sources_are_named(self, monkeypatch):
        sources = compilers.build_tools.fingerprint(compilers.ROOT)
        used = ["_C", f"_cpu_{_backend.LIBRARIES.cpu_capability}"]
        monkeypatch.setitem(_backend.LIBRARIES.build_info, "sources", dict.fromkeys(used, sources))
        assert native.fault(CPU) is None
        monkeypatch.setitem(_backend.LIBRARIES.build_info, "sources", {used[0]: sources, used[1]: "another"})
        assert f"{used[1]} was built of other sources (another)" in native.fault(CPU)

    def test_a_tree_without_libraries_measures_nothing(self, tmp_path):
        """In a copy of the tree without libraries the piece fails instead of timing the reference."""
        ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
        for folder in ("benchmarks", "segattn_ops", "tools"):
            shutil.copytree(compilers.ROOT / folder, tmp_path / folder, ignore=ignored)
        shutil.copy(compilers.ROOT / "setup.py", tmp_path)
        code = "import sys; from benchmarks.gpu import bench, selection, state; from pathlib import Path\n"
        code += "work = selection.Selection(('channel',), ((5, 7),), ('float32',), (1,), ('eager', 'fused'))\n"
        code += "found = state.State(Path('gpu.json'))\n"
        code += "sys.exit({False: 7}.get(bench.run(found, state.Clock(100), work, 'cpu')))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 7, done.stderr
        assert "segattn_ops has no native cpu kernels here" in done.stdout
        assert json.loads((tmp_path / "gpu.json").read_text())["cells"] == []


class TestCommands:
    CLOCK = gpu_state.Clock(86400)  # from when this file was imported, long before the tests run

    @pytest.fixture(autouse=True)
    def tools(self, monkeypatch):
        monkeypatch.setattr(compilers.build_tools, "find_program", lambda name: f"/bin/{name}")

    def test_smoke_runs_all_families_at_once(self, state, commands):
        assert smoke.run(state, self.CLOCK, ALL, "cuda") is True
        assert commands.together == [len(FAMILIES)]
        assert {command[command.index("--op") + 1] for command in commands} == set(FAMILIES)

    def test_sanitizers_are_one_process_a_family_and_tool(self, state, commands):
        commands.respond = lambda command: Finished(0, "options: --kernel-name", 1.0)
        assert sanitize.run(state, self.CLOCK, ALL, "cuda") is True
        checks = [command for command in commands if "--tool" in command]
        pairs = {(command[command.index("--tool") + 1], command[command.index("--op") + 1]) for command in checks}
        assert len(checks) == len(pairs) == len(FAMILIES) * len(sanitize.TOOLS)
        assert all("kns=segattn" in command for command in checks)
        for command in checks:
            assert ("--report-api-errors" in command) == ("memcheck" in command)
        assert commands.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def test_tests_are_one_run_chosen_by_their_marker(self, state, commands):
        def respond(command):
            path = next(word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml="))
            text = '<testsuites><testsuite tests="12" failures="1" errors="0" skipped="2"/></testsuites>'
            Path(path).write_text(text)
            return Finished(1, "1 failed", 9.0)

        commands.respond = respond
        state.save()
        assert tests.run(state, self.CLOCK, ALL, "cuda") is False
        (command,) = commands
        assert "-n" not in command or "faulthandler_exit_on_timeout=true" in command
        assert command[command.index("-m", 2 + command.index("pytest") - 1) + 1] == "cuda"
        assert not any(word.startswith("tests/") for word in command)
        assert commands.environment == {"SEGATTN_TEST_BACKENDS": "cuda"}
        step = gpu_state.State(state.path).pieces["tests"]["cuda"]
        assert step["status"] == "failed"
        assert step["counts"] == {"tests": 12, "failures": 1, "errors": 0, "skipped": 2}

    def test_position_is_tested_by_both_engines(self, state, commands):
        """Where the package takes wgmma: the tests of position attention run again with mma.sync."""
        for engine, runs in ((None, 1), ("mma", 1), ("wgmma", 2)):
            commands.clear()
            state.pieces.clear()
            state.machine = {"position_engine": engine}
            assert tests.run(state, self.CLOCK, ALL, "cuda") is True
            assert len(commands) == runs
        assert commands[1][-2:] == ["-k", "position"]
        assert commands.environment == {"SEGATTN_TEST_BACKENDS": "cuda", "SEGATTN_CUDA_POSITION": "mma"}

    def test_a_run_in_which_every_test_is_skipped_has_failed(self, state, commands):
        """Tests are skipped without a device or without kernels, which pytest reports as a success."""

        def respond(command):
            path = next(word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml="))
            Path(path).write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="3"/></testsuites>')
            return Finished(0, "3 skipped", 9.0)

        commands.respond = respond
        state.save()
        assert tests.run(state, self.CLOCK, ALL, "cuda") is False
        assert gpu_state.State(state.path).pieces["tests"]["cuda"]["output"][-1] == "no test ran: all were skipped"

    def test_profiles_keep_clocks_unlocked_and_are_bounded(self, state, commands):
        state.save()

        def respond(command):
            Path(command[command.index("--log-file") + 1]).write_bytes(b"a" * (2 * gpu_steps.FILE_BYTES) + b"end")
            return Finished(0, "", 1.0)

        commands.respond = respond
        assert profile.run(state, self.CLOCK, ALL, "cuda") is True
        assert commands.together == [1] * len(FAMILIES)  # two profilers would share the counters
        for command in commands:
            assert command[command.index("--clock-control") + 1] == "none"
            log = Path(command[command.index("--log-file") + 1]).read_bytes()
            assert len(log) < gpu_steps.FILE_BYTES + 100
            assert log.endswith(b"end")

    def test_missing_tools_are_failures(self, state, monkeypatch, capsys):
        monkeypatch.setattr(compilers.build_tools, "find_program", lambda name: None)
        assert sanitize.run(state, self.CLOCK, ALL, "cuda") is False
        assert profile.run(state, self.CLOCK, ALL, "cuda") is False
        assert "ncu is not on PATH or in the usual places" in capsys.readouterr().out

    def test_only_failed_steps_run_again(self, state, commands):
        step = {"a": ["true"], "b": ["false"]}
        commands.respond = lambda command: Finished(0 if command == ["true"] else 3, "why", 1.0)
        assert gpu_steps.run_steps(state, "smoke", step, self.CLOCK) is False
        stored = gpu_state.State(state.path).pieces["smoke"]["b"]
        assert (stored["status"], stored["exit_status"], stored["output"]) == ("failed", 3, ["why"])
        assert gpu_steps.run_steps(state, "smoke", step, self.CLOCK) is False
        assert commands == [["true"], ["false"], ["false"]]

    def test_the_time_limit_is_no_failure(self, state, commands):
        assert gpu_steps.run_steps(state, "smoke", {"a": ["true"]}, gpu_state.Clock(10)) is None
        assert not commands
        commands.respond = lambda command: Finished(children.TIMED_OUT, "begun", 1.0)
        assert gpu_steps.run_steps(state, "smoke", {"a": ["true"]}, self.CLOCK) is None
        assert state.pieces["smoke"]["a"]["status"] == "stopped"

    def test_a_step_that_hangs_has_failed_and_leaves_time(self, state, monkeypatch):
        monkeypatch.setattr(children, "GRACE", 0.2)
        steps = {"a": ["sleep", "60"], "b": ["true"]}
        assert gpu_steps.run_steps(state, "smoke", steps, self.CLOCK, seconds=1.0) is False
        found = state.pieces["smoke"]
        assert (found["a"]["status"], found["a"]["output"]) == ("failed", ["stopped after 1 s"])
        assert found["b"]["status"] == "passed"

    @pytest.mark.parametrize("verdicts, expected", [([True, True], True), ([True, None], None), ([None, False], False)])
    def test_verdicts(self, verdicts, expected):
        assert gpu_state.combined(verdicts) is expected


class TestPlan:
    def test_printed_commands_parse(self):
        commands = plan.invocations(plan.describe())
        assert len(commands) == sum(len(call.invocations) for call in plan.calls())
        parsed = [suite.parser().parse_args(command) for command in commands]
        asked = [piece for arguments in parsed for piece in arguments.piece]
        assert set(asked) == set(suite.PIECES)
        benches = [arguments.rivals for arguments in parsed if "bench" in arguments.piece]
        assert set(benches[0]) | set(benches[1]) == set(RIVALS)
        assert "compile" not in benches[0]
        assert (parsed[1].sizes, parsed[1].dtypes) == ((SIZES[0],), ("bfloat16",))
        assert all(call.command.startswith("python3 -m") and len(call.command) < 2000 for call in plan.calls())

    def test_the_calls_fit_the_time(self):
        for call in plan.calls():
            limits = [suite.parser().parse_args(command).limit for command in plan.invocations([f"  {call.command}"])]
            assert sum(limits) + 10 * len(limits) < call.seconds  # torch's import, and the interrupt's grace
            assert call.seconds + plan.START_SECONDS < 660
            assert call.seconds < 600
        total = sum(call.seconds + plan.START_SECONDS for call in plan.calls())
        assert total <= plan.LENT_SECONDS

    def test_transfers_are_within_the_limits(self):
        assert len(plan.CARRIED) <= 8
        for call in plan.calls():
            assert len(call.returns) <= 8
        assert gpu_steps.FILE_BYTES <= 16 << 20

    @pytest.fixture
    def tree(self, tmp_path, monkeypatch):
        """A tree with libraries that match it."""
        monkeypatch.setattr(compilers, "ROOT", tmp_path)
        (tmp_path / "csrc").mkdir()
        (tmp_path / "segattn_ops").mkdir()
        for name in compilers.build_tools.BUILD_SCRIPTS:
            (tmp_path / name).write_text("")
        mark = compilers.build_tools.fingerprint(tmp_path)
        for name in plan.CARRIED[:-1]:
            (tmp_path / name).write_bytes(b"library")
        names = [Path(name).name.removesuffix(".abi3.so") for name in plan.CARRIED[:-1]]
        info = {"sources": dict.fromkeys(names, mark), "cuda": {"architectures": ["90"]}}
        (tmp_path / plan.CARRIED[-1]).write_text(json.dumps(info))
        return tmp_path

    def test_the_state_of_the_libraries_is_printed(self, tree):
        assert "does not build" in "\n".join(plan.describe())
        (tree / "setup.py").write_text("changed")
        assert "_C was built of other sources" in "\n".join(plan.describe())
        (tree / plan.CARRIED[1]).unlink()
        lines = "\n".join(plan.describe())
        assert "_C_cuda.abi3.so is not built" in lines
        assert plan.BUILD in lines

    def test_a_transfer_that_does_not_fit_is_printed(self, tree):
        with (tree / plan.CARRIED[1]).open("wb") as file:
            file.truncate(65 << 20)
        assert "DOES NOT FIT in 64.0 MiB" in "\n".join(plan.describe())

    def test_the_wrong_architecture_is_named(self, tree):
        path = tree / plan.CARRIED[-1]
        path.write_text(path.read_text().replace('"90"', '"80"'))
        assert "no code for sm_90" in plan.carried_fault()


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
        rows = report.table([self.entry("eager", 0.004, 0.008), self.entry("fused", 0.002, 0.004)])
        ours = dict(zip(report.COLUMNS[:7], rows[0][:7], strict=True))
        assert ours[""] == "segattn_ops"
        assert float(ours["TFLOP/s"]) == pytest.approx(8 * 101.99e9 / 0.002 / 1e12, rel=1e-3)
        assert rows[0][7] == f"{2 * 8 * 9409 * (64 + 64 + 512 + 512) / 0.002 / 1e9:.0f}"
        assert float(rows[0][10]) == pytest.approx(2 * 8 * 101.99e9 / 0.004 / 1e12, rel=1e-3)
        assert rows[1][11] == "2.00"
        assert rows[0][12:] == ["3.0", "2e-03"]

    def test_times_that_include_the_host_are_marked(self):
        (row,) = report.table([self.entry("fused", 0.002, 0.004, host_exposed=["backward"])])
        assert (row[5], row[9]) == ("2.000", "4.000*")

    def test_skipped_cells_show_the_reason(self):
        entry = run.record(Workload("position", 128, 256), "eager", "skipped", "would not fit: needs 17 GiB")
        (row,) = report.table([entry])
        assert row[5] == "skipped: would not fit: needs 17 GiB"
        assert len(row) == len(report.COLUMNS)

    def test_everything_is_in_the_markdown(self, state):
        state.machine = machine("cpu", 1) | {"gpu": "a GPU", "cuda": "13.0"}
        state.pieces["sdpa"] = {"position bfloat16": {"default": "MATH", "FLASH_ATTENTION": "refused: head_dim"}}
        state.set_step("ceilings", "device", "passed", copy_bytes_per_second=4.1e12)
        state.set_cell(self.entry("fused", 0.002, 0.004))
        text = report.write_table(state).read_text()
        for expected in ("a GPU", "| copy_bytes_per_second | 4.10 |", "refused: head_dim", "| position | 97x97 | 8 |"):
            assert expected in text

    def test_times_stand_beside_the_bounds(self, monkeypatch):
        found = {("position", "97x97", 8, "H200"): (0.001, 0.002), ("position", "97x97", 8, "A100"): (1.0, 1.0)}
        monkeypatch.setattr(report, "bounds", lambda: found)
        cells = [self.entry("eager", 0.004, 0.008), self.entry("fused", 0.002, 0.003)]
        rows = report.bound_table(cells, "NVIDIA H200")
        assert rows == [["position", "97x97", "8", "2000.0", "1000.0", "2.00", "3000.0", "2000.0", "1.50"]]
        assert len(rows[0]) == len(report.BOUND_COLUMNS)
        assert report.bound_table(cells, "another GPU") == []

    def test_bounds_are_of_mma_sync(self, monkeypatch):
        monkeypatch.setattr(report, "bounds", lambda: {("position", "97x97", 8, "H200"): (0.001, 0.002)})
        by_wgmma = self.entry("fused", 0.001, 0.002, engine="wgmma")
        assert report.bound_table([by_wgmma], "H200") == []
        (row,) = report.bound_table([by_wgmma, self.entry("fused_mma", 0.004, 0.008, engine="mma")], "H200")
        assert (row[5], row[8]) == ("4.00", "4.00")

    def test_engines_stand_side_by_side(self, state):
        state.machine = machine("cpu", 1) | {"gpu": "a GPU", "cuda": "13.0"}
        by_wgmma = self.entry("fused", 0.0014, 0.004, engine="wgmma")
        by_mma = self.entry("fused_mma", 0.0028, 0.006, engine="mma")
        forward, backward = report.engine_table([by_wgmma, by_mma])
        assert forward[4:] == ["forward", "1.400", "582.8", "2e-03", "2.800", "291.4", "2e-03", "2.00"]
        assert backward[4:6] + backward[-1:] == ["backward", "4.000", "1.50"]
        assert len(forward) == len(report.ENGINE_COLUMNS)
        state.set_cell(by_wgmma)
        state.set_cell(by_mma)
        text = report.write_table(state).read_text()
        assert "forward: 583 TFLOP/s by wgmma; goals: 550 (reached), then 600 (missed)." in text
        assert "backward: 408 TFLOP/s by wgmma; goals: 380 (reached), then 450 (missed)." in text

    def test_an_engine_that_fails_is_shown_beside_the_other(self):
        wrong = run.record(Workload("position", 97, 97, "bfloat16", 8), "fused", "wrong", "output: 1e-1")
        rows = report.engine_table([wrong, self.entry("fused_mma", 0.0028, 0.006)])
        assert rows[0][5:] == ["wrong: output: 1e-1", "", "", "2.800", "291.4", "2e-03", ""]
        assert report.goals([wrong]) == []
        skipped = run.record(Workload("position", 97, 97, "bfloat16", 8), "fused_mma", "skipped", "the same")
        assert report.engine_table([self.entry("fused", 0.002, 0.004, engine="mma"), skipped]) == []

    def test_figures_of_other_sources_are_left_out(self, state):
        state.set_cell(self.entry("eager", 0.004, 0.008))
        state.cells[gpu_state.key_of(self.entry("eager", 1, 1))]["sources"] = "before"
        state.set_cell(self.entry("fused", 0.002, 0.004))
        text = report.write_table(state).read_text()
        assert "| segattn_ops |" in text
        assert "| eager |" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_driver_checks_every_op_of_a_family(family, capsys):
    arguments = ["--op", family, "--device", "cpu", "--dtypes", "float32", "--size", "5x7", "--size", "1x1"]
    assert driver.main(arguments) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 * len(FAMILIES[family])
    assert all(line.endswith(": right") for line in lines)


def test_the_driver_finds_a_wrong_result(monkeypatch, capsys):
    right = driver.rivals.fused_channel
    monkeypatch.setitem(driver.rivals._FORMULATIONS["fused"], "channel", lambda x: 1.001 * right(x))
    assert driver.main(["--op", "channel", "--device", "cpu", "--dtypes", "float32", "--size", "5x7"]) == 1
    assert "wrong: channel 5x7" in capsys.readouterr().out
