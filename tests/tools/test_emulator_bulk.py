"""The emulator's bulk copies, memory barriers, named barriers, clusters and register budgets, and their faults."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ..emulator import build
from ..emulator.fixtures import HERE
from .test_emulator import (
    WRONG,
    everywhere,
    run_case,
    run_instruction,
    run_under_asan,
    runs_under_asan,
)

# Where the 128-byte swizzle puts the eight 16-byte chunks of a row of 128 bytes, for each row modulo 8 (PTX ISA, the
# figures of "Shared Memory Layout of Tensor Data").
SWIZZLE_128B = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (1, 0, 3, 2, 5, 4, 7, 6),
    (2, 3, 0, 1, 6, 7, 4, 5),
    (3, 2, 1, 0, 7, 6, 5, 4),
    (4, 5, 6, 7, 0, 1, 2, 3),
    (5, 4, 7, 6, 1, 0, 3, 2),
    (6, 7, 4, 5, 2, 3, 0, 1),
    (7, 6, 5, 4, 3, 2, 1, 0),
)
# The tensor of selftest_bulk.cu, and its tiles of 16 rows of 64 elements.
PLANES, ROWS, COLUMNS = 2, 32, 128
TILE_ROWS, TILE_COLUMNS = 16, 64
TILE_BYTES = 2 * TILE_ROWS * TILE_COLUMNS
TENSOR = torch.arange(PLANES * ROWS * COLUMNS, dtype=torch.int16).view(PLANES, ROWS, COLUMNS)


def size_of(x: int, y: int, z: int) -> int:
    """The place of a box as selftest_bulk.cu takes it."""
    return x + 500 + 1000 * (y + 500) + 1000000 * z


def swizzled(rows: Tensor) -> Tensor:
    """Rows of 64 16-bit elements as they lie in shared memory."""
    chunks = rows.view(TILE_ROWS, 8, 8)
    placed = torch.empty_like(chunks)
    for r in range(TILE_ROWS):
        for c in range(8):
            placed[r, SWIZZLE_128B[r % 8][c]] = chunks[r, c]
    return placed.flatten()


def box(x: int, y: int, z: int) -> Tensor:
    """The box as a copy leaves it in shared memory: zeros outside the tensor."""
    rows = torch.zeros(TILE_ROWS, TILE_COLUMNS, dtype=torch.int16)
    for r in range(TILE_ROWS):
        for c in range(TILE_COLUMNS):
            if 0 <= x + c < COLUMNS and 0 <= y + r < ROWS and 0 <= z < PLANES:
                rows[r, c] = TENSOR[z, y + r, x + c]
    return swizzled(rows)


def tile(t: int) -> Tensor:
    return box(t % 2 * 64, t // 2 % 2 * 16, t // 4)


LAST_TILE = (64, 16, 1)
ONE_TILE = tile(7)
ALL_TILES = torch.cat([tile(t) for t in range(8)])
NAMED = torch.cat([torch.arange(32.0).repeat(2), torch.arange(100.0, 132.0).repeat(2)])


def as_bits(x: Tensor) -> Tensor:
    """Tiles are compared as 16-bit elements, everything else as float32."""
    return x if x.dtype == torch.int16 else x.view(torch.int16)


def run(variant: str, name: str, broken: bool, size: int = size_of(*LAST_TILE)) -> Tensor:
    """All 16-bit elements of the output; NaN are -1."""
    return as_bits(run_case(variant, name, broken, TENSOR.view(torch.float32), size, 2 * 4096))


@dataclass(frozen=True)
class Fault:
    """A kernel of selftest_bulk.cu.

    Args:
        name: name of the kernel.
        right: the first elements of the output without the fault.
        found: by variant, a pattern of the broken kernel's error, or WRONG. Variants left out do not find the fault
            under every schedule.
    """

    name: str
    right: Tensor
    found: dict[str, str] = field(default_factory=dict)


LINE = r"selftest_bulk.cu:\d+"
LEFT = "has left the kernel|leaves the kernel, but"
UNFINISHED = f"cp.async.bulk.tensor(.multicast)? at {LINE}, which has not finished"
NO_BARRIER = "with no barrier between"
REFILL = f"bulk copy writes at {LINE} what thread .*{NO_BARRIER}|{UNFINISHED}"
BARRIER = rf"the barrier at byte \d+( of block \([01], 0, 0\))? \(initialised at {LINE}\)"
WAITS = rf"wait at mbarrier.try_wait \({LINE}\) for {BARRIER}"


def copy(name: str, found: dict[str, str]) -> Fault:
    return Fault(f"copy_{name}", ONE_TILE, found)


def ring(name: str, found: dict[str, str]) -> Fault:
    return Fault(f"ring_{name}", ALL_TILES, found)


def cluster(name: str, found: dict[str, str]) -> Fault:
    return Fault(f"cluster_{name}", ALL_TILES.repeat(2), found)


def named(name: str, found: dict[str, str]) -> Fault:
    return Fault(f"named_{name}", NAMED, found)


def registers(name: str, pattern: str) -> Fault:
    return Fault(f"registers_{name}", torch.arange(384.0), everywhere(pattern))


FAULTS = (
    copy("not_waited", {**everywhere(WRONG), "race": f"reads at {LINE} what {UNFINISHED}"}),
    copy("never_waited", everywhere(f"none has waited for the bulk copies in phase 0 of {BARRIER}")),
    copy(
        "too_many_bytes",
        everywhere(rf"deadlock in .*{WAITS}, phase 0: 0 of 1 arrivals and 16 bytes are missing"),
    ),
    copy("too_few_bytes", everywhere(f"16 bytes more than announced have come in phase 0 of {BARRIER}")),
    copy(
        "unannounced",
        {**everywhere("none has waited for the bulk copies in phase 1"), "race": f"{UNFINISHED}|none has waited"},
    ),
    copy("nothing_comes", everywhere(f"leaves the kernel, but {BARRIER}, phase 0: 0 of 1 arrivals and 2048 bytes")),
    copy("two_arrivals", everywhere(f"more than 1 arrivals in phase 0 of {BARRIER}")),
    copy("no_init", everywhere("byte 2048 of the shared memory of .* is no initialised barrier")),
    copy("no_fence", everywhere(f"no fence_barrier_init has followed the initialisation of {BARRIER}")),
    copy("no_sync", everywhere(f"is no initialised barrier|{NO_BARRIER}")),
    copy("init_twice", everywhere(rf"mbarrier.init \({LINE}\): {BARRIER} is in use")),
    copy("misaligned_barrier", everywhere("mbarrier.init .* is not aligned to 8 bytes")),
    copy("misaligned_tile", everywhere("the destination, byte 128 of shared memory, is not aligned to 1024 bytes")),
    copy("tile_outside", everywhere("2048 bytes at offset 2048 are outside the 2112 bytes of shared memory")),
    copy("overwritten", everywhere(f"{BARRIER} has been overwritten")),
    copy("no_map", everywhere("is no tensor map")),
    copy("tensor_ends", {"asan": f"cp.async.bulk.tensor .{LINE}.: the 128 bytes at .* are outside the tensor"}),
    copy("unfenced", {"race": f"writes what thread .* wrote at {LINE} and executed no fence.proxy.async"}),
    copy("source_written", {"race": f"global memory: thread 0 writes at {LINE} what a bulk copy, {NO_BARRIER}, read"}),
    ring(
        "no_empty_wait",
        {"race": f"{REFILL}|more than 1 arrivals"},
    ),
    ring("early_arrival", {"race": REFILL}),
    ring("wrong_parity", everywhere(f"deadlock in .*{WAITS}|more than 1 arrivals|ambiguous|{UNFINISHED}|{NO_BARRIER}")),
    ring("one_arrival", {"race": f"{REFILL}|ambiguous"}),
    ring(
        "missing_arrival",
        everywhere(rf"deadlock in .*thread 0: {WAITS}, phase 0: 1 of 96 arrivals and 0 bytes are missing"),
    ),
    Fault(
        "missed_phases",
        torch.ones(128),
        everywhere("after phase 0 this thread waits for phase 1, but phase 4 of .* the parity is ambiguous"),
    ),
    cluster("own_consumers_only", {"race": f"shared memory of block .*({NO_BARRIER}|{UNFINISHED})"}),
    cluster("no_final_sync", {}),
    cluster("no_fence", everywhere("no fence_barrier_init has followed the initialisation")),
    cluster("no_first_sync", {"race": f"is no initialised barrier|{NO_BARRIER}"}),
    cluster("third_block", everywhere(r"multicast \(.*\): blocks 0x5 of a cluster of 2")),
    Fault("mbarrier_exchange", torch.arange(32.0).repeat(3), {"race": f"reads at {LINE} what thread 5 .*{NO_BARRIER}"}),
    Fault(
        "cluster_exchange",
        torch.cat([torch.arange(128.0), torch.arange(128.0).flip(0)]),
        {"race": rf"block \(1, 0, 0\) reads at {LINE} what thread \d+ of block \(0, 0, 0\), {NO_BARRIER}"},
    ),
    Fault("left_cluster", ONE_TILE.repeat(2), everywhere(LEFT)),
    Fault("static_in_cluster", torch.arange(128.0).flip(0).repeat(2), {"race": "static shared memory in a cluster"}),
    named(
        "missing",
        everywhere(
            rf"deadlock in .*threads 0-31: wait at bar.sync \({LINE}\) for named barrier 2, where 64 of 96 threads"
        ),
    ),
    named("counts", everywhere("(64|96) threads at named barrier 1, but (64|96) at")),
    named("twice", everywhere("warp 1 arrives twice at named barrier 2")),
    named("number", everywhere("there is no named barrier 16")),
    named("partial", everywhere("80 threads in a block of 4 warps")),
    named("unordered", {"race": f"{NO_BARRIER}|what no thread of the block has written"}),
    registers(
        "no_release",
        rf"deadlock in .*threads 128-383: wait at setmaxnreg.inc \({LINE}\) for 240 registers a thread: 2304 more for "
        "the warp, of 1024 free",
    ),
    registers("too_many", r"deadlock in .*setmaxnreg.inc .* for 248 registers a thread"),
    registers("three_warps", rf"setmaxnreg \({LINE}\) is not executed by all four warps of warpgroup 0"),
    registers("two_lines", "the warps of warpgroup 0 execute different setmaxnreg"),
    registers("decrease_to_more", "setmaxnreg.dec .*: to 176 registers, but the warp has 168"),
    registers("increase_to_fewer", "setmaxnreg.inc .*: to 160 registers, but the warp has 168"),
)
SCHEDULE_DEPENDENT = ("cluster_no_final_sync",)


def test_every_faulty_kernel_is_tested():
    assert sorted(f.name for f in FAULTS) == sorted(build.selftest(HERE[0]).bulk_cases())
    for fault in FAULTS:
        assert fault.found or fault.name in SCHEDULE_DEPENDENT, fault.name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corrected_kernel_passes(variant, fault, seed):
    build.runtime(variant).set_seed(seed)
    right = as_bits(fault.right)
    assert torch.equal(run(variant, fault.name, False)[: len(right)], right)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fault_is_found(variant, fault, seed):
    pattern = fault.found.get(variant)
    if pattern is None:
        pytest.skip("this build does not find the fault under every schedule")
    build.runtime(variant).set_seed(seed)
    if pattern is not WRONG:
        with pytest.raises(RuntimeError, match=f"(?s)emulator: .*({pattern})"):
            run(variant, fault.name, True)
        return
    right = as_bits(fault.right)
    assert not torch.equal(run(variant, fault.name, True)[: len(right)], right)


def test_arrival_at_a_block_that_has_left(variant):
    """Found under the schedules in which it happens."""
    found = 0
    for seed in range(20):
        build.runtime(variant).set_seed(seed)
        try:
            run(variant, "cluster_no_final_sync", True)
        except RuntimeError as error:
            assert "has left the kernel" in str(error)
            found += 1
    assert found >= 5


# ---- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [(0, 0, 0), (64, 16, 1), (8, 3, 0), (-5, 20, 0), (100, -3, 1), (0, 0, 2), (128, 0, 0), (0, -16, 0)]
)
def test_copy_follows_the_swizzle_and_fills_with_zeros(variant, place):
    assert torch.equal(run(variant, "copy_not_waited", False, size_of(*place))[: TILE_BYTES // 2], box(*place))


def test_copies_land_at_different_moments():
    """Without the wait, some schedules read the data, others NaN."""
    outcomes = set()
    for seed in range(40):
        build.runtime(HERE[0]).set_seed(seed)
        got = run(HERE[0], "copy_not_waited", True)[: TILE_BYTES // 2]
        outcomes.add(int((got == -1).sum()))
    assert len(outcomes) > 5


# ---- tensor maps -------------------------------------------------------------------------------------------------

SUCCESS, INVALID = 0, 1


@dataclass(frozen=True)
class Map:
    """Arguments of cuTensorMapEncodeTiled for 16-bit elements; the defaults are accepted."""

    result: int
    address: int = 4096
    sizes: tuple[int, ...] = (9409, 512, 8)
    strides: tuple[int, ...] = (18832, 9641984)
    box: tuple[int, ...] = (64, 256, 1)
    element_strides: tuple[int, ...] = (1, 1, 1)
    swizzle: int = 3


# CUDA driver API, cuTensorMapEncodeTiled.
MAPS = (
    Map(SUCCESS),
    Map(SUCCESS, sizes=(1, 1, 1), strides=(16, 16)),
    Map(SUCCESS, swizzle=0, box=(256, 64, 1)),
    Map(SUCCESS, swizzle=2, box=(32, 64, 1)),
    Map(SUCCESS, strides=(18832, 2**40 - 16)),
    Map(INVALID, address=0),
    Map(INVALID, address=4096 + 8),
    Map(INVALID, sizes=(0, 512, 8)),
    Map(INVALID, sizes=(2**32 + 1, 512, 8)),
    Map(INVALID, strides=(18818, 9641984)),
    Map(INVALID, strides=(18824, 9641984)),
    Map(INVALID, strides=(18832, 2**40)),
    Map(INVALID, box=(64, 257, 1)),
    Map(INVALID, box=(64, 0, 1)),
    Map(INVALID, box=(72, 64, 1)),
    Map(INVALID, box=(60, 64, 1)),
    Map(INVALID, swizzle=2),
    Map(INVALID, element_strides=(1, 0, 1)),
    Map(INVALID, element_strides=(1, 9, 1)),
    Map(INVALID, sizes=(8,) * 6, strides=(16,) * 5, box=(8,) * 6, element_strides=(1,) * 6),
)


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_tensor_maps_follow_the_rules_of_the_driver(case):
    encode = build.selftest(HERE[0]).encode
    got = encode(case.address, case.sizes, case.strides, case.box, case.element_strides, case.swizzle)
    assert got == case.result


# ---- launches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_ranks_in_a_cluster(variant, blocks):
    got = run_instruction(variant, "cluster_ranks", TENSOR.view(torch.float32), 100 * blocks + 16, 16)
    assert got.tolist() == [float(i % blocks) for i in range(16)]


@pytest.mark.parametrize(("blocks", "grid"), [(0, 4), (2, 3), (16, 16)])
def test_cluster_limits(variant, blocks, grid):
    with pytest.raises(RuntimeError, match="ranks failed: invalid cluster size"):
        run_instruction(variant, "cluster_ranks", TENSOR.view(torch.float32), 100 * blocks + grid, 16)


def test_clusters_need_sm_90(variant):
    build.runtime(variant).set_device(80)
    with pytest.raises(RuntimeError, match="invalid cluster size"):
        run_instruction(variant, "cluster_ranks", TENSOR.view(torch.float32), 204, 16)


# ---- counters ----------------------------------------------------------------------------------------------------


def counted(variant: str, name: str, size: int = size_of(*LAST_TILE)) -> dict:
    control = build.runtime(variant)
    control.reset()
    run(variant, name, False, size)
    (launch,) = control.report()
    return launch


def test_copied_bytes(variant):
    launch = counted(variant, "copy_not_waited")
    assert (launch["bulk_copy_bytes"], launch["bulk_delivered_bytes"]) == (TILE_BYTES, TILE_BYTES)
    assert launch["mbarrier_waits"] == 2 * 128
    assert launch["cluster"] == 1


def test_zeros_are_delivered_but_not_read(variant):
    launch = counted(variant, "copy_not_waited", size_of(96, 24, 0))
    assert (launch["bulk_copy_bytes"], launch["bulk_delivered_bytes"]) == (2 * 8 * 32, TILE_BYTES)


def test_multicast_reads_once(variant):
    launch = counted(variant, "cluster_own_consumers_only")
    assert (launch["bulk_copy_bytes"], launch["bulk_delivered_bytes"]) == (8 * TILE_BYTES, 2 * 8 * TILE_BYTES)
    assert (launch["cluster"], launch["grid"]) == (2, (2, 1, 1))


@runs_under_asan
def test_under_address_sanitizer():
    run_under_asan(__file__)
