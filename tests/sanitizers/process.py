"""The environment of a process under a sanitizer: which libraries are loaded first, and with which options."""

import os
import subprocess
import sys
from pathlib import Path

from tools.compilers import ROOT, compiler

SUPPRESSIONS = Path(__file__).parent.resolve() / "thread_suppressions.txt"
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
# A report does not end the process, and a fault is reported each time that it happens: it must fail every test that
# runs into it.
OPTIONS = {
    "address": {
        "detect_leaks": 0,  # Python's own allocations live to the end
        "halt_on_error": 0,
        "suppress_equal_pcs": 0,
        "allocator_may_return_null": 1,
    },
    "undefined": {"print_stacktrace": 1},
    "thread": {"halt_on_error": 0, "suppress_equal_stacks": 0, "suppress_equal_addresses": 0, "exitcode": 0},
}
VARIABLES = {"address": "ASAN_OPTIONS", "undefined": "UBSAN_OPTIONS", "thread": "TSAN_OPTIONS"}


def runtime_library(name: str) -> str:
    """The path of a library of the compiler.

    Raises:
        FileNotFoundError: the compiler has none of this name.
    """
    command = [compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if path == name:
        raise FileNotFoundError(f"{compiler()} has no {name}")
    return path


def environment(sanitizer: str, **options: object) -> dict[str, str]:
    """The environment of a process under a sanitizer, which must be loaded before anything allocates memory.
    ``options`` are added to OPTIONS."""
    # With libstdc++, whose functions the sanitizer looks up at the start; Python does not load it.
    libraries = [runtime_library(RUNTIMES[sanitizer]), runtime_library("libstdc++.so.6")]
    joined = ":".join(f"{name}={value}" for name, value in (OPTIONS[sanitizer] | options).items())
    return os.environ | {"LD_PRELOAD": " ".join(libraries), VARIABLES[sanitizer]: joined}


def watching_environment(variant: str, package: Path, reports: Path, instruction_set: str) -> dict[str, str]:
    """The environment in which Python imports the package of a build and writes reports to files in a folder."""
    log = {"log_path": reports / "report"}
    if variant == "address":
        # Memory that nothing has written is NaN in every dtype.
        added = environment(variant, malloc_fill_byte=255, max_malloc_fill_size=1 << 28, **log)
    elif variant == "thread":
        added = environment(variant, suppressions=SUPPRESSIONS, **log)
    else:
        added = environment(variant, **log)
    return added | {
        "SEGATTN_CPU_CAPABILITY": instruction_set,
        "SEGATTN_SANITIZER": variant,
        "SEGATTN_SANITIZER_PACKAGE": str(package),
        "SEGATTN_SANITIZER_REPORTS": str(reports),
        # The copy of the package comes before the source tree, which Python would put first.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]),
        "PYTEST_PLUGINS": "tests.sanitizers.plugin",
        # Torch's own loops run in one thread: see thread_pool.cpp.
        **({"OMP_NUM_THREADS": "1"} if variant == "thread" else {}),
    }


def written(reports: Path) -> str:
    """All reports in a folder."""
    return "".join(path.read_text(errors="replace") for path in sorted(reports.iterdir()))


def run(command: list[str], env: dict[str, str], reports: Path) -> int:
    """Runs a Python command; its exit status, or 1 where it is 0 and there are reports."""
    status = subprocess.run([sys.executable, *command], env=env, check=False).returncode
    found = written(reports)
    if found:
        print(found[:20_000], file=sys.stderr)
    return status or int(bool(found))
