"""The piece ``ceilings``: the bandwidth of a copy and the throughput of matrix products that the device reaches."""

from __future__ import annotations

import functools
import statistics

import torch

from .. import measure
from .client import Refused, Worker, WorkerLost
from .selection import Selection
from .state import Clock, State
from .steps import LEAST_SECONDS


def steps(selection: Selection) -> list[str]:
    return ["device"]


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Measures the ceilings in a worker."""
    if state.step("ceilings", "device"):
        return True
    if clock.left < LEAST_SECONDS:
        return None
    with Worker(device) as worker:
        try:
            found = worker.ask("ceilings", clock.left)
        except (Refused, WorkerLost) as error:
            state.set_step("ceilings", "device", "failed", output=[str(error)])
            return False
    state.set_step("ceilings", "device", "passed", **found)
    for name, value in found.items():
        print(f"  {name}: {value / 1e12:.2f} T/s", flush=True)
    return True


def reached(device: torch.device) -> dict[str, float]:
    """Bytes/s of a copy (read + written) and FLOP/s of large products of random matrices.

    On a CPU the tensors are small: that exercises the code, and the figures mean nothing.
    """
    on_device = device.type == "cuda"
    timer = measure.DeviceTimer(device) if on_device else measure.time_host

    def median(function) -> float:
        function()
        return statistics.median(timer(function) for _ in range(15))

    source = torch.randn(2**29 if on_device else 2**20, device=device)  # 2 GiB
    target = torch.empty_like(source)
    seconds = median(functools.partial(target.copy_, source))
    found = {"copy_bytes_per_second": 2 * source.numel() * source.element_size() / seconds}
    del source, target
    n = 8192 if on_device else 256
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[f"matmul_{name}_flop_per_second"] = 2 * n**3 / median(functools.partial(torch.matmul, a, b))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return found
