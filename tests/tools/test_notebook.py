"""The notebook of examples/ runs without a screen and a network, and is committed without outputs."""

import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "from_photograph_to_maps.ipynb"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)


def test_the_committed_notebook_has_no_outputs(notebook) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


def test_the_notebook_runs(notebook, tmp_path, monkeypatch) -> None:
    """In a kernel with settings of its own, which sees the package of this source tree; its cells check the results."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    ran = NotebookClient(
        nbformat.from_dict(notebook),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not [output for output in outputs if output.get("name") == "stderr"], printed
    assert "classifier.sa: PAM_Module -> position attention" in printed
    assert "classifier.sc: CAM_Module -> channel attention" in printed
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    for picture in pictures:
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L")).std() > 20
