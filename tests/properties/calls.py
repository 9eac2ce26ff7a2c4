"""A call of an op as data. The tensors are a function of the description, so that a call that was written to a file is
repeated to the bit."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import segattn_ops
from segattn_ops import _position_engine
from segattn_ops.ops._check import accumulation_dtype

from ..backends import Backend
from ..emulator import build


@dataclass(frozen=True)
class Call:
    """`layouts`, `contents` and `sizes` have an entry for each tensor and a last one for grad_output. `needs` says
    which tensors require a gradient; `mask_layout` and `padding` are of position attention's key_padding_mask."""

    op: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    scale: float = 1.0
    layouts: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    needs: tuple[bool, ...] = ()
    seed: int = 0
    heads: int = 1
    padding: str = "none"
    mask_layout: str = "contiguous"
    with_logsumexp: bool = False
    threads: int = 1
    architecture: int = 90  # of the emulated device
    engine: str = "auto"  # of emulated position attention

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Call":
        def frozen(value):
            return tuple(map(frozen, value)) if isinstance(value, list) else value

        return cls(**{name: frozen(value) for name, value in data.items()})


# The names of the tensors
ARGUMENTS = {
    "position_attention": ("query", "key", "value"),
    "channel_attention": ("query", "key", "value"),
    "channel_self_attention": ("input",),
    "residual_channel_attention": ("input", "gamma"),
    "criss_cross_affinity": ("query", "key"),
    "criss_cross_aggregation": ("attention", "value"),
    "criss_cross_attention": ("query", "key", "value"),
}
OPS = tuple(ARGUMENTS)
SOFTMAX_OPS = tuple(op for op in OPS if op not in ("criss_cross_affinity", "criss_cross_aggregation"))


# Contents: shape, generator -> float64


def _normal(shape, generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _positive(shape, generator) -> Tensor:
    """As after a ReLU, and never 0."""
    return _normal(shape, generator).abs() + 0.25


def _regions(shape, generator) -> Tensor:
    """A few vectors, each at many positions."""
    vectors = _normal((*shape[:2], 3), generator)
    chosen = torch.randint(3, shape[2:], generator=generator)
    return vectors[:, :, chosen.flatten()].reshape(shape)


def _whole_numbers(shape, generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).double()


def _sparse(shape, generator) -> Tensor:
    return _normal(shape, generator) * (torch.rand(shape, generator=generator) < 0.1)


def _ones(shape, generator) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _peaked(shape, generator) -> Tensor:
    """One element in each tensor far above the others, at a random place."""
    tensor = _normal(shape, generator)
    if tensor.numel():
        tensor.view(-1)[torch.randint(tensor.numel(), (1,), generator=generator)] = 12
    return tensor


CONTENTS: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "positive": _positive,
    "regions": _regions,
    "whole numbers": _whole_numbers,
    "sparse": _sparse,
    "ones": _ones,
    "peaked": _peaked,
}


# Layouts: a contiguous tensor -> a view of other memory. Those in REPEATING let elements share memory, so that the
# numbers are others. What lies between the elements is NaN.


def _filled(t: Tensor, shape) -> Tensor:
    value = True if t.dtype == torch.bool else torch.nan
    return torch.full(tuple(shape), value, dtype=t.dtype)


def _stored(t: Tensor, shape: list[int], index: tuple) -> Tensor:
    buffer = _filled(t, shape)
    buffer[index] = t
    return buffer[index]


def _sliced(t: Tensor) -> Tensor:
    return _stored(t, [*t.shape[:-1], 2 * t.shape[-1]], (..., slice(None, None, 2)))


def _cropped(t: Tensor) -> Tensor:
    inside = tuple(slice(1, 1 + size) for size in t.shape[2:])
    return _stored(t, [*t.shape[:2], *(size + 3 for size in t.shape[2:])], (slice(None), slice(None), *inside))


