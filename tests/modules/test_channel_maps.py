"""Recorded channel attention is what the module applied, and is drawn with the chosen channels."""

import numpy as np
import pytest
import torch

import segattn_ops
from segattn_ops import nn, ops, visualize
from segattn_ops.visualize import ChannelMaps

from ..peers import blocks, randomise

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def with_gamma(module: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.constant_(module.gamma, 0.7)
    return module


def recorded(model: torch.nn.Module, *inputs) -> dict[str, ChannelMaps]:
    with torch.no_grad(), visualize.record_channel_attention(model) as maps:
        model(*inputs)
    return maps


@pytest.mark.parametrize("code", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_map_is_what_the_module_applies(code, dtype):
    module, x = with_gamma(nn.ChannelAttention(6)).to(dtype), torch.randn(2, 6, 5, 7).to(dtype)
    with segattn_ops.use_backend(code):
        (name, maps), *others = recorded(module, x).items()
        expected = module(x).detach()
    assert name == "ChannelAttention" and not others
    wide = torch.promote_types(dtype, torch.float32)
    assert maps.weights.dtype == maps.response.dtype == wide
    assert torch.equal(maps.response, expected.to(wide))
    torch.testing.assert_close(maps.weights.sum(-1), maps.weights.new_ones(2, 6))
    applied = 0.7 * torch.einsum("bck,bkyx->bcyx", maps.weights, x.to(wide)) + x.to(wide)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(maps.response, applied, rtol=tolerance, atol=tolerance)
    assert maps.image(1).weights.shape == (6, 6) and torch.equal(maps.image(1).response, maps.response[1])


class OwnCode(torch.nn.Module):
    """Channel attention to other channels, and in two steps; the result of the first is overwritten."""

    def forward(self, x, others):
        y = segattn_ops.channel_attention(x, others, value=others, scale=0.1).relu_()
        energy = ops.channel_energy(x)
        return y + ops.channel_apply(energy, x, -0.1, gamma=0.5)


def test_own_modules_are_recorded_call_by_call():
    x, others = torch.randn(1, 4, 5, 6), torch.randn(1, 3, 5, 6)
    maps = recorded(OwnCode(), x, others)
    assert list(maps) == ["OwnCode", "OwnCode#2"]
    first, second = maps.values()
    assert torch.equal(first.response, segattn_ops.channel_attention(x, others, others, 0.1))
    energy = x.flatten(2) @ others.flatten(2).mT
    torch.testing.assert_close(first.weights, (0.1 * energy).softmax(-1))
    torch.testing.assert_close(second.weights, (-0.1 * x.flatten(2) @ x.flatten(2).mT).softmax(-1))


def test_a_network_and_converted_blocks_are_recorded():
    original = randomise(blocks.CAM_Module(16)).eval()
    model = torch.nn.Sequential(torch.nn.Identity(), original)
    x = torch.randn(1, 16, 6, 8)
    assert segattn_ops.convert(model).converted
    own = nn.ChannelAttention(16)
    own.load_state_dict(original.state_dict())
    (found,), (expected,) = recorded(model, x).values(), recorded(own, x).values()
    for given, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(given, wanted)
    both = torch.nn.Sequential(nn.PositionAttention(16), nn.ChannelAttention(16))
    with (
        torch.no_grad(),
        visualize.record_channel_attention(both) as channels,
        visualize.record_attention(both, [(0.5, 0.5)]) as positions,
    ):
        both(x)
    assert list(channels) == ["1"] and list(positions) == ["0"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in both.modules())


def test_what_is_not_seen_is_an_error():
    with pytest.raises(
        ValueError, match="record_channel_attention: PositionAttention called no channel attention of segattn_ops"
    ):
        recorded(nn.PositionAttention(16), torch.randn(1, 16, 4, 4))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        recorded("danet")


def some_maps(channels: int = 5) -> ChannelMaps:
    generator = torch.Generator().manual_seed(0)
    response = torch.randn(channels, 6, 8, generator=generator)
    response *= torch.tensor([0.1, 3.0, 0.0, 2.0, 1.0])[:channels, None, None]  # a constant channel among them
    return ChannelMaps(torch.rand(channels, channels, generator=generator).softmax(-1), response)


def test_drawing_shows_the_responses_and_the_map(tmp_path):
    maps, path = some_maps(), tmp_path / "channels.png"
    figure = visualize.draw_channel_attention(IMAGE, maps, [2, 0], path, "a caption")
    *panels, bar = figure.axes
    low, high = maps.response[0].min(), maps.response[0].max()
    titles = ["image", "channel 2: 0 to 0", f"channel 0: {low:.2g} to {high:.2g}", "channel map"]
    assert [axis.get_title() for axis in panels] == titles
    assert panels[-1].images[0].get_array().shape == (5, 5, 3)
    assert list(panels[-1].get_yticks()) == [2, 0]
    assert bar.get_ylabel() == "times uniform attention"
    assert path.stat().st_size > 5000
    # A response is hottest where it is largest.
    drawn = panels[2].images[0].get_array().astype(int).sum(2)
    y, x = np.unravel_index((drawn - panels[1].images[0].get_array().astype(int).sum(2)).argmax(), drawn.shape)
    assert (int(y) // 2, int(x) // 2) == divmod(int(maps.response[0].argmax()), 8)


def test_without_channels_those_that_vary_most_are_drawn():
    figure = visualize.draw_channel_attention(IMAGE, some_maps(), columns=2)
    titles = [axis.get_title().split(":")[0] for axis in figure.axes[:-1]]
    assert titles == ["image", "channel 1", "channel 3", "channel 4", "channel map", ""]
    pair = visualize.draw_channel_attention(IMAGE, some_maps(2))
    assert [axis.get_title().split(":")[0] for axis in pair.axes[1:3]] == ["channel 0", "channel 1"]


@pytest.mark.parametrize(
    ("maps", "channels", "error", "message"),
    [
        (torch.ones(3, 3), None, TypeError, r"must be the ChannelMaps of one image.*\(got Tensor\)"),
        (some_maps(), [5], ValueError, r"channels must be from 0 to 4, at least one \(got \[5\]\)"),
        (some_maps(), [-1], ValueError, "channels must be from 0 to 4"),
        (some_maps(), [], ValueError, "channels must be from 0 to 4, at least one"),
        (some_maps(), [True], ValueError, "channels must be from 0 to 4"),
        (ChannelMaps(*(part[None] for part in some_maps())), None, ValueError, r"take maps\.image\(0\)"),
        (ChannelMaps(torch.ones(3, 3), torch.ones(2, 4, 4)), None, ValueError, r"same channels \(got 3 and 2\)"),
        (ChannelMaps(-torch.ones(2, 2), torch.ones(2, 4, 4)), None, ValueError, "weights must not be negative"),
        (ChannelMaps(torch.ones(2, 2), torch.full((2, 4, 4), torch.nan)), None, ValueError, "response must be finite"),
        (ChannelMaps(torch.ones(2, 2), torch.ones(2, 9)), None, ValueError, r"response must be \(C, h, w\)"),
    ],
)
def test_what_cannot_be_drawn_is_named(maps, channels, error, message):
    with pytest.raises(error, match=message):
        visualize.draw_channel_attention(IMAGE, maps, channels)
