"""The launches of the operators at a size, and what their thread blocks execute."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ..cuda_resources import short
from . import sass
from .machines import Machine
from .walk import Walker

KEY_CHANNELS, VALUE_CHANNELS = 64, 512
OPERATORS = ("position", "criss_cross", "channel")
WALKED = 3  # thread blocks of a launch, evenly spread


@dataclass(frozen=True)
class Problem:
    operator: str  # of OPERATORS
    height: int
    width: int
    batch: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def positions(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Launch:
    kernel: str
    backward: bool
    grid: int
    threads: int
    arguments: bytes
    mma_flops: int  # of the thread blocks that the emulator ran

    @property
    def title(self) -> str:
        """The kernel's name without its template arguments."""
        return self.kernel.split("<")[0].removesuffix("_kernel")


@dataclass(frozen=True)
class Work:
    """What a launch executes: figures of a thread block, as a mean over those walked."""

    grid: int
    instructions: Counter[str]  # warp instructions by unit
    pipes: Counter[str]  # by pipe
    tensor: Counter[str]  # tensor-core instructions by opcode
    passes: float  # over shared memory and L1
    read: float  # sectors
    written: float
    unknown: float  # part of the executed branches whose direction depends on data

    @property
    def issued(self) -> float:
        return sum(self.instructions.values())

    @property
    def per_mma(self) -> float:
        """Instructions for each tensor-core instruction; 0 without any."""
        mma = self.instructions["tensor"]
        return self.issued / mma if mma else 0.0


def _call(operators, problem: Problem) -> torch.Tensor:
    """Calls an operator's forward on leaves, and returns its output."""

    def features(channels: int) -> torch.Tensor:
        shape = (problem.batch, channels, problem.height, problem.width)
        return torch.zeros(shape, dtype=problem.dtype, requires_grad=True)

    if problem.operator == "channel":
        return operators.channel_self_attention(features(VALUE_CHANNELS), 1.0)[0]
    operator = getattr(operators, f"{problem.operator}_attention")
    return operator(features(KEY_CHANNELS), features(KEY_CHANNELS), features(VALUE_CHANNELS), 1.0)[0]


def record(emulator: ModuleType, problem: Problem, architecture: int, blocks: int = 0) -> list[Launch]:
    """The launches of a problem's forward and backward. Those of position attention are of mma.sync: the walk follows
    one warp at a time, and does not know what the warpgroups of Hopper's kernels wait for (docs/hopper.md).

    Args:
        emulator: the control module that ``tests.emulator.build.load`` returns.
        blocks: how many thread blocks at each end of a launch the emulator runs; negative: all.
    """
    found = []
    emulator.set_blocks_at_ends(blocks)
    emulator.set_device(architecture)
    emulator.reset()
    emulator.set_built_for_sm90a(False)
    try:
        output = _call(torch.ops.segattn_emulated, problem)
        forward = len(emulator.report())
        output.backward(torch.ones_like(output))
        for n, report in enumerate(emulator.report()):
            threads = report["block"][0] * report["block"][1] * report["block"][2]
            name, grid = short(report["kernel"]), report["grid"][0]
            found.append(Launch(name, n >= forward, grid, threads, report["arguments"], report["mma_flops"]))
    finally:
        emulator.set_blocks_at_ends(-1)
        emulator.set_built_for_sm90a(True)
    return found


def spread(grid: int, chosen: int = WALKED) -> list[int]:
    """Evenly spread thread blocks."""
    chosen = min(chosen, grid)
    return [(2 * i + 1) * grid // (2 * chosen) for i in range(chosen)]


def work(launch: Launch, walker: Walker, chosen: list[int]) -> Work:
    """Walks some thread blocks of a launch."""
    walk = walker.walk(launch.arguments, launch.grid, launch.threads, chosen)
    part = 1 / len(chosen)
    instructions, pipes, tensor = Counter(), Counter(), Counter()
    branches = 0
    for address, times in walk.executions.items():
        for i in walker.function.blocks[address].instructions:
            instructions[i.unit] += times * part
            pipes[i.pipe] += times * part
            branches += times * (i.base == "BRA")
            if i.unit == "tensor":
                tensor[i.opcode] += times * part
    moved = walk.traffic
    unknown = sum(walk.unknown_branches.values()) / max(branches, 1)
    return Work(
        launch.grid,
        instructions,
        pipes,
        tensor,
        moved["passes"] * part,
        moved["read"] * part,
        moved["written"] * part,
        unknown,
    )


def cycles(of: Work, machine: Machine) -> dict[str, float]:
    """Cycles for which a thread block occupies each part of a multiprocessor."""
    return {
        "tensor": sum(n * machine.tensor_cycles(opcode) for opcode, n in of.tensor.items()) / 4,
        "issue": of.issued / 4,
        "alu": of.pipes["alu"] * 32 / machine.integer_lanes,
        "fma": of.pipes["fma"] * 32 / machine.float_lanes,
        "special": of.instructions["special"] * 32 / 16,
        "shared": of.passes,
    }


# Elements of its inputs that a launch reads at least once, by position. Other kernels stream their
# operands, and the sectors that the walk counts are the least bytes.
_INPUTS = {
    "weighted_sum_kernel": 2 * KEY_CHANNELS + VALUE_CHANNELS,
    "query_key_gradient_kernel": 2 * KEY_CHANNELS + 2 * VALUE_CHANNELS,
    "line_": 2 * KEY_CHANNELS + VALUE_CHANNELS,
    "gram_kernel": VALUE_CHANNELS,
    "channel_combine_kernel": VALUE_CHANNELS,
}


def seconds(of: Work, launch: Launch, problem: Problem, machine: Machine) -> dict[str, float]:
    """The time that each part of a GPU needs for a launch at least; the largest is the launch's bound.

    One multiprocessor executes at least ceil(grid / multiprocessors) thread blocks.
    """
    turns = -(-of.grid // machine.multiprocessors)
    found = {part: n * turns / (machine.clock_ghz * 1e9) for part, n in cycles(of, machine).items()}
    sectors = (of.read + of.written) * of.grid
    found["L2"] = sectors * 32 / (machine.l2_tbs * 1e12)
    read = of.read * of.grid * 32
    for name, elements in _INPUTS.items():
        if launch.kernel.startswith(name):
            read = min(read, elements * problem.positions * problem.batch * problem.dtype.itemsize)
    found["memory"] = (read + of.written * of.grid * 32) / (machine.memory_tbs * 1e12)
    return found


class Walkers:
    """Walkers of the kernels of some compiled files, each built when it is first needed."""

    def __init__(self, files: list[Path]) -> None:
        self.places = {key: (file, mangled) for file in files for key, mangled in sass.kernels(file).items()}
        self.built: dict[tuple[int, str], Walker] = {}

    def of(self, architecture: int, kernel: str) -> Walker:
        key = (architecture, kernel)
        if key not in self.built:
            file, mangled = self.places[key]
            function = sass.read(file, architecture, [mangled])[0]  # a library can hold a template's code twice
            self.built[key] = Walker(function)
        return self.built[key]
