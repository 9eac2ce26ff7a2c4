"""Recorded attention maps are those that the module applied; names and shapes are as documented."""

import threading

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import segattn_ops
from segattn_ops import criss_cross_attention, nn, position_attention, use_backend, visualize

from ..peers import ann, blocks, randomise

POINTS = [(0.1, 0.2), (0.9, 0.65)]


@pytest.fixture(autouse=True)
def reference():
    with use_backend("reference"):
        yield


def with_gamma(module: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.constant_(module.gamma, 0.7)
    return module.double()


def recorded(model: torch.nn.Module, *inputs, points=POINTS, **keywords) -> dict[str, torch.Tensor]:
    with visualize.record_attention(model, points) as maps:
        model(*inputs, **keywords)
    return maps


def shapes(maps: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    for rows in maps.values():
        torch.testing.assert_close(rows.flatten(2).sum(2), rows.new_ones(rows.shape[:2]))
    return {name: tuple(rows.shape) for name, rows in maps.items()}


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


class Loop(torch.nn.Module):
    """CCNet's official head: one module, whose output is its next input."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.cca = block

    def forward(self, x):
        for _ in range(2):
            x = self.cca(x)
        return x


def test_recurrent_map_is_the_product_of_its_steps():
    module = with_gamma(nn.RecurrentCrissCrossAttention(16, recurrence=2))
    given = x = torch.randn(1, 16, 4, 6, dtype=torch.float64)
    maps = visualize.attention_maps(module, x, [(0.3, 0.5)])
    steps = []
    with torch.no_grad():
        for _ in range(2):
            steps.append(torch.stack([one_hot_map(module, x, (i // 6, i % 6)).flatten() for i in range(24)]))
            x = module._attend(x)
    expected = (steps[1] @ steps[0])[1 * 6 + 3].view(4, 6)  # each (query, key)
    torch.testing.assert_close(maps[0, 0], expected)
    assert (maps > 0).all()  # two passes reach every position

    single = with_gamma(nn.CrissCrossAttention(16))
    single.load_state_dict(module.state_dict())
    looped = recorded(Loop(single), given, points=[(0.3, 0.5)])
    assert list(looped) == ["cca"]
    torch.testing.assert_close(looped["cca"], maps)


def test_runs_that_do_not_feed_each_other_are_not_multiplied():
    single = with_gamma(nn.CrissCrossAttention(16))
    first, second = torch.randn(2, 1, 16, 4, 6, dtype=torch.float64)
    with visualize.record_attention(single, POINTS) as maps:
        single(first)
        single(second)
    torch.testing.assert_close(maps["CrissCrossAttention"], visualize.attention_maps(single, second, POINTS))


class OwnCode(torch.nn.Module):
    """Two criss-cross attentions side by side, one of them in two steps, and attention over flattened tokens."""

    def forward(self, x):
        weights = segattn_ops.criss_cross_affinity(x, x).softmax(1)
        y = criss_cross_attention(x, x, x, scale=0.5) + segattn_ops.criss_cross_aggregation(weights, x)
        tokens = x.flatten(2)
        return y + position_attention(tokens, value=tokens, key=tokens).view_as(x)


def test_own_modules_are_recorded_call_by_call():
    x = torch.randn(2, 8, 5, 6)
    maps = recorded(OwnCode(), x)
    assert shapes(maps) == dict.fromkeys(["OwnCode", "OwnCode#2", "OwnCode#3"], (2, 2, 5, 6))
    positions = visualize.grid_positions(POINTS, 5, 6)
    rows = segattn_ops.criss_cross_attention_map
    torch.testing.assert_close(maps["OwnCode"], rows(x, x, positions, 1, 0.5))
    torch.testing.assert_close(maps["OwnCode#2"], rows(x, x, positions))
    torch.testing.assert_close(maps["OwnCode#3"], segattn_ops.position_attention_map(x, x, positions))


class Heads(torch.nn.Module):
    """Both attentions with the keywords of the ops."""

    def __init__(self, mask: torch.Tensor | None = None, **keywords):
        super().__init__()
        self.mask, self.keywords = mask, keywords

    def forward(self, x):
        y, logsumexp = position_attention(
            x, x, x, 0.5, key_padding_mask=self.mask, return_logsumexp=True, **self.keywords
        )
        return y + logsumexp.sum(1, keepdim=True) + criss_cross_attention(x, x, x, 0.5, **self.keywords)


def test_heads_are_recorded_each():
    x = torch.randn(2, 8, 5, 6)
    maps = recorded(Heads(num_heads=4), x)
    positions = visualize.grid_positions(POINTS, 5, 6)
    for name, rows in [
        ("Heads", segattn_ops.position_attention_map),
        ("Heads#2", segattn_ops.criss_cross_attention_map),
    ]:
        assert maps[name].shape == (2, 4, 2, 5, 6)
        for head, group in enumerate(x.chunk(4, 1)):
            torch.testing.assert_close(maps[name][:, head], rows(group, group, positions, scale=0.5))
    assert shapes(recorded(Heads(num_heads=1), x)) == dict.fromkeys(["Heads", "Heads#2"], (2, 2, 5, 6))


def test_padding_is_recorded_as_0():
    x = torch.randn(2, 8, 5, 6)
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, :, 4:] = mask[1] = True
    (rows, _) = recorded(Heads(mask), x).values()
    assert (rows[0, :, :, 4:] == 0).all() and (rows[1] == 0).all()
    positions = visualize.grid_positions(POINTS, 5, 6)
    alone = segattn_ops.position_attention_map(x[:1], x[:1, :, :, :4].flatten(2), positions, 0.5)
    torch.testing.assert_close(rows[0, :, :, :4].flatten(1), alone[0])


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cca = Pass()

    def forward(self, x):
        return self.cca(self.cca(x))


class Pass(torch.nn.Module):
    def forward(self, x):
        return criss_cross_attention(x, x, x, 0.5, num_heads=2)


def test_passes_with_heads_are_not_joined():
    x = torch.randn(1, 8, 5, 6)
    maps = recorded(Twice(), x)
    torch.testing.assert_close(maps["cca"], visualize.attention_maps(Pass(), Pass()(x), POINTS))


def test_a_map_of_heads_is_not_drawn_as_pictures():
    pytest.importorskip("matplotlib")
    (rows, _) = recorded(Heads(num_heads=4), torch.randn(2, 8, 5, 6)).values()
    picture = torch.rand(20, 24, 3)
    with pytest.raises(ValueError, match=r"take one image of the batch and one head, maps\[0, 0\]"):
        visualize.draw_attention(picture, {"heads": rows}, POINTS)
    visualize.draw_attention(picture, {"head 2": rows[0, 2]}, POINTS)


class Compact(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.CompactPositionEncoder(16), nn.CompactPositionAttention(16)

    def forward(self, x):
        return self.decoder(x, self.encoder(x))


def test_every_module_with_positions_is_recorded():
    x = torch.randn(2, 16, 6, 8)
    for module, expected in [
        (nn.NonLocal2d(16), {"NonLocal2d": (2, 2, 6, 8)}),
        (nn.NonLocal2d(16, mode="gaussian"), {"NonLocal2d": (2, 2, 6, 8)}),
        (nn.NonLocal2d(16, mode="gaussian", sub_sample=True), {"NonLocal2d": (2, 2, 3, 4)}),
        (nn.DAModule(16), {"position_attention_module": (2, 2, 6, 8)}),
        (nn.APNB(16, 16, 8, 8), {"stages.0": (2, 2, 110)}),
        (Compact(), {"decoder": (2, 2, 50)}),
    ]:
        assert shapes(recorded(module, x)) == expected, module
    low = torch.randn(2, 4, 12, 16)
    assert shapes(recorded(nn.AFNB(4, 16, 16, 8, 8), low, high=x)) == {"stages.0": (2, 2, 110)}
    assert visualize.attention_maps(nn.AFNB(4, 16, 16, 8, 8), (low, x), POINTS).shape == (2, 2, 110)
    sequence = recorded(nn.NonLocal1d(8), torch.randn(1, 8, 9), points=[(0.5,)])
    volume = recorded(nn.NonLocal3d(8), torch.randn(1, 8, 3, 4, 5), points=[(0.9, 0.5, 0.5)])
    assert shapes(sequence) == {"NonLocal1d": (1, 1, 9)}
    assert shapes(volume) == {"NonLocal3d": (1, 1, 3, 4, 5)}


def test_pooled_weights_are_spread_as_the_pool_averages():
    """The spread weights times the values are the pooled weights times the pooled values."""
    height, width, sizes = 7, 10, (1, 3, 6, 8)  # cells of different and overlapping extents
    weights = torch.rand(2, 3, 110, dtype=torch.float64).softmax(-1)
    values = torch.randn(2, 4, height, width, dtype=torch.float64)
    spread = visualize.spread_pooled(weights, sizes, height, width)
    expected = weights @ nn.PyramidPooling(sizes)(values).mT
    torch.testing.assert_close(torch.einsum("bpyx,bcyx->bpc", spread, values), expected)
    with pytest.raises(ValueError, match=r"spread_pooled: maps must have 50 keys for the grids \(1, 2, 3, 6\)"):
        visualize.spread_pooled(weights, (1, 2, 3, 6), height, width)


@pytest.mark.parametrize(
    ("block", "counterpart"),
    [
        (blocks.PAM_Module, lambda: nn.PositionAttention(16)),
        (blocks.CrissCrossAttention, lambda: nn.CrissCrossAttention(16)),
        (blocks.NONLocalBlock2D, lambda: nn.NonLocal2d(16, sub_sample=True)),
    ],
)
def test_converted_blocks_are_recorded_as_their_counterparts(block, counterpart):
    original = randomise(block(16)).eval()
    own = counterpart().eval()
    own.load_state_dict(original.state_dict())
    model = torch.nn.Sequential(original)
    assert segattn_ops.convert(model).converted
    x = torch.randn(1, 16, 6, 8)
    maps = recorded(model, x)
    assert list(maps) == ["0"]
    torch.testing.assert_close(maps["0"], visualize.attention_maps(own, x, POINTS))


def test_converted_blocks_over_tokens_and_pooled_keys():
    x = torch.randn(1, 16, 7, 7)
    model = torch.nn.Sequential(randomise(blocks.DAModule(16, 3, 7, 7)), randomise(ann.APNB(16, 16, 8, 8, 0.05)))
    model = model.eval()
    assert segattn_ops.convert(model).converted
    (tokens, pooled) = shapes(recorded(model, x)).values()
    assert (tokens, pooled) == ((1, 2, 7, 7), (1, 2, 110))


def test_a_layer_runs_once_and_the_result_is_the_same():
    x = torch.randn(2, 16, 6, 8)
    torch.manual_seed(1)
    model = randomise(torch.nn.Sequential(nn.NonLocal2d(16), nn.APNB(16, 16, 8, 8, dropout=0.3))).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    expected, after = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    torch.manual_seed(2)
    with visualize.record_attention(model, POINTS):
        got = model(x)
    assert torch.equal(got, expected)
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    visualize.attention_maps(model[0], x, POINTS)
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [nn.PositionAttention, nn.RecurrentCrissCrossAttention, nn.NonLocal2d])
def test_inference_mode_autocast_keywords_and_no_points(kind):
    module, x = kind(16), torch.randn(2, 16, 6, 8)
    expected = recorded(module, x)
    with torch.inference_mode():
        found = recorded(module, x=x)
        assert torch.equal(found[kind.__name__], expected[kind.__name__])
    with torch.autocast("cpu", torch.bfloat16):
        assert shapes(recorded(module, x)) == shapes(expected)
    assert recorded(module, x, points=[])[kind.__name__].shape == (2, 0, 6, 8)
    assert visualize.attention_maps(module.half(), x.half(), torch.zeros(0, 2)).dtype == torch.float32


def test_compiled_and_wrapped_models():
    block, x = nn.PositionAttention(16), torch.randn(1, 16, 5, 6)
    expected = visualize.attention_maps(block, x, POINTS)
    compiled = torch.compile(block, backend="eager")
    compiled(x)  # a mode does not see a region that is compiled already
    for model, name in [
        (compiled, "_orig_mod"),
        (torch.nn.DataParallel(torch.nn.Sequential(block)), "module.0"),
        (torch.nn.Sequential(block), "0"),
    ]:
        maps = recorded(model, x)
        assert list(maps) == [name]
        torch.testing.assert_close(maps[name], expected)


class Checkpointed(torch.nn.Module):
    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_checkpointed_block_runs_again_in_the_backward():
    block, x = nn.PositionAttention(16), torch.randn(1, 16, 5, 6, requires_grad=True)
    model = Checkpointed(block)
    with visualize.record_attention(model, POINTS) as maps:
        model(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(maps["block"], visualize.attention_maps(block, x, POINTS))


class WritesInBetween(Loop):
    """Writes to the tensor that the block returned."""

    def forward(self, x):
        return self.cca(self.cca(x).relu_())


def test_a_pass_over_an_overwritten_result_is_a_map_of_its_own():
    single, x = with_gamma(nn.CrissCrossAttention(16)), torch.randn(1, 16, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        second = single(x).relu()
        maps = recorded(WritesInBetween(single), x)["cca"]
    torch.testing.assert_close(maps, visualize.attention_maps(single, second, POINTS))


def test_a_converted_block_that_runs_its_original_is_named():
    block = blocks.PAM_Module(16)
    segattn_ops.convert(block)
    block.softmax.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"FusedPAM_Module is converted, but its original's forward ran, because"):
        recorded(block, torch.randn(1, 16, 4, 6))
    beside = torch.nn.Sequential(block, nn.PositionAttention(16))
    with pytest.warns(UserWarning, match="there is a map missing: 0 is converted, but its original's forward ran"):
        assert list(recorded(beside, torch.randn(1, 16, 4, 6))) == ["1"]


class InAThread(torch.nn.Module):
    """What DataParallel on several devices does."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        thread = threading.Thread(target=self.block, args=(x,))
        thread.start()
        thread.join()
        return x


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_not_seen_is_an_error():
    x = torch.randn(1, 16, 5, 6)
    for model in (torch.nn.Identity(), nn.ChannelAttention(16), nn.NonLocal2d(16, mode="dot_product")):
        with pytest.raises(ValueError, match=f"record_attention: {type(model).__name__} called no position.*convert"):
            recorded(model, x)
    with torch.no_grad():
        traced = torch.jit.trace(nn.PositionAttention(16), x)
    with pytest.raises(ValueError, match="scripted and exported models"):
        recorded(traced, x)
    with pytest.raises(ValueError, match="other threads, as DataParallel on several devices"):
        recorded(InAThread(nn.PositionAttention(16)), x)
    with pytest.raises(KeyError), visualize.record_attention(torch.nn.Identity(), POINTS):
        raise KeyError  # not replaced


class Fails(torch.nn.Module):
    def forward(self, x):
        raise KeyError


class Caught(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fails = Fails()

    def forward(self, x):
        try:
            self.fails(x)
        except KeyError:
            return position_attention(x, x, x)


def test_a_module_that_raised_does_not_own_later_calls():
    assert list(recorded(Caught(), torch.randn(1, 4, 3, 3))) == ["Caught"]


def test_record_attention_sees_every_module_and_leaves_no_hook():
    model = torch.nn.Sequential(nn.PositionAttention(16), nn.ChannelAttention(16), nn.CrissCrossAttention(16))
    x = torch.randn(1, 16, 6, 8)
    maps = recorded(model, x)
    assert list(maps) == ["0", "2"]
    torch.testing.assert_close(maps["0"], visualize.attention_maps(model[0], x, POINTS))
    maps.clear()
    model(x)
    assert not maps
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_modules_without_one_map_are_refused():
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(TypeError, match="ChannelAttention has no map"):
        visualize.attention_maps(nn.ChannelAttention(8), x, POINTS)
    pair = torch.nn.Sequential(nn.PositionAttention(8), nn.PositionAttention(8))
    with pytest.raises(ValueError, match=r"Sequential has several maps \(0, 1\)"):
        visualize.attention_maps(pair, x, POINTS)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        visualize.record_attention("danet", POINTS).__enter__()


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        (None, TypeError, "points must be a list of"),
        ([("a", "b")], TypeError, "points must be a list of"),
        ([(0.5, 0.5), (0.1,)], TypeError, "points must be a list of"),
        ((0.5, 0.5), ValueError, "points must be a list of"),
        ([(0.5, 0.5, 0.5)], ValueError, r"\(y, x\) for a feature map of 2 dimensions"),
        ([(0.5, 1.5)], ValueError, "fractions of the image.*pixels with units='pixels'"),
        ([(float("nan"), 0.0)], ValueError, "fractions of the image"),
    ],
)
def test_bad_points_are_named(points, error, message):
    with pytest.raises(error, match=message):
        recorded(nn.PositionAttention(8), torch.randn(1, 8, 4, 4), points=points)


def test_pixels_are_their_centres():
    x = torch.randn(1, 16, 6, 8)
    block = nn.PositionAttention(16)
    # The image has twice the rows and three times the columns of the feature map.
    pixels, size = [(0, 0), (5, 12), (11, 23)], (12, 24)
    expected = visualize.attention_maps(block, x, [(0.0, 0.0), (0.4, 0.52), (1.0, 1.0)])
    assert torch.equal(visualize.attention_maps(block, x, pixels, units="pixels", size=size), expected)
    with visualize.record_attention(block, torch.tensor(pixels), units="pixels", size=size) as maps:
        block(x)
    assert torch.equal(maps["PositionAttention"], expected)
    given = visualize.attention_maps(block, x, pixels, units="pixels", size=tuple(np.array(size)))
    assert torch.equal(given, expected)
    # Whole numbers alone are fractions.
    corners = visualize.attention_maps(block, x, [(0, 1)])
    assert torch.equal(corners, visualize.attention_maps(block, x, [(0.0, 1.0)]))
    line, sequence = nn.NonLocal1d(8), torch.randn(1, 8, 9)
    with visualize.record_attention(line, [(5,)], units="pixels", size=[18]) as maps:
        line(sequence)
    torch.testing.assert_close(maps["NonLocal1d"], visualize.attention_maps(line, sequence, [(0.3,)]))


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([(3, 24)], {}, r"whole numbers within the image, \(0 to 11, 0 to 23\) \(got \[\[3\.0, 24\.0\]\]\)"),
        ([(-1, 0)], {}, "whole numbers within the image"),
        ([(0.4, 0.55)], {}, r"whole numbers within the image.*\(got \[\[0\.4, 0\.55\]\]\)"),
        ([(float("nan"), 0)], {}, "whole numbers within the image"),
        ([(3,)], {}, r"points must be a list of \(y, x\) for a feature map of 2 dimensions"),
        ([(3, 4)], {"size": None}, r"need the size of the image, such as size=\(height, width\) \(got None\)"),
        ([(3, 4)], {"size": (12, 0)}, r"need the size of the image.*\(got \(12, 0\)\)"),
        ([(3, 4)], {"size": 12}, r"need the size of the image.*\(got 12\)"),
        ([(3, 4)], {"size": ()}, r"need the size of the image.*\(got \(\)\)"),
        ([(0.3, 0.4)], {"units": "fractions"}, r"size is for points in pixels.*\(got size \(12, 24\), 'fractions'\)"),
        ([(3, 4)], {"units": "percent"}, r"units must be 'fractions' or 'pixels' \(got 'percent'\)"),
    ],
)
def test_bad_pixels_are_named(points, options, message):
    given = {"units": "pixels", "size": (12, 24), **options}
    with pytest.raises(ValueError, match=f"visualize: .*{message}"):
        visualize.record_attention(nn.PositionAttention(8), points, **given).__enter__()


def test_tokens_without_a_grid_are_named():
    x = torch.randn(1, 8, 20)
    with pytest.raises(ValueError, match="NonLocal1d attends over 20 tokens"):
        recorded(nn.NonLocal1d(8), x)


def test_the_last_pixel_belongs_to_the_last_position():
    assert visualize.grid_positions([(1.0, 1.0), (0.0, 0.999)], 3, 5).tolist() == [[2, 4], [0, 4]]
    assert visualize.grid_positions([], 3, 5).shape == (0, 2)
