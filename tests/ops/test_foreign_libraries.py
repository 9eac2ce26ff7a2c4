"""Libraries that are cut off, of something else or of another architecture: the import survives, a lower instruction
set or the reference serves, and one sentence says why."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import segattn_ops
from segattn_ops import _library

PACKAGE = Path(segattn_ops.__file__).parent
PROGRAM = Path(__file__).with_name("foreign_libraries.py")
BEST = segattn_ops.build_config()["cpu"]["instruction_set"]
C, CPU = "_C.abi3.so", f"_cpu_{BEST}.abi3.so"
LOWER = [name for name in _library.CPU_CAPABILITIES if name in segattn_ops.build_config()["cpu"]["built"]]
HAS_LOWER = len(LOWER) > 1


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def of_machine(content: bytes) -> bytes:
    return content[:18] + (183 if content[18] == 62 else 62).to_bytes(2, "little") + content[20:]  # AArch64, or x86-64


def of_32_bits(content: bytes) -> bytes:
    return content[:4] + b"\1" + content[5:]


def from_torch(_content: bytes) -> bytes:
    return (Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so").read_bytes()


def copy_of(name: str) -> Callable[[bytes], bytes]:
    return lambda _content: (PACKAGE / name).read_bytes()


def missing_symbol(content: bytes) -> bytes:
    """As a library of another torch: a symbol that it needs is of another name."""
    return content.replace(b"aoti_torch_", b"aoti_horch_")


# name -> file, change of its content, what is said
CASES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty schemas": (C, cut(0), "is no library: it has 0 bytes"),
    "a byte of the schemas": (C, cut(1e-5), "is no library"),
    **{f"{share} of the schemas": (C, cut(share), "is cut off: it has") for share in (0.01, 0.3, 0.7, 0.999)},
    "text as schemas": (C, lambda _: b"#!/bin/sh\n" * 99, "is no library: it has 990 bytes"),
    "another package's library as schemas": (C, from_torch, "is another library than its name says"),
    "kernels as schemas": (C, copy_of(CPU), "is another library than its name says"),
    "schemas of another architecture": (C, of_machine, "is of another architecture: ELF machine"),
    "schemas of 32 bits": (C, of_32_bits, "is of another architecture"),
    "schemas for another torch": (C, missing_symbol, "undefined symbol"),
    "empty kernels": (CPU, cut(0), "is no library: it has 0 bytes"),
    **{f"{share} of the kernels": (CPU, cut(share), "is cut off: it has") for share in (0.001, 0.3, 0.999)},
    "schemas as kernels": (CPU, copy_of(C), "is another library than its name says"),
    "another package's library as kernels": (CPU, from_torch, "is another library than its name says"),
    "kernels of another architecture": (CPU, of_machine, "is of another architecture: ELF machine"),
    "kernels for another torch": (CPU, missing_symbol, "undefined symbol"),
}
INFOS = {
    "text": b"half a rec",
    "a list": b"[]",
    "of another kind": b'{"cuda": 3}',
    "of other sets": b'{"cpu_instruction_sets": "avx2"}',
    "not text": b"\xff\xfe",
    "deep": b"[" * 200_000,
}


def copied(folder: Path) -> Path:
    """A copy of the package, whose libraries are links."""
    package = folder / "segattn_ops"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in PACKAGE.glob("*.so"):
        (package / library.name).symlink_to(library)
    return package


def replaced(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def described(folders: list[Path]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SEGATTN", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, folders)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=folders[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the libraries of other systems are not ELF")
def test_libraries_that_are_none(tmp_path, record_property) -> None:
    folders = []
    for name, (library, change, _) in CASES.items():
        package = copied(tmp_path / name.replace(" ", "_"))
        replaced(package / library, change((PACKAGE / library).read_bytes()))
        folders.append(package.parent)
    for (name, (library, _, said)), found in zip(CASES.items(), described(folders), strict=True):
        assert found["status"] == 0 and "error" not in found, f"{name}: {found}"
        assert found["grad"], name
        assert len(found["warnings"]) == 1 and said in found["warnings"][0], f"{name}: {found['warnings']}"
        assert said in " ".join(found["page"].split()), f"{name}: {found['page']}"
        if library == C or not HAS_LOWER:
            assert not found["cpu"]["native"] and said in found["cpu"]["why_not"], name
        else:
            assert found["cpu"]["native"] and found["cpu"]["instruction_set"] == LOWER[LOWER.index(BEST) - 1], name
            assert said in found["cpu"]["skipped"][BEST], name
    record_property("libraries tried", len(CASES))


def test_records_of_the_build_that_are_none(tmp_path, record_property) -> None:
    folders = []
    for name, content in INFOS.items():
        package = copied(tmp_path / name.replace(" ", "_"))
        replaced(package / "_build_info.json", content)
        folders.append(package.parent)
    for name, found in zip(INFOS, described(folders), strict=True):
        assert found["status"] == 0 and "error" not in found, f"{name}: {found}"
        assert found["cpu"]["native"] and found["cpu"]["built"] == [], name
        assert len(found["warnings"]) == 1 and "_build_info.json cannot be read" in found["warnings"][0], name
    record_property("libraries tried", len(INFOS))


@pytest.mark.skipif(not HAS_LOWER, reason="one instruction set was built")
def test_a_set_that_the_processor_lacks_is_not_loaded() -> None:
    info = {"cpu_instruction_sets": LOWER}
    for index, name in enumerate(LOWER):
        assert _library._usable_cpu_capabilities(name, info) == LOWER[index::-1]


def test_a_second_copy_in_one_process_is_named(monkeypatch) -> None:
    """Loaded, it would end the process: torch refuses a second registration in a static initialiser."""
    assert hasattr(_library.ops, "position_attention")
    state = _library.load()
    assert "another library in this process has registered the operators" in state.missing["cpu"]
    with pytest.raises(OSError, match="has registered the operators"):
        _library._require_library(PACKAGE / C, schemas=True)
