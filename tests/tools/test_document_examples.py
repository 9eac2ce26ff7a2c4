"""The Python blocks of the README and of every page of the site run, in their order, each page in a folder of its own.

A page may hold two kinds of comments, which its readers do not see: a block that provides what a reader has,

    <!--- invisible-code-block: python
    model = torch.nn.Sequential(...)
    -->

and a reason not to run the next block: `missing(package)`, which SEGATTN_REQUIRE_INTEROP=1 makes an error, or the test
that runs it instead:

    <!--- skip: next if(missing("mmengine"), reason="needs mmengine") -->
    <!--- skip: next "run by tests/modules/test_onnx.py" -->
"""

import importlib.util
import os
import re
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text()
]


def missing(package: str) -> bool:
    found = importlib.util.find_spec(package) is not None
    assert found or os.environ.get("SEGATTN_REQUIRE_INTEROP") != "1", f"{package} is not installed"
    return not found


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page)
    document.namespace["missing"] = missing
    skipped = []
    with torch.random.fork_rng():
        for example in document.examples():
            try:
                example.evaluate()
            except SkipTest as reason:
                skipped.append(str(reason))
    assert all(re.fullmatch(r"needs \w+|run by tests/\S+", reason) for reason in skipped), skipped
    assert all((ROOT / reason.split()[-1]).exists() for reason in skipped if reason.startswith("run by")), skipped
