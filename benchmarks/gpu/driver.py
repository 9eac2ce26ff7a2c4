"""Runs one op family's kernels on small odd shapes and compares the results with float64.

compute-sanitizer and ncu run it: ``python -m benchmarks.gpu.driver --op position [--size 9x11] [--dtypes
bfloat16,float32] [--once]``. Exit status 1: a result is wrong; 2: the package's kernels for the device are not loaded.
"""

from __future__ import annotations

import sys

import torch

from .. import command_line, features, rivals, validate
from ..workloads import DTYPES, Workload
from . import native
from .selection import FAMILIES, OURS

SMALL = ((9, 11), (1, 33), (17, 1), (1, 1))


def exercise(workload: Workload, device: torch.device, check: bool, rival: str = "fused") -> None:
    """Runs the native kernels forward and backward; ``check`` compares them with float64 under the tolerance rule."""
    x = torch.randn(workload.batch, workload.channels, workload.height, workload.width, device=device).relu()
    leaves = {name: leaf.requires_grad_() for name, leaf in features.operands(workload, x).items()}
    grad_output = features.grad_output(workload, device=device)
    operands = list(leaves.values())
    with native.selected(rival, workload, device):
        output = rivals.formulation(rival, workload.op)(*operands)
        gradients = torch.autograd.grad(output, operands, grad_output)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a failed launch raises here, not in the comparison
    if not check:
        return
    expected = validate.expected(workload, leaves, grad_output)
    eager = rivals.formulation("eager", workload.op)(*operands)
    eager_gradients = torch.autograd.grad(eager, operands, grad_output)
    eager_errors = validate.errors(workload, leaves, grad_output, expected, eager, eager_gradients)
    found = validate.errors(workload, leaves, grad_output, expected, output, gradients)
    validate.check(workload, rivals.TITLES[rival], found, eager_errors)


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(prog="python -m benchmarks.gpu.driver", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=tuple(FAMILIES), required=True)
    parser.add_argument(
        "--size", type=command_line.size, action="append", help="HxW, repeatable; small odd ones if not given"
    )
    parser.add_argument("--dtypes", type=command_line.names(tuple(DTYPES)), default="bfloat16,float16,float32,float64")
    parser.add_argument("--batch", type=command_line.whole(), default=2)
    parser.add_argument("--channels", type=command_line.whole(), default=40)
    parser.add_argument("--key-channels", type=command_line.whole(), default=12)
    parser.add_argument("--device", type=command_line.device, default="cuda")
    parser.add_argument("--once", action="store_true", help="no comparison: only the package's kernels")
    arguments = parser.parse_args(argv)
    device = arguments.device
    try:
        native.require_native(device.type)
    except native.NotNative as missing:
        return command_line.fail(parser.prog, missing, 2)
    torch.manual_seed(0)
    wrong = 0
    for dtype in arguments.dtypes:
        for op in FAMILIES[arguments.op]:
            for height, width in arguments.size or SMALL:
                workload = Workload(
                    op, height, width, dtype, arguments.batch, arguments.channels, arguments.key_channels
                )
                # Until a GPU has confirmed wgmma, mma.sync is checked and profiled beside it.
                twice = native.position_engine(workload, device) == "wgmma"
                for rival in OURS if twice else OURS[:1]:
                    label = f"{workload.label}, {rivals.TITLES[rival]}" if twice else workload.label
                    try:
                        exercise(workload, device, not arguments.once, rival)
                    except validate.WrongResult as error:
                        wrong += 1
                        print(f"wrong: {error}", flush=True)
                    else:
                        print(f"{label}: right" if not arguments.once else label, flush=True)
    if wrong:
        print(f"benchmarks.gpu.driver: {wrong} results are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
