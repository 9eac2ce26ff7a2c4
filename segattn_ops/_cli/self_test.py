"""Computes every op, forward and backward, in every dtype, at odd shapes, on this
machine's devices, and compares the results with the definitions in float64.
Prints a description of this installation, a table and a verdict, for bug
reports; the exit status is 1 if a result is wrong. It takes less than a minute."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _backend
from .._selection import selected
from . import info
from .command_line import device
from .self_test_cases import CASES, Case, Failure, check

SUMMARY = "compares every op with its definition on this machine's devices"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAILURES = 10  # that are printed


@dataclass
class Results:
    """Of one device.

    Attributes:
        device: its name.
        served_by: the kernels in use, or why the reference serves.
        native: whether kernels serve.
        worst: op -> dtype -> the largest error as a share of what is allowed.
        count: results that were compared.
        failures: what is wrong.
    """

    device: str
    served_by: str
    native: bool
    worst: dict[str, dict[str, float]] = field(default_factory=dict)
    count: int = 0
    failures: list[Failure] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, help="cpu, cuda or cuda:N (default: the CPU, and a GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="all figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    devices = [arguments.device] if arguments.device else [torch.device("cpu")]
    if not arguments.device and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    facts = info.describe()
    if not arguments.json:
        print(info.page(facts), flush=True)
    results = [_test(on) for on in devices]
    failed = any(one.failures for one in results)
    if arguments.json:
        tested = [vars(one) | {"failures": [str(failure) for failure in one.failures]} for one in results]
        print(json.dumps({"passed": not failed, "devices": tested, "installation": facts}, indent=1))
    else:
        print("\n".join(line for one in results for line in _table(one)))
        print(f"\n{_verdict(results)}")
    return int(failed)


def _served_by(on: torch.device) -> tuple[str, bool]:
    if selected() == "reference":
        return "the plain PyTorch reference, which is selected (SEGATTN_BACKEND)", False
    if not _backend.LIBRARIES.serves(on.type):
        return f"the plain PyTorch reference: {_backend.LIBRARIES.why_not(on.type)}", False
    if on.type == "cpu":
        return f"{_backend.LIBRARIES.cpu_capability} kernels", True
    return f"CUDA kernels, {torch.cuda.get_device_name(on)}", True


def _test(on: torch.device) -> Results:
    results = Results(str(on), *_served_by(on))
    for case in CASES:
        for dtype in DTYPES:
            if dtype in case.dtypes:
                _add(results, case, dtype, on)
    return results


def _add(results: Results, case: Case, dtype: torch.dtype, on: torch.device) -> None:
    errors, failures = check(case, dtype, on)
    name = str(dtype).removeprefix("torch.")
    of_op = results.worst.setdefault(case.op, {})
    of_op[name] = max([of_op.get(name, 0.0), *errors])
    results.count += len(errors)
    results.failures += failures


def _table(results: Results) -> list[str]:
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    failed = {(failure.op, failure.dtype) for failure in results.failures}
    lines = [
        "",
        f"{results.device}: {results.served_by}",
        f"{'error / allowed':<34}" + "".join(f"{n:>10}" for n in names),
    ]
    for op, worst in results.worst.items():
        cells = ("FAILED" if (op, n) in failed else f"{worst[n]:.2f}" if n in worst else "-" for n in names)
        lines.append(f"{op:<34}" + "".join(f"{cell:>10}" for cell in cells))
    lines += [str(failure) for failure in results.failures[:FAILURES]]
    if len(results.failures) > FAILURES:
        lines.append(f"and {len(results.failures) - FAILURES} more")
    return lines


def _verdict(results: list[Results]) -> str:
    wrong: list[Any] = [failure for one in results for failure in one.failures]
    count = sum(one.count for one in results)
    if wrong:
        ops = ", ".join(dict.fromkeys(failure.op for failure in wrong))
        return f"FAILED: {len(wrong)} of {count} results are wrong ({ops})"
    where = (f"{one.device} ({one.served_by if one.native else 'the reference: no kernels'})" for one in results)
    return f"passed: {count} results on {', '.join(where)}"
