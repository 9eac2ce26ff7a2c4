"""The formulations that are compared, each as a function of the same leaves (see ``Workload.leaves``).

``eager`` is the definition as the papers' code runs it, written here in plain PyTorch: two batched matrix products
around a softmax for position and channel attention (DANet), and for criss-cross attention the two-branch einsum with
-inf on the column's diagonal (in mmcv that form replaced hand-written kernels, because it was faster than they were).
``compile`` is ``torch.compile`` of that, at fixed shapes. ``sdpa`` is ``scaled_dot_product_attention`` with one head
(``sdpa_flash`` and so on: with that backend or not at all).
``flex`` is FlexAttention, with a row-or-column mask for criss-cross. ``fused`` is this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .workloads import OPS, PAIRWISE, RECURRENCE, Workload

SDPA_BACKENDS = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
}
RIVALS = ("fused", "eager", "sdpa", "compile", "flex", *SDPA_BACKENDS)
APPLICABLE = {
    "fused": OPS,
    "eager": OPS,
    "compile": OPS,
    "sdpa": PAIRWISE,
    **dict.fromkeys(SDPA_BACKENDS, PAIRWISE),
    "flex": (*PAIRWISE, "criss_cross", "rcca"),
}
TITLES = {
    "fused": "segattn_ops",
    "eager": "eager",
    "sdpa": "SDPA",
    "compile": "compile",
    "flex": "FlexAttention",
    "sdpa_flash": "SDPA flash",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_cudnn": "SDPA cuDNN",
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


def sdpa_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through ``scaled_dot_product_attention`` with one head; PyTorch chooses the backend.

    Channels-first maps are copied to tokens first: no fused backend takes channels with a stride.
    """
    tokens = (operand.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for operand in (query, key, value))
    output = F.scaled_dot_product_attention(*tokens, scale=1.0)
    return output.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


def sdpa_position_by(backend: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`sdpa_position` with one backend allowed; raises RuntimeError where that backend refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return sdpa_position(query, key, value)


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


def flex_attention(query: Tensor, key: Tensor, value: Tensor, criss_cross: bool = False) -> Tensor:
    """The same through FlexAttention; criss-cross is a mask, so that blocks outside row and column are skipped."""
    tokens = (operand.flatten(2).transpose(1, 2).unsqueeze(1) for operand in (query, key, value))
    mask = _criss_cross_mask(*query.shape[2:], query.device) if criss_cross else None
    output = _compiled_flex()(*tokens, block_mask=mask, scale=1.0)
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
    "sdpa": {"position": sdpa_position},
    **{name: {"position": partial(sdpa_position_by, backend)} for name, backend in SDPA_BACKENDS.items()},
    "flex": {"position": flex_attention, "criss_cross": partial(flex_attention, criss_cross=True)},
}


def formulation(rival: str, op: str) -> Callable[..., Tensor]:
    """The function that computes ``op`` as ``rival`` does, taking the tensors of ``Workload.leaves`` in their order."""
    if rival not in RIVALS:
        raise ValueError(f"rival must be one of {', '.join(RIVALS)} (got {rival})")
    if op not in APPLICABLE[rival]:
        raise ValueError(f"{rival} has no formulation of {op}")
    if rival == "compile":
        return torch.compile(formulation("eager", op), dynamic=False)
    if op == "rcca":
        return partial(recurrent_block, _FORMULATIONS[rival]["criss_cross"])
    return _FORMULATIONS[rival]["position" if op in PAIRWISE else op]


def uses_compiler(rival: str) -> bool:
    """Whether the first call at a size compiles for that size, which must not be timed nor counted as memory."""
    return rival in ("compile", "flex")


def applicable(rivals: tuple[str, ...], workload: Workload) -> list[str]:
    return [rival for rival in rivals if workload.op in APPLICABLE[rival]]
