"""The page of `python -m benchmarks report`, and the plots: from files with known figures."""

import dataclasses
import html.parser
import json
import re

import pytest

from benchmarks import (
    ceilings,
    command_line,
    drawing,
    page,
    page_blocks,
    page_ops,
    papers,
    plots,
    report,
    rivals,
    roofline,
    run,
    scaling,
    statistics,
    workloads,
)
from benchmarks.__main__ import main
from benchmarks.ops import parser as ops_parser
from benchmarks.workloads import Workload

MIB = 2**20
SIZES = ((32, 32), (64, 64), (97, 97), (128, 256))
MACHINE = {
    "processor": "A processor <4 GHz>",
    "threads": 2,
    "memory_bytes": 16 * 2**30,
    "torch": "2.14.1",
    "python": "3.11",
    "device": "cpu",
}
CEILINGS = {"copy_bytes_per_second": 2e10, "matmul_float32_flop_per_second": 3e11}
FACTORS = {"fused": 1.0, "eager": 3.0, "sdpa": 2.5, "compile": 1.0}  # of the time of 200 GFLOP/s


def cell(op: str, height: int, width: int, rival: str, factor: float, dtype: str = "float32") -> dict:
    """A measured cell of six rounds, which differ by a fortieth."""
    workload = Workload(op, height, width, dtype)
    seconds = [factor * flop / 2e11 for flop in workloads.flops(workload)]
    entry = run.record(workload, rival, "measured") | {"rounds": 6, "errors": {"output": 1e-6, "energy": 0.0}}
    for kind, median in zip(("forward", "forward_backward"), seconds, strict=True):
        entry[kind] = statistics.summary([median * (1 + 0.005 * i) for i in range(6)])
    maps = workloads.attention_map_bytes(workload) if rival == "eager" else MIB
    if rival != "fused":
        low, high = 0.99 * factor, 1.01 * factor
        found = {"median": factor, "low": low, "high": high, "verdict": statistics.verdict(low, high)}
        entry["ratio"] = dict.fromkeys(plots.KINDS, found)
    else:
        entry["ratio"] = {}
    return entry | {"memory": {"forward": MIB, "forward_backward": 4 * maps}}


def ops_content(ops: tuple[str, ...] = ("position", "channel", "criss_cross"), sizes=SIZES) -> dict:
    cells = []
    for height, width in sizes:
        for op in ops:
            for rival, factor in FACTORS.items():
                if op not in rivals.APPLICABLE[rival]:
                    continue
                if op == "position" and (height, width) == (128, 256) and rival == "eager":
                    workload = Workload(op, height, width)
                    cells.append(
                        run.record(workload, rival, "skipped", "would not fit: needs 16.5 GiB, 9.0 GiB available")
                    )
                else:
                    cells.append(cell(op, height, width, rival, factor))
    return {
        "schema": 2,
        "kind": "ops",
        "date": "2026-11-28T05:00:00+00:00",
        "command": "python -m benchmarks --sizes 32x32,64x64 --output elsewhere --budget=60 --threads 2 --repeats 6",
        "commit": "0123456789ab",
        "machine": MACHINE,
        "ceilings": CEILINGS,
        "cells": cells,
    }


class Reader(html.parser.HTMLParser):
    """The tags, what they refer to, and the text of a page; raises for tags that are not closed in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "circle", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.references, self.ids, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a run, with an attention picture."""
    from PIL import Image

    path = tmp_path_factory.mktemp("report")
    (path / "report.json").write_text(json.dumps(ops_content()))
    Image.new("RGB", (2000, 300), "white").save(path / "attention.png")
    return path


@pytest.fixture(scope="module")
def text(folder):
    assert main(["report", str(folder / "report.json")]) == 0
    return (folder / "report.html").read_text()


