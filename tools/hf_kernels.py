"""The layout of Hugging Face `kernels`, from the same sources: a source tree for kernel-builder, and builds of it.

    python -m tools.hf_kernels layout     # build.toml, torch-ext/, csrc/ in build/hf_kernels, for kernel-builder
    python -m tools.hf_kernels build      # compiles here: build/hf_kernels/build/<variant>, for get_local_kernel()
    python -m tools.hf_kernels build --backend cuda

A build registers its operators in a namespace of its own, ``_segattn_ops_<backend>_<hash of the sources>``, which
`_ops.py` names: several versions can be loaded in one process, beside the installed package. One build serves every
PyTorch from 2.10 on (variant ``torch-stable-abi210-...``) and every Python that PyTorch 2.10 supports (3.10 and later);
the libraries use no symbol of Python at all.

`build` compiles each instruction set into its own library, as the wheel. kernel-builder links one library, whose CPU
kernels are the baseline's.

The Hub allows a kernel no import but Python's and torch's, so that `models` (torchvision), `visualize` (numpy,
matplotlib), `memory` (numpy) and the command line, which needs them, stay out.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .compilers import ROOT, build_tools

FOLDER = ROOT / "build" / "hf_kernels"
NAME, MODULE = "segattn-ops", "segattn_ops"
VERSION = 0  # the Hub's convention before a first stable release
TORCH = "2.10"
LEFT_OUT = ("models", "visualize", "memory", "_cli", "_eager.py", "__main__.py", "_build_tools.py") + (
    "_build_info.json",
    "__pycache__",
    "*.so",
)

OPS = """import torch
{load}
ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{namespace}::{{op_name}}"
"""

# The library that kernel-builder links is a Python module; its name is that of the namespace.
BINDING = """#include <Python.h>

#define SEGATTN_JOIN_(a, b) a##b
#define SEGATTN_JOIN(a, b) SEGATTN_JOIN_(a, b)
#define SEGATTN_QUOTE_(a) #a
#define SEGATTN_QUOTE(a) SEGATTN_QUOTE_(a)

PyMODINIT_FUNC SEGATTN_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, SEGATTN_QUOTE(TORCH_EXTENSION_NAME), nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
"""

FLAKE = """{
  description = "Flake for segattn-ops";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""


def namespace(backend: str) -> str:
    """The operator namespace of a build: unique to the sources, C++ and Python."""
    return f"_{MODULE}_{backend}_{build_tools.fingerprint(ROOT, python=True)[:7]}"


def variant(backend: str) -> str:
    """The folder's name, from which `kernels` sees whether a build fits."""
    device = "cpu" if backend == "cpu" else f"cu{torch.version.cuda.replace('.', '')}"
    return f"torch-stable-abi{TORCH.replace('.', '')}-{device}-{platform.machine()}-{platform.system().lower()}"


def build_toml() -> str:
    """kernel-builder's configuration. It takes no patterns, so that it lists every source."""
    headers = sorted(path for suffix in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))
    cpu = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))]
    cuda = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    for_sm90a = [path for path in cuda if path.name.endswith(build_tools.SM90A_SUFFIX)]
    cuda = [path for path in cuda if path not in for_sm90a]
    # kernel-builder sets TORCH_TARGET_VERSION and Py_LIMITED_API.
    defines = ["-DTORCH_STABLE_ONLY", "-DSEGATTN_NAMESPACE=TORCH_EXTENSION_NAME"]
    cxx = ["-O3", *build_tools.LANGUAGE, "-Wno-psabi", *defines, '-DSEGATTN_CPU_CAPABILITY_NAME="baseline"']
    nvcc = [flag for flag in build_tools.NVCC_FLAGS if flag not in build_tools.STABLE_ABI] + defines
    # kernel-builder compiles for every architecture of the CUDA version, so that sm_90 is always among them.
    nvcc += [build_tools.SM90A_DEFINE]

    def listed(paths: list[Path]) -> str:
        return "[\n" + "".join(f'    "{path.relative_to(ROOT).as_posix()}",\n' for path in paths) + "]"

    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "BSD-3-Clause"
