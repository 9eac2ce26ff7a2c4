"""Trains a small DANet and CCNet on generated scenes, on the fused ops and on eager PyTorch, from one seed.

    python -m examples.train_shapes

draws both loss curves and mIoUs of each network into report/examples/train_shapes.png: they coincide. A run writes a
checkpoint every --save-every steps and continues from it with --resume and the same settings: give --total-steps to
both calls if the first stops early with --steps. --amp trains in bfloat16 (float16 with a GradScaler on CUDA).

The weights in examples/weights, with which other examples draw attention, are those of

    python -m examples.train_shapes --systems danet --backends fused --steps 2400 --weights examples/weights
    python -m examples.train_shapes --systems ccnet --backends fused --steps 1200 --weights examples/weights \\
        --start examples/weights/danet.safetensors

CCNet starts from what DANet has learned: from nothing it found no use for its attention in 1800 steps.
The files say in their metadata how they were made and what they reach: mIoU, and the accuracy on the fragments of the
scenes (examples/shapes.py) with attention and without, which is with every gamma at 0.
"""

import argparse
import contextlib
import datetime
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import segattn_ops
from benchmarks import command_line
from segattn_ops import checkpoints
from segattn_ops._files import replacing
from segattn_ops.checkpoints.files import save_whole
from segattn_ops.models import SegmentationModel, segmentation_loss

from .shapes import batch, mean_iou, small_network, start_from

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROG = "python -m examples.train_shapes"
BACKENDS = {"fused": "native", "eager": "reference"}
VALIDATION_SEED = 1_000_000
HELD_OUT = 64  # scenes of the scores
SETTINGS = ("total_steps", "batch_size", "size", "lr", "seed", "amp", "start")  # a resumed run must have the same


@dataclass
class Run:
    """The state of a training run.

    Attributes:
        losses: of every step.
        validation: (step, mIoU in evaluation mode).
        seconds: spent in forward, backward and optimizer.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Of a trained network on held-out scenes.

    Attributes:
        miou: mean IoU.
        fragments: the share of the fragments' pixels that are labelled right.
        fragments_without_attention: the same with every gamma at 0, so that the convolutions are left.
    """

    miou: float
    fragments: float
    fragments_without_attention: float


def evaluate(model: SegmentationModel, device: torch.device, size: int) -> float:
    """mIoU over 16 held-out scenes."""
    images, labels, _ = batch(VALIDATION_SEED, 16, size)
    return mean_iou(predict(model, images.to(device)), labels)


def predict(model: SegmentationModel, images: Tensor) -> Tensor:
    """Labels (B, H, W) on the CPU, in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        predicted = model(images)["out"].argmax(1).cpu()
    model.train(was_training)
    return predicted


def scores(model: SegmentationModel, device: torch.device, size: int) -> Scores:
    """Over HELD_OUT scenes. The model is left as it was."""
    images, labels, fragments = batch(VALIDATION_SEED, HELD_OUT, size)
    images = images.to(device)
    predicted = predict(model, images)
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith(".gamma")]
    values = [gamma.item() for gamma in gammas]
    with torch.no_grad():
        for gamma in gammas:
            gamma.zero_()
        without = predict(model, images)
        for gamma, value in zip(gammas, values, strict=True):
            gamma.fill_(value)
    right, right_without = ((found == labels)[fragments].double().mean().item() for found in (predicted, without))
    return Scores(mean_iou(predicted, labels), right, right_without)


def write_weights(model: SegmentationModel, found: Scores, command: str, path: Path) -> None:
    """The state dict, with how it was made and what it reaches in the file's metadata."""
    metadata = {name: f"{value:.4f}" for name, value in asdict(found).items()}
    metadata |= {"command": command, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata)


