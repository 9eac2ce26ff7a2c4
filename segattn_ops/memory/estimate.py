"""The memory of a network's training step or inference, counted on fake tensors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from .._backend import LIBRARIES
from .._library import HOW_TO_BUILD
from .._selection import use_backend
from ..nn._checks import positive_int
from .count import GRADIENTS, WEIGHTS, WORKSPACE, Count
from .iteration import (
    ATTENTION,
    INPUT,
    OPTIMIZER,
    OUTPUTS,
    Attention,
    Loss,
    default_loss,
    inference,
    prepare,
    training,
)
from .iteration import OPTIMIZERS as _OPTIMIZERS

GIB = 2**30
MODELS = tuple(
    f"{name}_{resnet}" for name in ("danet", "ccnet", "ann", "nonlocal", "dfn") for resnet in ("resnet50", "resnet101")
)
OPTIMIZERS = tuple(_OPTIMIZERS)
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, INPUT, ATTENTION, OUTPUTS, WORKSPACE)  # beside the network's own
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**34  # pixels of a batch; PyTorch counts the bytes of a tensor in 63 bits


@dataclass(frozen=True)
class Estimate:
    """The memory of a network at its peak, in bytes.

    Attributes:
        model, height, width, batch, dtype, train, fused, optimizer: what was counted; the optimizer is None for
            inference.
        parts: bytes at the peak, by what they belong to:

            - weights: parameters and buffers; under autocast also their copies in 16 bits,
            - gradients: of the parameters,
            - optimizer: its state,
            - input: the images and, for training, the labels,
            - backbone, classifier, aux_classifier (the names of the network's children): the activations that they
              create, without those of attention,
            - attention: what the ops of this package create: results and what their backward pass needs; with
              ``fused=False`` attention maps among them,
            - outputs and loss: logits at the size of the image, and what the loss creates,
            - workspace: gradients of activations, and other temporary tensors of the backward pass and the optimizer.
    """

    model: str
    height: int
    width: int
    batch: int
    dtype: str
    train: bool
    fused: bool
    optimizer: str | None
    parts: dict[str, int]
    # Bytes at the peak with one image, None where the network does not run on one. For others: bytes after every
    # allocation with `_base` images, and how much more with one image more.
    _one: int | None = field(repr=False, compare=False)
    _base: int = field(repr=False, compare=False)
    _bytes: np.ndarray = field(repr=False, compare=False)
    _growth: np.ndarray = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """Bytes at the peak: the sum of the parts. What ``torch.cuda.max_memory_allocated()`` counts."""
        return sum(self.parts.values())

    def at_batch(self, batch: int) -> int:
        """Bytes at the peak with another batch. Every tensor has a size of the form a + b * batch, and the same tensors
        exist in every batch of at least two: the peak is the largest of these sums. One image is counted by itself.

        Raises:
            TypeError, ValueError: for a batch that is not a whole number of at least 1; for one image, if the network
                does not train on one.
        """
        if positive_int("Estimate.at_batch", "batch", batch) > 1:
            return int((self._bytes + (batch - self._base) * self._growth).max())
        if self._one is None:
            raise ValueError(f"Estimate.at_batch: {self.model} does not run on one image of this size")
        return self._one

    def largest_batch(self, budget: int) -> int:
        """The largest batch whose peak is at most ``budget`` bytes; 0 if none fits.

        Args:
            budget: bytes, less than the device has: docs/memory.md says what is not counted.
        """
        growing = self._growth > 0
        more = int(((budget - self._bytes[growing]) // self._growth[growing]).min())
        if self._base + more >= 2 and self._bytes[~growing].max(initial=0) <= budget:
            return self._base + more
        return int(self._one is not None and self._one <= budget)

    def as_dict(self) -> dict[str, Any]:
        """What was counted, the parts and the total, for JSON."""
        names = ("model", "height", "width", "batch", "dtype", "train", "fused", "optimizer", "parts", "total")
        return {name: getattr(self, name) for name in names}


def estimate(
    model: str | nn.Module,
    height: int,
    width: int,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    train: bool = True,
    fused: bool = True,
    optimizer: str = "sgd",
    num_classes: int = 19,
    loss: Loss | None = None,
    **options: Any,
) -> Estimate:
    """The memory that training or inference of a network takes at its peak, by parts, without running it.

    The network runs on PyTorch's fake tensors, which have sizes and no values, forward, backward and through a step of
    the optimizer. Every tensor that an operator creates counts from then until nothing refers to it, so that the
    figures are those of PyTorch's own bookkeeping rather than of a formula. It takes a second or two, and no memory
    beyond the network's weights.

    Not counted are what a kernel allocates inside one operator (cuDNN's workspaces, the partial results of this
    package's kernels), the allocator's unused blocks, and the CUDA context.

    Args:
        model: a builder of :mod:`segattn_ops.models` by name (``MODELS``), or a module, which is copied: its weights
            stay as they are. It takes (batch, 3, height, width).
        height, width: of the image.
        batch: images.
        dtype: float32, or bfloat16 or float16 for autocast: weights, gradients and the optimizer's state stay in the
            weights' dtype.
        train: a training step; False for inference.
        fused: False counts attention as the papers' code computes it, with attention maps. Of a module, that of
            ``segattn_ops`` alone.
        optimizer: "sgd" (with momentum), "adam" or "adamw", with weight decay. Not used for inference.
        num_classes: of the logits, for a model given by name.
        loss: outputs and labels (batch, height, width) to a scalar; the sum of the outputs' cross-entropies if None.
        options: of the builder: ``aux_loss=True``, ``output_stride=16``, ...

    Returns:
        Estimate: bytes by part, the total, and the largest batch of a budget.

    Raises:
        TypeError: for arguments of another type, and for options that the builder does not have.
        ValueError: for a model, dtype or optimizer that is not known, numbers out of range, images too small for the
            network, and a module whose outputs need ``loss``.
        RuntimeError: for ``fused=True`` where the compiled extension is missing.
        ImportError: for a model given by name without torchvision.
    """
    sizes = {"height": height, "width": width, "batch": batch}
    for name, value in sizes.items():
        positive_int("memory.estimate", name, value)
    if height * width * batch > _MOST:
        raise ValueError(
            f"memory.estimate: a batch must have at most {_MOST} pixels (got {batch} x {height} x {width})"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"memory.estimate: dtype must be torch.float32, torch.bfloat16 or torch.float16 (got {dtype})")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"memory.estimate: optimizer must be one of {', '.join(OPTIMIZERS)} (got {optimizer!r})")
    if fused and not LIBRARIES.serves("cpu"):
        raise RuntimeError(
            "memory.estimate: the fused ops cannot be counted without the compiled extension, "
            f"{LIBRARIES.why_not('cpu')}; build it with {HOW_TO_BUILD}, or pass fused=False"
        )
    build = _builder(model, num_classes, options)

    def count(images: int) -> list[dict[str, int]]:
        sizes = height, width, images
        return _count(build, sizes, dtype, optimizer if train else None, fused, loss or default_loss)

    base = max(batch, 2)  # with one image some operators take other ways (einsum leaves out products)
    events, one = count(batch), None
    if batch == 1:
        one = max(map(_sum, events))
    else:
        with suppress(ValueError):  # batch norm of pooled features needs two
            one = max(map(_sum, count(1)))
    totals = [
        np.array([_sum(event) for event in run], dtype=np.int64)
        for run in (events if batch == base else count(base), count(base + 1))
    ]
    if len(totals[0]) != len(totals[1]):
        raise ValueError(
            "memory.estimate: the network runs other operators for another batch, so that its memory has no formula in "
            f"the batch ({len(totals[0])} tensors for {base} images, {len(totals[1])} for {base + 1})"
        )
    peak = max(events, key=_sum)
    return Estimate(
        model=model if isinstance(model, str) else type(model).__name__,
        height=height,
        width=width,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        train=train,
        fused=fused,
        optimizer=optimizer if train else None,
        parts={name: size for name, size in peak.items() if size},
        _one=one,
        _base=base,
        _bytes=totals[0],
        _growth=totals[1] - totals[0],
    )


def _sum(event: dict[str, int]) -> int:
    return sum(event.values())


def _builder(
    model: str | nn.Module, num_classes: int, options: dict[str, Any]
) -> Callable[[FakeTensorMode], nn.Module]:
    """Makes the network, or a copy of it, of fake tensors."""
    if isinstance(model, str):
        if model not in MODELS:
            raise ValueError(f"memory.estimate: model must be a module or one of {', '.join(MODELS)} (got {model!r})")
        from .. import models

        build: Callable[..., nn.Module] = getattr(models, model)

        def made(fake: FakeTensorMode) -> nn.Module:
            with fake:
                return build(num_classes, **options)

        return made
    if not isinstance(model, nn.Module):
        raise TypeError(f"memory.estimate: model must be a name or a torch.nn.Module (got {type(model).__name__})")
    if options:
        raise TypeError(f"memory.estimate: {', '.join(options)}: only a model given by name has options")

    def copied(fake: FakeTensorMode) -> nn.Module:
        with FakeCopyMode(fake):
            return copy.deepcopy(model)

    return copied


@contextmanager
def _without_logs() -> Iterator[None]:
    """What fails on fake tensors raises; PyTorch also logs it, with its traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _count(
    build: Callable[[FakeTensorMode], nn.Module],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    optimizer: str | None,
    fused: bool,
    loss: Loss,
) -> list[dict[str, int]]:
    """Bytes by part after each allocation.

    Args:
        sizes: height, width, batch.
        optimizer: None for inference.
    """
    height, width, batch = sizes
    count = Count()
    fake = FakeTensorMode()
    model = build(fake).train(optimizer is not None)
    with use_backend("native"), fake, Attention(fused, count), _without_logs():
        count.parameters_of(model)
        for name, child in model.named_children():
            count.follow(child, name)
        with count:
            with count.part(OPTIMIZER):
                stepping = None if optimizer is None else prepare(model, optimizer)
            count.start()
            with count.part(INPUT):
                image = torch.empty(batch, 3, height, width)
                target = None if optimizer is None else torch.empty(batch, height, width, dtype=torch.int64)
            try:
                if stepping is None or target is None:
                    with count.part(OUTPUTS):
                        inference(model, image, dtype)
                else:
                    training(model, stepping, image, target, loss, dtype, count)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"memory.estimate: the network does not run on images of shape {tuple(image.shape)}: {error}"
                ) from error
    return count.events
