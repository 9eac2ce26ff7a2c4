"""Compiled resources of all CUDA kernels: no spills, tensor cores used, blocks that fit a multiprocessor, and an
up-to-date table in docs/cuda_resources.md. Needs nvcc but no device.

For sm_80, the tightest in registers, the sources are compiled. For the architectures of the built library, its machine
code is read."""

import re

import pytest

from tools import compilers, cuda_resources

COMPILED = 80


@pytest.fixture(scope="module")
def compiled():
    if compilers.nvcc() is None:
        pytest.skip("no nvcc")
    assert compilers.cuobjdump() is not None, "neither the toolkit's cuobjdump nor triton's"
    found = cuda_resources.compiled(cuda_resources.sources(), (COMPILED,))
    if (built := cuda_resources.library()) is not None:
        architectures = set(cuda_resources.ARCHITECTURES) - {COMPILED}
        found += [k for k in cuda_resources.read(built) if k.architecture in architectures]
    assert len({k.name for k in found}) > 100
    return found


@pytest.fixture(scope="module")
def launches(compiled, emulated_library):
    return cuda_resources.launches(emulated_library, tuple(sorted({k.architecture for k in compiled})))


def test_nothing_spills(compiled):
    assert [(k.name, k.architecture, k.local_bytes) for k in compiled if k.local_bytes] == []


def test_tensor_cores_do_the_products(compiled):
    """mma instructions in every kernel whose arithmetic is named Mma16 or Tf32, and in no other."""
    for kernel in compiled:
        wanted = re.search(r"Mma16|Tf32", kernel.name) is not None
        assert (kernel.tensor_core_instructions > 0) == wanted, kernel


def test_blocks_fit(compiled, launches):
    """A multiprocessor holds at least one block of every launch, and two of position attention's small tiles of four
    warps."""
    launched = [(k, launches[k.name, k.architecture]) for k in compiled if (k.name, k.architecture) in launches]
    assert len(launched) > 80
    for kernel, launch in launched:
        blocks = cuda_resources.blocks_per_multiprocessor(kernel, launch)
        small = "WeightedSumTraits" in kernel.name and launch.threads == 128 and launch.dynamic_shared_bytes < 50 << 10
        assert blocks >= 1 + small, kernel


def test_table_is_up_to_date(compiled, launches):
    """The table lists the kernels of the source. Its figures are compared if the same compiler produced it."""
    text = cuda_resources.TABLE.read_text()
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    head, *body = lines
    cells = {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in body}
    same_compiler = re.search(r"nvcc ([\d.]+);", text)[1] == cuda_resources.nvcc_release()
    again = "; run `python -m tools.cuda_resources`"
    for kernel in compiled:
        if "__half" in kernel.name and kernel.name.replace("__half", "bfloat16") in cells:
            continue  # the table omits float16, the twin of bfloat16
        assert kernel.name in cells, f"{kernel.name} is not in the table{again}"
        if same_compiler:
            expected = cuda_resources.cell(kernel, launches.get((kernel.name, kernel.architecture)))
            assert cells[kernel.name][f"sm_{kernel.architecture}"] == expected, f"{kernel}{again}"
    assert cells.keys() <= {k.name for k in compiled}, f"the table has kernels that are gone{again}"
