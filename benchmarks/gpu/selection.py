"""What the suite measures: op families, sizes, dtypes, batches and rivals, in order of importance."""

from __future__ import annotations

from dataclasses import dataclass

from .. import rivals
from ..workloads import Workload

FAMILIES = {
    "position": ("position", "non_local", "ann"),
    "criss-cross": ("criss_cross", "rcca"),
    "channel": ("channel",),
}
SIZES = ((97, 97), (128, 128), (64, 64), (128, 256))
DTYPES = ("bfloat16", "float32", "float16")
BATCHES = {"position": (8, 1), "criss-cross": (8, 1, 32), "channel": (8, 1)}
ONCE = ("rcca", "non_local", "ann")  # CCNet's whole block, Non-local's channels, few keys: at one size and dtype
COMPILED = tuple(name for name in rivals.RIVALS if rivals.uses_compiler(name))
OURS = ("fused", rivals.FUSED_BY_MMA)
# Eager first: the fused op's error is compared with its error. Compilers last: they take longest to start.
_OF_CPUS = (*rivals.ONEDNN, *rivals.RUNTIMES)
_LAST = tuple(name for name in rivals.RIVALS if name not in ("eager", "fused", *COMPILED, *_OF_CPUS))
RIVALS = ("eager", *OURS, *_LAST, *COMPILED)


@dataclass(frozen=True)
class Selection:
    """The part of the work that the command line selects. ``batches`` None: each family's own."""

    families: tuple[str, ...] = tuple(FAMILIES)
    sizes: tuple[tuple[int, int], ...] = SIZES
    dtypes: tuple[str, ...] = DTYPES
    batches: tuple[int, ...] | None = None
    rivals: tuple[str, ...] = RIVALS

    @property
    def main(self) -> tuple[tuple[int, int], str]:
        """The size and dtype of what is measured once: 97 x 97 bfloat16, or the first selected ones."""
        size = SIZES[0] if SIZES[0] in self.sizes else self.sizes[0]
        return size, DTYPES[0] if DTYPES[0] in self.dtypes else self.dtypes[0]

    def workloads(self) -> list[Workload]:
        """All workloads, ordered so that a run cut short has measured the most important ones of each family."""
        planned = []
        for dtype_rank, dtype in enumerate(self.dtypes):
            for size_rank, size in enumerate(self.sizes):
                for family in self.families:
                    for batch_rank, batch in enumerate(self.batches or BATCHES[family]):
                        for op in FAMILIES[family]:
                            once = op in ONCE
                            if once and (size, dtype) != self.main:
                                continue
                            rank = (dtype_rank + size_rank + batch_rank, once, dtype_rank, batch_rank)
                            planned.append((rank, Workload(op, *size, dtype, batch)))
        return [workload for _, workload in sorted(planned, key=lambda ranked: ranked[0])]

    def rivals_of(self, workload: Workload) -> list[str]:
        """The rivals measured at a workload: those that compile only at the main size, dtype and first batch, and the
        engine that is compared with wgmma only in the dtypes that wgmma has."""
        family = next(name for name, ops in FAMILIES.items() if workload.op in ops)
        first = (self.batches or BATCHES[family])[0]
        size, dtype = self.main
        compiles = ((workload.height, workload.width), workload.dtype, workload.batch) == (size, dtype, first)
        names = rivals.applicable(self.rivals, workload)
        left_out = {name for name in names if rivals.uses_compiler(name) and not compiles}
        if workload.dtype not in ("bfloat16", "float16"):
            left_out.add(rivals.FUSED_BY_MMA)
        return [name for name in names if name not in left_out]
