"""``python -m benchmarks scaling``: how time and memory of each op and rival grow with the number of positions N.

Measured as by ``ops``, on square feature maps; ``--report`` fits the cells of a report that exists instead. An exponent
is the slope of the logarithms over that of N, by least squares, with its interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.compilers import files

from . import command_line, ops, report, rivals, statistics
from .command_line import Refused
from .processes import CellFailed
from .validate import WrongResult

PROG = "python -m benchmarks scaling"
SUMMARY = "exponents of time and memory over the number of positions, fitted to several sizes"
SIZES = "32x32,45x45,64x64,90x90"
LEAST_SIZES = 3  # two points fit any line
FIGURES = ("forward", "forward_backward", "memory")


def exponent(positions: Sequence[int], values: Sequence[float]) -> dict:
    """``{"exponent", "low", "high", "residual", "sizes"}`` of values ~ positions ** exponent. ``residual`` is the
    largest factor by which a value departs from the fit.

    Raises:
        ValueError: there are fewer than LEAST_SIZES values, or one is not positive.
    """
    if len(set(positions)) < LEAST_SIZES or min(values) <= 0:
        raise ValueError(f"at least {LEAST_SIZES} sizes with positive values are needed (got {list(values)})")
    from scipy import stats

    xs, ys = ([math.log(value) for value in column] for column in (positions, values))
    fit = stats.linregress(xs, ys)
    reach = float(stats.t.ppf((1 + statistics.CONFIDENCE) / 2, len(xs) - 2) * fit.stderr)
    residual = max(abs(y - fit.intercept - fit.slope * x) for x, y in zip(xs, ys, strict=True))
    slope = float(fit.slope)
    return {
        "exponent": slope,
        "low": slope - reach,
        "high": slope + reach,
        "residual": math.exp(residual),
        "sizes": len(xs),
    }


def fits(cells: list[dict]) -> list[dict]:
    """The fits of each op, dtype, batch and rival of which enough sizes were measured."""
    found = []
    for (op, dtype, batch), entries in report.groups(cells).items():
        for rival in dict.fromkeys(entry["rival"] for entry in entries):
            mine = [entry for entry in entries if entry["rival"] == rival and entry["status"] == "measured"]
            fit = {"op": op, "dtype": dtype, "batch": batch, "rival": rival}
            for figure in FIGURES:
                points = [(entry["positions"], _value(entry, figure)) for entry in mine]
                points = [(n, value) for n, value in points if value]
                if len({n for n, _ in points}) >= LEAST_SIZES:
                    fit[figure] = exponent(*zip(*points, strict=True))
            if any(figure in fit for figure in FIGURES):
                flop = [(entry["positions"], entry["flop"]["forward"]) for entry in mine]
                found.append(fit | {"definition": exponent(*zip(*flop, strict=True))})
    return found


def _value(entry: dict, figure: str) -> float | None:
    """Seconds, or extra bytes from a MiB on: less is a few pages, whatever the size."""
    if figure != "memory":
        return entry[figure]["median"] if figure in entry else None
    found = (entry["memory"] or {}).get(report.PASSES["forward_backward" in entry])
    return found if found and found >= report.MIB else None


COLUMNS = ("op", "", "definition", "forward", "forward + backward", "extra memory")


def rows(found: list[dict]) -> list[list[str]]:
    return [
        [
            report.title(fit["op"], fit["dtype"], fit["batch"]),
            rivals.TITLES[fit["rival"]],
            f"{fit['definition']['exponent']:.2f}",
            *(_text(fit.get(figure)) for figure in FIGURES),
        ]
        for fit in found
    ]


def _text(fit: dict | None) -> str:
    return f"{fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})" if fit else "-"


NOTES = f"""\
Exponents of time and extra memory over the number of positions N, least squares of the logarithms over the measured
sizes, with the {statistics.CONFIDENCE:.0%} interval of the slope. *definition* is the same fit of the
definition's FLOP. Below it a figure has a share that grows more slowly, such as a call's fixed cost at small sizes;
above it larger sizes lose a cache. A dash: fewer than {LEAST_SIZES} sizes were measured, or the extra memory is below
1 MiB."""


def markdown(result: dict) -> str:
    head = f"`{result['command']}`, {result['date']}, commit {result['commit'] or 'unknown'}, {report.where(result)}."
    table = report.markdown_table(COLUMNS, rows(result["fits"]))
    return "\n\n".join(["# How time and memory grow", head, NOTES, table]) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = ops.parser(PROG)
    parser.description = f"Prints {SUMMARY}; writes scaling.json and scaling.md. Without --report it measures."
    parser.set_defaults(sizes=SIZES, rivals="fused,eager,sdpa", budget=0.0)
    parser.add_argument("--report", type=Path, help="fit the cells of this report.json and measure nothing")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(argv, arguments))


def _run(argv: list[str], arguments: argparse.Namespace) -> int:
    folder = arguments.output
    if arguments.report:
        result = _read(arguments.report) | {"kind": "scaling"}
    else:
        planned = ops.workloads_of(arguments)
        if len({workload.positions for workload in planned}) < LEAST_SIZES:
            raise Refused(f"--sizes must have at least {LEAST_SIZES} numbers of positions (got {len(arguments.sizes)})")
        ops.check(arguments, planned)
        if arguments.dry_run:
            return ops.dry_run(arguments, planned)
        inputs = ops.pictures_and_weights(arguments)
        path = command_line.writable_folder(folder) / "scaling.json"
        earlier = ops.resumed(path, ops.command_of(PROG, argv)) if arguments.resume else None
        try:
            result, _ = ops.measured("scaling", PROG, argv, arguments, planned, *inputs, path, earlier)
        except (WrongResult, CellFailed) as error:
            return command_line.fail(PROG, error, 1)
    result["fits"] = fits(result["cells"])
    if not result["fits"]:
        raise Refused(f"no op and rival was measured at {LEAST_SIZES} sizes or more")
    command_line.writable_folder(folder)
    report.write_json(result, folder / "scaling.json")
    files.write_text(folder / "scaling.md", markdown(result))
    print(markdown(result), end="")
    return 0


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != report.SCHEMA:
            raise Refused(f"{path} must be of schema {report.SCHEMA} (got {content['schema']})")
        report.groups(content["cells"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is no report of the benchmarks ({error!r})") from error
    return content
