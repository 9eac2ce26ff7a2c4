"""Images and maps of every usual kind are drawn alike, and the others are refused in words."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from segattn_ops import visualize
from segattn_ops.visualize.images import as_image, as_map

POINTS = [(0.1, 0.2), (0.9, 0.65)]
PIXELS = np.random.default_rng(0).integers(1, 255, (12, 9, 3), dtype=np.uint8)
GREY = PIXELS[:, :, 0]
FRACTIONS = PIXELS.astype(np.float32) / 255


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * alpha + 1 - alpha


COLOURED = {
    "numpy, channels last": PIXELS,
    "numpy, channels first": PIXELS.transpose(2, 0, 1),
    "tensor, channels first": torch.tensor(PIXELS).permute(2, 0, 1),
    "tensor that requires a gradient": torch.tensor(FRACTIONS).permute(2, 0, 1).requires_grad_(),
    "float64": FRACTIONS.astype(np.float64),
    "0 to 255 in float": PIXELS.astype(np.float32),
    "int64": PIXELS.astype(np.int64),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "tensor of uint16": torch.from_numpy(PIXELS.astype(np.uint16) * 257),
    "16-bit range in float": PIXELS.astype(np.float64) * 257,
    "opaque RGBA": np.concatenate([PIXELS, np.full((12, 9, 1), 255, np.uint8)], axis=2),
    "PIL RGB": Image.fromarray(PIXELS),
    "PIL RGBA": Image.fromarray(PIXELS).convert("RGBA"),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_coloured_images(kind):
    np.testing.assert_allclose(as_image(COLOURED[kind]), FRACTIONS, atol=1e-6)


GREYS = {
    "(H, W)": GREY,
    "(H, W, 1)": GREY[:, :, None],
    "(1, H, W)": torch.tensor(GREY)[None],
    "0 to 255 in float": GREY.astype(np.float32),
    "PIL L": Image.fromarray(GREY),
    "PIL I": Image.fromarray(GREY.astype(np.int32)),
    "PIL F": Image.fromarray(GREY.astype(np.float32)),
    "PIL I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
    "PIL LA": Image.fromarray(GREY).convert("LA"),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_images(kind):
    np.testing.assert_allclose(as_image(GREYS[kind]), np.repeat(FRACTIONS[:, :, :1], 3, axis=2), atol=1e-6)


def test_other_modes_of_pil_are_as_pil_converts_them():
    photograph = Image.fromarray(PIXELS)
    for mode in ("P", "CMYK", "YCbCr", "HSV", "1"):
        image = photograph.convert(mode)
        expected = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        np.testing.assert_allclose(as_image(image), expected, atol=1e-6, err_msg=mode)


def test_transparent_pixels_are_white():
    alpha = np.linspace(0, 255, 108).round().astype(np.uint8).reshape(12, 9, 1)
    rgba = np.concatenate([PIXELS, alpha], axis=2)
    expected = over_white(FRACTIONS, alpha / np.float32(255))
    for image in (rgba, torch.tensor(rgba).permute(2, 0, 1), Image.fromarray(rgba), rgba.astype(np.float32) / 255):
        np.testing.assert_allclose(as_image(image), expected, atol=1e-6)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    np.testing.assert_allclose(as_image(palette), [[[1, 1, 1], [0, 0, 1]]])


def test_boolean_masks_and_16_bit_floats():
    mask = GREY > 128
    np.testing.assert_array_equal(as_image(mask)[:, :, 0], mask)
    for dtype in (torch.float16, torch.bfloat16):
        np.testing.assert_allclose(as_image(torch.tensor(FRACTIONS, dtype=dtype)), FRACTIONS, atol=4e-3)


def test_the_overshoot_of_resizing_is_clipped():
    for white in (1, 255):
        ramp = np.linspace(-0.03 * white, 1.03 * white, 50, dtype=np.float32).reshape(5, 10)
        np.testing.assert_allclose(as_image(ramp)[:, :, 0], np.clip(ramp / white, 0, 1), atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(GREY).save(path)
    for given in (path, str(path)):
        np.testing.assert_allclose(as_image(given), np.repeat(FRACTIONS[:, :, :1], 3, axis=2), atol=1e-6)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (PIXELS[None], ValueError, "take one image of the batch"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"take one image of the batch \(got shape \[1, 3, 4, 4\]\)"),
        (np.zeros((5, 5, 2)), ValueError, "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3)), ValueError, "not empty"),
        (np.zeros(7), ValueError, "image must be"),
        (np.full((4, 4), np.nan), ValueError, "image must be finite"),
        (np.full((4, 4), np.inf, np.float32), ValueError, "image must be finite"),
        ((FRACTIONS - 0.45) / 0.22, ValueError, "undo a normalisation"),
        (np.full((4, 4), 2.6), ValueError, "undo a normalisation"),
        (np.full((4, 4), -3), ValueError, "undo a normalisation"),
        (np.full((4, 4), 70000), ValueError, r"\[0, 65535\]"),
        (np.zeros((4, 4), np.complex64), TypeError, "of real numbers"),
        (torch.zeros(4, 4, dtype=torch.complex64), TypeError, "of real numbers"),
        (np.full((4, 4), "a"), TypeError, "of real numbers"),
        (None, TypeError, "image must be a path.*NoneType"),
        ([[0.5]], TypeError, "image must be a path.*list"),
        (b"\x89PNG", TypeError, "image must be a path.*bytes"),
    ],
)
def test_other_images_are_refused_in_words(image, error, message):
    with pytest.raises(error, match=f"visualize: .*{message}"):
        visualize.overlay(image, torch.ones(2, 2))


def test_files_that_are_no_images_are_refused_in_words(tmp_path):
    Image.fromarray(PIXELS).resize((90, 120)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "page.png").write_text("<html>")
    for name, message in [
        ("none.png", "no file"),
        (".", "a folder"),
        ("page.png", "not an image that PIL can read"),
        ("half.jpg", "not an image that PIL can read"),
    ]:
        with pytest.raises(ValueError, match=f"visualize: .*{message}"):
            as_image(tmp_path / name)


def test_maps_of_every_kind():
    weights = torch.rand(3, 4)
    expected = as_map(weights)
    for given in (weights.double(), weights.numpy(), weights.clone().requires_grad_()):
        torch.testing.assert_close(as_map(given), expected)
    for given in (weights.half(), weights.bfloat16(), torch.nn.Parameter(weights.bfloat16())):
        torch.testing.assert_close(as_map(given), expected, atol=4e-3, rtol=0)
    assert as_map(weights > 0.5).tolist() == (weights > 0.5).float().tolist()
    assert as_map(np.arange(6).reshape(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        (torch.ones(2), ValueError, r"attention must be \(h, w\)"),
        (torch.ones(1, 2, 2), ValueError, r"attention must be \(h, w\)"),
        (torch.ones(0, 2), ValueError, "not empty"),
        (torch.full((2, 2), float("nan")), ValueError, "must be finite"),
        (torch.tensor([[-0.5, 1.0]]), ValueError, "must not be negative"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "of real numbers"),
        ([[1.0]], TypeError, "attention must be a numpy array or a tensor"),
    ],
)
def test_other_maps_are_refused_in_words(attention, error, message):
    with pytest.raises(error, match=f"visualize: .*{message}"):
        visualize.overlay(PIXELS, attention)


def test_overlay_is_hot_where_attention_is():
    image = np.full((40, 60, 3), 128, dtype=np.uint8)
    attention = torch.zeros(4, 6)
    attention[1, 4] = 1
    drawn = visualize.overlay(image, attention)
    assert drawn.shape == (40, 60, 3)
    assert drawn.dtype == np.uint8
    brightness = drawn.astype(int).sum(2)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (y // 10, x // 10) == (1, 4)
    grey = drawn[35, 5]
    assert grey[0] == grey[1] == grey[2] < 128  # darkened, no colour
    assert visualize.overlay(image, torch.zeros(3, 3)).max() < 255  # no attention at all is not an error


def test_options_of_overlay_are_checked():
    for options, message in [
        ({"opacity": 1.5}, "opacity must be in"),
        ({"colormap": "heat"}, "colormap must be one"),
        ({"top": 0}, r"top must be a positive number of times uniform attention \(got 0\)"),
        ({"top": float("inf")}, "top must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=f"overlay: {message}"):
            visualize.overlay(PIXELS, torch.ones(2, 2), **options)


def near(shape: tuple[int, int], low: float, high: float) -> torch.Tensor:
    """Weights between low and high times uniform attention, both of which are there."""
    return torch.linspace(low, high, shape[0] * shape[1]).view(shape)


def test_a_nearly_uniform_map_looks_nearly_uniform():
    """And like uniform attention: at a third of the scale, whatever its sum."""
    grey = np.full((40, 60, 3), 128, dtype=np.uint8)
    uniform = visualize.overlay(grey, torch.full((4, 6), 1 / 24)).astype(int)
    assert np.ptp(uniform, axis=(0, 1)).max() == 0
    for total in (1.0, 24.0):
        drawn = visualize.overlay(grey, near((4, 6), 0.9, 1.08) * total / 24).astype(int)
        assert abs(drawn - uniform).max() <= 8
    peak = torch.ones(4, 6)
    peak[1, 4] = 30
    drawn = visualize.overlay(grey, peak).astype(int)
    assert abs(drawn - uniform).max() > 100


def test_a_tenth_of_the_attention_may_be_beyond_the_scale():
    """A single peak sets the scale if it is much of the attention, and not if the rest is."""
    image = np.full((20, 20, 3), 128, np.uint8)
    for peak, labels, beyond in [
        (0.05, ["0", "1", "2", "4", "8"], True),
        (0.2, ["0", "1", "4", "16", "64"], False),  # 205 times uniform attention
    ]:
        weights = torch.full((1, 32, 32), (1 - peak) / 1023)
        weights[0, 3, 3] = peak
        assert scale(visualize.draw_attention(image, {"peak": weights}, [(0.5, 0.5)])) == (labels, beyond)


def test_the_scale_of_an_overlay_can_be_given():
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    uniform = torch.ones(2, 2)
    same = visualize.overlay(grey, uniform, top=8)
    assert (visualize.overlay(grey, uniform) == same).all()
    assert visualize.overlay(grey, uniform, top=1).sum() > same.sum() > visualize.overlay(grey, uniform, top=100).sum()


def panels(figure) -> list:
    """The axes of a figure but that of its colour bar, which is the last."""
    return figure.axes[:-1]


def scale(figure) -> tuple[list[str], bool]:
    """The labels of the colour bar, and whether some values are beyond its end."""
    bar = figure.axes[-1]
    return [text.get_text() for text in bar.get_yticklabels()], bar._colorbar.extend == "max"


def test_the_colour_bar_is_in_units_of_uniform_attention():
    image, centre = np.full((20, 20, 3), 128, np.uint8), [(0.5, 0.5)]
    mild = visualize.draw_attention(image, {"mild": near((10, 10), 0.5, 1.5)[None]}, centre)
    assert scale(mild) == (["0", "1", "2", "4", "8"], False)
    assert mild.axes[-1].get_ylabel() == "times uniform attention"
    peak = torch.zeros(1, 10, 10)
    peak[0, 5, 5] = 1  # a hundred times uniform attention
    figure = visualize.draw_attention(image, {"mild": near((10, 10), 0.5, 1.5)[None], "peak": peak}, centre)
    assert scale(figure) == (["0", "1", "4", "16", "64"], False)
    beyond = torch.nn.functional.pad(torch.ones(1, 1, 1), (0, 39, 0, 39))  # 1600 times
    assert scale(visualize.draw_attention(image, {"beyond": beyond}, centre)) == (
        ["0", "1", "4", "16", "64", "256"],
        True,
    )
    # The same map looks the same in a figure with one scale for both maps as alone on that scale.
    (axis,) = [axis for axis in panels(figure) if axis.get_title() == "mild"]
    alone = visualize.overlay(image, near((10, 10), 0.5, 1.5), top=100)
    assert abs(axis.images[0].get_array().astype(int) - alone).max() <= 1


def marked(figure) -> list[tuple[float, float]]:
    """(y, x) of the mark in the first panel of every point."""
    lines = [axis.lines[0] for axis in panels(figure) if axis.get_title() == "point"]
    return [(float(line.get_ydata()[0]), float(line.get_xdata()[0])) for line in lines]


def test_points_in_pixels():
    maps = {"a": torch.ones(1, 2, 2)}
    for units, point in [("pixels", (11, 4)), ("fractions", (11.5 / 12, 4.5 / 9))]:
        (at,) = marked(visualize.draw_attention(PIXELS, maps, [point], units=units))
        assert at == pytest.approx((11, 4))
    for units, point, message in [
        ("pixels", (12, 4), r"\(0 to 11, 0 to 8\) \(got \[\[12\.0, 4\.0\]\]\)"),
        ("pixels", (0.5, 0.5), "points in pixels must be whole numbers"),
        ("percent", (50, 50), "units must be 'fractions' or 'pixels'"),
    ]:
        with pytest.raises(ValueError, match=f"visualize: .*{message}"):
            visualize.draw_attention(PIXELS, maps, [point], units=units)


def test_panels_continue_below():
    maps = {name: torch.ones(2, 2, 2) for name in "abc"}
    figure = visualize.draw_attention(PIXELS, maps, POINTS, columns=2)
    titles = [axis.get_title() for axis in panels(figure)]
    assert titles == ["point", "a", "b", "c"] * 2
    rows = {round(axis.get_position().y0, 3) for axis in panels(figure)}
    assert len(rows) == 4
    for columns in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"draw_attention: columns must be a whole number of at least 1 \(got"):
            visualize.draw_attention(PIXELS, maps, POINTS, columns=columns)


def test_draw_attention_writes_a_picture(tmp_path):
    path = tmp_path / "attention.png"
    Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(tmp_path / "image.png")
    maps = {"first": torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True), "second": np.ones((2, 3, 3))}
    for points in (POINTS, np.array(POINTS), torch.tensor(POINTS)):
        figure = visualize.draw_attention(tmp_path / "image.png", maps, points, path, "a caption")
        assert len(panels(figure)) == 6
    assert np.asarray(Image.open(path).convert("L")).std() > 0.05 * 255


@pytest.mark.parametrize(
    ("maps", "points", "error", "message"),
    [
        ({}, POINTS, ValueError, "there are no maps"),
        ({"a": torch.ones(0, 2, 2)}, [], ValueError, "there are no points"),
        ({"a": torch.ones(1, 2, 2)}, POINTS, ValueError, r"a must be \(2, h, w\)"),
        ({"a": torch.ones(1, 2, 2, 2)}, POINTS, ValueError, r"take one image of the batch, maps\[0\]"),
        ({"a": torch.ones(2, 110)}, POINTS, ValueError, "see spread_pooled"),
        ({"a": [1.0]}, POINTS, TypeError, "a must be a numpy array or a tensor"),
        (torch.ones(2, 2, 2), POINTS, TypeError, "maps must be a dictionary"),
        ({"a": torch.ones(1, 2, 2)}, [(12, 30)], ValueError, "pixels with units='pixels'"),
    ],
)
def test_what_cannot_be_drawn_is_named(maps, points, error, message):
    with pytest.raises(error, match=message):
        visualize.draw_attention(PIXELS, maps, points)


def test_without_matplotlib_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="drawing needs matplotlib"):
        visualize.overlay(PIXELS, torch.ones(2, 2))
    with pytest.raises(ModuleNotFoundError, match="drawing needs matplotlib"):
        visualize.draw_attention(PIXELS, {"a": torch.ones(2, 2, 2)}, POINTS)
