"""The published blocks, written from their papers' formulas in plain PyTorch with every attention map stored.

They stand in for repositories that are not packages, as the oracle of modules, checkpoints and conversion: module and
parameter names are those of the repositories, the code is not.
"""

from collections.abc import Callable

import torch
from torch import nn


def randomise(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """Gives every parameter and running statistic a value, zero-initialised gammas and norms included."""
    for name, parameter in module.named_parameters():
        if parameter.numel() <= 1:
            nn.init.constant_(parameter, 0.7)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=scale / parameter[0].numel() ** 0.5 * 2)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5) if "weight" in name else nn.init.normal_(parameter, std=0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.2)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module


def without_initialisation(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that ``make`` builds, of zeros: a ResNet's random initialisation takes ten times as long."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for value in module.state_dict().values():
        value.zero_()
    return module
