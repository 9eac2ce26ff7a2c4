"""Segments a generated scene of 100 megapixels on several processes, none of which holds it.

    python -m examples.large_scene                                    # starts two processes
    torchrun --nproc-per-node 4 -m examples.large_scene               # or takes those of torchrun

Each rank draws its own rows of the scene from the seed, makes features of patches of 8 x 8 pixels, and takes part in a
head with criss-cross, channel and position attention over the whole scene. The head is written for one process;
segattn_ops.distributed.spatially_parallel makes it work on shards. The attention's projections are random and its
classifier is fitted to smaller scenes. A scene that one process can hold gives the same labels there, and no borders of
shards are visible. The same head, applied to tiles, gives another result in each tile:
report/examples/large_scene.png.
"""

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import segattn_ops
from benchmarks import command_line, measure
from segattn_ops import distributed

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROG = "python -m examples.large_scene"
CLASSES = ("water", "field", "meadow", "forest", "building")
COLOURS = np.array([(52, 90, 140), (182, 158, 92), (118, 150, 80), (52, 84, 48), (158, 120, 108)], np.float32)
STRIDE = 8  # pixels of a patch, each way
BLOCK = 200  # rows of pixels that are drawn at a time
POOL = 25  # patches of a key of position attention, each way
CHANNELS, KEY_CHANNELS, STATISTICS = 32, 8, 8
TRAINING_SCENES, TRAINING_SIZE, RIDGE = 4, 1600, 1e-5
SHOWN = CLASSES.index("forest")  # the class whose score is drawn
TOLERANCE = 1e-3  # of the largest logit
TIMEOUT = 600  # seconds without a message of another rank
MIB = 2**20


# The scene


@dataclass(frozen=True)
class Scene:
    """A landscape: all of it follows from the seed, and any rows can be drawn alone.

    Attributes:
        height, width: in pixels, multiples of BLOCK.
        seed: of everything.
    """

    height: int
    width: int
    seed: int

    def blocks(self, rows: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The image (BLOCK, W, 3) float32 in [0, 255] and the labels (BLOCK, W) of one block of rows after another."""
        for top in range(rows.start, rows.stop, BLOCK):
            yield self._block(top)

    def _block(self, top: int) -> tuple[np.ndarray, np.ndarray]:
        y, x = np.arange(top, top + BLOCK), np.arange(self.width)
        water = self._noise(1, y, x, 1700) + 0.4 * self._noise(2, y, x, 400) > 0.35
        town = self._noise(3, y, x, 1100) + 0.3 * self._noise(4, y, x, 300) > 0.55
        forest = self._noise(5, y, x, 700) + 0.5 * self._noise(6, y, x, 150) > 0.45
        table = np.random.default_rng([self.seed, 7]).random((256, 256), np.float32)
        parcel_row = y // 170 % 256
        parcel = (x[None] + 97 * parcel_row[:, None]) // 230 % 256
        crop = table[parcel_row[:, None], parcel]
        lot = table[(y // 48 % 256)[:, None], (x // 48 % 256)[None]]
        inside = ((y % 48 > 9) & (y % 48 < 40))[:, None] & ((x % 48 > 7) & (x % 48 < 38))[None]
        labels = np.where(crop < 0.6, 1, 2).astype(np.uint8)
        labels[forest] = 3
        labels[town & inside & (lot > 0.3)] = 4
        labels[water] = 0
        shade = 1 + 0.25 * (crop - 0.5)
        shade[labels == 4] = (0.75 + 0.5 * lot)[labels == 4]
        # Light and haze change over the whole scene, so that the same colour is another class elsewhere.
        light = 1 + 0.35 * self._noise(8, y, x, 0.55 * self.height)
        haze = 35 * self._noise(9, y, x, 0.7 * self.width)
        generator = np.random.default_rng([self.seed, 10, top])
        grain = np.array([2, 6, 7, 16, 12], np.float32)[labels]
        grain *= generator.standard_normal((BLOCK, self.width), np.float32)
        image = COLOURS[labels]
        image *= (light * shade)[..., None]
        image += (grain + haze)[..., None]
        return image.clip(0, 255), labels

    def _noise(self, number: int, y: np.ndarray, x: np.ndarray, wavelength: float) -> np.ndarray:
        """Smooth noise in [-1, 1]: (len(y), len(x))."""
        table = np.random.default_rng([self.seed, number]).uniform(-1, 1, (256, 256)).astype(np.float32)
        row, column = ((c / wavelength) for c in (y, x))
        low, left = row.astype(int), column.astype(int)
        fy, fx = (((t := c - c.astype(int)) * t * (3 - 2 * t)).astype(np.float32) for c in (row, column))
        across = table[:, left % 256] * (1 - fx) + table[:, (left + 1) % 256] * fx
        return across[low % 256] * (1 - fy)[:, None] + across[(low + 1) % 256] * fy[:, None]


def patches(scene: Scene, rows: range) -> tuple[Tensor, Tensor, Tensor]:
    """Of patches of STRIDE x STRIDE pixels in these rows: statistics (1, STATISTICS, h, w) float32, labels of their
    centres (1, 1, h, w) and mean colours (1, 3, h, w) uint8."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for image, labels in scene.blocks(rows):
        cells = image.reshape(BLOCK // STRIDE, STRIDE, scene.width // STRIDE, STRIDE, 3)
        colour = cells.mean((1, 3))
        grey = cells.mean(4)
        across, down = np.diff(grey, axis=3), np.diff(grey, axis=1)
        textures = [grey.std((1, 3)), np.abs(across).mean((1, 3)), np.abs(down).mean((1, 3))]
        textures += [grey.max((1, 3)) - colour.mean(2), colour.mean(2) - grey.min((1, 3))]
        statistics = np.concatenate([colour / 128 - 1, np.stack(textures, 2) / 32 - 0.5], 2)
        found.append((statistics, labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE, None], colour.astype(np.uint8)))
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(np.concatenate(blocks).transpose(2, 0, 1)[None].copy()) for blocks in zip(*found, strict=True)
    )


