"""The command line that ``modules`` and ``models`` share: plan, run, and write JSON, Markdown, a picture and a page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import segattn_ops
from tools.compilers import files

from . import command_line, features, measure, network_run, ops, page, report, subject_tables, subjects
from .command_line import Refused
from .processes import CellFailed, start_server
from .subjects import Subject
from .validate import WrongResult
from .workloads import DTYPES


@dataclass(frozen=True)
class Command:
    """What distinguishes the two commands."""

    kind: str  # "module" or "model"
    prog: str
    summary: str
    sizes: str  # the default
    size_help: str
    budget: float  # seconds, the default

    @property
    def name(self) -> str:
        return f"{self.kind}s"


def parser(command: Command) -> argparse.ArgumentParser:
    known = tuple(subjects.KINDS[command.kind])
    p = command_line.Parser(
        prog=command.prog, description=command.summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(f"--{command.name}", dest="names", type=command_line.names(known), default=",".join(known))
    p.add_argument("--sizes", type=command_line.sizes, default=command.sizes, help=command.size_help)
    p.add_argument(
        "--rivals",
        type=command_line.names(tuple(network_run.TITLES)),
        default="fused,eager,sdpa" if command.kind == "module" else "fused,eager",
        help=f"ways to compute the blocks, of {', '.join(network_run.TITLES)}",
    )
    p.add_argument("--dtypes", type=command_line.names(tuple(DTYPES)), default="float32", help="dtypes")
    p.add_argument("--batch", type=command_line.whole(), default=1, help="batch size")
    p.add_argument("--device", type=command_line.device, default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument(
        "--threads",
        type=command_line.whole(most=os.cpu_count() or 1),
        help="CPU threads; PyTorch's choice if not given",
    )
    p.add_argument("--rounds", type=command_line.whole(), help="timed rounds; chosen by their duration if not given")
    p.add_argument(
        "--budget",
        type=command_line.seconds,
        default=command.budget,
        help="seconds in total; passes that would exceed them are skipped and reported; 0 for no limit",
    )
    p.add_argument("--photograph", default="coffee", help="as of `python -m benchmarks`; of models only")
    p.add_argument("--output", type=Path, default=Path("report"), help="folder of the files")
    p.add_argument("--resume", action="store_true", help="keep what an interrupted run of these options has measured")
    p.add_argument("--dry-run", action="store_true", help="print FLOP, memory and whether it fits; measure nothing")
    p.add_argument(
        "--backend",
        choices=("native", "reference"),
        default="native",
        help="of the fused blocks; reference measures the plain PyTorch fallback",
    )
    return p


def planned(command: Command, arguments: argparse.Namespace) -> list[Subject]:
    return [
        Subject(command.kind, name, height, width, dtype, arguments.batch)
        for height, width in arguments.sizes
        for dtype in arguments.dtypes
        for name in arguments.names
    ]


def main(command: Command, argv: list[str]) -> int:
    arguments = parser(command).parse_args(argv)
    return command_line.run(command.prog, lambda: _run(command, argv, arguments))


def _run(command: Command, argv: list[str], arguments: argparse.Namespace) -> int:
    device = str(arguments.device)
    command_line.visible(arguments.device)
    libraries = segattn_ops._backend.LIBRARIES
    native = arguments.backend == "native" and "fused" in arguments.rivals
    if native and not libraries.serves(arguments.device.type):
        raise Refused(
            f"there are no native kernels for {device}: {libraries.why_not(arguments.device.type)}. "
            "Build them, or measure the plain fallback with --backend reference."
        )
    command_line.require("rich", "matplotlib", "PIL", "torchvision", "jinja2")
    if arguments.dry_run:
        return _dry_run(command, arguments, device)
    photograph = None
    if command.kind == "model":
        command_line.require("skimage")
        try:
            photograph = features.load_photograph(arguments.photograph)
        except ValueError as error:
            raise Refused(error) from error
    folder = command_line.writable_folder(arguments.output)
    path = folder / f"{command.name}.json"
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    line = ops.command_of(command.prog, argv)
    records = ops.resumed(path, line)["cells"] if arguments.resume else []
    if device == "cpu":
        measure.pin(threads)
    result = report.build(line, device, threads, records, command.name, finished=False)
    done = {subjects.of_record(cell) for cell in records}
    subjects_to_run = [subject for subject in planned(command, arguments) if subject not in done]
    start_server()
    options = network_run.Options(
        arguments.rivals, device, threads, arguments.backend, arguments.rounds, arguments.budget or None
    )
    try:
        with _progress(subjects_to_run, options) as (on_cell, on_round):
            runner = network_run.Runner(options, photograph, on_cell, on_round)
            for of_subject in runner.run(subjects_to_run):
                records += of_subject
                report.write_json(result, path)
    except (WrongResult, CellFailed) as error:
        return command_line.fail(command.prog, error, 1)
    return _write(result | {"finished": True}, path)


class _progress:
    """A bar over the cells, or a line for each where the output is no terminal."""

    def __init__(self, planned: list[Subject], options: network_run.Options):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(width=None if sys.stdout.isatty() else 110)
        cells = sum(len(network_run.applicable(options.rivals, subject)) for subject in planned)
        columns = TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=self.console)
        self.task = self.bar.add_task("weights and inputs", total=cells)

    def __enter__(self) -> tuple[Callable[[str, bool], None], Callable[[str], None]]:
        self.bar.__enter__()

        def on_cell(label: str, done: bool) -> None:
            self.bar.update(self.task, advance=int(done), description=label)
            if done and not self.console.is_terminal:
                elapsed = self.bar.tasks[0].elapsed or 0.0
                self.console.print(f"{elapsed:6.1f} s  {label}", highlight=False)

        return on_cell, lambda label: self.bar.update(self.task, description=label)

    def __exit__(self, *error) -> None:
        self.bar.__exit__(*error)


def _dry_run(command: Command, arguments: argparse.Namespace, device: str) -> int:
    available = measure.available_bytes(device)
    table = []
    for subject in planned(command, arguments):
        for rival in network_run.applicable(arguments.rivals, subject):
            for kind, cost in subjects.predicted(subject, rival).items():
                needed = network_run.SCRATCH * cost.peak_bytes / network_run.GIB
                verdict = network_run.fits(cost, available) or "runs"
                title, name = network_run.TITLES[rival], subject_tables.PASS_TITLES[command.kind][kind]
                table.append([subject.label, title, name, f"{cost.flop / 1e9:.1f}", f"{needed:.2f}", verdict])
    columns = (command.kind, "", "pass", "GFLOP", "GiB needed", "")
    print(report.markdown_table(columns, table))
    return 0


def _write(result: dict, path: Path) -> int:
    report.write_json(result, path)
    files.write_text(path.with_suffix(".md"), subject_tables.markdown(result))
    written = [path, path.with_suffix(".md"), page.write([(path, result)], path.with_suffix(".html"))]
    print(subject_tables.markdown(result))
    print(f"{', '.join(str(name) for name in written)}")
    return 0
