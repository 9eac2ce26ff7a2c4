"""Measurement of time and memory, on the host and on a device.

Memory on the host is the Linux kernel's account: ``VmHWM`` of /proc/self/status is the peak of the resident set and
``/proc/self/clear_refs`` resets it. The peak over one call minus the resident set before it is exact to the page for
every allocator: torch, BLAS, or a kernel's scratch. The caller removes three sources of error: memory that glibc keeps
after a free (blocks of 64 KiB or more become mappings, which are returned at once, and the heap is trimmed), code pages
first touched during the call (they are populated), and the set-up of an op's first call (a small call runs before).
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20
_MADV_POPULATE_READ = 22
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_CODE = ("libtorch_cpu", "libtorch_python", "libc10.", "libgomp", "libiomp", "libmkl", "libopenblas", "libm.", "libc.")


def available_bytes(device: str = "cpu") -> int:
    """Memory that can be allocated without swapping: MemAvailable, or what the device's allocator can get."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return psutil.virtual_memory().available


def host_memory_is_measurable() -> bool:
    return Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK)


def _set_glibc_thresholds(mapped: int, trimmed: int) -> None:
    """Blocks of at least `mapped` bytes become mappings; free memory beyond `trimmed` bytes is returned."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


def return_freed_memory_at_once() -> None:
    """Makes glibc return every freed block of 64 KiB or more to the system, for measuring memory."""
    _set_glibc_thresholds(65536, 0)


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks of up to 32 MiB, for measuring time, as it does by default once a process has freed
    such a block. A mapping for each result would cost page faults in every call."""
    _set_glibc_thresholds(32 * MIB, 64 * MIB)


def populate_code() -> None:
    """Maps the code pages of the computing libraries, so that the measured call does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or "r" not in fields[1]:
            continue
        name = os.path.basename(fields[5])
        if name.startswith(_CODE) or "segattn_ops" in fields[5]:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_READ)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _trim() -> None:
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class HostMemory:
    """Peak of this process's resident set above its start. See the module's docstring."""

    def __init__(self):
        _trim()
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_bytes("VmRSS")

    def peak(self) -> int:
        """Bytes of the peak since the start."""
        return max(_status_bytes("VmHWM") - self.before, 0)


class DeviceMemory:
    """Peak of what torch's caching allocator handed out, above its start."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before


def wake_threads(seconds: float = 0.01) -> None:
    """Keeps all of torch's threads busy for a moment. After a pause the kernel may wake two of them on one core and
    leave them there for tens of milliseconds: criss-cross attention took 29 ms instead of 16 in a third of the
    calls."""
    numbers = torch.ones(2**18)  # 1 MiB: small beside the operands, so that it leaves the caches warm
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        numbers.sin_()


def time_host(run: Callable[[], object]) -> float:
    """Seconds of one call; the results are released after the clock stops."""
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


class DeviceTimer:
    """Seconds of one call between two device events, with a cold L2 cache and the host's launches hidden.

    A write of twice the L2's size and a kernel that only waits precede the first event. During the wait the host
    enqueues the whole call, so the events enclose the device's work without gaps between launches. The wait is a
    multiple of the host's time for the previous call; the first wait suffices for a forward and backward of eager
    PyTorch. ``hidden`` says whether the last call was enqueued in time, that is, whether the first event was still
    pending when the host was done. A call that synchronises is never hidden, because its host code continues only after
    the wait; its figure includes host time. So does that of a call whose launches take the host more than ``LONGEST``
    seconds.
    """

    FIRST, SHORTEST, LONGEST = 5e-3, 1e-3, 20e-3  # seconds of waiting
    MARGIN = 2.0  # the wait over the host's time for the previous call
    CALIBRATION_CYCLES = 10_000_000

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 * MIB
        self.flush = torch.empty(max(2 * l2, 256 * MIB) // 4, dtype=torch.int32, device=device)
        self.device = device
        self.wait = self.FIRST
        self.hidden = True
        self.cycles_per_second = self._clock()

    def _clock(self) -> float:
        """Cycles per second of the device: the highest of three trials, because an idle device starts slowly."""
        seconds = []
        with torch.cuda.device(self.device):
            for _ in range(3):
                start, end = self._events()
                start.record()
                torch.cuda._sleep(self.CALIBRATION_CYCLES)
                end.record()
                torch.cuda.synchronize(self.device)
                seconds.append(start.elapsed_time(end) / 1e3)
        return self.CALIBRATION_CYCLES / min(seconds)

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, end = self._events()
            self.flush.zero_()
            torch.cuda._sleep(int(self.wait * self.cycles_per_second))
            start.record()
            began = time.perf_counter()
            result = run()
            end.record()
            enqueued = time.perf_counter() - began
            self.hidden = not start.query()
            torch.cuda.synchronize(self.device)
        del result
        self.wait = min(max(self.MARGIN * enqueued, self.SHORTEST), self.LONGEST)
        return start.elapsed_time(end) / 1e3


def pin(threads: int) -> list[int] | None:
    """Keeps this process, and those it starts, on the first ``threads`` of its processors, and returns them; None where
    the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    chosen = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, chosen)
    return chosen
