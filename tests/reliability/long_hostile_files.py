"""More hostile files than `make test` opens: ``pytest tests/reliability/long_hostile_files.py``. SEGATTN_HOSTILE_FILES
is the number of mutations of each kind, SEGATTN_HOSTILE_SEED the first seed."""

import os

import pytest

from ..modules.hostile_process import opened

COUNT = int(os.environ.get("SEGATTN_HOSTILE_FILES", "10000"))
SEED = int(os.environ.get("SEGATTN_HOSTILE_SEED", "0"))
PARTS = 4


@pytest.mark.parametrize("kind", ["checkpoints", "pictures"])
@pytest.mark.parametrize("part", range(PARTS))
def test_hostile_files(kind, part, tmp_path, record_property) -> None:
    found = opened(kind, SEED + part, max(COUNT // PARTS, 1), tmp_path)
    record_property("files opened", found["tried"])
    record_property("inputs tried", found["tried"])
    if kind == "checkpoints":
        record_property("code run", found["ran"])
    assert not found["faults"]
