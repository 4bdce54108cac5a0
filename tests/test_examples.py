"""The notebooks run top to bottom on the sample cohort and show pictures."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own deprecations
def test_notebooks_run_top_to_bottom(tmp_path: Path) -> None:
    for file in sorted(EXAMPLES.glob("*.ipynb")):  # one folder: the second uses what the first left
        notebook = nbformat.read(shutil.copy(file, tmp_path), as_version=4)
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        ).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        assert len(pictures) >= 2, f"{file.name} shows {len(pictures)} pictures"
