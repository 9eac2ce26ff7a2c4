"""docs/cuda_bounds.md: bounds of operators and kernels, and the work of a thread block."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

from ..compilers import ROOT
from ..cuda_resources import nvcc_release
from .launches import (
    KEY_CHANNELS,
    OPERATORS,
    VALUE_CHANNELS,
    Launch,
    Problem,
    Walkers,
    Work,
    cycles,
    record,
    seconds,
    spread,
    work,
)
from .machines import HOPPER_MMA, MACHINES, Machine

DOCUMENT = ROOT / "docs" / "cuda_bounds.md"
SIZES = ((64, 64), (97, 97), (128, 128), (128, 256))
BATCHES = (1, 8)
DETAILED = ((97, 97), 1)  # the size and batch of the table of a thread block's work
PROBLEMS = tuple(  # the detailed ones first
    sorted(
        (Problem(operator, *size, batch) for operator, size, batch in product(OPERATORS, SIZES, BATCHES)),
        key=lambda p: ((p.height, p.width), p.batch) != DETAILED,
    )
)
ARCHITECTURES = tuple(sorted({machine.architecture for machine in MACHINES}))
PARTS = ("tensor", "issue", "alu", "fma", "special", "shared")

Done = dict[tuple[Problem, int], list[tuple[Launch, Work]]]


def measure(emulator: ModuleType, files: list[Path], problems: tuple[Problem, ...] = PROBLEMS) -> Done:
    """The launches of each problem on each architecture, walked in the machine code of some compiled files."""
    walkers = Walkers(files)
    done: Done = {}
    for problem, architecture in product(problems, ARCHITECTURES):
        known: dict[Launch, Work] = {}
        launches = record(emulator, problem, architecture)
        for launch in launches:
            if launch not in known:
                known[launch] = work(launch, walkers.of(architecture, launch.kernel), spread(launch.grid))
        done[problem, architecture] = [(launch, known[launch]) for launch in launches]
        print(f"{problem.operator} {problem.height}x{problem.width} B={problem.batch} sm_{architecture}", flush=True)
    return done


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _microseconds(time: float) -> str:
    return f"{time * 1e6:.3g}" if time < 1e-3 else f"{time * 1e6:.0f}"


def _bound(launch: Launch, of: Work, problem: Problem, machine: Machine) -> tuple[float, str]:
    found = seconds(of, launch, problem, machine)
    part = max(found, key=lambda name: found[name])
    return found[part], part


def operator_rows(done: Done) -> Iterator[str]:
    """Forward and backward of each problem: the sums of their launches' bounds."""
    for problem in dict.fromkeys(problem for problem, _ in done):
        cells = []
        for machine in MACHINES:
            times = {False: 0.0, True: 0.0}
            for launch, of in done[problem, machine.architecture]:
                times[launch.backward] += _bound(launch, of, problem, machine)[0]
            cells.append(f"{_microseconds(times[False])} / {_microseconds(times[True])}")
        yield _row(problem.operator, f"{problem.height}x{problem.width}", problem.batch, *cells)


def kernel_rows(done: Done) -> Iterator[str]:
    """Each launch with tensor-core instructions, and the others of a pass together."""
    for problem in dict.fromkeys(problem for problem, _ in done):
        lines: dict[tuple, dict[str, str]] = {}
        for machine in MACHINES:
            others: dict[bool, float] = {}
            numbers: dict[tuple, int] = {}
            for launch, of in done[problem, machine.architecture]:
                time, part = _bound(launch, of, problem, machine)
                if of.instructions["tensor"] == 0:
                    others[launch.backward] = others.get(launch.backward, 0) + time
                    continue
                name = (launch.backward, launch.title)
                numbers[name] = numbers.get(name, 0) + 1
                lines.setdefault((*name, numbers[name]), {})[machine.name] = f"{_microseconds(time)} {part}"
            for backward, time in others.items():
                lines.setdefault((backward, "others", 1), {})[machine.name] = _microseconds(time)
        for (backward, name, number), cells in sorted(lines.items(), key=lambda line: line[0][0]):
            title = name if number == 1 else f"{name}, {number}"
            where = f"{problem.operator} {'backward' if backward else 'forward'}"
            size = f"{problem.height}x{problem.width}"
            yield _row(where, size, problem.batch, title, *(cells.get(machine.name, "") for machine in MACHINES))


def block_rows(done: Done) -> Iterator[str]:
    """What a thread block of each kernel executes, at the detailed size."""
    by_architecture = {machine.architecture: machine for machine in reversed(MACHINES)}
    for architecture, machine in sorted(by_architecture.items()):
        seen = set()
        for operator in OPERATORS:
            problem = Problem(operator, *DETAILED[0], DETAILED[1])
            for launch, of in done.get((problem, architecture), []):
                if (launch.kernel, launch.grid) in seen:
                    continue
                seen.add((launch.kernel, launch.grid))
                parts = cycles(of, machine)
                figures = [f"{parts[name]:.0f}" for name in PARTS]
                mma = f"{of.per_mma:.1f}" if of.per_mma else ""
                moved = f"{of.read * 32 / 1024:.0f} / {of.written * 32 / 1024:.0f}"
                yield _row(
                    f"sm_{architecture}", f"`{launch.kernel}`", of.grid, f"{of.issued:.0f}", mma, *figures, moved
                )


def _missing(done: Done) -> list[str]:
    """A line for the problems that no table has yet."""
    missing = [p for p in PROBLEMS if (p, ARCHITECTURES[-1]) not in done]
    if not missing:
        return []
    names = ", ".join(f"{p.operator} {p.height}x{p.width} B={p.batch}" for p in missing)
    return [f"Not walked with these kernels yet: {names}.", "Running the command again adds them."]


