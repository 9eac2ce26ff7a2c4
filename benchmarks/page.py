"""``python -m benchmarks report FILE...``: one page from the JSON files of the other subcommands.

The page holds everything it shows: pictures are inlined, nothing is requested. It follows the reader's light or dark
setting, fits a phone, and prints. Under every table is the command that measures it again.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import json
import sys
from pathlib import Path

from tools.compilers import files

from . import command_line, page_ops, page_subjects, papers, report, statistics
from .command_line import Refused
from .page_blocks import Picture, Section, Table, plain_table

PROG = "python -m benchmarks report"
SUMMARY = "one HTML page from the JSON files of the other subcommands, with tables, plots and the commands"
TEMPLATE = Path(__file__).with_name("report.html.j2")
LARGEST_PICTURE = 1600  # pixels of its width on the page
Files = list[tuple[Path, dict]]


def read(path: Path) -> dict:
    """The content of a file; raises Refused for one that no subcommand has written."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is no JSON ({error})") from error
    needed = ("date", "command", "machine", "cells")
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise Refused(f"{path} was not written by `python -m benchmarks`: it has no {', '.join(missing)}")
    return content


def kind_of(content: dict) -> str:
    return content.get("kind", "ops")


def _runs(contents: Files) -> Section:
    """What was run on what."""
    rows, places = [], {}
    for _, content in contents:
        date = content["date"].replace("T", " ").replace("+00:00", " UTC")
        rows.append([kind_of(content), date, str(content.get("commit") or "unknown"), _measured(content)])
        places.setdefault(report.where(content), []).append(kind_of(content))
    table = Table(
        columns=["run", "date", "commit", "cells measured"],
        rows=rows,
        notes=[f"{', '.join(kinds)}: {place}" for place, kinds in places.items()],
        commands=[(kind_of(content), content["command"]) for _, content in contents],
        commands_title="The commands of these runs",
    )
    lead = [
        "Every result was compared with float64 before anything was timed. The rivals of a row were timed in turn, "
        f"round by round, in a process each. Verdicts (faster, level, slower) follow from a {statistics.METHOD}."
    ]
    return Section("What was run", lead, [table])


def _papers(content: dict) -> list[Section]:
    """The section of ``papers``: its table, and a note for each row that differs."""
    names = [field.name for field in dataclasses.fields(papers.Row)]
    rows = [papers.Row(**{name: cell[name] for name in names}) for cell in content["cells"]]
    notes = [f"{row.paper} {row.name}, {row.unit}: {row.note}" for row in rows if row.note != "As above."]
    table = Table(list(papers.COLUMNS), [papers.cells(row) for row in rows], notes=notes, command=content["command"])
    return [Section("The papers' costs", [papers.NOTES.replace("*", "").replace("\n", " ")], [table])]


def _measured(content: dict) -> str:
    measured = sum(cell.get("status", "measured") == "measured" for cell in content["cells"])
    return f"{measured} of {len(content['cells'])}"


def _pictures(contents: Files) -> list[Section]:
    """The attention pictures beside the JSON files, those with captions first, in their order."""
    found = {}
    for path, content in contents:
        captions = content.get("captions", {})
        present = {picture.name for picture in path.parent.glob("attention*.png")}
        for name in [*(name for name in captions if name in present), *sorted(present - captions.keys())]:
            found[(path.parent / name).resolve()] = captions.get(name, Path(name).stem)
    if not found:
        return []
    return [Section("Attention", [], [Picture(_inlined(path), caption) for path, caption in found.items()])]


def _inlined(path: Path) -> str:
    """The picture as a data URL, no wider than the page shows it."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    if image.width > LARGEST_PICTURE:
        image = image.resize((LARGEST_PICTURE, round(image.height * LARGEST_PICTURE / image.width)), Image.LANCZOS)
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=88, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


# By the JSON's kind: the sections of one file, and the sentences for the summary.
KINDS = {
    "ops": (page_ops.sections, page_ops.summary),
    "scaling": (page_ops.scaling, lambda content: []),
    "papers": (_papers, lambda content: []),
    "modules": (page_subjects.sections, page_subjects.summary),
    "models": (page_subjects.sections, page_subjects.summary),
}


def sections(contents: Files) -> list[Section]:
    found = [_runs(contents)]
    for _, content in contents:
        if kind_of(content) in KINDS:
            found += KINDS[kind_of(content)][0](content)
        else:
            found.append(plain_table(content))
    return found + _pictures(contents)


def summary(contents: Files) -> list[str]:
    lines = []
    for _, content in contents:
        if kind_of(content) in KINDS:
            lines += KINDS[kind_of(content)][1](content)
    return lines


def render(contents: Files) -> str:
    """The page of these files."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    newest = max((content for _, content in contents), key=lambda content: content["date"])
    places = dict.fromkeys(report.where(content) for _, content in contents)
    return environment.from_string(TEMPLATE.read_text()).render(
        title="segattn_ops against the alternatives",
        subtitle=f"{newest['date'][:10]} · {'; '.join(places)}",
        summary=summary(contents),
        sections=sections(contents),
        footer="Figures of other machines differ. Method: docs/benchmarks.md of the repository. The raw times are in "
        + ", ".join(path.name for path, _ in contents)
        + ".",
    )


def write(contents: Files, path: Path) -> Path:
    files.write_text(path, render(contents))
    return path


def main(argv: list[str]) -> int:
    parser = command_line.Parser(prog=PROG, description=SUMMARY, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON of the other subcommands")
    parser.add_argument("--output", type=Path, help="the page; report.html beside the first file if not given")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    command_line.require("matplotlib", "PIL", "jinja2")
    contents = [(path, read(path)) for path in arguments.files]
    path = arguments.output or arguments.files[0].with_name("report.html")
    command_line.writable_folder(path.parent)
    try:
        write(contents, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"a cell was not written by `python -m benchmarks` ({error!r})") from error
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
