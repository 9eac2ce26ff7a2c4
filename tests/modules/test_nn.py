"""Every module against a transcription of its paper with stored attention maps, in float64, by the same state dict."""

import pytest
import torch
from torch import nn as tnn

from segattn_ops import nn

from ..peers import ann, blocks, randomise
from ..tolerance import assert_as_exact_as_eager


class Recurrent(blocks.CrissCrossAttention):
    """Three passes of CCNet's block."""

    def forward(self, x):
        for _ in range(3):
            x = super().forward(x)
        return x


class PaperRRB(blocks.RRB):
    def forward(self, x):
        return super().forward(x).relu()


class Listed(blocks.CAB):
    def forward(self, high, low):
        return super().forward([high, low])


class LockedDAModule(blocks.DAModule):
    pass


class CPAMEncTokens(blocks.CPAMEnc):
    def forward(self, x):
        return super().forward(x).mT


X = ((2, 16, 7, 9),)
BLOCKS = {
    "position": (lambda: nn.PositionAttention(16), lambda: blocks.PAM_Module(16), X),
    "position_row": (lambda: nn.PositionAttention(16), lambda: blocks.PAM_Module(16), ((1, 16, 1, 11),)),
    "position_single": (lambda: nn.PositionAttention(16), lambda: blocks.PAM_Module(16), ((3, 16, 1, 1),)),
    "channel": (lambda: nn.ChannelAttention(16), lambda: blocks.CAM_Module(16), X),
    "criss_cross": (lambda: nn.CrissCrossAttention(16), lambda: blocks.CrissCrossAttention(16), X),
    "criss_cross_column": (
        lambda: nn.CrissCrossAttention(16),
        lambda: blocks.CrissCrossAttention(16),
        ((2, 16, 9, 1),),
    ),
    "recurrent": (lambda: nn.RecurrentCrissCrossAttention(16, recurrence=3), lambda: Recurrent(16), X),
    "apnb": (lambda: nn.APNB(16, 16, 4, 6), lambda: ann.APNB(16, 16, 4, 6, 0.05), ((2, 16, 11, 9),)),
    "apnb_two_stages": (
        lambda: nn.APNB(16, 16, 4, 6, sizes=(1, 1)),
        lambda: ann.APNB(16, 16, 4, 6, 0.05, (1, 1)),
        ((1, 16, 9, 13),),
    ),
    "afnb": (
        lambda: nn.AFNB(8, 16, 12, 4, 6),
        lambda: ann.AFNB(8, 16, 12, 4, 6, 0.05),
        ((2, 8, 10, 9), (2, 16, 7, 5)),
    ),
    "compact_encoder": (lambda: nn.CompactPositionEncoder(8), lambda: CPAMEncTokens(8), ((2, 8, 7, 9),)),
    "compact_position": (
        lambda: nn.CompactPositionAttention(16),
        lambda: blocks.CPAMDec(16),
        ((2, 16, 7, 9), (2, 50, 16)),
    ),
    "compact_channel": (
        lambda: nn.CompactChannelAttention(),
        lambda: blocks.CCAMDec(),
        ((2, 16, 7, 9), (2, 3, 7, 9)),
    ),
    "da_module": (lambda: nn.DAModule(8, H=5, W=6), lambda: LockedDAModule(8, 3, 5, 6), ((2, 8, 5, 6),)),
    "channel_attention_block": (
        lambda: nn.ChannelAttentionBlock(12, 6),
        lambda: Listed(12, 6),
        ((2, 6, 5, 7), (2, 6, 5, 7)),
    ),
    "refinement": (lambda: nn.RefinementResidualBlock(6, 5), lambda: PaperRRB(6, 5), ((2, 6, 5, 7),)),
    "refinement_without_relu": (
        lambda: nn.RefinementResidualBlock(6, 5, final_relu=False),
        lambda: blocks.RRB(6, 5),
        ((2, 6, 5, 7),),
    ),
}
for _mode, _theirs in (
    ("embedded_gaussian", "embedded"),
    ("gaussian", "gaussian"),
    ("dot_product", "dot"),
    ("concatenation", "concatenation"),
):
    for _dims, _shape in ((1, (2, 6, 17)), (2, (2, 6, 7, 9)), (3, (2, 6, 3, 4, 5))):
        for _sub in (False, True):
            for _norm in ("batch_norm", None):
                if _dims != 2 and _sub != (_norm is None):
                    continue
                BLOCKS[f"non_local_{_mode}_{_dims}d_sub{_sub:d}_{_norm}"] = (
                    lambda mode=_mode, dims=_dims, sub=_sub, norm=_norm: getattr(nn, f"NonLocal{dims}d")(
                        6, mode=mode, sub_sample=sub, norm_layer=norm
                    ),
                    lambda theirs=_theirs, dims=_dims, sub=_sub, norm=_norm: blocks._NonLocalBlockND(
                        6, None, dims, sub, norm is not None, theirs
                    ),
                    (_shape,),
                )


