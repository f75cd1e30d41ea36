# SPDX-License-Identifier: Apache-2.0

"""The notebooks, run from top to bottom by a kernel of their own, say what is stored in them."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from make_notebooks import METADATA, execute
from scripts import make_chat_model


NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def small_real_models(tmp_path, monkeypatch):
    """A cache in which the real models are replaced by ones that are made in a second."""
    monkeypatch.setenv("TRL_TFPO_CACHE", str(tmp_path))
    sources = "".join(cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells)
    words = sorted(word for word in set(re.findall(r"[^\s\"]+", sources)) if "cache" not in word)
    patient = make_chat_model(tmp_path / "SmolLM2-135M-Instruct", " ".join(words))
    for name in ("cheerful", "plain"):
        shutil.copytree(patient, tmp_path / "doctors" / patient.name / name)


def code_cells(notebook):
    """Cells with code, each with its tags: `real` shows a real model, `sampled` single texts of a trained doctor."""
    return [(cell, cell.metadata.get("tags", [])) for cell in notebook.cells if cell.cell_type == "code"]


def said(cell):
    """What the outputs of a cell are, their words, and their numbers. Pictures have no words."""
    kinds, words, numbers = [], [], []
    for output in cell.outputs:
        data = {"stdout": output.text} if output.output_type == "stream" else output.data
        kinds.append(sorted(data))
        for kind, text in data.items():
            if not kind.startswith("image/"):
                words.append(NUMBER.sub("#", text))
                numbers += [float(number.replace(",", "")) for number in NUMBER.findall(text)]
    return kinds, words, numbers


@pytest.mark.slow
@by_notebook
def test_a_notebook_says_what_is_stored(path, small_real_models):
    """
    A reader who runs a notebook must see what the page shows. If this fails after a change that is meant, run
    `make notebooks`, and check that the paragraphs still hold.
    """
    pairs = zip(code_cells(nbformat.read(path, as_version=4)), code_cells(execute(path)), strict=True)
    for (stored, tags), (executed, _) in pairs:
        if tags:
            assert stored.outputs and executed.outputs
            assert "sampled" in tags or "cache" not in str(executed.outputs)  # which lacks the model
            continue
        kinds, words, numbers = said(executed)
        assert (kinds, words) == said(stored)[:2]
        assert numbers == pytest.approx(said(stored)[2], rel=0.1, abs=0.15)  # processors round differently


@by_notebook
def test_what_is_stored_is_for_everyone(path):
    """Times, paths and versions would change with every run, and a large picture makes every clone larger."""
    notebook, text = nbformat.read(path, as_version=4), path.read_text(encoding="utf-8")
    assert notebook.metadata == METADATA and len(text) < 100_000
    assert text.count('"image/png"') <= 1
    assert not re.search(r"[\s\"'](/home|/root|/tmp|/Users|/work)\b", text)
    assert [cell.execution_count for cell, _ in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell, _ in code_cells(notebook) for output in cell.outputs]
    assert len(outputs) >= 3 and all(output.get("name") != "stderr" for output in outputs)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert all(kind == "markdown" for kind, after in zip(kinds, kinds[1:], strict=False) if after == "code")
