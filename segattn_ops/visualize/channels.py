"""The maps of channel attention of a model, taken from the calls of the ops while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import channel_apply, channel_attention, channel_energy, residual_channel_attention
from .recorder import Recorder, Run, recording


class ChannelMaps(NamedTuple):
    """Channel attention of a batch of images, or of one of them.

    Attributes:
        weights: (B, C, K), the channel map: row c is the share of every channel k in what channel c gets. Rows sum to
            1. float32 (float64 for float64).
        response: (B, C, *T), what the op returned: for DANet's module its output, gamma times the attention plus the
            input. In its dtype, but float32 for 16-bit ones.
    """

    weights: Tensor
    response: Tensor

    def image(self, index: int) -> ChannelMaps:
        """The maps of one image of the batch: (C, K) and (C, *T)."""
        return ChannelMaps(self.weights[index], self.response[index])


class _ChannelRecorder(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[str, ChannelMaps] = {}
        self.handlers = {
            channel_attention: self._attention,
            residual_channel_attention: self._residual,
            channel_apply: self._apply,
        }

    def _attention(
        self, run: Run, result: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float = -1.0
    ) -> None:
        self._apply(run, result, channel_energy(query, None if key is query else key), value, scale)

    def _residual(self, run: Run, result: Tensor, input: Tensor, gamma: Tensor | float, scale: float = -1.0) -> None:
        self._apply(run, result, channel_energy(input), input, scale)

    def _apply(
        self, run: Run, result: Tensor, energy: Tensor, value: Tensor, scale: float = -1.0, gamma: object = None
    ) -> None:
        dtype = torch.promote_types(result.dtype, torch.float32)
        # A copy: what follows the op may overwrite its result, as nn.ReLU(inplace=True) does.
        response = result.detach().to(dtype, copy=True)
        self.maps[run.key] = ChannelMaps((scale * energy).softmax(-1).to(dtype), response)


@contextmanager
def record_channel_attention(model: nn.Module) -> Iterator[dict[str, ChannelMaps]]:
    """Records the channel attention of a model as it runs: of ``segattn_ops.nn``, of converted blocks, and of your own
    modules that call ``channel_attention``, ``residual_channel_attention`` or ``segattn_ops.ops.channel_apply``. The
    model runs once, as it would without recording; compiled modules run eagerly. The energies are computed once more,
    for the map.

    Args:
        model: any module.

    Yields:
        A dictionary filled by each forward: the name of the innermost module that runs (its class for ``model`` itself)
        -> :class:`ChannelMaps`. Further calls in one run of a module are under ``name#2`` and so on. For a module that
        runs twice it contains the last result.

    Raises:
        TypeError: for a model that is not a module.
        ValueError: on leaving, if no channel attention was seen; :func:`record_attention` says what is not seen.

    Warns:
        UserWarning: on leaving, if the original's forward of a converted block ran beside attention that was seen.
    """
    recorder = _ChannelRecorder()
    with recording(model, recorder):
        yield recorder.maps
    recorder.check_recorded("record_channel_attention", model, "channel attention")
