"""Compiles the project's CUDA source for the CPU, on top of the emulator, and loads the result.

Each variant has two libraries: the emulator's runtime, a Python module that is never instrumented, and the kernels with
their host code, compiled with the variant's flags. A process can load one variant of the operators, since each
registers them as `segattn_emulated`. The self-tests' kernels register nothing: several variants of them can be loaded.

    python -m tests.emulator.build plain race        # builds without loading
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from tools.compilers import CSRC, ROOT, build_tools, compiler, locked, ninja_path, nvcc, output_name, run_ninja

HERE = Path(__file__).parent.resolve()
FLOAT_HEADERS = ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")


@dataclass(frozen=True)
class Variant:
    """Compiler flags of the kernels with their host code, compiler flags of the runtime, linker flags of both."""

    kernels: tuple[str, ...]
    runtime: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


# Checks whose handlers are in runtime/checks.cpp, which names the source location.
CHECKS = "-fsanitize=alignment,bounds,null,integer-divide-by-zero,shift"
# Keep accesses as in the source: no merging of loads and stores, no scalar replacement of structures (a float4 load
# would become four loads), no vectorization.
ACCESSES_AS_WRITTEN = ("-fno-tree-sra", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-store-merging")

VARIANTS = {
    "plain": Variant(("-O2", CHECKS, "-fno-sanitize-recover=all")),
    "asan": Variant(  # without CHECKS, which the plain build has: they are 30% of the compilation
        ("-O1", "-fsanitize=address", "-fsanitize-recover=address"),
        ("-fsanitize=address", "-fsanitize-recover=address"),
        ("-fsanitize=address",),
    ),
    "race": Variant(("-O2", "-fsanitize=thread", *ACCESSES_AS_WRITTEN), ("-DSEGATTN_EMULATOR_TRACE",)),
    "coverage": Variant(("-O0", "--coverage"), (), ("--coverage",)),
}


def build_folder() -> Path:
    """The folder of all builds: SEGATTN_EMULATOR_BUILD, or build/emulator in the source tree."""
    return Path(os.environ.get("SEGATTN_EMULATOR_BUILD", ROOT / "build" / "emulator"))


@functools.cache
def float_headers() -> Path:
    """The folder of CUDA's cuda_fp16.h and cuda_bf16.h, in the toolkit of nvcc or in pip's nvidia-cuda-runtime.

    Raises:
        FileNotFoundError: neither is installed.
    """
    candidates = []
    if program := nvcc():
        dry_run = subprocess.run([program, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        candidates += [Path(p) for p in re.findall(r'"?-I([^"\s]+)"?', dry_run.stderr + dry_run.stdout)]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "include")
    if (spec := importlib.util.find_spec("nvidia")) is not None:
        for folder in spec.submodule_search_locations or ():
            candidates += sorted(Path(folder).glob("*/include"))
    for candidate in candidates:
        if all((candidate / name).exists() for name in FLOAT_HEADERS):
            return candidate.resolve()
    raise FileNotFoundError(
        "the emulator needs CUDA's cuda_fp16.h and cuda_bf16.h: install the CUDA toolkit, or `pip install "
        "nvidia-cuda-runtime` (which a CUDA build of torch brings along)"
    )


@functools.cache
def machine() -> str:
    """The inputs of the object files besides the sources: compiler, torch, Python, processor."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:.*$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    return "\n".join([version, torch.__version__, sys.version, platform.machine(), flags[0] if flags else ""])


def _cuda_headers(folder: Path) -> Path:
    """A folder with copies of CUDA's float headers, so that no other header of CUDA can be included."""
    copies = folder / "cuda_headers"
    copies.mkdir(exist_ok=True)
    for name in FLOAT_HEADERS:
        copy, original = copies / name, (float_headers() / name).read_bytes()
        if not copy.exists() or copy.read_bytes() != original:
            copy.write_bytes(original)
    return copies


@dataclass(frozen=True)
class Library:
    """A shared library; `extends` is the library it links to."""

    name: str
    sources: tuple[Path, ...]
    cflags: tuple[str, ...]
    ldflags: tuple[str, ...]
    extends: str | None = None


