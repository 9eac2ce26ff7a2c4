"""Merging attention over parts of the keys."""

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor, Tensor]  # output (B, C, *S), logsumexp (B, *S), its rounding error (B, *S)


def merge(first: Partial, second: Partial) -> Partial:
    """Attention over the keys of both parts. Takes the memory of the first output.

    The weight of a part is exp(logsumexp) with the rounding error of the logsumexp, over the sum of both.
    """
    (output, logsumexp, low), (other, other_logsumexp, other_low) = first, second
    maximum = torch.maximum(logsumexp, other_logsumexp)
    shift = maximum.masked_fill(maximum == -torch.inf, 0)
    weight = ((logsumexp - shift) + low).exp()
    other_weight = ((other_logsumexp - shift) + other_low).exp()
    total = weight + other_weight
    is_empty = total == 0
    divisor = total.masked_fill(is_empty, 1)
    merged = output.mul_((weight / divisor).unsqueeze(1)).addcmul_(other, (other_weight / divisor).unsqueeze(1))
    log = divisor.log()
    result = (shift + log).masked_fill(is_empty, -torch.inf)
    return merged, result, ((shift - result) + log).masked_fill(~result.isfinite(), 0)


def without_any_key_is_nan(output: Tensor, logsumexp: Tensor) -> None:
    """Sets the output to NaN, as in one process, where all energies are -inf; that of a part is 0."""
    output.masked_fill_((logsumexp == -torch.inf).unsqueeze(1), torch.nan)


def delta_of(grad_output: Tensor, output: Tensor, grad_logsumexp: Tensor | None) -> Tensor:
    """grad_output, output (B, C, *S), grad_logsumexp (B, *S) -> sum_c grad_output output - grad_logsumexp, in the
    dtype of output, which is that of accumulation."""
    delta: Tensor = torch.linalg.vecdot(grad_output.to(output.dtype), output, dim=1)
    return delta if grad_logsumexp is None else delta - grad_logsumexp