class TestPage:
    def test_is_whole_and_asks_for_nothing(self, text):
        reader = Reader(text)
        outside = [value for value in reader.references if not value.startswith(("#", "data:image/jpeg;base64,"))]
        assert outside == []
        assert not re.search(r"@import|url\((?!#)|<script", text)
        assert len(set(reader.ids)) == len(reader.ids)
        anchors = [value[1:] for value in reader.references if value.startswith("#")]
        assert set(anchors) <= set(reader.ids)

    def test_pictures_are_in_the_order_of_their_captions(self, tmp_path):
        from PIL import Image

        content = ops_content() | {"captions": {"attention_b.png": "First.", "attention_a.png": "Second."}}
        (tmp_path / "report.json").write_text(json.dumps(content))
        for name in ("attention.png", "attention_a.png", "attention_b.png"):
            Image.new("RGB", (20, 30), "white").save(tmp_path / name)
        assert main(["report", str(tmp_path / "report.json")]) == 0
        text = (tmp_path / "report.html").read_text()
        assert text.index("First.") < text.index("Second.") < text.index(">attention<")

    def test_text_of_a_file_is_escaped(self, text):
        assert "A processor &lt;4 GHz&gt;" in text
        assert "<4 GHz>" not in text

    def test_shows_every_cell_and_why_one_did_not_run(self, text):
        words = " ".join(Reader(text).text)
        assert "would not fit: needs 16.5 GiB" in words
        for op in ("position", "channel", "criss_cross"):
            assert words.count(workloads.TITLES[op]) >= 2
        for heading in ("What was run", "Roofline", "Attention", "Every op in numbers"):
            assert heading in words

    def test_the_summary_has_the_figures(self, text):
        summary = page_ops.summary(ops_content())
        assert "3 times as fast as eager forward + backward (3 forward)" in summary[0]
        assert "4 MiB of extra memory against 1.32 GiB of eager" in summary[0]
        assert summary[0] in " ".join(Reader(text).text)
        counted = next(line for line in summary if line.startswith("Of "))
        # two passes of eager in 11 cells and of SDPA in 4; compile in 12 is level
        assert (
            counted
            == "Of 54 comparisons with rivals (every size, each pass), segattn_ops is faster in 30, level in 24."
        )

    def test_a_figure_of_one_pass_is_about(self):
        content = ops_content(("position",), sizes=((97, 97),))
        for entry in content["cells"]:
            for found in entry["ratio"].values():
                found |= {"low": None, "high": None, "verdict": "unclear"}
        assert "about 3 times as fast as eager" in page_ops.summary(content)[0]

    def test_a_file_of_another_program_is_refused(self, tmp_path, capsys):
        path = tmp_path / "other.json"
        path.write_text("[]")
        assert main(["report", str(path)]) == 2
        assert "was not written by `python -m benchmarks`" in capsys.readouterr().err
        path.write_text("{")
        assert main(["report", str(path)]) == 2
        assert "is no JSON" in capsys.readouterr().err
        path.write_text(json.dumps(ops_content() | {"cells": [{"op": "position"}]}))
        assert main(["report", str(path)]) == 2
        assert "a cell was not written" in capsys.readouterr().err
        assert main(["report", str(tmp_path / "missing.json")]) == 2

    def test_a_kind_without_sections_of_its_own_has_a_table(self, tmp_path):
        content = ops_content() | {
            "kind": "other",
            "cells": [{"name": "a", "value": 1.5}, {"name": "b", "value": None}],
        }
        words = Reader(page.render([(tmp_path / "other.json", content)])).text
        assert "1.5" in words and "b" in words

    def test_fits_have_a_table_and_curves(self, tmp_path):
        content = ops_content() | {"kind": "scaling"}
        content["fits"] = scaling.fits(content["cells"])
        words = " ".join(Reader(page.render([(tmp_path / "scaling.json", content)])).text)
        assert "How time and memory grow" in words and "2.00 (2.00 to 2.00)" in words

    def test_papers_have_their_table_and_notes(self, tmp_path):
        rows = papers.ccnet_rows()
        content = ops_content() | {"kind": "papers", "cells": [dataclasses.asdict(row) for row in rows]}
        words = " ".join(Reader(page.render([(tmp_path / "papers.json", content)])).text)
        assert "The papers' costs" in words and "1411" in words
        assert all(row.note in words for row in rows if row.note != "As above.")


class TestCommands:
    def test_options_are_replaced(self):
        command = command_line.reproduce(
            "python -m benchmarks --sizes 1x1 --output=a --seed 3 --resume", sizes="2x2", key_channels="8"
        )
        assert command == "python -m benchmarks --seed 3 --sizes 2x2 --key-channels 8 --budget 0"

    def test_those_of_the_page_can_be_parsed(self, text):
        found = [html.unescape(found) for found in re.findall(r"<pre>(python -m benchmarks .*?)</pre>", text)]
        assert len(found) > 12
        for command in found:
            arguments = ops_parser().parse_args(command.split()[3:])
            assert arguments.repeats == 6 and arguments.threads == 2
        rows = ops_parser().parse_args(page_ops.command_of(ops_content(), ops_content()["cells"][:2]).split()[3:])
        assert rows.ops == ("position",) and rows.rivals == ("fused", "eager") and rows.sizes == [(32, 32)]


