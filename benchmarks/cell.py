"""One formulation of one workload: prepared, checked, its memory measured, then timed.

On the host a cell runs in its own process (see processes.py), so that the peak memory is its own. On a device it may
run in the caller's process, since the device's allocator counts its own memory.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from dataclasses import asdict, dataclass, replace

import torch

from . import measure, rivals, runtimes, validate
from .workloads import DTYPES, Workload

WARMUP_SIZE = 16
BURST_SECONDS = 0.02


@dataclass(frozen=True)
class CellSpec:
    """The parameters of a cell; ``inputs`` is a file written by :func:`save_inputs`."""

    workload: Workload
    rival: str
    inputs: str
    device: str = "cpu"
    threads: int = 0
    backend: str = "native"

    def as_dict(self) -> dict:
        return asdict(self)

    def make(self) -> Cell:
        return Cell(self)


def save_inputs(path: str, workload: Workload, leaves: dict, grad_output: torch.Tensor, seed: int = 0) -> None:
    """Writes the operands and the float64 reference of every rival."""
    reference = validate.expected(workload, leaves, grad_output, seed)
    torch.save({"leaves": leaves, "grad_output": grad_output, "reference": reference}, path)


class Cell:
    """A formulation and its operands. The forward is timed under ``no_grad``, as in inference."""

    def __init__(self, spec: CellSpec):
        self.spec, self.workload = spec, spec.workload
        self.device = torch.device(spec.device)
        if spec.threads:
            torch.set_num_threads(spec.threads)
        stored = torch.load(spec.inputs, map_location=self.device, weights_only=True)
        self.leaves = {name: leaf.requires_grad_() for name, leaf in stored["leaves"].items()}
        self.grad_output = stored["grad_output"]
        self.reference = stored["reference"]
        gc.collect()
        gc.freeze()  # so that collecting before each pass does not traverse all of torch
        self.passes = rivals.passes(spec.rival, self.device)
        if spec.rival in rivals.RUNTIMES:
            self.function = runtimes.Session(spec.rival, *self.workload.widths, torch.get_num_threads())
        else:
            rivals.configure(spec.rival)
            self.function = rivals.formulation(spec.rival, self.workload.op)
        self.operands = self._operands(self.leaves)
        self.on_device = self.device.type == "cuda"
        self.time = measure.DeviceTimer(self.device) if self.on_device else measure.time_host

    def _operands(self, leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the function takes: the leaves, detached where there is no backward (FlexAttention refuses others), or
        for a runtime their conversions, which are not timed."""
        if self.spec.rival in rivals.RUNTIMES:
            return tuple(runtimes.tokens(leaf) for leaf in leaves.values())
        return tuple(leaf if "forward_backward" in self.passes else leaf.detach() for leaf in leaves.values())

    def forward(self):
        with torch.no_grad():
            return self.function(*self.operands)

    def forward_backward(self):
        leaves = tuple(self.leaves.values())
        output = self.function(*leaves)
        return output, torch.autograd.grad(output, leaves, self.grad_output)

    def warm_up(self) -> float:
        """Runs the set-up of a first call and returns its seconds: at the real size for compilers, else at a small
        one."""
        start = time.perf_counter()
        if rivals.uses_compiler(self.spec.rival):
            for kind in self.passes:
                getattr(self, kind)()
        else:
            small = replace(
                self.workload,
                height=min(WARMUP_SIZE, self.workload.height),
                width=min(WARMUP_SIZE, self.workload.width),
            )
            dtype = DTYPES[small.dtype]
            leaves = {
                name: torch.randn(shape, dtype=dtype, device=self.device, requires_grad=True)
                for name, shape in small.leaves().items()
            }
            output = self.function(*self._operands(leaves))
            if "forward_backward" in self.passes:
                grad_output = torch.randn(small.output_shape(), dtype=dtype, device=self.device)
                torch.autograd.grad(output, list(leaves.values()), grad_output)
        return time.perf_counter() - start

    def first_pass(self) -> dict:
        """One forward + backward: peak memory beyond output and gradients, time, and the results' errors. Of a
        rival that has no backward, one forward."""
        if "forward_backward" not in self.passes:
            return self._first_forward()
        leaves = tuple(self.leaves.values())
        meter = self._memory_meter()
        start = time.perf_counter()
        output = self.function(*leaves)
        self._synchronize()
        forward_seconds = time.perf_counter() - start
        forward_peak = meter.peak() if meter else None
        gradients = torch.autograd.grad(output, leaves, self.grad_output)
        self._synchronize()
        seconds = time.perf_counter() - start
        peak = meter.peak() if meter else None
        output = output.detach()  # frees what was saved for the backward
        output_bytes = output.numel() * output.element_size()
        gradient_bytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        found = validate.errors(self.workload, self.leaves, self.grad_output, self.reference, output, gradients)
        memory = None
        if meter:
            memory = {
                "forward": max(forward_peak - output_bytes, 0),
                "forward_backward": max(peak - output_bytes - gradient_bytes, 0),
            }
        measure.keep_freed_memory()  # only time is measured from here on
        return {"errors": found, "memory": memory, "forward": forward_seconds, "forward_backward": seconds}

    def _first_forward(self) -> dict:
        meter = self._memory_meter()
        start = time.perf_counter()
        output = self.forward()
        seconds = time.perf_counter() - start
        peak = meter.peak() if meter else None
        if self.spec.rival in rivals.RUNTIMES:
            output = runtimes.feature_map(output, self.grad_output.shape[2:])
        found = validate.errors(self.workload, self.leaves, self.grad_output, self.reference, output, None)
        memory = None
        if meter:
            memory = {"forward": max(peak - output.numel() * output.element_size(), 0)}
        measure.keep_freed_memory()
        return {"errors": found, "memory": memory, "forward": seconds}

    def timed_pass(self, kind: str) -> float:
        """Seconds of one ``"forward"`` or ``"forward_backward"``.

        A short pass is repeated for :data:`BURST_SECONDS` and the median taken, without the first call, which finds
        another cell's data in the caches.
        """
        run = self.forward if kind == "forward" else self.forward_backward
        gc.collect()
        if not self.on_device:
            measure.wake_threads()
        gc.disable()
        try:
            first = self.time(run)
            if first > BURST_SECONDS:
                return first
            seconds, end = [], time.perf_counter() + BURST_SECONDS
            while not seconds or time.perf_counter() < end:
                seconds.append(self.time(run))
            return statistics.median(seconds)
        finally:
            gc.enable()

    def _memory_meter(self):
        if self.on_device:
            return measure.DeviceMemory(self.device)
        if not measure.host_memory_is_measurable():
            return None
        measure.populate_code()
        return measure.HostMemory()

    def _synchronize(self) -> None:
        if self.on_device:
            torch.cuda.synchronize(self.device)


def backend(spec: CellSpec):
    """The context in which the fused ops run on the backend of the spec."""
    if spec.backend == "native" or spec.rival != "fused":
        return contextlib.nullcontext()
    from segattn_ops import use_backend

    return use_backend(spec.backend)
