"""``compare`` between two JSON files, and the exponents of ``scaling``."""

import copy
import json

import pytest

from benchmarks import compare, ops, report, run, scaling, statistics
from benchmarks.command_line import Refused
from benchmarks.workloads import Workload

MIB = 2**20


def cell(op: str, side: int, rival: str, seconds: float, memory: int = 8 * MIB, scatter: float = 0.01) -> dict:
    entry = run.record(Workload(op, side, side), rival, "measured")
    for kind, factor in (("forward", 1.0), ("forward_backward", 3.0)):
        entry[kind] = statistics.summary([seconds * factor * (1 + scatter * step) for step in (-1, 0, 1, -0.5, 0.5, 0)])
    return entry | {"memory": {"forward": MIB, "forward_backward": memory}, "rounds": 6, "ratio": {}, "drift": {}}


def content(**changes) -> dict:
    cells = [cell("position", 97, "fused", 0.2), cell("position", 97, "eager", 0.8), cell("channel", 97, "fused", 0.02)]
    return report.build("a command", "cpu", 2, cells) | changes


@pytest.fixture
def run_compare(tmp_path, capsys):
    def compared(old: dict, new: dict, *options: str) -> tuple[int, str]:
        for name, found in (("old", old), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(found, default=str))
        status = compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return compared


def slower(found: dict, factor: float, index: int = 0) -> dict:
    found = copy.deepcopy(found)
    for kind in report.PASSES:
        times = [time * factor for time in found["cells"][index][kind]["times"]]
        found["cells"][index][kind] = statistics.summary(times)
    return found


class TestCompare:
    def test_nothing_changed(self, run_compare):
        status, printed = run_compare(content(), content())
        assert status == 0
        assert "8 figures: 0 regression, 0 improvement, 8 level, 0 unclear" in printed
        assert "median 1.000" in printed and "| cell |" not in printed
        status, printed = run_compare(content(), content(), "--all")
        assert printed.count("| level |") == 8

    def test_a_regression(self, run_compare):
        status, printed = run_compare(content(), slower(content(), 1.3))
        assert status == 1
        assert "| position 97x97 float32 | forward | 1.300 | 1.274-1.326 | regression |" in printed
        assert "2 regression" in printed
        status, printed = run_compare(content(), slower(content(), 1.3), "--threshold", "40")
        assert status == 0 and "2 unclear" not in printed

    def test_an_improvement_is_none(self, run_compare):
        status, printed = run_compare(slower(content(), 2.0), content())
        assert status == 0 and "2 improvement" in printed

    def test_intervals_that_meet_are_no_regression(self, run_compare):
        old, new = content(), content()
        old["cells"][0] = cell("position", 97, "fused", 0.2, scatter=0.3)
        new["cells"][0] = cell("position", 97, "fused", 0.23, scatter=0.3)
        status, printed = run_compare(old, new)
        assert status == 0 and "2 unclear" in printed

    def test_one_pass_has_no_verdict(self, run_compare):
        old, new = content(), content()
        for found, seconds in ((old, 1.0), (new, 9.0)):
            for kind in report.PASSES:
                found["cells"][0][kind] = statistics.summary([seconds])
        status, printed = run_compare(old, new, "--all")
        assert status == 0 and "| 9.000 | one pass | unclear |" in printed

    def test_memory(self, run_compare):
        new = content()
        new["cells"][0]["memory"]["forward_backward"] += 4 * MIB
        status, printed = run_compare(content(), new)
        assert status == 1 and "| forward + backward memory | 1.500 |" in printed
        new["cells"][0]["memory"]["forward_backward"] = 8 * MIB + 4096
        assert run_compare(content(), new)[0] == 0

    def test_rivals_are_controls(self, run_compare):
        status, printed = run_compare(content(), slower(content(), 1.5, index=1))
        assert status == 0 and "new over old: median 1.500" in printed

    def test_a_cell_that_fails_now_is_a_regression(self, run_compare):
        new = content()
        new["cells"][2] |= {"status": "failed", "reason": "was killed"}
        status, printed = run_compare(content(), new)
        assert status == 1
        assert "regression: channel 97x97 float32 fused: measured in OLD; in NEW failed, was killed" in printed

    def test_another_machine_is_named(self, run_compare):
        new = content()
        new["machine"] = new["machine"] | {"processor": "another"}
        assert "The machines or versions differ" in run_compare(content(), new)[1]

    @pytest.mark.parametrize(
        ("old", "message"),
        [
            ({"cells": []}, "is no JSON of the benchmarks"),
            ({"schema": 1, "cells": []}, "must be of schema 2 (got 1)"),
            ({"schema": 2, "cells": []}, "has no cells"),
            ({"schema": 2, "cells": [{"paper": "CCNet"}]}, "is no JSON of the benchmarks with comparable cells"),
            ([], "is no JSON of the benchmarks"),
        ],
    )
    def test_other_files_are_refused(self, run_compare, old, message):
        status, printed = run_compare(old, content())
        assert status == 2 and message in printed

    def test_files_without_a_common_cell(self, run_compare):
        other = content() | {"cells": [cell("position", 64, "fused", 0.1)]}
        status, printed = run_compare(content(), other)
        assert status == 2 and "no measured cell of segattn_ops in common" in printed


