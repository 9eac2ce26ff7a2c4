"""Attention maps over images: the rows are those of the module, drawn at their positions."""

import numpy as np
import pytest
import torch

from segattn_ops import criss_cross_attention, nn, position_attention, use_backend, visualize

POINTS = [(0.1, 0.2), (0.9, 0.65)]


@pytest.fixture(autouse=True)
def reference():
    with use_backend("reference"):
        yield


def with_gamma(module: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.constant_(module.gamma, 0.7)
    return module.double()


def one_hot_map(module: torch.nn.Module, x: torch.Tensor, position: tuple[int, int]) -> torch.Tensor:
    """A row of the attention map from the op: attention over values that are one-hot codes of their positions."""
    height, width = x.shape[2:]
    codes = torch.eye(height * width, dtype=x.dtype).view(1, height * width, height, width)
    attend = position_attention if isinstance(module, nn.PositionAttention) else criss_cross_attention
    output = attend(module.query_conv(x), module.key_conv(x), codes, module.scale)
    return output[0, :, position[0], position[1]].view(height, width)


@pytest.mark.parametrize("kind", [nn.PositionAttention, nn.CrissCrossAttention])
def test_rows_are_what_the_module_applies(kind):
    module = with_gamma(kind(16))
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    maps = visualize.attention_maps(module, x, POINTS)
    assert maps.shape == (1, 2, 5, 7)
    for row, position in enumerate([(0, 1), (4, 4)]):
        torch.testing.assert_close(maps[0, row], one_hot_map(module, x, position).detach())


def test_recurrent_map_is_the_product_of_its_steps():
    module = with_gamma(nn.RecurrentCrissCrossAttention(16, recurrence=2))
    x = torch.randn(1, 16, 4, 6, dtype=torch.float64)
    maps = visualize.attention_maps(module, x, [(0.3, 0.5)])
    n = 24
    steps = []
    with torch.no_grad():
        for _ in range(2):
            steps.append(
                torch.stack([one_hot_map(module, x, (i // 6, i % 6)).flatten() for i in range(n)])
            )  # (query, key)
            x = module._attend(x)
    expected = (steps[1] @ steps[0])[1 * 6 + 3].view(4, 6)
    torch.testing.assert_close(maps[0, 0], expected)
    assert (maps > 0).all()  # two passes reach every position


def test_non_local_modes_and_sub_sampling():
    x = torch.randn(2, 8, 6, 6)
    for mode, sub_sample, shape in [("embedded_gaussian", False, 6), ("gaussian", True, 3), ("gaussian", False, 6)]:
        module = nn.NonLocal2d(8, mode=mode, sub_sample=sub_sample)
        maps = visualize.attention_maps(module, x, POINTS)
        assert maps.shape == (2, 2, shape, shape)
        torch.testing.assert_close(maps.flatten(2).sum(2), torch.ones(2, 2))


def test_record_attention_sees_every_module_and_leaves_no_hook():
    model = torch.nn.Sequential(nn.PositionAttention(16), nn.ChannelAttention(16), nn.CrissCrossAttention(16))
    x = torch.randn(1, 16, 6, 8)
    with visualize.record_attention(model, POINTS) as maps:
        model(x)
    assert list(maps) == ["0", "2"]
    torch.testing.assert_close(maps["0"], visualize.attention_maps(model[0], x, POINTS))
    maps.clear()
    model(x)
    assert not maps


def test_a_module_alone_is_recorded_by_its_class():
    module = nn.PositionAttention(8)
    with visualize.record_attention(module, POINTS) as maps:
        module(torch.randn(1, 8, 4, 4))
    assert list(maps) == ["PositionAttention"]


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


def test_overlay_takes_every_image_layout():
    attention = torch.rand(3, 3)
    image = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    expected = visualize.overlay(image, attention)
    as_tensor = torch.tensor(image).permute(2, 0, 1)
    np.testing.assert_array_equal(visualize.overlay(as_tensor, attention), expected)
    as_float = visualize.overlay(image.astype(np.float64) / 255, attention)
    assert np.abs(as_float.astype(int) - expected).max() <= 1
    assert visualize.overlay(image[:, :, 0], attention).shape == (12, 9, 3)
    assert visualize.overlay(image, torch.zeros(3, 3)).max() < 255  # no attention at all is not an error


def test_draw_attention_writes_a_picture(tmp_path):
    path = tmp_path / "attention.png"
    maps = {"first": torch.rand(2, 4, 5), "second": torch.rand(2, 4, 5)}
    figure = visualize.draw_attention(np.zeros((16, 20, 3), np.uint8), maps, POINTS, path, "a caption")
    assert len(figure.axes) == 6
    from matplotlib.image import imread

    assert imread(path).std() > 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: visualize.grid_positions([(0.5, 1.5)], 4, 4), "fractions of the image"),
        (lambda: visualize.grid_positions([], 4, 4), "list of"),
        (lambda: visualize.grid_positions([(1, 2, 3)], 4, 4), "list of"),
        (lambda: visualize.overlay(np.zeros((4, 4, 2)), torch.ones(2, 2)), "image must be"),
        (lambda: visualize.overlay(np.zeros((4, 4), np.int64), torch.ones(2, 2)), "uint8 or floating"),
        (lambda: visualize.overlay(np.zeros((4, 4)), torch.ones(2)), "attention must be"),
        (lambda: visualize.draw_attention(np.zeros((4, 4)), {}, POINTS), "no maps"),
        (lambda: visualize.draw_attention(np.zeros((4, 4)), {"a": torch.ones(1, 2, 2)}, POINTS), "a must be"),
        (lambda: visualize.record_attention(torch.nn.Identity(), POINTS).__enter__(), "no attention module"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_module_without_a_map_is_refused():
    with pytest.raises(TypeError, match="ChannelAttention has no map"):
        visualize.attention_maps(nn.ChannelAttention(8), torch.randn(1, 8, 4, 4), POINTS)


def test_the_last_pixel_belongs_to_the_last_position():
    assert visualize.grid_positions([(1.0, 1.0), (0.0, 0.999)], 3, 5).tolist() == [[2, 4], [0, 4]]
