"""Marks for torch.compile."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which imports torch._dynamo, 1.3 to 2.5 s, to set this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
