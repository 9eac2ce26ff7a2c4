"""The measured ops, their operands, and formulas for their arithmetic and memory.

A :class:`Workload` is one op at one size. :func:`flops` counts the FLOPs of its *definition* (2 x multiply-accumulates,
the same for every rival, so that GFLOP/s compare like times). :func:`peak_bytes` is the memory of a rival, so that a
cell that would not fit is not started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch

OPS = ("position", "channel", "criss_cross", "rcca", "non_local", "ann")
PAIRWISE = ("position", "non_local", "ann")  # one softmax(Q^T K) V each
TITLES = {
    "position": "Position attention (DANet)",
    "channel": "Channel attention (DANet)",
    "criss_cross": "Criss-cross attention (CCNet)",
    "rcca": "Recurrent criss-cross block, R = 2 (CCNet)",
    "non_local": "Non-local attention (embedded Gaussian)",
    "ann": "Attention to a pooled pyramid, 110 keys (ANN)",
}
RECURRENCE = 2
PYRAMID = (1, 3, 6, 8)  # sides of the grids to which ANN pools keys and values: 110 positions
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class Workload:
    """One op at one size.

    ``channels`` is C, the channels of the feature map; ``key_channels`` is E of DANet and CCNet (C / 8 in both).
    Non-local and ANN project query, key and value to C / 2 channels, as in their papers.
    """

    op: str
    height: int
    width: int
    dtype: str = "float32"
    batch: int = 1
    channels: int = 512
    key_channels: int = 64

    def __post_init__(self):
        if self.op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)} (got {self.op})")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} (got {self.dtype})")
        for name in ("height", "width", "batch", "channels", "key_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (got {getattr(self, name)})")

    @classmethod
    def of(cls, record: dict) -> Workload:
        """The workload of a cell's record (``benchmarks.run.record``)."""
        shared = {name: record[name] for name in ("op", "height", "width", "dtype", "batch", "channels")}
        widths_follow_channels = record["op"] in ("channel", "non_local", "ann")
        return cls(**shared) if widths_follow_channels else cls(**shared, key_channels=record["query_channels"])

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def keys(self) -> int:
        """Number of positions of key and value."""
        return sum(side * side for side in PYRAMID) if self.op == "ann" else self.positions

    @property
    def size(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def label(self) -> str:
        batch = f" B={self.batch}" if self.batch > 1 else ""
        return f"{self.op} {self.size}{batch} {self.dtype}"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def widths(self) -> tuple[int, int]:
        """(key channels, value channels) of the attention itself."""
        if self.op in ("non_local", "ann"):
            return max(self.channels // 2, 1), max(self.channels // 2, 1)
        if self.op == "channel":
            return self.channels, self.channels
        return self.key_channels, self.channels

    def leaves(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors whose gradients are taken, in the op's order."""
        spatial = (self.height, self.width)
        key_channels, value_channels = self.widths
        if self.op == "channel":
            return {"input": (self.batch, self.channels, *spatial)}
        if self.op == "rcca":
            return {
                "input": (self.batch, self.channels, *spatial),
                "query_weight": (key_channels, self.channels, 1, 1),
                "query_bias": (key_channels,),
                "key_weight": (key_channels, self.channels, 1, 1),
                "key_bias": (key_channels,),
                "value_weight": (value_channels, self.channels, 1, 1),
                "value_bias": (value_channels,),
                "gamma": (1,),
            }
        key_spatial = (self.keys,) if self.op == "ann" else spatial
        return {
            "query": (self.batch, key_channels, *spatial),
            "key": (self.batch, key_channels, *key_spatial),
            "value": (self.batch, value_channels, *key_spatial),
        }

    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.widths[1], self.height, self.width)

    def operand_bytes(self) -> int:
        """Bytes of inputs and grad_output, which exist before the op runs."""
        return self.itemsize * (sum(prod(shape) for shape in self.leaves().values()) + prod(self.output_shape()))

    def result_bytes(self) -> int:
        """Bytes of output and gradients."""
        return self.operand_bytes()

    def least_bytes(self) -> tuple[int, int]:
        """Least bytes moved by a forward (inputs and output) and a backward (inputs, grad_output and gradients)."""
        inputs = self.itemsize * sum(prod(shape) for shape in self.leaves().values())
        return self.operand_bytes(), self.operand_bytes() + inputs


def flops(workload: Workload) -> tuple[int, int]:
    """FLOPs of the definition: (forward, forward + backward), 2 x multiply-accumulates.

    Position and Non-local: 2 N^2 (E + C), ANN 2 N 110 (E + C). Channel: 4 C^2 N. Criss-cross:
    2 N (H + W - 1) (E + C), each position with the H + W - 1 positions of its row and column. The backward of a product
    of two matrices is two products of its size. The count ignores recomputation and symmetry in a fused kernel.
    """
    n, b = workload.positions, workload.batch
    key_channels, value_channels = workload.widths
    neighbours = workload.height + workload.width - 1
    if workload.op == "channel":
        forward = 4 * value_channels * value_channels * n
    elif workload.op == "criss_cross":
        forward = 2 * n * neighbours * (key_channels + value_channels)
    elif workload.op == "rcca":
        projections = 2 * n * workload.channels * (2 * key_channels + value_channels)
        forward = RECURRENCE * (projections + 2 * n * neighbours * (key_channels + value_channels))
    else:
        forward = 2 * n * workload.keys * (key_channels + value_channels)
    return b * forward, b * 3 * forward


def recomputing_flops(workload: Workload) -> int:
    """FLOPs of a fused forward + backward that stores no attention map: one more product Q^T K in the backward."""
    extra = {"criss_cross": 1, "rcca": RECURRENCE, "channel": 0, **dict.fromkeys(PAIRWISE, 1)}[workload.op]
    key_channels, _ = workload.widths
    n = workload.positions
    neighbours = workload.keys if workload.op in PAIRWISE else workload.height + workload.width - 1
    return flops(workload)[1] + workload.batch * extra * 2 * n * neighbours * key_channels


# Attention maps alive at the peak of forward + backward.
# Eager: the attention map, its gradient, that gradient made contiguous for softmax's backward, the energies' gradient.
# torch.compile fuses softmax's backward with that copy. SDPA's math path keeps the attention map and both gradients.
# Measured at 97 x 97 (float32, MiB, attention maps of 338): eager 1369, torch.compile 990, SDPA 1026.
# mmcv's form is eager's; ONNX's Attention has only a forward, and keeps the energies beside the weights.
LIVE_ATTENTION_MAPS = {"eager": 4.0, "compile": 3.0, "sdpa": 3.1, "mmcv": 4.0, "onnx_attention": 2.0}


def attention_map_bytes(workload: Workload, rival: str = "eager") -> int:
    """Bytes of one attention map of the definition, as ``rival`` stores it."""
    n = workload.positions
    itemsize = workload.itemsize
    if rival == "sdpa":
        itemsize = max(itemsize, 4)  # the math path computes 16-bit inputs in float32
    if workload.op == "channel":
        return workload.batch * workload.channels**2 * itemsize
    if workload.op in ("criss_cross", "rcca"):
        return workload.batch * n * (workload.height + workload.width) * itemsize
    return workload.batch * n * workload.keys * itemsize


FLASH_WIDTH = 256  # most channels of a head of SDPA's flash backend


def split_heads(key_channels: int, value_channels: int) -> tuple[int, int]:
    """(number of heads, their padded channels) for a value in SDPA's flash backend, whose heads also hold the channels
    of query and key: as few heads as possible, each of a multiple of 8 channels.

    Raises:
        ValueError: the query has too many channels for a head.
    """
    if key_channels > FLASH_WIDTH:
        raise ValueError(
            f"the query must have at most {FLASH_WIDTH} channels for SDPA's flash backend (got {key_channels})"
        )
    parts = -(-value_channels // FLASH_WIDTH)
    return parts, -(-max(key_channels, -(-value_channels // parts)) // 8) * 8


def split_bytes(workload: Workload) -> int:
    """Bytes of ``sdpa_flash_split`` beyond operands and results: query and key once and, for each part, value, output,
    grad_output and the gradients of query, key and value, all padded to one width; and grad_query in float32, as on a
    GPU."""
    key_channels, value_channels = workload.widths
    parts, width = split_heads(min(key_channels, FLASH_WIDTH), value_channels)
    queries, keys = workload.positions * workload.batch, workload.keys * workload.batch
    padded = width * ((1 + 3 * parts) * queries + (1 + 3 * parts) * keys)
    return workload.itemsize * padded + 4 * width * parts * queries


def peak_bytes(workload: Workload, rival: str, sdpa_backend: str = "MATH") -> int:
    """Peak bytes of forward + backward of ``rival``, including operands and results.

    The sum of the attention maps, the operands, the results, and one more set of operands and results for copies
    (layout changes of the rivals, packed operands and partial sums of the fused kernels). ``sdpa`` stores attention
    maps only if its backend, a name of ``torch.nn.attention.SDPBackend``, is MATH; see
    :func:`benchmarks.rivals.needed_bytes`.
    """
    maps = LIVE_ATTENTION_MAPS.get(rival, 0.0) * (RECURRENCE if workload.op == "rcca" else 1)
    if rival == "sdpa" and sdpa_backend != "MATH":
        maps = 0.0
    activations = workload.operand_bytes() + workload.result_bytes()
    if rival in ("sdpa_flash_split", "flash_attn"):
        return activations + split_bytes(workload)
    if workload.op == "rcca":
        activations *= 1 + RECURRENCE
    return int(maps * attention_map_bytes(workload, rival)) + 2 * activations


def parse_size(text: str) -> tuple[int, int]:
    """``"97x97"`` to (97, 97)."""
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text.lower())
    if found is None or int(found[1]) < 1 or int(found[2]) < 1:
        raise ValueError(f"a size is HEIGHTxWIDTH of the feature map, like 97x97 (got {text!r})")
    return int(found[1]), int(found[2])
