"""The compared formulations, each a function of the same leaves (see ``Workload.leaves``).

``fused`` is this package. ``eager`` is the definition as in the papers' code, in plain PyTorch: two batched matrix
products around a softmax for position and channel attention (DANet), and for criss-cross attention the two-branch
einsum with -inf on the column's diagonal (in mmcv this form replaced slower hand-written kernels). ``compile`` is
``torch.compile`` of ``eager``, at fixed shapes. ``sdpa`` is ``scaled_dot_product_attention`` with one head;
``sdpa_flash`` and so on force that backend. ``sdpa_flash_split`` splits a value that is too wide for the flash backend
into heads that share the query and the key. ``flex`` is FlexAttention, with a row-or-column mask for criss-cross.
``mmcv`` is criss-cross attention as in mmcv. ``eager_onednn`` and ``sdpa_onednn`` are ``eager`` and ``sdpa`` with
oneDNN's products in float32 instead of MKL's. ``onnxruntime`` and ``onnx_attention`` are operators of ONNX Runtime
(``benchmarks/runtimes.py``); ``xformers`` and ``flash_attn`` are the packages' functions, for GPUs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .workloads import DTYPES, OPS, PAIRWISE, RECURRENCE, Workload, peak_bytes, split_heads

SDPA_BACKENDS = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
}
ONEDNN = {"eager_onednn": "eager", "sdpa_onednn": "sdpa"}  # with the switch of torch.backends.mkldnn
RUNTIMES = ("onnxruntime", "onnx_attention")
RIVALS = (
    *("fused", "eager", "sdpa", "compile", *ONEDNN, "mmcv", *RUNTIMES),
    *("flex", *SDPA_BACKENDS, "sdpa_flash_split", "xformers", "flash_attn"),
)
# On a GPU whose position attention takes another engine: the package's kernels with mma.sync (benchmarks/gpu).
FUSED_BY_MMA = "fused_mma"
APPLICABLE = {
    "fused": OPS,
    FUSED_BY_MMA: PAIRWISE,
    "eager": OPS,
    "compile": OPS,
    "sdpa": PAIRWISE,
    **dict.fromkeys(SDPA_BACKENDS, PAIRWISE),
    "sdpa_flash_split": PAIRWISE,
    "flex": (*PAIRWISE, "criss_cross", "rcca"),
    "eager_onednn": OPS,
    "sdpa_onednn": PAIRWISE,
    "mmcv": ("criss_cross", "rcca"),
    **dict.fromkeys((*RUNTIMES, "xformers", "flash_attn"), PAIRWISE),
}
TITLES = {
    "fused": "segattn_ops",
    FUSED_BY_MMA: "segattn_ops, mma.sync",
    "eager": "eager",
    "sdpa": "SDPA",
    "compile": "compile",
    "flex": "FlexAttention",
    "sdpa_flash": "SDPA flash",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_flash_split": "SDPA flash, split",
    "eager_onednn": "eager, oneDNN",
    "sdpa_onednn": "SDPA, oneDNN",
    "mmcv": "mmcv",
    "onnxruntime": "ONNX Runtime",
    "onnx_attention": "ONNX Attention",
    "xformers": "xFormers",
    "flash_attn": "flash-attn",
}


def eager_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B,E,H,W), (B,E,*T), (B,C,*T) -> (B,C,H,W): softmax(Q^T K) applied to V through two batched products."""
    queries = query.flatten(2).transpose(1, 2)
    attention = torch.softmax(torch.bmm(queries, key.flatten(2)), dim=-1)
    return torch.bmm(value.flatten(2), attention.transpose(1, 2)).view(*value.shape[:2], *query.shape[2:])


def eager_channel(input: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,C,H,W): softmax(rowmax(E) - E) X with E = X X^T, DANet's channel attention."""
    features = input.flatten(2)
    energy = torch.bmm(features, features.transpose(1, 2))
    energy = energy.max(dim=-1, keepdim=True).values.expand_as(energy) - energy
    return torch.bmm(torch.softmax(energy, dim=-1), features).view_as(input)