# The head


class Head(nn.Module):
    """A network for one process: criss-cross, channel and position attention side by side.

    The weights of their projections are random, and queries and keys have the same ones. Of position attention the keys
    and values are means over POOL x POOL patches.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(STATISTICS, CHANNELS, 1)
        self.criss_cross = segattn_ops.nn.CrissCrossAttention(CHANNELS, KEY_CHANNELS)
        self.position = segattn_ops.nn.PositionAttention(CHANNELS, KEY_CHANNELS)
        self.classifier = nn.Conv2d(4 * CHANNELS, len(CLASSES), 1)
        for parameter in self.parameters():
            deviation = 0 if parameter.dim() == 1 else (2 / parameter.shape[1]) ** 0.5
            nn.init.normal_(parameter, 0, deviation, generator)
        for block in (self.criss_cross, self.position):
            block.key_conv.load_state_dict(block.query_conv.state_dict())

    def features(self, statistics: Tensor) -> Tensor:
        """(1, STATISTICS, h, w) -> (1, 4 CHANNELS, h, w)."""
        x = self.stem(statistics).relu_()
        return torch.cat([x, self._crossed(x), self._channels(x), self._pooled(x)], 1)

    def forward(self, statistics: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(statistics))
        return logits

    def _crossed(self, x: Tensor) -> Tensor:
        """Criss-cross attention, twice: then each position has seen every other."""
        block = self.criss_cross
        for _ in range(2):
            x = segattn_ops.criss_cross_attention(block.query_conv(x), block.key_conv(x), block.value_conv(x))
        return x

    def _channels(self, x: Tensor) -> Tensor:
        """The energies are sums over positions; their mean does not depend on the size of the map."""
        return segattn_ops.channel_attention(x, x, x, 1 / (x.shape[2] * x.shape[3]))

    def _pooled(self, x: Tensor) -> Tensor:
        block, pooled = self.position, F.avg_pool2d(x, POOL)
        return segattn_ops.position_attention(block.query_conv(x), block.key_conv(pooled), block.value_conv(pooled))


def fit(head: Head, seed: int, rank: int, ranks: int) -> None:
    """Fits the classifier to scenes of TRAINING_SIZE by ridge regression; each rank takes some of them."""
    inputs = 4 * CHANNELS + 1
    sums = torch.zeros(inputs, inputs + len(CLASSES), dtype=torch.float64)
    for number in range(rank, TRAINING_SCENES, ranks):
        scene = Scene(TRAINING_SIZE, TRAINING_SIZE, seed + 1 + number)
        statistics, labels, _ = patches(scene, range(TRAINING_SIZE))
        features = head.features(statistics)[0].flatten(1).double()
        features = torch.cat([features, torch.ones(1, labels.numel())])
        targets = F.one_hot(labels.flatten().long(), len(CLASSES)).double()
        sums += torch.cat([features @ features.T, features @ targets], 1) / labels.numel()
    dist.all_reduce(sums)
    squares, products = sums.split([inputs, len(CLASSES)], 1)
    weights = torch.linalg.solve(squares + RIDGE * torch.eye(inputs), products).T.float()
    dist.broadcast(weights, 0)
    head.classifier.weight.copy_(weights[:, :-1, None, None])
    head.classifier.bias.copy_(weights[:, -1])


# The ranks


@dataclass(frozen=True)
class Part:
    """What a rank holds of a scene.

    Attributes:
        rows: of pixels.
        statistics, labels, colours: of its patches.
    """

    rows: range
    statistics: Tensor
    labels: Tensor
    colours: Tensor


def part_of(scene: Scene, tile: int, rank: int, ranks: int) -> Part:
    """Whole rows of tiles, so that a rank has the patches of its tiles; the first ranks may have more."""
    rows_of_tiles = np.array_split(np.arange(scene.height // tile), ranks)[rank]
    rows = range(rows_of_tiles[0] * tile, (rows_of_tiles[-1] + 1) * tile)
    return Part(rows, *patches(scene, rows))


def in_tiles(head: Head, statistics: Tensor, side: int) -> Tensor:
    """The logits of the head when it sees one tile of side x side patches at a time."""
    rows = [torch.cat([head(tile.contiguous()) for tile in row.split(side, 3)], 3) for row in statistics.split(side, 2)]
    return torch.cat(rows, 2)


class Measured:
    """Of what runs within ``with``: seconds, and the peak of this process's memory in MiB, what was added and in all;
    None where it cannot be measured."""

    def __enter__(self) -> "Measured":
        self._memory = measure.HostMemory() if measure.host_memory_is_measurable() else None
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.added = self.in_all = None
        if self._memory is not None:
            added = self._memory.peak()
            self.added, self.in_all = added / MIB, (self._memory.before + added) / MIB


def compare(head: Head, sharded: Head, options: argparse.Namespace, mesh: DeviceMesh) -> dict[str, float]:
    """The head on a scene that one process can hold, by the ranks and by the first one alone."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    scene = Scene(*options.check, options.seed)
    part = part_of(scene, options.tile, rank, ranks)
    gathered = distributed.unshard(sharded(part.statistics), mesh=mesh)
    if rank > 0:
        return {}
    statistics, _, _ = patches(scene, range(scene.height))
    alone = head(statistics)
    difference = (gathered - alone).abs().max().item()
    if difference > TOLERANCE * alone.abs().max().item():
        raise RuntimeError(f"the ranks' logits differ from those of one process by {difference:g}")
    equal = (gathered.argmax(1) == alone.argmax(1)).double().mean().item()
    return {"difference": difference, "largest": alone.abs().max().item(), "equal_labels": equal}


