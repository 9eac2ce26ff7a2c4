"""A pytest plugin, loaded in processes under a sanitizer: a test fails if there are reports after it, and the tests and
the reports are counted in the records of the run."""

import os
from pathlib import Path

import pytest

import segattn_ops

from .process import written

REPORTS = Path(os.environ["SEGATTN_SANITIZER_REPORTS"])
NAME = {"address": "AddressSanitizer", "undefined": "UndefinedBehaviorSanitizer", "thread": "ThreadSanitizer"}[
    os.environ["SEGATTN_SANITIZER"]
]

if Path(segattn_ops.__file__).parents[1] != Path(os.environ["SEGATTN_SANITIZER_PACKAGE"]):
    raise ImportError(f"{segattn_ops.__file__} is not the package of the sanitizer's build")

_seen = 0  # characters


@pytest.fixture(autouse=True)
def _no_reports(request):
    global _seen
    yield
    text = written(REPORTS)
    found, _seen = text[_seen:], len(text)
    request.node.user_properties += [(f"tests under {NAME}", 1), (f"reports of {NAME}", int(bool(found)))]
    if found:
        pytest.fail(f"{NAME} reports:\n{found[:5000]}", pytrace=False)
