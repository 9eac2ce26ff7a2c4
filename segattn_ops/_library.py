"""Loads the compiled libraries and remembers what happened, for `build_config()` and for the one warning."""

import ctypes
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
CPU_CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")  # by what csrc/cpu_capability.cpp returns
HOW_TO_BUILD = "`pip install --no-build-isolation .` in the source tree (needs a C++20 compiler and ninja)"


@dataclass
class Libraries:
    """What is loaded. `missing` has, for a device type without native kernels, the reason."""

    cpu_capability: str | None = None
    cpu_capability_supported: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    build_info: dict = field(default_factory=dict)

    def serves(self, device_type: str) -> bool:
        """Meta tensors have the operators' fake implementations, which come with the schemas."""
        if device_type == "meta":
            return "cpu" not in self.missing
        return device_type in ("cpu", "cuda") and device_type not in self.missing

    def why_not(self, device_type: str) -> str:
        return self.missing.get(device_type, f"there are no native kernels for {device_type} devices")


def _path(name: str) -> Path:
    return PACKAGE / f"{name}.abi3.so"


def _read_build_info() -> dict:
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _choose_cpu_capability(supported: str) -> str:
    """The best built instruction set the processor supports, or the one the environment asks for."""
    built = [name for name in CPU_CAPABILITIES if _path(f"_cpu_{name}").exists()]
    usable = [name for name in built if CPU_CAPABILITIES.index(name) <= CPU_CAPABILITIES.index(supported)]
    wanted = os.environ.get("SEGATTN_CPU_CAPABILITY")
    if wanted is None:
        if not usable:
            raise OSError(f"no CPU library for this processor ({supported}) was built (built: {built})")
        return usable[-1]
    if wanted not in usable:
        raise ValueError(
            f"SEGATTN_CPU_CAPABILITY must be one of {usable}, which were built and this processor can run "
            f"(got {wanted!r})"
        )
    return wanted


def load() -> Libraries:
    """Loads what there is to load; never raises for a missing library, which leaves the reference to serve."""
    state = Libraries(build_info=_read_build_info())
    if not _path("_C").exists():
        reason = f"the compiled library {_path('_C').name} is not in {PACKAGE}; build it with {HOW_TO_BUILD}"
        state.missing = {"cpu": reason, "cuda": reason}
        return state
    try:
        torch.ops.load_library(_path("_C"))
        level = ctypes.CDLL(str(_path("_C"))).segattn_cpu_capability()
        state.cpu_capability_supported = CPU_CAPABILITIES[level]
        state.cpu_capability = _choose_cpu_capability(state.cpu_capability_supported)
        torch.ops.load_library(_path(f"_cpu_{state.cpu_capability}"))
    except OSError as error:
        reason = f"the compiled library did not load ({error}); build it again with {HOW_TO_BUILD}"
        state.missing = {"cpu": reason, "cuda": reason}
        return state
    if reason := _load_cuda(state.build_info):
        state.missing["cuda"] = reason
    return state


def _load_cuda(build_info: dict) -> str | None:
    """Loads the CUDA kernels; the reason if there are none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not _path("_C_cuda").exists():
        reason = build_info.get("cuda", {}).get("reason", "unknown")
        return f"the CUDA kernels were not built ({reason}); build them with FORCE_CUDA=1 {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(_path("_C_cuda"))
    except OSError as error:
        return f"the CUDA library did not load ({error}); build it again with {HOW_TO_BUILD}"
    return None
