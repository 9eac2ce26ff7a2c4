"""Attention maps over images, for chosen points of an image.

The fused ops do not store the attention map. Only its rows for the chosen points are computed::

    points = [(0.4, 0.55), (0.8, 0.2)]            # (y, x) as fractions of the image
    with record_attention(model, points) as maps:
        model(batch)
    draw_attention("photograph.jpg", {name: m[0] for name, m in maps.items()}, points, "attention.png")
"""

from .draw import draw_attention, overlay
from .record import attention_maps, grid_positions, record_attention, spread_pooled

__all__ = [
    "attention_maps",
    "draw_attention",
    "grid_positions",
    "overlay",
    "record_attention",
    "spread_pooled",
]
