"""Loads the compiled libraries; the outcome is kept for `build_config()` and for the warning of `_backend`."""

import ctypes
import json
import mmap
import os
import struct
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._files import shown
from ._ops import ops

PACKAGE = Path(__file__).parent
CPU_CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")  # indexed by csrc/cpu_capability.cpp's result
_SYMBOL = b"segattn_cpu_capability"  # that the library with the schemas exports, and no other
_NAMES = 1 << 20  # bytes at the start of a library, where its exported names are; a CUDA library may have gigabytes
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
    skipped: dict[str, str] = field(default_factory=dict)  # instruction set -> why its library does not serve

    def load(self, name: str) -> None:
        path = _path(name)
        _require_library(path, schemas=name == "_C")
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise error.__cause__ or error from None  # the loader's own says what is wrong
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


def _require_library(path: Path, schemas: bool) -> None:
    """Raises OSError for a file whose loading would end the process instead of raising: one that is cut off (its pages
    are missing when they are touched), and one that registers the operators a second time. Also for a library of
    something else.

    Args:
        schemas: the library is that of the schemas, or one of kernels.
    """
    with open(path, "rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
        if not sys.platform.startswith("linux"):
            return  # another format; the loader of the system judges it
        if len(header) < 64 or not header.startswith(b"\x7fELF"):
            raise OSError(f"{path} is no library: it has {size} bytes and begins {header[:8]!r}")
        with open("/proc/self/exe", "rb") as program:
            own = program.read(20)
        if (header[4:6], header[18:20]) != (own[4:6], own[18:20]):
            machines = [int.from_bytes(one[18:20], "little") for one in (header, own)]
            raise OSError(f"{path} is of another architecture: ELF machine {machines[0]}, this Python's {machines[1]}")
        if header[4:6] != b"\2\1":
            return  # 32 bits or big-endian, as this Python is
        programs, sections = struct.unpack_from("<2Q", header, 32)
        each, count, section_each, section_count = struct.unpack_from("<4H", header, 54)
        ends = [programs + each * count, sections + section_each * section_count]
        if each == 56 and ends[0] <= size:
            file.seek(programs)
            table = file.read(each * count)
            ends += [sum(struct.unpack_from("<Q16xQ", table, at + 8)) for at in range(0, each * count, each)]
        if each != 56 or max(ends) > size:
            raise OSError(f"{path} is cut off: it has {size} bytes of {max(ends)}; perhaps its build was interrupted")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(ops.name.encode()) < 0 or (content.find(_SYMBOL, 0, _NAMES) >= 0) != schemas:
                raise OSError(f"{path} is another library than its name says")
    if schemas and hasattr(ops, "position_attention"):
        raise OSError(f"another library in this process has registered the operators {ops.name} before {path}")


def _read_build_info() -> dict[str, Any]:
    """The record of the build; empty where it is missing, and with a warning where it cannot be read."""
    path = PACKAGE / "_build_info.json"
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text())
        if not isinstance(info, dict) or not isinstance(info.get("cuda", {}), dict):
            raise ValueError("it is no record of a build")
        if not isinstance(info.get("cpu_instruction_sets", []), list):
            raise ValueError("cpu_instruction_sets is no list")
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"segattn_ops: {path} cannot be read ({shown(error)}); build_config() does not know the build, which is "
            f"repeated with {HOW_TO_BUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    return info


def _usable_cpu_capabilities(supported: str, build_info: dict[str, Any]) -> list[str]:
    """The instruction sets of the last build that the processor supports, the best one first, or the one in
    SEGATTN_CPU_CAPABILITY. A library that an earlier build left is not used: its sources may be others."""
    wanted = build_info.get("cpu_instruction_sets", CPU_CAPABILITIES)
    built = [name for name in CPU_CAPABILITIES if name in wanted and _path(f"_cpu_{name}").exists()]
    usable = [name for name in built if CPU_CAPABILITIES.index(name) <= CPU_CAPABILITIES.index(supported)]
    chosen = os.environ.get("SEGATTN_CPU_CAPABILITY")
    if chosen is None:
        if not usable:
            raise OSError(f"no CPU library for this processor ({supported}) was built (built: {built})")
        return usable[::-1]
    if chosen not in usable:
        raise ValueError(
            f"SEGATTN_CPU_CAPABILITY must be one of {usable}, which were built and this processor can run "
            f"(got {chosen!r})"
        )
    return [chosen]


def _load_cpu(state: Libraries, supported: str) -> str:
    """Loads the kernels for the best instruction set whose library is whole, and returns its name.

    Raises:
        OSError: if none loads.
    """
    usable = _usable_cpu_capabilities(supported, state.build_info)
    for name in usable:
        try:
            state.load(f"_cpu_{name}")
        except OSError as error:
            if name == usable[-1]:
                raise
            state.skipped[name] = str(error)
            continue
        if state.skipped:
            reasons = "; ".join(state.skipped.values())
            warnings.warn(
                f"segattn_ops: the CPU kernels for {name} serve, not the faster ones for {', '.join(state.skipped)}, "
                f"whose library did not load ({reasons}); build it again with {HOW_TO_BUILD}",
                RuntimeWarning,
                stacklevel=2,
            )
        return name
    raise OSError("no CPU library was built")


def load() -> Libraries:
    """Loads the compiled libraries. A library that is missing or does not load is no error: the reference serves."""
    state = Libraries(build_info=_read_build_info())
    if not has_extension():
        reason = f"the compiled library {_path('_C').name} is not in {PACKAGE}; build it with {HOW_TO_BUILD}"
        if not state.build_info.get("extension", True):
            why = state.build_info.get("reason", "unknown")
            reason = f"installed without the extension ({why}); build it with {HOW_TO_BUILD}"
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
        state.cpu_capability = _load_cpu(state, supported)
    except (OSError, AttributeError) as error:
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
