"""The search itself: a call is repeated to the bit from its file, and a failing one is shrunk and kept."""

import json

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given

from .. import backends
from . import exploration
from .calls import LAYOUTS, REPEATING, Call, in_layout, make
from .strategies import calls


@hypothesis.settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(call=calls(budgets=(20_000,)))
def test_a_file_repeats_the_call(call):
    again = Call.from_json(json.loads(json.dumps(call.to_json())))
    assert again == call
    first, second = make(call), make(again)
    for a, b in zip([*first.inputs, first.grad_output], [*second.inputs, second.grad_output], strict=True):
        assert a.stride() == b.stride() and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    """Only those that repeat elements have other numbers, and all but one are not contiguous or start elsewhere."""
    t = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    changed = in_layout(t, name)
    assert changed.shape == t.shape
    assert torch.equal(changed, t) == (name not in REPEATING)
    is_plain = changed.is_contiguous() and changed.storage_offset() == 0
    assert is_plain == (name == "contiguous")


class Request:
    """What an Explorer reads of a test."""

    class node:
        originalname = "test_equals_float64"
        nodeid = "tests/properties/test_properties.py::test_equals_float64"
        user_properties: list[tuple[str, int]] = []


def test_a_failing_call_is_shrunk_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exploration, "REGRESSIONS", tmp_path)
    monkeypatch.setattr(exploration, "SEED", 0)  # one that draws more than eight in its first round
    monkeypatch.setattr(Request.node, "user_properties", [])
    box = exploration.TimeBox(0.0)
    box.add(Request.node.nodeid, 1.0)
    explorer = exploration.Explorer(Request, backends.ALL["reference"], box)

    def no_more_than_eight_key_channels(call: Call) -> None:
        assert call.shapes[0][1] <= 8

    with pytest.raises(AssertionError):
        explorer(calls(ops=("criss_cross_affinity",)), no_more_than_eight_key_channels, 1)
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["property"] == "equals_float64" and kept["backends"] == ["reference"]
    call = Call.from_json(kept["call"])
    assert call.shapes[0][1] == 9  # the next size
    assert call.layouts == ("contiguous",) * 3 and call.dtype == "float32"
    counts = dict(Request.node.user_properties)
    assert counts["inputs tried"] == counts["inputs tried of criss_cross_affinity"] >= 1
