"""The list of planted faults, faults.toml, and a copy of the source tree to plant them in."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.toml")
COPIES = Path(os.environ.get("SEGATTN_MUTATION_COPIES", ROOT / "build" / "mutation"))
INSTRUCTION_SET = "baseline"  # of the CPU library: every processor has it, and it compiles fastest
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".py", ".toml", ".txt")
SECONDS = 1200  # for a build, and for the tests of a fault


@dataclass(frozen=True)
class Fault:
    """One entry of the list.

    Attributes:
        id: its name.
        kind: one of the list's kinds.
        file: the source that it changes.
        models: the mistake that it stands for, in a sentence.
        find: text that occurs once in the file.
        replace: what stands there instead.
        tests: arguments of pytest for the tests that must catch it.
        builds: what is compiled before them: "cpu", "emulated", or "" for a fault in Python.
        variant: of the emulator.
        units: the translation units that are compiled; the others keep their objects.
        environment: further variables for the tests.
    """

    id: str
    kind: str
    file: str
    models: str
    find: str
    replace: str
    tests: tuple[str, ...]
    builds: str = ""
    variant: str = "plain"
    units: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, str]:
        """The environment of the tests."""
        found = {"SEGATTN_TEST_BACKENDS": self.builds or "cpu", "SEGATTN_EMULATOR_VARIANT": self.variant}
        return found | self.environment

    def sources(self) -> list[Path]:
        """The translation units below the root."""
        folder = ROOT / "csrc" / {"cpu": "cpu", "emulated": "cuda"}.get(self.builds, "")
        return [path for unit in self.units for path in folder.rglob(f"{unit}.c*") if path.suffix in (".cpp", ".cu")]


@functools.cache
def listed() -> tuple[tuple[str, ...], tuple[Fault, ...]]:
    """The kinds and the faults of the list. An entry's tests are the name of a selection."""
    data = tomllib.loads(LIST.read_text())
    selections = {name: tuple(arguments) for name, arguments in data["selections"].items()}
    faults = []
    for entry in data["fault"]:
        tests, units = selections[entry.pop("tests")], tuple(entry.pop("units", ()))
        faults.append(Fault(**entry, tests=tests, units=units))
    return tuple(data["kinds"]), tuple(faults)


class Copy:
    """A copy of the source tree with its own builds, which later runs use again. The faults in Python are tested over
    the libraries of the tree, until the first fault in the CPU kernels builds others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for kept in root.rglob("*.intact"):  # of a run that was killed
            kept.replace(kept.with_suffix(""))
        self._copy_sources()
        self._passing: set[tuple[object, ...]] = set()
        if not self._has_cpu_build():
            package = ROOT / "segattn_ops"
            for path in (*package.glob("*.so"), package / "_build_info.json"):
                shutil.copyfile(path, root / "segattn_ops" / path.name)

    def _has_cpu_build(self) -> bool:
        return any(self.root.glob("build/temp*"))

    def _copy_sources(self) -> None:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        printed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = {name for name in printed.split("\0") if name and (ROOT / name).is_file()}
        for name in names:
            source, target = ROOT / name, self.root / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if path.suffix in SOURCES and not name.startswith("build/") and name not in names:
                path.unlink()

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python in the copy. No bytecode is kept: a fault may leave size and second of change as they were."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SEGATTN_", "PYTEST_"))}
        defaults = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "FORCE_CUDA": "0", "MAX_JOBS": "1"}
        command = [sys.executable, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(
            command, cwd=self.root, env=inherited | defaults | variables, start_new_session=True, **streams
        ) as process:
            try:
                printed, _ = process.communicate(timeout=SECONDS)
            except BaseException:  # a compiler that outlives its build would replace an object that was put back
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def build(self, builds: str, variant: str) -> None:
        """Compiles what is missing or older than its sources."""
        if builds == "cpu":
            if not self._has_cpu_build():
                for path in (self.root / "segattn_ops").glob("*.so"):
                    path.unlink()
            done = self.run("setup.py", "build_ext", "--inplace", SEGATTN_CPU_ONLY=INSTRUCTION_SET)
        elif builds == "emulated":
            done = self.run("-c", f"from tests.emulator.build import build; build({variant!r}, 'kernels')")
        else:
            return
        if done.returncode != 0:
            raise RuntimeError(f"the build failed:\n{done.stdout[-4000:]}")

    def test(self, fault: Fault) -> subprocess.CompletedProcess[str]:
        """The fault's tests, until one fails."""
        options = ("-x", "-q", "-rfE", "-p", "no:cacheprovider")
        return self.run("-m", "pytest", *options, *fault.tests, **fault.settings())

    def require_passing(self, fault: Fault) -> None:
        """The fault's tests must pass without it: tests that fail anyway would catch nothing."""
        selection = (fault.builds, *fault.tests, *sorted(fault.settings().items()))
        if selection not in self._passing:
            self.build(fault.builds, fault.variant)
            done = self.test(fault)
            if done.returncode != 0 or " passed" not in done.stdout:
                raise RuntimeError(f"the tests do not pass without the fault:\n{done.stdout[-4000:]}")
            self._passing.add(selection)

    def _outputs(self, fault: Fault) -> list[Path]:
        """The objects of the fault's units and the library that is linked from them."""
        if fault.builds == "cpu":
            library, folder, suffix = f"_cpu_{INSTRUCTION_SET}", f"segattn_ops._cpu_{INSTRUCTION_SET}", ".o"
            names = [f"{path.stem}{suffix}" for path in fault.sources()]
            found = [*self.root.rglob(f"{library}.abi3.so"), self.root / "segattn_ops" / "_build_info.json"]
        elif fault.builds == "emulated":
            library, folder = f"segattn_emulated_{fault.variant}", f"{fault.variant}-"
            names = [f"{path.name}.{library}.o" for path in fault.sources()]
            found = list(self.root.rglob(f"{library}.so"))
        else:
            return []
        objects = [path for name in names for path in self.root.rglob(name) if f"/{folder}" in path.as_posix()]
        assert len(objects) == len(names), f"{fault.id}: {names} have the objects {objects}"
        return found + objects

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The copy with the fault, built. The changed file keeps its time of change, so that of all that include it
        only the fault's units, whose objects are set aside, are compiled; afterwards these are put back."""
        path, outputs = self.root / fault.file, self._outputs(fault)
        original, times = path.read_text(), path.stat()
        assert original.count(fault.find) == 1, f"{fault.id}: its text must occur once in {fault.file}"
        intact = {output: output.with_name(f"{output.name}.intact") for output in outputs}
        try:
            for output, kept in intact.items():
                output.replace(kept)
            path.write_text(original.replace(fault.find, fault.replace))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            self.build(fault.builds, fault.variant)
            yield
        finally:
            path.write_text(original)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            for output, kept in intact.items():
                if kept.exists():
                    kept.replace(output)


def failures(printed: str) -> list[str]:
    """The tests that failed, from pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (.*)$", printed, re.MULTILINE)
