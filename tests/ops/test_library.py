"""What is loaded, how it is reported, and the behaviour when something is missing."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segattn_ops
from segattn_ops import _backend, _cli, _library, reference
from segattn_ops._cli import info

PACKAGE = Path(segattn_ops.__file__).parent


def run(code: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh process that imports segattn_ops from `path`."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def without_libraries(tmp_path) -> Path:
    """A copy of the package as a checkout without a compiler has it."""
    shutil.copytree(PACKAGE, tmp_path / "segattn_ops", ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    return tmp_path


def test_build_config():
    config = segattn_ops.build_config()
    assert config["version"] == segattn_ops.__version__
    assert config["torch"] == torch.__version__
    assert config["cpu"]["native"]
    assert config["cpu"]["instruction_set"] in config["cpu"]["built"]
    assert config["cpu"]["why_not"] is None
    assert config["cuda"]["built"] or config["cuda"]["why_not"]
    assert config["cuda"]["usable"] == (config["cuda"]["native"] and torch.cuda.is_available())
    assert config["cuda"]["usable"] or config["cuda"]["why_not"]
    json.dumps(config)


def test_python_m_is_a_short_page():
    printed = subprocess.run(
        [sys.executable, "-m", "segattn_ops"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "SEGATTN_BACKEND": "native"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = printed.splitlines()
    assert len(lines) <= 14 and max(map(len, lines)) <= info.WIDTH
    starts = {len(line) - len(line.partition("  ")[2].lstrip()) for line in lines}
    assert len(starts) == 1, "the second column is aligned"
    config = segattn_ops.build_config()
    for fact in (config["version"], platform.python_version(), torch.__version__, config["cpu"]["instruction_set"]):
        assert fact in printed


def test_the_page_as_json(capsys):
    assert _cli.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu"] == segattn_ops.build_config()["cpu"]
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--gpus", 2)])
def test_the_page_has_arguments(argument, status, capsys):
    with pytest.raises(SystemExit) as stopped:
        _cli.main([argument])
    assert stopped.value.code == status
    assert "python -m segattn_ops" in "".join(capsys.readouterr())


def gpu(name: str, engine: str = "wgmma", capability: str = "9.0") -> dict:
    return {"name": name, "capability": capability, "memory_gib": 79.2, "position_engine": engine}


@pytest.mark.parametrize(
    ("cuda", "gpus", "expected"),
    [
        ({"native": False, "why_not": "the CUDA kernels were not built"}, [], "none: the CUDA kernels were not built"),
        (
            {"native": True, "usable": False, "why_not": "torch sees no GPU"},
            [],
            "loaded, not usable: torch sees no GPU",
        ),
        ({"native": True, "usable": True}, [gpu("H100"), gpu("H100")], "2 x H100, sm_90, 79.2 GiB; driver 580.1"),
        ({"native": True, "usable": True, "architectures": ["80"], "toolkit": "13.0.88"}, [gpu("H100")], "sm_80 with"),
    ],
)
def test_the_page_tells_built_loaded_and_usable_apart(cuda, gpus, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = info.describe() | {"gpus": gpus, "driver": "580.1"}
    facts["cuda"] = {"architectures": [], "toolkit": None, "why_not": None, "position_engine": "auto"} | cuda
    assert expected in " ".join(info.page(facts).split())


@pytest.mark.parametrize(
    ("gpus", "setting", "expected"),
    [
        ([], "auto", None),
        ([], "simt", "SEGATTN_CUDA_POSITION=simt"),
        ([gpu("H200"), gpu("H200")], "auto", "wgmma for 16-bit types with at most 128 channels of query and key, mma"),
        (
            [gpu("H200", "mma")],
            "auto",
            "mma.sync; the library was built without sm_90a, which has faster kernels: build",
        ),
        ([gpu("H200", "mma")], "mma", "mma.sync; SEGATTN_CUDA_POSITION=mma"),
        ([gpu("A100", "mma", "8.0"), gpu("T4", "simt", "7.5")], "auto", "mma.sync; no tensor cores"),
        ([gpu("T4", "the CUDA kernels were built for sm_90", "7.5")], "auto", "the CUDA kernels were built for sm_90"),
        ([gpu("T4", None)], "auto", None),
    ],
)
def test_the_page_names_the_engine_of_position_attention(gpus, setting, expected):
    facts = info.describe() | {"gpus": gpus}
    facts["cuda"] = facts["cuda"] | {"position_engine": setting}
    line = " ".join(info.page(facts).split())
    assert ("position attention" in line) == (expected is not None)
    assert expected is None or f"position attention {expected}" in line


def test_a_wrong_position_engine_is_named():
    result = run("import segattn_ops", SEGATTN_CUDA_POSITION="wgma")
    assert result.returncode != 0
    rule = "ValueError: SEGATTN_CUDA_POSITION must be one of ['auto', 'wgmma', 'mma', 'simt'] (got 'wgma')"
    assert rule in result.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
def test_libraries_that_an_earlier_build_left_are_not_loaded(tmp_path):
    """As FORCE_CUDA=0 and SEGATTN_CPU_ONLY leave them beside the new ones."""
    folder = tmp_path / "segattn_ops"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    for library in PACKAGE.glob("*.so"):
        (folder / library.name).symlink_to(library)
    (folder / "_C_cuda.abi3.so").unlink(missing_ok=True)
    (folder / "_C_cuda.abi3.so").write_bytes(b"of other sources")
    info = {"cpu_instruction_sets": ["baseline"], "cuda": {"built": False, "reason": "FORCE_CUDA=0"}}
    (folder / "_build_info.json").write_text(json.dumps(info))
    result = run("import json, segattn_ops; print(json.dumps(segattn_ops.build_config()))", tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads(result.stdout)
    assert config["cpu"]["instruction_set"] == "baseline"
    assert not config["cuda"]["native"] and not config["cuda"]["usable"] and not config["cuda"]["built"]
    assert "FORCE_CUDA=0); _C_cuda.abi3.so is left from an earlier build" in config["cuda"]["why_not"]


def test_library_paths_are_what_is_loaded():
    config, paths = segattn_ops.build_config(), segattn_ops.library_paths()
    names = ["_C", f"_cpu_{config['cpu']['instruction_set']}"] + ["_C_cuda"] * config["cuda"]["native"]
    assert paths == [PACKAGE / f"{name}.abi3.so" for name in names]
    assert {str(path) for path in paths} <= torch.ops.loaded_libraries


def test_library_paths_of_libraries_that_are_missing(monkeypatch):
    monkeypatch.setattr(_backend.LIBRARIES, "missing", {"cpu": "the test says so"})
    with pytest.raises(RuntimeError, match=r"^library_paths: the test says so$"):
        segattn_ops.library_paths()


USE = """
import torch, segattn_ops
x = torch.randn(1, 4, 3, 3, requires_grad=True)
for _ in range(2):
    y = segattn_ops.position_attention(x, x, x)