def eager_criss_cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B,E,H,W), (B,E,H,W), (B,C,H,W) -> (B,C,H,W): one softmax over column and row, self masked in the column."""
    height = query.shape[2]
    column = torch.einsum("bchw,bciw->bhwi", query, key)
    diagonal = torch.full((height,), float("-inf"), dtype=query.dtype, device=query.device).diag_embed()
    column = column + diagonal.view(1, height, 1, height)
    row = torch.einsum("bchw,bchj->bhwj", query, key)
    attention = torch.softmax(torch.cat([column, row], dim=-1), dim=-1)
    output = torch.einsum("bciw,bhwi->bchw", value, attention[..., :height])
    return output + torch.einsum("bchj,bhwj->bchw", value, attention[..., height:])


def mmcv_criss_cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same as mmcv computes it: the column's energies in the order of its batched product, and one sum in place.
    The mask has the query's dtype, without which mmcv's code fails in 16 bits."""
    height = query.shape[2]
    mask = torch.diag(torch.full((height,), float("-inf"), dtype=query.dtype, device=query.device))
    column = (torch.einsum("bchw,bciw->bwhi", query, key) + mask).transpose(1, 2)
    row = torch.einsum("bchw,bchj->bhwj", query, key)
    attention = torch.softmax(torch.cat([column, row], dim=-1), dim=-1)
    output = torch.einsum("bciw,bhwi->bchw", value, attention[..., :height])
    output += torch.einsum("bchj,bhwj->bchw", value, attention[..., height:])
    return output.contiguous()


