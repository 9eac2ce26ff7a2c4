"""The list of planted faults fits the present sources. run_faults.py plants them."""

import re

import pytest

from .faults import ROOT, Fault, listed

KINDS, FAULTS = listed()


def test_the_list():
    assert len(FAULTS) >= 60
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    assert {fault.kind for fault in FAULTS} == set(KINDS)
    assert len({(fault.file, fault.find, fault.replace) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.id for fault in FAULTS])
def test_an_entry(fault: Fault):
    source = (ROOT / fault.file).read_text()
    assert source.count(fault.find) == 1, f"{fault.find!r} must occur once in {fault.file}"
    assert fault.replace != fault.find
    assert fault.models.endswith(".")
    assert fault.builds in ("", "cpu", "emulated")
    assert fault.file.startswith("csrc/") == bool(fault.builds)
    assert len(fault.sources()) == len(fault.units), f"the units {fault.units} are {fault.sources()}"
    assert bool(fault.units) == bool(fault.builds)
    files = [argument for argument in fault.tests if argument.startswith("tests/")]
    assert files
    for file in files:
        path, *names = re.sub(r"\[.*", "", file).split("::")
        text = (ROOT / path).read_text()
        for name in names:
            assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE), f"{path} has no {name}"
