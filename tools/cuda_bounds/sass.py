"""Machine code as a control-flow graph with its loops, read from cuobjdump."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..compilers import cuobjdump
from ..cuda_resources import readable

# The unit that executes an opcode, by its first part (before the dot). Opcodes that are not listed are "integer".
_UNITS = {
    "tensor": "HMMA IMMA DMMA",
    "ldmatrix": "LDSM STSM MOVM",
    "shared": "LDS STS ATOMS",
    "shuffle": "SHFL",
    "async": "LDGSTS",
    "global": "LDG STG LD ST RED REDG ATOM ATOMG",
    "special": "MUFU F2F F2I I2F POPC FLO BREV FRND",
    "float": "FFMA FADD FMUL FMNMX FSETP FSEL FSET FCHK F2FP I2FP HADD2 HMUL2 HFMA2 HSETP2 HMNMX2",
    "double": "DFMA DADD DMUL DSETP DMNMX",
    "control": "BRA BRX JMP BSSY BSYNC BREAK WARPSYNC ENDCOLLECTIVE EXIT CALL RET NOP YIELD BMOV",
    "barrier": "BAR DEPBAR LDGDEPBAR MEMBAR ERRBAR FENCE SYNCS",
}
UNIT = {opcode: unit for unit, opcodes in _UNITS.items() for opcode in opcodes.split()}
UNITS = (*_UNITS, "uniform", "integer")


@dataclass(frozen=True, eq=False)  # hashed by identity, which is fast
class Instruction:
    address: int
    guard: str  # "", or the predicate of "@P0" or "@!UP1" without the "@"
    opcode: str  # with its modifiers, "HMMA.16816.F32.BF16"
    operands: tuple[str, ...]

    @cached_property
    def pipe(self) -> str:
        """The pipe of arithmetic: "alu" (integers, comparisons, selections), "fma", or "" for another unit."""
        if self.base in ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"):
            return "fma"
        if self.unit in ("integer", "float") and self.base not in ("S2R", "CS2R", "LDC", "FCHK", "P2R", "R2P"):
            return "alu"
        return ""

    @cached_property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @cached_property
    def unit(self) -> str:
        base = self.base
        if base in UNIT:
            return UNIT[base]
        # The uniform datapath: U-prefixed opcodes and the moves to and from it.
        return "uniform" if base[0] == "U" or base in ("R2UR", "S2UR", "LDCU") else "integer"


@dataclass
class Block:
    """Instructions that are executed together."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)

    @property
    def address(self) -> int:
        return self.instructions[0].address


@dataclass
class Loop:
    header: int
    blocks: frozenset[int]
    always: frozenset[int]  # the blocks of every turn
    depth: int = 0
    parent: "Loop | None" = None
    inner: list["Loop"] = field(default_factory=list)

    @property
    def own(self) -> frozenset[int]:
        """The blocks outside the inner loops."""
        return self.blocks.difference(*(loop.blocks for loop in self.inner))


def _target(instruction: Instruction) -> int | None:
    """Where a branch goes, None where it is no branch.

    BRA.DIV leads to the slow path of a warp that has diverged before a warp-wide instruction; converged warps, the only
    ones that this project's kernels have there, never take it.
    """
    if instruction.base != "BRA" or ".DIV" in instruction.opcode:
        return None
    return int(instruction.operands[-1], 16)


def _with_calls_as_branches(instructions: list[Instruction]) -> list[Instruction]:
    """ptxas leaves loops by CALL.REL.NOINC, which pushes no return address: a branch, unless its target returns.

    Calls that do return are divisions and roots of unusual operands; the counts leave them out.
    """
    at = {instruction.address: n for n, instruction in enumerate(instructions)}

    def returns(target: int) -> bool:
        ends = (i.base for i in instructions[at[target] :] if i.base in ("RET", "EXIT") and not i.guard)
        return next(ends, "") == "RET"

    return [
        replace(i, opcode="BRA") if i.base == "CALL" and not returns(int(i.operands[-1], 16)) else i
        for i in instructions
    ]


def _always_converged(instruction: Instruction) -> Instruction:
    """BRA.CONV skips a call that brings a diverged warp together: an unconditional branch for a converged one."""
    return (
        replace(instruction, opcode="BRA", operands=instruction.operands[-1:])
        if instruction.opcode == "BRA.CONV"
        else instruction
    )


