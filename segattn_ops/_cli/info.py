"""Describes this installation: versions, kernels built, loaded and usable, GPUs.
Paste it into bug reports."""

import argparse
import json
import os
import shutil
import subprocess
import textwrap
from typing import Any

import torch

from .._backend import LIBRARIES
from .._build_config import build_config
from .._library import HOW_TO_BUILD
from .._ops import ops
from .._position_engine import VARIABLE

SUMMARY = "describes this installation, for bug reports"
WIDTH = 100
POSITION_ENGINES = {
    "wgmma": "wgmma for 16-bit types with at most 128 channels of query and key, mma.sync otherwise",
    "mma": "mma.sync",
    "simt": "no tensor cores",
}


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees. Not part of build_config(): it initialises CUDA."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        | {"position_engine": position_engine(torch.device("cuda", index))}
        for index, p in enumerate(properties)
    ]


def position_engine(device: torch.device) -> str | None:
    """The engine of position attention on the device in bfloat16 (segattn_ops/_position_engine.py), or why none
    serves; None without the CUDA kernels."""
    if not LIBRARIES.serves("cuda"):
        return None
    try:
        found: str = ops._position_engine(torch.empty(1, 64, 1, dtype=torch.bfloat16, device=device))
    except RuntimeError as error:
        return str(error)
    return found


def driver() -> str | None:
    """The version of the NVIDIA driver, from nvidia-smi; None without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.strip().partition("\n")[0] or None


def describe() -> dict[str, Any]:
    """build_config(), the GPUs and their driver."""
    found = gpus()
    return build_config() | {"torch_cuda": torch.version.cuda, "gpus": found, "driver": driver()}


def _build(facts: dict[str, Any]) -> str:
    if not facts["extension"]:
        return "nothing: without the extension"
    return f"torch {facts['torch_at_build'] or 'unknown'}, {facts['compiler'] or 'unknown compiler'}"


def _cpu(cpu: dict[str, Any]) -> str:
    if not cpu["native"]:
        return f"none: {cpu['why_not']}"
    built = ", ".join(cpu["built"]) or "unknown"
    skipped = "".join(f"; {name} did not load: {reason}" for name, reason in cpu["skipped"].items())
    return f"{cpu['instruction_set']} in use (processor: {cpu['supports']}; built: {built}{skipped})"


def _cuda(cuda: dict[str, Any]) -> str:
    if not cuda["native"]:
        return f"none: {cuda['why_not']}"
    state = "loaded and usable" if cuda["usable"] else f"loaded, not usable: {cuda['why_not']}"
    architectures = ", ".join(f"sm_{name}" for name in cuda["architectures"]) or "unknown architectures"
    toolkit = f" with toolkit {cuda['toolkit']}" if cuda["toolkit"] else ""
    return f"{state} (built for {architectures}{toolkit})"


def _gpu(found: list[dict[str, Any]], driver: str | None) -> str:
    if not found:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "no GPU visible" + (f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else "")
    names = [f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB" for gpu in found]
    count = {name: names.count(name) for name in names}
    listed = "; ".join(f"{many} x {name}" if many > 1 else name for name, many in count.items())
    return listed + (f"; driver {driver}" if driver else "")


def _position_attention(found: list[dict[str, Any]], setting: str) -> str:
    """The engines of the GPUs; empty where nothing is to be said."""
    texts = []
    for gpu in found:
        engine = gpu["position_engine"]
        text = POSITION_ENGINES.get(engine, engine)
        if engine == "mma" and gpu["capability"] == "9.0" and setting == "auto":
            text += (
                "; the library was built without sm_90a, which has faster kernels: build it with "
                f"TORCH_CUDA_ARCH_LIST=9.0 {HOW_TO_BUILD}"
            )
        if text is not None and text not in texts:
            texts.append(text)
    forced = [] if setting == "auto" else [f"{VARIABLE}={setting}"]
    return "; ".join([*texts, *forced])


def page(facts: dict[str, Any]) -> str:
    """The facts of :func:`describe` as aligned lines."""
    lines = {
        "segattn_ops": facts["version"],
        "python": f"{facts['python']}, {facts['platform']}",
        "torch": f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'none'}",
        "built with": _build(facts),
        "CPU kernels": _cpu(facts["cpu"]),
        "CUDA kernels": _cuda(facts["cuda"]),
        "GPU": _gpu(facts["gpus"], facts["driver"]),
    }
    if position := _position_attention(facts["gpus"], facts["cuda"]["position_engine"]):
        lines["position attention"] = position
    if backend := os.environ.get("SEGATTN_BACKEND"):
        lines["SEGATTN_BACKEND"] = backend
    indent = max(map(len, lines)) + 2
    wrapped = [
        textwrap.fill(f"{name:<{indent}}{text}", WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
        for name, text in lines.items()
    ]
    return "\n".join(wrapped)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="all facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    facts = describe()
    print(json.dumps(facts, indent=1) if arguments.json else page(facts))
    return 0
