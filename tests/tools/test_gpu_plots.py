"""Pictures of the GPU suite's JSON, from a file with known figures."""

import json

import pytest

from benchmarks import ceilings, measure, rivals, run
from benchmarks.gpu import plots
from benchmarks.gpu.selection import FAMILIES
from benchmarks.workloads import OPS, Workload

CEILINGS = {
    "copy_bytes_per_second": 4e12,
    "matmul_bfloat16_flop_per_second": 700e12,
    "matmul_float16_flop_per_second": 650e12,
    "matmul_float32_flop_per_second": 50e12,
    "matmul_tf32_flop_per_second": 390e12,
}
SLOWNESS = {"fused": 2.0, "sdpa_efficient": 4.0, "sdpa_flash_split": 3.0, "flex": 3.5, "compile": 6.0, "eager": 9.0}
SIZES = ((64, 64), (97, 97), (128, 128), (128, 256))


def entry(workload: Workload, rival: str, forward: float, backward: float, **changes) -> dict:
    def timing(seconds):
        return {"median": seconds, "spread": 0.0, "seconds": [seconds]}

    return run.record(workload, rival, "measured") | {
        "forward": timing(forward),
        "backward": timing(backward),
        "forward_backward": timing(forward + backward),
        "commit": "0123456789ab",
        "sources": "now",
        "date": "2026-01-02T00:00:00+00:00",
        **changes,
    }


def cells_of(workload: Workload, names=tuple(SLOWNESS)) -> list[dict]:
    """Rivals at fixed multiples of the bound."""
    record = run.record(workload, "fused", "measured")
    least = [plots.bound(record, kind, CEILINGS)[0] for kind in plots.KINDS]
    names = [name for name in names if workload.op in rivals.APPLICABLE[name]]
    return [entry(workload, name, least[0] * SLOWNESS[name], 1.5 * least[1] * SLOWNESS[name]) for name in names]


def content(cells: list[dict]) -> dict:
    machine = {"gpu": "a GPU", "torch": "2.11.0"}
    return {"schema": 1, "machine": machine, "pieces": {"ceilings": {"device": CEILINGS}}, "cells": cells}


def whole_run() -> dict:
    cells = []
    for family, ops in FAMILIES.items():
        for op in ops:
            once = op in ("rcca", "non_local", "ann")
            for dtype in ("bfloat16",) if once else ("bfloat16", "float32", "float16"):
                for batch in (8, 1):
                    for size in SIZES[1:2] if once else SIZES:
                        cells += cells_of(Workload(op, *size, dtype, batch))
        assert cells, family
    return content(cells)


class TestFigures:
    def test_workloads_of_records(self):
        for op in OPS:
            workload = Workload(op, 6, 5, "float16", 2, 24, 64 if op in ("channel", "non_local", "ann") else 4)
            assert Workload.of(run.record(workload, "fused", "measured")) == workload

    def test_least_bytes(self):
        forward, backward = Workload("position", 97, 97, "bfloat16", 8).least_bytes()
        assert forward == 2 * 8 * 9409 * (64 + 64 + 512 + 512)
        assert backward == 2 * 8 * 9409 * (2 * (64 + 64 + 512) + 512)

    def test_the_bound_is_the_larger_of_two(self):
        position = run.record(Workload("position", 97, 97, "bfloat16", 8), "fused", "measured")
        least, by = plots.bound(position, "backward", CEILINGS)
        assert (least, by) == (pytest.approx(2 * 8 * 101.99e9 / 700e12, rel=1e-3), "FLOP")
        crossed = run.record(Workload("criss_cross", 97, 97, "bfloat16", 8), "fused", "measured")
        least, by = plots.bound(crossed, "forward", CEILINGS)
        assert (least, by) == (pytest.approx(2 * 8 * 9409 * 1152 / 4e12), "bytes")
        assert plots.bound(position, "forward", {}) is None

    def test_float32_ceiling_includes_three_tf32_products(self):
        assert plots.flop_ceiling(CEILINGS, "float32") == 130e12
        assert plots.flop_ceiling(CEILINGS | {"matmul_tf32_flop_per_second": 90e12}, "float32") == 50e12
        assert plots.flop_ceiling(CEILINGS, "float64") is None

    def test_names_of_the_ceilings(self, monkeypatch):
        """The names of the ceilings in the JSON, from the function that measures them, on small tensors."""
        import torch

        monkeypatch.setattr(measure, "DeviceTimer", lambda device: lambda function: function() is None or 1.0)
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *shape, device: randn([2] * len(shape)))
        found = ceilings.reached(torch.device("cpu"), "small")
        for dtype in ("bfloat16", "float16", "float32"):
            assert plots.flop_ceiling(found, dtype)
        assert set(found) == set(CEILINGS)

    def test_other_sources_are_left_out(self):
        workload = Workload("channel", 97, 97)
        old = entry(workload, "eager", 1.0, 1.0, sources="before", date="2026-01-01T00:00:00+00:00")
        new = entry(workload, "fused", 1.0, 1.0)
        skipped = run.record(workload, "compile", "skipped", "why")
        assert plots.current_cells(content([old, new, skipped])) == [new]
        assert plots.current_cells(content([skipped])) == []
        other_device = entry(workload, "eager", 1.0, 1.0, device="another", date="2026-01-01T00:00:00+00:00")
        assert plots.current_cells(content([other_device, new])) == [new]


