"""Rows of the attention maps of a model, taken from the calls of the ops while it runs."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._autocast import autocast
from ..conversion.block import FusedBlock
from ..nn import RecurrentCrissCrossAttention
from ..ops import (
    criss_cross_aggregation,
    criss_cross_attention,
    criss_cross_attention_map,
    position_attention,
    position_attention_map,
)
from ..ops._positions import flat_positions
from ..ops.criss_cross import criss_cross_weights, rows_of_product

Points = Sequence[tuple[float, ...]] | Tensor


def fractions(points: Points, dimensions: int | None = None) -> Tensor:
    """(P, D) float64 on the CPU, D = ``dimensions`` if that is given. Raises as :func:`grid_positions`."""
    try:
        values = torch.as_tensor(points, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"visualize: points must be a list of (y, x) pairs (got {points!r})") from error
    if values.dim() in (1, 2) and len(values) == 0:
        values = values.reshape(0, 2 if dimensions is None else dimensions)
    if values.dim() != 2 or values.shape[1] != (values.shape[1] if dimensions is None else dimensions):
        expected = {1: "(x,)", 2: "(y, x)", 3: "(t, y, x)"}.get(dimensions or 2, f"{dimensions} fractions each")
        raise ValueError(
            f"visualize: points must be a list of {expected} for a feature map of {dimensions or 2} dimensions "
            f"(got shape {list(values.shape)})"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            "visualize: points must be fractions of the image in [0, 1]: divide pixels by its height and width "
            f"(got {values.tolist()})"
        )
    return values


def grid_positions(points: Points, *size: int) -> Tensor:
    """Points as fractions of an image -> (P, D) integer positions in its feature map.

    Args:
        points: (y, x) for each point; (x,) or (t, y, x) for feature maps of one or three dimensions. May be empty.
        size: of the feature map: height, width.

    Raises:
        TypeError: for what is not a list of numbers.
        ValueError: for points of another length than ``size``, or outside [0, 1].
    """
    values = fractions(points, len(size))
    sizes = torch.tensor(size)
    return torch.minimum((values * sizes).long(), sizes - 1)


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


@dataclass
class _Run:
    """One run of a module, from its pre-hook to its forward hook."""

    name: str
    module: nn.Module
    inputs: list[Tensor]
    calls: int = 0  # of ops with a map
    passes: list[Tensor] = field(default_factory=list)  # weights of the criss-cross attentions that form one map
    outputs: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list)  # with their versions

    @property
    def is_one_map(self) -> bool:
        """Whether all criss-cross calls of the run form one map."""
        return self.calls <= 1 or isinstance(self.module, RecurrentCrissCrossAttention)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _version(tensor: Tensor) -> int:
    """Counts writes in place, which are not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class _Recorder(TorchFunctionMode):
    """Sees every call of the public ops. Hooks keep the stack of the modules that run, for the names."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = fractions(points)
        self.maps: dict[str, Tensor] = {}
        self.recorded = False
        self.ran_elsewhere = False
        self.ran_originals: list[str] = []  # converted blocks whose original's forward ran
        self._thread = threading.get_ident()  # a mode does not see calls of other threads
        self._running: list[_Run] = []
        self._finished: dict[str, _Run] = {}
        self._handlers: dict[Any, Callable[..., None]] = {
            position_attention: self._position,
            criss_cross_attention: self._criss_cross,
            criss_cross_aggregation: self._aggregation,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        handler = self._handlers.get(func)
        if handler is not None and self._running:
            run = self._running[-1]
            run.calls += 1
            with torch.no_grad():
                handler(run, *args, **(kwargs or {}))
            self.recorded = True
        return result

    def enter(self, name: str, module: nn.Module, inputs: Iterable[Any]) -> None:
        if threading.get_ident() != self._thread:
            self.ran_elsewhere = True
            return
        if isinstance(module, FusedBlock) and module._fused_needs_original():
            self.ran_originals.append(name)
        run = _Run(name, module, _tensors(inputs))
        before = self._finished.pop(name, None)
        if before is not None and before.is_one_map:
            returned = [(output(), version) for output, version in before.outputs]
            if any(x is y and _version(x) == version for x in run.inputs for y, version in returned):
                run.passes = before.passes
        self._running.append(run)

    def leave(self, module: nn.Module, output: Any) -> None:
        if threading.get_ident() != self._thread or not any(run.module is module for run in self._running):
            return
        while (run := self._running.pop()).module is not module:
            pass
        if run.passes:
            outputs = _tensors(output if isinstance(output, tuple | list) else (output,))
            run.outputs = [(weakref.ref(t), _version(t)) for t in outputs]
            self._finished[run.name] = run

    def _store(self, run: _Run, rows: Tensor) -> None:
        first = run.calls == 1 or (bool(run.passes) and run.is_one_map)
        self.maps[run.name if first else f"{run.name}#{run.calls}"] = rows

    def _position(
        self,
        run: _Run,
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
        self._store(run, rows)

    def _grid_of_tokens(self, run: _Run, count: int) -> tuple[int, ...]:
        """The spatial size of the innermost module input with so many positions."""
        dimensions = self.points.shape[1]
        for outer in reversed(self._running):
            for x in outer.inputs:
                if x.dim() == dimensions + 2 and x.shape[2:].numel() == count:
                    return tuple(x.shape[2:])
        raise ValueError(
            f"record_attention: {run.name} attends over {count} tokens, and no input of the modules around it has so "
            f"many positions in {dimensions} dimensions; give points as (fraction,) of the tokens"
        )

    def _criss_cross(
        self,
        run: _Run,
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
            self._store(run, criss_cross_attention_map(query, key, positions, scale=scale, num_heads=num_heads))
            return
        query, key = autocast(query, key)
        self._add_pass(run, criss_cross_weights(query, key, scale))

    def _aggregation(self, run: _Run, attention: Tensor, value: Tensor) -> None:
        self._add_pass(run, attention.to(torch.promote_types(attention.dtype, torch.float32)))

    def _add_pass(self, run: _Run, weights: Tensor) -> None:
        run.passes = [*run.passes, weights] if run.is_one_map else [weights]
        positions = grid_positions(self.points, *weights.shape[2:])
        self._store(run, rows_of_product(run.passes, positions, "record_attention"))


@contextmanager
def _recording(model: nn.Module, points: Points) -> Iterator[_Recorder]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"visualize: model must be a torch.nn.Module (got {type(model).__name__})")
    recorder = _Recorder(points)
    handles = []

    def add_hooks(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.enter(name, module, (*args, *kwargs.values()))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorder.leave(module, output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))

    try:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                add_hooks(name or type(module).__name__, module)
        # A mode does not see the calls of a compiled region.
        with torch.compiler.set_stance("force_eager"), recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_attention(model: nn.Module, points: Points) -> Iterator[dict[str, Tensor]]:
    """Records rows of the attention maps of every position, criss-cross and softmax non-local attention of a model as
    it runs: of ``segattn_ops.nn``, of converted blocks, and of your own modules that call the ops. The model runs once,
    as it would without recording; compiled modules run eagerly.

    Args:
        model: any module.
        points: (y, x) as fractions of the image; (x,) or (t, y, x) for a model of sequences or volumes.

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
    with _recording(model, points) as recorder:
        yield recorder.maps
    originals = (
        f"{', '.join(dict.fromkeys(recorder.ran_originals))} is converted, but its original's forward ran, because of "
        "dropout in training, a hook on a child or an attribute that has changed since the conversion"
    )
    if recorder.recorded and recorder.ran_originals:
        warnings.warn(f"record_attention: there is a map missing: {originals}", UserWarning, stacklevel=3)
    if not recorder.recorded:
        name = type(model).__name__
        if recorder.ran_elsewhere:
            reason = f"{name} ran in other threads, as DataParallel on several devices does: record its module"
        elif recorder.ran_originals:
            reason = originals
        else:
            reason = (
                f"{name} called no position, criss-cross or softmax non-local attention of segattn_ops. Blocks of "
                "other code are seen once segattn_ops.convert has replaced them; scripted and exported models and CUDA "
                "graphs are not seen"
            )
        raise ValueError(f"record_attention: {reason}")


@torch.no_grad()
def attention_maps(module: nn.Module, x: Tensor | Sequence[Tensor], points: Points) -> Tensor:
    """The rows of one module's attention map for the points. The module runs once; its buffers do not change.

    Args:
        module: with one map: an attention block of ``segattn_ops.nn`` or of a converted model, or your own.
        x: the module's input, or a tuple of its inputs.
        points: (y, x) as fractions of the image.

    Returns:
        (B, P, H, W) or (B, P, S), with heads (B, num_heads, P, ...), as :func:`record_attention`.

    Raises:
        TypeError: for a module without such an attention map.
        ValueError: for a module with several, or points outside the image.
    """
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    with _recording(module, points) as recorder:
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
