"""How often a launch executes each block of a kernel's machine code.

The walk follows the branches of some thread blocks, all their threads at once, from the launch's real parameters. It
evaluates only the integer instructions that branches and addresses depend on, and counts the others. What comes from
memory or from floating-point arithmetic is unknown; a branch on it takes the shorter way out, so that counts are lower
bounds there.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np

from . import traffic
from .sass import Function, Instruction

# Where constant bank 0 has the parameters, by architecture from 80 on.
_PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
# Instructions whose results are unknown, because they come from memory, from other threads or from floating point.
_OPAQUE_UNITS = ("tensor", "ldmatrix", "shared", "shuffle", "async", "global", "double", "float", "special")
# Of those units, what integer divisions and the roots of triangular indices are made of; the second outside loops only.
_FLOATS = ("I2F", "I2FP", "F2I", "MUFU", "FADD", "FMUL", "FFMA")
_EVALUATED = ("I2F", "F2I", "BREV", "FLO", "POPC", "MUFU.RCP")
_EVALUATED_ONCE = ("I2FP", "FADD", "FMUL", "FFMA", "MUFU.RSQ", "MUFU.SQRT")

_MOST = 1_000_000  # blocks of code that a warp executes

Value = np.ndarray | None  # None: unknown


def _registers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])U?[RP]\d+\b", text)


@cache
def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d+|T)", operand) is not None


@cache
def _next(register: str, by: int = 1) -> str:
    kind, number = re.fullmatch(r"(U?R)(\d+)", register).groups()
    return f"{kind}{int(number) + by}"


def _pair(register: str) -> list[str]:
    return [register, _next(register)] if re.fullmatch(r"U?R\d+", register) else []


def _width(instruction: Instruction) -> int:
    """Registers of the first operand of a load or of a tensor-core instruction."""
    if instruction.unit == "tensor":
        return 4
    for modifier, registers in ((".128", 4), (".64", 2), ("WIDE", 2), (".4", 4), (".2", 2)):
        if modifier in instruction.opcode:
            return registers
    return 2 if instruction.unit == "double" or instruction.base == "CS2R" or ".F64" in instruction.opcode else 1


@cache
def _predicates_first(operands: tuple[str, ...]) -> int:
    count = 0
    while count < len(operands) and _is_predicate(operands[count]):
        count += 1
    return count


@cache
def destinations(instruction: Instruction) -> list[str]:
    """The registers and predicates that an instruction writes."""
    base, operands = instruction.base, instruction.operands
    stores = ("ST", "STS", "STG", "STSM", "LDGSTS", "RED", "REDG", "BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR")
    if instruction.unit in ("control", "barrier") or base in stores or not operands:
        return []
    if base in ("ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3", "VOTE", "VOTEU", "R2P", "FCHK"):
        if base == "R2P":
            return [f"P{i}" for i in range(7)]
        return _registers(" ".join(operands[:2] if base != "FCHK" else operands[:1]))
    first = _predicates_first(operands)  # LOP3 has its predicate in front of the register
    found = _registers(" ".join(operands[:first]))
    target, rest = operands[first], operands[first + 1 :]
    if re.fullmatch(r"U?R\d+", target):
        found += [_next(target, i) for i in range(_width(instruction))]
    if first == 0 and base in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD", "SHFL"):
        found += _registers(" ".join(rest[: _predicates_first(rest)]))
    return found


def sources(instruction: Instruction) -> list[str]:
    """The registers and predicates that an instruction reads, with a few that it may not."""
    base, operands = instruction.base, instruction.operands
    found = _registers(instruction.guard)
    if instruction.base == "P2R":
        found += [f"P{i}" for i in range(7)]
    for operand in operands:
        registers = _registers(operand)
        found += registers
        if base in ("IMAD", "UIMAD") and re.search(r"WIDE|HI", instruction.opcode):
            found += [_next(r) for r in registers if "P" not in r]
    return found


@cache
def stored(instruction: Instruction) -> list[str]:
    """The registers that a store into shared memory writes, by 4 bytes; none for parts of a word."""
    if re.search(r"\.[US]?(8|16)\b", instruction.opcode):
        return []
    first, width = instruction.operands[1].removesuffix(".reuse"), _width(instruction)
    return [first if first.endswith("RZ") else _next(first, i) for i in range(width)]


@cache
def _constant_offset(operand: str) -> int | None:
    found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand)
    return int(found[1], 16) if found else None


@cache
def _decoded_operand(text: str) -> tuple:
    """The kind of a 32-bit operand, and its register, value, offset or inner operand."""
    text = text.removesuffix(".reuse")
    if text[0] in "-~|":
        return text[0], text[1:].rstrip("|")
    if text[0].isdigit():
        return "immediate", int(text, 0) & 0xFFFFFFFF
    if (offset := _constant_offset(text)) is not None:
        return "constant", offset
    return ("special", text) if text.startswith("SR_") else ("register", text.split(".")[0])


class _SharedMemory:
    """What is known of the shared memory of a thread block, by 4 bytes."""

    WORDS = 60 * 1024

    def __init__(self) -> None:
        self.values = np.zeros(self.WORDS, np.uint32)
        self.known = np.zeros(self.WORDS, bool)

    def _words(self, address: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return (address[mask] >> np.uint64(2)).astype(np.int64) % self.WORDS

    def write(self, address: np.ndarray, mask: np.ndarray, value: Value) -> None:
        words = self._words(address, mask)
        self.known[words] = value is not None
        if value is not None:
            self.values[words] = value[mask]

    def read(self, address: np.ndarray, mask: np.ndarray) -> Value:
        words = self._words(address, mask)
        if not self.known[words].all():
            return None
        result = np.zeros(len(mask), np.uint32)
        result[mask] = self.values[words]
        return result


class _Thread:
    """Values of the threads of a thread block: registers as uint32 arrays, predicates as bool arrays."""

    def __init__(self, function: Function, constants: bytes, grid: int, block: int, number: int) -> None:
        self.warps = -(-block // 32)
        self.lanes = self.warps * 32
        thread = np.arange(self.lanes)
        self.special = {
            "SR_TID.X": thread.astype(np.uint32),
            "SR_CTAID.X": np.full(self.lanes, number, np.uint32),
            "SR_LANEID": (thread % 32).astype(np.uint32),
            "SR_NCTAID.X": np.full(self.lanes, grid, np.uint32),
            "SR_CgaCtaId": np.zeros(self.lanes, np.uint32),
            "SR_SWINHI": np.full(self.lanes, 0x7FFF, np.uint32),  # of generic pointers into shared memory; not null
        }
        self.exists = thread < block
        self.zero = np.zeros(self.lanes, np.uint32)
        self.true = np.ones(self.lanes, bool)
        self.values: dict[str, Value] = {}
        self.same: dict[int, np.ndarray] = {}
        self.shared = _SharedMemory()
        start = _PARAMETERS[function.architecture]
        bank = bytearray(start + len(constants) + 8)
        bank[0:24] = np.array([block, 1, 1, grid, 1, 1], np.uint32).tobytes()
        bank[start : start + len(constants)] = constants
        self.bank = bytes(bank)

    def constant(self, offset: int, size: int) -> np.ndarray:
        return self.full(int.from_bytes(self.bank[offset : offset + size], "little"))

    def full(self, value: int) -> np.ndarray:
        """The same value in every thread. Nobody writes into it."""
        if value not in self.same:
            self.same[value] = np.full(self.lanes, value, np.uint32)
        return self.same[value]

    def register(self, name: str) -> Value:
        if name in ("RZ", "URZ", "SRZ"):
            return self.zero
        return self.values.get(name)

    def predicate(self, operand: str) -> Value:
        name = operand.lstrip("!")
        value = self.true if name in ("PT", "UPT") else self.values.get(name)
        return None if value is None else ~value if operand[0] == "!" else value

    def operand(self, text: str) -> Value:
        """A 32-bit operand, with its sign or complement."""
        kind, content = _decoded_operand(text)
        if kind == "register":
            return self.register(content)
        if kind == "immediate":
            return self.full(content)
        if kind == "constant":
            return self.constant(content, 4)
        if kind == "special":
            return self.special.get(content)
        inner = self.operand(content)
        if inner is None:
            return None
        if kind == "|":
            return np.abs(inner.view(np.int32)).view(np.uint32)
        return ~inner if kind == "~" else (~inner) + np.uint32(1)

    def number(self, text: str) -> Value:
        """A float32 operand."""
        text = text.removesuffix(".reuse")
        sign = -1 if text[0] == "-" else 1
        magnitude = text.lstrip("-+").strip("|")
        if re.fullmatch(r"[\d.]+(e[-+]?\d+)?|INF", magnitude):
            return np.full(self.lanes, sign * float(magnitude), np.float32)
        bits = self.operand(magnitude)
        if bits is None:
            return None
        value = bits.view(np.float32)
        return np.float32(sign) * (np.abs(value) if "|" in text else value)

    def wide(self, text: str) -> Value:
        """A 64-bit operand, the register and the one after it."""
        text = text.removesuffix(".reuse")
        if (offset := _constant_offset(text)) is not None:
            low, high = self.constant(offset, 4), self.constant(offset + 4, 4)
        elif text in ("RZ", "URZ"):
            low = high = self.zero
        elif text[0] in "RU":
            low, high = self.register(text), self.register(_next(text))
        else:
            low, high = self.operand(text), self.zero
        if low is None or high is None:
            return None
        return low.astype(np.uint64) | high.astype(np.uint64) << _32


def _signed(value: np.ndarray) -> np.ndarray:
    return value.view(np.int32).astype(np.int64)


def _compare(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal}.get(
        kind, np.not_equal
    )(a, b)


def _lookup(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    result = a ^ a
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def _evaluate_float(base: str, parts: list[str], target: str, texts: list[str], t: _Thread) -> Value:
    if base in ("I2F", "I2FP"):
        value = t.operand(texts[0])
        return (
            None if value is None else (value if "U32" in parts else _signed(value)).astype(np.float32).view(np.uint32)
        )
    inputs = [t.number(text) for text in texts]
    if any(v is None for v in inputs):
        return None
    with np.errstate(all="ignore"):
        if base == "MUFU":
            results = {"RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "SQRT": np.sqrt}
            result = results[parts[0]](inputs[0])
        elif base == "FFMA":
            result = inputs[0].astype(np.float64) * inputs[1] + inputs[2]
        elif base == "F2I":
            number = np.trunc(np.nan_to_num(inputs[0].astype(np.float64)))
            low, high = (0, 2**32 - 1) if "U32" in parts else (-(2**31), 2**31 - 1)
            return np.clip(number, low, high).astype(np.int64).astype(np.uint32)
        else:
            result = inputs[0] + inputs[1] if base == "FADD" else inputs[0] * inputs[1]
        return result.astype(np.float32).view(np.uint32)


@cache
def _decoded(i: Instruction) -> tuple[str, list[str], str, list[str], list[str], list[str]]:
    """An instruction's opcode without U, its modifiers, the register it writes, the predicates it writes, those it
    reads, and the other operands."""
    first = _predicates_first(i.operands)
    base, parts = i.base.removeprefix("U"), i.opcode.split(".")[1:]
    if first == len(i.operands):
        return base, parts, "", [], [], []
    target, rest, written, read = i.operands[first], list(i.operands[first + 1 :]), list(i.operands[:first]), []
    if first == 0 and base in ("IADD3", "LEA", "IMAD"):
        while rest and _is_predicate(rest[0]):
            written.append(rest.pop(0))
    while rest and _is_predicate(rest[-1]):
        read.insert(0, rest.pop())
    return base, parts, target, written, read, rest


def _evaluate(i: Instruction, t: _Thread) -> list[tuple[str, Value]]:
    """The results of an instruction, by register; raises ValueError for one that is not known here."""
    base, parts, target, outs, conditions, rest = _decoded(i)
    if base in ("ISETP", "PLOP3", "VOTE"):
        return _evaluate_predicate(base, parts, i, t)
    ins = [t.predicate(condition) for condition in conditions]
    if any(p is None for p in ins):
        return [(name, None) for name in destinations(i)]

    def integers() -> list[np.ndarray] | None:
        values = [t.operand(r) for r in rest]
        return None if any(v is None for v in values) else values

    unknown = [(name, None) for name in destinations(i)]
    if base in ("S2R", "S2UR"):
        return [(target, t.special.get(rest[0], t.zero if rest[0][-2:] in (".Y", ".Z") else None))]
    if base == "CS2R":
        return [(target, t.zero), (_next(target), t.zero)] if rest == ["SRZ"] else unknown
    if base in ("LDC", "ULDC"):
        if (offset := _constant_offset(rest[0])) is None:
            return unknown
        if "64" in parts:
            return [(target, t.constant(offset, 4)), (_next(target), t.constant(offset + 4, 4))]
        return [(target, t.constant(offset, 1 if "U8" in parts else 2 if "U16" in parts else 4))]
    if base == "P2R":
        bits = t.zero
        for n in range(7):
            if int(rest[-1], 16) >> n & 1:
                if (p := t.values.get(f"P{n}")) is None:
                    return unknown
                bits = bits | p.astype(np.uint32) << np.uint32(n)
        return [(target, bits)] if not parts else unknown
    if base == "IMAD" and ("WIDE" in parts or "HI" in parts):
        a, b, c = t.operand(rest[0]), t.operand(rest[1]), t.wide(rest[2])
        if a is None or b is None or c is None:
            return unknown
        if "U32" in parts:
            total = a.astype(np.uint64) * b.astype(np.uint64) + c
        else:
            total = (_signed(a) * _signed(b)).view(np.uint64) + c
        high = (total >> _32).astype(np.uint32)
        results = [(target, high)] if "HI" in parts else [(target, total.astype(np.uint32)), (_next(target), high)]
        return results + [(p, total < c) for p in outs]
    if base == "HFMA2":
        high, low = (int(np.float16(float(text)).view(np.uint16)) for text in rest[2:])
        return [(target, t.full(high << 16 | low))]
    if base in _FLOATS:
        return [(target, _evaluate_float(base, parts, target, rest, t))]
    values = integers()
    if values is None:
        return unknown
    if base in ("MOV", "R2UR"):
        return [(target, values[0])]
    if base == "IMAD":
        a, b, c = values
        result = a * b + c
        return [(target, result + ins[0].astype(np.uint32) if "X" in parts and ins else result)]
    if base in ("IADD3", "VIADD", "IADD"):
        # As 64-bit sums, for the carries: -x adds 2^32 - x, which for x = 0 carries.
        total = np.zeros(t.lanes, np.uint64)
        for text, value in zip(rest, values, strict=True):
            total += np.where(value == 0, _MASK + np.uint64(1), value) if text[0] == "-" else value
        if "X" in parts:
            for p in ins:
                total += p.astype(np.uint64)
        carries = [(p, total >> _32 > n) for n, p in enumerate(outs)]
        return [(target, total.astype(np.uint32)), *carries]
    if base == "LEA":
        shift = np.uint64(int(rest[-1], 16))
        a, b = (v.astype(np.uint64) for v in values[:2])
        if "HI" in parts:
            upper = (
                _signed(values[0]).view(np.uint64) & ~_MASK if "SX32" in parts else values[2].astype(np.uint64) << _32
            )
            a = (a | upper) << shift >> _32 if int(shift) else upper >> _32
        else:
            a = a << shift & _MASK
        total = a + b + (ins[0].astype(np.uint64) if "X" in parts and ins else np.uint64(0))
        return [(target, total.astype(np.uint32)), *((p, total > _MASK) for p in outs)]
    if base == "LOP3":
        result = _lookup(int(rest[3], 16), *values[:3])
        return [(target, result), *((p, result != 0) for p in outs)]
    if base == "SHF":
        a, s, c = values[0].astype(np.uint64), values[1].astype(np.uint64), values[2].astype(np.uint64)
        both = c << _32 | a
        if parts[0] == "L":
            shifted = both << s
        else:
            signed = "S32" in parts or "S64" in parts
            shifted = (both.view(np.int64) >> s.astype(np.int64)).view(np.uint64) if signed else both >> s
        shifted = np.where(s > 63, 0, shifted)
        return [(target, (shifted >> _32 if "HI" in parts else shifted).astype(np.uint32))]
    if base == "SEL":
        return [(target, np.where(ins[0], values[0], values[1]))]
    if base in ("VIMNMX", "VIMNMX3", "IMNMX", "VIADDMNMX"):
        if base == "VIADDMNMX":
            values = [values[0] + values[1], values[2]]
        numbers = values if "U32" in parts else [_signed(v) for v in values]
        least, largest = reduce(np.minimum, numbers), reduce(np.maximum, numbers)
        return [(target, np.where(ins[0], least, largest).astype(np.uint32))]
    if base == "IABS":
        return [(target, np.abs(values[0].view(np.int32)).view(np.uint32))]
    if base == "PRMT":
        a, selector, b = values
        if len(set(selector.tolist())) > 1:
            return unknown
        bytes_ = [(v >> np.uint32(8 * k) & np.uint32(255)) for v in (a, b) for k in range(4)]
        result = t.zero
        for k in range(4):
            nibble = int(selector[0]) >> 4 * k & 15
            byte = bytes_[nibble & 7]
            byte = np.where(byte > 127, np.uint32(255), np.uint32(0)) if nibble & 8 else byte
            result = result | byte << np.uint32(8 * k)
        return [(target, result)]
    if base == "BREV":
        bits = np.unpackbits(values[0].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        return [(target, np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.uint32).reshape(-1))]
    if base == "FLO":
        top = np.frexp(values[0].astype(np.float64))[1] - 1  # -1 for 0
        return [(target, (31 - top if "SH" in parts else top).astype(np.int64).astype(np.uint32))]
    if base == "POPC":
        return [(target, np.unpackbits(values[0].view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1).astype(np.uint32))]
    raise ValueError(f"cannot evaluate {i}")


def _evaluate_predicate(base: str, parts: list[str], i: Instruction, t: _Thread) -> list[tuple[str, Value]]:
    unknown = [(name, None) for name in destinations(i)]
    if base == "VOTE":
        value = t.predicate(i.operands[-1])
        if value is None or not _is_predicate(i.operands[0]) or "ANY" not in parts:
            return unknown
        of_warp = value.reshape(t.warps, 32).any(axis=1)
        return [(i.operands[0], np.repeat(of_warp, 32))]
    one, other, *rest = i.operands
    if base == "PLOP3":
        inputs = [t.predicate(p) for p in rest[:3]]
        if any(p is None for p in inputs):
            return unknown
        return [(p, _lookup(int(table, 16), *inputs)) for p, table in ((one, rest[3]), (other, rest[4]))]
    a, b = t.operand(rest[0]), t.operand(rest[1])
    combined = [t.predicate(p) for p in rest[2:]]
    if a is None or b is None or any(p is None for p in combined):
        return unknown
    if "U32" not in parts:
        a, b = _signed(a), _signed(b)
    result = _compare(parts[0], a, b)
    if "EX" in parts:
        equal, low = a == b, combined[1]
        strict = {"LE": "LT", "GE": "GT"}.get(parts[0], parts[0])
        result = (
            result | low
            if parts[0] == "NE"
            else result & low
            if parts[0] == "EQ"
            else (_compare(strict, a, b) | equal & low)
        )
    combine: Callable = np.logical_or if "OR" in parts else np.logical_xor if "XOR" in parts else np.logical_and
    return [(one, combine(result, combined[0])), (other, combine(~result, combined[0]))]


def _needed(function: Function) -> dict[int, list[Instruction]]:
    """For each block the instructions that branches depend on, by the data flow backwards from the branches."""
    needed_in: dict[int, set[str]] = {address: set() for address in function.blocks}
    chosen: dict[int, list[Instruction]] = {address: [] for address in function.blocks}
    in_loops = set().union(*(loop.blocks for loop in function.loops))
    open_ = list(function.blocks)
    while open_:
        address = open_.pop()
        block = function.blocks[address]
        needed = set().union(*(needed_in[s] for s in block.successors))
        picked = []
        for i in reversed(block.instructions):
            if i.base in ("BRA", "EXIT", "BREAK"):
                if ".DIV" not in i.opcode:
                    needed.update(sources(i))
                continue
            written, access = destinations(i), traffic.access(i)
            if needed.isdisjoint(written) and access is None:
                continue
            picked.append(i)
            if not i.guard:
                needed.difference_update(written)
            if access is not None:
                needed.update(_registers(i.guard), *(_address_registers(a) for a in access.addresses))
                if access.predicate:
                    needed.update(_registers(access.predicate))
            if i.base == "STS":
                needed.update(stored(i))
            if not _opaque(i, address in in_loops):
                needed.update(sources(i))
        chosen[address] = picked[::-1]
        if not needed <= needed_in[address]:
            needed_in[address] |= needed
            open_ += function.predecessors[address]
    return chosen


def _address_registers(address: str) -> list[str]:
    found = _registers(address.replace(".64", "").replace(".X", " "))
    return found + [_next(r) for r in found if ".64" in address]


def _address(text: str, t: _Thread) -> Value:
    """The value of "R4.64+0x10", "R4.X4+UR5+0x10" and the like."""
    total = np.zeros(t.lanes, np.uint64)
    for term in re.sub(r"\+-", "-", text).replace("-", "+-").split("+"):
        if not term:
            continue
        if found := re.fullmatch(r"(-?)(0x[0-9a-f]+)", term):
            total = total + np.uint64((-1 if found[1] else 1) * int(found[2], 16) % 2**64)
            continue
        name, _, modifier = term.partition(".")
        value = t.wide(name) if modifier == "64" else t.operand(name)
        if value is None:
            return None
        total = total + value.astype(np.uint64) * np.uint64(int(modifier[1:]) if modifier.startswith("X") else 1)
    return total


@cache
def _is_constant(instruction: Instruction) -> bool:
    """Whether it is ptxas's move of two 16-bit constants, -0 * 0 + them."""
    operands = instruction.operands
    return instruction.base == "HFMA2" and operands[1:3] == ("-RZ", "RZ") and "NAN" not in "".join(operands)


