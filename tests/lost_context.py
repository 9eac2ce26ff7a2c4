"""What a test does to the tests after it, on a GPU.

An illegal address or a failed assertion in a kernel ends the process's CUDA context: every later CUDA call of the
process raises the same error. Without this hook one such kernel fails all tests that follow in its process.
"""

import os
import sys

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """After a failed GPU test that leaves the context unusable, ends the pytest-xdist worker. A fresh worker goes on
    with the tests that follow, and the test is reported as the one that crashed. In one process, ends the run."""
    report = yield
    if report.failed and item.get_closest_marker("cuda") and (error := why_lost()):
        message = f"the CUDA context is lost ({error})"
        if not hasattr(item.config, "workerinput"):
            item.session.shouldstop = message
            return report
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
        sys.stderr.write(f"{item.nodeid}: {message}, worker ends\n{report.longreprtext}\n")
        sys.stderr.flush()
        os._exit(1)
    return report


def why_lost() -> str | None:
    """The first line of the error with which the context answers every call, if it does."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