def _libraries(variant_name: str) -> list[Library]:
    variant = VARIANTS[variant_name]
    module = "-DTORCH_EXTENSION_NAME={}"
    runtime = Library(
        f"emulator_runtime_{variant_name}",
        tuple(sorted((HERE / "runtime").glob("*.cpp"))),
        ("-O3", "-march=native", "-fvisibility-inlines-hidden", "-fno-semantic-interposition", *variant.runtime),
        ("-ldl", *variant.link),
    )
    # A separate library from pybind11: all thread-local storage of a kernel library counts as static shared memory.
    selftest_kernels = Library(
        f"emulator_selftest_kernels_{variant_name}",
        tuple(sorted(HERE.glob("selftest_*.cu"))),
        variant.kernels,
        variant.link,
        extends=runtime.name,
    )
    selftest = Library(
        f"emulator_selftest_{variant_name}",
        (HERE / "selftest_module.cpp",),
        variant.kernels,
        variant.link,
        extends=selftest_kernels.name,
    )
    kernels = Library(
        f"segattn_emulated_{variant_name}",
        (CSRC / "ops.cpp", *sorted((CSRC / "cuda").rglob("*.cu"))),
        (
            *variant.kernels,
            "-DSEGATTN_NAMESPACE=segattn_emulated",
            "-DSEGATTN_DISPATCH_KEY=CPU",
            build_tools.SM90A_DEFINE,
            *build_tools.STABLE_ABI,
        ),
        ("-ltorch_cpu", "-ltorch", "-lc10", *variant.link),
        extends=runtime.name,
    )
    libraries = (runtime, selftest_kernels, selftest, kernels)
    return [replace(library, cflags=(*library.cflags, module.format(library.name))) for library in libraries]


def _ninja_file(variant_name: str, folder: Path) -> str:
    ours = [HERE / "include", CSRC]
    others = [_cuda_headers(folder), *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    system = [f"-I{path}" for path in ours] + [f"-isystem {path}" for path in others]
    # -fno-strict-aliasing: nvcc also lets a kernel access memory through pointers of different types.
    common = [
        *build_tools.LANGUAGE,
        "-fPIC",
        "-g1",
        "-fno-canonical-system-headers",
        "-fno-gnu-unique",
        "-fno-strict-aliasing",
    ]
    common += ["-Wall", "-Wno-unknown-pragmas", "-DSEGATTN_EMULATED"]
    library_paths = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    lines = [
        f"cxx = {compiler()}",
        f"common = {' '.join([*common, *system])}",
        f"libraries = {' '.join(library_paths)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $common $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out -Wl,-rpath,'$$ORIGIN' $libraries $flags",
        "",
    ]
    for library in _libraries(variant_name):
        objects = []
        for source in library.sources:
            objects.append(ninja_path(output_name(source, f".{library.name}.o")))
            lines += [f"build {objects[-1]}: compile {ninja_path(source)}", f"  flags = {' '.join(library.cflags)}"]
        base = f"{library.extends}.so" if library.extends else ""
        lines += [
            f"build {library.name}.so: link {' '.join(objects)} {base}",
            f"  flags = {' '.join(library.ldflags)}",
            f"build {library.name}: phony {library.name}.so",
            "",
        ]
    return "\n".join(lines)


def _folder(variant_name: str) -> Path:
    key = hashlib.sha256("\n".join([machine(), str(ROOT), str(float_headers())]).encode()).hexdigest()[:12]
    return build_folder() / f"{variant_name}-{key}"


def build(variant_name: str, *names: str) -> Path:
    """Builds libraries of a variant ("runtime", "selftest", "kernels"; all of them without names), incrementally, and
    returns their folder. MAX_JOBS limits the parallel compilers.

    Raises:
        RuntimeError: with the compiler's output, if the build fails.
    """
    folder = _folder(variant_name)
    targets = [library_name(variant_name, name) for name in names]
    with locked(folder):
        printed = run_ninja(folder, _ninja_file(variant_name, folder), *targets)
    if os.environ.get("SEGATTN_EMULATOR_VERBOSE"):
        print(printed)
    return folder


def library_name(variant_name: str, name: str) -> str:
    prefix = {"runtime": "emulator_runtime", "selftest": "emulator_selftest", "kernels": "segattn_emulated"}[name]
    return f"{prefix}_{variant_name}"


@functools.cache
def _module(variant_name: str, name: str) -> ModuleType:
    module_name = library_name(variant_name, name)
    path = build(variant_name, name) / f"{module_name}.so"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runtime(variant_name: str) -> ModuleType:
    """The control module (runtime/module.cpp): reset(), report(), set_seed(), set_device()."""
    return _module(variant_name, "runtime")


def selftest(variant_name: str) -> ModuleType:
    """The module with the kernels of tests/tools/test_emulator.py."""
    runtime(variant_name)
    return _module(variant_name, "selftest")


@functools.cache
def load(variant_name: str) -> ModuleType:
    """Builds a variant, registers the operators of `segattn_emulated` with their fakes and autograd, and returns the
    control module. A process can load only one variant."""
    import segattn_ops
    from segattn_ops import _position_engine

    control = runtime(variant_name)
    torch.ops.load_library(build(variant_name, "kernels") / f"{library_name(variant_name, 'kernels')}.so")
    segattn_ops.register("segattn_emulated")
    _position_engine.follow_environment("segattn_emulated")
    return control


if __name__ == "__main__":
    for variant in sys.argv[1:] or VARIANTS:
        print(build(variant))
