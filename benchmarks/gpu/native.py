"""Checks that the package's own kernels run. Without them the package falls back to the reference with a warning, and a
benchmark would report eager PyTorch as segattn_ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tools.compilers import ROOT, build_tools

from .. import rivals
from ..workloads import DTYPES, PAIRWISE, Workload


class NotNative(RuntimeError):
    """The package's kernels would not run."""


class SameEngine(RuntimeError):
    """The package takes mma.sync of its own accord."""


def require_native(device_type: str) -> None:
    """Raises :class:`NotNative` unless the kernels for "cpu" or "cuda" are loaded."""
    import segattn_ops

    config = segattn_ops.build_config()[device_type]
    if not config["native"]:
        why = config["why_not"]
        raise NotNative(f"segattn_ops has no native {device_type} kernels here; nothing is measured or checked: {why}")


def position_engine(workload: Workload, device: torch.device) -> str | None:
    """The engine of position attention that the package chooses for a workload, or that SEGATTN_CUDA_POSITION forces;
    None on a CPU and for the other ops."""
    if device.type != "cuda" or workload.op not in PAIRWISE:
        return None
    from segattn_ops import _ops

    query = torch.empty(1, workload.widths[0], 1, dtype=DTYPES[workload.dtype], device=device)
    engine: str = _ops.ops._position_engine(query)
    return engine


@contextmanager
def selected(rival: str, workload: Workload, device: torch.device) -> Iterator[None]:
    """Within the block, the package's kernels serve, for ``rivals.FUSED_BY_MMA`` those with mma.sync.

    Raises:
        NotNative: they are not loaded.
        SameEngine: for that rival, if "fused" does not take wgmma.
    """
    require_native(device.type)
    from segattn_ops import _position_engine, use_backend

    with use_backend("native"):
        if rival != rivals.FUSED_BY_MMA:
            yield
        elif (engine := position_engine(workload, device)) != "wgmma":
            taken = f"the engine {engine!r}" if engine else "no engine of CUDA"
            raise SameEngine(f"segattn_ops takes {taken} here, and not wgmma: there is nothing to compare")
        else:
            with _position_engine.forced_position_engine("mma"):
                yield


def fault(device: torch.device) -> str | None:
    """Why the libraries of this tree cannot be used, or None if they match the sources, load, and run on the device.

    Loads the libraries: call it in a process that ends before they are rebuilt.
    """
    import segattn_ops
    from segattn_ops import _backend

    try:
        require_native(device.type)
    except NotNative as missing:
        return str(missing)
    config = segattn_ops.build_config()
    used = ["_C", f"_cpu_{config['cpu']['instruction_set']}", *(["_C_cuda"] if device.type == "cuda" else [])]
    marks = _backend.LIBRARIES.build_info.get("sources", {})
    sources = build_tools.fingerprint(ROOT)
    for name in used:
        if marks.get(name) != sources:
            return f"{name} was built of other sources ({marks.get(name, 'unknown')}) than this tree's ({sources})"
    try:
        with segattn_ops.use_backend("native"):
            x = torch.ones(1, 8, 2, 2, device=device, requires_grad=True)
            segattn_ops.position_attention(x, x, x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # such as no code for this architecture
        return f"a kernel does not run on {device}: {str(error).splitlines()[0]}"
    return None
