# SPDX-License-Identifier: Apache-2.0

"""What the plugin for vLLM repeats of this package, which it cannot import. Its own tests need another environment."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_tfpo.common.atomic import FORMAT
from trl_tfpo.decoding.exponents import DEFAULT_BETA
from trl_tfpo.models.adapters import VALUE_HEAD
from trl_tfpo.models.trained_exponents import EXPONENTS_FILE, RECORD


PLUGIN = Path(__file__).parents[1] / "vllm_plugin"


@pytest.fixture(scope="module")
def fixture():
    """The script that stored what this package computes. A change here must reach the plugin."""
    path, modules = sys.path.copy(), set(sys.modules)
    yield runpy.run_path(str(PLUGIN / "tests" / "make_fixture.py"))
    sys.path[:] = path
    for name in {"tiny_models"} - modules:
        sys.modules.pop(name, None)


def stored(name):
    """Stored numbers."""
    return json.loads((PLUGIN / "tests" / name).read_text(encoding="utf-8"))


def test_stored_numbers_are_those_of_this_package(fixture):
    """The plugin's mixture is tested with them."""
    cases, others = fixture["make_cases"](), stored("guided_logps.json")
    assert [case["name"] for case in cases] == [case["name"] for case in others]
    for case, other in zip(cases, others, strict=True):
        assert case["patient_logits"] == other["patient_logits"] and case["weights"] == other["weights"]
        for row, same in zip(case["expected"], other["expected"], strict=True):
            assert row == [None if x is None else pytest.approx(x, abs=1e-6) for x in same]


def test_stored_adapters_are_those_that_training_saves(fixture, tmp_path):
    """The plugin reads the same files."""
    fixture["save_adapters"](tmp_path)
    folders = sorted((PLUGIN / "tests" / "adapters").iterdir())
    assert [folder.name for folder in folders] == sorted(folder.name for folder in tmp_path.iterdir())
    for folder in folders:
        new = tmp_path / folder.name
        configs = [json.loads((one / "adapter_config.json").read_text(encoding="utf-8")) for one in (folder, new)]
        for config in configs:
            del config["peft_version"]
            config["target_modules"].sort()
        assert configs[0] == configs[1]
        assert (folder / EXPONENTS_FILE).read_text() == (new / EXPONENTS_FILE).read_text()
        tensors, others = (load_file(one / "adapter_model.safetensors") for one in (folder, new))
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(others[name], tensor)


def test_stored_texts_are_those_of_this_package(fixture):
    """Greedy search with LoRA doctors and references, which the plugin's engine must repeat."""
    texts, others = fixture["make_texts"](), stored("guided_texts.json")
    assert len(texts) == len(others)
    for text, other in zip(texts, others, strict=True):
        assert text.pop("logps") == pytest.approx(other.pop("logps"), abs=1e-4)
        assert json.loads(json.dumps(text)) == other


def test_constants_are_those_of_this_package(monkeypatch):
    """Both read the same folders, and have the same defaults."""
    monkeypatch.syspath_prepend(PLUGIN)
    from trl_tfpo_vllm import config, saved_doctor

    assert config.DEFAULT_BETA == DEFAULT_BETA
    found = (saved_doctor.FORMAT, saved_doctor.EXPONENTS_FILE, saved_doctor.RECORD, saved_doctor.VALUE_HEAD)
    assert found == (FORMAT, EXPONENTS_FILE, RECORD, VALUE_HEAD)
    for name in [name for name in sys.modules if name.startswith("trl_tfpo_vllm")]:
        del sys.modules[name]