y.sum().backward()
with segattn_ops.use_backend("reference"):
    torch.testing.assert_close(segattn_ops.position_attention(x, x, x), y)
print(x.grad.shape, segattn_ops.build_config()["cpu"]["native"])
"""


def test_without_the_compiled_library_the_reference_serves_and_says_so_once(without_libraries):
    result = run(USE, without_libraries)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 4, 3, 3]) False" in result.stdout
    assert result.stderr.count("the plain PyTorch reference serves cpu tensors") == 1
    assert "_C.abi3.so is not in" in result.stderr
    assert "pip install" in result.stderr


def test_a_broken_library_is_named(without_libraries):
    (without_libraries / "segattn_ops" / "_C.abi3.so").write_bytes(b"not a library")
    result = run(USE, without_libraries)
    assert result.returncode == 0, result.stderr
    assert "the compiled library did not load" in result.stderr


def test_choosing_the_reference_by_hand_does_not_warn(without_libraries):
    result = run(USE, without_libraries, SEGATTN_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr


def test_the_native_library_does_not_warn():
    result = run(USE)
    assert result.returncode == 0, result.stderr
    assert "True" in result.stdout
    assert "RuntimeWarning: segattn_ops" not in result.stderr


def test_a_device_without_kernels_is_served_by_the_reference(monkeypatch):
    assert not _backend.LIBRARIES.serves("mps")
    assert "no native kernels for mps devices" in _backend.LIBRARIES.why_not("mps")
    monkeypatch.setattr(_backend.LIBRARIES, "missing", {"cpu": "the test says so"})
    monkeypatch.setattr(_backend, "_warned", set())
    x = torch.randn(1, 4, 5)
    with pytest.warns(RuntimeWarning, match=r"reference serves cpu tensors.*the test says so"):
        output = segattn_ops.position_attention(x, x, x)
    assert torch.equal(output, reference.position_attention(x, x, x, 1.0)[0])


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 8, 1 << 20, device="meta")  # the reference would store 2 ** 41 weights
    assert segattn_ops.position_attention(x, x, x).shape == x.shape


def test_an_unknown_backend_in_the_environment():
    result = run("import segattn_ops", SEGATTN_BACKEND="fast")
    assert "SEGATTN_BACKEND: backend must be one of ['native', 'reference'] (got 'fast')" in result.stderr


def test_backward_uses_what_forward_used(monkeypatch):
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    with segattn_ops.use_backend("native"):
        y = segattn_ops.position_attention(x, x, x)
    monkeypatch.delattr(reference, "position_attention")
    with segattn_ops.use_backend("reference"):
        y.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("name", _library.CPU_CAPABILITIES)
def test_every_instruction_set_the_processor_has(name):
    """A wheel runs on every processor: each set is forced in a separate process and gives the reference's
    numbers."""
    config = segattn_ops.build_config()["cpu"]
    level = _library.CPU_CAPABILITIES.index
    if name not in config["built"]:
        pytest.skip(f"{name} was not built")
    code = USE + "\nassert segattn_ops.build_config()['cpu']['instruction_set'] == " + repr(name)
    code += f"\nassert segattn_ops.library_paths()[1].name == '_cpu_{name}.abi3.so'"
    result = run(code, SEGATTN_CPU_CAPABILITY=name)
    if level(name) <= level(config["supports"]):
        assert result.returncode == 0, result.stderr
    else:
        assert "SEGATTN_CPU_CAPABILITY must be one of" in result.stderr


def test_an_unknown_instruction_set_is_an_error():
    result = run("import segattn_ops", SEGATTN_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    assert "SEGATTN_CPU_CAPABILITY must be one of" in result.stderr
    assert "got 'sse9'" in result.stderr
