"""Draws calls for a property until their number or the time is spent, and keeps a call for which it does not hold."""

import hashlib
import json
import os
import secrets
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis.strategies import SearchStrategy

import segattn_ops

from ..backends import Backend
from .calls import Call, settings

REGRESSIONS = Path(__file__).parents[1] / "regressions"

# In `make test` the calls are always the same ones. In `make fuzz` (SEGATTN_FUZZ_MINUTES) rounds of calls with other
# seeds follow each other.
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}
hypothesis.settings.register_profile("suite", phases=(Phase.generate,), **COMMON)
hypothesis.settings.register_profile(
    "fuzz", phases=(Phase.generate, Phase.target, Phase.shrink), print_blob=True, **COMMON
)
ROUND = 50

MINUTES = os.environ.get("SEGATTN_FUZZ_MINUTES")
SEED = int(os.environ.get("SEGATTN_FUZZ_SEED", secrets.randbits(31) if MINUTES else 0))


class TimeBox:
    """Divides the time of `make fuzz` among the tests that are left, by their weights."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.weights: dict[str, float] = {}

    def add(self, test: str, weight: float) -> None:
        self.weights[test] = weight

    def end_of(self, test: str) -> float:
        """When the test must end. It is no longer counted afterwards."""
        left = sum(self.weights.values())
        share = self.weights.pop(test) / left
        now = time.monotonic()
        return now + share * max(0.0, self.end - now)


class Explorer:
    """For one test. A property is a function of a call and the data under which it must hold."""

    def __init__(self, request: pytest.FixtureRequest, backend: Backend, box: TimeBox | None) -> None:
        self.name = request.node.originalname.removeprefix("test_")
        self.nodeid = request.node.nodeid
        self.request = request
        self.backend = backend
        self.box = box
        self.tried: Counter[str] = Counter()

    def __call__(self, calls: SearchStrategy[Call], holds: Callable[[Call], None], examples: int) -> None:
        failing: list[Call] = []

        def attempt(call: Call) -> None:
            self.tried[call.op] += 1
            try:
                with settings(call, self.backend):
                    holds(call)
            except Exception:
                failing.append(call)
                raise

        try:
            if self.box is None:
                self._round(calls, attempt, "suite", zlib.crc32(self.nodeid.encode()), examples)
            else:
                end = self.box.end_of(self.nodeid)
                number = 0
                while number == 0 or time.monotonic() < end:
                    seed = zlib.crc32(f"{SEED} {self.nodeid} {number}".encode())
                    self._round(calls, attempt, "fuzz", seed, ROUND)
                    number += 1
        except Exception:
            if failing and self.box is not None:
                print(f"kept in {keep(self.name, self.backend, failing[-1])}")
            raise
        finally:
            self._record()

    def _round(self, calls, attempt, profile: str, seed: int, examples: int) -> None:
        chosen = hypothesis.settings(hypothesis.settings.get_profile(profile), max_examples=examples)

        def run(call: Call) -> None:
            attempt(call)

        hypothesis.seed(seed)(chosen(given(call=calls)(run)))()

    def _record(self) -> None:
        total = sum(self.tried.values())
        counts = {"inputs tried": total, f"inputs tried by {self.backend.name}": total}
        counts |= {f"inputs tried of {op}": count for op, count in self.tried.items()}
        # What record_property does, without its warning about the schema of JUnit's files.
        self.request.node.user_properties.extend(counts.items())


def keep(name: str, backend: Backend, call: Call) -> Path:
    """Writes a failing call, for tests/regressions/test_regressions.py."""
    kept = {
        "property": name,
        "backends": [backend.name],
        "instruction_set": segattn_ops.build_config()["cpu"]["instruction_set"],
        "call": call.to_json(),
    }
    text = json.dumps(kept, indent=2) + "\n"
    path = REGRESSIONS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
    path.write_text(text)
    return path
