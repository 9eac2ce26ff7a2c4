"""Builds the native libraries of segattn_ops.

`_C` holds the schemas, `_C_cuda` the CUDA kernels. The CPU kernels are compiled once per instruction set, each into its
own library, and the best one the processor supports is loaded at run time: the wheel runs on every processor of the
platform, and the linker cannot merge inline functions of different instruction sets. All libraries use only PyTorch's
stable ABI and the limited Python API, so that one wheel serves every PyTorch from 2.10 on.

Environment variables:
  FORCE_CUDA=1            build the CUDA kernels although no GPU is visible; FORCE_CUDA=0 never builds them
  TORCH_CUDA_ARCH_LIST    architectures to build for, as in PyTorch ("8.0;9.0"); also enables the CUDA build
  SEGATTN_CPU_ONLY=SET    compile only this instruction set (and the baseline), for quick development builds
  SEGATTN_NO_EXTENSION=1  install the Python files alone, without torch, compiler or ninja; the reference serves
  SEGATTN_NAMESPACE=NAME  register the operators as torch.ops.NAME instead of torch.ops.segattn (tools/hf_kernels.py)
  MAX_JOBS                parallel compiler processes
"""

import json
import os
import platform
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

# A fresh Python 3.11 environment has setuptools 65, which torch 2.10 and 2.11 accept. Its error about project.license
# does not mention the version.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"segattn_ops: the build needs setuptools >= 77 (got {setuptools.__version__}): "
        "pip install 'setuptools>=77,<82', which every torch from 2.10 on accepts"
    )

ROOT = Path(__file__).parent.resolve()
INCLUDE = str(ROOT / "csrc")  # sources include each other by their path below csrc


# By path: importing the package would import torch and load the libraries that this build replaces.
build_tools = runpy.run_path(str(ROOT / "segattn_ops" / "_build_tools.py"))
FINGERPRINT = build_tools["fingerprint"](ROOT)
NO_EXTENSION = os.environ.get("SEGATTN_NO_EXTENSION") == "1"
REMEDY = (
    "; or set SEGATTN_NO_EXTENSION=1 to install the Python files alone, with which the plain PyTorch reference serves"
)

if not NO_EXTENSION:
    CUDA_TOOLKIT, CUDA_TOOLKIT_SOURCE = build_tools["find_cuda_toolkit"]()
    if CUDA_TOOLKIT is not None:
        os.environ["CUDA_HOME"] = CUDA_TOOLKIT  # before torch guesses
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"segattn_ops: the extension needs torch >= 2.10 (got: {error}): install torch first, and build "
            f"without pip's isolation (pip install --no-build-isolation .){REMEDY}"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise SystemExit(f"segattn_ops: the extension needs torch >= 2.10 (got {torch.__version__}){REMEDY}")
    from torch.utils import cpp_extension

NAMESPACE = os.environ.get("SEGATTN_NAMESPACE")
DEFINES = [f"-DSEGATTN_NAMESPACE={NAMESPACE}"] if NAMESPACE else []
CXX_FLAGS = [*build_tools["CXX_FLAGS"], *DEFINES]
CPU_INSTRUCTION_SETS = build_tools["CPU_INSTRUCTION_SETS"]


def decide_cuda() -> tuple[bool, str]:
    """Whether the CUDA kernels are built, and why."""
    wanted = os.environ.get("FORCE_CUDA")
    if wanted == "0":
        return False, "FORCE_CUDA=0"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is a build without CUDA"
    if CUDA_TOOLKIT is None:
        return False, CUDA_TOOLKIT_SOURCE
    if wanted == "1":
        return True, "FORCE_CUDA=1"
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return True, "TORCH_CUDA_ARCH_LIST is set"
    if torch.cuda.is_available():
        return True, "a GPU is visible"
    return False, "no GPU is visible; set FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST to build for one elsewhere"


def sources(folder: str, *suffixes: str) -> list[str]:
    files = (ROOT / "csrc" / folder).rglob("*")
    return sorted(str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes)


def dependencies() -> list[str]:
    """What every library depends on: the headers, and the build scripts, which hold the flags."""
    return list(build_tools["BUILD_SCRIPTS"]) + [
        str(path.relative_to(ROOT)) for suffix in ("h", "cuh") for path in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))
    ]


def wanted_instruction_sets() -> dict[str, tuple[str, ...]]:
    only = os.environ.get("SEGATTN_CPU_ONLY")
    if only is not None and only not in CPU_INSTRUCTION_SETS:
        raise SystemExit(f"SEGATTN_CPU_ONLY must be one of {list(CPU_INSTRUCTION_SETS)} (got {only!r})")
    return {name: f for name, f in CPU_INSTRUCTION_SETS.items() if only is None or name in (only, "baseline")}


def cpu_extensions(sets: dict[str, tuple[str, ...]]) -> list:
    schemas = cpp_extension.CppExtension(
        "segattn_ops._C",
        ["csrc/ops.cpp", "csrc/cpu_capability.cpp"],
        include_dirs=[INCLUDE],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=dependencies(),
        py_limited_api=True,
    )
    kernels = [
        cpp_extension.CppExtension(
            f"segattn_ops._cpu_{name}",
            sources("cpu", ".cpp"),
            include_dirs=[INCLUDE],
            extra_compile_args={
                "cxx": [*CXX_FLAGS, *flags, *build_tools["CPU_WARNINGS"], f'-DSEGATTN_CPU_CAPABILITY_NAME="{name}"']
            },
            depends=dependencies(),
            py_limited_api=True,
        )
        for name, flags in sets.items()
    ]
    return [schemas, *kernels]


