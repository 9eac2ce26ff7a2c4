"""Rows of the attention maps of a model, taken from the calls of the ops while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._autocast import autocast
from ..ops import (
    criss_cross_aggregation,
    criss_cross_attention,
    criss_cross_attention_map,
    position_attention,
    position_attention_map,
)
from ..ops._positions import flat_positions
from ..ops.criss_cross import criss_cross_weights, rows_of_product
from .points import Points, fractions, grid_positions
from .recorder import Recorder, Run, recording


def spread_pooled(maps: Tensor, sizes: Sequence[int], height: int, width: int) -> Tensor:
    """The weights of pyramid-pooled keys as weights of the positions that were pooled.

    A pooled value is the average over its cell, so a position's share is the key's weight over the number of positions
    in the cell, summed over the grids. For ANN this is exact, since its value is affine in the pooled features.

    Args:
        maps: (..., S), S the sum of the squared ``sizes``: what :func:`record_attention` returns for ANN's blocks.
        sizes: sides of the grids, as of :class:`segattn_ops.nn.PyramidPooling`; (1, 3, 6, 8) in ANN.
        height, width: of the feature map of the keys.

    Returns:
        (..., height, width), with the sums of ``maps`` over S.

    Raises:
        ValueError: if S does not belong to ``sizes``.
    """
    keys = sum(size * size for size in sizes)
    if maps.shape[-1:] != (keys,):
        raise ValueError(
            f"spread_pooled: maps must have {keys} keys for the grids {tuple(sizes)} (got shape {list(maps.shape)})"
        )
    spread = maps.new_zeros(*maps.shape[:-1], height, width)
    for part, size in zip(maps.split([size * size for size in sizes], dim=-1), sizes, strict=True):
        rows, columns = (_pooling_matrix(length, size).to(maps) for length in (height, width))
        spread = spread + rows.mT @ part.unflatten(-1, (size, size)) @ columns
    return spread


def _pooling_matrix(length: int, cells: int) -> Tensor:
    """(cells, length): the averages of adaptive_avg_pool1d."""
    pooled: Tensor = F.adaptive_avg_pool1d(torch.eye(length, dtype=torch.float64), cells).mT
    return pooled


class _PositionRecorder(Recorder):
    """Rows of the maps of positions, for some points."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = points
        self.maps: dict[str, Tensor] = {}
        self.handlers = {
            position_attention: self._position,
            criss_cross_attention: self._criss_cross,
            criss_cross_aggregation: self._aggregation,
        }

    def _position(
        self,
        run: Run,
        result: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float = 1.0,
        *,
        num_heads: int = 1,
        key_padding_mask: Tensor | None = None,
        return_logsumexp: bool = False,
    ) -> None:
        size = tuple(query.shape[2:])
        grid = size
        if len(size) == 1 and self.points.shape[1] > 1:
            grid = self._grid_of_tokens(run, size[0])
        positions = grid_positions(self.points, *grid)
        if grid != size:
            positions = flat_positions(positions, grid, query.device, "record_attention")[:, None]
        heads = None if num_heads == 1 else num_heads
        rows = position_attention_map(query, key, positions, scale, num_heads=heads, key_padding_mask=key_padding_mask)
        if grid != size and tuple(key.shape[2:]) == size:
            rows = rows.unflatten(-1, grid)
        self.maps[run.key] = rows

    def _grid_of_tokens(self, run: Run, count: int) -> tuple[int, ...]:
        """The spatial size of the innermost module input with so many positions."""
        dimensions = self.points.shape[1]
        for outer in reversed(self.running):
            for x in outer.inputs:
                if x.dim() == dimensions + 2 and x.shape[2:].numel() == count:
                    return tuple(x.shape[2:])
        raise ValueError(
            f"record_attention: {run.name} attends over {count} tokens, and no input of the modules around it has so "
            f"many positions in {dimensions} dimensions; give points as (fraction,) of the tokens"
        )

    def _criss_cross(
        self,
        run: Run,
        result: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float = 1.0,
        *,
        num_heads: int = 1,
        return_logsumexp: bool = False,
    ) -> None:
        if num_heads != 1:
            # The channels may be mixed between the passes, so that heads have no map of several.
            run.passes = []
            positions = grid_positions(self.points, *query.shape[2:])
            rows = criss_cross_attention_map(query, key, positions, scale=scale, num_heads=num_heads)
            self.maps[run.key] = rows
            return
        query, key = autocast(query, key)
        self._add_pass(run, criss_cross_weights(query, key, scale))

    def _aggregation(self, run: Run, result: Any, attention: Tensor, value: Tensor) -> None:
        self._add_pass(run, attention.to(torch.promote_types(attention.dtype, torch.float32)))

    def _add_pass(self, run: Run, weights: Tensor) -> None:
        run.passes = [*run.passes, weights] if run.is_one_map else [weights]
        positions = grid_positions(self.points, *weights.shape[2:])
        self.maps[run.key] = rows_of_product(run.passes, positions, "record_attention")


