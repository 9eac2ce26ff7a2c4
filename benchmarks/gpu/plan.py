"""``gpu_suite --plan``: the calls that fill half an hour on a lent machine.

Such a machine has the toolkit, torch and the profilers. A call copies the working tree and the carried files to it,
runs one command, and returns the files in ``$OUT``; nothing else is kept between calls.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import dataclass

from tools import compilers

from .selection import COMPILED, DTYPES, FAMILIES, RIVALS, SIZES

START_SECONDS = 90  # before a call's command runs: the machine's start and the transfers
TRANSFER_BYTES = 64 << 20  # limit of the working tree and the carried files, per call
LENT_SECONDS = 1800
# Only the baseline CPU kernels, which run on every processor: the suite measures the device.
CARRIED = (
    "segattn_ops/_C.abi3.so",
    "segattn_ops/_C_cuda.abi3.so",
    "segattn_ops/_cpu_baseline.abi3.so",
    "segattn_ops/_build_info.json",
)
BUILD = "FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 SEGATTN_CPU_ONLY=baseline python3 setup.py build_ext --inplace"
SUITE = "python3 -m benchmarks.gpu_suite"


@dataclass(frozen=True)
class Call:
    """One command line for the machine: invocations of the suite in sequence, and the time limit of all."""

    title: str
    invocations: tuple[str, ...]
    seconds: int
    returns: tuple[str, ...]

    @property
    def command(self) -> str:
        return "; ".join(self.invocations)


def calls() -> list[Call]:
    compiled = ",".join(("eager", "fused", *COMPILED))
    others = ",".join(name for name in RIVALS if name not in COMPILED)
    (height, width), dtype = SIZES[0], DTYPES[0]
    return [
        Call(
            "measure",
            (f"{SUITE} --piece build --piece smoke --piece ceilings --piece bench --rivals {others} --limit 500",),
            540,
            ("gpu.json", "gpu.md"),
        ),
        Call(
            "compile and FlexAttention, tests, profile",
            (
                f"{SUITE} --piece build --piece bench --rivals {compiled} --sizes {height}x{width} --dtypes {dtype} "
                "--batches 8 --limit 220",
                f"{SUITE} --piece tests --piece profile --limit 270",
            ),
            540,
            ("gpu.json", "gpu.md", "tests.xml", *(f"profile-{family}.txt" for family in FAMILIES)),
        ),
        Call(
            "sanitize",
            (f"{SUITE} --piece build --piece sanitize --limit 380",),
            420,
            ("gpu.json", "gpu.md"),
        ),
    ]


def tree_bytes() -> int | None:
    """Bytes of the working tree as it is copied: tracked files, and untracked ones that are not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=compilers.ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        return None
    paths = (compilers.ROOT / name.decode() for name in listing.stdout.split(b"\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def carried_fault() -> str | None:
    """Why the libraries here could not be used on the machine, judged by the files alone; None if they could."""
    missing = [name for name in CARRIED if not (compilers.ROOT / name).exists()]
    if missing:
        return f"{missing[0]} is not built"
    info = json.loads((compilers.ROOT / CARRIED[-1]).read_text())
    sources = compilers.build_tools.fingerprint(compilers.ROOT)
    for name in CARRIED[:-1]:
        library = name.removeprefix("segattn_ops/").removesuffix(".abi3.so")
        if info.get("sources", {}).get(library) != sources:
            return f"{library} was built of other sources than this tree's"
    if "90" not in info["cuda"]["architectures"]:
        return f"_C_cuda has no code for sm_90 (architectures: {info['cuda']['architectures']})"
    return None


def describe() -> list[str]:
    """The plan as lines of text."""
    planned = calls()
    total = sum(call.seconds for call in planned) + START_SECONDS * len(planned)
    lines = [
        f"A half hour on a lent H100 or H200: {len(planned)} calls of under 600 s, at most {total} of {LENT_SECONDS} s "
        f"with {START_SECONDS} s of start each.",
        "Results are written to $OUT after every cell and step, so a call that is cut short still returns what it has.",
        "",
        "Carry with every call:",
    ]
    sizes = {name: path.stat().st_size for name in CARRIED if (path := compilers.ROOT / name).exists()}
    lines += [f"  {name}  {_mib(sizes[name]) if name in sizes else 'not built'}" for name in CARRIED]
    tree = tree_bytes()
    travels = sum(sizes.values()) + (tree or 0)
    verdict = "fits" if travels <= TRANSFER_BYTES else "DOES NOT FIT"
    working = "unknown (no git checkout)" if tree is None else _mib(tree)
    lines += [f"  with the working tree ({working}): {_mib(travels)}, {verdict} in {_mib(TRANSFER_BYTES)}"]
    if fault := carried_fault():
        lines += [f"  {fault}. Build here first, or the machine builds, which takes minutes of it:", f"    {BUILD}"]
    else:
        lines += ["  The libraries are of this tree's sources, for sm_90: the machine does not build."]
    for number, call in enumerate(planned, 1):
        lines += ["", f"Call {number}, {call.title} (time limit {call.seconds} s):", f"  {call.command}"]
        lines += [f"  returns {', '.join(call.returns)}"]
    lines += [
        "",
        "To go on with a call that was cut short (exit status 3: more to do), put its gpu.json at",
        "report/gpu/last.json, carry that too, and add to its first command: --resume report/gpu/last.json",
        "Pictures, afterwards and anywhere: python -m benchmarks.gpu_plots gpu.json",
    ]
    return lines


def invocations(lines: list[str]) -> list[list[str]]:
    """The arguments of every suite command in printed lines."""
    commands = [part for line in lines for part in line.strip().split("; ") if part.startswith(SUITE)]
    return [shlex.split(command)[len(SUITE.split()) :] for command in commands]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
