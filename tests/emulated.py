"""Shared by the tests of emulated CUDA kernels."""

import os
import subprocess
import sys

import pytest
import torch

from segattn_ops import _position_engine, _selection

from .emulator import build


@pytest.fixture
def emulator(emulated_library):
    """The control module, on an H200 with counters at zero; restores all settings."""
    emulated_library.set_device(90)
    emulated_library.reset()
    yield emulated_library
    emulated_library.set_device(90)
    emulated_library.set_current_stream(1)
    emulated_library.set_built_architectures([])
    emulated_library.set_built_for_sm90a(True)
    emulated_library.set_failing_launch(-1)
    emulated_library.set_failing_call(-1)
    emulated_library.set_blocks_at_ends(-1)
    emulated_library.set_mma_rounding("truncate")
    torch.ops.segattn_emulated._set_allow_tf32(False)
    torch.ops.segattn_emulated._set_position_engine(_position_engine.position_engine_setting("segattn_emulated"))


@pytest.fixture
def without_wgmma(emulator):
    """The library as if it had no code for sm_90a: mma.sync serves 16-bit types on every device."""
    emulator.set_built_for_sm90a(False)


def register_backend():
    """Adds "emulated" to the choices of use_backend. The emulated library must be loaded."""
    if "emulated" not in _selection.NAMESPACES:
        _selection.add_backend("emulated", "segattn_emulated")


@pytest.fixture
def traced(emulator):
    if not emulator.traced:
        pytest.skip("counts memory accesses: runs in the race build, which test_race_build starts")
    return emulator


def global_bytes(launch, sectors=True):
    """Bytes by kind of global access: in whole sectors, as the memory system moves them, or as requested."""
    return {
        kind: 32 * counted["sectors"] if sectors else counted["bytes"]
        for kind, counted in launch["memory"].items()
        if kind.startswith("global")
    }


def conflicts(launch):
    """Passes over shared memory, relative to those without bank conflicts."""
    counted = [c for kind, c in launch["memory"].items() if kind.startswith("shared")]
    return sum(c["wavefronts"] for c in counted) / sum(c["ideal_wavefronts"] for c in counted)


def assert_same_bits(emulator, function):
    results = []
    for seed in (1, 2, 3):
        emulator.set_seed(seed)
        results.append(function())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def run_in(variant, file, selection, seconds=1500):
    """Runs some tests of a file over another build of the kernels, in a new process: a process can load one build."""
    if os.environ.get("SEGATTN_EMULATOR_VARIANT", "plain") != "plain":
        pytest.skip(f"started by the plain build only, not by the {variant} build itself")
    launcher = ["-m", "tests.emulator.asan"] if variant == "asan" else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selection],
        cwd=build.ROOT,
        env=os.environ | {"SEGATTN_EMULATOR_VARIANT": variant, "SEGATTN_TEST_BACKENDS": "emulated"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
