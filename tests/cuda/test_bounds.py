"""Instructions and passes over shared memory for each tensor-core instruction of the main kernels, walked in the
machine code of the built library (tools/cuda_bounds). Needs the compiler of docs/cuda_bounds.md but no device: another
one may take other instructions, and other numbers of them."""

import pytest

from tools import compilers, cuda_resources
from tools.cuda_bounds import document, launches

pytestmark = pytest.mark.slow  # the fixture
ARCHITECTURE = 90
# The most instructions and the most passes for each mma in bfloat16, by operator and kernel. A change that needs fewer
# lowers the limit; docs/cuda_bounds.md has the bounds that follow.
LIMITS = {
    ("position", "weighted_sum"): (4.32, 1.67),
    ("position", "query_key_gradient"): (4.08, 2.02),
    ("criss_cross", "line_attention"): (21.9, 5.9),
    ("criss_cross", "line_sum"): (31.3, 7.05),
    ("criss_cross", "line_backward"): (19.9, 8.2),
    ("channel", "gram"): (5.75, 2.15),
    ("channel", "channel_combine"): (3.27, 1.71),
}
# Of the limits. A single sample of criss-cross attention computes its weights several times, to occupy the GPU.
SIZES = {"position": (64, 64, 1), "criss_cross": (97, 97, 8), "channel": (64, 64, 1)}
EVERY_BLOCK = (7, 9)  # height and width at which all thread blocks are walked


@pytest.fixture(scope="module")
def walkers():
    if compilers.nvcc() is None or compilers.cuobjdump() is None:
        pytest.skip("no nvcc or no cuobjdump")
    if f"with nvcc {cuda_resources.nvcc_release()}," not in document.DOCUMENT.read_text():
        pytest.skip("not the compiler of docs/cuda_bounds.md")
    if (built := cuda_resources.library()) is None:
        pytest.skip("no CUDA library built in place")
    found = launches.Walkers([built])
    if not any(architecture == ARCHITECTURE for architecture, _ in found.places):
        pytest.skip(f"the library has no code for sm_{ARCHITECTURE}")
    return found


@pytest.mark.parametrize("operator", launches.OPERATORS)
def test_every_mma_is_walked(walkers, emulated_library, operator):
    """The walk of all thread blocks finds exactly the tensor-core instructions that the emulator executes."""
    problem = launches.Problem(operator, *EVERY_BLOCK, 1)
    counted = 0
    for launch in launches.record(emulated_library, problem, ARCHITECTURE, blocks=-1):
        work = launches.work(launch, walkers.of(ARCHITECTURE, launch.kernel), list(range(launch.grid)))
        assert work.instructions["tensor"] * launch.grid * 4096 == pytest.approx(launch.mma_flops), launch.kernel
        counted += launch.mma_flops > 0
    assert counted >= 2


@pytest.mark.parametrize("operator", launches.OPERATORS)
def test_instructions_for_each_mma(walkers, emulated_library, operator):
    problem = launches.Problem(operator, *SIZES[operator])
    found: dict[str, tuple[float, float]] = {}
    for launch in launches.record(emulated_library, problem, ARCHITECTURE):
        work = launches.work(launch, walkers.of(ARCHITECTURE, launch.kernel), launches.spread(launch.grid, 1))
        if mma := work.instructions["tensor"]:
            before = found.get(launch.title, (0.0, 0.0))
            found[launch.title] = (max(before[0], work.per_mma), max(before[1], work.passes / mma))
    assert found.keys() == {kernel for of, kernel in LIMITS if of == operator}
    for kernel, figures in found.items():
        limits = LIMITS[operator, kernel]
        assert all(figure <= limit for figure, limit in zip(figures, limits, strict=True)), (kernel, figures, limits)
