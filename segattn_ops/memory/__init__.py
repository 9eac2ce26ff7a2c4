"""How much memory a segmentation network takes, before it is run: see :func:`estimate`, and docs/memory.md."""

from .estimate import MODELS, OPTIMIZERS, PARTS, Estimate, estimate

__all__ = ["MODELS", "OPTIMIZERS", "PARTS", "Estimate", "estimate"]
