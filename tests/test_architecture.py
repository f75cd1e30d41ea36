# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The import graph is the architecture, and the documentation names what is there; these tests keep both so."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import trl_tfpo


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_tfpo"
ROWS = [  # a module may import only from strictly earlier rows
    {"guidance_head", "head_adapter"},
    {
        "_compat",
        "arguments",
        "atomic",
        "faces",
        "functional",
        "held_out",
        "pair_means",
        "preferences",
        "printable",
        "progress",
        "tokenizer_identity",
        "weights",
    },
    {"adapters", "reading"},
    {
        "activation_memory",
        "checkpoints",
        "doctors",
        "objective",
        "rendering",
        "scoring",
        "shards",
        "tfpo_config",
        "token_credits",
        "trace",
    },
    {"tokenization"},
    {"named_model", "reference"},
    {"guided_flow", "token_rewards"},
    {"calibration", "modeling_doctor"},
    {"data_collator", "head_choice", "hub", "logits_processor", "plan", "visible"},
    {"doctor_files"},
    {"best_of", "shared_forward", "speculative", "trainer_checks"},
    {"tfpo_trainer"},
    {"generation"},
    {"custom_generate"},
    {"evaluation"},
    {"callbacks", "server", "testbed"},
    {"playground"},
    {"cli"},
    {"__main__"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def owner(path):
    """The entry of ROWS a file belongs to: a module, or the folder it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Names of the modules of the package that a file imports, however it spells them."""
    package = ".".join(["trl_tfpo", *path.relative_to(PACKAGE).parts[:-1]])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "trl_tfpo" else [module]
        else:
            continue
        yield from (
            name.split(".")[1] for name in names if name.startswith("trl_tfpo.") and name != "trl_tfpo.__version__"
        )


def test_every_module_has_its_row():
    """A new module has to be given its place."""
    assert {owner(path) for path in MODULES} == ROW.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_to_earlier_rows(path):
    """Once one import points back, the stages can no longer be read, tested or replaced alone."""
    for name in imports_of(path):
        if name != owner(path):
            assert ROW[name] < ROW[owner(path)], f"{path.name} must not import {name}: see ROWS"


def test_functional_needs_only_torch():
    """The equations must be readable, and usable, without the rest."""
    tree = ast.parse((PACKAGE / "functional.py").read_text(encoding="utf-8"))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported == {"collections", "math", "torch"}


def public_names():
    for path in [PACKAGE / "__init__.py", *MODULES]:
        name = ".".join(["trl_tfpo", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == name
            if (
                defined_here
                and not attribute.startswith("_")
                and (inspect.isclass(value) or inspect.isfunction(value))
            ):
                yield f"{name}.{attribute}", value


@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in public_names()])
def test_every_public_name_has_a_docstring(value):
    """A name without a word on what it means is a name nobody can use."""
    assert (inspect.getdoc(value) or "").strip()


def test_every_exported_name_is_documented():
    """What is exported at the top is what users look up."""
    documentation = "\n".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    )
    missing = [
        name for name in trl_tfpo.__all__ if f"`{name}`" not in documentation and f"{name}(" not in documentation
    ]
    assert not missing
    assert set(trl_tfpo.__all__) <= set(dir(trl_tfpo))


def test_paper_map_names_what_exists():
    """A map with wrong names is worse than none."""
    tests = (ROOT / "tests").glob("test_*.py")
    test_names = {
        name for path in tests for name in re.findall(r"(?:def|class) (\w+)", path.read_text(encoding="utf-8"))
    }
    rows = [
        line
        for line in (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    mapped = set()
    for row in rows[2:]:
        function, test = (re.findall(r"`([\w.:]+)`", cell) for cell in row.split("|")[2:4])
        for name in function:
            module, attribute = name.rsplit(".", 1)
            assert hasattr(importlib.import_module(f"trl_tfpo.{module}"), attribute), name
            mapped.add(name)
        assert test, row
        for name in test:
            assert set(name.split("::")) <= test_names, name
    functions = {
        f"functional.{name.rsplit('.', 1)[1]}"
        for name, value in public_names()
        if value.__module__ == "trl_tfpo.functional"
    }
    assert {name for name in functions if "check_" not in name} <= mapped


def test_config_documents_every_field_and_its_default():
    """A field is written three times (docstring, help, default); they must agree."""
    from dataclasses import fields

    from trl_tfpo import TFPOConfig
    from trl_tfpo._compat import _BaseConfig

    documentation = inspect.getdoc(TFPOConfig)
    inherited = {field.name for field in fields(_BaseConfig)}
    for field in fields(TFPOConfig):
        if field.name in inherited:
            continue
        assert field.metadata["help"] and "%" not in field.metadata["help"]
        entry = re.search(rf"^\s+{field.name} \((.*)\):$", documentation, flags=re.MULTILINE)
        assert entry, field.name
        if field.default is not None:
            default = f'"{field.default}"' if isinstance(field.default, str) else field.default
            assert f"defaults to `{default}`" in entry[1], field.name
