"""The reliability page and the records that it is made from."""

import json

import pytest

from tools import reliability
from tools.reliability import Area, Run

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.ops.test_a" name="test_one" time="2.5"><properties>
<property name="inputs tried" value="40"/><property name="library" value="avx2"/></properties></testcase>
<testcase classname="tests.ops.test_a" name="test_two" time="0.5"><properties>
<property name="inputs tried" value="2"/></properties><failure message="no">no</failure></testcase>
<testcase classname="tests.ops.test_b" name="test_three" time="7"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_counts_are_summed_and_failures_named():
    assert reliability.outcome(REPORT) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "counts": {"inputs tried": 42},
        "failures": ["ops.test_a::test_two"],
    }


def test_the_slowest_come_first():
    assert reliability.outcome(REPORT, slowest=True)["slowest"] == [
        ["ops.test_b::test_three", 7.0],
        ["ops.test_a::test_one", 2.5],
        ["ops.test_a::test_two", 0.5],
    ]


@pytest.fixture
def area(tmp_path, monkeypatch) -> dict[str, Area]:
    """One area of two runs, on a test file of its own, with the records in a temporary folder."""
    test = tmp_path / "test_counted.py"
    test.write_text(
        "def test_right(record_property):\n    record_property('inputs tried', 3)\n\n"
        "def test_wrong(record_property):\n    record_property('inputs tried', 4)\n    assert False\n"
    )
    options = f"-q -p no:cacheprovider --rootdir={tmp_path} {test}"
    runs = (Run("right", f"{options} -k right"), Run("wrong", f"{options} -k wrong", environment={"A": "b c"}))
    areas = {"sample": Area("A sample", "What it is for.", runs)}
    monkeypatch.setattr(reliability, "AREAS", areas)
    monkeypatch.setattr(reliability, "RECORDS", tmp_path / "records")
    return areas


def test_runs_are_recorded_one_by_one(area):
    assert reliability.run_areas(["sample"], only="right") == []
    (record,) = reliability.load("sample")
    assert (record["title"], record["passed"], record["counts"]) == ("right", 1, {"inputs tried": 3})
    (bad,) = reliability.run_areas(["sample"], only="wrong")
    assert "test_wrong" in bad
    assert [record["title"] for record in reliability.load("sample")] == ["right", "wrong"]
    page = reliability.page()
    assert "| [A sample](#a-sample) | 7 inputs tried | 1 passed, 1 failed | 2 |" in page
    assert "A='b c' python -m pytest" in page
    assert "Failed in wrong: `test_counted::test_wrong`" in page


def test_a_run_without_a_report_is_an_error(area, monkeypatch):
    monkeypatch.setattr(reliability, "AREAS", {"sample": Area("A", "B", (Run("none", "--no-such-option"),))})
    with pytest.raises(RuntimeError, match="without a report"):
        reliability.run_areas(["sample"])


def test_the_page_is_made_from_the_records():
    assert reliability.PAGE.read_text() == reliability.page()


@pytest.mark.parametrize("name", reliability.AREAS)
def test_records_are_of_the_listed_runs(name):
    path = reliability.record_path(name)
    records = json.loads(path.read_text()) if path.exists() else []
    recorded = {record["title"]: record["command"] for record in records}
    listed = {run.title: run.command for run in reliability.AREAS[name].runs}
    assert recorded.items() <= listed.items()
