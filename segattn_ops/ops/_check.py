"""The rules for the arguments of every op, for the reference and for fake tensors, which never reach the C++ checks.

Twin of csrc/checks/check.h, as the check functions of position.py, channel.py and criss_cross.py are of the other
headers there: same names, same order of rules, same messages. tests/ops/test_errors.py compares the two.
"""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from .._transforms import has_tangent

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The dtypes that a message names, as `name_of` in check.h
NAMES = (
    *("float16", "bfloat16", "float32", "float64"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool"),
    *("complex32", "complex64", "complex128"),
    *("float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz"),
)


class Argument(NamedTuple):
    name: str
    tensor: Tensor


def fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"{op}: {message}")


def check_tensors(op: str, **arguments: object) -> None:
    """For the public functions, which use the tensors before an operator's schema rejects what is not one.

    Raises:
        TypeError: if an argument is not a tensor.
    """
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor (got {type(argument).__name__})")


def number(op: str, name: str, value: object) -> float:
    """`value` as the operators take it. For the public functions: an operator converts a tensor to a number and drops
    its gradient.

    Raises:
        TypeError: if the value is not a number, or a tensor that is to be differentiated.
        ValueError: for an integer beyond float64.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        if value.requires_grad or has_tangent(value):
            raise TypeError(
                f"{op}: {name} must be a number (got a tensor that requires a gradient, and {name} is not "
                "differentiable; multiply the first argument by it instead)"
            )
        return float(value)
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return cast(float, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a number (got {got})")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{op}: {name} must be finite (got an integer that no float64 holds)") from error


def name_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if name in NAMES else "another dtype"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others: the dtype of accumulation and of logsumexp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(tensor: Tensor, first: int = 0) -> str:
    """ "[97, 97]": the sizes from dimension `first` on."""
    return str(list(tensor.shape[first:]))


def check_dtype(op: str, argument: Argument) -> None:
    dtype = argument.tensor.dtype
    if dtype not in SUPPORTED:
        fail(op, f"{argument.name} must be float16, bfloat16, float32 or float64 (got {name_of(dtype)})")


def check_same_device(op: str, argument: Argument, like: Argument) -> None:
    got, expected = argument.tensor.device, like.tensor.device
    if got != expected:
        fail(op, f"{argument.name} must be on device {expected} like {like.name} (got {got})")


def check_dtype_is(op: str, argument: Argument, expected: torch.dtype, reason: str) -> None:
    got = argument.tensor.dtype
    if got != expected:
        fail(op, f"{argument.name} must be {name_of(expected)} {reason} (got {name_of(got)})")


def check_like(op: str, argument: Argument, like: Argument) -> None:
    """Same device and dtype."""
    check_same_device(op, argument, like)
    got, expected = argument.tensor.dtype, like.tensor.dtype
    if got != expected:
        fail(op, f"{argument.name} must be {name_of(expected)} like {like.name} (got {name_of(got)})")


def check_feature_map(op: str, argument: Argument) -> None:
    """(batch, channels, *spatial) with at least one spatial dimension."""
    if argument.tensor.dim() < 3:
        rule = "must have at least 3 dimensions, (batch, channels, *spatial)"
        fail(op, f"{argument.name} {rule} (got shape {shape_of(argument.tensor)})")


def check_image(op: str, argument: Argument, may_be_empty: bool = False) -> None:
    """(batch, channels, height, width), neither height nor width zero, unless it may be empty."""
    tensor = argument.tensor
    if tensor.dim() != 4:
        rule = "must have 4 dimensions, (batch, channels, height, width)"
        fail(op, f"{argument.name} {rule} (got shape {shape_of(tensor)})")
    if not may_be_empty and (tensor.shape[2] < 1 or tensor.shape[3] < 1):
        fail(op, f"{argument.name} must have a height and a width of at least 1 (got shape {shape_of(tensor)})")


def check_has_channels(op: str, argument: Argument) -> None:
    if argument.tensor.shape[1] < 1:
        fail(op, f"{argument.name} must have at least 1 channel (got shape {shape_of(argument.tensor)})")


def check_has_positions(op: str, argument: Argument) -> None:
    if math.prod(argument.tensor.shape[2:]) < 1:
        fail(op, f"{argument.name} must have at least 1 position (got shape {shape_of(argument.tensor)})")


def check_batch(op: str, argument: Argument, like: Argument) -> None:
    got, expected = argument.tensor.shape[0], like.tensor.shape[0]
    if got != expected:
        fail(op, f"{argument.name} must have batch size {expected} like {like.name} (got {got})")


def check_channels(op: str, argument: Argument, like: Argument) -> None:
    got, expected = argument.tensor.shape[1], like.tensor.shape[1]
    if got != expected:
        fail(op, f"{argument.name} must have {expected} channels like {like.name} (got {got})")


def check_spatial(op: str, argument: Argument, like: Argument) -> None:
    got, expected = argument.tensor, like.tensor
    if got.shape[2:] != expected.shape[2:]:
        rule = f"must have spatial size {shape_of(expected, 2)} like {like.name}"
        fail(op, f"{argument.name} {rule} (got {shape_of(got, 2)})")


def check_shape(op: str, argument: Argument, like: Argument) -> None:
    """The shape must be that of `like`, in every dimension."""
    got, expected = argument.tensor, like.tensor
    if got.shape != expected.shape:
        fail(op, f"{argument.name} must have shape {shape_of(expected)} like {like.name} (got {shape_of(got)})")


def check_shape_is(op: str, argument: Argument, expected: Sequence[int]) -> None:
    if argument.tensor.shape != tuple(expected):
        fail(op, f"{argument.name} must have shape {list(expected)} (got {shape_of(argument.tensor)})")


def check_needs_input_grad(op: str, needs_input_grad: Sequence[bool], gradients: int) -> None:
    """One entry for each gradient of the backward `op`."""
    if len(needs_input_grad) != gradients:
        fail(op, f"needs_input_grad must have {gradients} entries (got {len(needs_input_grad)})")


def check_scale(op: str, scale: float) -> None:
    if not -math.inf < scale < math.inf:  # math.isfinite cannot be traced with a symbolic scale
        fail(op, f"scale must be finite (got {scale})")