def cuda_extension() -> tuple[setuptools.Extension, list[str]]:
    """The CUDA kernels, and the architectures that they are compiled for.

    Where sm_90 is among them, the files named *_sm90.cu are compiled too, for sm_90a alone, by ``Build``: torch has one
    set of flags an extension. Code for sm_90a runs on no other architecture, so elsewhere these files are left out.
    """
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    architectures = set(re.findall(r"compute_(\d+[af]?)", flags))
    every_source = sources("cuda", ".cu")
    for_sm90a = [source for source in every_source if source.endswith(build_tools["SM90A_SUFFIX"])]
    defines = list(DEFINES)
    if for_sm90a and architectures & {"90", "90a"}:
        architectures.add("90a")
        defines.append(build_tools["SM90A_DEFINE"])
    else:
        for_sm90a = []
    extension = cpp_extension.CUDAExtension(
        "segattn_ops._C_cuda",
        [source for source in every_source if not source.endswith(build_tools["SM90A_SUFFIX"])],
        include_dirs=[INCLUDE],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, "-DUSE_CUDA"],
            "nvcc": [*build_tools["NVCC_FLAGS"], *defines, "-Xcompiler=-fvisibility=hidden"],
        },
        depends=dependencies() + for_sm90a,
        py_limited_api=True,
    )
    extension.sources_for_sm90a = for_sm90a
    return extension, sorted(architectures)


def check_tools() -> None:
    """Stops with one sentence where a program that the build needs is missing."""
    compiler = cpp_extension.get_cxx_compiler()
    standard = build_tools["LANGUAGE"][0]
    probe = [*shlex.split(compiler), standard, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        fault = done.stderr.strip().partition("\n")[0] if done.returncode else None
    except OSError as error:
        fault = error.strerror
    if fault is not None:
        raise SystemExit(
            f"segattn_ops: the extension needs a C++20 compiler, and `{compiler}` does not run as one "
            f"({fault or 'it fails without a message'}): install g++ 12 or later, or name a compiler in CXX{REMEDY}"
        )
    if not cpp_extension.is_ninja_available():
        raise SystemExit(f"segattn_ops: the extension needs ninja, which is missing: pip install ninja{REMEDY}")


def write_build_info(package: Path, info: dict) -> None:
    """For segattn_ops.build_config()."""
    runpy.run_path(str(ROOT / "segattn_ops" / "_files.py"))["write_text"](
        package / "_build_info.json", json.dumps(info, indent=1) + "\n"
    )


class PythonFiles(build_py):
    """The Python files of an installation without the extension."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # then the package stays in the tree, with the libraries that may be there
            package = Path(self.build_lib, "segattn_ops")
            write_build_info(package, {"extension": False, "reason": "SEGATTN_NO_EXTENSION=1"})


def extension_arguments() -> dict:
    """The arguments of setup() for the extension."""
    build_cuda, cuda_reason = decide_cuda()
    print(f"segattn_ops: CUDA kernels {'are' if build_cuda else 'are not'} built: {cuda_reason}", flush=True)
    instruction_sets = wanted_instruction_sets()
    extensions = cpu_extensions(instruction_sets)
    build_info = {
        "extension": True,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build_tools["version_of"](cpp_extension.get_cxx_compiler()),
        "cpu_instruction_sets": list(instruction_sets),
        "cuda": {"built": build_cuda, "reason": cuda_reason, "architectures": []},
    }
    if build_cuda:
        extension, build_info["cuda"]["architectures"] = cuda_extension()
        extensions.append(extension)
        nvcc = os.environ.get("PYTORCH_NVCC") or str(Path(CUDA_TOOLKIT, "bin", "nvcc"))  # as torch calls it
        build_info["cuda"]["toolkit"] = build_tools["version_of"](nvcc, r"V([\d.]+)")
        toolkit = f"toolkit {CUDA_TOOLKIT} (found by {CUDA_TOOLKIT_SOURCE})"
        print(f"segattn_ops: {toolkit}, architectures {build_info['cuda']['architectures']}", flush=True)

    class Build(cpp_extension.BuildExtension):
        """Gives each library its own object folder, since the CPU libraries share their sources, compiles the files
        for sm_90a, and writes _build_info.json."""

        def build_extension(self, ext) -> None:
            shared = self.build_temp
            self.build_temp = str(Path(shared) / ext.name)
            try:
                if for_sm90a := getattr(ext, "sources_for_sm90a", []):
                    ext.extra_objects = self.compile_for_sm90a(ext, for_sm90a)
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def compile_for_sm90a(self, ext, files: list[str]) -> list[str]:
            """The objects of the files, by a ninja file of their own."""
            flags = ext.extra_compile_args
            return self.compiler.compile(
                files,
                output_dir=str(Path(self.build_temp) / "sm_90a"),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs=flags | {"nvcc": [*flags["nvcc"], build_tools["SM90A_TARGET"]]},
                depends=ext.depends,
            )

        def run(self) -> None:
            check_tools()
            super().run()
            package = ROOT / "segattn_ops" if self.inplace else Path(self.build_lib) / "segattn_ops"
            write_build_info(package, build_info | {"sources": self.sources_of_libraries(package)})

        def sources_of_libraries(self, package: Path) -> dict[str, str]:
            """The source fingerprint of each library in the folder; libraries outside this build keep their own."""
            path = package / "_build_info.json"
            earlier = json.loads(path.read_text()).get("sources", {}) if path.exists() else {}
            built = {ext.name.rpartition(".")[2]: FINGERPRINT for ext in self.extensions}
            return {name: mark for name, mark in (earlier | built).items() if (package / f"{name}.abi3.so").exists()}

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if NO_EXTENSION:
    print("segattn_ops: no extension is built: SEGATTN_NO_EXTENSION is set", flush=True)
    setup(cmdclass={"build_py": PythonFiles})
else:
    setup(**extension_arguments())
