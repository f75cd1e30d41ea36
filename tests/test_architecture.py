# SPDX-License-Identifier: Apache-2.0

"""The import graph is the architecture, and the documentation names what is there; these tests keep both so."""

import ast
import importlib
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_tfpo


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_tfpo"
ROWS = [  # an entry of the package may import only from strictly earlier rows
    {"common", "faces", "functional"},
    {"data", "models"},
    {"annotation", "decoding"},
    {"custom_generate", "evaluation"},
    {"testbed", "training"},
    {"server"},
    {"cli"},
    {"__main__"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def owner(path):
    """The entry of ROWS a file belongs to: a module, or the folder it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    """The dotted name of a file's module within the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def modules_imported_by(path):
    """Dotted names of the modules of the package that a file imports, however it spells them."""
    modules = {module_of(other) for other in MODULES}
    package = ".".join(["trl_tfpo", *path.relative_to(PACKAGE).parts[:-1]])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")[1:] if name.startswith("trl_tfpo.") else []
            found = [".".join(parts[:length]) for length in (len(parts), len(parts) - 1)]
            yield from [module for module in found if module in modules][:1]


def test_every_entry_has_its_row():
    """The tree tells the stages only while it is short: a new entry has to be given its place."""
    assert {owner(path) for path in MODULES} == ROW.keys()
    assert len(ROW) <= 14
    assert len(ROWS) <= 8


def test_no_module_imports_itself_in_a_circle():
    """Within a folder, too, every module can be read after those that it imports."""
    TopologicalSorter({module_of(path): set(modules_imported_by(path)) for path in MODULES}).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_to_earlier_rows(path):
    """Once one import points back, the stages can no longer be read, tested or replaced alone."""
    for name in {module.split(".")[0] for module in modules_imported_by(path)}:
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
    assert imported == {"collections", "math", "torch", "typing"}


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
        if value.__module__ == "trl_tfpo.functional" and inspect.isfunction(value)
    }
    assert {name for name in functions if "check_" not in name} <= mapped


def test_config_documents_every_field_and_its_default():
    """A field is written three times (docstring, help, default); they must agree."""
    from dataclasses import fields

    from trl_tfpo import TFPOConfig
    from trl_tfpo.common._upstream import _BaseConfig

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
