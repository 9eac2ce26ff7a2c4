"""Draws what trained attention attends to, on a generated scene (examples/shapes.py).

    python -m examples.draw_attention                      # into report/examples
    python -m examples.draw_attention --out docs/images    # the pictures of README.md and docs/systems.md

The networks are the small DANet and CCNet with the weights of examples/weights. The points are the centres of
fragments: attention has to find the whole shapes of the fragment's colour.

- attention.png: one point: DANet's position attention, and CCNet's criss-cross attention with R = 1 and R = 2.
- attention_points.png: the same for several points.
- attention_channels.png: DANet's channel attention: the responses of some channels, and the channel map.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import measure
from torch import Tensor

from benchmarks import command_line
from segattn_ops import visualize
from segattn_ops.models import SegmentationModel

from .shapes import CLASSES, scene, trained_network

PROG = "python -m examples.draw_attention"
MARGIN = 12  # pixels between a point and the border, so that its row and column are seen on both sides
DRAWN = 3  # points of attention_points.png
NAMES = ("attention.png", "attention_points.png", "attention_channels.png")
CAPTIONS = (
    "What a cross attends to in trained networks, on a generated scene. The fragment under it belongs to the kind that "
    "has its colour, which only the whole shapes tell. CCNet's first pass (R = 1) sees the row and the column alone.",
    "The same for several points.",
    "DANet's channel attention in the same scene: the responses of some channels, and the channel map.",
)
SEED, SIZE = 12, (96, 160)  # of the scene


def fragment_points(labels: np.ndarray, fragments: np.ndarray) -> dict[str, tuple[int, int]]:
    """For each kind, the (y, x) of the centre of a fragment: of those that are not near the border, the one that is
    farthest from any whole shape of the kind.

    Args:
        labels, fragments: (H, W), of a scene.
    """
    chosen = {}
    for kind, name in enumerate(CLASSES[1:], start=1):
        whole = np.argwhere((labels == kind) & ~fragments)
        regions = measure.regionprops(measure.label((labels == kind) & fragments))
        centres = [tuple(round(c) for c in region.centroid) for region in regions]
        centres = [
            c
            for c in centres
            if all(MARGIN <= at < length - MARGIN for at, length in zip(c, labels.shape, strict=True))
        ]
        if centres and len(whole):
            chosen[name] = max(centres, key=lambda c: np.hypot(*(whole - np.array(c)).T).min())
    return chosen


def maps_of(
    networks: dict[str, SegmentationModel], image: np.ndarray, points: list[tuple[int, int]]
) -> tuple[dict[str, Tensor], visualize.ChannelMaps]:
    """Attention maps by title, (P, h, w), and DANet's channel attention, for one image (H, W, 3)."""
    where = {"units": "pixels", "size": image.shape[:2]}
    danet, ccnet = networks["danet"], networks["ccnet"]
    x = danet.preprocessing(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous())
    maps = {}
    with (
        torch.inference_mode(),
        visualize.record_attention(danet, points, **where) as positions,
        visualize.record_channel_attention(danet) as channels,
    ):
        danet(x)
    maps["DANet, position attention"] = positions["classifier.sa"][0]
    trained_recurrence = ccnet.classifier.cca.recurrence
    for recurrence in (1, 2):
        ccnet.classifier.cca.recurrence = recurrence
        with torch.inference_mode(), visualize.record_attention(ccnet, points, **where) as positions:
            ccnet(x)
        maps[f"CCNet, R = {recurrence}"] = positions["classifier.cca"][0]
    ccnet.classifier.cca.recurrence = trained_recurrence
    return maps, channels["classifier.sc"].image(0)


def attended_share(weights: Tensor, mask: np.ndarray) -> float:
    """The share of a map's weights (h, w) on the positions whose pixels are in ``mask`` (H, W)."""
    share = torch.from_numpy(mask.astype(np.float32))[None, None]
    covered = torch.nn.functional.adaptive_avg_pool2d(share, weights.shape)[0, 0]
    return float((weights * covered).sum() / weights.sum())


def shrink(path: Path, width: int) -> None:
    """The picture at ``path``, at most ``width`` pixels wide and of 256 colours, for a small file."""
    picture = Image.open(path).convert("RGB")
    width = min(width, picture.width)
    size = (width, round(picture.height * width / picture.width))
    picture.resize(size, Image.Resampling.LANCZOS).quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def draw(folder: Path, seed: int = SEED, size: tuple[int, int] = SIZE) -> dict[str, dict[str, float]]:
    """Draws the three pictures of a scene into a folder.

    Returns, for each kind of fragment and each map, the share of its weights that lies on whole shapes of that kind,
    and the share of the scene that these cover. Raises ValueError for a scene without a fragment to draw.
    """
    image, labels, fragments = scene(seed, *size)
    points = fragment_points(labels, fragments)
    areas = {name: ((labels == CLASSES.index(name)) & ~fragments).sum() for name in points}
    points = {name: points[name] for name in sorted(points, key=areas.__getitem__, reverse=True)}
    if not points:
        shown = "x".join(map(str, size))
        raise ValueError(f"scene {seed} of {shown} has no fragment of a kind of which there is a whole shape")
    networks = {name: trained_network(name) for name in ("danet", "ccnet")}
    maps, channels = maps_of(networks, image, list(points.values()))
    one, several, responses = (folder / name for name in NAMES)
    for path, count, columns in ((one, 1, 2), (several, DRAWN, None)):
        drawn = {title: rows[:count] for title, rows in maps.items()}
        visualize.draw_attention(image, drawn, list(points.values())[:count], path, units="pixels", columns=columns)
    visualize.draw_channel_attention(image, channels, path=responses, columns=3)
    for path, width in ((one, 900), (several, 1400), (responses, 1200)):
        shrink(path, width)
    shares: dict[str, dict[str, float]] = {}
    for row, name in enumerate(points):
        target = (labels == CLASSES.index(name)) & ~fragments
        shares[name] = {title: attended_share(rows[row], target) for title, rows in maps.items()}
        shares[name]["of the scene"] = float(target.mean())
    return shares


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Draws the pictures, and prints and returns the shares of :func:`draw`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = command_line.Parser(prog=PROG, description=__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=command_line.whole(0), default=SEED, help=f"of the scene (default {SEED})")
    parser.add_argument("--size", type=command_line.size, default=SIZE, help="of the scene (default 96x160)")
    parser.add_argument("--out", type=Path, default=Path("report/examples"))
    options = parser.parse_args(argv)
    command_line.writable_folder(options.out)
    try:
        shares = draw(options.out, options.seed, options.size)
    except ValueError as error:
        parser.error(str(error))
    for name in NAMES:
        print(options.out / name)
    for name, of_map in shares.items():
        found = ", ".join(f"{title}: {share:.1%}" for title, share in of_map.items())
        print(f"share of a fragment's attention on the whole shapes of its kind, {name}: {found}")
    return shares


if __name__ == "__main__":
    sys.exit(command_line.example(PROG, main))
