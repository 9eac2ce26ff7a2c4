"""Forward-mode differentiation, which the fused operators do not have: torch.library drops tangents without a word."""

import torch
from torch.autograd import forward_ad

from ._dynamo import constant_in_graphs


@constant_in_graphs
def in_dual_level() -> bool:
    """Whether forward mode is on. Dynamo calls this function at compile time: a function that was compiled before calls
    the operators, which refuse tangents."""
    return forward_ad._current_level >= 0


def under_transform() -> bool:
    """Whether a transform of torch.func or forward mode is on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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