def _chunk(t: Tensor) -> Tensor:
    """Some of the channels of a wider tensor, as of one convolution for query, key and value."""
    channels = t.shape[1]
    return _stored(t, [t.shape[0], 2 * channels + 1, *t.shape[2:]], (slice(None), slice(1, 1 + channels)))


def _every_other_sample(t: Tensor) -> Tensor:
    return _stored(t, [2 * t.shape[0], *t.shape[1:]], (slice(1, None, 2),))


def _offset(t: Tensor) -> Tensor:
    return torch.cat([_filled(t, (1,)), t.flatten()])[1:].view(t.shape)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _batch_last(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _reversed_order(t: Tensor) -> Tensor:
    """The first dimension is the innermost one in memory, the last the outermost."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _expanded(dimension: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.narrow(dimension, 0, 1).contiguous().expand(t.shape)


def _expanded_everywhere(t: Tensor) -> Tensor:
    return t.flatten()[:1].clone().view((1,) * t.dim()).expand(t.shape)


def _overlapping(t: Tensor) -> Tensor:
    """Strides below those of a contiguous tensor: channels, rows and samples share elements with their neighbours."""
    strides = [1]
    for size in reversed(t.shape[1:]):
        strides.insert(0, max(1, strides[0] * size // 2))
    return t.flatten().clone().as_strided(t.shape, strides)


def _windows(t: Tensor) -> Tensor:
    """As of `unfold`: every stride is 1."""
    return t.flatten().clone().as_strided(t.shape, (1,) * t.dim())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "offset": _offset,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "cropped": _cropped,
    "chunk": _chunk,
    "every other sample": _every_other_sample,
    "batch last": _batch_last,
    "reversed order": _reversed_order,
    "expanded in batch": _expanded(0),
    "expanded in channels": _expanded(1),
    "expanded in the last dimension": _expanded(-1),
    "expanded everywhere": _expanded_everywhere,
    "overlapping": _overlapping,
    "windows": _windows,
}
REPEATING = tuple(name for name in LAYOUTS if name.startswith("expanded") or name in ("overlapping", "windows"))


def in_layout(t: Tensor, name: str) -> Tensor:
    return LAYOUTS[name](t) if t.numel() else t


def _draw(shape, content: str, size: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (size * CONTENTS[content](tuple(shape), generator)).to(dtype)


@dataclass(frozen=True)
class Data:
    """The tensors of a call. What padding holds in key and value is NaN and infinity."""

    inputs: list[Tensor]
    grad_output: Tensor
    grad_logsumexp: Tensor | None = None
    mask: Tensor | None = None
    clean: list[Tensor] = field(default_factory=list)  # the inputs with 0 in padding

    def changed(self, **changes: Any) -> "Data":
        return dataclasses.replace(self, **changes)


def output_shape(call: Call) -> tuple[int, ...]:
    first, last = call.shapes[0], call.shapes[-1]
    if call.op == "position_attention":
        return (first[0], last[1], *first[2:])
    if call.op == "channel_attention":
        return (first[0], first[1], *last[2:])
    if call.op == "criss_cross_affinity":
        return (first[0], first[2] + first[3] - 1, *first[2:])
    return first if call.op.startswith(("channel", "residual")) else last


def make(call: Call) -> Data:
    generator = torch.Generator().manual_seed(call.seed)
    dtype = call.torch_dtype
    shapes = (*call.shapes, output_shape(call))
    drawn = [
        in_layout(_draw(shape, content, size, dtype, generator), layout)
        for shape, content, size, layout in zip(shapes, call.contents, call.sizes, call.layouts, strict=True)
    ]
    *inputs, grad_output = drawn
    grad_logsumexp = None
    if call.with_logsumexp:
        query = call.shapes[0]
        statistics = _draw((query[0], call.heads, *query[2:]), "normal", 1.0, accumulation_dtype(dtype), generator)
        grad_logsumexp = in_layout(statistics, call.layouts[-1])
    if call.padding == "none":
        return Data(inputs, grad_output, grad_logsumexp, None, [t.contiguous() for t in inputs])
    mask = _padding(call, generator)
    clean = [inputs[0], *(t.masked_fill(mask.unsqueeze(1), 0) for t in inputs[1:])]
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max], dtype=dtype)
    for i in (1, 2):
        chosen = poison[torch.randint(4, tuple(inputs[i].shape), generator=generator)]
        layout = "contiguous" if call.layouts[i] in REPEATING else call.layouts[i]
        inputs[i] = in_layout(torch.where(mask.unsqueeze(1), chosen, inputs[i]), layout)
    return Data(inputs, grad_output, grad_logsumexp, mask, [t.contiguous() for t in clean])


def _padding(call: Call, generator: torch.Generator) -> Tensor:
    """(B, *T), True for padding."""
    batch, _, *spatial = call.shapes[1]
    if call.padding == "scattered":
        mask = torch.rand((batch, *spatial), generator=generator) < 0.5
    elif call.padding == "most":
        mask = torch.rand((batch, *spatial), generator=generator) < 0.97
    elif call.padding == "whole samples":
        mask = (torch.rand(batch, generator=generator) < 0.5).view(batch, *(1,) * len(spatial))
        mask = mask.expand(batch, *spatial).contiguous()
    else:
        assert call.padding == "ends"
        mask = torch.zeros((batch, *spatial), dtype=torch.bool)
        for sample in range(batch):
            for dimension, size in enumerate(spatial):
                kept = int(torch.randint(1, size + 1, (1,), generator=generator))
                mask[sample].narrow(dimension, kept, size - kept).fill_(True)
    return in_layout(mask, call.mask_layout)


def function(call: Call, mask: Tensor | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The public function, of the tensors: its results as a tuple."""

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        if call.op == "channel_self_attention":
            (x,) = tensors
            found = segattn_ops.channel_attention(x, x, x, call.scale)
        elif call.op in ("criss_cross_affinity", "criss_cross_aggregation"):
            found = getattr(segattn_ops, call.op)(*tensors)
        else:
            options: dict[str, Any] = {}
            if call.op in ("position_attention", "criss_cross_attention"):
                options = {"num_heads": call.heads, "return_logsumexp": call.with_logsumexp}
            if call.op == "position_attention":
                options["key_padding_mask"] = mask
            found = getattr(segattn_ops, call.op)(*tensors, call.scale, **options)
        return found if isinstance(found, tuple) else (found,)

    return results


def results(call: Call, data: Data) -> dict[str, Tensor]:
    """Output, logsumexp and gradients of the op under test."""
    return differentiated(call, function(call, data.mask), data.inputs, data)


def differentiated(call: Call, compute: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], data: Data):
    """What `compute` returns, and the gradients that the call needs, by name. The gradients that are given are
    converted to the results' dtypes."""
    leaves = [t.detach().requires_grad_(needed) for t, needed in zip(inputs, call.needs, strict=True)]
    outputs = compute(*leaves)
    given = [data.grad_output] if len(outputs) == 1 else [data.grad_output, data.grad_logsumexp]
    found = {name: t.detach() for name, t in zip(("output", "logsumexp"), outputs, strict=False)}
    if any(call.needs):
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        names = [name for name, needed in zip(ARGUMENTS[call.op], call.needs, strict=True) if needed]
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
        gradients = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
        found |= {f"grad_{name}": g for name, g in zip(names, gradients, strict=True)}
    return found


@contextmanager
def settings(call: Call, backend: Backend) -> Iterator[None]:
    """The number of threads, and of the emulator its device, schedule and engine."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(backend.selected())
        if backend.name == "emulated":
            emulator = build.load(os.environ.get("SEGATTN_EMULATOR_VARIANT", "plain"))
            emulator.set_device(call.architecture)
            emulator.set_seed(call.seed)
            stack.callback(emulator.set_device, 90)
            stack.callback(emulator.set_seed, 0)
            stack.enter_context(_position_engine.forced_position_engine(call.engine, backend.namespace))
        elif backend.name == "cpu":
            torch.set_num_threads(call.threads)
            stack.callback(torch.set_num_threads, before)
        yield
