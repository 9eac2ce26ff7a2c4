"""The GPU suite's memory: one JSON file, read at the start and written, atomically, after every result."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

from . import report
from .children import BUILD_TOOLS, ROOT
from .rivals import TITLES
from .run import record
from .workloads import Workload

SCHEMA = 1
# A cell with one of these is not tried again with the same sources on the same kind of device. "started" is no such
# status: the suite itself may have been stopped.
FINAL = ("measured", "skipped", "failed", "wrong", "crashed")
STARTS = 2  # a cell during which the suite ended as often as this is taken to have ended it
OUTPUT_LINES, OUTPUT_WIDTH = 60, 400


def key_of(entry: dict) -> str:
    """What identifies a cell in the JSON."""
    size = report.size_of(entry)
    return f"{entry['op']} {size} B={entry['batch']} {entry['dtype']} {entry['rival']}"


def fingerprint() -> str:
    """Of the sources that decide the figures, whether or not they are committed."""
    return BUILD_TOOLS["fingerprint"](ROOT, python=True)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class State:
    """Results of steps and cells. What was found with other sources, or on another kind of device, is not counted.

    Args:
        path: where it is written.
        resume: a file to start from where ``path`` does not exist yet.
        again: start from nothing.

    Raises:
        ValueError: for a file of another schema.
    """

    def __init__(self, path: Path, again: bool = False, resume: Path | None = None):
        self.path = path
        self.commit = report.commit()
        self.sources = fingerprint()
        source = path if path.exists() else resume
        stored = json.loads(source.read_text()) if source and not again else {}
        if stored and stored.get("schema") != SCHEMA:
            raise ValueError(
                f"{source} is of schema {stored.get('schema')}, this program writes {SCHEMA}: move it away"
            )
        self.pieces: dict[str, dict] = stored.get("pieces", {})
        self.cells: dict[str, dict] = {key_of(entry): entry for entry in stored.get("cells", [])}
        self.machine = stored.get("machine", {})
        self.commands: list[str] = stored.get("commands", [])

    @property
    def device(self) -> str | None:
        """What figures are comparable on: the GPU's name, or "cpu"; None while it is unknown."""
        return self.machine.get("gpu", self.machine.get("device"))

    def counts(self, entry: dict) -> bool:
        """Whether a record is of these sources and this kind of device."""
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
        """A cell's record, if it need not be tried again."""
        found = self.cells.get(key_of(record(workload, rival, "")))
        return found if found and self.counts(found) and found["status"] in FINAL else None

    def set_cell(self, entry: dict) -> None:
        self.cells[key_of(entry)] = self._mark(entry)
        self.save()

    def start_cell(self, workload: Workload, rival: str) -> bool:
        """Writes down that a cell starts, so that a suite that ends with it leaves a trace. False, and the cell
        crashed, where that happened :data:`STARTS` times."""
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
        """Why a rival is not tried at a workload: it failed at another one of the same op and dtype. Out of memory it
        would be at a larger one alone."""
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


def whole(verdicts: list[bool | None]) -> bool | None:
    """Of several parts: False if one failed, else None if one has more to do, else True."""
    return False if False in verdicts else None if None in verdicts else True
