"""ONNX export of modules, networks, ops and captured programs with dynamic sizes, run by onnxruntime."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn as tnn

import segattn_ops
from segattn_ops import models, nn

from ..peers import randomise
from .test_deployment import AUTO, made

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

DYNAMIC = {0: AUTO, 2: AUTO, 3: AUTO}


class Runtime:
    """The model that torch.onnx.export writes, in onnxruntime."""

    def __init__(self, path, program, inputs=(), **options):
        self.program = torch.onnx.export(program, inputs, path, verbose=False, **options)
        self.session = onnxruntime.InferenceSession(path)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        names = [argument.name for argument in self.session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self.session.run(None, feed)]

    @property
    def operators(self) -> set[str]:
        return {node.op_type for node in self.program.model.graph}


# The others are in the networks.
BLOCKS = ("compact", "dual", "non_local_concatenation", "non_local_dot_product")


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, tmp_path):
    module = made(name)
    runtime = Runtime(tmp_path / "module.onnx", module, (torch.randn(2, 16, 8, 10),), dynamic_shapes=(DYNAMIC,))
    for shape in ((2, 16, 8, 10), (3, 16, 13, 7), (1, 16, 5, 9)):
        x = torch.randn(shape)
        (got,) = runtime(x)
        torch.testing.assert_close(got, module(x).detach(), rtol=1e-5, atol=1e-5)


class Ops(tnn.Module):
    """All ops, with all of their options."""

    def forward(self, query, key, value, padding):
        criss_cross = segattn_ops.criss_cross_attention(query, query, query, 0.3, num_heads=2, return_logsumexp=True)
        affinity = segattn_ops.criss_cross_affinity(query, query)
        return (
            segattn_ops.position_attention(query, key, value),
            *segattn_ops.position_attention(
                query, key, value, -0.3, num_heads=2, key_padding_mask=padding, return_logsumexp=True
            ),
            segattn_ops.channel_attention(key, value, value, 0.2),
            segattn_ops.channel_attention(query, query, query),
            segattn_ops.residual_channel_attention(query, 0.5),
            affinity,
            segattn_ops.criss_cross_aggregation(affinity.softmax(1), query),
            *criss_cross,
        )


def operands(dtype: torch.dtype, size: tuple[int, int], memory: tuple[int, int], batch: int):
    """query, key, value, padding; every key of the last sample is padding."""
    query = torch.randn(batch, 4, *size, dtype=dtype)
    key, value = torch.randn(batch, 4, *memory, dtype=dtype), torch.randn(batch, 6, *memory, dtype=dtype)
    padding = torch.zeros(batch, *memory, dtype=torch.bool)
    padding[0, :, -1], padding[-1] = True, True
    return query, key, value, padding


def close_to_float64(got: list[torch.Tensor], arguments: tuple[torch.Tensor, ...], tolerance: float) -> None:
    with segattn_ops.use_backend("reference"):
        expected = Ops()(*(t.double() if t.is_floating_point() else t for t in arguments))
    for result, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


def test_ops_of_a_captured_program(tmp_path):
    shapes = (DYNAMIC, DYNAMIC, DYNAMIC, {0: AUTO, 1: AUTO, 2: AUTO})
    program = torch.export.export(Ops(), operands(torch.float32, (5, 6), (3, 4), 2), dynamic_shapes=shapes)
    runtime = Runtime(tmp_path / "ops.onnx", program)
    taboo = {"Einsum", "EyeLike", "Trilu", "If", "Loop", "NonZero", "Gather", "GatherND", "GatherElements"}
    assert not runtime.operators & (taboo | {"ScatterND", "ScatterElements"})
    for arguments in (operands(torch.float32, (5, 6), (3, 4), 2), operands(torch.float32, (9, 4), (7, 5), 3)):
        close_to_float64(runtime(*arguments), arguments, 1e-5)


def test_ops_in_half_precision(tmp_path):
    """Accumulated in float32: the results are rounded once."""
    arguments = operands(torch.float16, (5, 6), (3, 4), 2)
    program = torch.export.export(Ops(), arguments)
    close_to_float64(Runtime(tmp_path / "ops.onnx", program)(*arguments), arguments, 1e-3)


class Autocast(tnn.Module):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return segattn_ops.position_attention(x, x, x)


def test_an_autocast_region_is_accumulated_in_float32(tmp_path):
    """Energies of 4e5 overflow float16."""
    x = 100 * torch.randn(1, 64, 4, 5)
    (got,) = Runtime(tmp_path / "autocast.onnx", torch.export.export(Autocast(), (x,)))(x)
    torch.testing.assert_close(got, Autocast()(x))


class Networks(tnn.Module):
    """All networks on one small backbone."""

    def __init__(self):
        super().__init__()
        heads = {
            "danet": models.DANetHead(64, 3),
            "ccnet": models.CCNetHead(64, 3),
            "non_local": models.NonLocalHead(64, 3),
            "ann": models.ANNHead(32, 64, 3, pool_sizes=(1, 3)),
            "dfn": models.DFNHead((8, 16, 32, 64), 3),
        }
        stages = [
            tnn.Sequential(tnn.Conv2d(i, o, 3, stride=s, padding=1), tnn.ReLU())
            for i, o, s in ((3, 8, 2), (8, 16, 2), (16, 32, 1), (32, 64, 1))
        ]
        self.stages, self.heads = tnn.ModuleList(stages), tnn.ModuleDict(heads)

    def forward(self, image):
        maps, x = {}, image
        for index, stage in enumerate(self.stages, start=1):
            x = maps[f"layer{index}"] = stage(x)
        return {
            name: models.SegmentationModel(lambda _: maps, head, align_corners=name == "danet")(image)
            for name, head in self.heads.items()
        }


@pytest.mark.slow
def test_networks(tmp_path):
    networks = randomise(Networks()).eval()
    runtime = Runtime(tmp_path / "networks.onnx", networks, (torch.randn(2, 3, 33, 49),), dynamic_shapes=(DYNAMIC,))
    for shape in ((2, 3, 33, 49), (1, 3, 40, 32), (3, 3, 51, 57)):
        image = torch.randn(shape)
        expected = [logits.detach() for outputs in networks(image).values() for logits in outputs.values()]
        for got, exact in zip(runtime(image), expected, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_the_attention_operator_of_opset_23(tmp_path, monkeypatch):
    """The example of docs/deployment.md."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M) if "opset23" in block)
    names: dict = {}
    exec(compile(code, "docs/deployment.md", "exec"), names)
    block = names["block"]
    session = onnxruntime.InferenceSession("model.onnx")
    x = torch.randn(3, 64, 9, 7)
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), block(x).detach(), rtol=1e-5, atol=1e-5)
    assert b"Attention" in Path("model.onnx").read_bytes()


def fused(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "segattn" in str(node.target)]


def test_everything_else_keeps_the_operators():
    """Default decompositions, AOTAutograd with Inductor's, and torch.compile."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    module, x = nn.DAModule(16).eval(), torch.randn(2, 16, 8, 10)
    operators = ["segattn.position_attention.default", "segattn.channel_attention.default"]
    program = torch.export.export(module, (x,), dynamic_shapes=(DYNAMIC,))
    assert fused(program) == fused(program.run_decompositions()) == operators
    graphs: list = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table)
    with torch.no_grad():
        torch.compile(module, fullgraph=True, dynamic=True, backend=backend)(x)
    assert fused(graphs[0]) == operators


def test_fake_tensors_of_symbolic_sizes_are_checked_as_the_operator_does():
    """They would run a decomposition otherwise, with other errors."""
    position = torch.ops.segattn.position_attention

    class Mismatch(tnn.Module):
        def forward(self, x):
            return position(x, x[:, :2], x, 1.0)[0]

    with pytest.raises(Exception, match=r"position_attention: key must have 4 channels like query \(got 2\)"):
        torch.export.export(Mismatch(), (torch.randn(2, 4, 5, 6),), dynamic_shapes=(DYNAMIC,))
