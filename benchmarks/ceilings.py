"""What a machine reaches: the bandwidth of a copy, and the throughput of matrix products of random data."""

from __future__ import annotations

import functools
import statistics

import torch

from . import measure

REPEATS = 9
SIZES = {  # (elements of the copied tensor, side of the multiplied matrices)
    "cuda": (2**29, 8192),
    "cpu": (2**26, 2048),
    "small": (2**16, 64),
}


def reached(device: torch.device, sizes: str | None = None, repeats: int = REPEATS) -> dict[str, float]:
    """Bytes/s of a copy (read + written) and FLOP/s of large products of random matrices: the median of ``repeats``.

    On a CPU the copy is of 256 MiB, beyond every cache, and the products take a tenth of a second; 16-bit types only
    where the processor has products of theirs, and TF32 on a GPU alone. ``sizes`` is one of :data:`SIZES`, the device's
    if None; "small" exercises the code, and its figures mean nothing.
    """
    on_device = device.type == "cuda"
    timer = measure.DeviceTimer(device) if on_device else measure.time_host
    elements, n = SIZES[sizes or device.type]

    def median(function) -> float:
        function()
        return statistics.median(timer(function) for _ in range(repeats))

    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    seconds = median(functools.partial(target.copy_, source))
    found = {"copy_bytes_per_second": 2 * source.numel() * source.element_size() / seconds}
    del source, target
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in _products(on_device or sizes == "small"):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[f"matmul_{name}_flop_per_second"] = 2 * n**3 / median(functools.partial(torch.matmul, a, b))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return found


def _products(every: bool) -> list[tuple[str, torch.dtype, bool]]:
    """(name, dtype, whether TF32 is allowed): without a processor's own products a 16-bit one takes seconds."""
    mkldnn = torch.ops.mkldnn
    chosen = [("float32", torch.float32, False)]
    if every or mkldnn._is_mkldnn_bf16_supported():
        chosen.append(("bfloat16", torch.bfloat16, False))
    if every or mkldnn._is_mkldnn_fp16_supported():
        chosen.append(("float16", torch.float16, False))
    return [*chosen, ("tf32", torch.float32, True)] if every else chosen


def flop_ceiling(ceilings: dict, dtype: str) -> float | None:
    """FLOP/s that products of ``dtype`` reach, as measured; None if not measured.

    A product with float32 accuracy uses float32 units or three TF32 products, whichever is faster.
    """
    measured = [ceilings.get(f"matmul_{dtype}_flop_per_second")]
    if dtype == "float32":
        measured.append(ceilings.get("matmul_tf32_flop_per_second", 0) / 3)
    return max((value for value in measured if value), default=None)
