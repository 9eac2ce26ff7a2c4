"""How torch.onnx.export translates the operators: as the plain PyTorch definitions, which are standard operators.

torch.onnx decomposes what it has no translation for by PyTorch's table of decompositions. torch.compile, AOTAutograd,
AOTInductor and the default `ExportedProgram.run_decompositions()` take only listed entries of that table, so that they
keep the operators. It takes a captured program and a module alike, because torch.onnx captures a module as a program
first.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from . import reference
from ._autocast import without_autocast
from ._inductor import registering
from .ops import Operator

# Only backward passes read output_low and logsumexp_low, the rounding errors of results: they are 0 here.


def _position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    with_low: bool = False,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, logsumexp = reference.position_attention(query, key, value, scale, key_padding_mask)
    is_16_bit = output.dtype.itemsize == 2
    output_low = torch.zeros_like(output) if with_low and is_16_bit else output[:, :0]
    return output, logsumexp, output_low, logsumexp[:, :0] if is_16_bit else torch.zeros_like(logsumexp)


def _criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    output, logsumexp = reference.criss_cross_attention(query, key, value, scale)
    return output, logsumexp, torch.zeros_like(logsumexp)


_DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "position_attention": _position_attention,
    "position_attention_partial": reference.position_attention_partial,
    "channel_attention": reference.channel_attention,
    "channel_self_attention": reference.channel_self_attention,
    "channel_energy": reference.channel_energy,
    "channel_apply": reference.channel_apply,
    "criss_cross_affinity": reference.criss_cross_affinity,
    "criss_cross_aggregation": reference.criss_cross_aggregation,
    "criss_cross_attention": _criss_cross_attention,
    "criss_cross_rows": reference.criss_cross_rows,
    "criss_cross_columns": reference.criss_cross_columns,
}


def _decomposition(definition: Callable[..., Any]) -> Callable[..., Any]:
    """A program that contains an autocast region is decomposed within it."""

    def decomposed(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        with without_autocast(first.device.type):
            return definition(first, *arguments, **keywords)

    return decomposed


def register(namespace: str, operators: Iterable[Operator]) -> None:
    """Makes the operators of a namespace translatable by torch.onnx."""
    packets = getattr(torch.ops, namespace)
    for operator in operators:
        overload = getattr(packets, operator.name).default
        register_decomposition(overload)(_decomposition(_DECOMPOSITIONS[operator.name]))
        # Fake tensors of symbolic sizes prefer a decomposition to the registered fake, unless there is a meta function.
        register_decomposition(overload, type="meta")(registering(overload, operator.fake))