def seams(scores: Tensor, side: int) -> float:
    """The mean step of scores (h, w) from one row to the next, or one column, across the borders of tiles, over that
    elsewhere: about 1 without seams."""
    across, elsewhere = [], []
    for steps in (scores.diff(dim=0).abs().mean(1), scores.diff(dim=1).abs().mean(0)):
        at_border = (torch.arange(len(steps)) + 1) % side == 0
        across.append(steps[at_border])
        elsewhere.append(steps[~at_border])
    return (torch.cat(across).mean() / torch.cat(elsewhere).mean()).item()


def run_rank(options: argparse.Namespace) -> dict[str, object]:
    """What each rank does; the process group exists. The results are complete on the first rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
    mesh = init_device_mesh("cpu", (ranks,))
    head = Head().eval()
    with torch.inference_mode():
        fit(head, options.seed, rank, ranks)
        sharded = distributed.spatially_parallel(copy.deepcopy(head), mesh)
        compared = compare(head, sharded, options, mesh)
        scene = Scene(*options.size, options.seed)
        with Measured() as drawing:
            part = part_of(scene, options.tile, rank, ranks)
        dist.barrier()
        with Measured() as attending, distributed.recording() as sent:
            logits = sharded(part.statistics)
        side = options.tile // STRIDE
        with Measured() as tiling:
            tiled = in_tiles(head, part.statistics, side)
        correct = torch.tensor([(part.labels == found.argmax(1, True)).sum() for found in (logits, tiled)])
        dist.all_reduce(correct)
        own = {
            "rows": len(part.rows),
            "mib": [drawing.added, attending.added, attending.in_all],
            "seconds": [drawing.seconds, attending.seconds, tiling.seconds],
            "sent_mib": sent.bytes / MIB,
        }
        everyone: list[dict[str, object]] = [{}] * ranks
        dist.all_gather_object(everyone, own)
        parts = [part.colours, part.labels, logits, tiled]
        colours, labels, logits, tiled = (distributed.unshard(tensor, mesh=mesh) for tensor in parts)
    result: dict[str, object] = {"ranks": everyone, **compared}
    result["accuracy"], result["tiled_accuracy"] = (correct / labels.numel()).tolist()
    result["seams"], result["tiled_seams"] = (seams(found[0, SHOWN], side) for found in (logits, tiled))
    if rank == 0:
        draw(colours, labels, logits, tiled, options)
    return result


def draw(colours: Tensor, labels: Tensor, logits: Tensor, tiled: Tensor, options: argparse.Namespace) -> None:
    """Scene and labels; labels and a score of the whole scene; the same of tiles."""
    palette = COLOURS.astype(np.uint8)
    score = f"score of {CLASSES[SHOWN]}"
    tile = f"tiles of {options.tile} pixels"
    panels = [
        [("scene", colours[0].permute(1, 2, 0)), ("its labels", palette[labels[0, 0]])],
        [("labels, whole scene", palette[logits[0].argmax(0)]), (f"{score}, whole scene", logits[0, SHOWN])],
        [(f"labels, {tile}", palette[tiled[0].argmax(0)]), (f"{score}, {tile}", tiled[0, SHOWN])],
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 8.4), layout="constrained")
    for column, of_column in enumerate(panels):
        for axis, (title, panel) in zip(axes[:, column], of_column, strict=True):
            axis.imshow(panel, vmin=-0.2, vmax=1.2, cmap="viridis")
            axis.set_title(title)
            axis.set_axis_off()
    path = options.out / "large_scene.png"
    figure.savefig(path, dpi=81)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)


# Starting the ranks


def spawn(options: argparse.Namespace) -> dict[str, object]:
    """Starts the ranks as processes of this host. Raises RuntimeError if one fails; the others are then ended."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_spawned, args=(r, options, folder)) for r in range(options.ranks)]
        for process in processes:
            process.start()
        try:
            while any(process.is_alive() for process in processes):
                failed = [r for r, process in enumerate(processes) if process.exitcode not in (None, 0)]
                if failed:
                    raise RuntimeError(f"rank {failed[0]} failed with status {processes[failed[0]].exitcode}")
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failed = [r for r, process in enumerate(processes) if process.exitcode]
        if failed:
            raise RuntimeError(f"rank {failed[0]} failed with status {processes[failed[0]].exitcode}")
        result: dict[str, object] = json.loads((Path(folder) / "result.json").read_text())
    return result


