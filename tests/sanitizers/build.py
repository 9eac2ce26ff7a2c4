"""Builds the CPU libraries for a tool that watches them, into a copy of the package.

The copy is a folder ``segattn_ops`` with links to the Python files and with libraries of its own, so that nothing in
the package knows of the tools. tests/sanitizers/__main__.py puts it first on the path.
"""

import ctypes
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

from tools.compilers import CSRC, ROOT, build_tools, compiler, locked, ninja_path, output_name, run_ninja

from ..emulator.build import machine

HERE = Path(__file__).parent.resolve()
FAMILIES = ("channel", "criss_cross", "position")
OVERLAY = f"-I{HERE / 'include'}"


@dataclass(frozen=True)
class Variant:
    """Compiler flags, linker flags, and sources that are linked to the kernels."""

    flags: tuple[str, ...]
    link: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()


VARIANTS = {
    "address": Variant(("-fsanitize=address", "-fsanitize-recover=address", OVERLAY), ("-fsanitize=address",)),
    # Not float-divide-by-zero: IEEE 754 defines its result, and the kernels use it. A row without keys is 0 / 0 until
    # it is replaced.
    "undefined": Variant(
        ("-fsanitize=undefined,float-cast-overflow", "-fsanitize-recover=all"), ("-fsanitize=undefined",)
    ),
    "thread": Variant(
        ("-fsanitize=thread", OVERLAY),
        ("-fsanitize=thread", "-Wl,--wrap=torch_parallel_for", "-Wl,--wrap=torch_get_num_threads"),
        (HERE / "thread_pool.cpp",),
    ),
    "memcheck": Variant((OVERLAY,)),  # for Valgrind
}


def _folder(variant: str) -> Path:
    key = hashlib.sha256(f"{machine()}\n{ROOT}".encode()).hexdigest()[:12]
    return ROOT / "build" / "sanitizers" / f"{variant}-{key}"


def _ninja_file(variant: Variant) -> str:
    flags = [*build_tools.LANGUAGE, *build_tools.STABLE_ABI, *build_tools.CPU_WARNINGS, "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer", *variant.flags, f"-I{CSRC}"]
    flags += [f"-isystem {path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    link += ["-ltorch_cpu", "-ltorch", "-lc10", *variant.link]
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {' '.join(flags)} $set -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {' '.join(link)}",
        "",
    ]

    def library(name: str, sources: list[Path], instruction_set: str) -> None:
        objects = [ninja_path(output_name(source, f".{instruction_set}.o")) for source in sources]
        lines.append(f"build {name}: link {' '.join(objects)}")
        for source, built in zip(sources, objects, strict=True):
            if f"build {built}: compile {ninja_path(source)}" not in lines:
                lines.append(f"build {built}: compile {ninja_path(source)}")
                lines.append(f"  set = {' '.join(build_tools.CPU_INSTRUCTION_SETS[instruction_set])}")

    library("segattn_ops/_C.abi3.so", [CSRC / "ops.cpp", CSRC / "cpu_capability.cpp"], "baseline")
    library("faults.so", [HERE / "faults.cpp", *variant.sources], "baseline")
    for name in build_tools.CPU_INSTRUCTION_SETS:
        library(f"segattn_ops/_cpu_{name}.abi3.so", [*sorted((CSRC / "cpu").rglob("*.cpp")), *variant.sources], name)
    for family in FAMILIES:
        sources = [CSRC / "cpu" / "common" / "testing.cpp", *sorted((CSRC / "cpu" / family).rglob("*.cpp"))]
        library(f"{family}/segattn_ops/_cpu_baseline.abi3.so", [*sources, *variant.sources], "baseline")
    return "\n".join([*lines, ""])


def _copy_package(package: Path) -> None:
    """Links to the Python files, and the record of a build without CUDA."""
    package.mkdir(parents=True, exist_ok=True)
    for entry in (ROOT / "segattn_ops").iterdir():
        link = package / entry.name
        if (entry.suffix == ".py" or (entry / "__init__.py").exists()) and not link.is_symlink():
            link.symlink_to(entry)
    info = {
        "extension": True,
        "cpu_instruction_sets": list(build_tools.CPU_INSTRUCTION_SETS),
        "cuda": {"built": False, "reason": "a build of tests/sanitizers", "architectures": []},
    }
    (package / "_build_info.json").write_text(json.dumps(info) + "\n")


def build(variant: str, instruction_set: str = "baseline", family: str | None = None) -> Path:
    """Builds a variant for an instruction set, incrementally, and returns the folder that contains the package. With
    ``family`` only the kernels of that family, for the baseline.

    Raises:
        RuntimeError: with the compiler's output, if the build fails.
    """
    folder = _folder(variant)
    with locked(folder):
        copy = folder if family is None else folder / family
        _copy_package(copy / "segattn_ops")
        schemas = copy / "segattn_ops" / "_C.abi3.so"
        if family is not None and not schemas.is_symlink():
            schemas.symlink_to(folder / "segattn_ops" / "_C.abi3.so")
        kernels = (copy / "segattn_ops" / f"_cpu_{instruction_set}.abi3.so").relative_to(folder)
        run_ninja(folder, _ninja_file(VARIANTS[variant]), "segattn_ops/_C.abi3.so", str(kernels))
    return copy


def build_faults(variant: str) -> Path:
    """The library of faults.cpp."""
    folder = _folder(variant)
    with locked(folder):
        run_ninja(folder, _ninja_file(VARIANTS[variant]), "faults.so")
    return folder / "faults.so"


@functools.cache
def best_instruction_set() -> str:
    """That of this processor, by the package's own rule."""
    folder = _folder("capability")
    source, library = CSRC / "cpu_capability.cpp", folder / "capability.so"
    rule = f"rule link\n  command = {compiler()} -shared -fPIC $in -o $out\nbuild capability.so: link "
    with locked(folder):
        run_ninja(folder, f"{rule}{ninja_path(source)}\n")
    return list(build_tools.CPU_INSTRUCTION_SETS)[ctypes.CDLL(str(library)).segattn_cpu_capability()]


def wanted_instruction_set() -> str:
    return os.environ.get("SEGATTN_CPU_CAPABILITY") or best_instruction_set()
