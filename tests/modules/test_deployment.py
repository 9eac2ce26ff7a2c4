"""What docs/deployment.md says of traced and exported programs and of FLOP counters. ONNX: test_onnx.py."""

import importlib
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn as tnn
from torch.utils.flop_counter import FlopCounterMode

import segattn_ops
from segattn_ops import _flop_counters, nn

from ..peers import randomise


class Compact(tnn.Module):
    """DRANet's compact position attention with its encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.attention = nn.CompactPositionEncoder(16), nn.CompactPositionAttention(16)

    def forward(self, x):
        return self.attention(x, self.encoder(x))


AUTO = torch.export.Dim.AUTO
MODULES = {
    "position": lambda: nn.PositionAttention(16),
    "channel": lambda: nn.ChannelAttention(16),
    "criss_cross": lambda: nn.RecurrentCrissCrossAttention(16),
    "non_local": lambda: nn.NonLocal2d(16, sub_sample=True, norm_layer=None),
    "non_local_dot_product": lambda: nn.NonLocal2d(16, mode="dot_product", norm_layer=None),
    "non_local_concatenation": lambda: nn.NonLocal2d(16, mode="concatenation", norm_layer=None),
    "dual": lambda: nn.DAModule(16),
    "asymmetric": lambda: nn.APNB(16, 16, 4, 6),
    "compact": lambda: Compact(),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tnn.Module:
    module = MODULES[name]().eval()
    randomise(module)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_module_passes_torchs_check_and_takes_other_sizes(name, dtype):
    """The check traces again without gradients and compares the graphs."""
    module = made(name, dtype)
    traced = torch.jit.trace(module, torch.randn(2, 16, 8, 10, dtype=dtype))
    x = torch.randn(3, 16, 13, 7, dtype=dtype)
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_saved_programs_need_the_package(tmp_path):
    """They load after `import segattn_ops`, and fail before."""
    module, x = made("position"), torch.randn(1, 16, 8, 10)
    torch.jit.trace(module, x).save(tmp_path / "module.pt")
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "module.pt2")
    torch.save((x, module(x).detach()), tmp_path / "sample.pt")
    code = """
        import sys, torch
        folder = sys.argv[1]
        load = {"module.pt": torch.jit.load, "module.pt2": lambda path: torch.export.load(path).module()}
        x, expected = torch.load(f"{folder}/sample.pt")
        for name, function in load.items():
            try:
                function(f"{folder}/{name}")(x)
            except Exception:
                print("failed", name)
        import segattn_ops
        for name, function in load.items():
            torch.testing.assert_close(function(f"{folder}/{name}")(x), expected, rtol=0, atol=0)
            print("equal", name)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:4] == [
        f"{word} {name}" for word in ("failed", "equal") for name in ("module.pt", "module.pt2")
    ]


@pytest.mark.slow
def test_a_package_runs_at_other_sizes_in_python_and_in_cpp(tmp_path):
    """AOTInductor's package, loaded by PyTorch and by examples/aoti_cpp, which this compiles."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    module, package, program = made("position"), tmp_path / "module.pt2", tmp_path / "run_package"
    with torch.no_grad():
        dynamic = ({0: AUTO, 2: AUTO, 3: AUTO},)
        exported = torch.export.export(module, (torch.randn(2, 16, 8, 10),), dynamic_shapes=dynamic)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    assert any(b"segattn::position_attention" in content for content in contents(package)), "the operator is kept"

    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
    libraries += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    source = Path(__file__).parents[2] / "examples" / "aoti_cpp" / "main.cpp"
    subprocess.run([compiler, "-std=c++20", source, "-o", program, *includes, *libraries], check=True)

    run = torch._inductor.aoti_load_package(str(package))
    input_file, output_file = tmp_path / "input.pt", tmp_path / "output.pt"
    for shape in ((2, 16, 8, 10), (3, 16, 13, 7), (1, 16, 33, 20)):
        x = torch.randn(shape)
        expected = module(x).detach()
        torch.testing.assert_close(run(x), expected)
        torch.save(x, input_file)
        command = [program, package, input_file, output_file, *segattn_ops.library_paths()]
        subprocess.run(command, env={}, check=True)
        torch.testing.assert_close(torch.load(output_file), expected)
    without_kernels = [program, package, input_file, output_file, segattn_ops.library_paths()[0]]
    done = subprocess.run(without_kernels, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "segattn::position_attention" in done.stderr
    missing = [program, package, input_file, output_file, tmp_path / "missing.so"]
    done = subprocess.run(missing, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "missing.so: cannot open shared object file" in done.stderr


def contents(package: Path) -> list[bytes]:
    with zipfile.ZipFile(package) as archive:
        return [archive.read(name) for name in archive.namelist()]


@pytest.mark.parametrize("name", ["position", "channel", "criss_cross", "non_local", "non_local_dot_product"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fvcore_counts_what_pytorch_counts(name):
    fvcore = pytest.importorskip("fvcore.nn")
    module, x = made(name), torch.randn(2, 16, 9, 8)
    with FlopCounterMode(display=False) as counter:
        module(x)
    analysis = fvcore.FlopCountAnalysis(module, x).unsupported_ops_warnings(False)
    assert analysis.total() == counter.get_total_flops() // 2  # PyTorch counts two FLOP for a multiply-add


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_mmengine_counts_after_registration():
    pytest.importorskip("mmengine")
    analysis = importlib.import_module("mmengine.analysis")
    _flop_counters.register()
    module, x = made("criss_cross"), torch.randn(1, 16, 9, 8)
    with FlopCounterMode(display=False) as counter:
        module(x)
    flops = analysis.FlopAnalyzer(module, x).unsupported_ops_warnings(False).total()
    assert flops == counter.get_total_flops() // 2


def test_a_library_without_the_table_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn.flop_count", sys)
    monkeypatch.setattr(_flop_counters.importlib.util, "find_spec", lambda name: object())
    with pytest.warns(RuntimeWarning, match="fvcore.nn.flop_count does not count the ops"):
        _flop_counters.register()


def test_handles_are_named_like_the_operators():
    handles = segattn_ops.flop_handles()
    assert all(hasattr(torch.ops.segattn, name.removeprefix("segattn::")) for name in handles)
    assert len(handles) == len(segattn_ops.ops.OPERATORS)
