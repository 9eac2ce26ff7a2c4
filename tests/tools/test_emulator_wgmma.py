"""The emulator's matrix products of a warpgroup (wgmma), their layouts and faults."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ..emulator import build
from ..emulator.fixtures import HERE
from ..emulator.tensor_core_model import GENERATIONS, truncated
from .test_emulator import (
    WRONG,
    everywhere,
    fragments,
    run_case,
    run_instruction,
    run_under_asan,
    runs_under_asan,
    sums_to_round,
    to_lanes,
    to_operand,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SHARED = 64 * 1024


def tables() -> dict[str, list[list[str]]]:
    """The tables of wgmma_layouts.txt by name."""
    result: dict[str, list[list[str]]] = {}
    for line in (Path(build.__file__).parent / "wgmma_layouts.txt").read_text().splitlines():
        if line.startswith("["):
            rows = result[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            rows.append(line.split())
    return result


TABLES = tables()
SWIZZLE = [[int(chunk) for chunk in row] for row in TABLES["swizzle 8x8"]]


def byte_of(row: int, byte: int) -> int:
    """Where the byte of this row of 128 lies in memory that starts with an atom."""
    return row * 128 + SWIZZLE[row % 8].index(byte // 16) * 16 + byte % 16


def place(shared: Tensor, matrix: Tensor, start: int, mn_major: bool, chunk: int, stride: int) -> None:
    """Writes a (rows or columns, contraction) matrix of 16-bit elements to shared memory, an int16 tensor, as a bulk
    copy with 128-byte swizzle does: boxes of 64 elements by 8 rows, 1024 bytes each."""
    rows = matrix.T if mn_major else matrix  # of contiguous elements
    for r in range(rows.shape[0]):
        for c in range(0, rows.shape[1], 8):
            at = start + (r // 8) * stride + (c // 64) * chunk + byte_of(r % 8, c % 64 * 2)
            shared[at // 2 : at // 2 + 8] = rows[r, c : c + 8]


def threads_of(table: list[list[str]], columns: int) -> list[list[tuple[int, int]]]:
    """A table of registers, repeated every 16 columns: at each row and column, the thread and the index."""
    count = 1 + max(int(cell.split(".")[1]) for row in table for cell in row)
    return [
        [(int(thread), int(i) + count * block) for block in range(columns // 16) for thread, i in cells]
        for cells in ([cell.split(".") for cell in row] for row in table)
    ]


def test_register_tables_hold_every_element_once():
    for name in ("a 64x16", "d 64x16"):
        cells = [cell for row in threads_of(TABLES[name], 16) for cell in row]
        assert sorted(cells) == [(thread, i) for thread in range(128) for i in range(8)]


@pytest.mark.parametrize("title", [t for t in TABLES if " start=" in t])
def test_descriptor_tables(variant, title):
    """A product with the identity reads each element from the byte that the table names."""
    major, *offsets = title.split()
    fields = {name: int(value) for name, value in (o.split("=") for o in offsets)}
    table = torch.tensor([[int(cell) for cell in row] for row in TABLES[title]])
    runs = table if major == "K" else table.T.contiguous()  # (rows or columns, runs) or (runs, contraction)
    shared = torch.zeros(SHARED // 2, dtype=torch.int16)
    b = torch.arange(1.0, 1025).view(64, 16)  # (columns, contraction); float16 has them all
    elements = b.half().view(torch.int16)
    start = 16 * 1024
    if major == "K":
        columns = runs.shape[0]
        for n in range(columns):
            for run in range(2):
                at = (start + int(runs[n, run])) // 2
                shared[at : at + 8] = elements[n, 8 * run : 8 * run + 8]
    else:
        columns = 64
        for run in range(columns // 8):
            for k in range(16):
                at = (start + int(runs[run, k])) // 2
                shared[at : at + 8] = elements[8 * run : 8 * run + 8, k]
    parameters = torch.zeros(16, dtype=torch.int32)
    parameters[4:8] = torch.tensor([start, fields.get("leading", 0), fields["stride"], fields["start"]])
    parameters[9] = 1
    identity = torch.zeros(64, 16)
    identity[:16] = torch.eye(16)
    registers = to_threads(identity.half(), threads_of(TABLES["a 64x16"], 16)).view(torch.float32)
    d = torch.zeros(128, 32)
    packed = torch.cat([x.contiguous().view(torch.float32).flatten() for x in (parameters, shared, registers, d)])
    name = f"wgmma_float16_registers_{major.lower()}_64"
    got = run_instruction(variant, name, packed, SHARED, 128 * 32).view(128, 32)
    product = from_threads(got, threads_of(TABLES["d 64x16"], 64))
    assert torch.equal(product[:16, :columns], b.T[:, :columns])


def to_threads(matrix: Tensor, table: list[list[tuple[int, int]]]) -> Tensor:
    """The matrix as the threads hold it: (128, elements per thread)."""
    index = torch.tensor(table)
    threads = torch.zeros(128, matrix.numel() // 128, dtype=matrix.dtype)
    threads[index[..., 0], index[..., 1]] = matrix
    return threads


def from_threads(threads: Tensor, table: list[list[tuple[int, int]]]) -> Tensor:
    index = torch.tensor(table)
    return threads[index[..., 0], index[..., 1]]


def run_wgmma(
    variant: str,
    dtype: str,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    *,
    a_major: str,
    b_major: str,
    k_step: int = 0,
    products: int = 1,
) -> Tensor:
    """c + a[:, k] b[k] for the k of one step of 16 of the contraction, or without c the product alone."""
    columns, depth = b.shape[1], a.shape[1]
    shared = torch.zeros(SHARED // 2, dtype=torch.int16)
    parameters = torch.zeros(16, dtype=torch.int32)
    registers = torch.zeros(128, 4)

    def operand(matrix: Tensor, major: str, start: int) -> list[int]:
        matrix = matrix.to(DTYPES[dtype]).view(torch.int16)
        if major == "mn":  # chunks of 64 rows or columns follow each other
            chunk, stride, advance = depth * 128, 1024, 2048 * k_step
        else:
            chunk, stride, advance = 0, 1024, 32 * k_step
        place(shared, matrix, start, major == "mn", chunk, stride)
        return [start, chunk, stride, advance]

    if a_major == "registers":
        part = a[:, 16 * k_step : 16 * k_step + 16].to(DTYPES[dtype])
        registers = to_threads(part, threads_of(TABLES["a 64x16"], 16)).view(torch.float32)
    else:
        parameters[:4] = torch.tensor(operand(a, a_major, 0))
    parameters[4:8] = torch.tensor(operand(b.T, b_major, 16 * 1024))
    parameters[8:10] = torch.tensor([c is not None, products])
    table = threads_of(TABLES["d 64x16"], columns)
    d = torch.full((128, columns // 2), float("nan")) if c is None else to_threads(c, table)
    packed = torch.cat([x.contiguous().view(torch.float32).flatten() for x in (parameters, shared, registers, d)])
    name = f"wgmma_{dtype}_{a_major}_{b_major}_{columns}"
    got = run_instruction(variant, name, packed, SHARED, 128 * columns // 2).view(128, columns // 2)
    return from_threads(got, table)


MAJORS = list(itertools.product(["k", "mn", "registers"], ["k", "mn"]))


@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize(("a_major", "b_major"), MAJORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgmma_by_the_tables(variant, dtype, a_major, b_major, columns):
    generator = torch.Generator().manual_seed(0)
    # Small integers: every product and sum is exact.
    a, b, c = (torch.randint(-8, 9, s, generator=generator).float() for s in ((64, 32), (32, columns), (64, columns)))
    for k_step, with_c in ((0, True), (1, False)):
        got = run_wgmma(variant, dtype, a, b, c if with_c else None, a_major=a_major, b_major=b_major, k_step=k_step)
        step = slice(16 * k_step, 16 * k_step + 16)
        assert torch.equal(got, a[:, step] @ b[step] + (c if with_c else 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wgmma_truncates_as_hardware_does(variant, dtype):
    """As mma.sync of sm_90: 16 products and the accumulator at once, 25 fraction bits. A sample of the elements."""
    lowest = -14 if dtype == "float16" else -126
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randint(64, (40,), generator=generator) for _ in range(2))
    for small_a, small_b, small_c in sums_to_round(DTYPES[dtype], 16):
        a, b = (to_operand(x, DTYPES[dtype]) for x in (small_a.repeat(4, 1), small_b.repeat(1, 8)))
        a, b = a[torch.randperm(64, generator=generator)], b[:, torch.randperm(64, generator=generator)]
        c = small_c.repeat(4, 8)
        got = run_wgmma(variant, dtype, a, b, c, a_major="registers", b_major="k")
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            x, y, z = a[row].tolist(), b[:, column].tolist(), c[row, column].item()
            assert got[row, column].item() == truncated(x, y, z, GENERATIONS[90], 2, lowest)


def test_wgmma_of_infinities_and_nan(variant):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((64, 16), (16, 64), (64, 64)))
    a, b = a.half().float(), b.half().float()
    expected = run_wgmma(variant, "float16", a, b, c, a_major="k", b_major="k")
    a[3, 1], b[4, 6] = float("nan"), float("-inf")
    got = run_wgmma(variant, "float16", a, b, c, a_major="k", b_major="k")
    others = [row for row in range(64) if row != 3]
    assert got[3].isnan().all()
    assert torch.equal(got[others, 6], a[others, 4] * float("-inf"))
    assert torch.equal(got[others][:, 7:], expected[others][:, 7:])


def test_without_accumulation_c_does_not_matter(variant):
    a, b = torch.ones(64, 16), torch.ones(16, 128)
    assert (run_wgmma(variant, "bfloat16", a, b, None, a_major="mn", b_major="mn", products=3) == 16).all()


@pytest.mark.parametrize(("a_major", "a_bytes"), [("k", 2048), ("mn", 2048), ("registers", 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_counters(variant, dtype, a_major, a_bytes):
    control = build.runtime(variant)
    control.reset()
    a, b, c = torch.zeros(64, 16), torch.zeros(16, 256), torch.zeros(64, 256)
    run_wgmma(variant, dtype, a, b, c, a_major=a_major, b_major="mn", products=3)
    (launch,) = control.report()
    flops = 3 * 2 * 64 * 256 * 16
    assert launch["wgmma_flops"] == flops
    assert launch["wgmma_flops_by_type"] == {"float16": 0, "bfloat16": 0, dtype: flops}
    assert (launch["wgmma_shared_a_bytes"], launch["wgmma_shared_b_bytes"]) == (3 * a_bytes, 3 * 8192)
    assert launch["mma_flops"] == 0


def test_stmatrix_counts_as_shared_writes(variant):
    if variant != "race":
        pytest.skip("only the race build counts memory accesses")
    control = build.runtime(variant)
    control.reset()
    run_instruction(variant, "stmatrix_x4_trans", torch.zeros(128), 0, 128)
    (launch,) = control.report()
    written = launch["memory"]["shared_write"]
    assert (written["instructions"], written["bytes"], written["wavefronts"]) == (1, 512, 4)


@runs_under_asan
def test_under_address_sanitizer():
    run_under_asan(__file__)


def test_stmatrix_by_the_table(variant):
    table = fragments()["ldmatrix.trans 8x8"]
    elements = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8)
    registers = torch.stack([to_lanes(matrix, table) for matrix in elements], 1)
    out = run_instruction(variant, "stmatrix_x4_trans", registers.contiguous().view(torch.float32), 0, 32 * 4)
    assert torch.equal(out.view(torch.int16).view(4, 8, 8), elements)


# ---- faults ------------------------------------------------------------------------------------------------------

AT = r"selftest_wgmma.cu:\d+"
PRODUCT = rf"wgmma.mma_async \({AT}\)"
IN_FLIGHT = rf"of the product at {AT}, which was not waited for"

# By kernel and variant, a pattern of the broken kernel's error, or WRONG.
FAULTS = {
    "no_wait": {**everywhere(WRONG), "race": rf"thread \d+ reads at {AT} an accumulator {IN_FLIGHT}"},
    "weak_wait": {
        **everywhere(rf"leaves the kernel before it waited for the product at {PRODUCT}"),
        "race": rf"thread \d+ reads at {AT} an accumulator {IN_FLIGHT}",
    },
    "accumulators_written": {"race": rf"thread \d+ writes at {AT} an accumulator {IN_FLIGHT}"},
    "a_rewritten": {**everywhere(WRONG), "race": rf"thread \d+ writes at {AT} a register of a {IN_FLIGHT}"},
    "a_out_of_scope": {
        "race": rf"thread \d+ writes at {AT} a register of a {IN_FLIGHT}",
        "asan": r"stack-use-after-scope: thread \d+ reads",
    },
    "operand_rewritten": {
        "race": rf"byte 8192: thread 0 writes at {AT} what wgmma.mma_async at {AT}, which has not finished, reads"
    },
    "refill": {"race": "with no barrier between|which has not finished, reads"},
    "no_fence": everywhere(rf"{PRODUCT}: needs a wgmma.fence before the first product"),
    "no_second_fence": {"race": rf"the product at {AT} needs a wgmma.fence: thread \d+ wrote its accumulators at {AT}"},
    "late_a_fence": {"race": rf"the product at {AT} needs a wgmma.fence: thread \d+ wrote its registers of a at {AT}"},
    "not_committed": everywhere(rf"leaves the kernel before it committed and waited for the product at {PRODUCT}"),
    "not_waited": everywhere(rf"leaves the kernel before it waited for the product at {PRODUCT}"),
    "no_proxy_fence": {
        "race": rf"wgmma.mma_async at {AT} reads what thread \d+ wrote at {AT} and executed no fence.proxy.async after"
    },
    "late_proxy_fence": {
        "race": rf"wgmma.mma_async at {AT} reads what thread \d+ wrote at {AT}, whose fence.proxy.async afterwards no "
        "barrier orders before it|and executed no fence.proxy.async after"
    },
    "unwritten_operand": {
        **everywhere(WRONG),
        "race": rf"byte 16\d+: thread \d+ of block \(0, 0, 0\) reads at {AT} what no thread of the block has written",
    },
    "divergent_line": everywhere(
        rf"divergent warpgroup: warp \d is at {PRODUCT}, but warp \d of the same warpgroup executed {PRODUCT}"
    ),
    "divergent_descriptor": everywhere(rf"divergent warpgroup: warp \d is at {PRODUCT} with other descriptors"),
    "divergent_count": everywhere(r"divergent warpgroup: warp \d .*warp \d executed"),
    "divergent_warp": everywhere(rf"divergent warp operation: this lane is at {PRODUCT}"),
    "misaligned_start": everywhere(
        rf"{PRODUCT}: the K-major operand b starts at byte 8208 of shared memory, which is 16"
    ),
    "misaligned_atom": everywhere(
        rf"{PRODUCT}: the K-major operand b starts at byte 8320 of shared memory, which is 128"
    ),
    "outside": everywhere(rf"{PRODUCT}: the operand b ends at byte 23552, outside the 16384 bytes of shared memory"),
    "partial_warpgroup": everywhere(rf"{PRODUCT}: the warpgroup of warp \d has fewer than 128 threads"),
    "no_full_wait": {
        "race": rf"wgmma.mma_async at {AT} reads what cp.async.bulk.tensor at {AT}, which has not finished, writes|"
        rf"cp.async.bulk.tensor at {AT} writes what wgmma.mma_async at {AT}, which has not finished, reads|"
        r"with no barrier between|what an asynchronous copy that was not waited for delivers|what no thread of the "
        "block has written"
    },
    "early_release": {
        "race": rf"cp.async.bulk.tensor at {AT} writes what wgmma.mma_async at {AT}, which has not finished, reads|"
        r"with no barrier between"
    },
    "one_warp_release": {
        "race": rf"cp.async.bulk.tensor at {AT} writes what wgmma.mma_async at {AT}, which has not finished, reads|"
        r"with no barrier between"
    },
    "other_shape": everywhere(rf"{PRODUCT}: 64 x 64 accumulators overlap the 64 x 128 of a product"),
}


PIPELINE = ("no_full_wait", "early_release", "one_warp_release")
DEPTH = 512  # of the pipeline's contraction


def run_faulty(variant: str, name: str, broken: bool) -> tuple[Tensor, Tensor]:
    """The kernel's output and the right one."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-4, 5, (2, 64, DEPTH if name in PIPELINE else 64), generator=generator).float()
    right = a @ b.T if name in (*PIPELINE, "other_shape") else 3 * (a @ b.T) + 1
    x = torch.stack([a, b])
    if name in PIPELINE:
        x = x.half()
    return run_case(variant, name, broken, x, DEPTH, right.numel()), right.flatten()


def test_every_faulty_kernel_is_tested():
    assert sorted(FAULTS) == sorted(build.selftest(HERE[0]).wgmma_cases())


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corrected_kernel_passes(variant, name, seed):
    build.runtime(variant).set_seed(seed)
    got, right = run_faulty(variant, name, False)
    assert torch.equal(got, right)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fault_is_found(variant, name, seed):
    pattern = FAULTS[name].get(variant)
    if pattern is None:
        pytest.skip("this build cannot find the fault")
    build.runtime(variant).set_seed(seed)
    if pattern is not WRONG:
        with pytest.raises(RuntimeError, match=f"(?s)emulator: .*({pattern})"):
            run_faulty(variant, name, True)
        return
    got, right = run_faulty(variant, name, True)
    assert not torch.equal(got, right)
