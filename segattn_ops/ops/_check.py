"""The rules every op checks its arguments by, in Python: for the reference, and for fake tensors, which never reach
the C++ checks. csrc/checks/ says the same in the same words; tests/ops/test_errors.py holds the two together."""

import math

import torch
from torch import Tensor

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op: str, message: str) -> None:
    raise RuntimeError(f"{op}: {message}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if dtype in SUPPORTED else "another dtype"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others: the dtype of accumulation and of logsumexp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(tensor: Tensor, first: int = 0) -> str:
    return str(list(tensor.shape[first:]))


class Arguments:
    """The tensors of one call by their names, and the rules over them."""

    def __init__(self, op: str, **tensors: Tensor) -> None:
        self.op = op
        self.tensors = tensors

    def dtype(self, name: str) -> None:
        dtype = self.tensors[name].dtype
        if dtype not in SUPPORTED:
            fail(self.op, f"{name} must be float16, bfloat16, float32 or float64 (got {name_of(dtype)})")

    def like(self, name: str, like: str) -> None:
        """Same device and dtype."""
        self.same_device(name, like)
        tensor, other = self.tensors[name], self.tensors[like]
        if tensor.dtype != other.dtype:
            fail(self.op, f"{name} must be {name_of(other.dtype)} like {like} (got {name_of(tensor.dtype)})")

    def same_device(self, name: str, like: str) -> None:
        device, expected = self.tensors[name].device, self.tensors[like].device
        if device != expected:
            fail(self.op, f"{name} must be on device {expected} like {like} (got {device})")

    def dtype_is(self, name: str, expected: torch.dtype, reason: str) -> None:
        dtype = self.tensors[name].dtype
        if dtype != expected:
            fail(self.op, f"{name} must be {name_of(expected)} {reason} (got {name_of(dtype)})")

    def feature_map(self, name: str) -> None:
        if self.tensors[name].dim() < 3:
            rule = "must have at least 3 dimensions, (batch, channels, *spatial)"
            fail(self.op, f"{name} {rule} (got shape {shape_of(self.tensors[name])})")

    def image(self, name: str) -> None:
        tensor = self.tensors[name]
        if tensor.dim() != 4:
            rule = "must have 4 dimensions, (batch, channels, height, width)"
            fail(self.op, f"{name} {rule} (got shape {shape_of(tensor)})")
        if tensor.shape[2] < 1 or tensor.shape[3] < 1:
            fail(self.op, f"{name} must have a height and a width of at least 1 (got shape {shape_of(tensor)})")

    def has_channels(self, name: str) -> None:
        if self.tensors[name].shape[1] < 1:
            fail(self.op, f"{name} must have at least 1 channel (got shape {shape_of(self.tensors[name])})")

    def has_positions(self, name: str) -> None:
        if math.prod(self.tensors[name].shape[2:]) < 1:
            fail(self.op, f"{name} must have at least 1 position (got shape {shape_of(self.tensors[name])})")

    def batch(self, name: str, like: str) -> None:
        got, expected = self.tensors[name].shape[0], self.tensors[like].shape[0]
        if got != expected:
            fail(self.op, f"{name} must have batch size {expected} like {like} (got {got})")

    def channels(self, name: str, like: str) -> None:
        got, expected = self.tensors[name].shape[1], self.tensors[like].shape[1]
        if got != expected:
            fail(self.op, f"{name} must have {expected} channels like {like} (got {got})")

    def spatial(self, name: str, like: str) -> None:
        got, expected = self.tensors[name], self.tensors[like]
        if got.shape[2:] != expected.shape[2:]:
            rule = f"must have spatial size {shape_of(expected, 2)} like {like}"
            fail(self.op, f"{name} {rule} (got {shape_of(got, 2)})")

    def shape_is(self, name: str, expected: tuple[int, ...]) -> None:
        if self.tensors[name].shape != expected:
            fail(self.op, f"{name} must have shape {list(expected)} (got {shape_of(self.tensors[name])})")

    def reach(self, name: str, like: str) -> None:
        """One channel for every position of the row and of the column of `like`."""
        got = self.tensors[name].shape[1]
        expected = self.tensors[like].shape[2] + self.tensors[like].shape[3] - 1
        if got != expected:
            fail(self.op, f"{name} must have H + W - 1 = {expected} channels (got {got})")

    def scale(self, scale: float) -> None:
        if not -math.inf < scale < math.inf:  # math.isfinite cannot be traced with a symbolic scale
            fail(self.op, f"scale must be finite (got {scale})")
