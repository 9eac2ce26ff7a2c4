"""The op suite on the emulator's builds that look for faults: no data races, no access out of bounds."""

import pytest

from ..emulated import run_in

# float64's scalar path is slow in these builds; float16's kernels are bfloat16's.
CHOICE = "(as_exact_as_eager or any_strides) and not float64 and not -float16"


@pytest.mark.slow
@pytest.mark.parametrize("families", ["position", "channel_", "criss_cross"])
@pytest.mark.parametrize("variant", ["race", "asan"])
def test_no_faults(variant, families):
    run_in(variant, "tests/ops/test_ops.py", f"{families} and {CHOICE}")