def _spawned(rank: int, options: argparse.Namespace, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    result = run_rank(options)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    # Without destroying the group: gloo of torch 2.14 can abort a process that does ("terminate called without an
    # active exception").
    os._exit(0)


def report(result: dict, options: argparse.Namespace, console: Console) -> None:
    height, width = options.size
    positions = (height // STRIDE) * (width // STRIDE)
    table = Table(title=f"{height} x {width} pixels, {positions} positions, {len(result['ranks'])} ranks")
    names = ("rank", "rows", "draw, s", "MiB", "head, s", "MiB", "process, MiB", "sent, MiB", "in tiles, s")
    for column in names:
        table.add_column(column, justify="right")
    for rank, own in enumerate(result["ranks"]):
        drawing, attending, tiling = (f"{seconds:.1f}" for seconds in own["seconds"])
        drawn, added, in_all = ("-" if mib is None else f"{mib:.0f}" for mib in own["mib"])
        sent = f"{own['sent_mib']:.0f}"
        table.add_row(f"{rank}", f"{own['rows']}", drawing, drawn, attending, added, in_all, sent, tiling)
    console.print(table)
    console.print("MiB: what was added to the process, at its peak. process: the peak of all of it, in the head.")
    console.print(
        f"{options.check[0]} x {options.check[1]} pixels in one process: logits differ by at most "
        f"{result['difference']:.1e} (of {result['largest']:.2g}), {result['equal_labels']:.2%} of the labels equal",
        soft_wrap=True,
    )
    for name, prefix in (("whole scene", ""), ("in tiles", "tiled_")):
        console.print(
            f"{name}: {result[prefix + 'accuracy']:.1%} of the labels are right; steps of the score across the borders "
            f"of tiles are {result[prefix + 'seams']:.2f} times those elsewhere",
            soft_wrap=True,
        )
    console.print(f"{result['seconds']:.0f} s; picture: {options.out / 'large_scene.png'}", soft_wrap=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size, whole = command_line.size, command_line.whole
    parser.add_argument("--size", type=size, help="HEIGHTxWIDTH of the scene in pixels (10000x10000)")
    parser.add_argument("--check", type=size, help="of the scene that one process holds too (4000x2000)")
    parser.add_argument("--tile", type=whole(), help="side of a tile in pixels (1000)")
    parser.add_argument("--ranks", type=whole(1, 64), default=2, help="processes to start; not with torchrun (2)")
    parser.add_argument("--seed", type=whole(0), default=1, help="of the scene (1)")
    parser.add_argument("--quick", action="store_true", help="seconds: 2000x2000, 1600x800 and tiles of 400 by default")
    parser.add_argument("--out", type=Path, default=Path("report/examples"))
    options = parser.parse_args(argv)
    options.size = options.size or ((2000, 2000) if options.quick else (10000, 10000))
    options.check = options.check or ((1600, 800) if options.quick else (4000, 2000))
    options.tile = options.tile or (400 if options.quick else 1000)
    if dist.is_torchelastic_launched():
        options.ranks = int(os.environ["WORLD_SIZE"])
    if options.tile % (POOL * STRIDE):
        parser.error(f"--tile must be a multiple of {POOL * STRIDE} pixels (got {options.tile})")
    for name in ("size", "check"):
        height, width = getattr(options, name)
        if height % options.tile or width % options.tile:
            parser.error(f"--{name} must be a multiple of the tile, {options.tile} pixels (got {height}x{width})")
        if height // options.tile < options.ranks:
            rows = f"at least a row of tiles of {options.tile} pixels for each of {options.ranks} ranks"
            parser.error(f"--{name} must have {rows} (got {height}x{width})")
    command_line.writable_folder(options.out)
    return options


def main(argv: list[str] | None = None) -> dict[str, object]:
    options = parsed(argv)
    begin = time.perf_counter()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        result = run_rank(options)
        is_first = dist.get_rank() == 0
        dist.destroy_process_group()
    else:
        result, is_first = spawn(options), True
    result["seconds"] = time.perf_counter() - begin
    if is_first:
        report(result, options, Console())
    return result


if __name__ == "__main__":
    sys.exit(command_line.example(PROG, main))
