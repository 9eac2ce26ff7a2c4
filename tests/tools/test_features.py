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
FURTHER = dict(rows("Further")[2:])
PATTERN = re.compile(r"`(tests/[^`]*)`")


@pytest.fixture(scope="module")
def collected(request) -> list[str]:
    """The ids of the tests in the files that the document names: those of this session, else collected anew."""
    named = " ".join([*TESTS.values(), *FURTHER.values()])
    files = sorted({pattern.partition("::")[0] for pattern in PATTERN.findall(named)})
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


def is_collected(pattern: str, collected: list[str]) -> bool:
    """Whether a test has this name, with or without parameters, or is in this file or class."""
    pattern = pattern.replace("[", "[[]")
    return any(fnmatchcase(name, end) for name in collected for end in (pattern, pattern + "::*", pattern + "[[]*"))


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
                for pattern in PATTERN.findall(TESTS[key]):
                    if not is_collected(pattern.replace("{op}", column.strip("`")), collected):
                        missing.append(f"{feature}, {column}: {pattern}")
    assert missing == []


def test_every_key_is_used():
    used = {key for row in TABLE[2:] for cell in row[1:] for key in re.findall(r"\[([\w-]+)\]", cell)}
    assert used == set(TESTS) | set(REASONS)


def test_further_features_name_their_tests(collected):
    missing = [
        f"{feature}: {cell}"
        for feature, cell in FURTHER.items()
        if not PATTERN.findall(cell) or not all(is_collected(p, collected) for p in PATTERN.findall(cell))
    ]
    assert missing == []
