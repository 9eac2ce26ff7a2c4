"""The GPU suite's steps that are commands: build, smoke, tests, profile, sanitize; and the ceilings.

Each takes the state, the clock, what is selected and the device, and returns True (all passed), False (something
failed) or None (no time left). A step that passed is not run again; whether the libraries serve is asked every time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

from . import children
from .gpu_bench import Refused, Worker, WorkerLost
from .gpu_state import Clock, State, whole
from .gpu_work import FAMILIES, Selection

SANITIZERS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}
LEAST_SECONDS = 20.0
TEST_WORKERS = 6  # each holds a CUDA context
FILE_BYTES = 4 << 20  # of a log: its beginning and its end are kept
# Odd, more than one tile of every kernel, and at the widths that the networks use.
SMOKE = ["--size", "33x35", "--batch", "2", "--channels", "512", "--key-channels", "64"]
SMOKE_DTYPES = "bfloat16,float32"


def _steps(
    state: State,
    piece: str,
    commands: dict[str, list[str]],
    clock: Clock,
    environment: dict | None = None,
    together: int = 1,
) -> bool | None:
    """Runs named commands as steps that are done once, ``together`` of them at a time."""
    todo = [name for name in commands if not state.step(piece, name)]
    verdicts: list[bool | None] = []
    while todo:
        if clock.left < LEAST_SECONDS:
            return whole([*verdicts, None])
        names, todo = todo[:together], todo[together:]
        print(f"{piece}: {', '.join(names)}", flush=True)
        results = children.run([commands[name] for name in names], clock.left - children.GRACE, environment)
        for name, result in zip(names, results, strict=True):
            verdict = {0: "passed", children.TIMED_OUT: "stopped"}.get(result.status, "failed")
            lines = result.output.strip().splitlines()
            facts = {"seconds": round(result.seconds, 1), "command": commands[name], "exit_status": result.status}
            state.set_step(piece, name, verdict, **facts, output=lines)
            shown = lines[-1:] if verdict == "passed" else lines[-8:]
            print(
                f"  {name} {verdict} in {result.seconds:.0f} s: " + "\n    ".join(line[:300] for line in shown),
                flush=True,
            )
            verdicts.append({"passed": True, "stopped": None}.get(verdict, False))
    return whole(verdicts)


def identify(state: State, clock: Clock, device: str) -> dict:
    """What machine this is and whether the libraries serve, from a process that ends before they are built anew.

    Never remembered: the file may have come from another machine, and the libraries may have not.
    """
    with Worker(device) as worker:
        try:
            facts = worker.ask("identify", min(max(clock.left, 1), 100))
        except (Refused, WorkerLost) as error:
            return {"fault": str(error), "capability": None}
    state.machine = facts["machine"]
    state.save()
    return facts


def build(state: State, clock: Clock, device: str) -> bool | None:
    """Builds the libraries, unless those that are here, built or carried, are of these sources and run."""
    if clock.left < LEAST_SECONDS:  # a check that was cut short is no reason to build
        return None
    facts = identify(state, clock, device)
    if facts["fault"] is None:
        built = facts["build"]
        print(f"build: the libraries here are of these sources and run (built with torch {built['torch_at_build']})")
        state.set_step("build", "libraries", "passed", built_here=False, build=built)
        return True
    print(f"build: {facts['fault']}; building", flush=True)
    environment = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))}
    if capability := facts["capability"]:
        architecture = os.environ.get("TORCH_CUDA_ARCH_LIST", ".".join(map(str, capability)))
        # One set of CPU kernels: what is measured and tested here runs on the device.
        only = os.environ.get("SEGATTN_CPU_ONLY", "baseline")
        environment |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "SEGATTN_CPU_ONLY": only}
    if clock.left < LEAST_SECONDS:
        return None
    # Forced: by their dates, libraries that were carried here may be newer than the sources they do not match.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    (result,) = children.run([command], clock.left - children.GRACE, environment)
    lines = result.output.strip().splitlines()
    status = {0: "passed", children.TIMED_OUT: "stopped"}.get(result.status, "failed")
    if status == "passed":
        facts = identify(state, clock, device)
        if facts["fault"] is not None:
            status, lines = "failed", [*lines, facts["fault"]]
    step = {"seconds": round(result.seconds, 1), "command": command, "exit_status": result.status}
    state.set_step("build", "libraries", status, built_here=True, **step, output=lines)
    print(f"build: {status} in {result.seconds:.0f} s: {lines[-1][:300] if lines else ''}", flush=True)
    return {"passed": True, "stopped": None}.get(status, False)


def ready(state: State, clock: Clock, device: str) -> bool:
    """What stands in for the build where it was not asked for: without libraries of these sources nothing runs."""
    fault = identify(state, clock, device)["fault"]
    if fault:
        print(f"gpu_suite: {fault}; run the piece build first")
    return fault is None


def _driver(family: str, device: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_driver", "--op", family, "--device", device, *options]


def smoke(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Every op forward and backward against float64 at one small size: a broken kernel shows in the first minute."""
    commands = {family: _driver(family, device, "--dtypes", SMOKE_DTYPES, *SMOKE) for family in selection.families}
    return _steps(state, "smoke", commands, clock, together=len(FAMILIES))