class TestScaling:
    def test_the_exponent_of_a_power(self):
        positions = [256, 1024, 4096, 9409]
        found = scaling.exponent(positions, [3e-9 * n**1.5 for n in positions])
        assert [found[name] for name in ("exponent", "low", "high", "residual")] == pytest.approx([1.5, 1.5, 1.5, 1.0])
        values = [n**2 * factor for n, factor in zip(positions, (1, 1.1, 0.9, 1), strict=True)]
        noisy = scaling.exponent(positions, values)
        assert noisy["low"] < 2 < noisy["high"] and 1.05 < noisy["residual"] < 1.12

    @pytest.mark.parametrize(
        ("positions", "values"), [([1, 2], [1, 2]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [1, 0, 3])]
    )
    def test_too_little_to_fit(self, positions, values):
        with pytest.raises(ValueError, match="at least 3 sizes"):
            scaling.exponent(positions, values)

    def test_a_report_is_fitted(self, tmp_path, capsys):
        sides = (32, 48, 64, 96)
        cells = [cell("position", side, "fused", 1e-9 * side**4, memory=side**2 * 4096) for side in sides]
        cells += [cell("position", side, "eager", 1e-8 * side**4, memory=4 * side**4) for side in sides]
        cells += [cell("channel", side, "fused", 1e-7 * side**2, memory=MIB // 2) for side in sides]
        path = tmp_path / "report.json"
        report.write_json(report.build("a command", "cpu", 2, cells), path)
        assert scaling.main(["--report", str(path), "--output", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert printed == (tmp_path / "scaling.md").read_text()
        fits = json.loads((tmp_path / "scaling.json").read_text())["fits"]
        assert [fit["forward"]["exponent"] for fit in fits] == pytest.approx([2.0, 2.0, 1.0])
        assert [fit["memory"]["exponent"] for fit in fits[:2]] == pytest.approx([1.0, 2.0])
        assert "memory" not in fits[2]  # below a MiB
        assert [fit["definition"]["exponent"] for fit in fits] == pytest.approx([2.0, 2.0, 1.0])

    def test_too_few_sizes_are_refused(self, tmp_path, capsys):
        assert scaling.main(["--sizes", "8x8,8x9", "--ops", "position", "--output", str(tmp_path)]) == 2
        assert "at least 3 numbers of positions" in capsys.readouterr().err
        report.write_json(content(), tmp_path / "report.json")
        arguments = ["--report", str(tmp_path / "report.json"), "--output", str(tmp_path)]
        assert scaling.main(arguments) == 2
        assert "no op and rival was measured at 3 sizes" in capsys.readouterr().err


class TestResume:
    COMMAND = "python -m benchmarks ops --sizes 8x8"

    def written(self, tmp_path, **changes):
        path = tmp_path / "report.json"
        report.write_json(report.build(self.COMMAND, "cpu", 2, [], finished=False) | changes, path)
        return path

    def test_the_same_command_goes_on(self, tmp_path):
        assert ops.resumed(self.written(tmp_path), self.COMMAND)["cells"] == []
        assert ops.command_of(ops.PROG, ["--sizes", "8x8", "--resume"]) == self.COMMAND

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"finished": True}, "is complete"),
            ({"command": "python -m benchmarks ops"}, "the command of"),
            ({"sources": "0"}, "the sources of"),
            ({"cells": None, "finished": 0}, None),
        ],
    )
    def test_another_run_does_not(self, tmp_path, changes, message):
        path = self.written(tmp_path, **changes)
        if message is None:
            path.write_text("[]")
            message = "is no report of this version"
        with pytest.raises(Refused, match=message):
            ops.resumed(path, self.COMMAND)

    def test_nothing_to_resume(self, tmp_path):
        with pytest.raises(Refused, match="there is no"):
            ops.resumed(tmp_path / "report.json", self.COMMAND)
