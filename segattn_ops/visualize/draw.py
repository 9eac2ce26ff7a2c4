"""Attention maps and channel maps as heat over images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .._files import replacing
from .channels import ChannelMaps
from .heat import bar_colours, heat, in_units_of_uniform, over_image, ticks, top_of
from .images import Image, as_image, as_map, as_response
from .points import Points, fractions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NEEDS = "visualize: drawing needs matplotlib (pip install matplotlib)"
_OPACITY = 0.85
_COLORMAP = "inferno"
_PANEL = 2.6  # inches
_DPI = 150


def overlay(
    image: Image,
    attention: np.ndarray | Tensor,
    opacity: float = _OPACITY,
    colormap: str = _COLORMAP,
    top: float | None = None,
) -> np.ndarray:
    """An attention map as heat over the darkened image in grey.

    The heat is on a scale in units of uniform attention, the mean of the map: log2(1 + value), from 0 to ``top``. A map
    that is nearly uniform therefore looks nearly uniform.

    Args:
        image: the path of an image file, a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or (C, H, W)
            of 1, 3 or 4 channels (the fourth is opacity, over white). bool, uint8, or numbers in [0, 1] (floating point
            only), [0, 255] or [0, 65535], whichever is the smallest that holds all values.
        attention: (h, w), not negative, of any size, any real dtype and device. It is interpolated to the image's size.
        opacity: of the hottest colour, in [0, 1].
        colormap: of matplotlib, by name.
        top: how many times uniform attention gets the hottest colour; if None, the value above which a
            tenth of the map's attention lies, from 8 to 256.

    Returns:
        (H, W, 3) uint8.

    Raises:
        TypeError: for an image or a map of another type.
        ValueError: for other shapes, values that are not finite or outside these ranges (a normalised image), a file
            that is not an image or has more pixels than
            PIL.Image.MAX_IMAGE_PIXELS (each takes up to 36 bytes), an opacity, a colormap or a top that does not exist.
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib import colormaps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NEEDS, name=error.name) from error

    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity must be in [0, 1] (got {opacity})")
    if colormap not in colormaps:
        raise ValueError(f"overlay: colormap must be one of matplotlib's, such as 'inferno' (got {colormap!r})")
    if top is not None and not 0 < top < math.inf:
        raise ValueError(f"overlay: top must be a positive number of times uniform attention (got {top})")
    picture, weights = as_image(image), in_units_of_uniform(as_map(attention))
    scaled = heat(weights, top_of([weights]) if top is None else top)
    return over_image(picture, scaled, opacity, colormaps[colormap])


def draw_attention(
    image: Image,
    maps: Mapping[str, np.ndarray | Tensor],
    points: Points,
    path: str | PathLike[str] | None = None,
    caption: str | None = None,
    *,
    units: str = "fractions",
    columns: int | None = None,
) -> Figure:
    """A figure with one row for each point: the image with the point marked, then each attention map over the image.

    All maps share one scale, whose bar is on the right: that of :func:`overlay`, in units of uniform attention, which
    gives every position of a map the same weight. Where the bar ends in an arrow, some values lie beyond it.

    Args:
        image: as :func:`overlay`.
        maps: title -> (P, h, w), the attention maps of the P points in one image.
        points: (y, x), at least one.
        path: file to save the figure to; not saved if None.
        caption: a line below.
        units: of the points: "fractions" of the image, or "pixels", whole numbers from (0, 0).
        columns: panels side by side; those of a point continue below. All of a point in a row if None.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        TypeError: for an image or a map of another type, or maps that are not a mapping.
        ValueError: as :func:`overlay`; if there are no points or no attention maps, or one does not have a row for each
            point; for points outside the image, other units, and columns that are not a positive whole number.
        ModuleNotFoundError: without matplotlib.
    """
    if not isinstance(maps, Mapping):
        raise TypeError(f"draw_attention: maps must be a dictionary, title -> (P, h, w) (got {type(maps).__name__})")
    picture = as_image(image)
    height, width = picture.shape[:2]
    marks = fractions(points, 2, units, (height, width) if units == "pixels" else None).tolist()
    if not maps or not marks:
        raise ValueError(f"draw_attention: there are no {'points' if maps else 'maps'} to draw")
    rows_of = {title: in_units_of_uniform(_rows(title, rows, len(marks))) for title, rows in maps.items()}
    top = top_of([weights for rows in rows_of.values() for weights in rows])
    panels = 1 + len(maps)
    figure = _Figure("draw_attention", picture, len(marks), panels, columns, caption)
    for row, (y, x) in enumerate(marks):
        shown = [over_image(picture, heat(rows[row], top), _OPACITY, figure.colormap) for rows in rows_of.values()]
        for column, (title, pixels) in enumerate(zip(["point", *rows_of], [picture, *shown], strict=True)):
            axis = figure.panel(row, column, pixels, title if row == 0 or figure.wraps else "")
            at = (x * width - 0.5, y * height - 0.5)  # of imshow, where the first pixel's centre is 0
            axis.plot(*at, marker="o", markersize=8, markerfacecolor="none", color="white", mew=3)
            axis.plot(*at, marker="o", markersize=8, markerfacecolor="none", color="#00b7c7", mew=1.6)
    figure.bar(top, beyond=any(float(rows.max()) > top for rows in rows_of.values()))
    return figure.finish(path)