@contextmanager
def record_attention(
    model: nn.Module, points: Points, *, units: str = "fractions", size: Sequence[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Records rows of the attention maps of every position, criss-cross and softmax non-local attention of a model as
    it runs: of ``segattn_ops.nn``, of converted blocks, and of your own modules that call the ops. The model runs once,
    as it would without recording; compiled modules run eagerly.

    Args:
        model: any module.
        points: (y, x) as fractions of the image; (x,) or (t, y, x) for a model of sequences or volumes.
        units: of the points: "fractions", or "pixels", whole numbers from (0, 0), of which the centre is meant.
        size: (height, width) of the image whose pixels are counted, with units="pixels" alone. It may be larger or
            smaller than the model's input.

    Yields:
        A dictionary filled by each forward: the name of the innermost module that runs (its class for ``model`` itself)
        -> float32 (float64 for float64) maps. Every row sums to 1, or is 0 where all keys are padding. Further calls in
        one run of a module are under ``name#2`` and so on. For a module that runs twice it contains the last result.

        - (B, P, H, W) over the positions of the keys; H and W halved with ``sub_sample``.
        - (B, P, S) where the keys are S pooled ones (ANN, DRANet), in the order of pooling. :func:`spread_pooled`
          distributes ANN's over the positions.
        - Criss-cross attention: the map over the whole image of all passes of a ``RecurrentCrissCrossAttention``, and
          of successive runs of one module each of which takes the tensor that the one before returned, as the official
          code has it; not if that was written to in between.
        - Calls with ``num_heads`` other than 1: (B, num_heads, P, H, W) or (B, num_heads, P, S). Passes of criss-cross
          attention with heads are not joined: the channels may be mixed in between.

    Raises:
        TypeError: for a model that is not a module.
        ValueError: for points outside the image or of other dimensions than a feature map; and on leaving, if no
            attention was seen. Not seen are blocks that were not converted or whose original's forward runs, modes
            without a softmax, scripted and exported models, CUDA graphs, and ``DataParallel`` on several devices
            (record its ``module``).

    Warns:
        UserWarning: on leaving, if the original's forward of a converted block ran beside attention that was seen.
    """
    recorder = _PositionRecorder(fractions(points, units=units, size=size))
    with recording(model, recorder):
        yield recorder.maps
    recorder.check_recorded("record_attention", model, "position, criss-cross or softmax non-local attention")


@torch.no_grad()
def attention_maps(
    module: nn.Module,
    x: Tensor | Sequence[Tensor],
    points: Points,
    *,
    units: str = "fractions",
    size: Sequence[int] | None = None,
) -> Tensor:
    """The rows of one module's attention map for the points. The module runs once; its buffers do not change.

    Args:
        module: with one map: an attention block of ``segattn_ops.nn`` or of a converted model, or your own.
        x: the module's input, or a tuple of its inputs.
        points, units, size: as :func:`record_attention`.

    Returns:
        (B, P, H, W) or (B, P, S), with heads (B, num_heads, P, ...), as :func:`record_attention`.

    Raises:
        TypeError: for a module without such an attention map.
        ValueError: for a module with several, or points outside the image.
    """
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    recorder = _PositionRecorder(fractions(points, units=units, size=size))
    with recording(module, recorder):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        torch.func.functional_call(module, buffers, inputs)
    if not recorder.recorded:
        raise TypeError(f"attention_maps: {type(module).__name__} has no map of positions to look at")
    if len(recorder.maps) > 1:
        raise ValueError(
            f"attention_maps: {type(module).__name__} has several maps ({', '.join(recorder.maps)}); "
            "record_attention returns all"
        )
    return next(iter(recorder.maps.values()))
