# SPDX-License-Identifier: Apache-2.0

"""Everything shown is run: docstrings, README and documentation snippets."""

import contextlib
import doctest
import importlib
import inspect
import operator
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import few_prompts
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
    with few_prompts():
        failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets(page, tmp_path, monkeypatch, endpoint, capsys):
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
    with few_prompts():
        exec(compile(script, page.name, "exec"), {})
    if page.name == "README.md":  # what it prints must show what guidance is for
        unguided, *guided = map(float, re.findall(r"mean score (-?[\d.]+)", capsys.readouterr().out))
        assert unguided + 1 < guided[0] < guided[1]
    assert bool(endpoint.requests) == ("ChatJudge(" in script)
    assert "```py\n" not in page.read_text(encoding="utf-8")  # which would not be run


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    """A page that leads nowhere, or a name that is gone from the reference, is found by whoever needs it."""
    # Not `--quiet`: mkdocs would drop the warnings before `--strict` counts them
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
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


def test_the_walks_in_the_concepts_name_what_exists():
    """Whoever follows a pair or a token through the code must find each step where the page says it is."""
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| \d+ \|.*\| `([\w/]+)\.py` \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(steps) >= 15
    for path, names in steps:
        module = importlib.import_module(f"trl_tfpo.{path.replace('/', '.')}")
        for name in re.findall(r"`([\w.]+)`", names):
            assert operator.attrgetter(name)(module), f"{path}.py: {name}"


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


def test_continuous_integration_runs_what_the_readme_promises():
    """A command of the README that breaks must be noticed before a newcomer types it."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make demo", "make test", "make quality", "make docs"} <= set(steps)


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
        assert any(list((ROOT / folder).rglob(name)) for folder in ("trl_tfpo", "examples", "benchmarks")), name
    for folder in (path.parent for path in (ROOT / "trl_tfpo").glob("*/__init__.py")):
        assert f"{folder.name}/" in readme, folder.name


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_prose_fits_a_screen(page):
    """Long lines make a change of one word unreadable as a difference. Tables, code and links have no choice."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 119 and not line.startswith("|")]
    assert not [line for line in long if " " in line.strip()[80:]]


def test_the_version_and_the_address_are_said_in_one_way():
    """A changelog, a citation or a link of another version or project sends people astray."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]  # that of `trl_tfpo.__version__`
    assert set(project["urls"]) >= {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    assert all(url.startswith(URL) for name, url in project["urls"].items() if name != "Paper")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d\S*)", changelog, flags=re.MULTILINE)[1] == trl_tfpo.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["repository-code"]) == (trl_tfpo.__version__, URL)


def test_the_changelog_names_the_declared_bounds():
    """Whoever reads that a version is enough must be able to install it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = dict(re.findall(r"^([\w-]+).*?>=([\d.]+)", "\n".join(sum(groups, [])), flags=re.MULTILINE))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w-]+)>=([\d.]+)", changelog)
    assert len(named) >= 8
    assert all(bounds[name] == version for name, version in named), named


def test_no_page_or_module_holds_a_path_of_this_machine():
    """Paths of a developer's machine in a release are useless to everybody else."""
    for path in [*PAGES, *(ROOT / "trl_tfpo").rglob("*.py"), *(ROOT / "trl_tfpo").rglob("*.json")]:
        assert str(ROOT.parent) + "/" not in path.read_text(encoding="utf-8"), path