class Function:
    """The machine code of one kernel."""

    def __init__(self, name: str, architecture: int, instructions: list[Instruction]) -> None:
        self.name = name
        self.architecture = architecture
        self.instructions = [_always_converged(i) for i in _with_calls_as_branches(instructions)]

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """The blocks reached from the entry, by address."""
        code = self.instructions
        starts = {code[0].address}
        for i, instruction in enumerate(code):
            target = _target(instruction)
            if target is not None:
                starts.add(target)
            if (target is not None or instruction.base in ("EXIT", "RET")) and i + 1 < len(code):
                starts.add(code[i + 1].address)
        blocks: dict[int, Block] = {}
        for instruction in code:
            if instruction.address in starts:
                block = blocks[instruction.address] = Block([])
            block.instructions.append(instruction)
        order = list(blocks)
        for address, following in zip(order, [*order[1:], None], strict=True):
            last = blocks[address].instructions[-1]
            target = _target(last)
            conditional = last.guard != "" or (target is not None and len(last.operands) > 1)
            if target is not None:
                blocks[address].successors.append(target)
            if following is not None and (conditional or (target is None and last.base not in ("EXIT", "RET"))):
                blocks[address].successors.append(following)
        reached = self._reverse_postorder(blocks)
        return {address: blocks[address] for address in sorted(reached)}

    @staticmethod
    def _reverse_postorder(blocks: dict[int, Block]) -> list[int]:
        entry = next(iter(blocks))
        seen, order, stack = {entry}, [], [(entry, iter(blocks[entry].successors))]
        while stack:
            address, rest = stack[-1]
            for successor in rest:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(blocks[successor].successors)))
                    break
            else:
                order.append(address)
                stack.pop()
        return order[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {address: [] for address in self.blocks}
        for address, block in self.blocks.items():
            for successor in block.successors:
                found[successor].append(address)
        return found

    @cached_property
    def _dominators(self) -> dict[int, int]:
        """The immediate dominator of each block (Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm)."""
        order = self._reverse_postorder(self.blocks)
        number = {address: i for i, address in enumerate(order)}
        dominator = {order[0]: order[0]}
        changed = True
        while changed:
            changed = False
            for address in order[1:]:
                known = [p for p in self.predecessors[address] if p in dominator]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        if number[new] > number[other]:
                            new = dominator[new]
                        else:
                            other = dominator[other]
                if dominator.get(address) != new:
                    dominator[address] = new
                    changed = True
        return dominator

    def _dominating(self, address: int) -> Iterator[int]:
        while True:
            yield address
            if self._dominators[address] == address:
                return
            address = self._dominators[address]

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, outer ones first."""
        latches: dict[int, list[int]] = {}
        for address, block in self.blocks.items():
            for successor in block.successors:
                if successor in self._dominating(address):
                    latches.setdefault(successor, []).append(address)
        loops = []
        for header, ends in latches.items():
            members, open_ = {header}, list(ends)
            while open_:
                address = open_.pop()
                if address not in members:
                    members.add(address)
                    open_ += self.predecessors[address]
            always = members.intersection(*(set(self._dominating(end)) for end in ends))
            loops.append(Loop(header, frozenset(members), frozenset(always)))
        loops.sort(key=lambda loop: (-len(loop.blocks), loop.header))
        for i, loop in enumerate(loops):
            around = [outer for outer in loops[:i] if loop.blocks < outer.blocks]
            if around:
                loop.parent = around[-1]
                loop.depth = loop.parent.depth + 1
                loop.parent.inner.append(loop)
        return sorted(loops, key=lambda loop: loop.header)

    def count(self, blocks: frozenset[int]) -> Counter[str]:
        """Instructions by unit."""
        return Counter(i.unit for address in blocks for i in self.blocks[address].instructions)


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def parse(text: str) -> list[Function]:
    """The functions in the output of ``cuobjdump -sass``."""
    functions = []
    for part in re.split(r"code for sm_", text)[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        for body in part.split("Function : ")[1:]:
            name, _, rest = body.partition("\n")
            instructions = []
            for line in rest.splitlines():
                if found := _INSTRUCTION.match(line):
                    address, guard, opcode, operands = found.groups()
                    parts = tuple(o.strip() for o in operands.split(",")) if operands else ()
                    instructions.append(Instruction(int(address, 16), guard or "", opcode, parts))
            functions.append(Function(name.strip(), architecture, instructions))
    names = readable(sorted({f.name for f in functions}))
    for function in functions:
        function.name = names[function.name]
    return functions


def _dump(file: Path, architecture: int | None, *options: str) -> str:
    chosen = () if architecture is None else ("-arch", f"sm_{architecture}")
    return subprocess.run(
        [cuobjdump(), *chosen, *options, str(file)], capture_output=True, text=True, check=True
    ).stdout


def kernels(file: Path) -> dict[tuple[int, str], str]:
    """The mangled names of a file's kernels, by architecture and readable name."""
    found, usage = [], _dump(file, None, "-res-usage")
    if "arch = sm_" not in usage:  # of a cubin, whose architecture is printed with the code alone
        usage = f"arch = {re.search(r'code for (sm_[0-9]+)', _dump(file, None, '-sass'))[1]}\n{usage}"
    for part in re.split(r"^arch = sm_", usage, flags=re.MULTILINE)[1:]:
        found += [(int(re.match(r"\d+", part)[0]), name) for name in re.findall(r"Function (\S+):", part)]
    names = readable(sorted({mangled for _, mangled in found}))
    return {(architecture, names[mangled]): mangled for architecture, mangled in found}


def read(file: Path, architecture: int | None = None, mangled: list[str] | None = None) -> list[Function]:
    """The kernels of a cubin, a fat binary or a shared library.

    Args:
        architecture: 90 for sm_90; None for all in the file.
        mangled: the mangled names of the kernels to read, None for all.
    """
    return parse(_dump(file, architecture, "-sass", *(() if mangled is None else ("-fun", ",".join(mangled)))))
