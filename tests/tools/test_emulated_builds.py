"""The op suite on the emulator's race and asan builds: no data races, no out-of-bounds accesses."""

import pytest

from ..emulated import run_in

# Without float64, whose scalar path is slow in these builds, and float16, whose kernels are those of bfloat16.
CHOICE = "(as_exact_as_eager or any_strides) and not float64 and not -float16"


@pytest.mark.slow
@pytest.mark.parametrize("families", ["position", "channel_", "criss_cross"])
@pytest.mark.parametrize("variant", ["race", "asan"])
def test_no_faults(variant, families):
    run_in(variant, "tests/ops/test_ops.py", f"{families} and {CHOICE}")
