"""docs/features.md: every cell of the table names a test that exists for its op."""

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "features.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its header."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


TABLE = rows("Feature and op")
TESTS = dict(rows("Tests")[2:])
REASONS = dict(rows("Why not")[2:])


@pytest.fixture(scope="module")
def collected(request) -> list[str]:
    """The ids of the tests in the files that the document names: those of this session, else collected anew."""
    files = sorted({pattern.partition("::")[0] for pattern in re.findall(r"`(tests/[^`]*)`", " ".join(TESTS.values()))})
    ids = [item.nodeid for item in request.session.items]
    if {name.partition("::")[0] for name in ids} >= set(files):
        return ids
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.splitlines()


def test_every_cell_names_its_test(collected):
    """A pattern's {op} is the column's name; a cell without a test gives a reason."""
    header, _, *features = TABLE
    missing = []
    for feature, *cells in features:
        assert len(cells) == len(header) - 1, feature
        for column, cell in zip(header[1:], cells, strict=True):
            keys = re.findall(r"\[([\w-]+)\]", cell)
            assert keys, f"{feature}, {column}: {cell!r} names neither a test nor a reason"
            for key in keys:
                if key in REASONS:
                    continue
                for pattern in re.findall(r"`(tests/[^`]*)`", TESTS[key]):
                    wanted = pattern.replace("{op}", column.strip("`")).replace("[", "[[]")
                    if not any(fnmatchcase(name, wanted) for name in collected):
                        missing.append(f"{feature}, {column}: {pattern}")
    assert missing == []


def test_every_key_is_used():
    used = {key for row in TABLE[2:] for cell in row[1:] for key in re.findall(r"\[([\w-]+)\]", cell)}
    assert used == set(TESTS) | set(REASONS)
