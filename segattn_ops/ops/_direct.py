"""The operators past the dispatcher's Autograd key, for calls that nothing transforms, traces or compiles.

The rules that torch.library registers are Python kernels of that key. The dispatcher enters them without gradients too.
Here the same rules are called from Python, and the dispatcher starts below that key, as it does inside those kernels:
tensor subclasses, dispatch modes and FLOP counters see the same operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _any_requires_grad, _AutoDispatchBelowAutograd

from .._out_of_memory import out_of_memory
from .._transforms import under_transform


def _below_autograd(overload: Callable[..., Any], *arguments: Any) -> Any:
    try:
        with _AutoDispatchBelowAutograd():
            return overload(*arguments)
    except RuntimeError as error:
        if (replacement := out_of_memory(error)) is not None:
            raise replacement from error
        raise


def direct_forward(
    overload: Callable[..., Any],
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """
    Args:
        overload: the operator.
        setup_context, backward: its rule, as ``torch.library.register_autograd`` takes it.

    Returns:
        a function of all the operator's arguments.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = _below_autograd(overload, *arguments)
        setup_context(ctx, arguments, results)
        return results

    name = overload.__name__.split(".")[0]
    rules = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), rules)  # autograd's node is named <name>Backward

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*arguments):
            return function.apply(*arguments)
        return _below_autograd(overload, *arguments)

    return call


def direct_backward(overload: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """The operator `*_backward`, as a function. A backward pass may be transformed, which calls the operator's `twin`
    for transforms, or itself be differentiated, by the operator's rule."""

    def call(*arguments: Any) -> Any:
        if under_transform():
            return twin(*arguments)
        # Dynamo of torch 2.11 cannot trace the dispatcher's guard, which compiled autograd would meet here.
        if torch.compiler.is_dynamo_compiling() or (torch.is_grad_enabled() and _any_requires_grad(*arguments)):
            return overload(*arguments)
        return _below_autograd(overload, *arguments)

    return call
