"""Checks on several processes: a module of checks runs as ``python -m MODULE SHAPE`` in a process of its own, which
imports torch once, forks the ranks, and prints a JSON object, the name of each check -> its error or null."""

import json
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Check = Callable[[DeviceMesh], None]


def run_module(module: str, *arguments: str, timeout: float = 300) -> dict[str, str | None]:
    """For the tests: the errors of a module's checks."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(checks: Callable[[tuple[int, ...]], Mapping[str, Check]], shape: str) -> None:
    """Runs the checks for a mesh, as "3" or "2x2", on so many forked ranks, and prints their errors."""
    sizes = tuple(map(int, shape.split("x")))
    results = fork(prod(sizes), _run, (checks(sizes), sizes))
    print(json.dumps({name: next((e[name] for e in results if e[name]), None) for name in results[0]}))


def _run(checks: Mapping[str, Check], sizes: Sequence[int]) -> dict[str, str | None]:
    mesh = init_device_mesh("cpu", tuple(sizes))
    errors: dict[str, str | None] = {}
    for name, run in checks.items():
        torch.manual_seed(0)
        try:
            run(mesh)
            errors[name] = None
        except Exception:
            errors[name] = f"rank {dist.get_rank()}: {traceback.format_exc()}"
    return errors


def fork(
    ranks: int, function: Callable[..., Any], arguments: Sequence[Any], timeout: float = 60, wait: float = 250
) -> list[Any]:
    """What a function returns on each rank, with gloo. None for a rank that ended without a result.

    timeout: of the process group, in seconds. wait: for the results."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(r, ranks, f"{folder}/rendezvous", timeout, function, arguments, results)
            )
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < ranks and any(p.is_alive() for p in processes):
                try:
                    rank, result = results.get(timeout=0.5)
                    found[rank] = result
                except queue.Empty:
                    wait -= 0.5
                    if wait < 0:
                        break
            while not results.empty():
                rank, result = results.get(timeout=1)
                found[rank] = result
        finally:
            for process in processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
    return [found.get(rank) for rank in range(ranks)]


def _rank(
    rank: int,
    ranks: int,
    rendezvous: str,
    timeout: float,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    results: Any,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    results.put((rank, function(*arguments)))
    results.close()
    results.join_thread()
    os._exit(0)  # without waiting for ranks that are gone
