"""The site: it builds without warnings, loads nothing from other servers, and its reference names what is public."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent and os.environ.get("SEGATTN_REQUIRE_DOCS") != "1":
        pytest.skip(f"{', '.join(absent)} not installed; pip install -r requirements/docs.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return {str(page.relative_to(folder)): page.read_text() for page in folder.rglob("*.html")}


@pytest.mark.slow
def test_pages_load_nothing_from_other_servers(site):
    sources = r"""(?:<(?:script|img|iframe|source)\b[^>]*\bsrc|<link\b[^>]*\bhref)=["']?((?:https?:)?//[^"'\s>]+)"""
    loaded = {name: re.findall(sources, page) for name, page in site.items()}
    assert {name: urls for name, urls in loaded.items() if urls} == {}


@pytest.mark.slow
def test_equations_are_mathml(site):
    assert not [name for name, page in site.items() if "arithmatex" in page]
    assert all("<math" in site[f"ops/{name}.html"] for name in ("position", "criss_cross", "channel"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["", ".nn", ".models", ".checkpoints", ".visualize", ".distributed"], ids=lambda name: name or "package"
)
def test_the_reference_names_all_that_is_public(site, module):
    package = importlib.import_module(f"segattn_ops{module}")
    modules = {"__version__", "checkpoints", "nn"} if not module else set()
    reference = "".join(page for name, page in site.items() if name.startswith("api/"))
    missing = [name for name in set(package.__all__) - modules if f'id="segattn_ops{module}.{name}"' not in reference]
    assert missing == []


def test_docstrings_become_markdown():
    markdown = pytest.importorskip("tools.site.docstrings", exc_type=ImportError).markdown
    docstring = """As :func:`~segattn_ops.convert`, first::

    call()

Args:
    height, width: of the image,
        in pixels.

Returns:
    (B, C), in the dtype of the input: a result.
"""
    expected = """As `segattn_ops.convert`, first:

    call()

Args:
    height: of the image,
        in pixels.
    width: of the image,
        in pixels.

Returns:
    (B, C), in the dtype of the input&#58; a result.
"""
    assert markdown(docstring) == expected
