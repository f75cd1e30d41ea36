# SPDX-License-Identifier: Apache-2.0

"""Everything shown is run: docstrings, README and documentation snippets."""

import contextlib
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import trl_tfpo
from trl_tfpo import evaluation, functional, server, testbed
from trl_tfpo.testbed import load_world


ROOT = Path(__file__).parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(trl_tfpo.__path__, "trl_tfpo.")]
REWARD_MODEL = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"))]
URL = "https://github.com/trl-tfpo/trl-tfpo"


@pytest.fixture(autouse=True, scope="module")
def deepspeed_has_spoken():
    """DeepSpeed prints a line, once, when it is first asked for its device; no example shows it."""
    with contextlib.suppress(ImportError):
        from deepspeed.accelerator import get_accelerator

        get_accelerator()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    """An example that fails is the first thing a user tries."""
    monkeypatch.chdir(tmp_path)
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets(page, tmp_path, monkeypatch, endpoint):
    """
    The snippets of a page form one script, run from top to bottom in the controlled world. What they name elsewhere is
    here: a reward model in a folder, and an endpoint that judges.
    """
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    script = "\n".join(snippets).replace("http://localhost:8000/v1", f"http://127.0.0.1:{endpoint.server_port}/v1")
    monkeypatch.chdir(tmp_path)
    if REWARD_MODEL in script:
        world = load_world()
        world.doctor.save_pretrained(tmp_path / REWARD_MODEL)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / REWARD_MODEL, num_labels=1)
        model.config.pad_token_id = world.tokenizer.pad_token_id
        model.save_pretrained(tmp_path / REWARD_MODEL)
        world.tokenizer.save_pretrained(tmp_path / REWARD_MODEL)
    exec(compile(script, page.name, "exec"), {})
    assert bool(endpoint.requests) == ("ChatJudge(" in script)
    assert "```py\n" not in page.read_text(encoding="utf-8")  # which would not be run


def test_the_site_builds_without_a_broken_link(tmp_path):
    """A page that leads nowhere, or a name that is gone from the reference, is found by whoever needs it."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    result = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert result.returncode == 0, result.stderr
    reference = set(
        re.findall(r'id="(trl_tfpo[\w.]*)"', (tmp_path / "api" / "index.html").read_text(encoding="utf-8"))
    )
    for module in (trl_tfpo, evaluation, functional, server, testbed):
        for name, value in public_names(module):
            assert {f"{module.__name__}.{name}", f"{value.__module__}.{name}"} & reference, name
            assert inspect.getdoc(value), name
    assert not [name for name in reference if re.search(r"\._(?!_)", name)]  # nothing private


def public_names(module):
    """What a module exports, or else what it defines."""
    if hasattr(module, "__all__"):
        return [(name, getattr(module, name)) for name in module.__all__]
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def test_every_page_is_in_the_navigation():
    """A page that no menu leads to is read by nobody."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nmarkdown_")[0]
    assert sorted(re.findall(r"([\w/]+\.md)$", navigation, flags=re.MULTILINE)) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )


def test_troubles_are_those_that_the_code_has():
    """Whoever searches the page for the words of an error must find them, and not those of last year."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")][2:]
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)  # symptom, cause, remedy
    quoted = [text for row in rows for text in re.findall(r'"([^"]+)"', row[0])]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl_tfpo").rglob("*.py"))
    joined = re.sub(r"""["']\s*\n\s*f?["']""", "", sources)  # a text that goes on in the next line
    assert len(quoted) >= 10
    assert not [text for text in quoted if text not in joined]


def test_make_targets_of_the_readme_exist():
    """README promises commands."""
    promised = set(re.findall(r"`?make ([\w-]+)`?", (ROOT / "README.md").read_text(encoding="utf-8")))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "demo-real", "test"} <= promised <= targets


def test_tree_of_the_readme_is_the_tree():
    """A map that leaves out a module, or shows one that is gone, misleads the newcomer it is for."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "trl_tfpo").glob("[!_]*.py"):
        assert path.name in readme, path.name
    for name in re.findall(r"(\w+\.py)\b", readme):
        assert any(list((ROOT / folder).rglob(name)) for folder in ("trl_tfpo", "examples")), name


def test_no_page_or_module_holds_a_path_of_this_machine():
    """Paths of a developer's machine in a release are useless to everybody else."""
    for path in [*PAGES, *(ROOT / "trl_tfpo").rglob("*.py"), *(ROOT / "trl_tfpo").rglob("*.json")]:
        assert str(ROOT.parent) + "/" not in path.read_text(encoding="utf-8"), path