def _tokens(operand: Tensor) -> Tensor:
    """(B,C,*S) -> (B,1,N,C), contiguous: no fused backend of SDPA accepts strided channels."""
    return operand.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def sdpa_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with ``scaled_dot_product_attention``, one head; PyTorch chooses the backend."""
    tokens = (_tokens(operand) for operand in (query, key, value))
    output = F.scaled_dot_product_attention(*tokens, scale=1.0)
    return output.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


def sdpa_position_by(backend: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`sdpa_position` with one backend; raises RuntimeError if it does not support the operands."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return sdpa_position(query, key, value)


def sdpa_position_split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with SDPA's flash backend, which needs query, key and value of one width of at most 256 channels.

    Raises RuntimeError if the backend does not support the operands, ValueError if the query has more than 256
    channels.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _in_heads(partial(F.scaled_dot_product_attention, scale=1.0), query, key, value)


def _in_heads(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Position attention through ``attend(query, key, value)`` on (B,heads,N,width) of one width of at most 256.

    The value's channels are split into heads of at most 256. All heads share the query and the key, zero-padded to the
    width of a head. One call iterates over the keys once per head. The scale is that of the unpadded query.
    """
    channels, key_channels = value.shape[1], query.shape[1]
    parts, width = split_heads(key_channels, channels)
    shared = (F.pad(_tokens(operand), (0, width - key_channels)).expand(-1, parts, -1, -1) for operand in (query, key))
    part = -(-channels // parts)
    values = F.pad(value.flatten(2), (0, 0, 0, parts * part - channels)).unflatten(1, (parts, part))
    values = F.pad(values.transpose(2, 3), (0, width - part)).contiguous()  # (B,parts,N,width)
    output = attend(*shared, values)
    output = output[..., :part].transpose(2, 3).flatten(1, 2)[:, :channels]
    return output.unflatten(2, query.shape[2:])


def xformers_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with xFormers' ``memory_efficient_attention``, which takes values of another width; xFormers chooses
    the kernel."""
    from xformers.ops import memory_efficient_attention

    tokens = (_tokens(operand).transpose(1, 2) for operand in (query, key, value))  # (B,N,1,C)
    output = memory_efficient_attention(*tokens, scale=1.0)
    return output.squeeze(2).transpose(1, 2).unflatten(2, query.shape[2:])


def flash_attn_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`sdpa_position_split` with the package flash-attn, which has the same limits."""
    from flash_attn import flash_attn_func

    def attend(*heads: Tensor) -> Tensor:
        return flash_attn_func(*(head.transpose(1, 2) for head in heads), softmax_scale=1.0).transpose(1, 2)

    return _in_heads(attend, query, key, value)


def fused_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from segattn_ops import position_attention

    return position_attention(query, key, value)


def fused_channel(input: Tensor) -> Tensor:
    from segattn_ops import channel_attention

    return channel_attention(input, input, input)


def fused_criss_cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from segattn_ops import criss_cross_attention

    return criss_cross_attention(query, key, value)


@lru_cache(maxsize=8)
def _criss_cross_mask(height: int, width: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def same_row_or_column(batch, head, query, key):
        return (query // width == key // width) | (query % width == key % width)

    n = height * width
    return create_block_mask(same_row_or_column, None, None, n, n, device=device)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_options(value: Tensor) -> dict | None:
    """FlexAttention's ``kernel_options`` for a (B,C,*S) value: on a GPU, tiles that fit a block's shared memory.

    Flex chooses tiles by the query's width, 64 here, which leaves no room for 512 value channels: compiled for sm_90 in
    bfloat16, its kernels need 448 KiB forward and 361 KiB backward, of 227. With these tiles they need 152 and 76 KiB
    and spill no registers; in float32 42 and 73 KiB, with some spills. M1 and N1 belong to the kernel of grad_key and
    grad_value, which keeps N1 keys and iterates over M1 queries at a time; M2 and N2 to that of grad_query.
    """
    if not value.is_cuda or value.shape[1] <= 256:
        return None
    if value.element_size() == 2:
        queries, keys, backward, stages = 64, 64, 32, 2
    else:
        queries, keys, backward, stages = 32, 16, 16, 1
    return {
        "fwd_BLOCK_M": queries,
        "fwd_BLOCK_N": keys,
        **{f"bwd_BLOCK_{name}": backward for name in ("M1", "N1", "M2", "N2")},
        "num_stages": stages,
        "num_warps": 8,
    }


def flex_attention(query: Tensor, key: Tensor, value: Tensor, criss_cross: bool = False) -> Tensor:
    """The same with FlexAttention; criss-cross is a mask, so that blocks outside row and column are skipped."""
    tokens = (operand.flatten(2).transpose(1, 2).unsqueeze(1) for operand in (query, key, value))
    mask = _criss_cross_mask(*query.shape[2:], query.device) if criss_cross else None
    output = _compiled_flex()(*tokens, block_mask=mask, scale=1.0, kernel_options=flex_options(value))
    return output.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


def recurrent_block(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    input: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gamma: Tensor,
) -> Tensor:
    """CCNet's block: 1x1 projections, criss-cross attention and a scaled residual, R times with the same weights."""
    for _ in range(RECURRENCE):
        query = F.conv2d(input, query_weight, query_bias)
        key = F.conv2d(input, key_weight, key_bias)
        value = F.conv2d(input, value_weight, value_bias)
        input = gamma * attention(query, key, value) + input
    return input


_FORMULATIONS = {
    "eager": {"position": eager_position, "channel": eager_channel, "criss_cross": eager_criss_cross},
    "fused": {"position": fused_position, "channel": fused_channel, "criss_cross": fused_criss_cross},
    FUSED_BY_MMA: {"position": fused_position},
    "sdpa": {"position": sdpa_position},
    **{name: {"position": partial(sdpa_position_by, backend)} for name, backend in SDPA_BACKENDS.items()},
    "sdpa_flash_split": {"position": sdpa_position_split},
    "flex": {"position": flex_attention, "criss_cross": partial(flex_attention, criss_cross=True)},
    "mmcv": {"criss_cross": mmcv_criss_cross},
    "xformers": {"position": xformers_position},
    "flash_attn": {"position": flash_attn_position},
}


def formulation(rival: str, op: str) -> Callable[..., Tensor]:
    """The rival's function for ``op``; its arguments are the tensors of ``Workload.leaves``, in their order."""
    if rival not in APPLICABLE:
        raise ValueError(f"rival must be one of {', '.join(RIVALS)} (got {rival})")
    if op not in APPLICABLE[rival]:
        raise ValueError(f"{rival} has no formulation of {op}")
    if rival in RUNTIMES:
        raise ValueError(f"{rival} takes other tensors: benchmarks.runtimes.Session")
    if rival == "compile":
        return torch.compile(formulation("eager", op), dynamic=False)
    if rival in ONEDNN:
        return formulation(ONEDNN[rival], op)
    if op == "rcca":
        return partial(recurrent_block, _FORMULATIONS[rival]["criss_cross"])
    return _FORMULATIONS[rival]["position" if op in PAIRWISE else op]


def uses_compiler(rival: str) -> bool:
    """Whether the first call at a size compiles, which must be excluded from time and memory."""
    return rival in ("compile", "flex")


def configure(rival: str) -> None:
    """Sets what the rival needs in its own process, for forward and backward. oneDNN's float32 products are behind the
    switch that also allows it bfloat16 inside them: it uses that on processors with AMX, and the error says so."""
    if rival in ONEDNN:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def passes(rival: str, device: str | torch.device) -> tuple[str, ...]:
    """What the rival can compute: "forward" and "forward_backward", or the former alone."""
    forward_only = rival in RUNTIMES or (rival == "flex" and torch.device(device).type == "cpu")
    return ("forward",) if forward_only else ("forward", "forward_backward")


def limit(rival: str, device: str | torch.device) -> str | None:
    """What a measured rival does not do, for its row; None if it does all."""
    if passes(rival, device) != ("forward",):
        return None
    why = "; its layout conversions are not timed" if rival in RUNTIMES else ": no backward on a CPU"
    return f"forward only{why}"


def applicable(rivals: tuple[str, ...], workload: Workload) -> list[str]:
    return [rival for rival in rivals if workload.op in APPLICABLE[rival]]


_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "onnx_attention": ("onnxruntime", "onnx")}
_PACKAGES |= {"xformers": ("xformers",), "flash_attn": ("flash_attn",)}
_DTYPES = {**dict.fromkeys((*RUNTIMES, *ONEDNN), ("float32",)), "flash_attn": ("float16", "bfloat16")}
_DEVICES = dict.fromkeys((*RUNTIMES, *ONEDNN), "cpu") | dict.fromkeys(("xformers", "flash_attn"), "cuda")


def unavailable(workload: Workload, rival: str, device: str | torch.device) -> str | None:
    """Why the rival cannot run here at all, or None."""
    kind = torch.device(device).type
    if _DEVICES.get(rival, kind) != kind:
        return f"only for {_DEVICES[rival]}"
    if workload.dtype not in _DTYPES.get(rival, DTYPES):
        return f"only for {' and '.join(_DTYPES[rival])}"
    missing = [name for name in _PACKAGES.get(rival, ()) if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


@lru_cache(maxsize=64)
def _sdpa_backend(
    key_channels: int, value_channels: int, queries: int, keys: int, dtype: torch.dtype, device: str
) -> str:
    from torch.nn.attention import SDPBackend

    query, key, value = (
        torch.empty(1, 1, n, width, dtype=dtype, device=device, requires_grad=True)
        for n, width in ((queries, key_channels), (keys, key_channels), (keys, value_channels))
    )
    return SDPBackend(torch._fused_sdp_choice(query, key, value, scale=1.0)).name


def sdpa_backend(workload: Workload, device: str | torch.device) -> str:
    """The backend PyTorch chooses for ``sdpa`` at a pairwise workload with gradients on ``device``: a name of
    ``torch.nn.attention.SDPBackend``. Queried at 4096 positions at most, beyond which no choice changes."""
    key_channels, value_channels = workload.widths
    queries, keys = min(workload.positions, 4096), min(workload.keys, 4096)
    return _sdpa_backend(key_channels, value_channels, queries, keys, DTYPES[workload.dtype], str(device))


def needed_bytes(workload: Workload, rival: str, device: str | torch.device = "cpu") -> int:
    """:func:`~benchmarks.workloads.peak_bytes` on ``device``: ``sdpa`` is charged for attention maps only if PyTorch
    chooses its math path there."""
    of = ONEDNN.get(rival, rival)
    if of == "sdpa":
        return peak_bytes(workload, of, sdpa_backend(workload, device))
    return peak_bytes(workload, of)
