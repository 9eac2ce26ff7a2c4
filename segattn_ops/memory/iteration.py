"""What runs between two peaks of memory: one inference, or one step of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import _eager
from ..ops import channel_attention, criss_cross_attention, position_attention, residual_channel_attention
from .count import Count

ATTENTION, INPUT, OUTPUTS, OPTIMIZER = "attention", "input", "outputs and loss", "optimizer"
Loss = Callable[[Any, Tensor], Tensor]
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    # foreach, as PyTorch chooses on CUDA: its temporary tensors are as large as the weights. Weight decay makes some.
    "sgd": lambda weights: torch.optim.SGD(weights, 1e-2, momentum=0.9, weight_decay=1e-4, foreach=True),
    "adam": lambda weights: torch.optim.Adam(weights, weight_decay=1e-4, foreach=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, foreach=True),
}


class Attention(TorchFunctionMode):
    """Counts what the ops create as of attention; with ``fused=False`` they are computed as the papers' code does, with
    the attention map as a tensor."""

    _EAGER: ClassVar[dict[Any, Callable[..., Tensor]]] = {
        position_attention: _eager.position_attention,
        channel_attention: _eager.channel_attention,
        residual_channel_attention: _eager.residual_channel_attention,
        criss_cross_attention: _eager.criss_cross_attention,
    }

    _PLAIN: ClassVar[dict[str, object]] = {"num_heads": 1, "key_padding_mask": None, "return_logsumexp": False}

    def __init__(self, fused: bool, count: Count | None = None) -> None:
        super().__init__()
        self.fused, self.count = fused, count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        eager = self._EAGER.get(func)
        if eager is None:
            return func(*args, **kwargs)
        with nullcontext() if self.count is None else self.count.part(ATTENTION):
            plain = all(value is self._PLAIN.get(name, value) for name, value in kwargs.items())
            if self.fused or not plain:  # heads, masks and logsumexp are not in the papers' code
                return func(*args, **kwargs)
            return eager(*args, **{name: value for name, value in kwargs.items() if name not in self._PLAIN})


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast on the CPU; none for float32."""
    with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
        yield


def default_loss(outputs: Any, target: Tensor) -> Tensor:
    """The sum of the cross-entropies of all outputs: a tensor (B, classes, H, W), or several in a mapping or a
    sequence. In float32, as CUDA's autocast computes it."""
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    elif isinstance(outputs, Tensor):
        outputs = [outputs]
    if not (isinstance(outputs, (list, tuple)) and all(isinstance(one, Tensor) and one.dim() == 4 for one in outputs)):
        raise ValueError(
            "the network must return logits (B, classes, H, W), alone or in a mapping or a sequence; "
            f"for other outputs pass loss (got {type(outputs).__name__})"
        )
    total = target.new_zeros((), dtype=torch.float32)
    for logits in outputs:
        if logits.shape[2:] != target.shape[1:]:
            raise ValueError(
                f"the logits must have the size of the image, {tuple(target.shape[1:])}, or pass loss "
                f"(got {tuple(logits.shape[2:])})"
            )
        total = total + F.cross_entropy(logits.float(), target, ignore_index=255)
    return total


def training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image: Tensor,
    target: Tensor,
    loss: Loss,
    dtype: torch.dtype,
    count: Count | None = None,
) -> None:
    """One step. The outputs live until its end, as in most training loops."""
    with nullcontext() if count is None else count.part(OUTPUTS), autocast(dtype):
        outputs = model(image)
        value = loss(outputs, target)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def inference(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Any:
    """The outputs."""
    with torch.no_grad(), autocast(dtype):
        return model(image)


def prepare(model: nn.Module, optimizer: str) -> torch.optim.Optimizer:
    """The optimizer of the model's trainable parameters, with its state, as after a first step; without gradients."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weights:
        raise ValueError("memory.estimate: the network has no parameter that requires a gradient; pass train=False")
    made = OPTIMIZERS[optimizer](weights)
    for parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    made.zero_grad()
    return made
