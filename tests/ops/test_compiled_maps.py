"""The attention maps under torch.compile with fullgraph, and exported."""

import pytest
import torch
from torch import nn as tnn

from segattn_ops import criss_cross_attention_map, position_attention_map

AUTO = torch.export.Dim.AUTO
MAPS = {
    "position": lambda query, key, positions: position_attention_map(query, key, positions, 0.5),
    "criss_cross": lambda query, key, positions: criss_cross_attention_map(query, key, positions),
    "recurrent": lambda query, key, positions: criss_cross_attention_map(query, key, positions, 2, 0.5),
}
OUTSIDE = {"right": (0, 7), "left": (0, -8), "below": (6, 0), "above": (-7, 0)}


def arguments(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.tensor([(0, 0), (-1, 3), (height - 1, -width), (2, width - 1), (1, 1)][: batch + 2])
    return torch.randn(batch, 4, height, width), torch.randn(batch, 4, height, width), positions


@pytest.mark.parametrize("name", MAPS)
def test_full_graph(name):
    function = MAPS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 6, 7), (3, 9, 5)):
        inputs = arguments(*sizes)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    query, key, _ = arguments(2, 6, 7)
    for outside in OUTSIDE.values():
        positions = torch.tensor([(1, 1), outside])
        with pytest.raises(RuntimeError, match=r"attention_map: positions must lie within the spatial size"):
            compiled(query, key, positions)
        with pytest.raises(ValueError, match=r"attention_map: positions must lie within the spatial size \[6, 7\]"):
            function(query, key, positions)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced(name):
    traced = torch.jit.trace(MAPS[name], arguments(2, 6, 7))
    inputs = arguments(3, 9, 5)
    torch.testing.assert_close(traced(*inputs), MAPS[name](*inputs))


def test_positions_of_any_integer_type_and_as_lists():
    query, key, positions = arguments(1, 30, 20)
    expected = position_attention_map(query, key, positions, 0.5)
    for given in (positions.to(torch.int8), positions.tolist()):
        torch.testing.assert_close(position_attention_map(query, key, given, 0.5), expected)
    for wrong in (None, "ab", [[1], [2, 3]]):
        with pytest.raises(TypeError, match=r"position_attention_map: positions must be integers, .* \(got "):
            position_attention_map(query, key, wrong)


class Map(tnn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, query, key, positions):
        return MAPS[self.name](query, key, positions)


@pytest.mark.parametrize("name", MAPS)
def test_exported(name):
    sizes = {0: AUTO, 2: AUTO, 3: AUTO}
    program = torch.export.export(Map(name), arguments(2, 6, 7), dynamic_shapes=(sizes, sizes, {0: AUTO})).module()
    inputs = arguments(3, 9, 5)
    torch.testing.assert_close(program(*inputs), MAPS[name](*inputs))
    with pytest.raises(RuntimeError, match="positions must lie within the spatial size"):
        program(*inputs[:2], torch.tensor([(0, 5)]))


@pytest.mark.parametrize("name", MAPS)
def test_onnx_refuses_positions_outside(name, tmp_path):
    """ONNX has no assertion: an index outside stops the runtime."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    *features, positions = arguments(2, 6, 7)
    torch.onnx.export(Map(name).eval(), (*features, positions), tmp_path / "map.onnx", verbose=False)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(tmp_path / "map.onnx", options)
    query, key = (t.numpy() for t in features)
    (got,) = session.run(None, {"query": query, "key": key, "positions": positions.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), MAPS[name](*features, positions))
    for outside in OUTSIDE.values():
        wrong = positions.clone()
        wrong[1] = torch.tensor(outside)
        with pytest.raises(Exception, match="(?i)indices element out of data bounds|invalid ind"):
            session.run(None, {"query": query, "key": key, "positions": wrong.numpy()})
