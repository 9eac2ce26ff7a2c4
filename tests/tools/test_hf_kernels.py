"""The layout of Hugging Face `kernels`: kernel-builder's source tree, and a build that is loaded beside the package."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tomllib
import torch

from tools import hf_kernels
from tools.compilers import CSRC, ROOT, build_tools, compiler

from .quick_compiler import without_optimisation

# `kernels` is not a requirement: where it is installed, its own readers and its loader are used.
KERNELS = importlib.util.find_spec("kernels") is not None


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    hf_kernels.layout(folder)
    return folder


def test_every_source_is_listed(layout):
    config = tomllib.loads((layout / "build.toml").read_text())
    cpu, cuda, sm90a = (set(config["kernel"][f"segattn_{name}"]["src"]) for name in ("cpu", "cuda", "cuda_sm90a"))
    for name in cpu | cuda | sm90a | set(config["torch"]["src"]):
        assert (layout / name).is_file(), name
    tree = {path.relative_to(ROOT).as_posix() for path in CSRC.rglob("*") if path.is_file()}
    assert cuda | sm90a == tree
    for_sm90a = {name for name in tree if name.endswith("_sm90.cu")}
    assert {name for name in sm90a if name.endswith(".cu")} == for_sm90a and not cuda & for_sm90a
    assert config["kernel"]["segattn_cuda_sm90a"]["cuda-capabilities"] == ["9.0a"]
    # A header in csrc/cuda is listed for the CPU too: kernel-builder copies only what is listed.
    assert cpu == {name for name in tree if not name.endswith(".cu")}
    if KERNELS:
        from kernels._rust import Build

        assert [str(backend).lower() for backend in Build.open(layout).general.backends] == ["cpu", "cuda"]


def test_a_kernel_imports_only_python_torch_and_itself(layout):
    package = layout / "torch-ext" / hf_kernels.MODULE
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module.partition(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                # Nothing that is left out, but for _ops.py, which the build writes.
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                targets = [base] if node.module else [base / alias.name for alias in node.names]
                for target in targets:
                    assert target.is_dir() or target.with_suffix(".py").exists() or target.name == "_ops", (
                        path,
                        target,
                    )
                continue
            else:
                continue
            assert set(names) <= {*sys.stdlib_module_names, "torch"}, (path, names)


# Loads a build as `kernels` does, and compares it with the installed package.
COMPARE = """
import importlib.util, json, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Namespaces(TorchDispatchMode):
    # the namespaces of the operators that are called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = {*getattr(self, "seen", ()), func.namespace}
        return func(*args, **(kwargs or {}))

folder = Path(sys.argv[1])
identifier = json.loads((folder / "metadata.json").read_text())["id"]
if importlib.util.find_spec("kernels") is not None:
    from kernels import get_local_kernel
    kernel = get_local_kernel(folder.parent.parent, backend="cpu")
else:
    spec = importlib.util.spec_from_file_location(identifier, folder / "__init__.py")
    kernel = sys.modules[identifier] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)

import segattn_ops

assert Path(kernel.__file__).parent == folder and kernel.build_config()["cpu"]["native"], kernel.build_config()
assert hasattr(getattr(torch.ops, identifier), "position_attention")
torch.manual_seed(0)
shapes = [(1, 8, 9, 7), (1, 8, 9, 7), (1, 16, 9, 7)]
inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
for name in ("position_attention", "criss_cross_attention", "channel_attention"):
    arguments = inputs if name != "channel_attention" else [inputs[2]] * 3
    results = []
    for module in (kernel, segattn_ops):
        output = getattr(module, name)(*arguments)
        results.append([output, *torch.autograd.grad(output.sin().sum(), set(arguments))])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)
    with Namespaces() as namespaces:
        getattr(kernel, name)(*arguments).sum().backward()
    assert identifier in namespaces.seen and "segattn" not in namespaces.seen, namespaces.seen
block, other = kernel.nn.PositionAttention(16), segattn_ops.nn.PositionAttention(16)
other.load_state_dict(block.state_dict())
x = torch.randn(1, 16, 6, 5)
torch.testing.assert_close(block(x), other(x))
torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), other(x))
assert all(name.startswith(identifier + "::") for name in kernel.flop_handles())
print("loaded", identifier, kernel.build_config()["cpu"]["instruction_set"])
"""


def compare(folder: Path, cwd: Path) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", COMPARE, str(folder)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_builds_are_loaded_beside_the_package(layout, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGATTN_CPU_ONLY", "baseline")
    monkeypatch.setenv("CXX", without_optimisation(tmp_path))
    folder = hf_kernels.build(tmp_path, "cpu")
    identifier = hf_kernels.namespace("cpu")
    assert folder.name == f"torch-stable-abi210-cpu-{os.uname().machine}-linux"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["id"] == identifier and metadata["backend"] == {"type": "cpu"}
    assert set(metadata["digest"]["files"]) >= {"__init__.py", "_ops.py", "_C.abi3.so", "_cpu_baseline.abi3.so"}
    if KERNELS:
        from kernels._rust import Digest, DigestAlgorithm

        assert Digest.hash_variant(DigestAlgorithm.SHA256, folder).files.items() >= metadata["digest"]["files"].items()
    assert compare(folder, tmp_path).endswith(f"loaded {identifier} baseline\n")

    # kernel-builder's shape: all sources in one library, which _ops.py imports as a Python module.
    one = tmp_path / "one" / "build" / folder.name
    shutil.copytree(folder, one, ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"))
    objects = sorted((tmp_path / "scratch" / "cpu" / "temp").rglob("*.o"))
    binding = tmp_path / "torch_binding.o"
    command = [compiler(), *build_tools.STABLE_ABI, f"-DTORCH_EXTENSION_NAME={identifier}", "-fPIC"]
    command += [f"-I{sysconfig.get_path('include')}", "-c", str(layout / "torch-ext" / "torch_binding.cpp")]
    subprocess.run([*command, "-o", str(binding)], check=True)
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    library = one / f"{identifier}.abi3.so"
    subprocess.run([compiler(), "-shared", *map(str, objects), str(binding), *libraries, "-o", library], check=True)
    (one / "_ops.py").write_text(hf_kernels.OPS.format(load=f"from . import {identifier}\n", namespace=identifier))
    assert compare(one, tmp_path).endswith(f"loaded {identifier} baseline\n")
