"""The implementations under test: the reference, the CPU kernels, the CUDA kernels emulated on the CPU, and the CUDA
kernels on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import segattn_ops
from segattn_ops import _backend


@dataclass(frozen=True)
class Backend:
    name: str
    selected_as: str  # in use_backend
    device: str = "cpu"

    @property
    def runs_large(self) -> bool:
        """The emulator takes minutes where a CPU takes milliseconds: it runs small shapes only."""
        return self.name != "emulated"

    @property
    def namespace(self) -> str | None:
        return {"native": "segattn", "emulated": "segattn_emulated"}.get(self.selected_as)

    @property
    def operators(self):
        return getattr(torch.ops, self.namespace)

    @contextmanager
    def selected(self) -> Iterator[None]:
        with segattn_ops.use_backend(self.selected_as):
            yield


ALL = {
    "reference": Backend("reference", "reference"),
    "cpu": Backend("cpu", "native"),
    "emulated": Backend("emulated", "emulated"),
    "cuda": Backend("cuda", "native", "cuda"),
}


def chosen() -> list[str]:
    """The implementations of SEGATTN_TEST_BACKENDS, a comma-separated list, or all that this machine can run."""
    if not (listed := os.environ.get("SEGATTN_TEST_BACKENDS")):
        return [name for name in ALL if name != "cuda" or torch.cuda.is_available()]
    names = listed.split(",")
    unknown = set(names) - set(ALL)
    if unknown:
        raise pytest.UsageError(f"SEGATTN_TEST_BACKENDS must name some of {sorted(ALL)} (got {sorted(unknown)})")
    return names


def why_unavailable(backend: Backend) -> str | None:
    if backend.name == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if backend.selected_as == "native" and not _backend.LIBRARIES.serves(backend.device):
        return _backend.LIBRARIES.why_not(backend.device)
    return None
