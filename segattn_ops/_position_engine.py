"""Which CUDA kernels serve position attention: those that csrc/cuda/position/engine.cu chooses, or the engine in the
environment variable SEGATTN_CUDA_POSITION, for measurements and for finding faults."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ._ops import ops

VARIABLE = "SEGATTN_CUDA_POSITION"
ENGINES = ("auto", "wgmma", "mma", "simt")

_set: dict[str, str] = {}  # by operator namespace; the kernels start with "auto"


def _validated(name: str, given: str) -> str:
    if given not in ENGINES:
        raise ValueError(f"{name} must be one of {list(ENGINES)} (got {given!r})")
    return given


_FROM_ENVIRONMENT = _validated(VARIABLE, os.environ.get(VARIABLE, "auto"))


def set_position_engine(name: str, namespace: str = ops.name) -> None:
    """Sets the engine of all later calls of position attention in this process.

    Args:
        name: "auto" chooses the fastest engine that serves the device, the dtype and the number of key channels. The
            others force one: "wgmma", "mma" or "simt". "wgmma" has no kernels for float32, which "mma" then serves;
            neither has any for float64, which "simt" serves. Where a forced engine cannot serve for another reason,
            the call raises a RuntimeError.
        namespace: of the operators.

    Raises:
        ValueError: for another name.
    """
    _validated("set_position_engine: name", name)
    getattr(torch.ops, namespace)._set_position_engine(name)
    _set[namespace] = name


def follow_environment(namespace: str) -> None:
    """Sets the engine of the environment variable."""
    if _FROM_ENVIRONMENT != "auto":
        set_position_engine(_FROM_ENVIRONMENT, namespace)


def position_engine_setting(namespace: str = ops.name) -> str:
    """The name that was set last; "auto" before."""
    return _set.get(namespace, "auto")


@contextmanager
def forced_position_engine(name: str, namespace: str = ops.name) -> Iterator[None]:
    """Sets the engine within a `with` block, in all threads."""
    before = position_engine_setting(namespace)
    set_position_engine(name, namespace)
    try:
        yield
    finally:
        set_position_engine(before, namespace)