def results(module: tnn.Module, inputs: list[torch.Tensor], weight: torch.Tensor | None = None):
    """Output, and the gradients of a random weighting of it with respect to inputs and parameters, by name."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = module(*inputs)
    weight = torch.randn_like(output) if weight is None else weight
    (output * weight).sum().backward()
    gradients = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    gradients |= {name: p.grad for name, p in module.named_parameters()}
    return output, gradients, weight


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_matches_the_transcription(name: str, training: bool) -> None:
    ours, theirs, shapes = BLOCKS[name]
    if training and name == "position_single":
        training = False
    oracle = randomise(theirs()).double()
    module = ours().double()
    module.load_state_dict(oracle.state_dict())  # the official names, unchanged
    for m in (oracle, module):
        m.train(training)
        for layer in m.modules():
            if isinstance(layer, (tnn.Dropout, tnn.Dropout2d)):
                layer.p = 0.0
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected, expected_gradients, weight = results(oracle, inputs)
    output, gradients, _ = results(module, inputs, weight)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def test_cross_level_gating_decoder() -> None:
    module = randomise(nn.CrossLevelGatingDecoder(8, 6)).double().eval()
    low, high = torch.randn(2, 8, 9, 11, dtype=torch.float64), torch.randn(2, 8, 5, 6, dtype=torch.float64)

    def block(layers, x):
        return layers[1](torch.conv2d(x, layers[0].weight, padding=1)).clamp_min(0)

    fine = block(module.conv_low, low)
    coarse = torch.nn.functional.interpolate(high, (9, 11), mode="bilinear", align_corners=True)
    joined = torch.cat([fine, coarse], 1)
    gate = torch.sigmoid(
        torch.einsum("bchw,oc->bohw", joined, module.conv_att[0].weight[:, :, 0, 0])
        + module.conv_att[0].bias[:, None, None]
    )
    expected = block(module.conv_out, block(module.conv_cat, torch.cat([module.gamma * gate * fine, coarse], 1)))
    torch.testing.assert_close(module(low, high), expected)


def test_da_module_takes_any_size_without_its_locked_layer() -> None:
    locked = randomise(blocks.DAModule(8, 3, 5, 6)).double().eval()
    locked.channel_attention_module.pa.fc_o.weight.data.copy_(torch.eye(30))
    locked.channel_attention_module.pa.fc_o.bias.data.zero_()
    free = nn.DAModule(8).double().eval()
    state = {k: v for k, v in locked.state_dict().items() if not k.startswith("channel_attention_module.pa.")}
    free.load_state_dict(state)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(free(x), locked(x))
    assert free(torch.randn(1, 8, 4, 13, dtype=torch.float64)).shape == (1, 8, 4, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["position", "channel", "criss_cross", "da_module"])
def test_error_is_at_most_twice_that_of_eager(name: str, dtype: torch.dtype) -> None:
    ours, theirs, shapes = BLOCKS[name]
    oracle = randomise(theirs()).to(dtype).eval()
    module = ours().to(dtype).eval()
    module.load_state_dict(oracle.state_dict())
    x = torch.randn(shapes[0] if name == "da_module" else (2, 16, 13, 17)).to(dtype)
    eager = oracle(x)
    exact = oracle.double()(x.double())
    assert_as_exact_as_eager(name, module(x), eager, exact)


@pytest.mark.parametrize(
    "module",
    [nn.PositionAttention(16), nn.ChannelAttention(), nn.CrissCrossAttention(16), nn.RecurrentCrissCrossAttention(16)],
    ids=lambda m: type(m).__name__,
)
def test_gamma_loads_from_both_shapes(module: tnn.Module) -> None:
    for shape in ((), (1,)):
        state = {**module.state_dict(), "gamma": torch.full(shape, 0.25)}
        module.load_state_dict(state)
        assert module.gamma.shape == (1,)
        assert module.gamma.item() == 0.25
        assert state["gamma"].shape == shape  # the caller's dict is left alone


@pytest.mark.parametrize("name", ["position", "criss_cross", "apnb", "non_local_concatenation_2d_sub1_batch_norm"])
def test_any_memory_format_and_empty_batch(name: str) -> None:
    ours, _, shapes = BLOCKS[name]
    module = randomise(ours()).eval()
    x = torch.randn(shapes[0])
    expected = module(x)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x.mT.contiguous().mT), expected, rtol=1e-4, atol=1e-5)
    assert module(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("mode", ["dot_product", "concatenation"])
def test_pairwise_modes_hold_no_map(mode: str) -> None:
    """At N = 16384 the attention map would take 1 GiB; the block's memory must stay near its features' size."""
    module = randomise(nn.NonLocal2d(4, mode=mode))
    x = torch.randn(1, 4, 128, 128, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        module(x).sum().backward()
    assert largest <= 3 * x.numel()


@pytest.mark.parametrize("name", ["position", "recurrent", "non_local_concatenation_2d_sub0_None", "apnb"])
def test_compiles_as_one_graph(name: str) -> None:
    ours, _, shapes = BLOCKS[name]
    module = randomise(ours()).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(shape) for shape in shapes]
    expected, expected_gradients, weight = results(module, inputs)
    module.zero_grad()
    output, gradients, _ = results(compiled, inputs, weight)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients["input 0"], expected_gradients["input 0"], rtol=1e-3, atol=1e-4)


def test_autocast_runs_in_the_lower_precision() -> None:
    for name in (
        "position",
        "channel",
        "criss_cross",
        "apnb",
        "non_local_dot_product_2d_sub0_None",
        "non_local_concatenation_2d_sub0_None",
        "compact_position",
        "channel_attention_block",
    ):
        ours, _, shapes = BLOCKS[name]
        module = randomise(ours()).eval()
        inputs = [torch.randn(shape) for shape in shapes]
        expected = module(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(*inputs)
        torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


BAD_ARGUMENTS = [
    (lambda: nn.PositionAttention(0), "PositionAttention: in_channels must be a positive integer (got 0)"),
    (lambda: nn.PositionAttention(4), "PositionAttention: in_channels must be at least 8"),
    (lambda: nn.PositionAttention(16, scale=float("nan")), "PositionAttention: scale must be a finite number"),
    (lambda: nn.ChannelAttention(2.5), "ChannelAttention: in_channels must be a positive integer (got 2.5)"),
    (
        lambda: nn.CrissCrossAttention(16, key_channels=0),
        "CrissCrossAttention: key_channels must be a positive integer",
    ),
    (lambda: nn.RecurrentCrissCrossAttention(16, recurrence=0), "recurrence must be a positive integer (got 0)"),
    (lambda: nn.RecurrentCrissCrossAttention(16, recurrence=True), "recurrence must be a positive integer (got True)"),
    (lambda: nn.NonLocal2d(8, mode="softmax"), "NonLocal2d: mode must be one of embedded_gaussian"),
    (lambda: nn.NonLocal2d(8, mode="dot_product", scale=2.0), "NonLocal2d: scale must be 1 in mode dot_product"),
    (lambda: nn.NonLocal1d(8, norm_layer="group"), "NonLocal1d: norm_layer must be a callable, None or 'batch_norm'"),
    (lambda: nn.APNB(8, 8, 4, 4, dropout=1.5), "APNB: dropout must lie in [0, 1)"),
    (lambda: nn.APNB(8, 8, 4, 4, sizes=(1, 2)), "APNB: sizes must be a non-empty sequence of ones"),
    (lambda: nn.AFNB(8, 8, 8, 0, 4), "AFNB: key_channels must be a positive integer"),
    (lambda: nn.CompactPositionAttention(3), "CompactPositionAttention: in_channels must be at least 4"),
    (lambda: nn.DAModule(8, 2), "DAModule: kernel_size must be odd (got 2)"),
    (lambda: nn.DAModule(8, 3, H=7), "DAModule: give both H and W, or neither (got H=7, W=None)"),
    (lambda: nn.ChannelAttentionBlock(8, 8), "ChannelAttentionBlock: in_channels must be 2 * out_channels"),
    (lambda: nn.PyramidPooling(()), "PyramidPooling: sizes must not be empty"),
]


@pytest.mark.parametrize(("make", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


x16 = torch.zeros(2, 16, 5, 6)
BAD_INPUTS = [
    (nn.PositionAttention(16), (x16[0],), "PositionAttention: input must have 4 dimensions (B, C, H, W) (got shape"),
    (nn.PositionAttention(16), (x16[:, :8],), "PositionAttention: input must have 16 channels (got 8)"),
    (nn.PositionAttention(16), (x16.long(),), "PositionAttention: input must be of a floating-point dtype"),
    (nn.ChannelAttention(16), (x16[:, :4],), "ChannelAttention: input must have 16 channels (got 4)"),
    (nn.CrissCrossAttention(16), (x16[:, :4],), "CrissCrossAttention: input must have 16 channels (got 4)"),
    (nn.RecurrentCrissCrossAttention(16), (x16[0],), "RecurrentCrissCrossAttention: input must have 4 dimensions"),
    (nn.NonLocal3d(16), (x16,), "NonLocal3d: input must have 5 dimensions (B, C, T, H, W)"),
    (nn.NonLocal2d(16, sub_sample=True), (x16[:, :, :1],), "NonLocal2d: sub_sample needs sides of at least 2"),
    (nn.AFNB(16, 16, 8, 4, 4), (x16[:1], x16), "AFNB: low must have batch size 2 like high (got 1)"),
    (nn.CompactPositionAttention(16), (x16, x16), "CompactPositionAttention: tokens must have shape (B, K, C)"),
    (
        nn.CompactChannelAttention(),
        (x16, x16[..., :3]),
        "CompactChannelAttention: gathered must have spatial size (5, 6)",
    ),
    (
        nn.DAModule(16, H=7, W=7),
        (x16,),
        "DAModule: input must have the spatial size (7, 7) that the module was made for",
    ),
    (nn.ChannelAttentionBlock(32, 16), (x16, x16[..., :3]), "ChannelAttentionBlock: low must have spatial size (5, 6)"),
    (nn.RefinementResidualBlock(8, 4), (x16,), "RefinementResidualBlock: input must have 8 channels (got 16)"),
]


@pytest.mark.parametrize(("module", "inputs", "message"), BAD_INPUTS, ids=[message for *_, message in BAD_INPUTS])
def test_bad_inputs(module: tnn.Module, inputs: tuple, message: str) -> None:
    with pytest.raises(ValueError) as error:
        module(*inputs)
    assert message in str(error.value)


WRONG_TYPES = [
    (lambda: nn.PositionAttention(16, scale=None), "PositionAttention: scale must be a number (got NoneType)"),
    (lambda: nn.ChannelAttention(scale="1"), "ChannelAttention: scale must be a number (got str)"),
    (
        lambda: nn.CrissCrossAttention(16, scale=tnn.Parameter(torch.ones(()))),
        "CrissCrossAttention: scale must be a number (got Parameter)",
    ),
    (lambda: nn.NonLocal2d(8, scale=[1.0]), "NonLocal2d: scale must be a number (got list)"),
    (lambda: nn.NonLocal1d("8"), "NonLocal1d: in_channels must be a positive integer (got '8')"),
    (lambda: nn.APNB(8, 8, 4, 4, dropout=None), "APNB: dropout must be a number (got NoneType)"),
    (lambda: nn.PositionAttention(16)([1]), "PositionAttention: input must be a tensor (got list)"),
    (lambda: nn.DAModule(16)(x16.numpy()), "DAModule: input must be a tensor (got ndarray)"),
    (
        lambda: nn.CompactPositionAttention(16)(x16, x16.flatten(2).mT.numpy()),
        "CompactPositionAttention: tokens must be a tensor (got ndarray)",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES, ids=[message for _, message in WRONG_TYPES])
def test_wrong_types(call, message: str) -> None:
    with pytest.raises(TypeError) as error:
        call()
    assert message in str(error.value)
