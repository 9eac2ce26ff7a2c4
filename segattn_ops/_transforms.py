"""torch.func and forward mode, which the operators' own autograd rules do not have.

torch.func cannot transform the rules that ``torch.library`` makes, and those rules drop tangents without a word. Under
either, a call goes to a twin of the operator made of ``torch.autograd.Function``, which ``ops/_register.py`` builds.
"""

from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

from ._dynamo import constant_in_graphs

# Operator namespace -> a function for each operator, by its name. Filled by ops/_register.py.
FUNCTIONS: dict[str, SimpleNamespace] = {}


def in_dual_level() -> bool:
    """Whether forward mode is on. Dynamo guards the level that it reads. Inside a jvp that it traces, the level is not
    the one at the function's entry."""
    if torch.compiler.is_dynamo_compiling() and _under_jvp():
        return True
    return forward_ad._current_level >= 0


@constant_in_graphs
def _under_jvp() -> bool:
    return torch._C._functorch.TransformType.Jvp in _transforms()


@constant_in_graphs
def _only_functionalized() -> bool:
    return all(transform == torch._C._functorch.TransformType.Functionalize for transform in _transforms())


def _transforms() -> list[object]:
    """The kinds of torch.func's transforms that are on, the outermost first."""
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or []]


def under_transform() -> bool:
    """Whether a transform of torch.func is on, other than functionalize, which takes the operators, or forward mode."""
    return (torch._C._are_functorch_transforms_active() and not _only_functionalized()) or in_dual_level()


@constant_in_graphs
def under_derivative() -> bool:
    """Whether one other than vmap is on. Dynamo enters those in the function it traces, and guards torch.func's."""
    vmap = torch._C._functorch.TransformType.Vmap
    return forward_ad._current_level >= 0 or any(transform != vmap for transform in _transforms())


def has_tangent(*arguments: object) -> bool:
    """Whether a forward-mode derivative of a call with these arguments may be under way. The tangent of a tensor that a
    transform of torch.func wraps may be that of an outer level, which cannot be queried: such a tensor counts."""
    return in_dual_level() and (
        torch.compiler.is_compiling()
        or any(
            isinstance(argument, torch.Tensor)
            and (
                torch._C._functorch.is_functorch_wrapped_tensor(argument)
                or forward_ad.unpack_dual(argument).tangent is not None
            )
            for argument in arguments
        )
    )