@cache
def _opaque(instruction: Instruction, in_loop: bool) -> bool:
    if instruction.unit not in _OPAQUE_UNITS or _is_constant(instruction):
        return False
    names = {instruction.base, instruction.opcode}
    return names.isdisjoint(_EVALUATED) and (in_loop or names.isdisjoint(_EVALUATED_ONCE))


@dataclass(frozen=True)
class Walk:
    """What the chosen blocks of a launch executed."""

    warps: int
    executions: Counter[int]  # warps that executed a block of the code, by the block's address, every turn again
    unknown_branches: Counter[int]  # the same for branches that depend on data, by the branch's address
    traffic: Counter[str]  # see traffic.Traffic.counts


class Walker:
    """Walks launches of one kernel."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.needed = _needed(function)
        self.distance = self._distances()
        self.in_loops = set().union(*(loop.blocks for loop in function.loops))
        accesses = ((i, traffic.access(i)) for needed in self.needed.values() for i in needed)
        self.accesses = {i: access for i, access in accesses if access is not None}

    def _distances(self) -> dict[int, int]:
        """Instructions on the shortest way from each block to the kernel's end."""
        blocks, predecessors = self.function.blocks, self.function.predecessors
        heap = [(len(b.instructions), a) for a, b in blocks.items() if any(i.base == "EXIT" for i in b.instructions)]
        heapq.heapify(heap)
        found: dict[int, int] = {}
        while heap:
            distance, address = heapq.heappop(heap)
            if address not in found:
                found[address] = distance
                for p in predecessors[address]:
                    heapq.heappush(heap, (distance + len(blocks[p].instructions), p))
        return found

    def walk(self, arguments: bytes, grid: int, block: int, chosen: list[int]) -> Walk:
        """Walks the chosen thread blocks, one after the other: a value that is unknown for some threads is unknown for
        all that are walked together, and those of another block may have a counter in the same register.

        Args:
            arguments: the bytes of the kernel's parameters.
            grid: thread blocks of the launch.
            block: threads of a thread block.
            chosen: the thread blocks to walk.

        Raises:
            RuntimeError: if a thread block does not come to its end.
        """
        walks = [self._walk_block(arguments, grid, block, number) for number in chosen]
        return Walk(
            sum(walk.warps for walk in walks),
            sum((walk.executions for walk in walks), Counter()),
            sum((walk.unknown_branches for walk in walks), Counter()),
            sum((walk.traffic for walk in walks), Counter()),
        )

    def _walk_block(self, arguments: bytes, grid: int, block: int, number: int) -> Walk:
        t = _Thread(self.function, arguments, grid, block, number)
        end = self.function.instructions[-1].address + 16
        at = np.where(t.exists, next(iter(self.function.blocks)), end).astype(np.int64)
        executions: Counter[int] = Counter()
        unknown: Counter[int] = Counter()
        moved = traffic.Traffic()
        steps = 0
        while (address := int(at.min())) < end:
            active = at == address
            warps = int(active.reshape(t.warps, 32).any(axis=1).sum())
            executions[address] += warps
            steps += warps
            if steps > _MOST * t.warps:
                raise RuntimeError(f"{self.function.name}: thread block {number} of {grid} does not end")
            self._execute(address, active, t, moved)
            self._leave(address, active, warps, at, end, t, unknown)
        return Walk(t.warps, executions, unknown, moved.counts())

    def _execute(self, address: int, active: np.ndarray, t: _Thread, moved: traffic.Traffic) -> None:
        all_active = bool(active.all())
        for i in self.needed[address]:
            mask: Value = active
            if i.guard:
                guard = t.predicate(i.guard)
                mask = None if guard is None else active & guard
            where = mask if mask is not None else active
            addresses = self._count_access(i, where, t, moved) if i in self.accesses else []
            if i.base == "LDS" and addresses[0] is not None and destinations(i):
                words = [addresses[0] + np.uint64(4 * n) for n in range(_width(i))]
                whole = re.search(r"\.[US]?(8|16)\b", i.opcode) is None
                results = [
                    (d, t.shared.read(w, where) if whole else None)
                    for d, w in zip(destinations(i), words, strict=False)
                ]
            elif _opaque(i, address in self.in_loops):
                results = [(d, None) for d in destinations(i)]
            else:
                results = _evaluate(i, t)
            for name, value in results:
                if name in ("RZ", "URZ", "PT", "UPT"):
                    continue
                # Behind an unknown guard, registers (of addresses, above all) count as written; predicates are unknown.
                if value is None or (mask is None and "P" in name):
                    t.values[name] = None
                elif all_active and not i.guard:
                    t.values[name] = value
                else:
                    before = t.values.get(name)
                    t.values[name] = np.where(where, value, np.zeros_like(value) if before is None else before)

    def _count_access(self, i: Instruction, mask: np.ndarray, t: _Thread, moved: traffic.Traffic) -> list[Value]:
        """Counts an access, keeps what it stores in shared memory, and returns its addresses."""
        access = self.accesses[i]
        addresses = [_address(a, t) for a in access.addresses]
        if any(a is None for a in addresses):
            moved.unknown += int(mask.reshape(t.warps, 32).any(axis=1).sum())
        read = mask
        if access.predicate and (predicate := t.predicate(access.predicate)) is not None:
            read = mask & predicate
        moved.add(access, addresses, mask, read)
        if i.base in ("STS", "LDGSTS") and addresses[0] is not None:
            registers = stored(i) if i.base == "STS" else []
            values = [t.register(r) for r in registers] or [None] * max(access.bytes // 4, 1)
            for n, value in enumerate(values):
                t.shared.write(addresses[0] + np.uint64(4 * n), mask, value)
        return addresses

    def _leave(
        self, address: int, active: np.ndarray, warps: int, at: np.ndarray, end: int, t: _Thread, unknown: Counter[int]
    ) -> None:
        block = self.function.blocks[address]
        last = block.instructions[-1]
        if last.base in ("EXIT", "RET", "BRA") and ".DIV" not in last.opcode:
            condition = t.predicate(last.guard) if last.guard else t.true
            if last.base == "BRA" and len(last.operands) > 1:
                second = t.predicate(last.operands[0])
                condition = None if condition is None or second is None else condition & second
            target = int(last.operands[-1], 16) if last.base == "BRA" else end
            following = last.address + 16
            if condition is None:
                unknown[last.address] += warps
                far = 1 << 60
                shorter = self.distance.get(target, far) < self.distance.get(following, far)
                at[active] = target if shorter and last.base == "BRA" else following
            else:
                at[active] = np.where(condition[active], target, following)
        else:
            at[active] = last.address + 16
