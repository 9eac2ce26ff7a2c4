"""The piece ``tests``: the test suite's tests that need a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

from .selection import Selection
from .state import Clock, State, combined
from .steps import run_steps, shorten

PROCESSES = 6  # each holds a CUDA context
TEST_SECONDS = 60  # a test that takes longer hangs
RESTARTS = 60  # of processes, which end with a test that hangs or loses the CUDA context

BY_MMA = "cuda, position by mma.sync"


def steps(selection: Selection) -> list[str]:
    return ["cuda", f"{BY_MMA}, where the package takes wgmma"]


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Runs all tests marked ``cuda`` at once; their results are in tests.xml beside the state. Where position attention
    takes wgmma, its tests run again with mma.sync."""
    report = state.path.parent.resolve() / "tests.xml"
    if not state.step("tests", "cuda"):
        report.unlink(missing_ok=True)  # an interrupted run must not leave an earlier run's report
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", "cuda", f"--junitxml={report}", "--continue-on-collection-errors"]
    command += ["-W", "default"]  # a warning of this machine's torch is listed, but fails no test
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(PROCESSES), "--dist", "worksteal", f"--max-worker-restart={RESTARTS}"]
        # Ends the process, from a thread that needs no Python: the main one waits for the device.
        command += ["-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    environment = {"SEGATTN_TEST_BACKENDS": "cuda"}
    verdict = run_steps(state, "tests", {"cuda": command}, clock, environment)
    step = state.pieces.get("tests", {}).get("cuda")
    if step and report.exists():
        found = counts(report)
        print("  " + ", ".join(f"{number} {name}" for name, number in found.items()), flush=True)
        if step["status"] == "passed" and found["tests"] == found["skipped"]:
            step["status"], verdict = "failed", False  # tests without a device or kernels are skipped
            step["output"].append("no test ran: all were skipped")
        state.set_step("tests", "cuda", step.pop("status"), **(step | {"counts": found}))
        shorten(report)
    if state.machine.get("position_engine") == "wgmma":
        again = [word for word in command if not word.startswith("--junitxml=")] + ["-k", "position"]
        environment |= {"SEGATTN_CUDA_POSITION": "mma"}
        verdict = combined([verdict, run_steps(state, "tests", {BY_MMA: again}, clock, environment)])
    return verdict


def counts(report: Path) -> dict[str, int]:
    """The numbers of tests, failures, errors and skipped tests in a JUnit file."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    found = dict.fromkeys(names, 0)
    for suite in suites:
        found = {name: found[name] + int(suite.get(name, 0)) for name in names}
    return found
