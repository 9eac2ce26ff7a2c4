"""The layout of csrc: which folder may include which, read from the #include lines, and the length of all C++ lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
TREES = ("cpu", "cuda")
FAMILIES = ("position", "criss_cross", "channel")
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
FILES = {
    path.relative_to(CSRC).as_posix(): path.read_text() for path in sorted(CSRC.rglob("*")) if path.suffix in SUFFIXES
}
TORCH = ("torch/", "ATen/", "c10/")

# simd.h takes torch's 16-bit types, parallel.h its thread pool, tensors.h is what host code shares. All other files of
# csrc/cpu reach torch through these and through `checks` and registration.h.
CPU_FILES_THAT_INCLUDE_TORCH = ["cpu/common/parallel.h", "cpu/common/simd.h", "cpu/common/tensors.h"]
CPU_FILES_THAT_NAME_TORCH = ["cpu/common/parallel.h", "cpu/common/tensors.h"]

# The files that, in an emulated build, include headers of tests/emulator/include.
FILES_THAT_INCLUDE_THE_EMULATOR = [
    f"cuda/common/{name}" for name in ("device.cu", "launch.cuh", "ptx.cuh", "ptx_sm90.cuh")
]


def includes(file: str, brackets: str) -> list[str]:
    """The paths of the #include lines in these brackets, '<>' or '""'."""
    return re.findall(rf"^\s*#\s*include\s*{brackets[0]}([^>\"]+){brackets[1]}", FILES[file], re.MULTILINE)


def torch_includes(file: str) -> list[str]:
    return [path for path in includes(file, "<>") if path.startswith(TORCH)]


def files_below(folder: str) -> list[str]:
    return [file for file in FILES if file.startswith(folder + "/")]


@pytest.mark.parametrize("tree", TREES)
def test_a_folder_for_each_family(tree):
    assert {file.split("/")[1] for file in files_below(tree)} == {*FAMILIES, "common"}


def test_own_headers_are_included_by_their_path_below_csrc():
    others = [(file, path) for file in FILES for path in includes(file, '""') if path not in FILES]
    assert [file for file, _ in others] == FILES_THAT_INCLUDE_THE_EMULATOR
    assert all((ROOT / "tests" / "emulator" / "include" / path).is_file() for _, path in others)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("folder", [*FAMILIES, "common"])
def test_a_family_includes_itself_and_what_all_share(tree, folder):
    """Allowed are the folder itself, its tree's `common`, `checks`, and the headers at the top of csrc. No family
    includes another one, `common` includes no family, and neither tree includes the other."""
    allowed = (f"{tree}/{folder}/", f"{tree}/common/", "checks/")
    violations = [
        (file, path)
        for file in files_below(f"{tree}/{folder}")
        for path in includes(file, '""')
        if "/" in path and not path.startswith(allowed)
    ]
    assert not violations


def test_checks_include_no_kernels():
    assert not [
        (f, path) for f in files_below("checks") for path in includes(f, '""') if not path.startswith("checks/")
    ]


def test_cpu_kernels_are_free_of_torch():
    assert [file for file in files_below("cpu") if torch_includes(file)] == CPU_FILES_THAT_INCLUDE_TORCH
    assert [file for file in files_below("cpu") if "torch::" in FILES[file]] == CPU_FILES_THAT_NAME_TORCH
    host_files = [file for file in FILES if "cpu/common/tensors.h" in includes(file, '""')]
    parts = "cpu/criss_cross/criss_cross_parts.cpp"
    assert host_files == sorted([parts, *(f"cpu/{family}/{family}.cpp" for family in FAMILIES)])


def test_simd_includes_torch_headers_only_where_they_need_no_library():
    assert all(path.startswith("torch/headeronly/") for path in torch_includes("cpu/common/simd.h"))


def test_cuda_kernels_are_free_of_torch():
    """The emulator compiles them without torch."""
    assert not [file for file in FILES if file.endswith(".cuh") and torch_includes(file)]


def test_lines_have_at_most_120_columns():
    """clang-format neither reflows nor reports comments (ReflowComments: false)."""
    emulator = [path for path in sorted((ROOT / "tests" / "emulator").rglob("*")) if path.suffix in SUFFIXES]
    texts = FILES | {path.relative_to(ROOT).as_posix(): path.read_text() for path in emulator}
    assert not [
        f"{file}:{number}"
        for file, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 120
    ]
