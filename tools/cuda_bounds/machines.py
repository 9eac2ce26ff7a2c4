"""The GPUs of the bounds, and the rates of their units."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    name: str
    architecture: int  # of the machine code that is counted
    multiprocessors: int
    clock_ghz: float  # the boost clock of the published peaks
    memory_tbs: float
    l2_tbs: float
    tensor_flop: float  # a cycle and multiprocessor, mma.sync of 16-bit elements into float32; TF32 half of it
    float_lanes: int  # of a multiprocessor
    integer_lanes: int
    source: str

    def tensor_cycles(self, opcode: str) -> float:
        """Cycles in which a tensor-core instruction occupies the tensor core of a sub-partition."""
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[opcode.split(".")[1]]
        rate = self.tensor_flop * (0.5 if "TF32" in opcode else 1)
        return 2 * m * n * k / (rate / 4)


# mma.sync reaches this part of Hopper's peak; the rest is wgmma's.
HOPPER_MMA = 0.62

MACHINES = (
    Machine("A100", 80, 108, 1.41, 2.039, 7.2, 2048, 64, 64, "312 TFLOP/s; L2 5120 B a cycle: A100 white paper"),
    Machine("L40S", 86, 142, 2.52, 0.864, 5.0, 1024, 128, 64, "362 TFLOP/s: L40S data sheet; L2 estimated"),
    Machine(
        "H100",
        90,
        132,
        1.83,
        3.35,
        5.5,
        4096 * HOPPER_MMA,
        128,
        64,
        "989 TFLOP/s: H100 data sheet; L2 estimated",
    ),
    Machine(
        "H200",
        90,
        132,
        1.83,
        4.8,
        5.5,
        4096 * HOPPER_MMA,
        128,
        64,
        "989 TFLOP/s: H200 data sheet; L2 estimated",
    ),
    Machine(
        "RTX 5090", 86, 170, 2.407, 1.792, 6.6, 512, 128, 128, "209.5 TFLOP/s: Blackwell white paper; L2 estimated"
    ),
)
