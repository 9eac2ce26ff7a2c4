"""Compiled resources of all CUDA kernels: no spills, tensor cores used, blocks that fit a multiprocessor, and an
up-to-date table in docs/cuda_resources.md. Needs nvcc but no device.

For sm_80, the tightest in registers, and for sm_90a the sources are compiled. For the architectures of the built
library, its machine code is read."""

import re

import pytest

from tools import compilers, cuda_resources

pytestmark = pytest.mark.slow  # the fixture
COMPILED = 80


@pytest.fixture(scope="module")
def compiled():
    if compilers.nvcc() is None:
        pytest.skip("no nvcc")
    assert compilers.cuobjdump() is not None, "neither the toolkit's cuobjdump nor triton's"
    found = cuda_resources.compiled(cuda_resources.sources(), (COMPILED,))
    found += cuda_resources.compiled(cuda_resources.sm90a_sources(), cuda_resources.SM90A)
    if (built := cuda_resources.library()) is not None:
        architectures = set(cuda_resources.ARCHITECTURES) - {COMPILED}
        known = {k.name for k in found if k.warpgroup_products}
        found += [k for k in cuda_resources.read(built) if k.architecture in architectures and k.name not in known]
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


def test_warpgroups_do_the_products_for_sm90a(compiled):
    """wgmma and bulk copies in every kernel of the files for sm_90a, no mma.sync, and more registers for the consumer
    warpgroups than for the producer. compiled() has raised if ptxas reports a serialised product."""
    kernels = [kernel for kernel in compiled if "wgmma" in kernel.name]
    assert kernels and {k.name for k in compiled if k.warpgroup_products or k.bulk_copies} == {k.name for k in kernels}
    for kernel in kernels:
        assert kernel.warpgroup_products > 0 and kernel.bulk_copies > 0, kernel
        assert len(kernel.warpgroup_registers) == 2, kernel
        producer, consumer = kernel.warpgroup_registers
        assert producer < kernel.registers < consumer, kernel
        assert 128 * (producer + 2 * consumer) <= cuda_resources.REGISTERS, kernel


SERIALISED = """
#include "cuda/common/ptx_sm90.cuh"
namespace segattn::cuda {{
__global__ void __launch_bounds__(128) product_kernel(float* data) {{
  float d[8][4] = {{}};
  const uint64_t a = ptx::matrix_descriptor(data, 16, 1024);
  ptx::wgmma_fence();
  ptx::wgmma<__half, ptx::MatrixMajor::kK, ptx::MatrixMajor::kK>(d, a, a, true);
  ptx::wgmma_commit();
  {first}
  {second}
  for (int j = 0; j < 8; ++j) {{
    data[threadIdx.x + 128 * j] = d[j][0] + d[j][1] + d[j][2] + d[j][3];
  }}
}}
}}
"""


@pytest.mark.parametrize("waits_first", [True, False])
def test_a_product_that_ptxas_waits_for_is_refused(waits_first, tmp_path, monkeypatch):
    """Accumulators that are changed after the wait, and before it."""
    if compilers.nvcc() is None:
        pytest.skip("no nvcc")
    steps = ["ptx::wgmma_wait<0>();", "d[0][0] += data[0];"]
    first, second = steps if waits_first else steps[::-1]
    monkeypatch.setattr(cuda_resources, "ROOT", tmp_path)
    monkeypatch.setattr(compilers, "ROOT", tmp_path)
    file = tmp_path / "product_sm90.cu"
    file.write_text(SERIALISED.format(first=first, second=second))
    if waits_first:
        (kernel,) = cuda_resources.compiled([file], cuda_resources.SM90A)
        assert (kernel.architecture, kernel.warpgroup_products, kernel.warpgroup_registers) == (90, 1, ())
    else:
        with pytest.raises(RuntimeError, match=r"ptxas did not compile wgmma(.|\n)*warpgroup\.wait is injected"):
            cuda_resources.compiled([file], cuda_resources.SM90A)


def test_blocks_fit(compiled, launches):
    """A multiprocessor holds at least one block of every launch, and two of position attention's small tiles of four
    warps."""
    launched = [(k, launches[k.name, k.architecture]) for k in compiled if (k.name, k.architecture) in launches]
    assert len(launched) > 80
    of_warpgroups = {kernel.name for kernel in compiled if kernel.warpgroup_products}
    assert of_warpgroups <= {kernel.name for kernel, _ in launched}
    for kernel, launch in launched:
        blocks = cuda_resources.blocks_per_multiprocessor(kernel, launch)
        small = "WeightedSumTraits" in kernel.name and launch.threads == 128 and launch.dynamic_shared_bytes < 50 << 10
        assert blocks >= 1 + small, kernel


def test_table_is_up_to_date(compiled, launches):
    """The table lists the kernels of the source. Its figures are compared if the same compiler produced it."""
    text = cuda_resources.TABLE.read_text()
    lines = [[c.strip() for c in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    second = next(i for i in range(1, len(lines)) if lines[i][0] == "kernel")
    head, *body = lines[:second]
    cells = {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in body}
    for_sm90a = {row[0].strip("`"): row[1:] for row in lines[second + 1 :]}
    same_compiler = re.search(r"nvcc ([\d.]+);", text)[1] == cuda_resources.nvcc_release()
    again = "; run `python -m tools.cuda_resources`"
    for kernel in compiled:
        listed = for_sm90a if kernel.warpgroup_products else cells
        if cuda_resources.is_twin(kernel.name, listed):
            continue
        assert kernel.name in listed, f"{kernel.name} is not in the table{again}"
        if same_compiler:
            launch = launches.get((kernel.name, kernel.architecture))
            if kernel.warpgroup_products:
                assert for_sm90a[kernel.name] == cuda_resources.warpgroup_cells(kernel, launch), f"{kernel}{again}"
            else:
                expected = cuda_resources.cell(kernel, launch)
                assert cells[kernel.name][f"sm_{kernel.architecture}"] == expected, f"{kernel}{again}"
    assert cells.keys() | for_sm90a.keys() <= {k.name for k in compiled}, f"the table has kernels that are gone{again}"
