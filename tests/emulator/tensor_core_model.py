"""The sums of tensor cores in exact arithmetic, one element at a time: the reference for runtime/mma_sum.h.

Sources: P. Xie, Y. Wang, F. Yang, M. Yang, "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores"
(2025), bit-exact on the hardware; M. Fasi, N. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of
NVIDIA tensor cores" (2021) for the A100.
"""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Generation:
    block_bytes: int  # of the contraction, added at once
    fraction_bits: int  # kept below the largest exponent


GENERATIONS = {80: Generation(16, 24), 86: Generation(16, 24), 89: Generation(16, 24), 90: Generation(32, 25)}


def exponent(value: float, lowest: int) -> int:
    """The exponent for a significand in [1, 2), or below 1 for a subnormal number."""
    return max(math.frexp(value)[1] - 1, lowest)


def to_float32(exact: Fraction, towards_zero: bool) -> float:
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    log = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    log -= magnitude < Fraction(2) ** log
    unit = Fraction(2) ** (max(log, -126) - 23)
    units = math.floor(magnitude / unit) if towards_zero else round(magnitude / unit)
    return math.copysign(float(units * unit), exact)


def truncated(a: list[float], b: list[float], c: float, generation: Generation, item_bytes: int, lowest: int) -> float:
    """c + a . b as a tensor core adds; lowest: the lowest exponent of the factors' format."""
    block = generation.block_bytes // item_bytes
    for first in range(0, len(a), block):
        pairs = [(x, y) for x, y in zip(a[first : first + block], b[first : first + block], strict=True) if x * y != 0]
        exponents = [exponent(x, lowest) + exponent(y, lowest) for x, y in pairs]
        largest = max([*exponents, exponent(c, -126) if c else -126])
        unit = Fraction(2) ** (largest - generation.fraction_bits)
        terms = [Fraction(c), *(Fraction(x) * Fraction(y) for x, y in pairs)]
        c = to_float32(sum(math.trunc(term / unit) for term in terms) * unit, towards_zero=True)
    return c


def to_nearest(a: list[float], b: list[float], c: float) -> float:
    """c + a . b, each addition rounded to nearest, in order of the contraction."""
    for x, y in zip(a, b, strict=True):
        c = to_float32(Fraction(c) + Fraction(x) * Fraction(y), towards_zero=False)
    return c
