"""Draws the attention of a trained network over an image: what chosen points
attend to, or, with --channels, the channel attention of DANet. The network is
built from the checkpoint, which may have the names of any known repository
(see convert-checkpoint), or by a function of your own (--network)."""

from __future__ import annotations

import argparse
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checkpoints
from ..checkpoints import Preprocessing
from . import network
from .command_line import Refused, device, input_file, lines, output_file, require, whole

SUMMARY = "draws what points of an image attend to"


def _points(text: str) -> list[tuple[float, float]]:
    number = r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?\s*"
    pairs = [pair for pair in text.split(";") if pair.strip()]
    if not pairs or not all(re.fullmatch(f"{number},{number}", pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"points are y,x;y,x (got {text!r})")
    return [(float(y), float(x)) for y, x in (pair.split(",") for pair in pairs)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a picture that PIL reads")
    parser.add_argument("--checkpoint", help="weights of a whole network")
    parser.add_argument(
        "--network",
        metavar="MODULE:FUNCTION",
        help="what makes the network, called without arguments; --checkpoint is then a state dict with its names, and "
        "may be left out if the function loads the weights",
    )
    parser.add_argument("--points", type=_points, help='"y,x;y,x", from the upper left corner')
    parser.add_argument(
        "--units", choices=("fractions", "pixels"), default="fractions", help="of the points (default fractions)"
    )
    parser.add_argument("--channels", action="store_true", help="draw channel attention, which has no points")
    parser.add_argument("--output", default="attention.png", help="the file to write (default attention.png)")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    parser.add_argument(
        "--longest",
        type=whole(16, 10**5),
        default=1024,
        help="pixels: the network sees the picture scaled down to this longer side (default 1024)",
    )
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--prefix", help="take the names of the checkpoint that begin so")


def run(arguments: argparse.Namespace) -> int:
    require("matplotlib", "PIL")
    from ..visualize.images import as_image
    from ..visualize.points import fractions

    if arguments.channels == (arguments.points is not None):
        raise Refused("pass either --points or --channels")
    output = output_file(arguments.output, arguments.force)
    picture = as_image(input_file(arguments.image))
    if arguments.points is not None:  # before the network is built
        fractions(arguments.points, 2, arguments.units, _size(picture, arguments.units))
    model, title = _network(arguments)
    on = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().to(on)
    x = _input(model, picture, arguments.longest).to(on)
    drawn = _draw_channels if arguments.channels else _draw_points
    names = drawn(model, x, picture, arguments, output)
    size = f"{x.shape[2]} x {x.shape[3]} pixels of {picture.shape[0]} x {picture.shape[1]}"
    rows = [("network", title), ("input", size), ("attention", ", ".join(names))]
    print(lines([*rows, ("wrote", str(output))]))
    return 0


def _network(arguments: argparse.Namespace) -> tuple[nn.Module, str]:
    """The network with its weights, and what it is."""
    if arguments.network is not None:
        if arguments.prefix is not None:
            raise Refused("--prefix is of checkpoints from which the network is built; pass it without --network")
        model = network.made_by(arguments.network)
        if not isinstance(getattr(model, "preprocessing", None), Preprocessing):
            raise Refused(
                f"the network of {arguments.network} does not say which input its weights expect: set its attribute "
                "`preprocessing` to a segattn_ops.checkpoints.Preprocessing"
            )
        if arguments.checkpoint is not None:
            state = checkpoints.read(input_file(arguments.checkpoint))
            try:
                model.load_state_dict(state)
            except RuntimeError as error:  # torch's, for names and shapes
                raise Refused(f"{arguments.checkpoint} is not of {arguments.network}: {error}") from error
        return model, f"{type(model).__name__} of {arguments.network}"
    if arguments.checkpoint is None:
        raise Refused("pass --checkpoint, --network or both")
    loaded = network.load(input_file(arguments.checkpoint), arguments.prefix)
    if loaded.backbone is None:
        raise Refused(
            f"{arguments.checkpoint} has no backbone with the names of a ResNet; --network names a function that "
            "makes another network"
        )
    return loaded.module, f"{type(loaded.module).__name__} on {loaded.backbone}"


def _input(model: Any, picture: np.ndarray, longest: int) -> Tensor:
    """(1, 3, H, W) as the network's weights expect it, scaled down if it is larger."""
    x: Tensor = model.preprocessing(picture)
    factor = longest / max(x.shape[2:])
    if factor >= 1:
        return x
    size = [max(round(side * factor), 1) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def _size(picture: np.ndarray, units: str) -> tuple[int, ...] | None:
    """That of the picture whose pixels are counted."""
    return picture.shape[:2] if units == "pixels" else None


def _run(model: nn.Module, x: Tensor, recording: AbstractContextManager[dict[str, Any]]) -> dict[str, Any]:
    with torch.no_grad(), recording as maps:
        model(x)
    return maps


def _draw_points(
    model: nn.Module, x: Tensor, picture: np.ndarray, arguments: argparse.Namespace, output: Path
) -> list[str]:
    from ..visualize import draw_attention, record_attention

    points, units = arguments.points, arguments.units
    maps = _run(model, x, record_attention(model, points, units=units, size=_size(picture, units)))
    shown = {name: _over_positions(one[0], x) for name, one in maps.items()}
    draw_attention(picture, shown, points, output, units=units, columns=4)
    return list(shown)


def _over_positions(rows: Tensor, x: Tensor) -> Tensor:
    """(P, h, w): the maps as they are, those of ANN's pooled keys spread over the positions at output stride 8."""
    from ..visualize import spread_pooled

    return rows if rows.dim() == 3 else spread_pooled(rows, (1, 3, 6, 8), -(-x.shape[2] // 8), -(-x.shape[3] // 8))


def _draw_channels(
    model: nn.Module, x: Tensor, picture: np.ndarray, arguments: argparse.Namespace, output: Path
) -> list[str]:
    from ..visualize import draw_channel_attention, record_channel_attention

    maps = _run(model, x, record_channel_attention(model))
    name, found = next(iter(maps.items()))
    draw_channel_attention(picture, found.image(0), path=output, columns=4)
    return [name]
