"""What a warp's memory instructions move: 32-byte sectors of global memory, passes over the banks of shared memory."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .sass import Instruction


@dataclass(frozen=True)
class Access:
    kind: str  # "load", "store", "shared", "matrix" or "async"
    addresses: tuple[str, ...]  # what is between the brackets; "async" has shared memory's first
    bytes: int  # of a thread
    predicate: str = ""  # of an asynchronous copy: without it the copy writes zeros and reads nothing
    lanes: int = 32  # those whose addresses count


def access(instruction: Instruction) -> Access | None:
    """How an instruction accesses memory, None if it does not."""
    base, modifiers = instruction.base, instruction.opcode.split(".")[1:]
    kinds = {"LDG": "load", "STG": "store", "LDS": "shared", "STS": "shared", "LDSM": "matrix", "LDGSTS": "async"}
    if base not in kinds:
        return None
    addresses = []
    for operand in instruction.operands:
        if found := re.fullmatch(r"(?:desc\[\w+\])?\[(.*?)\]", operand):
            addresses.append(found[1])
    width = next((w // 8 for w in (128, 64) if str(w) in modifiers), 4)
    width = 1 if "U8" in modifiers or "S8" in modifiers else 2 if "U16" in modifiers or "S16" in modifiers else width
    if base == "LDSM":
        return Access("matrix", tuple(addresses), 16, lanes=8 * int(modifiers[-1]) if modifiers[-1].isdigit() else 8)
    last = instruction.operands[-1]
    predicate = last if base == "LDGSTS" and re.fullmatch(r"!?U?P\d+", last) else ""
    return Access(kinds[base], tuple(addresses), width, predicate)


def _passes(address: np.ndarray, mask: np.ndarray, size: int) -> int:
    """Passes over 32 banks of 4 bytes. 32 lanes share a pass for up to 4 bytes each, 16 for 8 bytes, 8 for 16."""
    unit = max(size, 4)
    lanes = 128 // unit
    group = (np.arange(len(address)) // lanes)[mask]
    units = (address[mask] // np.uint64(unit)).astype(np.int64)
    if not len(units):
        return 0
    distinct = np.unique(group << 40 | units)
    banks = np.bincount((distinct >> 40) * lanes + distinct % lanes, minlength=len(address))
    return int(banks.reshape(-1, lanes).max(axis=1).sum())


class Traffic:
    """The traffic of a thread block."""

    def __init__(self) -> None:
        self.passes = 0  # over the banks of shared memory, and of L1 for loads and stores (128 bytes each)
        self.unknown = 0  # instructions with an unknown address
        self.loaded: list[np.ndarray] = []  # through L1: distinct sectors
        self.copied = 0  # sectors that asynchronous copies read, past L1
        self.written = 0

    def add(self, of: Access, addresses: list[np.ndarray | None], mask: np.ndarray, read: np.ndarray) -> None:
        """Adds one instruction. An unknown address counts as one without conflicts, contiguous over the warp.

        Args:
            addresses: by thread.
            mask: the threads that execute it.
            read: the threads that read global memory, of an asynchronous copy.
        """
        if of.lanes < 32:
            mask = mask & (np.arange(len(mask)) % 32 < of.lanes)
        ordered = (np.arange(len(mask)) * of.bytes).astype(np.uint64)
        where = [ordered if a is None else a for a in addresses]
        if of.kind in ("shared", "matrix", "async"):
            self.passes += _passes(where[0], mask, of.bytes)
        if of.kind in ("load", "store", "async"):
            sectors = self._sectors(where[-1], read if of.kind == "async" else mask)
            if of.kind == "async":
                self.copied += len(sectors)
                return
            self.passes += -(-len(sectors) // 4)
            if of.kind == "store":
                self.written += len(sectors)
            elif addresses[0] is not None:
                self.loaded.append(np.unique(sectors & np.uint64(2**48 - 1)))
            if len(self.loaded) > 256:
                self.loaded = [np.unique(np.concatenate(self.loaded))]

    @staticmethod
    def _sectors(address: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Distinct sectors of each warp, with the warp's number above bit 48."""
        warp = (np.arange(len(address)) // 32)[mask].astype(np.uint64)
        return np.unique(warp << np.uint64(48) | (address[mask] >> np.uint64(5) & np.uint64(2**48 - 1)))

    def counts(self) -> Counter[str]:
        loaded = len(np.unique(np.concatenate(self.loaded))) if self.loaded else 0
        return Counter(passes=self.passes, unknown=self.unknown, read=self.copied + loaded, written=self.written)
