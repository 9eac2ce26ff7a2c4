"""The papers' costs: formulas against the published figures, counts against formulas, and cells that measure."""

import dataclasses
import json

import pytest
import torch

from benchmarks import measure, papers, papers_cell


@pytest.fixture(scope="module")
def rows() -> list[papers.Row]:
    return papers.all_rows()


def test_formulas_match_the_published_costs(rows):
    published = [row for row in rows if row.unit in ("GFLOP", "GMAC") and row.published]
    assert len(published) == 8
    for row in published:
        digits = f"{row.published:g}".partition(".")[2]
        assert row.formula == pytest.approx(row.published, abs=0.6 * 10 ** -len(digits)), row.name
        if row.name.startswith("APNB"):
            assert row.counted < row.formula
        else:
            assert row.counted == pytest.approx(row.formula, rel=2.5e-3), row.name  # no biases, no residual


def test_memory_of_the_non_local_block(rows):
    """The formula gives the paper's 1411 to the digit; the tracker sees three of the four maps."""
    (row,) = (row for row in rows if (row.name, row.unit) == ("Non-local", "MiB"))
    assert round(row.formula) == row.published == 1411
    attention_map = 4 * 9409**2 / papers.MIB
    assert row.formula - row.counted == pytest.approx(attention_map, rel=0.1)


def test_apnb_executes_less(rows):
    channels, inner = papers.ANN_CHANNELS
    for (height, width), row in zip(papers.ANN_PUBLISHED, (r for r in rows if r.name.startswith("APNB")), strict=True):
        n, keys = height * width, papers.ANN_KEYS
        macs = n * channels * inner + keys * channels * inner + 2 * n * keys * inner
        assert row.counted == pytest.approx(macs / 1e9, rel=1e-6)


def test_channel_attention_counts_half_of_its_energies(rows):
    (row,) = (row for row in rows if row.name.startswith("CAM") and row.unit == "GFLOP")
    assert row.counted == pytest.approx(3 * 512**2 * 128 * 256 / 1e9, rel=0.01)
    assert row.formula == pytest.approx(4 * 512**2 * 128 * 256 / 1e9, rel=0.01)


def test_every_figure_has_a_sentence(rows, tmp_path, capsys):
    assert all(row.note.endswith(".") or row.note == "As above." for row in rows)
    assert papers.main(["--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "papers.md").read_text()
    assert "| CCNet | Non-local | MiB | 1411 | 1411 |" in printed
    content = json.loads((tmp_path / "papers.json").read_text())
    assert (content["kind"], len(content["cells"])) == ("papers", len(rows))


def test_what_does_not_fit_is_not_started(rows, monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: 2**33)
    monkeypatch.setattr(papers_cell, "measured", lambda name, rival, backward, **options: 3 * papers.MIB)
    monkeypatch.setattr(papers_cell, "timed", lambda *names, **options: {"median": 5.0})
    fresh = [dataclasses.replace(row, measured={}) for row in rows]
    papers.measure_into(fresh, 1, "native")
    found = {(row.name, row.unit): row.measured for row in fresh if row.measured}
    assert found["Non-local", "MiB"] == {"eager": 3.0, "fused": 3.0}
    assert found["PAM 128 x 256", "MiB"]["eager"].startswith("needs 15.")
    assert found["PAM 128 x 256", "MiB"]["fused"] == 3.0
    assert found["NB / APNB, time", "x"]["fused"] == 5.0
    assert found["NB / APNB, memory", "x"]["fused"] == 1.0
    assert {unit for _, unit in found} == {"MiB", "x"}
    assert "| needs 15." in papers.markdown(fresh, "a command")


@pytest.mark.skipif(not measure.host_memory_is_measurable(), reason="needs Linux's /proc/self/clear_refs")
def test_cells_measure_the_blocks():
    """At 40 x 40 positions eager needs two to five attention maps more than what stores none, and is timed."""
    options = {"threads": 1, "backend": "reference", "size": (40, 40)}
    eager = papers_cell.measured("Non-local", "eager", backward=True, **options)
    features = 4 * 40 * 40 * (2 * 64 + 3 * 512)
    assert 2 * 4 * 1600**2 < eager - features < 5 * 4 * 1600**2 + 4 * 4 * 40 * 40 * 512
    forward = papers_cell.measured("Non-local", "eager", backward=False, **options)
    assert 0 < forward < eager
    ratio = papers_cell.timed("Non-local", "RCCA, R = 2", "eager", **options)
    assert ratio["median"] > 0 and ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize("name", papers_cell.BLOCKS)
def test_blocks_keep_the_shape_of_their_input(name):
    make, shape = papers_cell.BLOCKS[name]
    x = torch.randn(*shape[:2], 4, 6)
    with torch.no_grad():
        assert make().eval()(x).shape == x.shape