def ceilings(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    if state.step("ceilings", "device"):
        return True
    if clock.left < LEAST_SECONDS:
        return None
    with Worker(device) as worker:
        try:
            found = worker.ask("ceilings", clock.left)
        except (Refused, WorkerLost) as error:
            state.set_step("ceilings", "device", "failed", output=[str(error)])
            return False
    state.set_step("ceilings", "device", "passed", **found)
    for name, value in found.items():
        print(f"  {name}: {value / 1e12:.2f} T/s", flush=True)
    return True


def tests(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """All tests that need a GPU, chosen by their marker, in one run; the report of each is in tests.xml."""
    folder = state.path.parent.resolve()
    report = folder / "tests.xml"
    if not state.step("tests", "cuda"):
        report.unlink(missing_ok=True)  # what is there afterwards is of this run
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", "cuda", f"--junitxml={report}", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(TEST_WORKERS), "--dist", "worksteal"]
    verdict = _steps(state, "tests", {"cuda": command}, clock, {"SEGATTN_TEST_BACKENDS": "cuda"})
    step = state.pieces.get("tests", {}).get("cuda")
    if step and report.exists():
        found = counts(report)
        print("  " + ", ".join(f"{number} {name}" for name, number in found.items()), flush=True)
        if step["status"] == "passed" and found["tests"] == found["skipped"]:
            step["status"], verdict = "failed", False  # tests without a device, or without kernels, skip themselves
            step["output"].append("no test ran: all were skipped")
        state.set_step("tests", "cuda", step.pop("status"), **(step | {"counts": found}))
        shorten(report)
    return verdict


def counts(report: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped ones of a JUnit file."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    found = dict.fromkeys(names, 0)
    for suite in suites:
        found = {name: found[name] + int(suite.get(name, 0)) for name in names}
    return found


def profile(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Nsight Compute's account of the package's kernels at 97 x 97, the device's clocks left as they are."""
    program = children.BUILD_TOOLS["find_program"]("ncu")
    if not program:
        return _missing(state, "profile", "ncu")
    commands, logs = {}, []
    for family in selection.families:
        logs.append((state.path.parent / f"profile-{family}.txt").resolve())
        command = [program, "--clock-control", "none", "--set", "full", "--kernel-name-base", "mangled"]
        command += ["--kernel-name", "regex:segattn", "--log-file", str(logs[-1])]
        options = ["--once", "--size", "97x97", "--batch", "8", "--channels", "512", "--key-channels", "64"]
        commands[family] = command + _driver(family, device, "--dtypes", "bfloat16", *options)
    verdict = _steps(state, "profile", commands, clock)
    for log in logs:
        if log.exists():
            shorten(log)
    return verdict


def sanitize(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """compute-sanitizer over every family, with all dtypes in one process a family and tool, the families together."""
    program = children.BUILD_TOOLS["find_program"]("compute-sanitizer")
    if not program:
        return _missing(state, "sanitize", "compute-sanitizer")
    # The option that restricts a tool to kernels with a substring in their names was renamed over the years.
    (found,) = children.run([[program, "--help"]], 30)
    only_ours = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if name in found.output), None)
    commands = {}
    for tool, options in SANITIZERS.items():
        for family in selection.families:
            command = [program, "--tool", tool, "--error-exitcode", "9", *options]
            command += [only_ours, "kns=segattn"] if only_ours else []
            commands[f"{family} {tool}"] = command + _driver(family, device)
    # PyTorch's allocator hands out parts of large blocks, in which memcheck would not see an overrun.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _steps(state, "sanitize", commands, clock, environment, together=len(selection.families))


def _missing(state: State, piece: str, program: str) -> bool:
    line = f"{program} is not on PATH or in the usual places"
    print(f"{piece}: {line}", flush=True)
    state.set_step(piece, program, "failed", output=[line])
    return False


def shorten(path: Path, limit: int = FILE_BYTES) -> None:
    """Cuts the middle out of a file that is larger than what may come back from a lent machine."""
    content = path.read_bytes()
    if len(content) > limit:
        left_out = f"\n[{len(content) - limit} bytes left out here]\n".encode()
        path.write_bytes(content[: limit // 2] + left_out + content[-(limit // 2) :])
