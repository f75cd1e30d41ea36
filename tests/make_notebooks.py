# SPDX-License-Identifier: Apache-2.0

"""
Execute notebooks, and store their outputs in them (`make notebooks`):

    python tests/make_notebooks.py examples/notebooks/*.ipynb

Cells with the tag `real` show a real model if the cache has one (`make demo-real`). Cells with the tag `sampled` show
single texts of a trained doctor. `test_notebooks.py` executes the notebooks again, and compares the outputs of the
other cells.
"""

import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode


METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> NotebookNode:
    """
    Execute a notebook in an empty folder. Return it with its outputs.

    Standard error has progress, times and paths, and is left out. So are times and versions in the metadata.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data.pop("text/plain", None)  # the same, with all digits
    return notebook


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
