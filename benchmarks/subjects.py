"""What ``modules`` and ``models`` measure: a block with its convolutions, or a network, at one size.

``predicted`` runs a subject on fake tensors: torch's FLOP counter and memory tracker give what each pass of each rival
computes and needs, before anything is allocated.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from segattn_ops import nn

from . import blocks
from .workloads import DTYPES

PASSES = ("forward", "forward_backward")
CLASSES = 19  # Cityscapes
STRIDE = 8


@dataclass(frozen=True)
class Kind:
    """How a subject is made, from its sizes. ``inputs`` are (channels, divisor of the sides) of each."""

    title: str
    make: Callable[[], torch.nn.Module]
    inputs: tuple[int, ...]


def _network(builder: str) -> torch.nn.Module:
    from segattn_ops import models  # here: it needs torchvision, which --help does not

    return getattr(models, builder)(CLASSES)


def _loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    from segattn_ops import models

    return models.segmentation_loss(outputs, labels)


# The channels of the papers' networks on a ResNet of 2048 channels.
MODULES = {
    "pam": Kind("DANet's PAM", lambda: nn.PositionAttention(512), (512,)),
    "cam": Kind("DANet's CAM", lambda: nn.ChannelAttention(512), (512,)),
    "rcca": Kind("CCNet's RCCA, R = 2", lambda: nn.RecurrentCrissCrossAttention(512, recurrence=2), (512,)),
    "non_local": Kind("Non-local block", lambda: nn.NonLocal2d(512, scale=256**-0.5), (512,)),
    "afnb": Kind("ANN's AFNB", lambda: nn.AFNB(1024, 2048, 2048, 256, 256), (1024, 2048)),
    "apnb": Kind("ANN's APNB", lambda: nn.APNB(512, 512, 256, 256), (512,)),
}
MODELS = {
    "danet": Kind("DANet", lambda: _network("danet_resnet50"), (3,)),
    "ccnet": Kind("CCNet", lambda: _network("ccnet_resnet50"), (3,)),
    "ann": Kind("ANN", lambda: _network("ann_resnet50"), (3,)),
    "nonlocal": Kind("Non-local network", lambda: _network("nonlocal_resnet50"), (3,)),
}
KINDS = {"module": MODULES, "model": MODELS}


@dataclass(frozen=True)
class Subject:
    """A module on feature maps of height x width positions, or a model on images of height x width pixels."""

    kind: str
    name: str
    height: int
    width: int
    dtype: str = "float32"
    batch: int = 1

    @property
    def of(self) -> Kind:
        return KINDS[self.kind][self.name]

    @property
    def title(self) -> str:
        return self.of.title

    @property
    def label(self) -> str:
        batch = f" B={self.batch}" if self.batch > 1 else ""
        return f"{self.name} {self.height}x{self.width}{batch} {self.dtype}"

    @property
    def positions(self) -> int:
        """Of the feature map."""
        if self.kind == "module":
            return self.height * self.width
        return -(-self.height // STRIDE) * -(-self.width // STRIDE)

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, channels, self.height, self.width) for channels in self.of.inputs]

    def make(self, seed: int = 0) -> torch.nn.Module:
        """The fused network, with weights from a seed, no block of which is the identity."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return blocks.awaken(self.of.make())

    def computed(self, network: torch.nn.Module, rival: str) -> torch.nn.Module:
        """A network of :meth:`make` with the rival's blocks, on its parameters. ``fused`` is the block of this package,
        and of a model the eager network converted."""
        if rival == "fused" and self.kind == "model":
            return blocks.converted(network)
        return blocks.written_out(network, rival)

    def network(self, rival: str) -> torch.nn.Module:
        return self.computed(self.make(), rival)


def of_record(record: dict) -> Subject:
    """The subject of a cell of the JSON."""
    kind = "model" if "model" in record else "module"
    return Subject(kind, record[kind], *(record[name] for name in ("height", "width", "dtype", "batch")))


def out_of(output: Tensor | dict[str, Tensor]) -> Tensor:
    return output["out"] if isinstance(output, dict) else output


def training_step(network: torch.nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, labels: Tensor) -> None:
    """Forward, the loss of all outputs, backward, and a step of SGD with momentum."""
    _loss(network(image), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def new_optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, foreach=False)


def gradients(network: torch.nn.Module, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of a module in training, and the gradients of its inputs and parameters."""
    output = network(*inputs)
    return output, torch.autograd.grad(output, [*inputs, *network.parameters()], grad_output)


@dataclass(frozen=True)
class Cost:
    """Of one pass: FLOP as torch counts them, and bytes of all tensors at the peak, with weights and inputs."""

    flop: int
    peak_bytes: int


@lru_cache(maxsize=64)
def predicted(subject: Subject, rival: str) -> dict[str, Cost]:
    """The cost of each pass. Scratch memory inside an operator, such as a convolution's, is not seen.

    The FLOP of ``sdpa`` are those of eager: torch has no count of its flash backend on a CPU.
    """
    dtype = DTYPES[subject.dtype]
    costs = {}
    eager = predicted(subject, "eager") if rival == "sdpa" else None
    real = subject.computed(subject.of.make(), rival).to(dtype)
    for kind in PASSES:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracker's, about hooks on modules that it sees twice
            with FakeCopyMode(mode):
                network = copy.deepcopy(real)
            inputs = [torch.empty(shape, dtype=dtype) for shape in subject.shapes()]
            tracker, counter = MemTracker(), FlopCounterMode(display=False)
            tracker.track_external(network, *inputs)
            if kind == "forward":
                network.eval()
                with torch.no_grad(), counter, tracker:
                    network(*inputs)
            elif subject.kind == "model":
                labels = torch.zeros(subject.batch, subject.height, subject.width, dtype=torch.long)
                tracker.track_external(labels)
                with counter, tracker:
                    _loss(network.train()(*inputs), labels).backward()
            else:
                leaves = [x.requires_grad_() for x in inputs]
                with counter, tracker:
                    output = network.train()(*leaves)
                    output.backward(torch.empty_like(output))  # the tracker's hooks refuse autograd.grad
            peak = tracker.get_tracker_snapshot("peak")
            total = sum(of_device["Total"] for of_device in peak.values())
        if kind == "forward_backward" and subject.kind == "model":  # SGD's momentum
            total += sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        costs[kind] = Cost(eager[kind].flop if eager else counter.get_total_flops(), int(total))
    return costs
