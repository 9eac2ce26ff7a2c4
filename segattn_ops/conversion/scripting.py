"""TorchScript of converted blocks: a forward without dynamic names, which calls the operators directly.

``torch.jit.script`` asks a module for ``__prepare_scriptable__`` and puts the result into the model in its place. The
result is therefore the block itself under another class, whose forward is scriptable and outside a script the block's
own.
"""

import itertools
import linecache
import types
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import ops

_COUNTER = itertools.count()


def position(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``position_attention`` in TorchScript."""
    with_low = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    output: Tensor = ops.position_attention(query, key, value, scale, with_low)[0]
    return output


def criss_cross(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``criss_cross_attention`` in TorchScript."""
    output: Tensor = ops.criss_cross_attention(query, key, value, scale)[0]
    return output


def channel(x: Tensor, scale: float) -> Tensor:
    """``channel_attention`` of x with itself in TorchScript."""
    output: Tensor = ops.channel_self_attention(x, scale)[0]
    return output


def dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """``nn._pairwise.dot_product`` in TorchScript: 16-bit sums over positions are kept in float32."""
    dtype = torch.float32 if g.dtype == torch.float16 or g.dtype == torch.bfloat16 else g.dtype
    summary = torch.matmul(g.to(dtype).flatten(2), phi.to(dtype).flatten(2).transpose(1, 2)) / phi.flatten(2).shape[2]
    output: Tensor = torch.matmul(summary, theta.to(dtype).flatten(2)).to(g.dtype).unflatten(2, theta.shape[2:])
    return output


def scriptable(block: Any, body: list[str], inputs: list[str]) -> nn.Module:
    """The block under a class with a scriptable forward.

    Args:
        block: a converted block.
        body: the lines of that forward, in which the block's children have their own names.
        inputs: names of its arguments.
    """
    ranks = " and ".join(f"{inputs[0]}.dim() != {rank}" for rank in sorted(block._fused_traits.ranks))
    message = f"{block._original_class.__name__}: input must have "
    message += " or ".join(map(str, sorted(block._fused_traits.ranks))) + " dimensions (batch, channels, *spatial)"
    training = f"{block._original_class.__name__}: its dropout in training is not scripted; script it in eval mode"
    lines = [
        f"def forward(self, {', '.join(f'{name}: Tensor' for name in inputs)}) -> Tensor:",
        "    if not torch.jit.is_scripting():",
        f"        return super(scripted, self).forward({', '.join(inputs)})",
        f"    if {ranks}:",
        f"        raise ValueError({message!r})",
    ]
    if block._fused_traits.original_in_training or block._fused_drops():
        lines += ["    if self.training:", f"        raise RuntimeError({training!r})"]
    lines += [f"    {line}" for line in body]
    filename = f"<segattn_ops: scripted {block._original_class.__name__} {next(_COUNTER)}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for inspect
    namespace: dict[str, Any] = {
        "torch": torch,
        "Tensor": Tensor,
        "position": position,
        "criss_cross": criss_cross,
        "channel": channel,
        "dot_product": dot_product,
    }
    exec(compile(source, filename, "exec"), namespace)
    body_of_class = {
        "forward": namespace["forward"],
        "__module__": __name__,
        # torch.jit.script reads the annotations of the first class that has any
        "__annotations__": {"training": bool, **getattr(block._original_class, "__annotations__", {})},
    }
    scripted = types.new_class(type(block).__name__, (type(block),), exec_body=lambda body: body.update(body_of_class))
    namespace["scripted"] = scripted
    twin: nn.Module = object.__new__(scripted)
    object.__setattr__(twin, "__dict__", block.__dict__)
    return twin
