"""Calls for which a property once did not hold, of the product or of a copy with a planted fault ("found" in the file
says which). `make fuzz` adds those that it finds, shrunk."""

import json
from pathlib import Path

import pytest

from ..properties.calls import Call, settings
from ..properties.properties import PROPERTIES

FILES = sorted(Path(__file__).parent.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kept_call(backend, file, request):
    kept = json.loads(file.read_text())
    if backend.name not in kept["backends"]:
        pytest.skip(f"a call of {', '.join(kept['backends'])}")
    call = Call.from_json(kept["call"])
    with settings(call, backend):
        PROPERTIES[kept["property"]](call, backend)
    request.node.user_properties.append(("inputs tried", 1))
