"""``python -m benchmarks ops``, the main job: attention on the features of a photograph, against the alternatives."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import segattn_ops
from tools.compilers import files

from . import ceilings, command_line, features, measure, page, plots, report, rivals, workloads
from .command_line import Refused
from .processes import CellFailed, start_server
from .run import Options, Runner, not_run
from .schedule import Schedule
from .validate import WrongResult
from .workloads import Workload

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

PROG = "python -m benchmarks ops"
SUMMARY = "each attention on the features of a photograph: time and peak memory against the alternatives"
DEFAULT_RIVALS = "fused,eager,sdpa,compile,eager_onednn,mmcv,onnxruntime,onnx_attention"
SIZES = "32x32,64x64,97x97,128x128,128x256"


def _sizes(text: str) -> list[tuple[int, int]]:
    return sorted(command_line.sizes(text), key=lambda size: (size[0] * size[1], size))


def _device(text: str) -> str:
    return str(command_line.device(text))


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = command_line.Parser(
        prog=prog,
        description="Runs the attention of DANet, CCNet and Non-local on the features of a photograph, fused "
        "(segattn_ops) against eager PyTorch, scaled_dot_product_attention and torch.compile: time and peak memory. "
        "Draws the attention of small trained networks. Writes report.json, .md, .html and pictures into a folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--sizes", type=_sizes, default=SIZES, help="feature-map sizes HxW, comma-separated")
    p.add_argument(
        "--ops",
        type=command_line.names(workloads.OPS),
        default="position,channel,criss_cross,rcca,non_local",
        help="ops to run; also: ann (110 keys)",
    )
    p.add_argument(
        "--rivals",
        type=command_line.names(rivals.RIVALS),
        default=DEFAULT_RIVALS,
        help=f"formulations, of {', '.join(rivals.RIVALS)}",
    )
    p.add_argument("--dtypes", type=command_line.names(tuple(workloads.DTYPES)), default="float32", help="dtypes")
    p.add_argument("--batch", type=command_line.whole(), default=1, help="batch size")
    p.add_argument("--channels", type=command_line.whole(), default=512, help="channels C of the features")
    p.add_argument("--key-channels", type=command_line.whole(), help="channels E of query and key; C // 8 if not given")
    p.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument(
        "--threads",
        type=command_line.whole(most=os.cpu_count() or 1),
        help="CPU threads; PyTorch's choice if not given",
    )
    p.add_argument(
        "--budget",
        type=command_line.seconds,
        default=210.0,
        help="seconds in total; rivals that would exceed them are skipped and reported; 0 for no limit",
    )
    p.add_argument(
        "--repeats",
        type=command_line.whole(),
        help="timed rounds of every workload; chosen by its duration if not given",
    )
    p.add_argument(
        "--compile-from",
        type=command_line.whole(),
        default=8192,
        help="minimum number of positions for torch.compile (compiling takes seconds per size)",
    )
    p.add_argument(
        "--photograph", default="coffee", help=f"{', '.join(features.PHOTOGRAPHS)}, or the path of an image file"
    )
    p.add_argument("--weights", help="ResNet-50 state dict (.pth, .safetensors); torch's cache or random if not given")
    p.add_argument("--seed", type=command_line.whole(0), default=0, help="of random weights and projections")
    p.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        help="folder of the report; an earlier one in it is kept in a subfolder",
    )
    p.add_argument(
        "--backend",
        choices=("native", "reference"),
        default="native",
        help="of the fused ops; reference measures the plain PyTorch fallback",
    )
    p.add_argument("--dry-run", action="store_true", help="list the cells with predicted time and bytes; run nothing")
    p.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run of the same command and sources in the output folder",
    )
    return p


def check(arguments: argparse.Namespace, planned: list[Workload]) -> None:
    """Raises Refused if the run cannot start."""
    device = torch.device(arguments.device)
    command_line.visible(device)
    libraries = segattn_ops._backend.LIBRARIES
    if arguments.backend == "native" and "fused" in arguments.rivals and not libraries.serves(device.type):
        raise Refused(
            f"there are no native kernels for {device.type}: {libraries.why_not(device.type)}. "
            "Build them, or measure the plain fallback with --backend reference."
        )
    if not any(rivals.applicable(arguments.rivals, workload) for workload in planned):
        raise Refused(f"none of the rivals {', '.join(arguments.rivals)} computes {', '.join(arguments.ops)}")
    command_line.require("rich", "matplotlib", "PIL", "torchvision", "skimage", "jinja2", "safetensors")
    height, width = (max(size[axis] for size in arguments.sizes) for axis in (0, 1))
    operands = max(planned, key=Workload.operand_bytes)
    available = measure.available_bytes()
    for what, needed in (
        (f"the features of {height}x{width} positions", features.least_bytes(arguments.channels, height, width)),
        (f"the operands of {operands.label} with {operands.channels} channels", 2 * operands.operand_bytes()),
    ):
        if needed > available:
            gib = 2**30
            raise Refused(f"{what} need at least {needed / gib:.1f} GiB, {available / gib:.1f} GiB are available")


def _keep_earlier(folder: Path) -> None:
    """Moves the report that is in the folder into a subfolder named by its date."""
    from examples import draw_attention  # here: it needs scikit-image and torchvision, which --help does not

    if not (folder / "report.json").exists():
        return
    written = datetime.datetime.fromtimestamp((folder / "report.json").stat().st_mtime)
    name = kept = f"{written:%Y-%m-%d_%H-%M-%S}"
    number = 1
    while (folder / kept).exists():
        number += 1
        kept = f"{name}_{number}"
    (folder / kept).mkdir()
    for written_file in ("report.json", "report.md", "report.html", "time.png", "memory.png", *draw_attention.NAMES):
        if (folder / written_file).exists():
            (folder / written_file).rename(folder / kept / written_file)
    print(f"The earlier report is kept in {folder / kept}/")


def workloads_of(arguments: argparse.Namespace) -> list[Workload]:
    """Sizes from small to large, all ops at each, so that a smaller cell predicts the time of a larger one."""
    key_channels = arguments.key_channels or max(arguments.channels // 8, 1)
    return [
        Workload(op, height, width, dtype, arguments.batch, arguments.channels, key_channels)
        for height, width in arguments.sizes
        for dtype in arguments.dtypes
        for op in arguments.ops
    ]


def command_of(prog: str, argv: list[str]) -> str:
    """The command that a report names: a resumed run continues that of the same line without the option."""
    return shlex.join([*prog.split(), *(word for word in argv if word != "--resume")])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    return command_line.run(PROG, lambda: _run(argv, arguments))


def _run(argv: list[str], arguments: argparse.Namespace) -> int:
    planned = workloads_of(arguments)
    check(arguments, planned)
    if arguments.dry_run:
        return dry_run(arguments, planned)
    photograph, extractor = pictures_and_weights(arguments)
    path = command_line.writable_folder(arguments.output) / "report.json"
    earlier = resumed(path, command_of(PROG, argv)) if arguments.resume else None
    if earlier is None:
        _keep_earlier(arguments.output)
    try:
        result, console = measured("ops", PROG, argv, arguments, planned, photograph, extractor, path, earlier)
    except (WrongResult, CellFailed) as error:
        return command_line.fail(PROG, error, 1)
    result |= _draw(result["cells"], arguments)
    report.write_json(result, path)
    files.write_text(arguments.output / "report.md", report.markdown(result))
    page.write([(path, result)], arguments.output / "report.html")
    report.print_tables(result, console)
    written = ", ".join(["report.json", "report.md", "report.html", *result["pictures"]])
    console.print(f"{result['seconds']:.0f} s; {arguments.output}/: {written}", highlight=False, soft_wrap=True)
    return 0


def pictures_and_weights(arguments: argparse.Namespace) -> tuple[np.ndarray, features.Extractor]:
    try:
        photograph = features.load_photograph(arguments.photograph)
        return photograph, features.Extractor(arguments.channels, arguments.weights, arguments.seed)
    except (ValueError, ImportError) as error:  # safetensors may be missing
        raise Refused(error) from error


def resumed(path: Path, command: str) -> dict:
    """The unfinished report of the same command and sources. Raises Refused for another one."""
    try:
        earlier = json.loads(path.read_text())
        finished, found = earlier["finished"], {name: earlier[name] for name in ("command", "sources", "cells")}
    except FileNotFoundError as error:
        raise Refused(f"--resume: there is no {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"--resume: {path} is no report of this version ({error!r})") from error
    if finished:
        raise Refused(f"--resume: the run of {path} is complete")
    for name, mine in (("command", command), ("sources", report.sources())):
        if found[name] != mine:
            raise Refused(f"--resume: the {name} of {path} must be that of this run, {mine} (got {found[name]})")
    return earlier


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(
        tuple(name for name in rivals.RIVALS if name in arguments.rivals),
        arguments.device,
        arguments.threads or torch.get_num_threads(),
        arguments.backend,
        arguments.compile_from,
        arguments.repeats,
    )


def cells_of(options: Options, planned: list[Workload]) -> list[tuple[Workload, str]]:
    return [(workload, name) for workload in planned for name in rivals.applicable(options.rivals, workload)]


def dry_run(arguments: argparse.Namespace, planned: list[Workload]) -> int:
    """Lists the cells; the rates are those of the report in the output folder, if there is one."""
    options = options_of(arguments)
    schedule = Schedule(arguments.budget or None, arguments.device, options.rivals)
    path = arguments.output / "report.json"
    try:
        known = schedule.learn_from(json.loads(path.read_text())["cells"])
    except (OSError, ValueError, KeyError, TypeError):
        known = 0
    available = measure.available_bytes(arguments.device)
    table = []
    cells = cells_of(options, planned)
    for workload, name in cells:
        status, reason = not_run(options, schedule, workload, name, available) or ("runs", "")
        once, total = schedule.predict(workload, name), schedule.cost(workload, name)
        needed = rivals.needed_bytes(workload, name, arguments.device) / 2**30
        outcome = f"{status}: {reason}" if reason else status
        row = [workload.label, rivals.TITLES[name], f"{once:.3g}", f"{total:.1f}", f"{needed:.2f}", outcome]
        table.append(row)
    print(report.markdown_table(("op", "", "seconds a pass", "seconds in all", "GiB needed", ""), table))
    runs = [cell for cell in cells if not not_run(options, schedule, *cell, available)]
    rates = f"rates of {known} cells of {path}" if known else f"guessed rates: there is no report in {arguments.output}"
    print(f"\n{len(cells)} cells, {len(runs)} run, about {schedule.left(runs):.0f} s beside the features; {rates}")
    return 0


def measured(
    kind: str,
    prog: str,
    argv: list[str],
    arguments: argparse.Namespace,
    planned: list[Workload],
    photograph: np.ndarray,
    extractor: features.Extractor,
    path: Path,
    earlier: dict | None,
) -> tuple[dict, Console]:
    """Measures what ``earlier`` lacks of the planned workloads, and writes each into ``path``. Returns the report and
    the console."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 140)
    options = options_of(arguments)
    schedule = Schedule(arguments.budget or None, arguments.device, options.rivals)
    torch.set_num_threads(options.threads)
    if arguments.device == "cpu":
        measure.pin(options.threads)
    start_server()
    records: list[dict] = earlier["cells"] if earlier else []
    if earlier:
        schedule.started -= earlier["seconds"]
        schedule.learn_from(records)
    done = {Workload.of(entry) for entry in records}
    left = cells_of(options, [workload for workload in planned if workload not in done])
    columns = TextColumn("{task.description:<58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=console) as bar:
        total = len(cells_of(options, planned))
        task = bar.add_task("features of the photograph", total=total, completed=total - len(left), left="")
        source = features.FeatureSource(photograph, arguments.sizes, extractor, arguments.seed)
        described = f"{arguments.photograph}, dilated ResNet-50 with {extractor.description}"
        del extractor.backbone

        def on_cell(label: str, done: bool) -> None:
            if done:
                left.pop(0)
            about = f"about {schedule.left(left):.0f} s left"
            bar.update(task, advance=int(done), description=label, left=about)
            if done and not console.is_terminal:
                console.print(f"{schedule.elapsed:6.1f} s  {label}; {about}", highlight=False)

        result = report.build(
            command_of(prog, argv),
            arguments.device,
            options.threads,
            records,
            kind,
            features=described,
            ceilings=ceilings.reached(torch.device(arguments.device), repeats=5),
            memory_measured=arguments.device != "cpu" or measure.host_memory_is_measurable(),
            finished=False,
        )
        for of_workload in Runner(options, schedule, on_cell).run([w for w in planned if w not in done], source):
            records += of_workload
            result["seconds"] = round(schedule.elapsed, 1)
            report.write_json(result, path)
        bar.update(task, description="drawing", left="")
    result |= {"seconds": round(schedule.elapsed, 1), "finished": True}
    return result, console


def _draw(records: list[dict], arguments: argparse.Namespace) -> dict:
    """The report's pictures, and the captions of those of the attention."""
    from examples import draw_attention

    folder = arguments.output
    paths = [plots.draw_time(records, folder / "time.png"), plots.draw_memory(records, folder / "memory.png")]
    with segattn_ops.use_backend(arguments.backend):
        draw_attention.draw(folder)
    pictures = [path.name for path in paths if path] + list(draw_attention.NAMES)
    return {"pictures": pictures, "captions": dict(zip(draw_attention.NAMES, draw_attention.CAPTIONS, strict=True))}