def train(
    system: str,
    options: argparse.Namespace,
    checkpoint: Path,
    progress: Progress | None = None,
    label: str = "",
) -> tuple[SegmentationModel, Run]:
    """Trains one network on the active backend; continues from ``checkpoint`` with ``options.resume``.

    Raises:
        ValueError: if the checkpoint is damaged, of another program, of other settings, or of more steps.
    """
    device = options.device
    torch.manual_seed(options.seed)  # the same initial weights and dropout for every backend
    model = small_network(system)
    if options.start:
        start_from(model, checkpoints.read(options.start))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.total_steps))
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and device.type == "cuda")
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    run, first = Run(), 0
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if options.resume and checkpoint.exists():
        saved = _resumable(checkpoint, options)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"].cpu())
        run, first = Run(saved["losses"], [tuple(v) for v in saved["validation"]], saved["seconds"]), saved["step"]
    task = progress.add_task(label, total=options.steps, completed=first) if progress else None
    for step in range(first, options.steps):
        images, labels, _ = batch(options.seed + step, options.batch_size, options.size)
        images, labels = images.to(device), labels.to(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, half, enabled=options.amp):
            outputs = model(images)
        loss = segmentation_loss({name: logits.float() for name, logits in outputs.items()}, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        run.losses.append(loss.item())
        run.seconds += time.perf_counter() - begin
        done = step + 1
        if done % options.validate_every == 0 or done == options.steps:
            run.validation.append((done, evaluate(model, device, options.size)))
        if done % options.save_every == 0 or done == options.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": done, "rng": torch.get_rng_state(), "seconds": run.seconds}
            state["settings"] = {name: getattr(options, name) for name in SETTINGS}
            save_whole(state | {"losses": run.losses, "validation": run.validation}, checkpoint)
        if progress:
            progress.update(task, advance=1, description=f"{label} loss {run.losses[-1]:.3f}")
    return model, run


def rate(step: int, total: int) -> float:
    """The learning rate over its largest: rises for 100 steps at most, is level, and falls over the last third."""
    return min((step + 1) / min(100, max(total // 4, 1)), 1.0, (total - step) / max(total / 3, 1))


def _resumable(checkpoint: Path, options: argparse.Namespace) -> Mapping[str, Any]:
    """The content of a checkpoint whose run can be continued with the options."""
    saved = checkpoints.read(checkpoint)
    if "settings" not in saved:
        raise ValueError(f"--resume: {checkpoint} has no settings of a run; this program did not write it")
    different = [name for name in SETTINGS if saved["settings"][name] != getattr(options, name)]
    if different:
        theirs = ", ".join(f"--{name.replace('_', '-')} {saved['settings'][name]}" for name in different)
        ours = ", ".join(str(getattr(options, name)) for name in different)
        raise ValueError(f"--resume: the run in {checkpoint} has {theirs} (got {ours})")
    if saved["step"] > options.steps:
        raise ValueError(f"--resume: {checkpoint} is after step {saved['step']} (got --steps {options.steps})")
    return saved


def draw(runs: dict[str, dict[str, Run]], path: Path) -> None:
    """Loss and mIoU of every run against the step, a column for each network."""
    figure, axes = plt.subplots(2, len(runs), figsize=(5.2 * len(runs), 6.4), squeeze=False, sharex="col")
    styles = {"eager": {"color": "#888888", "linewidth": 4.0}, "fused": {"color": "#d62728", "linewidth": 1.2}}
    for column, (system, by_backend) in enumerate(runs.items()):
        for backend in sorted(by_backend):  # eager first, so that the fused curve is drawn on top
            run, style = by_backend[backend], styles[backend]
            axes[0, column].plot(range(1, len(run.losses) + 1), run.losses, label=backend, **style)
            axes[1, column].plot(*zip(*run.validation, strict=True), label=backend, marker="o", markersize=3, **style)
        axes[0, column].set(title={"danet": "DANet", "ccnet": "CCNet"}[system], ylabel="training loss", yscale="log")
        axes[1, column].set(xlabel="step", ylabel="validation mIoU", ylim=(0, 1))
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def largest_gap(a: Run, b: Run) -> float:
    """Largest difference of the two losses at one step, relative to the loss there."""
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in zip(a.losses, b.losses, strict=True))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    whole = command_line.whole
    parser = command_line.Parser(prog=PROG, description=__doc__, formatter_class=formatter)
    parser.add_argument("--systems", nargs="+", choices=("danet", "ccnet"), default=["danet", "ccnet"])
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), default=["eager", "fused"])
    parser.add_argument("--steps", type=whole(), default=250, help="stop here (default 250)")
    parser.add_argument("--total-steps", type=whole(), help="length of the learning rate schedule (default: --steps)")
    parser.add_argument("--batch-size", type=whole(), default=8)
    parser.add_argument("--size", type=whole(), default=72, help="side of the scenes in pixels (default 72)")
    parser.add_argument("--lr", type=command_line.positive, default=2e-3)
    parser.add_argument("--seed", type=whole(0), default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=command_line.device, default=default)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument("--save-every", type=whole(), default=50)
    parser.add_argument("--validate-every", type=whole(), default=25)
    parser.add_argument("--out", type=Path, default=Path("report/examples"))
    parser.add_argument("--start", help="weights of a small DANet, with which the networks start where they can")
    parser.add_argument("--weights", type=Path, help="write the fused runs' weights into this folder, as safetensors")
    options = parser.parse_args(argv)
    options.total_steps = options.total_steps or options.steps
    if options.total_steps < options.steps:
        parser.error(f"--total-steps must be at least --steps = {options.steps} (got {options.total_steps})")
    if options.weights and "fused" not in options.backends:
        parser.error(f"--weights are those of the fused backend (got --backends {' '.join(options.backends)})")
    return options


def recorded_command(argv: list[str]) -> str:
    """The command line without --out, which is a folder of this machine and no matter for the result."""
    kept = [word for word, before in zip(argv, ["", *argv], strict=False) if "--out" not in (word, before)]
    return " ".join([PROG, *(word for word in kept if not word.startswith("--out="))])


def main(argv: list[str] | None = None) -> dict[str, dict[str, Run]]:
    options = arguments(argv)
    command_line.visible(options.device)
    command_line.writable_folder(options.out)
    if options.weights:
        command_line.writable_folder(options.weights)
    command = recorded_command(sys.argv[1:] if argv is None else argv)
    console = Console()
    runs: dict[str, dict[str, Run]] = {system: {} for system in options.systems}
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for system in options.systems:
            for backend in options.backends:
                chosen = segattn_ops.use_backend(BACKENDS[backend]) if backend == "eager" else contextlib.nullcontext()
                with chosen:
                    checkpoint = options.out / f"{system}_{backend}.pt"
                    if checkpoint.exists() != options.resume:
                        state = "is missing: the run starts at step 0" if options.resume else "is overwritten"
                        console.print(f"{checkpoint} {state}", soft_wrap=True)
                    model, runs[system][backend] = train(system, options, checkpoint, progress, f"{system} {backend}")
                    if options.weights and backend == "fused":
                        found = scores(model, options.device, options.size)
                        path = options.weights / f"{system}.safetensors"
                        write_weights(model, found, command, path)
                        console.print(f"{path}: {found}", soft_wrap=True)
    table = Table(title=f"{options.steps} steps of {options.batch_size} scenes, {options.size} x {options.size}")
    for column in ("network", "backend", "last loss", "mIoU", "s a step", "largest gap of the losses"):
        table.add_column(column, justify="left" if column in ("network", "backend") else "right")
    for system, by_backend in runs.items():
        for backend, run in by_backend.items():
            gap = f"{largest_gap(by_backend['eager'], run):.1e}" if backend == "fused" and len(by_backend) == 2 else ""
            miou = f"{run.validation[-1][1]:.3f}"
            seconds = f"{run.seconds / len(run.losses):.3f}"
            table.add_row(system, backend, f"{run.losses[-1]:.4f}", miou, seconds, gap)
    console.print(table)
    picture = options.out / "train_shapes.png"
    draw(runs, picture)
    console.print(f"curves: {picture}; checkpoints: {options.out}/*.pt", soft_wrap=True)
    return runs


if __name__ == "__main__":
    sys.exit(command_line.example(PROG, main))
