"""Segments a 1024 x 2048 image in one piece, on the fused ops.

    python -m examples.full_size_inference

The default is the small DANet of ``examples.train_shapes``, with the weights of examples/weights, on a generated scene.
At a quarter of the image's size its attention has N = 131072 positions; the N x N attention map would take
64 GiB. The picture report/examples/full_size.png shows scene, labels and prediction.

--network danet_resnet50 (or any builder of segattn_ops.models) with --image and --checkpoint segments a photograph
with weights of any known layout. The picture gets the order of channels, the mean and the deviation of that layout,
which is printed; a checkpoint of another stem needs --stem. Without a checkpoint the weights are random, and only time
and memory are meaningful.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import transform
from torch import Tensor

from benchmarks import command_line, measure
from segattn_ops import checkpoints, models

from .shapes import CLASSES, PALETTE, STRIDE, mean_iou, scene, trained_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROG = "python -m examples.full_size_inference"


def photograph(path: Path | None, height: int, width: int) -> np.ndarray:
    """The image at ``path``, or scikit-image's coffee, stretched to (height, width, 3) float32 in [0, 1]."""
    from skimage import data

    image = data.coffee() if path is None else np.asarray(Image.open(path).convert("RGB"))
    return transform.resize(image, (height, width, 3), anti_aliasing=True).astype(np.float32)


def segment(model: models.SegmentationModel, image: Tensor) -> tuple[Tensor, float, float | None]:
    """Labels (H, W) of image (1, 3, H, W); seconds; and the peak memory beyond that in use before in GiB, None if it
    cannot be measured."""
    memory = None
    if image.device.type == "cuda":
        memory = measure.DeviceMemory(image.device)
    elif measure.host_memory_is_measurable():
        memory = measure.HostMemory()
    begin = time.perf_counter()
    with torch.inference_mode():
        labels = model(image)["out"].argmax(1)[0].cpu()
    seconds = time.perf_counter() - begin
    return labels, seconds, memory and memory.peak() / 2**30


def draw(panels: dict[str, np.ndarray], path: Path) -> None:
    """The panels one above the other."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 5.2 * len(panels)), squeeze=False)
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        axis.imshow(panel)
        axis.set_title(title)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float | None]:
    formatter = argparse.RawDescriptionHelpFormatter
    whole = command_line.whole
    parser = command_line.Parser(prog=PROG, description=__doc__, formatter_class=formatter)
    builders = [name for name in models.__all__ if "_resnet" in name and name != "dilated_resnet"]
    parser.add_argument(
        "--network",
        choices=["danet", "ccnet", *builders],
        default="danet",
        help="danet, ccnet (small), or a builder of segattn_ops.models",
    )
    parser.add_argument("--image", type=Path, help="for a ResNet network; scikit-image's coffee if not given")
    parser.add_argument("--checkpoint", type=Path, help="for a ResNet network: weights of any known layout")
    parser.add_argument("--prefix", help="of the network in a checkpoint of several")
    parser.add_argument("--stem", help="of a ResNet network: torchvision (default), v1c, deep or ccnet")
    parser.add_argument("--classes", type=whole(), help="of a ResNet network (default 19)")
    parser.add_argument("--height", type=whole(), default=1024)
    parser.add_argument("--width", type=whole(), default=2048)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=command_line.device, default=default)
    parser.add_argument("--out", type=Path, default=Path("report/examples"))
    options = parser.parse_args(argv)
    small = options.network in ("danet", "ccnet")
    for name in ("image", "checkpoint", "prefix", "stem", "classes"):
        if small and getattr(options, name) is not None:
            parser.error(f"--{name} needs a ResNet network, such as --network danet_resnet50 (got {options.network})")
    command_line.visible(options.device)
    command_line.writable_folder(options.out)
    console = Console()
    size = options.height, options.width
    if small:
        model = trained_network(options.network)
        image, labels, _ = scene(7, *size)
    else:
        model = getattr(models, options.network)(options.classes or 19, stem=options.stem or "torchvision")
        if options.checkpoint is not None:
            console.print(str(checkpoints.load(model, options.checkpoint, prefix=options.prefix)), soft_wrap=True)
        image, labels = photograph(options.image, *size), None
        console.print(f"preprocessing: {model.preprocessing}", soft_wrap=True)
    tensor = model.preprocessing(image)
    model.aux_classifier = None  # only for training
    device = options.device
    predicted, seconds, gib = segment(model.to(device).eval(), tensor.contiguous().to(device))
    stride = STRIDE if small else 8
    positions = -(-options.height // stride) * -(-options.width // stride)
    result = {"seconds": seconds, "gib": gib, "positions": positions, "map_gib": positions**2 * 4 / 2**30}
    if labels is not None:
        result["miou"] = mean_iou(predicted, torch.from_numpy(labels))
    table = Table(title=f"{options.network}, one image of {options.height} x {options.width}, {device}")
    for column in ("positions N", "seconds", "peak memory beyond model and image", "N x N attention map alone", "mIoU"):
        table.add_column(column, justify="right")
    miou = f"{result['miou']:.3f}" if "miou" in result else "-"
    peak = "-" if gib is None else f"{gib:.2f} GiB"
    table.add_row(f"{positions}", f"{seconds:.1f}", peak, f"{result['map_gib']:.1f} GiB", miou)
    console.print(table)
    panels = {"image": image}
    if labels is not None:
        panels |= {"labels: " + ", ".join(CLASSES): PALETTE[labels], "prediction": PALETTE[predicted.numpy()]}
    else:
        colours = plt.get_cmap("tab20")(predicted.numpy() % 20)[..., :3]
        panels["prediction" if options.checkpoint else "prediction of random weights"] = colours
    picture = options.out / "full_size.png"
    draw(panels, picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    return result


if __name__ == "__main__":
    sys.exit(command_line.example(PROG, main))
