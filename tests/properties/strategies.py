"""Strategies that draw calls. Sizes lie on both sides of the tiles of the kernels. A budget of multiply-adds bounds the
cost of a call, so that nothing is drawn and rejected."""

from hypothesis import strategies as st

from .calls import ARGUMENTS, CONTENTS, LAYOUTS, OPS, REPEATING, Call

# Small first: hypothesis shrinks towards the front. Tiles have 16, 32, 48, 64, 128 or 192 positions or channels.
SIZES = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70, 95, 96, 97, 110),
    *(127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 385, 481, 513, 600, 1025, 1300),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCALES = (1.0, -1.0, 0.125, 0.3, -0.7, 0.0, 1e-3, 4.0)
MAGNITUDES = (1.0, 0.1, 3.0, 1e-3, 8.0, 30.0)
# Before sm_80 the SIMT kernels serve, on sm_90 Hopper's
ARCHITECTURES = (90, 86, 80, 75, 70)
ENGINES = ("auto", "mma", "simt", "wgmma")
LAYOUT_NAMES = tuple(LAYOUTS)
# Multiply-adds of a forward pass. Threads share the work from a million on.
BUDGETS = (20_000, 20_000, 100_000, 100_000, 100_000, 3_000_000)
EMULATED_BUDGETS = (10_000, 40_000)


def size(limit: int, least: int = 1) -> st.SearchStrategy[int]:
    """A size up to the limit; large ones as often as small ones."""
    allowed = [s for s in SIZES if least <= s <= max(limit, least)] or [least]
    return st.sampled_from(allowed)


