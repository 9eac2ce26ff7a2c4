"""Measures the peak memory of networks on the CPU beside what ``segattn_ops.memory`` predicts:

    python -m tests.modules.memory_measured [MODEL SIZE BATCH train|inference fused|eager]

Without arguments it prints the table of docs/memory.md. Every row is measured in a process of its own, on Linux: the
peak of the resident set over one step, above what it was before (benchmarks/measure.py), in float32 on one thread.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import torch

from benchmarks import measure
from segattn_ops import memory, models
from segattn_ops.memory import iteration

MIB = 2**20
ROWS = [
    ("danet_resnet50", 128, 2, "train", "fused"),
    ("danet_resnet50", 256, 1, "train", "fused"),
    ("danet_resnet50", 512, 1, "train", "fused"),
    ("danet_resnet50", 512, 1, "train", "eager"),
    ("ccnet_resnet50", 256, 1, "train", "fused"),
    ("ann_resnet50", 256, 1, "train", "fused"),
    ("nonlocal_resnet50", 256, 1, "train", "fused"),
    ("danet_resnet50", 512, 1, "inference", "fused"),
    ("danet_resnet50", 512, 1, "inference", "eager"),
]


def measured(name: str, size: int, batch: int, train: bool, fused: bool) -> int:
    """Bytes of the peak beyond the weights and the optimizer's state."""
    torch.set_num_threads(1)
    measure.return_freed_memory_at_once()
    model = getattr(models, name)(19).train(train)
    with iteration.Attention(fused):
        optimizer = iteration.prepare(model, "sgd") if train else None

        def step(size: int, batch: int) -> None:
            image = torch.randn(batch, 3, size, size)
            if optimizer is None:
                iteration.inference(model, image, torch.float32)
            else:
                target = torch.zeros(batch, size, size, dtype=torch.int64)
                iteration.training(model, optimizer, image, target, iteration.default_loss, torch.float32)

        step(64, 2)  # what the first call sets up
        gc.collect()
        measure.populate_code()
        memory_of_host = measure.HostMemory()
        step(size, batch)
        return memory_of_host.peak()


def predicted(name: str, size: int, batch: int, train: bool, fused: bool) -> int:
    found = memory.estimate(name, size, size, batch, train=train, fused=fused)
    return found.total - found.parts["weights"] - found.parts.get("optimizer", 0)


def in_a_process(*row: object) -> dict[str, int]:
    """Bytes, ``measured`` and ``predicted``."""
    command = [sys.executable, "-m", "tests.modules.memory_measured", *map(str, row)]
    found: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main(arguments: list[str]) -> None:
    if arguments:
        name, size, batch, what, attention = arguments
        call = (name, int(size), int(batch), what == "train", attention == "fused")
        print(json.dumps({"measured": measured(*call), "predicted": predicted(*call)}))
        return
    print("| network | image, batch | | attention | measured, MiB | predicted, MiB | predicted / measured |")
    print("|---|---|---|---|---|---|---|")
    for name, size, batch, what, attention in ROWS:
        found = in_a_process(name, size, batch, what, attention)
        figures = f"{found['measured'] / MIB:.1f} | {found['predicted'] / MIB:.1f}"
        ratio = found["predicted"] / found["measured"]
        print(f"| {name} | {size} x {size}, {batch} | {what} | {attention} | {figures} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
