"""Heads: groups of channels that attend independently, as samples of a larger batch."""

from torch import Tensor

from ._check import fail


def check_heads(op: str, num_heads: object, **tensors: Tensor) -> None:
    """For feature maps that the op's own check has passed.

    Raises:
        TypeError: if num_heads is not an int.
        ValueError: if it is less than 1.
        RuntimeError: if a tensor's channels cannot be split into so many heads.
    """
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"{op}: num_heads must be an int (got {type(num_heads).__name__})")
    if num_heads < 1:
        raise ValueError(f"{op}: num_heads must be at least 1 (got {num_heads})")
    for name, tensor in tensors.items():
        if tensor.shape[1] % num_heads != 0:
            rule = f"must have a number of channels divisible by num_heads = {num_heads}"
            fail(op, f"{name} {rule} (got {tensor.shape[1]})")


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(B, heads * channels, *S) -> (B * heads, channels, *S): a view of a contiguous tensor, a copy of one with
    channels last."""
    split: Tensor = tensor.unflatten(1, (num_heads, -1)).flatten(0, 1)
    return split


def merge_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of `split_heads`."""
    merged: Tensor = tensor.unflatten(0, (-1, num_heads)).flatten(1, 2)
    return merged


def logsumexp_of_heads(logsumexp: Tensor, num_heads: int) -> Tensor:
    """(B * heads, *S) -> (B, heads, *S)"""
    result: Tensor = logsumexp.unflatten(0, (-1, num_heads))
    return result