@st.composite
def spatial(draw, limit: int) -> tuple[int, ...]:
    """A spatial size of at most `limit` positions: 1 to 3 dimensions."""
    kind = draw(st.sampled_from(("height and width", "row", "column", "line", "volume")))
    if kind in ("row", "column", "line"):
        n = draw(size(limit))
        return {"row": (1, n), "column": (n, 1), "line": (n,)}[kind]
    height = draw(size(max(1, int(limit**0.5) if kind == "volume" else limit)))
    width = draw(size(max(1, limit // height)))
    if kind == "height and width":
        return (height, width)
    return (height, width, draw(size(max(1, min(5, limit // (height * width))))))


def _empty_sometimes(draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One call in forty has no positions."""
    return (*shape[:-1], 0) if draw(st.integers(0, 39)) == 39 else shape


@st.composite
def calls(
    draw,
    ops: tuple[str, ...] = OPS,
    emulated: bool = False,
    budgets: tuple[int, ...] = BUDGETS,
    dtypes: tuple[str, ...] = DTYPES,
    repeating: bool = True,
    empty: bool = True,
    masks: bool = True,
    batches: tuple[int, ...] = (1, 2, 3, 5),
    heads: tuple[int, ...] = (1, 1, 1, 2, 4),
) -> Call:
    """repeating: layouts in which elements share memory; empty: sizes of 0, where they are allowed; budgets: of
    multiply-adds."""
    op = draw(st.sampled_from(ops))
    batch = draw(st.sampled_from((*batches, 0) if empty and draw(st.integers(0, 19)) == 19 else batches))
    left = draw(st.sampled_from(budgets)) // max(1, batch)
    most = 128 if emulated else SIZES[-1]
    groups = 1
    if op == "position_attention":
        keys = draw(spatial(min(most, left // 2)))
        m = _product(keys)
        queries = keys if draw(st.booleans()) else draw(spatial(min(most, left // 2 // m)))
        n = _product(queries)
        if n * m * 2 > left:
            queries, n = (1,), 1
        groups = draw(st.sampled_from(heads))
        e = draw(size(min(300, left // (n * m) // groups)))
        c = draw(size(min(600, max(1, left // (n * m) - e) // groups)))
        if empty:
            queries = _empty_sometimes(draw, queries)
        shapes = ((batch, e * groups, *queries), (batch, e * groups, *keys), (batch, c * groups, *keys))
    elif op.startswith("criss_cross"):
        left = max(16, left // 4)  # eager PyTorch takes several times as long for as many multiply-adds
        height = draw(size(min(most, left // 2)))
        while height > 1 and height * (height + 1) * 2 > left:
            height //= 2
        width = draw(size(min(most, int((left / 2 / height) ** 0.5))))
        while width > 1 and height * width * (height + width) * 2 > left:
            width //= 2
        if draw(st.booleans()):
            height, width = width, height
        reach = height * width * (height + width)
        groups = draw(st.sampled_from(heads)) if op == "criss_cross_attention" else 1
        e = draw(size(min(150, left // reach // groups)))
        c = draw(size(min(300, max(1, left // reach - e) // groups)))
        image = (height, width)
        shapes = ((batch, e * groups, *image), (batch, e * groups, *image), (batch, c * groups, *image))
        if op == "criss_cross_affinity":
            shapes = shapes[:2]
        elif op == "criss_cross_aggregation":
            shapes = ((batch, height + width - 1, *image), shapes[2])
    else:
        channels = draw(size(min(most, int((left / 2) ** 0.5))))
        others = draw(size(min(most, left // 2 // channels)))
        if op != "channel_attention":
            others = channels
        positions = draw(spatial(min(1300, max(1, left // (channels * others) // 2))))
        value_positions = positions if draw(st.booleans()) else draw(spatial(_product(positions)))
        if empty:
            value_positions = _empty_sometimes(draw, value_positions)
        shapes = (
            (batch, channels, *positions),
            (batch, others, *positions),
            (batch, others, *value_positions),
        )
        if op != "channel_attention":
            shapes = shapes[:1] if op == "channel_self_attention" else (shapes[0], (batch, channels))
    tensors = len(ARGUMENTS[op])
    layouts = [name for name in LAYOUT_NAMES if repeating or name not in REPEATING]
    is_position = op == "position_attention"
    architecture, engine = draw(_device(is_position)) if emulated else (90, "auto")
    return Call(
        op=op,
        dtype=draw(st.sampled_from(dtypes)),
        shapes=shapes,
        scale=1.0 if op in ("criss_cross_affinity", "criss_cross_aggregation") else draw(st.sampled_from(SCALES)),
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(tensors + 1)),
        contents=tuple(draw(st.sampled_from(tuple(CONTENTS))) for _ in range(tensors + 1)),
        sizes=tuple(draw(st.sampled_from(MAGNITUDES)) for _ in range(tensors + 1)),
        needs=draw(st.sampled_from(_needs(tensors))),
        seed=draw(st.integers(0, 2**31)),
        heads=groups,
        padding=draw(st.sampled_from(("none", "none", "none", "ends", "scattered", "most", "whole samples")))
        if is_position and masks
        else "none",
        mask_layout=draw(st.sampled_from(layouts)) if is_position and masks else "contiguous",
        with_logsumexp=op in ("position_attention", "criss_cross_attention") and draw(st.booleans()),
        threads=1 if emulated else draw(st.sampled_from((1, 2, 3))),
        architecture=architecture,
        engine=engine,
    )


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for s in sizes:
        product *= s
    return product


def _needs(tensors: int) -> list[tuple[bool, ...]]:
    """All gradients, as often as all other choices together."""
    everything = (True,) * tensors
    choices = [tuple(bool(i >> bit & 1) for bit in range(tensors)) for i in range(2**tensors)]
    return [everything] * len(choices) + choices


@st.composite
def _device(draw, is_position: bool) -> tuple[int, str]:
    architecture = draw(st.sampled_from(ARCHITECTURES))
    engines = ENGINES if architecture == 90 else ENGINES[:3] if architecture >= 80 else ("auto", "simt")
    return architecture, draw(st.sampled_from(engines)) if is_position else "auto"
