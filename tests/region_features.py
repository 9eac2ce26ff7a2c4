"""Features like those of trained networks: regions of the image with similar positions."""

import torch
from torch import Tensor

REGIONS = 5


def region_features(
    height: int, width: int, key_channels: int, value_channels: int, dtype: torch.dtype, energy: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key (1, key_channels, height, width) and value (1, value_channels, height, width), for a scale of 1.

    The image has five bands of about equal size. Each band has a mean, the mean of the means is not zero, and positions
    differ from their band's mean by noise. Energies within the first band are about ``energy``. Drawn in float64, so
    that every dtype has the same numbers, rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    positions = height * width
    region = torch.arange(positions) * REGIONS // positions
    means = normal(REGIONS, key_channels)
    means = 0.35 * key_channels**0.5 * means / means.norm(dim=1, keepdim=True) + 0.2
    key = means[region] + 0.15 * normal(positions, key_channels)
    query = (means[region] + 0.15 * normal(positions, key_channels)) * energy / means[0].square().sum()
    value = (1 + 0.5 * normal(REGIONS, value_channels))[region] + 0.3 * normal(positions, value_channels)
    return tuple(t.T.reshape(1, -1, height, width).to(dtype) for t in (query, key, value))
