"""The rivals beyond plain PyTorch: ONNX Runtime's operators, oneDNN's switch, mmcv's form, xFormers and flash-attn."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from benchmarks import features, report, rivals, run, runtimes, schedule, validate, workloads
from benchmarks.cell import CellSpec, save_inputs
from benchmarks.processes import CellProcess
from benchmarks.workloads import Workload

from ..modules.interop import need


def small(op: str, **changes) -> Workload:
    return Workload(op, 9, 11, **{"channels": 24, "key_channels": 4} | changes)


def operands(workload: Workload) -> list[torch.Tensor]:
    x = torch.randn(workload.batch, workload.channels, workload.height, workload.width).relu()
    return [leaf.requires_grad_() for leaf in features.operands(workload, x).values()]


class TestOnnxRuntime:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")

    @pytest.mark.parametrize("op", workloads.PAIRWISE)
    @pytest.mark.parametrize("rival", rivals.RUNTIMES)
    def test_is_the_same_attention(self, rival, op):
        workload = small(op, batch=2)
        leaves = operands(workload)
        session = runtimes.Session(rival, *workload.widths, threads=1)
        with torch.no_grad():
            got = runtimes.feature_map(session(*map(runtimes.tokens, leaves)), leaves[0].shape[2:])
            torch.testing.assert_close(got, rivals.formulation("eager", op)(*leaves), rtol=1e-5, atol=1e-6)

    def test_a_cell_has_a_forward_alone(self, tmp_path):
        workload = small("position", channels=32)
        leaves = operands(workload)
        path = str(tmp_path / "inputs.pt")
        named = dict(zip(workload.leaves(), (leaf.detach() for leaf in leaves), strict=True))
        save_inputs(path, workload, {n: t.requires_grad_() for n, t in named.items()}, features.grad_output(workload))
        cell = CellProcess(CellSpec(workload, "onnxruntime", path, threads=1))
        try:
            assert cell.call("warm_up") > 0
            first = cell.call("first_pass")
            assert "forward_backward" not in first and set(first["memory"] or {"forward": 0}) == {"forward"}
            assert first["errors"].keys() == {"output", "energy"} and validate.worst(first["errors"]) < 1e-5
            assert cell.call("timed_pass", "forward") > 0
        finally:
            cell.close()

    def test_other_names_are_refused(self):
        with pytest.raises(ValueError, match=r"rival must be one of onnxruntime, onnx_attention \(got sdpa\)"):
            runtimes.Session("sdpa", 4, 4, 1)
        with pytest.raises(ValueError, match=r"takes other tensors: benchmarks.runtimes.Session"):
            rivals.formulation("onnxruntime", "position")


@pytest.mark.parametrize("op", ["criss_cross", "rcca"])
def test_mmcv_is_criss_cross_attention(op):
    workload = small(op, dtype="float64", batch=2)
    leaves = operands(workload)
    results = []
    for rival in ("mmcv", "eager"):
        output = rivals.formulation(rival, op)(*leaves)
        results.append((output, *torch.autograd.grad(output, leaves, features.grad_output(workload))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_mmcv_is_mmcvs_own():
    block = need("mmcv.ops.cc_attention").CrissCrossAttention(16)
    block.gamma.scale.data.fill_(0.7)
    x = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        attended = rivals.mmcv_criss_cross(block.query_conv(x), block.key_conv(x), block.value_conv(x))
        assert torch.equal(block(x), 0.7 * attended + x)


ONEDNN = """
import torch
from benchmarks import rivals
rivals.configure("eager_onednn")
a = torch.randn(1, 64, 20, 20)
rivals.formulation("eager_onednn", "position")(a, a, a)
"""


def test_onednn_computes_the_products():
    """oneDNN says so itself, in the process of the cell alone."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    done = subprocess.run(
        [sys.executable, "-c", ONEDNN],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ONEDNN_VERBOSE": "1"},
    )
    products = [line for line in done.stdout.splitlines() if ",matmul," in line and ",exec," in line]
    assert len(products) == 2 and all("src:f32" in line and "dst:f32" in line for line in products)


class TestGpuPackages:
    """Not installed here: stand-ins with the packages' layouts and limits."""

    def test_xformers(self, monkeypatch):
        def memory_efficient_attention(query, key, value, scale):
            assert query.shape == (2, 99, 1, 4) and value.shape == (2, 99, 1, 24)
            heads = (t.transpose(1, 2) for t in (query, key, value))
            return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)

        module = types.ModuleType("xformers.ops")
        module.memory_efficient_attention = memory_efficient_attention
        monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", module)
        self.compare("xformers", small("position", batch=2))

    def test_flash_attn(self, monkeypatch):
        def flash_attn_func(query, key, value, softmax_scale):
            assert query.shape == key.shape == value.shape == (2, 99, 2, 152)
            heads = (t.transpose(1, 2) for t in (query, key, value))
            return F.scaled_dot_product_attention(*heads, scale=softmax_scale).transpose(1, 2)

        module = types.ModuleType("flash_attn")
        module.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        self.compare("flash_attn", small("position", batch=2, channels=300))

    def compare(self, rival: str, workload: Workload) -> None:
        leaves = operands(workload)
        got, expected = (rivals.formulation(name, workload.op)(*leaves) for name in (rival, "eager"))
        torch.testing.assert_close(got, expected)


class TestAvailability:
    @pytest.mark.parametrize(
        ("rival", "dtype", "device", "reason"),
        [
            ("xformers", "float16", "cpu", "only for cuda"),
            ("onnxruntime", "bfloat16", "cpu", "only for float32"),
            ("onnxruntime", "float32", "cuda", "only for cpu"),
            ("eager_onednn", "float16", "cpu", "only for float32"),
            ("flash_attn", "float32", "cuda", "only for float16 and bfloat16"),
            ("eager", "float16", "cuda", None),
        ],
    )
    def test_reasons(self, rival, dtype, device, reason):
        assert rivals.unavailable(Workload("position", 4, 4, dtype), rival, device) == reason

    def test_a_missing_package_is_a_row(self, monkeypatch):
        monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
        options = run.Options(("onnxruntime",))
        workload = small("position")
        status, reason = run.not_run(options, schedule.Schedule(None), workload, "onnxruntime", 2**40)
        assert (status, reason) == ("not available", "onnxruntime and onnx not installed")
        entry = run.record(workload, "onnxruntime", status, reason)
        assert report.rows([entry])[0][2:4] == ["ONNX Runtime", "not available"]
        assert report.remarks([entry]) == ["9x11 ONNX Runtime: not run, onnxruntime and onnx not installed"]

    def test_passes(self):
        assert rivals.passes("flex", "cpu") == rivals.passes("onnx_attention", "cpu") == ("forward",)
        assert rivals.passes("flex", "cuda") == rivals.passes("eager", "cpu") == ("forward", "forward_backward")