def draw_channel_attention(
    image: Image,
    maps: ChannelMaps,
    channels: Sequence[int] | None = None,
    path: str | PathLike[str] | None = None,
    caption: str | None = None,
    *,
    columns: int | None = None,
) -> Figure:
    """A figure of channel attention in one image: the image, the response of each channel over it, the channel map.

    A response is drawn from its least to its largest value, which are in its title. The channel map has a row for every
    channel, in the colours of the bar on the right: attention to each channel in units of uniform attention.

    Args:
        image: as :func:`overlay`.
        maps: of one image, ``maps[name].image(0)`` of what :func:`record_channel_attention` yields.
        channels: whose responses are drawn; if None, the three that vary most over the positions.
        path: file to save the figure to; not saved if None.
        caption: a line below.
        columns: panels side by side, as :func:`draw_attention`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        TypeError: for an image or maps of another type.
        ValueError: as :func:`overlay`; for the maps of a batch, and for channels that the response does not have.
        ModuleNotFoundError: without matplotlib.
    """
    if not isinstance(maps, ChannelMaps):
        raise TypeError(
            "draw_channel_attention: maps must be the ChannelMaps of one image, maps[name].image(0) "
            f"(got {type(maps).__name__})"
        )
    picture = as_image(image)
    weights, response = _channel_maps(maps)
    chosen = _channels(channels, response)
    figure = _Figure("draw_channel_attention", picture, 1, 2 + len(chosen), columns, caption)
    figure.panel(0, 0, picture, "image")
    for column, channel in enumerate(chosen, start=1):
        values = response[channel]
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) / ((high - low) or 1.0)
        low, high = (0.0 if abs(end) < 1e-3 * (high - low) else end for end in (low, high))  # shown without an exponent
        title = f"channel {channel}: {low:.2g} to {high:.2g}"
        figure.panel(0, column, over_image(picture, scaled, _OPACITY, figure.colormap), title)
    units = in_units_of_uniform(weights)
    top = top_of([units])
    axis = figure.panel(0, 1 + len(chosen), figure.colours(heat(units, top)), "channel map", smooth=False)
    axis.set_axis_on()
    axis.set_xlabel("attended channel", fontsize=9, labelpad=2)
    axis.set_ylabel("channel", fontsize=9, labelpad=2)
    axis.set_xticks([0, weights.shape[1] - 1])
    axis.set_yticks(chosen)
    axis.tick_params(labelsize=8)
    figure.bar(top, beyond=float(units.max()) > top)
    return figure.finish(path)


