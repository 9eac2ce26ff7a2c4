"""The documents: examples import what they use, and files, commands and links that are named exist."""

import ast
import builtins
import importlib.util
import re
from pathlib import Path

import pytest

from tools.site import layouts

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "requirements", "segattn_ops", "tests", "tools")
SUFFIXES = ("md", "py", "h", "cuh", "cu", "cpp", "txt", "png", "svg", "yml")
# What readers have of their own.
INPUTS = {"model", "head", "image", "batch", "x", "SelfAttention"}
PUBLISHED = {"official_pam", "official_cca", "PAM_Module", "CAM_Module", "CrissCrossAttention", "AFNB", "APNB"}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each_document
def test_examples_import_what_they_use(document):
    """What an example takes from its reader is a model, an input of it, or the published module that it replaces."""
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.arg):
                bound.add(node.arg)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound.add(node.name)
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert used - bound - set(dir(builtins)) <= INPUTS | PUBLISHED, block


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


@pytest.mark.parametrize("name", layouts.PICTURES)
def test_layouts_are_drawn_by_their_program(name):
    assert (ROOT / "docs" / "images" / f"layout_{name}.svg").read_text() == layouts.picture(name)
