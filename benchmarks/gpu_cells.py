"""One cell on a GPU: checked against float64, then forward and backward timed apart, in the caller's process."""

from __future__ import annotations

import functools
import gc
import statistics
from dataclasses import replace

import torch

from . import features, measure, rivals, run, validate
from .workloads import DTYPES, Workload

ROUNDS = 25
SECONDS = 2.0  # of repeats, for one cell and kind


class DeviceCell:
    """A workload's operands on the device, shared by all rivals, and the float64 values they are compared with."""

    def __init__(self, workload: Workload, device: torch.device, seed: int = 0):
        self.workload, self.device = workload, device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (workload.batch, workload.channels, workload.height, workload.width)
        x = torch.randn(shape, generator=generator, device=device).relu_()
        self.leaves = {name: leaf.requires_grad_() for name, leaf in features.operands(workload, x, seed).items()}
        self.grad_output = features.grad_output(workload, seed + 1, device)
        self.checked = sorted({0, workload.batch - 1})  # the samples that are computed in float64
        self.checked_workload = replace(workload, batch=len(self.checked))
        self.reference = validate.expected(
            self.checked_workload, self._checked(self.leaves), self.grad_output[self.checked], seed
        )
        self.eager_errors: dict[str, float] | None = None
        self.on_device = device.type == "cuda"
        self.time = measure.DeviceTimer(device) if self.on_device else measure.time_host

    def _checked(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checked samples of the tensors that have a batch; the others (weights) as they are."""
        return {
            name: tensor.detach()[self.checked] if _has_batch(self.workload, name) else tensor.detach()
            for name, tensor in tensors.items()
        }

    def errors(self, output: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """As ``validate.errors`` on the checked samples; a weight's gradient, a sum over all samples, is left out where
        not all are checked."""
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

    def measure(self, rival: str) -> dict:
        """Errors, extra memory, and seconds of forward, backward and both; raises what the rival raises."""
        leaves = tuple(self.leaves.values())
        function = rivals.formulation(rival, self.workload.op)

        def forward():
            with torch.no_grad():
                return function(*leaves)

        def forward_backward():
            output = function(*leaves)
            return output, torch.autograd.grad(output, leaves, self.grad_output)

        if rivals.uses_compiler(rival):
            torch._dynamo.reset()  # past a few recompilations of one function, dynamo would quietly run it eagerly
        forward()
        forward_backward()
        meter = measure.DeviceMemory(self.device) if self.on_device else None
        output, gradients = forward_backward()
        results = sum(tensor.numel() * tensor.element_size() for tensor in (output, *gradients))
        memory = {"forward_backward": max(meter.peak() - results, 0)} if meter else None
        found = self.errors(output, gradients)
        if rival == "eager":
            self.eager_errors = found
        if rival == "fused":
            validate.check(self.workload, "segattn_ops", found, self.eager_errors)
        del output, gradients
        timings = {"forward": self._repeat(forward), "forward_backward": self._repeat(forward_backward)}
        timings["backward"] = self._backward(function, leaves)
        if graph := self._captured(forward):
            timings["forward_graph"] = self._repeat(graph.replay)
        return {"errors": found, "memory": memory} | {
            kind: measure.Timing(tuple(seconds)).as_dict() for kind, seconds in timings.items()
        }

    def _repeat(self, function) -> list[float]:
        first = self.time(function)
        rounds = int(min(max(SECONDS / first, 3), ROUNDS))
        gc.disable()
        try:
            return [self.time(function) for _ in range(rounds)]
        finally:
            gc.enable()

    def _backward(self, function, leaves) -> list[float]:
        """The backward alone: its forward runs before the first event, and the cache is flushed between them."""
        seconds = []
        while len(seconds) < 3 or (len(seconds) < ROUNDS and sum(seconds) < SECONDS):
            output = function(*leaves)
            seconds.append(self.time(lambda output=output: torch.autograd.grad(output, leaves, self.grad_output)))
        return seconds

    def _captured(self, forward) -> torch.cuda.CUDAGraph | None:
        """The forward as a CUDA graph, for small batches, where launches are what takes the time; None if it cannot."""
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


def cell_record(workload: Workload, rival: str, cell: DeviceCell | None, device: torch.device) -> dict:
    """The record of one rival: measured, or skipped, failed or wrong with the reason."""
    entry = run.record(workload, rival, "measured")
    try:
        if cell is None:
            raise RuntimeError("its operands could not be made")
        return entry | cell.measure(rival)
    except validate.WrongResult as wrong:
        return entry | {"status": "wrong", "reason": str(wrong)}
    except torch.cuda.OutOfMemoryError as error:
        return entry | {"status": "failed", "reason": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # a rival's refusal is a line of the report, whatever it raises
        return entry | {"status": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def sdpa_choice(workload: Workload, device: torch.device) -> dict[str, str]:
    """Which of ``scaled_dot_product_attention``'s backends take this workload, and which one PyTorch chooses itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    inner, outer = workload.widths
    n, dtype = min(workload.positions, 4096), DTYPES[workload.dtype]
    query, key, value = (
        torch.randn(1, 1, n, width, device=device, dtype=dtype, requires_grad=True) for width in (inner, inner, outer)
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


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches: bytes/s of a copy (read + written), FLOP/s of large products of random matrices."""
    timer = measure.DeviceTimer(device)

    def median(function) -> float:
        function()
        return statistics.median(timer(function) for _ in range(15))

    source = torch.randn(2**29, device=device)  # 2 GiB
    target = torch.empty_like(source)
    seconds = median(functools.partial(target.copy_, source))
    found = {"copy_bytes_per_second": 2 * source.numel() * source.element_size() / seconds}
    del source, target
    n = 8192
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
