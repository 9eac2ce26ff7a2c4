"""A subject as one rival computes it, in its own process: checked, its memory measured, then timed.

``forward`` runs in evaluation mode under no_grad. ``forward_backward`` of a module takes the gradients of inputs and
parameters, of a model it is a training step: loss, backward, and SGD with momentum.
"""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import blocks, features, measure, subjects
from .subjects import Subject
from .workloads import DTYPES

SMALL = {"module": (16, 24), "model": (64, 96)}  # of the set-up, and of the check of the gradients
CALIBRATION = (256, 512)  # pixels, whose statistics the batch norms of a model take


@dataclass(frozen=True)
class NetworkSpec:
    """The parameters of a cell; ``inputs`` is a file written by :func:`save_inputs`."""

    subject: Subject
    rival: str
    inputs: str
    device: str = "cpu"
    threads: int = 0
    backend: str = "native"

    def make(self) -> NetworkCell:
        return NetworkCell(self)


def save_inputs(path: str, subject: Subject, photograph, seed: int = 0) -> None:
    """Writes what all rivals share: the weights and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    network = subject.make(seed)
    if subject.kind == "model":
        _calibrate(network, image_of(photograph, *CALIBRATION))
        inputs = [image_of(photograph, subject.height, subject.width).repeat(subject.batch, 1, 1, 1)]
        shape = (subject.batch, subject.height, subject.width)
        target = torch.randint(subjects.CLASSES, shape, generator=generator)
    else:
        inputs = [torch.randn(shape, generator=generator).relu() for shape in subject.shapes()]
        output = (subject.batch, *network.eval()(*(x[:1, :, :2, :2] for x in inputs)).shape[1:2], *inputs[-1].shape[2:])
        target = torch.randn(output, generator=generator)
    torch.save({"state": network.state_dict(), "inputs": inputs, "target": target}, path)


def image_of(photograph, height: int, width: int) -> Tensor:
    """(1, 3, height, width): the photograph, normalised as ImageNet's."""
    pixels = torch.tensor(features.fit(photograph, height, width)).permute(2, 0, 1).float().div_(255)
    return ((pixels - torch.tensor(features.MEAN).view(3, 1, 1)) / torch.tensor(features.STD).view(3, 1, 1))[None]


@torch.no_grad()
def _calibrate(network: torch.nn.Module, image: Tensor) -> None:
    """Gives the batch norms the statistics of the photograph: with random weights and no statistics, activations double
    from block to block."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(image)
    for norm in norms:
        norm.momentum = 0.1


class NetworkCell:
    def __init__(self, spec: NetworkSpec):
        self.spec, self.subject = spec, spec.subject
        self.device = torch.device(spec.device)
        if spec.threads:
            torch.set_num_threads(spec.threads)
        stored = torch.load(spec.inputs, map_location=self.device, weights_only=True)
        dtype = DTYPES[self.subject.dtype]
        network = self.subject.make()
        network.load_state_dict(stored["state"])
        network.to(self.device, dtype)
        self.references: blocks.References | None = blocks.References(network)
        self.network = self.subject.computed(network, spec.rival)
        self.inputs = [x.to(dtype) for x in stored["inputs"]]
        self.target = stored["target"] if self.is_model else stored["target"].to(dtype)
        self.optimizer = subjects.new_optimizer(self.network) if self.is_model else None
        del stored
        gc.collect()
        gc.freeze()
        self.on_device = self.device.type == "cuda"
        self.time = measure.DeviceTimer(self.device) if self.on_device else measure.time_host

    @property
    def is_model(self) -> bool:
        return self.subject.kind == "model"

    def check(self) -> dict[str, dict[str, float]]:
        """Relative errors: of the blocks' outputs at the subject's own size, and of all gradients at a small size in
        float64, against the eager blocks."""
        assert self.references is not None, "check runs once, before the passes"
        height, width = SMALL[self.subject.kind]
        small = replace(self.subject, height=height, width=width, batch=1)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator).to(self.device) for shape in small.shapes()]
        with torch.random.fork_rng():
            networks = [small.network(name).to(self.device) for name in ("eager", self.spec.rival)]
            small_errors = blocks.small_errors(*networks, *inputs)
        found = {"blocks": self.references.errors(self.network, *self.inputs), "small": small_errors}
        self.references = None
        return found

    def state_bytes(self) -> int:
        """Bytes of weights, statistics, and of a model's momentum, which exists after :meth:`warm_up`."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        if self.optimizer:
            tensors += [
                value for state in self.optimizer.state.values() for value in state.values() if value is not None
            ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def warm_up(self) -> int:
        """Runs the set-up of the first calls at a small size, and returns :meth:`state_bytes`."""
        height, width = SMALL[self.subject.kind]
        small = [x[..., :height, :width].contiguous() for x in self.inputs]
        target = self.target[..., :height, :width].contiguous()
        self._forward(small)
        self._forward_backward(small, target)
        return self.state_bytes()

    def first_pass(self, kind: str) -> dict:
        """Seconds and memory of one pass: the peak above what the cell held before, without a module's results."""
        meter = None
        if self.on_device:
            meter = measure.DeviceMemory(self.device)
        elif measure.host_memory_is_measurable():
            measure.populate_code()
            meter = measure.HostMemory()
        start = time.perf_counter()
        results = self._run(kind)
        if self.on_device:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = meter.peak() if meter else None
        if peak is not None and not self.is_model:
            tensors = [results] if isinstance(results, Tensor) else [results[0].detach(), *results[1]]
            peak = max(peak - sum(tensor.numel() * tensor.element_size() for tensor in tensors), 0)
        return {"seconds": seconds, "bytes": peak}

    def keep_freed_memory(self) -> None:
        """Only time is measured from here on."""
        measure.keep_freed_memory()

    def timed_pass(self, kind: str) -> float:
        gc.collect()
        if not self.on_device:
            measure.wake_threads()
        gc.disable()
        try:
            return self.time(lambda: self._run(kind))
        finally:
            gc.enable()

    def _run(self, kind: str):
        if kind == "forward":
            return self._forward(self.inputs)
        return self._forward_backward(self.inputs, self.target)

    @torch.no_grad()
    def _forward(self, inputs: list[Tensor]) -> Tensor:
        return subjects.out_of(self.network.eval()(*inputs))

    def _forward_backward(self, inputs: list[Tensor], target: Tensor):
        self.network.train()
        if self.optimizer:
            return subjects.training_step(self.network, self.optimizer, *inputs, target)
        with contextlib.ExitStack() as stack:
            for x in inputs:
                stack.callback(x.requires_grad_, x.requires_grad)
                x.requires_grad_()
            return subjects.gradients(self.network, inputs, target)
