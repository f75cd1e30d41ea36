# SPDX-License-Identifier: Apache-2.0

"""The wheel: built, installed elsewhere, imported from outside the repository."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import trl_tfpo


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_installs_and_imports_from_outside(tmp_path):
    """A file that is missing from the wheel is noticed by everyone but the developers."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("trl_tfpo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "trl_tfpo/py.typed" in names
    assert {f"trl_tfpo/testbed/weights/{name}/model.safetensors" for name in ("patient", "doctor")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "examples")) for name in names)

    venv = tmp_path / "venv"  # its own site-packages first, the dependencies from this environment
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", purelib, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    dependencies = Path(pytest.__file__).parents[1]
    script = (
        "import sys; sys.path.append(sys.argv[1]); import trl_tfpo; from trl_tfpo.testbed import load_world;"
        "assert sys.argv[2] in trl_tfpo.__file__, trl_tfpo.__file__; print(load_world().doctor.num_parameters())"
    )
    result = subprocess.run(
        [python, "-I", "-c", script, dependencies, str(venv)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50_000


@pytest.mark.slow
def test_a_source_tree_needs_no_installation(tmp_path):
    """Whoever clones the repository and sets PYTHONPATH, as on a cluster, has no metadata of an installed package."""
    (tmp_path / "trl_tfpo").symlink_to(ROOT / "trl_tfpo")
    hide = (
        "import importlib.metadata as metadata, sys\n"
        "read = metadata.Distribution.from_name.__func__\n"
        "def from_name(cls, name):\n"
        "    if name.replace('_', '-') == 'trl-tfpo': raise metadata.PackageNotFoundError(name)\n"
        "    return read(cls, name)\n"
        "metadata.Distribution.from_name = classmethod(from_name)\n"
    )
    script = hide + (
        "from datasets import Dataset\n"
        "from trl_tfpo.cli import main\n"
        "from trl_tfpo.testbed import load_world\n"
        "import trl_tfpo.training.checkpoints, trl_tfpo.training.cards\n"
        "from trl_tfpo import annotate_token_rewards\n"
        "world = load_world()\n"
        "pairs = world.preference_dataset('praise', num_pairs=2, seed=0)\n"
        "annotate_token_rewards(pairs, world.patient, world.tokenizer, faces=world.attributes['praise'].faces)\n"
        "sys.exit(main(['--version']) or main(['env']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"trl-tfpo {trl_tfpo.__version__}" in result.stdout


def test_the_version_is_said_in_one_place():
    """The version of a release is that of `__version__`, which keys of the cache and checkpoints have as well."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "trl_tfpo.__version__"}
    assert settings["project"]["dynamic"] == ["version"] and "version" not in settings["project"]
