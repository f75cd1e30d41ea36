# SPDX-License-Identifier: Apache-2.0

"""What the plugin for vLLM repeats of this package, which it cannot import. Its own tests need another environment."""

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest

from trl_tfpo.common.atomic import FORMAT
from trl_tfpo.decoding.exponents import DEFAULT_BETA
from trl_tfpo.models.adapters import VALUE_HEAD
from trl_tfpo.models.trained_exponents import EXPONENTS_FILE


PLUGIN = Path(__file__).parents[1] / "vllm_plugin"


def test_stored_numbers_are_those_of_this_package():
    """The plugin's mixture is tested with them. A change here must reach the plugin."""
    cases = runpy.run_path(str(PLUGIN / "tests" / "make_fixture.py"))["make_cases"]()
    stored = json.loads((PLUGIN / "tests" / "guided_logps.json").read_text(encoding="utf-8"))
    assert [case["name"] for case in cases] == [case["name"] for case in stored]
    for case, other in zip(cases, stored, strict=True):
        assert case["patient_logits"] == other["patient_logits"] and case["weights"] == other["weights"]
        for row, same in zip(case["expected"], other["expected"], strict=True):
            assert row == [None if x is None else pytest.approx(x, abs=1e-6) for x in same]


def test_constants_are_those_of_this_package(monkeypatch):
    """Both read the same folders, and have the same defaults."""
    monkeypatch.syspath_prepend(PLUGIN)
    from trl_tfpo_vllm import config

    assert (config.FORMAT, config.DEFAULT_BETA) == (FORMAT, DEFAULT_BETA)
    assert f'"{EXPONENTS_FILE}"' in inspect.getsource(config)
    assert f'VALUE_HEAD = "{VALUE_HEAD}."' in (PLUGIN / "trl_tfpo_vllm" / "model.py").read_text(encoding="utf-8")
    for name in [name for name in sys.modules if name.startswith("trl_tfpo_vllm")]:
        del sys.modules[name]
