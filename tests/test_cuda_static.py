"""What the compiler makes of the CUDA kernels, wherever nvcc is: no spills, tensor cores used, blocks that fit, and the
table in docs/cuda_resources.md true. sm_80 is compiled, the tightest in registers."""

import re

import pytest

from benchmarks import cuda_resources

ARCHITECTURE = 80


@pytest.fixture(scope="module")
def compiled():
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc on PATH and CUDA_HOME is not set")
    return cuda_resources.measure((ARCHITECTURE,), ("position_bfloat16.cu", "position_3xtf32.cu"))


def test_nothing_spills(compiled):
    assert len(compiled) >= 16
    assert [k.name for k in compiled if k.spilled_bytes] == []


def test_tensor_cores_do_the_products(compiled):
    if cuda_resources.cuobjdump() is None:
        pytest.skip("no cuobjdump, neither the toolkit's nor triton's")
    assert [k.name for k in compiled if not k.tensor_core_instructions] == []


def test_blocks_fit(compiled):
    """A multiprocessor takes at least one block of each kernel at E = 64; of two, four warps each, the small tiles."""
    for kernel in compiled:
        assert kernel.dynamic_shared_bytes is not None, kernel.name
        assert kernel.fits() and kernel.blocks_per_multiprocessor() >= 1, kernel.name
        if "WeightedSumTraits" in kernel.name and kernel.threads == 128:
            assert kernel.blocks_per_multiprocessor() >= 2, kernel.name


def test_table_is_true(compiled):
    """The kernels of the table are those of the source; with the compiler that made it, the figures too."""
    recorded = {}
    text = cuda_resources.TABLE.read_text()
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            recorded[cells[0].strip("`")] = cells[1:]
    same_compiler = re.search(r"nvcc ([\d.]+);", text)[1] == cuda_resources.nvcc_release()
    for kernel in compiled:
        threads, static, dynamic, sm_80, *_ = recorded[kernel.name]
        expected = (kernel.threads, kernel.static_shared_bytes, kernel.dynamic_shared_bytes)
        assert (int(threads), int(static), int(dynamic)) == expected, kernel.name
        if same_compiler:
            assert sm_80.split(" / ")[0] == str(kernel.registers), kernel.name
