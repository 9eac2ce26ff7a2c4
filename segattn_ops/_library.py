"""Loads the compiled libraries; the outcome is kept for `build_config()` and for the warning of `_backend`."""

import ctypes
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._ops import ops

PACKAGE = Path(__file__).parent
CPU_CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")  # indexed by csrc/cpu_capability.cpp's result
HOW_TO_BUILD = "`pip install --no-build-isolation .` in the source tree (needs a C++20 compiler and ninja)"


@dataclass
class Libraries:
    """What is loaded, `paths` in this order. `missing` contains the reason for each device type without native
    kernels."""

    cpu_capability: str | None = None
    cpu_capability_supported: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    build_info: dict[str, Any] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)

    def load(self, name: str) -> None:
        path = _path(name)
        torch.ops.load_library(path)
        self.paths.append(path)

    def serves(self, device_type: str) -> bool:
        """Meta tensors are served by the operators' fake implementations, which need only the schemas."""
        if device_type == "meta":
            return "cpu" not in self.missing
        return device_type in ("cpu", "cuda") and device_type not in self.missing

    def why_not(self, device_type: str) -> str:
        return self.missing.get(device_type, f"there are no native kernels for {device_type} devices")


def _path(name: str) -> Path:
    return PACKAGE / f"{name}.abi3.so"


def has_extension() -> bool:
    """Whether the compiled libraries are there; they may still fail to load."""
    return _path("_C").exists() or _linked_into_one()


def _linked_into_one() -> bool:
    """Whether kernel-builder has linked all sources into one library, which its _ops.py has loaded."""
    return not _path("_C").exists() and hasattr(ops, "position_attention")


def _read_build_info() -> dict[str, Any]:
    path = PACKAGE / "_build_info.json"
    info: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return info


def _choose_cpu_capability(supported: str, build_info: dict[str, Any]) -> str:
    """The best instruction set of the last build that the processor supports, or the one in SEGATTN_CPU_CAPABILITY. A
    library that an earlier build left is not used: its sources may be others."""
    wanted = build_info.get("cpu_instruction_sets", CPU_CAPABILITIES)
    built = [name for name in CPU_CAPABILITIES if name in wanted and _path(f"_cpu_{name}").exists()]
    usable = [name for name in built if CPU_CAPABILITIES.index(name) <= CPU_CAPABILITIES.index(supported)]
    chosen = os.environ.get("SEGATTN_CPU_CAPABILITY")
    if chosen is None:
        if not usable:
            raise OSError(f"no CPU library for this processor ({supported}) was built (built: {built})")
        return usable[-1]
    if chosen not in usable:
        raise ValueError(
            f"SEGATTN_CPU_CAPABILITY must be one of {usable}, which were built and this processor can run "
            f"(got {chosen!r})"
        )
    return chosen


def load() -> Libraries:
    """Loads the compiled libraries. A library that is missing or does not load is no error: the reference serves."""
    state = Libraries(build_info=_read_build_info())
    if not has_extension():
        reason = f"the compiled library {_path('_C').name} is not in {PACKAGE}; build it with {HOW_TO_BUILD}"
        if not state.build_info.get("extension", True):
            reason = f"installed without the extension ({state.build_info['reason']}); build it with {HOW_TO_BUILD}"
        elif (PACKAGE.parent / "setup.py").exists():
            reason += "; if that is done, start Python outside the source tree, whose package hides the installed one"
        state.missing = {"cpu": reason, "cuda": reason}
        return state
    if _linked_into_one():
        state.cpu_capability = CPU_CAPABILITIES[0]
        state.paths.append(_path(ops.name))
        if not hasattr(ops, "_set_allow_tf32"):
            state.missing["cuda"] = "the library of this build has no CUDA kernels"
        return state
    try:
        state.load("_C")
        supported = CPU_CAPABILITIES[ctypes.CDLL(str(_path("_C"))).segattn_cpu_capability()]
        state.cpu_capability_supported = supported
        state.cpu_capability = _choose_cpu_capability(supported, state.build_info)
        state.load(f"_cpu_{state.cpu_capability}")
    except OSError as error:
        reason = f"the compiled library did not load ({error}); build it again with {HOW_TO_BUILD}"
        state.missing = {"cpu": reason, "cuda": reason}
        return state
    if why_no_cuda := _load_cuda(state):
        state.missing["cuda"] = why_no_cuda
    return state


def _load_cuda(state: Libraries) -> str | None:
    """Loads the CUDA kernels; returns the reason if there are none. A library that an earlier build left beside one
    without CUDA is not loaded: its sources may be others."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    exists = _path("_C_cuda").exists()
    cuda = state.build_info.get("cuda", {})
    if not cuda.get("built", exists):
        stale = f"; {_path('_C_cuda').name} is left from an earlier build and is not loaded" if exists else ""
        reason = f"the CUDA kernels were not built ({cuda.get('reason', 'unknown')}){stale}"
        return f"{reason}; build them with FORCE_CUDA=1 {HOW_TO_BUILD}"
    try:
        state.load("_C_cuda")
    except OSError as error:
        return f"the CUDA library did not load ({error}); build it again with {HOW_TO_BUILD}"
    return None