def document(done: Done) -> str:
    done = {key: done[key] for key in product(PROBLEMS, ARCHITECTURES) if key in done}
    names = [machine.name for machine in MACHINES]
    gpus = [
        _row(
            m.name, f"sm_{m.architecture}", m.multiprocessors, m.clock_ghz, m.memory_tbs, m.l2_tbs,
            f"{m.tensor_flop:.0f}", m.float_lanes, m.integer_lanes, m.source,
        )
        for m in MACHINES
    ]  # fmt: skip
    lines = [
        "# Bounds of the CUDA kernels",
        "",
        f"Written by `python -m tools.cuda_bounds` with nvcc {nvcc_release()}, without a GPU. No figure here is a",
        "measured time. `tests/cuda/test_bounds.py` limits the instructions for each tensor-core instruction.",
        "",
        f"bfloat16, E = {KEY_CHANNELS}, C = {VALUE_CHANNELS}, forward and backward with the gradients of all inputs.",
        *_missing(done),
        "",
        "## Method",
        "",
        "The host code runs on the emulator, which reports each launch with its grid and the bytes of its parameters.",
        "The tool then walks the kernel's machine code (`cuobjdump -sass`) with these parameters for three thread",
        "blocks, evenly spread over the grid: it follows every branch of every thread and evaluates the integer",
        "instructions that branches and addresses depend on. That gives executions of each instruction, passes over",
        "shared memory with their bank conflicts, and 32-byte sectors of global memory. Where all thread blocks are",
        "walked, it finds exactly the tensor-core instructions that the emulator executes (a test).",
        "",
        "A launch's bound is the largest of these times:",
        "",
        "| part | of a multiprocessor, or of the GPU |",
        "|---|---|",
        "| tensor | tensor-core instructions at the rate in the table of GPUs, in four sub-partitions |",
        "| issue | instructions of warps, four a cycle |",
        "| alu | integer instructions without multiplications, comparisons, selections, conversions to 16 bits |",
        "| fma | float32 products and sums, integer multiplications |",
        "| special | `ex2`, reciprocals, other conversions: 16 threads a cycle |",
        "| shared | passes of 128 bytes over shared memory and, for loads and stores, L1 |",
        "| L2 | sectors that leave a multiprocessor; of a thread block's loads each sector once, as if L1 kept it |",
        "| memory | inputs once, and the sectors written, as if L2 held nothing before the launch |",
        "",
        "A multiprocessor executes at least ceil(grid / multiprocessors) thread blocks; its parts count for that many.",
        "A bound is optimistic: latencies, barriers and dependencies cost nothing, and parts overlap perfectly.",
        "",
        "Approximate are:",
        "",
        "- branches on data: they take the shorter way. The online softmax's rescaling is the only frequent one;",
        "- launches whose thread blocks differ: three stand for all. Those of the query/key gradient at 97 x 97 do",
        "  14% more than the mean;",
        "- L40S and RTX 5090: sm_86's machine code, which they do not run if theirs is compiled, in launches planned",
        "  for the 80 multiprocessors of an RTX 3080 Ti;",
        "- L2's bandwidth, for which NVIDIA publishes a figure for the A100 alone;",
        f"- Hopper's `mma.sync`, which reaches about {HOPPER_MMA:.0%} of the published peak, a peak of `wgmma`;",
        "- position attention on Hopper: its `mma.sync` kernels, although 16-bit types take those of `docs/hopper.md`;",
        "- memory: an input that an earlier launch left in L2 costs less, and a sector that two warps write in parts",
        "  counts twice, although L2 joins them.",
        "",
        "## GPUs",
        "",
        *_head("GPU", "machine code", "multiprocessors", "GHz", "memory TB/s", "L2 TB/s", "tensor FLOP a cycle",
               "float32 lanes", "integer lanes", "source"),
        *gpus,
        "",
        "Tensor FLOP are those of 16-bit operands and float32 sums, a cycle and multiprocessor. TF32 has half.",
        "",
        "## Operators",
        "",
        "Forward / backward in microseconds: the sums of the launches' bounds.",
        "",
        *_head("op", "size", "B", *names),
        *operator_rows(done),
        "",
        "## Launches",
        "",
        "Microseconds and the part that bounds them. \"others\" are the launches without tensor-core instructions.",
        "",
        *_head("pass", "size", "B", "kernel", *names),
        *kernel_rows(done),
        "",
        "## Work of a thread block",
        "",
        f"At {DETAILED[0][0]} x {DETAILED[0][1]}, B = {DETAILED[1]}, the mean of the thread blocks walked:",
        "instructions of warps, all and for each tensor-core instruction; cycles of each part (sm_90: H100 and H200,",
        "sm_86: L40S); KiB read from and written to L2.",
        "",
        *_head("code", "kernel", "grid", "instructions", "a mma", *PARTS, "KiB read / written"),
        *block_rows(done),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def bounds() -> dict[tuple[str, str, int, str], tuple[float, float]]:
    """The bounds of forward and backward in seconds, by (op, size, batch, GPU), from the document."""
    if not DOCUMENT.exists():
        return {}
    section = DOCUMENT.read_text().partition("\n## Operators\n")[2].partition("\n## ")[0]
    head, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    found = {}
    for operator, size, batch, *cells in rows:
        for name, cell in zip(head[3:], cells, strict=True):
            forward, backward = (float(figure) * 1e-6 for figure in cell.split(" / "))
            found[operator, size, int(batch), name] = (forward, backward)
    return found
