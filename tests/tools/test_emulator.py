"""The emulator itself: it finds the fault of each faulty kernel and passes its corrected twin, instructions follow the
PTX ISA, launches fail as on a GPU, and counters match figures worked out by hand."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ..emulator import asan, build
from ..emulator.fixtures import HERE, IN_ASAN
from ..emulator.tensor_core_model import GENERATIONS, to_nearest, truncated

NAN = float("nan")
WRONG = "wrong numbers"  # no error, but the output differs from the right one


runs_under_asan = pytest.mark.skipif(IN_ASAN, reason="runs in the process that this test starts")


def run_under_asan(file: str) -> str:
    """Runs a file's tests in the AddressSanitizer build; their output."""
    build.build("asan", "selftest")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(command, env=asan.environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.fixture
def traced():
    """The control module of a build that counts."""
    if IN_ASAN:
        pytest.skip("the asan build does not count")
    control = build.runtime("race")
    control.set_device(90)
    control.reset()
    return control


def ramp(size: int) -> Tensor:
    return torch.arange(1.0, size + 1)


def run_case(variant: str, name: str, broken: bool, x: Tensor, size: int, out_size: int) -> Tensor:
    out = torch.full((out_size,), NAN)
    build.selftest(variant).run_case(name, broken, x.data_ptr(), out.data_ptr(), size)
    return out


def run_instruction(variant: str, name: str, x: Tensor, size: int, out_size: int) -> Tensor:
    out = torch.full((out_size,), NAN)
    build.selftest(variant).run_instruction(name, x.data_ptr(), out.data_ptr(), size)
    return out


# ---- faults ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A kernel of selftest_kernels.cu.

    Args:
        name: name of the kernel.
        x: input.
        right: output without the fault.
        found: by variant, a pattern of the broken kernel's error, or WRONG. Variants left out cannot find the fault.
        size: the kernel's size argument.
    """

    name: str
    x: Tensor
    right: Tensor
    found: dict[str, str]
    size: int = 128


def reversed_fours(x: Tensor) -> Tensor:
    return x.view(-1, 4).flip(0).flatten()


def product_input() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-8, 9, (256 + 128,), generator=generator).float()


X = ramp(128)
MATRIX_TILE = ramp(512)
HALVES = torch.cat([X[:64], (X[64:].view(-1, 4) * torch.tensor([1.0, 1, 0, 0])).flatten()])
BARRIER = "with no barrier between"
OTHER_BLOCK = "of another block"
UNWRITTEN = "what no thread of the block has written"
IN_FLIGHT = "what an asynchronous copy that was not waited for delivers"
EVERYWHERE = ("plain", "race", "asan")
MISALIGNED = "misaligned access.*aligned to the 16 bytes"


def everywhere(pattern: str) -> dict[str, str]:
    return dict.fromkeys(EVERYWHERE, pattern)


def unordered(pattern: str) -> dict[str, str]:
    """A missing barrier: wrong numbers under some schedules, including the default one; an error in the race build."""
    return {"plain": WRONG, "race": pattern, "asan": WRONG}


FAULTS = (
    Fault("reverse", X, X.flip(0), unordered(BARRIER)),
    Fault(
        "reverse_static",
        ramp(384),
        ramp(384).view(3, 128).flip(1).flatten(),
        {**everywhere(WRONG), "race": rf"of block \([12], 0, 0\) reads at selftest_kernels.cu:\d+ {UNWRITTEN}"},
        384,
    ),
    Fault("half_written_word", X, X.view(-1, 2)[:, :1].expand(-1, 2).flatten(), {"race": f"byte 254: .*{UNWRITTEN}"}),
    Fault("unwritten_matrix_row", X, X[:124], {"race": f"byte 496: thread 31 of .*{UNWRITTEN}"}),
    Fault("shared_bounds", X, X + X.roll(-1), {"asan": r"heap-buffer-overflow.*reads 4 bytes at selftest_kernels.cu"}),
    Fault("global_bounds", X, X + X.roll(-1), {"asan": r"heap-buffer-overflow.*reads 4 bytes at selftest_kernels.cu"}),
    Fault("async_copy", X, reversed_fours(X), {**everywhere(WRONG), "race": IN_FLIGHT}),
    Fault("async_refill", X, torch.cat([reversed_fours(X[:64]), reversed_fours(X[64:])]), {"race": BARRIER}),
    Fault("async_groups", X, HALVES, {**everywhere(WRONG), "race": IN_FLIGHT}),
    Fault(
        "deadlock",
        X,
        X,
        everywhere(
            r"deadlock in kernel deadlock, block \(0, 0, 0\): 128 threads wait and none can run\n"
            r"  thread 0: wait at __syncwarp \(selftest_kernels.cu:\d+\) for lanes 0xffffffff\n"
            r"  threads 1-31: wait at __syncthreads \(selftest_kernels.cu:\d+\)\n"
        ),
    ),
    Fault("divergent_barrier", X, X, everywhere(r"divergent barrier: this thread is at __syncthreads \(.*")),
    Fault("partial_warp", X, X, everywhere(r"mma.m16n8k16.f16 .*needs all 32 lanes of the warp")),
    Fault("divergent_mma", X, X, everywhere(r"divergent warp operation: this lane is at mma.m16n8k16.f16")),
    Fault("shuffle_mask", X, X.view(-1, 2).flip(1).flatten(), everywhere("not in its own mask 0x0000ffff")),
    Fault("warp_exchange", X, X[torch.arange(128) ^ 5], unordered(BARRIER)),
    Fault("warp_exchange_by_shuffle", X, X[torch.arange(128) ^ 5], {"race": BARRIER}),
    Fault("block_overlap", X, X, {**everywhere(WRONG), "race": f"writes at .*{OTHER_BLOCK} wrote"}),
    Fault("block_reads_other", X, torch.cat([X, X]), {**everywhere(WRONG), "race": OTHER_BLOCK}),
    Fault("global_exchange", X, torch.cat([X, X.flip(0)]), unordered(BARRIER)),
    Fault("misaligned", ramp(136), X.view(-1, 4).sum(1), dict.fromkeys(("plain", "race"), MISALIGNED)),
    Fault("misaligned_async", ramp(136), X[::4], everywhere("cp.async.*not aligned to 16 bytes")),
    Fault("misaligned_matrix", MATRIX_TILE, X[:32], everywhere("ldmatrix.x4 .*not aligned to 16 bytes")),
    Fault("async_bounds", X, X[::4], everywhere("cp.async .*outside the 512 bytes of shared memory")),
    Fault("lane_mapping", product_input(), torch.empty(0), everywhere(WRONG)),
    Fault(
        "register_bounds", X, X, {"plain": "index 4 is outside 'float", "asan": "stack-buffer-overflow.*reads 4 bytes"}
    ),
    Fault("incomplete_output", X, X, everywhere(WRONG)),
)


def right_output(fault: Fault) -> Tensor:
    if fault.name == "lane_mapping":
        return (fault.x[:256].view(16, 16) @ fault.x[256:].view(16, 8)).flatten()
    return fault.right


def test_every_faulty_kernel_is_tested():
    assert sorted(f.name for f in FAULTS) == sorted(build.selftest(HERE[0]).cases())
    for fault in FAULTS:
        assert fault.found, fault.name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corrected_kernel_passes(variant, fault, seed):
    build.runtime(variant).set_seed(seed)
    right = right_output(fault)
    torch.testing.assert_close(run_case(variant, fault.name, False, fault.x, fault.size, len(right)), right)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_fault_is_found(variant, fault):
    pattern = fault.found.get(variant)
    if pattern is None:
        pytest.skip("this build cannot find the fault")
    right = right_output(fault)
    # Broken kernels may write more elements than correct ones, but no more than this.
    out_size = max(len(right), 2 * fault.size)
    if pattern is not WRONG:
        with pytest.raises(RuntimeError, match=f"(?s)emulator: .*{pattern}"):
            run_case(variant, fault.name, True, fault.x, fault.size, out_size)
        return
    got = run_case(variant, fault.name, True, fault.x, fault.size, out_size)[: len(right)]
    assert not torch.equal(got, right)


def test_missing_barrier_shows_in_numbers_under_most_schedules():
    """Plain builds find missing barriers by running under several seeds."""
    fault = next(f for f in FAULTS if f.name == "reverse")
    wrong = 0
    for seed in range(20):
        build.runtime(HERE[0]).set_seed(seed)
        wrong += not torch.equal(run_case(HERE[0], fault.name, True, fault.x, fault.size, 128), fault.right)
    assert wrong >= 15


def test_same_seed_same_schedule():
    def outcome(seed: int) -> list[float]:
        build.runtime(HERE[0]).set_seed(seed)
        return run_case(HERE[0], "reverse", True, X, 128, 128).nan_to_num(-1).tolist()

    assert outcome(3) == outcome(3)
    assert len({tuple(outcome(seed)) for seed in range(5)}) > 1


def test_fault_leaves_the_emulator_usable(variant):
    with pytest.raises(RuntimeError):
        run_case(variant, "deadlock", True, X, 128, 256)
    torch.testing.assert_close(run_case(variant, "deadlock", False, X, 128, 128), X)


@runs_under_asan
def test_under_address_sanitizer():
    listed = run_under_asan(__file__)
    assert "test_fault_is_found[asan-global_bounds]" not in listed  # listed only when skipped or failed


# ---- instructions ------------------------------------------------------------------------------------------------


def fragments() -> dict[str, list[list[tuple[int, int]]]]:
    """The tables of fragments.txt by name: at each row and column, the lane and the index among the lane's elements."""
    tables, rows = {}, []
    for line in (Path(build.__file__).parent / "fragments.txt").read_text().splitlines():
        if line.startswith("["):
            rows = tables[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            rows.append([tuple(map(int, cell.split("."))) for cell in line.split()])
    return tables


def to_lanes(matrix: Tensor, table: list) -> Tensor:
    """The matrix as the lanes hold it: (32, elements per lane)."""
    count = 1 + max(i for row in table for _, i in row)
    lanes = torch.zeros(32, count, dtype=matrix.dtype)
    for r, row in enumerate(table):
        for c, (lane, i) in enumerate(row):
            lanes[lane, i] = matrix[r, c]
    return lanes


def to_matrix(lanes: Tensor, table: list) -> Tensor:
    return torch.stack([torch.stack([lanes[lane, i] for lane, i in row]) for row in table])


@pytest.mark.parametrize("title", list(fragments()))
def test_fragment_tables_hold_every_element_once(title):
    table = fragments()[title]
    cells = [cell for row in table for cell in row]
    assert len(set(cells)) == len(cells) == int(title.split(" ")[-1].split("x")[0]) * len(table[0])
    assert len(cells) % 32 == 0
    assert sorted(cells) == [(lane, i) for lane in range(32) for i in range(len(cells) // 32)]


MMA = pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [("mma_float16", torch.float16, 16), ("mma_bfloat16", torch.bfloat16, 16), ("mma_tf32", torch.float32, 8)],
)


def run_mma(variant: str, name: str, dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c + a b by one mma."""
    tables, depth = fragments(), a.shape[1]
    shape = "mma.m16n8k16" if depth == 16 else "mma.m16n8k8.tf32"
    registers = [
        to_lanes(a.to(dtype), tables[f"{shape} a 16x{depth}"]),
        to_lanes(b.to(dtype), tables[f"{shape} b {depth}x8"]),
        to_lanes(c, tables["mma c 16x8"]),
    ]
    packed = torch.cat([r.contiguous().view(torch.float32).flatten() for r in registers])
    got = run_instruction(variant, name, packed, 0, 128).view(32, 4)
    return to_matrix(got, tables["mma c 16x8"])


@MMA
def test_mma_by_the_table(variant, name, dtype, depth):
    generator = torch.Generator().manual_seed(0)
    # Small integers: every product and sum is exact in every dtype.
    a, b, c = (torch.randint(-8, 9, s, generator=generator).float() for s in ((16, depth), (depth, 8), (16, 8)))
    assert torch.equal(run_mma(variant, name, dtype, a, b, c), a @ b + c)


def to_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the format of mma's factors, as float32."""
    if dtype == torch.float32:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(dtype).float()


def sums_to_round(dtype: torch.dtype, depth: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """a, b, c whose terms have similar magnitudes; c much larger; widely varying magnitudes; the format's smallest
    numbers; float32's largest; sums that cancel; zeros."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def power(size: int, *shape: int) -> Tensor:
        return torch.randint(-size, size + 1, shape, generator=generator).float().exp2()

    wide = 10 if dtype == torch.float16 else 45
    a, b, c = normal(16, depth), normal(depth, 8), normal(16, 8)
    yield a, b, c
    yield a.abs(), b.abs(), 1000 * c.abs()
    yield a * power(wide, 16, depth), b * power(wide, depth, 8), c * power(wide, 16, 8)
    small = 2.0**-20 if dtype == torch.float16 else 2.0**-70
    yield a * small, b * small, c * small**2
    if dtype != torch.float16:
        yield a * 2.0**60, b * 2.0**60, c * 2.0**120
    yield a, b, -(to_operand(a, dtype).double() @ to_operand(b, dtype).double()).float()
    yield a * (normal(16, depth) > 0), b * (normal(depth, 8) > 0), torch.zeros(16, 8)


@MMA
@pytest.mark.parametrize("architecture", [80, 90])
def test_mma_truncates_as_hardware_does(variant, name, dtype, depth, architecture):
    build.runtime(variant).set_device(architecture)
    lowest = -14 if dtype == torch.float16 else -126
    for a, b, c in sums_to_round(dtype, depth):
        a, b = to_operand(a, dtype), to_operand(b, dtype)
        rows, columns = a.tolist(), b.T.tolist()
        expected = [
            [
                truncated(x, y, z, GENERATIONS[architecture], dtype.itemsize, lowest)
                for y, z in zip(columns, cs, strict=True)
            ]
            for x, cs in zip(rows, c.tolist(), strict=True)
        ]
        assert torch.equal(run_mma(variant, name, dtype, a, b, c), torch.tensor(expected))


@MMA
def test_mma_to_nearest(variant, name, dtype, depth):
    build.runtime(variant).set_mma_rounding("nearest")
    for a, b, c in sums_to_round(dtype, depth):
        a, b = to_operand(a, dtype), to_operand(b, dtype)
        rows, columns = a.tolist(), b.T.tolist()
        expected = [
            [to_nearest(x, y, z) for y, z in zip(columns, cs, strict=True)]
            for x, cs in zip(rows, c.tolist(), strict=True)
        ]
        assert torch.equal(run_mma(variant, name, dtype, a, b, c), torch.tensor(expected))


def test_mma_keeps_one_bit_more_from_hopper_on(variant):
    """1 plus eight products of 2^-25, a quarter of a unit in the last place of 1, is 1 + 2^-22 on an H100 and 1 on an
    A100; 1 minus them is 1 - 2^-22 and 1."""
    a, b, c = torch.full((16, 8), 2.0**-12), torch.full((8, 8), 2.0**-13), torch.ones(16, 8)
    for sign in (1, -1):
        for architecture, kept in ((80, 0), (90, 2.0**-22)):
            build.runtime(variant).set_device(architecture)
            assert (run_mma(variant, "mma_tf32", torch.float32, a, sign * b, c) == 1 + sign * kept).all()


@MMA
def test_mma_of_infinities_and_nan(variant, name, dtype, depth):
    """They affect only sums that contain them; the others are truncated as usual."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((16, depth), (depth, 8), (16, 8)))
    a, b = to_operand(a, dtype), to_operand(b, dtype)
    expected = run_mma(variant, name, dtype, a, b, c)
    a[3, 1], a[5, 2], b[4, 6], c[9, 2] = float("nan"), float("inf"), float("-inf"), float("nan")
    got = run_mma(variant, name, dtype, a, b, c)
    assert got[3].isnan().all() and got[9, 2].isnan()
    finite = torch.ones(16, 8, dtype=torch.bool)
    finite[3], finite[5], finite[:, 6], finite[9, 2] = False, False, False, False
    assert torch.equal(got[5, :6], (b[2, :6] * float("inf")))
    others = [m for m in range(16) if m not in (3, 5)]
    assert torch.equal(got[others, 6], a[others, 4] * float("-inf"))
    assert torch.equal(got[finite], expected[finite])


def test_mma_rounding_is_truncate_or_nearest(variant):
    with pytest.raises(ValueError, match="must be truncate or nearest .got up"):
        build.runtime(variant).set_mma_rounding("up")
    assert build.runtime(variant).mma_rounding() == "truncate"


@pytest.mark.skipif(IN_ASAN, reason="reads the environment as the other builds do")
@pytest.mark.parametrize("rounding", ["truncate", "nearest"])
def test_mma_rounding_by_environment(rounding):
    code = "from tests.emulator import build; print(build.runtime('plain').mma_rounding())"
    environment = os.environ | {"SEGATTN_EMULATED_MMA_ROUNDING": rounding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=build.ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == rounding, done.stderr


def test_mma_tf32_ignores_the_low_bits(variant):
    x = torch.zeros(320)
    x[0] = torch.tensor(0x3F801FFF, dtype=torch.int32).view(torch.float32)  # 1 with all 13 ignored bits set
    x[128] = 1.0
    assert run_instruction(variant, "mma_tf32", x, 0, 128)[0] == 1.0


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_by_the_table(variant, transposed):
    suffix = "_trans" if transposed else ""
    table = fragments()[f"ldmatrix{suffix.replace('_', '.')} 8x8"]
    elements = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8)
    out = run_instruction(variant, f"ldmatrix_x4{suffix}", elements.view(torch.float32), 0, 32 * 4)
    registers = out.view(torch.int16).view(32, 4, 2)
    for i in range(4):
        assert torch.equal(to_matrix(registers[:, i], table), elements[i])


@pytest.mark.parametrize("width", [4, 8, 32])
def test_shuffles_and_votes(variant, width):
    x = torch.where(torch.arange(32) % 3 == 0, -1.0, 1.0) * ramp(32)
    got = run_instruction(variant, "warp_functions", x, width, 32 * 7).view(32, 7)
    lane = torch.arange(32)
    segment, inside = lane // width * width, lane % width
    right = [
        x[segment + 3],
        torch.where(inside >= 3, x[(lane - 3).clamp(0)], x),
        torch.where(inside + 3 < width, x[(lane + 3).clamp(max=31)], x),
        x[lane ^ 3],
    ]
    torch.testing.assert_close(got[:, :4], torch.stack(right, 1))
    ballot = sum(1 << i for i in range(32) if x[i] > 0)
    assert (got[:, 4].contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF == ballot).all()
    assert got[:, 5:].tolist() == [[1.0, 0.0]] * 32


def test_partial_masks_and_counting_barriers(variant):
    x = torch.where(torch.arange(64) < 24, 1.0, -1.0) * ramp(64)
    got = run_instruction(variant, "masks_and_counts", x, 64, 128)
    lane = torch.arange(64) % 32
    partner = torch.where(lane < 16, torch.arange(64) ^ 8, torch.arange(64) ^ 1)
    torch.testing.assert_close(got[:64], x + x[partner])
    assert got[64:].tolist() == [24 * 4 + 2] * 64


def test_grid_and_block_coordinates(variant):
    right = torch.arange(2 * 3 * 4 * 5 * 2 * 3, dtype=torch.float32)
    torch.testing.assert_close(run_instruction(variant, "coordinates", X, 0, len(right)), right)


# ---- launches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "limit"), [(80, 163), (86, 99), (89, 99), (90, 227), (120, 99)])
def test_shared_memory_limit(variant, architecture, limit):
    build.runtime(variant).set_device(architecture)
    assert run_instruction(variant, "shared_limit", X, limit * 1024, 1)[0] == 7
    with pytest.raises(RuntimeError, match="invalid argument"):
        run_instruction(variant, "shared_limit", X, limit * 1024 + 1, 1)


@pytest.mark.parametrize(("name", "limit"), [("block_threads", 1024), ("grid_y", 65535), ("grid_z", 65535)])
def test_launch_limits(variant, name, limit):
    out_size = 1024
    if name == "block_threads":
        run_instruction(variant, name, X, limit, out_size)
    for size in (limit + 1, 0):
        with pytest.raises(RuntimeError, match="invalid configuration argument"):
            run_instruction(variant, name, X, size, out_size)


def test_unknown_architecture(variant):
    with pytest.raises(ValueError, match="architecture 91 is not one of"):
        build.runtime(variant).set_device(91)


# ---- counters ----------------------------------------------------------------------------------------------------


def counted(traced, name: str, size: int, x: Tensor | None = None, out_size: int = 2048) -> dict:
    traced.reset()
    run_instruction("race", name, ramp(2048) if x is None else x, size, out_size)
    (launch,) = traced.report()
    return launch


def aligned(size: int) -> Tensor:
    """A ramp that starts on a 32-byte sector: torch aligns buffers to 64 bytes."""
    x = ramp(size)
    assert x.data_ptr() % 64 == 0
    return x


# One warp of 32 lanes: (kernel, size, kind, warp instructions, bytes, 32-byte sectors)
GLOBAL_TRAFFIC = [
    ("global_stride", 1, "global_read", 1, 128, 4),  # 128 contiguous bytes
    ("global_stride", 2, "global_read", 1, 128, 8),  # every second element
    ("global_stride", 8, "global_read", 1, 128, 32),  # one sector per lane
    ("global_stride", 0, "global_read", 1, 128, 1),  # all lanes read one element
    ("global_stride", 8, "global_write", 1, 128, 4),
    ("global_offset", 8, "global_read", 1, 128, 4),  # 32 bytes further on
    ("global_offset", 1, "global_read", 1, 128, 5),  # straddles a fifth sector
    ("global_vector", 0, "global_read", 1, 512, 16),  # float4
    ("global_vector", 0, "global_write", 1, 512, 16),
    ("global_half", 0, "global_read", 1, 64, 2),
    ("global_half", 0, "global_write", 1, 64, 2),
    ("global_partial", 5, "global_read", 1, 20, 1),  # 5 lanes
    ("global_partial", 12, "global_read", 1, 48, 2),
    ("global_loop", 7, "global_read", 7, 7 * 128, 7 * 4),  # one instruction per iteration, although lanes run in turn
    ("async_partial", 16, "global_async_read", 1, 512, 16),
    ("async_partial", 8, "global_async_read", 1, 256, 16),  # half of each 16 bytes, but every sector
]


@pytest.mark.parametrize(("name", "size", "kind", "instructions", "bytes_", "sectors"), GLOBAL_TRAFFIC)
def test_global_traffic(traced, name, size, kind, instructions, bytes_, sectors):
    memory = counted(traced, name, size, aligned(2048))["memory"][kind]
    assert (memory["instructions"], memory["bytes"], memory["sectors"]) == (instructions, bytes_, sectors)


# One warp: (kernel, size, kind, wavefronts, wavefronts without conflicts)
SHARED_TRAFFIC = [
    ("shared_stride", 1, "shared_read", 1, 1),
    ("shared_stride", 1, "shared_write", 1, 1),
    ("shared_stride", 2, "shared_read", 2, 1),  # two-way conflict
    ("shared_stride", 8, "shared_read", 8, 1),
    ("shared_stride", 8, "shared_write", 8, 1),
    ("shared_stride", 32, "shared_read", 32, 1),  # one bank
    ("shared_stride", 33, "shared_read", 1, 1),  # a padded column
    ("shared_broadcast", 32, "shared_read", 1, 1),
    ("shared_broadcast", 2, "shared_read", 1, 1),
    ("shared_vector", 1, "shared_read", 4, 4),  # 512 bytes take four passes of 128
    ("shared_vector", 2, "shared_read", 8, 4),
    ("shared_vector", 8, "shared_read", 32, 4),
    ("matrix_stride", 1, "shared_matrix_read", 4, 4),
    ("matrix_stride", 2, "shared_matrix_read", 8, 4),
    ("matrix_stride", 8, "shared_matrix_read", 32, 4),  # rows of 128 bytes without a swizzle
    ("matrix_stride", 9, "shared_matrix_read", 4, 4),  # rows padded by 16 bytes
    ("async_partial", 16, "shared_async_write", 4, 4),
]


@pytest.mark.parametrize(("name", "size", "kind", "wavefronts", "ideal"), SHARED_TRAFFIC)
def test_bank_conflicts(traced, name, size, kind, wavefronts, ideal):
    memory = counted(traced, name, size)["memory"][kind]
    assert (memory["wavefronts"], memory["ideal_wavefronts"]) == (wavefronts, ideal)


def test_locations_name_the_source_line(traced):
    launch = counted(traced, "shared_stride", 8)
    lines = (Path(build.__file__).parent / "selftest_instructions.cu").read_text().splitlines()
    (write,) = [p for p in launch["locations"] if p["kind"] == "shared_write"]
    file, line = write["location"].split(":")
    assert file == "selftest_instructions.cu"
    assert lines[int(line) - 1].strip() == "tile[i] = in[0];"
    assert write["wavefronts"] == 8


def test_operation_counts(traced):
    launch = counted(traced, "operations", 5)
    warps, repetitions = 2, 5
    assert launch["grid"] == (1, 1, 1)
    assert launch["block"] == (64, 1, 1)
    assert launch["mma_flops_by_type"] == {
        "float16": warps * repetitions * 2 * 16 * 8 * 16,
        "bfloat16": warps * repetitions * 2 * 16 * 8 * 16,
        "tf32": warps * repetitions * 2 * 16 * 8 * 8,
    }
    assert launch["mma_flops"] == sum(launch["mma_flops_by_type"].values())
    assert launch["fma_flops"] == 64 * repetitions * 2
    assert launch["block_barriers"] == repetitions
    assert launch["warp_barriers"] == warps * repetitions
    assert launch["shuffles"] == warps * repetitions
