"""Attention maps over images, for chosen points of an image, and the maps of channel attention.

The fused ops do not store the attention map. Only its rows for the chosen points are computed::

    points = [(0.4, 0.55), (0.8, 0.2)]            # (y, x) as fractions of the image
    with record_attention(model, points) as maps:
        model(batch)
    draw_attention("photograph.jpg", {name: m[0] for name, m in maps.items()}, points, "attention.png")

Points in pixels are given with ``units="pixels"``. Channel attention has one map for the whole image::

    with record_channel_attention(model) as maps:
        model(batch)
    draw_channel_attention("photograph.jpg", maps["classifier.sc"].image(0), path="channels.png")
"""

from .channels import ChannelMaps, record_channel_attention
from .draw import draw_attention, draw_channel_attention, overlay
from .points import grid_positions
from .record import attention_maps, record_attention, spread_pooled

__all__ = [
    "ChannelMaps",
    "attention_maps",
    "draw_attention",
    "draw_channel_attention",
    "grid_positions",
    "overlay",
    "record_attention",
    "record_channel_attention",
    "spread_pooled",
]
