# SPDX-License-Identifier: Apache-2.0

"""The notebooks, run from top to bottom by a kernel of their own."""

from pathlib import Path

import nbclient
import nbformat
import pytest


NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
# In the kernel what `few_prompts` does here
FEWER_PROMPTS = """
from trl_tfpo.testbed import World

every = World.prompts
World.prompts = lambda world, split: every(world, split)[: None if split == "train" else 3]
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    """A notebook that fails in its third cell teaches that the package does not work."""
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs of another version would be believed
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEWER_PROMPTS))
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    del notebook.cells[0]
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "image/png" in shown
    if path.stem == "align_in_ten_minutes":
        assert "trl-tfpo" in shown and "best of 4 (oracle)" in shown
    else:
        praise = [float(line.split()[2]) for line in str(notebook.cells[3].outputs[0].text).splitlines()]
        assert praise[-1] > praise[0] + 0.5  # all praise against all calm