@pytest.fixture
def drawn(monkeypatch):
    """Collects the axes of every figure by file name instead of writing files."""
    seen = {}

    def keep(figure, axes, path, heading):
        seen[path.name] = axes.flat[0], axes.flat[1], heading
        return path

    monkeypatch.setattr(plots, "finish", keep)
    return seen


def points(ax) -> dict[str, list[tuple[float, float]]]:
    return {
        c.get_label(): [tuple(xy) for xy in c.get_offsets().tolist()] for c in ax.collections if len(c.get_offsets())
    }


class TestPictures:
    def test_figures_and_positions(self, drawn, tmp_path):
        near, far = Workload("position", 97, 97, "bfloat16", 8), Workload("position", 128, 128, "bfloat16", 8)
        plots.draw(content(cells_of(far) + cells_of(near, ("eager", "fused"))), tmp_path)
        assert set(drawn) == {"position-throughput.png", "position-rivals.png", "position-bound.png"}
        forward, backward, heading = drawn["position-throughput.png"]
        assert "a GPU" in heading
        assert "0123456789ab" in heading
        labels = [text.get_text() for text in forward.get_yticklabels()]
        assert labels == ["position bfloat16 B=8  97x97", "position bfloat16 B=8  128x128"]
        assert points(forward)["segattn_ops"] == [(pytest.approx(350), 0), (pytest.approx(350), 1)]
        assert points(backward)["eager"] == [(pytest.approx(700 / 13.5), 0), (pytest.approx(700 / 13.5), 1)]
        forward, backward, _ = drawn["position-rivals.png"]
        assert points(forward)["eager"] == [(pytest.approx(4.5), 0), (pytest.approx(4.5), 1)]
        assert points(backward)["SDPA flash, split"] == [(pytest.approx(1.5), 1)]
        assert "segattn_ops" not in points(forward)
        forward, backward, _ = drawn["position-bound.png"]
        assert points(forward) == {"bound by FLOP": [(pytest.approx(2), 0), (pytest.approx(2), 1)]}
        assert points(backward) == {"bound by FLOP": [(pytest.approx(3), 0), (pytest.approx(3), 1)]}

    def test_times_that_include_the_host_are_hollow(self, drawn, tmp_path):
        cells = cells_of(Workload("channel", 97, 97, "bfloat16"), ("fused", "eager"))
        cells[1]["host_exposed"] = ["forward"]
        plots.draw(content(cells), tmp_path)
        forward, backward, _ = drawn["channel-rivals.png"]
        assert set(points(forward)) == {plots.HOLLOW}
        assert {"eager", plots.HOLLOW} <= set(forward.get_legend_handles_labels()[1])
        assert set(points(backward)) == {"eager"}
        assert set(points(drawn["channel-bound.png"][0])) == {"bound by FLOP"}

    def test_missing_figures_are_not_drawn(self, drawn, tmp_path):
        workload = Workload("criss_cross", 97, 97, "float64")
        alone = content([entry(workload, "fused", 1e-3, 2e-3)])
        plots.draw(alone, tmp_path)  # no rival, and no ceiling for its dtype
        assert set(drawn) == {"criss-cross-throughput.png"}

    def test_the_command(self, tmp_path, capsys):
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps(whole_run()))
        assert plots.main([str(path)]) == 0
        names = {f"{family}-{kind}.png" for family in FAMILIES for kind in ("throughput", "rivals", "bound")}
        assert {picture.name for picture in tmp_path.glob("*.png")} == names
        assert all((tmp_path / name).stat().st_size > 20_000 for name in names)
        assert len(capsys.readouterr().out.splitlines()) == len(names)

    def test_the_legend_of_all_rivals_fits(self, tmp_path, monkeypatch):
        from matplotlib import pyplot

        figures = []
        monkeypatch.setattr(pyplot, "close", figures.append)
        workload = Workload("position", 97, 97, "bfloat16", 8)
        cells = [entry(workload, name, 1e-3, 2e-3, host_exposed=["forward"]) for name in rivals.RIVALS]
        plots.draw(content(cells), tmp_path)
        monkeypatch.undo()
        assert len(figures) == 3
        for figure in figures:
            (legend,) = figure.legends
            box = legend.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            pyplot.close(figure)

    def test_nothing_to_draw(self, tmp_path, capsys):
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps(content([])))
        assert plots.main([str(path)]) == 1
        assert "no measured cells" in capsys.readouterr().err

    def test_other_files_are_refused_in_a_line(self, tmp_path, capsys):
        path = tmp_path / "gpu.json"
        for text, message in [
            ('{"schema": 7, "pieces": {}}', "is of schema 7"),
            ("[]", "is not a result of benchmarks.gpu_suite"),
            ("{", "is not JSON"),
            ('{"schema": 1, "pieces": {}, "cells": [{}]}', "has a cell that benchmarks.gpu_suite did not write"),
            ('{"schema": 1, "pieces": {}, "cells": [7]}', "has a cell that benchmarks.gpu_suite did not write"),
        ]:
            path.write_text(text)
            assert plots.main([str(path)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line
        for arguments in ([str(tmp_path / "missing.json")], [str(tmp_path)]):
            assert plots.main(arguments) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1
        path.write_text(json.dumps(content([])))
        assert plots.main([str(path), "--output", str(path)]) == 2
        assert "cannot be made" in capsys.readouterr().err
