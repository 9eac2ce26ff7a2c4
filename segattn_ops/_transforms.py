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


@constant_in_graphs
def in_dual_level() -> bool:
    """Whether forward mode is on. Dynamo calls this function at compile time: a function that was compiled before calls
    the operators, which refuse tangents."""
    return forward_ad._current_level >= 0


def under_transform() -> bool:
    """Whether a transform of torch.func or forward mode is on."""
    return torch._C._are_functorch_transforms_active() or in_dual_level()


@constant_in_graphs
def under_derivative() -> bool:
    """Whether one other than vmap is on. Dynamo enters those in the function it traces, and guards torch.func's."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    vmap = torch._C._functorch.TransformType.Vmap
    return in_dual_level() or any(interpreter.key() != vmap for interpreter in stack)


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
