"""One cell on a GPU: checked against float64, then forward and backward timed separately, in the caller's process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from .. import features, measure, rivals, run, statistics, validate
from ..workloads import DTYPES, Workload
from . import native
from .selection import OURS

ROUNDS = 25
SECONDS = 0.5  # of repeats per cell and kind: 25 rounds of 20 ms; longer calls vary less and need fewer


class DeviceCell:
    """A workload's operands on the device, shared by all rivals, and the float64 reference values."""

    def __init__(self, workload: Workload, device: torch.device, seed: int = 0):
        self.workload, self.device = workload, device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (workload.batch, workload.channels, workload.height, workload.width)
        x = torch.randn(shape, generator=generator, device=device).relu_()
        self.leaves = {name: leaf.requires_grad_() for name, leaf in features.operands(workload, x, seed).items()}
        self.grad_output = features.grad_output(workload, seed + 1, device)
        self.checked = sorted({0, workload.batch - 1})  # the samples compared with float64
        self.checked_workload = replace(workload, batch=len(self.checked))
        self.reference = validate.expected(
            self.checked_workload, self._checked(self.leaves), self.grad_output[self.checked], seed
        )
        self.eager_errors: dict[str, float] | None = None
        self.on_device = device.type == "cuda"
        self.time = measure.DeviceTimer(device) if self.on_device else measure.time_host

    def _checked(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checked samples of tensors with a batch dimension; the others (weights) unchanged."""
        return {
            name: tensor.detach()[self.checked] if _has_batch(self.workload, name) else tensor.detach()
            for name, tensor in tensors.items()
        }

    def errors(self, output: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """``validate.errors`` on the checked samples. Gradients of weights sum over all samples: they are left out
        unless all are checked."""
        got = self._checked(dict(zip(self.leaves, gradients, strict=True)))
        found = validate.errors(
            self.checked_workload,
            self._checked(self.leaves),
            self.grad_output[self.checked],
            self.reference,
            output.detach()[self.checked],
            tuple(got.values()),
        )
        if len(self.checked) == self.workload.batch:
            return found
        weights = {f"grad_{name}" for name in self.leaves if not _has_batch(self.workload, name)}
        return {name: error for name, error in found.items() if name not in weights}

    def learn_eager(self) -> None:
        """Sets eager's errors, with which the fused op's are compared; they stay None if eager runs out of memory."""
        leaves = tuple(self.leaves.values())
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            output = rivals.formulation("eager", self.workload.op)(*leaves)
            gradients = torch.autograd.grad(output, leaves, self.grad_output)
            self.eager_errors = self.errors(output, gradients)

    def measure(self, rival: str) -> dict:
        """Errors, extra memory, seconds of forward, backward and both, and which of these include time the device
        waited for the host; of the package also the engine of position attention. Raises what the rival raises, and
        for the package what ``native.selected`` raises."""
        if rival not in OURS:
            return self._measure(rival)
        with native.selected(rival, self.workload, self.device):
            return {"engine": native.position_engine(self.workload, self.device)} | self._measure(rival)

    def _measure(self, rival: str) -> dict:
        leaves = tuple(self.leaves.values())
        function = rivals.formulation(rival, self.workload.op)

        def forward():
            with torch.no_grad():
                return function(*leaves)

        def forward_backward():
            output = function(*leaves)
            return output, torch.autograd.grad(output, leaves, self.grad_output)

        if rivals.uses_compiler(rival):
            torch._dynamo.reset()  # after a few recompilations of one function, dynamo silently runs it eagerly
        forward()
        forward_backward()
        meter = measure.DeviceMemory(self.device) if self.on_device else None
        output, gradients = forward_backward()
        results = sum(tensor.numel() * tensor.element_size() for tensor in (output, *gradients))
        memory = {"forward_backward": max(meter.peak() - results, 0)} if meter else None
        found = self.errors(output, gradients)
        if rival == "eager":
            self.eager_errors = found
        if rival in OURS:
            validate.check(self.workload, rivals.TITLES[rival], found, self.eager_errors)
        del output, gradients
        kinds = {
            "forward": lambda: self._repeat(forward),
            "forward_backward": lambda: self._repeat(forward_backward),
            "backward": lambda: self._backward(function, leaves),
        }
        if graph := self._captured(forward):
            kinds["forward_graph"] = lambda: self._repeat(graph.replay)
        timings, exposed = {}, []
        for kind, repeat in kinds.items():
            self.hidden = True
            timings[kind] = statistics.summary(repeat())
            exposed += [] if self.hidden else [kind]
        return {"errors": found, "memory": memory, "host_exposed": exposed} | timings

    def _timed(self, function) -> float:
        """Seconds of one call. ``hidden`` becomes False if the device waited for the host."""
        seconds = self.time(function)
        self.hidden &= getattr(self.time, "hidden", True)
        return seconds

    def _repeat(self, function) -> list[float]:
        first = self.time(function)
        rounds = int(min(max(SECONDS / first, 3), ROUNDS))
        gc.disable()
        try:
            return [self._timed(function) for _ in range(rounds)]
        finally:
            gc.enable()

    def _backward(self, function, leaves) -> list[float]:
        """The backward alone: the forward runs before the first event, and the cache is flushed in between."""
        seconds = []
        while len(seconds) < 3 or (len(seconds) < ROUNDS and sum(seconds) < SECONDS):
            output = function(*leaves)
            seconds.append(self._timed(lambda output=output: torch.autograd.grad(output, leaves, self.grad_output)))
        return seconds

    def _captured(self, forward) -> torch.cuda.CUDAGraph | None:
        """The forward as a CUDA graph, for batch 1, where launches dominate; None if it cannot be captured."""
        if self.workload.batch > 1 or not self.on_device:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                forward()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None
        return graph


def _has_batch(workload: Workload, name: str) -> bool:
    return workload.op != "rcca" or name == "input"


def cell_record(workload: Workload, rival: str, cell: Callable[[], DeviceCell], device: torch.device) -> dict:
    """The record of one rival in the cell that ``cell()`` makes: measured, failed or wrong, with the reason."""
    entry = run.record(workload, rival, "measured", device=device)
    if reason := rivals.unavailable(workload, rival, device):
        return entry | {"status": "skipped", "reason": reason}
    try:
        return entry | cell().measure(rival)
    except native.NotNative:
        raise  # not a property of this cell
    except native.SameEngine as same:
        return entry | {"status": "skipped", "reason": str(same)}
    except validate.WrongResult as wrong:
        return entry | {"status": "wrong", "reason": str(wrong)}
    except torch.cuda.OutOfMemoryError as error:
        return entry | {"status": "failed", "reason": f"out of memory: {str(error).splitlines()[0]}"[:300]}
    except Exception as error:  # of any kind: a rival that fails is a line of the report
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return entry | {"status": "failed", "reason": reason[:300]}


def sdpa_choice(workload: Workload, device: torch.device) -> dict[str, str]:
    """Which of ``scaled_dot_product_attention``'s backends accept this workload, and which one PyTorch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    key_channels, value_channels = workload.widths
    n, dtype = min(workload.positions, 4096), DTYPES[workload.dtype]
    query, key, value = (
        torch.randn(1, 1, n, width, device=device, dtype=dtype, requires_grad=True)
        for width in (key_channels, key_channels, value_channels)
    )
    answers = {"default": SDPBackend(torch._fused_sdp_choice(query, key, value)).name}
    for name in (*rivals.SDPA_BACKENDS.values(), "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                output = scaled_dot_product_attention(query, key, value, scale=1.0)
                torch.autograd.grad(output, (query, key, value), torch.randn_like(output))
            answers[name] = "forward and backward"
        except RuntimeError as error:
            answers[name] = f"refused: {str(error).splitlines()[0]}"
    return answers
