"""The suite's results: one JSON file, read at the start and replaced atomically after every result."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

from tools.compilers import ROOT, build_tools

from .. import report
from ..rivals import TITLES
from ..run import record
from ..workloads import Workload

SCHEMA = 1
# A cell with one of these is not run again with the same sources on the same kind of device. "started" is not final:
# the suite itself may have been stopped.
FINAL = ("measured", "skipped", "failed", "wrong", "crashed")
STARTS = 2  # a cell is recorded as crashed after the suite has ended this often while it ran
OUTPUT_LINES, OUTPUT_WIDTH = 60, 400


def key_of(entry: dict) -> str:
    """The key of a cell in the JSON."""
    size = report.size_of(entry)
    return f"{entry['op']} {size} B={entry['batch']} {entry['dtype']} {entry['rival']}"


def fingerprint() -> str:
    """The fingerprint of all sources that affect the figures, committed or not."""
    return build_tools.fingerprint(ROOT, python=True)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read(path: Path) -> dict:
    """The content of a file of the suite.

    Raises:
        ValueError: it is no such file, or of another schema.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of decoding the text or the JSON
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("cells", []), list) or "schema" not in content:
        raise ValueError(f"{path} is not a result of benchmarks.gpu_suite")
    if content["schema"] != SCHEMA:
        raise ValueError(f"{path} is of schema {content['schema']}, this program reads {SCHEMA}")
    if "pieces" not in content:  # `python -m benchmarks` numbers its own schema
        raise ValueError(f"{path} is not a result of benchmarks.gpu_suite")
    return content


class State:
    """Results of steps and cells. Those of other sources or another kind of device do not count.

    Args:
        path: the JSON file.
        resume: the file to start from if ``path`` does not exist.
        again: ignore existing results.

    Raises:
        ValueError: as :func:`read`.
    """

    def __init__(self, path: Path, again: bool = False, resume: Path | None = None):
        self.path = path
        self.commit = report.commit()
        self.sources = fingerprint()
        source = path if path.exists() else resume
        stored = read(source) if source and not again else {}
        self.pieces: dict[str, dict] = stored.get("pieces", {})
        self.cells: dict[str, dict] = {key_of(entry): entry for entry in stored.get("cells", [])}
        self.machine = stored.get("machine", {})
        self.commands: list[str] = stored.get("commands", [])

    @property
    def device(self) -> str | None:
        """The device on which figures are comparable: the GPU's name, or "cpu"; None while unknown."""
        return self.machine.get("gpu", self.machine.get("device"))

    def counts(self, entry: dict) -> bool:
        """Whether a record belongs to these sources and this kind of device."""
        return entry.get("sources") == self.sources and (self.device is None or entry.get("device") == self.device)

    def _mark(self, entry: dict) -> dict:
        return entry | {"commit": self.commit, "sources": self.sources, "device": self.device, "date": _now()}

    def step(self, piece: str, name: str) -> dict | None:
        """A step's result, if it passed."""
        found = self.pieces.get(piece, {}).get(name)
        return found if found and self.counts(found) and found["status"] == "passed" else None

    def set_step(self, piece: str, name: str, status: str, **facts) -> None:
        if "output" in facts:
            facts["output"] = [line[:OUTPUT_WIDTH] for line in facts["output"][-OUTPUT_LINES:]]
        self.pieces.setdefault(piece, {})[name] = self._mark({"status": status, **facts})
        self.save()

    def cell(self, workload: Workload, rival: str) -> dict | None:
        """A cell's record, if it is final."""
        found = self.cells.get(key_of(record(workload, rival, "")))
        return found if found and self.counts(found) and found["status"] in FINAL else None

    def set_cell(self, entry: dict) -> None:
        self.cells[key_of(entry)] = self._mark(entry)
        self.save()

    def start_cell(self, workload: Workload, rival: str) -> bool:
        """Records that a cell starts, in case the suite ends with it. After :data:`STARTS` such ends the cell is
        recorded as crashed, and the result is False."""
        entry = record(workload, rival, "started", "the suite ended while it ran")
        found = self.cells.get(key_of(entry), {})
        earlier = found.get("starts", 0) if self.counts(found) and found["status"] == "started" else 0
        if earlier >= STARTS:
            reason = f"the suite ended {earlier} times while it ran"
            self.set_cell(entry | {"status": "crashed", "reason": reason})
            return False
        self.set_cell(entry | {"starts": earlier + 1})
        return True

    def refusal(self, workload: Workload, rival: str) -> str | None:
        """Why a rival is skipped at a workload, or None: it failed at another one of the same op and dtype; where it
        ran out of memory, at one that was not larger."""
        for entry in self.cells.values():
            same = (entry["op"], entry["dtype"], entry["rival"]) == (workload.op, workload.dtype, rival)
            if not same or not self.counts(entry) or entry["status"] not in ("failed", "crashed"):
                continue
            larger = workload.positions * workload.batch >= entry["positions"] * entry["batch"]
            if larger or not entry["reason"].startswith("out of memory"):
                where = f"{report.size_of(entry)} B={entry['batch']}"
                return f"{TITLES[rival]} {entry['status']} at {where}: {entry['reason']}"
        return None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "commands": self.commands,
            "machine": self.machine,
            "pieces": self.pieces,
            "cells": list(self.cells.values()),
        }
        report.write_json(content, self.path)


class Clock:
    """The time limit of one invocation."""

    def __init__(self, limit: float):
        self.end = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def combined(verdicts: list[bool | None]) -> bool | None:
    """False if one part failed, else None if one is unfinished, else True."""
    return False if False in verdicts else None if None in verdicts else True