class _Figure:
    """Panels in rows, each row of panels over as many lines as ``columns`` needs, with one colour bar."""

    def __init__(
        self, op: str, picture: np.ndarray, rows: int, panels: int, columns: int | None, caption: str | None
    ) -> None:
        try:
            from matplotlib import colormaps
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.layout_engine import ConstrainedLayoutEngine
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_NEEDS, name=error.name) from error

        if columns is None:
            columns = panels
        if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
            raise ValueError(f"{op}: columns must be a whole number of at least 1 (got {columns!r})")
        self.columns = min(columns, panels)
        self.lines = -(-panels // self.columns)
        self.wraps = self.lines > 1
        self.colormap: Any = colormaps[_COLORMAP]
        aspect = picture.shape[0] / picture.shape[1]
        lines = self.lines * rows
        height = (_PANEL * aspect + 0.06) * lines + 0.27 * (lines if self.wraps else 1) + (0.35 if caption else 0.1)
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
        self.figure = Figure(figsize=(_PANEL * self.columns + 0.8, height), layout=layout, dpi=_DPI)
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(rows * self.lines, self.columns, squeeze=False)
        for axis in self.axes.flat:
            axis.set_axis_off()
        if caption:
            self.figure.supxlabel(caption, fontsize=9, color="#444444")

    def panel(self, row: int, column: int, pixels: np.ndarray, title: str, smooth: bool = True) -> Any:
        axis = self.axes[row * self.lines + column // self.columns, column % self.columns]
        axis.imshow(pixels, interpolation="bilinear" if smooth else "nearest")
        axis.set_title(title, fontsize=11)
        return axis

    def colours(self, scaled: Tensor) -> np.ndarray:
        """(h, w, 3): values in [0, 1] in the colours of the bar."""
        places = np.rint(255 * scaled.numpy()).astype(np.intp)
        found: np.ndarray = bar_colours(_OPACITY, self.colormap)[places]
        return found

    def bar(self, top: float, beyond: bool) -> None:
        """The scale in units of uniform attention, with an arrow if there are values ``beyond`` its end."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        scale = ScalarMappable(Normalize(0, 1), ListedColormap(bar_colours(_OPACITY, self.colormap)))
        places, labels = ticks(top)
        bar = self.figure.colorbar(
            scale, ax=self.axes, extend="max" if beyond else "neither", fraction=0.05, pad=0.015, aspect=25
        )
        bar.set_ticks(places, labels=labels, fontsize=9)
        bar.set_label("times uniform attention", fontsize=10)

    def finish(self, path: str | PathLike[str] | None) -> Figure:
        if path is not None:
            with replacing(path) as part:
                self.figure.savefig(part, bbox_inches="tight", pad_inches=0.05)
        return self.figure


def _rows(title: str, maps: np.ndarray | Tensor, count: int) -> Tensor:
    """(count, h, w) float32 on the CPU."""
    shape = list(getattr(maps, "shape", ()))
    hint = ""
    if len(shape) == 4:
        hint = "; take one image of the batch, maps[0]"
    elif len(shape) == 5:
        hint = "; take one image of the batch and one head, maps[0, 0]"
    elif len(shape) == 2 and shape[0] == count:
        hint = "; weights of pooled keys have no positions, see spread_pooled"
    if shape and (len(shape) != 3 or shape[0] != count):
        raise ValueError(f"draw_attention: {title} must be ({count}, h, w){hint} (got shape {shape})")
    return as_map(maps, title, "(P, h, w)")


def _channel_maps(maps: ChannelMaps) -> tuple[Tensor, Tensor]:
    """The channel map (C, K) and the response (C, h, w), float32 on the CPU."""
    for name, tensor, rank in (("weights", maps.weights, 2), ("response", maps.response, 3)):
        if tensor.dim() == rank + 1:
            raise ValueError(
                f"draw_channel_attention: maps must be of one image: take maps.image(0) (got {name} of shape "
                f"{list(tensor.shape)})"
            )
    weights, response = as_map(maps.weights, "weights", names="(C, K)"), as_response(maps.response)
    if len(weights) != len(response):
        raise ValueError(
            f"draw_channel_attention: weights and response must have the same channels (got {len(weights)} and "
            f"{len(response)})"
        )
    return weights, response


def _channels(channels: Sequence[int] | None, response: Tensor) -> list[int]:
    if channels is None:
        return sorted(response.flatten(1).std(1).topk(min(3, len(response))).indices.tolist())
    last = len(response) - 1
    chosen = list(channels)
    if not chosen or not all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c <= last for c in chosen):
        raise ValueError(f"draw_channel_attention: channels must be from 0 to {last}, at least one (got {channels!r})")
    return chosen
