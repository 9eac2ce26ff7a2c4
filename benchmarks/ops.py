"""``python -m benchmarks ops``, the main job: attention on the features of a photograph, against the alternatives."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

import torch

import segattn_ops
from tools.compilers import files

from . import command_line, features, measure, picture, plots, report, rivals, workloads
from .command_line import Refused
from .processes import CellFailed, start_server
from .run import Options, Runner
from .schedule import Schedule
from .validate import WrongResult
from .workloads import Workload

PROG = "python -m benchmarks ops"
SUMMARY = "each attention on the features of a photograph: time, peak memory, attention maps, against the alternatives"
WRITTEN = ("report.json", "report.md", "time.png", "memory.png", "attention.png")
SIZES = "16x16,32x32,64x64,97x97,128x128,128x256"


def _sizes(text: str) -> list[tuple[int, int]]:
    return sorted(command_line.sizes(text), key=lambda size: (size[0] * size[1], size))


def _device(text: str) -> str:
    return str(command_line.device(text))


def _points(text: str) -> tuple[tuple[float, float], ...]:
    try:
        points = tuple(tuple(float(value) for value in pair.split(",")) for pair in text.split(";"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"points are y,x;y,x (got {text!r})") from error
    if any(len(point) != 2 or not all(0 <= value <= 1 for value in point) for point in points):
        raise argparse.ArgumentTypeError(f"points are y,x;y,x as fractions of the picture in [0, 1] (got {text!r})")
    return points


def parser() -> argparse.ArgumentParser:
    p = command_line.Parser(
        prog=PROG,
        description="Runs the attention of DANet, CCNet and Non-local on the features of a photograph, fused "
        "(segattn_ops) against eager PyTorch, scaled_dot_product_attention and torch.compile: time, peak memory, "
        "attention maps. Writes report.json, report.md and pictures into the output folder.",
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
        default="fused,eager,sdpa,compile",
        help="formulations; also: flex (FlexAttention)",
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
    p.add_argument(
        "--points", type=_points, help="two points y,x;y,x of the attention map, as fractions of the picture"
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
    return p


def _check(arguments: argparse.Namespace, planned: list[Workload]) -> None:
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
    command_line.require("rich", "matplotlib", "PIL", "torchvision", "skimage")
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
    if not (folder / "report.json").exists():
        return
    written = datetime.datetime.fromtimestamp((folder / "report.json").stat().st_mtime)
    name = kept = f"{written:%Y-%m-%d_%H-%M-%S}"
    number = 1
    while (folder / kept).exists():
        number += 1
        kept = f"{name}_{number}"
    (folder / kept).mkdir()
    for written_file in WRITTEN:
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


def _command(argv: list[str]) -> str:
    return " ".join([PROG, *argv])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    return command_line.run(PROG, lambda: _run(argv, arguments))


def _run(argv: list[str], arguments: argparse.Namespace) -> int:
    planned = workloads_of(arguments)
    _check(arguments, planned)
    try:
        photograph = features.load_photograph(arguments.photograph)
        extractor = features.Extractor(arguments.channels, arguments.weights, arguments.seed)
    except (ValueError, ImportError) as error:  # safetensors may be missing
        raise Refused(error) from error
    _keep_earlier(command_line.writable_folder(arguments.output))
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 110)
    schedule = Schedule(arguments.budget or None, arguments.device)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    start_server()
    options = Options(
        tuple(name for name in rivals.RIVALS if name in arguments.rivals),
        arguments.device,
        threads,
        arguments.backend,
        arguments.compile_from,
        arguments.repeats,
    )
    cells = sum(len(rivals.applicable(options.rivals, workload)) for workload in planned)
    bar = Progress(
        TextColumn("{task.description:<58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    try:
        with bar:
            task = bar.add_task("features of the photograph", total=cells)
            source = features.FeatureSource(photograph, arguments.sizes, extractor, arguments.seed)
            described = f"{arguments.photograph}, dilated ResNet-50 with {extractor.description}"
            del extractor.backbone

            def on_cell(label: str, done: bool) -> None:
                bar.update(task, advance=int(done), description=label)
                if done and not console.is_terminal:
                    console.print(f"{schedule.elapsed:6.1f} s  {label}", highlight=False)

            records: list[dict] = []
            result = report.build(
                _command(argv),
                arguments.device,
                threads,
                records,
                features=described,
                memory_measured=arguments.device != "cpu" or measure.host_memory_is_measurable(),
            )
            for of_workload in Runner(options, schedule, on_cell).run(planned, source):
                records += of_workload
                report.write_json(result, arguments.output / "report.json")
            bar.update(task, description="drawing")
            with segattn_ops.use_backend(arguments.backend):
                pictures = _draw(records, source, arguments, extractor.description)
    except (WrongResult, CellFailed) as error:
        return command_line.fail(PROG, error, 1)
    result |= {"pictures": [path.name for path in pictures], "seconds": round(schedule.elapsed, 1)}
    report.write_json(result, arguments.output / "report.json")
    files.write_text(arguments.output / "report.md", report.markdown(result))
    report.print_tables(result, console)
    written = ", ".join(["report.json", "report.md", *result["pictures"]])
    console.print(f"{schedule.elapsed:.0f} s; {arguments.output}/: {written}", highlight=False, soft_wrap=True)
    return 0


def _draw(
    records: list[dict], source: features.FeatureSource, arguments: argparse.Namespace, weights: str
) -> list[Path]:
    folder = arguments.output
    paths = [plots.draw_time(records, folder / "time.png"), plots.draw_memory(records, folder / "memory.png")]
    size = min((source.height, source.width), (97, round(97 * source.width / source.height)))
    points = arguments.points or picture.POINTS.get(arguments.photograph, ((0.5, 0.5), (0.2, 0.2)))
    key_channels = arguments.key_channels or max(arguments.channels // 8, 1)
    caption = (
        f"{size[0]} x {size[1]} positions of a dilated ResNet-50 with {weights}; the projections are random: "
        "this shows the reach of each attention, not the attention of a trained network."
    )
    paths.append(picture.draw(source, size, points, folder / "attention.png", caption, key_channels))
    return [path for path in paths if path]