class TestVerdicts:
    def test_losses_are_named(self):
        cells = [cell("position", 32, 32, "fused", 1.0), cell("position", 32, 32, "sdpa", 0.5)]
        counts, losses = page_ops.verdicts(cells)
        assert counts == {"slower": 2}
        assert losses[0] == "SDPA needs 0.50 of the time for position float32 forward at 32x32"

    def test_a_rival_without_a_backward_is_shown(self, tmp_path):
        content = ops_content(("position",))
        for entry in content["cells"]:
            if entry["rival"] == "compile":
                entry["rival"] = "onnxruntime"
                for figures in (entry, entry["memory"], entry["ratio"]):
                    del figures["forward_backward"]
        (line, *_) = page_ops.summary(content)
        assert "level with ONNX Runtime forward" in line and "(1 forward)" not in line
        words = " ".join(Reader(page.render([(tmp_path / "report.json", content)])).text)
        assert words.count("ONNX Runtime") >= 4 + len(SIZES)


class TestPlots:
    def test_every_rival_has_its_own_style(self):
        assert set(drawing.COLOURS) == set(drawing.MARKERS) == set(rivals.TITLES)
        styles = [(drawing.COLOURS[name], drawing.MARKERS[name]) for name in rivals.TITLES]
        assert len(set(styles)) == len(styles)
        assert set(drawing.MARKERS.values()) <= set(page_blocks.SIGNS)

    def test_an_svg_takes_the_colours_of_the_page(self):
        entries = [entry for entry in ops_content()["cells"] if entry["op"] == "position"]
        drawn = drawing.svg(plots.memory_panel(("position", "float32", 1), entries))
        assert drawing.INK not in drawn and drawing.FAINT not in drawn
        assert "currentColor" in drawn and "var(--faint)" in drawn
        assert all(f"{card} GB" in drawn for card in plots.CARDS)
        width = re.match(r"<svg[^>]*>", drawn)[0]
        assert "viewBox" in width and " width=" not in width and " height=" not in width

    def test_the_end_of_each_line_has_its_number(self):
        entries = [entry for entry in ops_content()["cells"] if entry["op"] == "channel"]
        drawn = drawing.svg(plots.time_panel(("channel", "float32", 1), entries, "forward"))
        for rival in ("fused", "eager"):
            last = [entry for entry in entries if entry["rival"] == rival][-1]
            assert f">{last['forward']['median'] * 1e3:.0f}</text>" in drawn

    def test_memory_beyond_the_measured_sizes_is_that_of_the_formula(self):
        entries = [entry for entry in ops_content()["cells"] if entry["op"] == "position"]
        positions, values = plots._by_formula(entries)
        assert positions == [128 * 256, 256 * 256, 256 * 512]
        skipped = next(entry for entry in entries if entry["status"] == "skipped")
        assert values[0] == skipped["needed_extra_bytes"]

    @pytest.mark.parametrize("ops", [("position",), ("position", "channel", "criss_cross")])
    def test_the_grids_are_readable(self, ops, tmp_path):
        """Two panels side by side at most: on a page of 900 pixels their text is of 9 points."""
        from PIL import Image

        records = ops_content(ops)["cells"]
        for draw in (plots.draw_time, plots.draw_memory):
            path = draw(records, tmp_path / "picture.png")
            assert Image.open(path).width <= 2 * drawing.PANEL[0] * 150 + 1
        assert plots.draw_time([], tmp_path / "none.png") is None

    def test_roof(self):
        entry = cell("position", 97, 97, "fused", 1.0)
        assert roofline.roof(entry, CEILINGS) == 3e11  # thousands of FLOP a byte
        slow = CEILINGS | {"copy_bytes_per_second": 1e6}
        assert roofline.roof(entry, slow) == pytest.approx(1e6 * roofline.intensity(entry))
        assert roofline.roof(entry | {"dtype": "bfloat16"}, CEILINGS) is None
        without = page_ops.sections({key: value for key, value in ops_content().items() if key != "ceilings"})
        assert any("did not measure" in " ".join(section.lead) for section in without)

    def test_roofline_cells_are_the_largest_that_both_ran(self):
        chosen = roofline.cells(ops_content()["cells"], "float32")
        sizes = {entry["op"]: report.size_of(entry) for entry in chosen if entry["rival"] == "fused"}
        assert sizes == {"position": "97x97", "channel": "128x256", "criss_cross": "128x256"}

    def test_ceilings_of_the_processor(self):
        import torch

        found = ceilings.reached(torch.device("cpu"), "small", repeats=3)
        assert found["copy_bytes_per_second"] > 0
        assert ceilings.flop_ceiling(found, "float32") >= found["matmul_float32_flop_per_second"]
