"""Ranks that raise, end or stall between the messages of an op: ``python -m tests.distributed.fault_checks`` prints
what became of the others."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from segattn_ops import distributed
from segattn_ops.distributed import _parts

from .processes import fork

RANKS = 3
TIMEOUT = 8.0  # of the process group, in seconds
OPS: dict[str, Callable[..., Tensor]] = {
    "channel": lambda q, k, v, mesh: distributed.channel_attention(q, k, v, mesh=mesh),
    "ring": lambda *t, mesh: distributed.position_attention(*t, mesh=mesh, method="ring"),
    "criss-cross": lambda *t, mesh: distributed.criss_cross_attention(*t, mesh=mesh),
}


def raises(*arguments: Any) -> None:
    raise MemoryError("of this rank alone")


def ends(*arguments: Any) -> None:
    os._exit(1)


def stalls(*arguments: Any) -> None:
    time.sleep(1.5 * TIMEOUT)


FAULTS = {"raises": raises, "ends": ends, "stalls": stalls}
PASSES = ("forward", "backward")


def rank(op: str, fault: str, where: str) -> str:
    """The error of a rank. The last rank has the fault after its first messages."""
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = [torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    OPS[op](*tensors, mesh=mesh).sum().backward()  # connects all ranks
    faulty = dist.get_rank() == RANKS - 1
    try:
        output = _with_fault(faulty and where == "forward", "forward", fault, lambda: OPS[op](*tensors, mesh=mesh))
        _with_fault(faulty and where == "backward", "backward", fault, lambda: output.sum().backward())
    except (RuntimeError, MemoryError) as error:
        try:
            OPS[op](*tensors, mesh=mesh)
        except RuntimeError as later:
            return f"{error}\n{later}"
        return f"{error}\nno error in a later call"
    return "no error"


def order(op: str) -> str:
    """The error of a rank where the last one goes backward through two results in another order."""
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = [torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    outputs = [OPS[op](*tensors, mesh=mesh) for _ in range(2)]
    if dist.get_rank() == RANKS - 1:
        outputs.reverse()
    try:
        for output in outputs:
            output.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def _with_fault(faulty: bool, name: str, fault: str, action: Callable[[], Any]) -> Any:
    original = getattr(_parts, name)

    def once(*arguments: Any) -> Any:
        setattr(_parts, name, original)
        FAULTS[fault](*arguments)
        return original(*arguments)

    if faulty:
        setattr(_parts, name, once)
    try:
        return action()
    finally:
        setattr(_parts, name, original)


def main() -> None:
    cases = [(op, fault, where) for op in ("ring", "criss-cross") for fault in FAULTS for where in PASSES]
    with ThreadPoolExecutor(4) as pool:  # they mostly wait
        results = pool.map(lambda case: fork(RANKS, rank, case, TIMEOUT, wait=150), cases)
        orders = pool.map(lambda op: fork(RANKS, order, (op,), TIMEOUT, wait=150), OPS)
        found = {" ".join(case): result for case, result in zip(cases, results, strict=True)}
        print(json.dumps({"faults": found, "orders": dict(zip(OPS, orders, strict=True))}))


if __name__ == "__main__":
    main()
