"""`python -m benchmarks.overhead`."""

import pytest
import torch

from benchmarks import overhead


def test_a_run(capsys):
    assert overhead.main(["--rounds", "1", "--calls", "1"]) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header == "| op | | forward, us | forward + backward, us |"
    cases = overhead.cases(2, 2, 8)
    assert len(rows) == sum(len(case.formulations) for case in cases)
    for row in rows:
        assert all(float(figure) > 0 for figure in row.strip("| ").split(" | ")[2:])


def test_formulations_that_disagree_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(overhead, "three_calls", lambda q, k, v: torch.zeros_like(v) * (q + k + v))
    assert overhead.main(["--rounds", "1", "--calls", "1"]) == 2
    assert "position_attention, (B, C, N): the formulations disagree" in capsys.readouterr().err


def test_the_median_of_interleaved_batches(monkeypatch):
    order = []
    clock = iter(range(1000))
    monkeypatch.setattr(overhead.time, "thread_time", lambda: next(clock))
    runs = {("op", "eager", mode): lambda: order.append(torch.is_grad_enabled()) for mode in overhead.MODES}
    timings = overhead.measure(runs, rounds=2, batch=3)
    assert order == [*[False] * 3, *[True] * 3] * 3
    assert list(timings.values()) == [1 / 3, 1 / 3]


def test_arguments(capsys):
    with pytest.raises(SystemExit) as exit:
        overhead.main(["--calls", "0"])
    assert exit.value.code == 2
    assert "must be a whole number" in capsys.readouterr().err
