"""Predicts the memory of training or inference at its peak, by parts, with and
without attention maps, and says which batch fits a budget. The network runs on
tensors without values: it takes some seconds, and no GPU."""

from __future__ import annotations

import argparse
import json
import math

import torch

from .. import memory
from .._backend import LIBRARIES
from .command_line import Refused, whole

SUMMARY = "predicts the memory of a network: will it fit?"
GIB = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {"backbone": "activations of the backbone", "classifier": "activations of the head"} | {
    "aux_classifier": "activations of the auxiliary head",
    "optimizer": "state of the optimizer",
    "workspace": "temporary, backward pass",
}
OPTIMIZERS = {"sgd": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}


def _budgets(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        found = ()
    if not found or not all(0 < value < math.inf for value in found):
        raise argparse.ArgumentTypeError(f"must be positive numbers of GiB, separated by commas (got {text!r})")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=whole(), required=True, help="of the image")
    parser.add_argument("--width", type=whole(), required=True, help="of the image")
    parser.add_argument("--batch", type=whole(), default=1, help="images (default 1)")
    parser.add_argument(
        "--model",
        choices=memory.MODELS,
        default=memory.MODELS[0],
        metavar="NAME",
        help=f"{', '.join(memory.MODELS)} (default {memory.MODELS[0]})",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="16 bits: autocast (default float32)")
    run = parser.add_mutually_exclusive_group()
    run.add_argument("--train", action="store_true", help="a step of training (default)")
    run.add_argument("--inference", action="store_true", help="a forward pass without gradients")
    parser.add_argument(
        "--attention", choices=("both", "fused", "eager"), default="both", help="eager: with attention maps"
    )
    parser.add_argument("--optimizer", choices=memory.OPTIMIZERS, default="sgd", help="(default sgd, with momentum)")
    parser.add_argument("--classes", type=whole(most=10**5), default=19, help="of the logits (default 19)")
    parser.add_argument("--aux-loss", action="store_true", help="with an auxiliary head")
    parser.add_argument(
        "--output-stride", type=int, choices=(8, 16, 32), help="pixels per position (default 8; dfn: 32)"
    )
    parser.add_argument("--budget", type=_budgets, default=(8, 24, 80), help="GiB of the device (default 8,24,80)")
    parser.add_argument(
        "--headroom",
        type=whole(0, 90),
        default=10,
        metavar="PERCENT",
        help="of the budget for what is not counted (default 10)",
    )
    parser.add_argument("--json", action="store_true", help="all figures, in bytes")


def run(arguments: argparse.Namespace) -> int:
    if arguments.attention != "eager" and not LIBRARIES.serves("cpu"):
        raise Refused(f"--attention eager alone can be counted here: {LIBRARIES.why_not('cpu')}")
    budgets = [(budget, _usable(budget, arguments.headroom)) for budget in arguments.budget]
    options = {"aux_loss": arguments.aux_loss}
    if arguments.output_stride is not None:
        options["output_stride"] = arguments.output_stride
    found = {
        kind: memory.estimate(
            arguments.model,
            arguments.height,
            arguments.width,
            arguments.batch,
            dtype=DTYPES[arguments.dtype],
            train=not arguments.inference,
            fused=kind == "fused",
            optimizer=arguments.optimizer,
            num_classes=arguments.classes,
            **options,
        )
        for kind in (("fused", "eager") if arguments.attention == "both" else (arguments.attention,))
    }
    if arguments.json:
        facts = {
            kind: one.as_dict() | {"largest_batch": {str(budget): one.largest_batch(free) for budget, free in budgets}}
            for kind, one in found.items()
        }
        print(json.dumps(facts, indent=1))
    else:
        print(_page(found, budgets, arguments.headroom))
    return 0


def _usable(budget: float, headroom: int) -> int:
    """Bytes that what is counted may take."""
    usable = budget * GIB * (100 - headroom) / 100
    if not usable < 2**62:
        raise Refused(f"--budget: {budget:g} GiB is more than any device has")
    return int(usable)


def _page(found: dict[str, memory.Estimate], budgets: list[tuple[float, int]], headroom: int) -> str:
    one = next(iter(found.values()))
    images = f"{one.batch} image{'s' * (one.batch > 1)} of {one.height} x {one.width}"
    how = f"{one.dtype} autocast" if one.dtype != "float32" else one.dtype
    what = f"training with {OPTIMIZERS[one.optimizer]}" if one.optimizer else "inference"
    parts = list(dict.fromkeys(name for each in found.values() for name in each.parts))
    order = [name for name in memory.PARTS if name in parts]
    own = [name for name in parts if name not in memory.PARTS]
    at = order.index("attention") if "attention" in order else len(order)
    rows = [
        (NAMES.get(name, name), [each.parts.get(name, 0) for each in found.values()])
        for name in (*order[:at], *own, *order[at:])
    ]
    rows.append(("total", [each.total for each in found.values()]))
    indent = max(len(name) for name, _ in rows) + 2
    lines = [f"{one.model}, {images}, {how},", f"{what}: GiB at the moment of the peak", ""]
    lines.append(" " * indent + "".join(f"{kind:>12}" for kind in found))
    lines += [f"{name:<{indent}}" + "".join(f"{size / GIB:>12.3f}" for size in sizes) for name, sizes in rows]
    lines += ["", f"{'budget':<12}" + "".join(f"{kind:<34}" for kind in found).rstrip()]
    for budget, usable in budgets:
        answers = []
        for each in found.values():
            fits = "fits" if each.total <= usable else "tight" if each.total <= budget * GIB else "does not fit"
            answers.append(f"{fits}, largest batch {each.largest_batch(usable)}")
        lines.append(f"{f'{budget:g} GiB':<12}" + "".join(f"{answer:<34}" for answer in answers).rstrip())
    lines.append("")
    if "eager" in found:
        lines.append("eager: attention as the papers' code computes it, with attention maps.")
    lines += [
        "Not counted: workspaces inside cuDNN and other kernels, memory that the",
        f"allocator cannot use, the CUDA context. {headroom} % of a budget are left for them",
        "(--headroom).",
    ]
    return "\n".join(lines)
