"""Token layouts passed as feature maps: position attention accepts them and computes something else."""

import warnings

import torch
from torch import Tensor

_HEAD_CHANNELS = range(16, 257, 8)
_MOST_HEADS = 64
_TALLEST_IMAGE = 3  # height by width; pictures of pedestrians have 3

_warned = False


def warn_if_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Warns, once in a process, if the tensors are much more likely (batch, heads, tokens, channels) than feature maps:
    4-D, equal in the last dimension, which is a common number of channels of a head, with few of what would be
    channels, and more than three times as high as wide."""
    global _warned
    sizes = query.shape
    if len(sizes) != 4 or sizes[2] <= _TALLEST_IMAGE * sizes[3]:  # of nearly all feature maps
        return
    _, heads, _, channels = sizes
    if _warned or heads > _MOST_HEADS or channels not in _HEAD_CHANNELS or key.shape[1:] != value.shape[1:]:
        return
    if key.dim() != 4 or key.shape[3] != channels or key.shape[2] <= _TALLEST_IMAGE * channels:
        return
    if type(query) not in (Tensor, torch.nn.Parameter):  # fake tensors, among others
        return
    _warned = True
    warnings.warn(
        f"position_attention: the query's shape {list(sizes)} looks like (batch, heads, tokens, channels), but is read "
        "as (batch, channels, height, width): every position of the last two dimensions attends to every other. "
        "For heads of tokens use torch.nn.functional.scaled_dot_product_attention, or fold the heads into the batch "
        "and put the channels first: query.flatten(0, 1).mT. If these are feature maps, silence this warning with "
        'warnings.filterwarnings("ignore", message="position_attention: the query\'s shape")',
        UserWarning,
        stacklevel=3,
    )
