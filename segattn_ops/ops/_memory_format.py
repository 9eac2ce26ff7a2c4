"""channels_last: results and gradients have the memory format of the inputs, as those of convolutions."""

import torch
from torch import Tensor


def like_inputs(result: Tensor, *inputs: Tensor) -> Tensor:
    """The contiguous `result`, a feature map, in channels_last if one of the feature maps has that format.

    A copy, also where the two formats differ in the strides of sizes of 1 alone: PyTorch's next op goes by those. Made
    by permutations, because vmap has no rule for a copy in another memory format."""
    for tensor in inputs:
        if tensor.stride(1) == 1 and is_channels_last(tensor) and 4 <= result.dim() <= 5:
            return result.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    return result


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are those of channels_last or channels_last_3d, by the rules with which PyTorch suggests a
    memory format."""
    if not 4 <= tensor.dim() <= 5:
        return False
    least = 1
    for d in (1, *range(tensor.dim() - 1, 1, -1), 0):
        size, stride = tensor.shape[d], tensor.stride(d)
        if size == 0 or stride < least or (d == 0 and least == tensor.stride(1)):
            return False
        least = stride * size
    return True
