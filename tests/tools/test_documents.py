"""The documents: the README's examples run unchanged, and files, commands and links that are named exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "requirements", "segattn_ops", "tests", "tools")
SUFFIXES = ("md", "py", "h", "cuh", "cu", "cpp", "txt", "png")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS, ids=[f"example_{i}" for i in range(len(BLOCKS))])
def test_readme_examples(code):
    if "timm" in code:
        pytest.importorskip("timm")
    exec(compile(code, "README.md", "exec"), {})


@each_document
def test_named_files_exist(document):
    pattern = rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:{'|'.join(SUFFIXES)}))`"
    assert [name for name in re.findall(pattern, document.read_text()) if not (ROOT / name).exists()] == []


@each_document
def test_links_lead_to_files(document):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []


@each_document
def test_named_commands_exist(document):
    modules = re.findall(r"python -m ((?:benchmarks|segattn_ops|tests|tools)[\w.]*)", document.read_text())
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert sizes and max(sizes.values()) < 200_000, sizes