backends = ["cpu", "cuda"]

[torch]
src = ["torch-ext/torch_binding.cpp"]

[torch.stable-abi]
cpu = "{TORCH}"
cuda = "{TORCH}"

[kernel.segattn_cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {json.dumps(cxx)}
src = {listed(cpu + headers)}

[kernel.segattn_cuda]
backend = "cuda"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {json.dumps([*cxx, "-DUSE_CUDA"])}
cuda-flags = {json.dumps(nvcc)}
src = {listed(cuda + cpu + headers)}

[kernel.segattn_cuda_sm90a]
backend = "cuda"
cuda-capabilities = ["9.0a"]
depends = ["torch"]
include = ["csrc"]
cxx-flags = {json.dumps([*cxx, "-DUSE_CUDA"])}
cuda-flags = {json.dumps(nvcc)}
src = {listed(for_sm90a + headers)}
"""


def copy_package(folder: Path) -> None:
    """The Python files of the package that a kernel may have; `_ops.py` is written by the build."""
    shutil.copytree(ROOT / MODULE, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)


def layout(folder: Path) -> None:
    """Writes kernel-builder's source tree."""
    for name in ("csrc", "torch-ext"):
        shutil.rmtree(folder / name, ignore_errors=True)
    copy_package(folder / "torch-ext" / MODULE)
    (folder / "torch-ext" / MODULE / "_ops.py").unlink()  # kernel-builder's own comes here
    (folder / "torch-ext" / "torch_binding.cpp").write_text(BINDING)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "build.toml").write_text(build_toml())
    (folder / "flake.nix").write_text(FLAKE)
    shutil.copy(ROOT / "LICENSE", folder)


def digest(folder: Path) -> dict[str, str]:
    """The hash of each file as metadata.json has it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "metadata.json")
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def build(folder: Path, backend: str) -> Path:
    """Compiles a build with setup.py, all instruction sets or those of SEGATTN_CPU_ONLY, and returns its folder."""
    name = namespace(backend)
    scratch = folder / "scratch" / backend
    shutil.rmtree(scratch / "lib", ignore_errors=True)
    environment = {"SEGATTN_NAMESPACE": name, "FORCE_CUDA": "1" if backend == "cuda" else "0"}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(scratch / "lib")]
    command += ["--build-temp", str(scratch / "temp")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    target = folder / "build" / variant(backend)
    shutil.rmtree(target, ignore_errors=True)
    copy_package(target)
    compiled = scratch / "lib" / MODULE
    for path in [*compiled.glob("*.so"), compiled / "_build_info.json"]:
        shutil.copy(path, target)
    (target / "_ops.py").write_text(OPS.format(load="", namespace=name))
    write_metadata(target, name, backend)
    return target


def write_metadata(target: Path, name: str, backend: str) -> None:
    """metadata.json, as `kernels` reads it."""
    facts = {"type": backend}
    if backend == "cuda":
        built = json.loads((target / "_build_info.json").read_text())["cuda"]["architectures"]
        facts["archs"] = [re.sub(r"(\d)(a?)$", r".\1\2", architecture) for architecture in built]
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": facts,
        "digest": {"algorithm": "sha256", "files": digest(target)},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.hf_kernels", description=__doc__, formatter_class=formatter)
    parser.add_argument("what", choices=("layout", "build"))
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="of the build (default: cpu)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: build/hf_kernels")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "layout":
        layout(folder)
        print(f"{folder}: build.toml, torch-ext, csrc")
    else:
        if arguments.backend == "cuda" and torch.version.cuda is None:
            parser.error(f"backend cuda needs a CUDA build of torch (got torch {torch.__version__})")
        print(build(folder, arguments.backend))
    return 0


if __name__ == "__main__":
    sys.exit(main())
