# SPDX-License-Identifier: Apache-2.0

"""Weights: of requests, as columns of hidden states, and the mixture against numbers of the main package."""

import json
import pkgutil
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from trl_tfpo_vllm import guided_config
from trl_tfpo_vllm.__main__ import main
from trl_tfpo_vllm.guidance import DoctorEntry, Guidance
from trl_tfpo_vllm.mixture import guided_logps, pack_weights, unpack_weights


CASES = json.loads((Path(__file__).parent / "guided_logps.json").read_text(encoding="utf-8"))


def tensor(rows):
    """A tensor of rows in which None is minus infinity."""
    return torch.tensor([[float("-inf") if x is None else x for x in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_mixture_is_that_of_the_main_package(case):
    """The numbers are stored, as both packages need different versions of transformers: see `make_fixture.py`."""
    doctors = [tensor(rows) for rows in case["doctor_logits"]]
    found = guided_logps(tensor(case["patient_logits"]), doctors, torch.tensor(case["weights"]))
    torch.testing.assert_close(found, tensor(case["expected"]), atol=1e-6, rtol=0)


def test_a_smaller_vocabulary_rules_out_the_rest():
    """Padding of a vocabulary stands for no token."""
    patient, doctor = torch.randn(3, 9), torch.randn(3, 7)
    weights = torch.tensor([[1.0, 0.5]]).expand(3, -1)
    found = guided_logps(patient, [doctor], weights)
    assert found.shape == (3, 9) and (found[:, 7:] == float("-inf")).all()
    torch.testing.assert_close(found[:, :7], guided_logps(patient[:, :7], [doctor], weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_survive_half_precision(dtype):
    """In one bfloat16 0.123456 would be 0.12354."""
    weights = torch.tensor([[0.123456, -0.5, 1.5], [1 / 3, 9.87654, 0.0]])
    packed = pack_weights(weights, dtype)
    assert packed.dtype == dtype and packed.shape == (2, 9)
    torch.testing.assert_close(unpack_weights(packed), weights, atol=1e-6, rtol=0)


def test_default_exponents():
    """Doctors of guided flow leave the patient's exponent at 1; language models take theirs from it."""
    flow = DoctorEntry("flow", "a", 0.8, is_language_model=False)
    model = DoctorEntry("model", "b", 0.5, is_language_model=True)
    assert Guidance((flow,)).request_weights(None) == [1.0, 0.8]
    assert Guidance((flow, model)).request_weights({"beta_flow": 2, "other": "x"}) == [0.5, 2.0, 0.5]
    assert Guidance((model,), alpha=1.0).request_weights({"beta_model": 1.5}) == [1.0, 1.5]
    assert Guidance((model,)).request_weights({"beta_model": -0.5}) == [1.5, -0.5]
    guidance = Guidance((flow, model), alpha=0.7)
    assert Guidance.decoded(guidance.encoded()) == guidance


def test_a_reference_has_the_opposite_exponent():
    """A model with several roles runs once, with the sum of its exponents. The reference can be the patient."""
    first = DoctorEntry("first", "a", 0.5, is_language_model=True, reference="c")
    second = DoctorEntry("second", "b", 0.3, is_language_model=True, reference="patient")
    third = DoctorEntry("third", "c", 0.2, is_language_model=True)
    guidance = Guidance((first, second, third))
    assert guidance.factors == ["a", "b", "c"] and Guidance.decoded(guidance.encoded()) == guidance
    assert guidance.request_weights(None) == pytest.approx([1 - 0.2 - 0.3, 0.5, 0.3, 0.2 - 0.5])
    assert Guidance((first, second)).request_weights({"beta_second": -2}) == [3.0, 0.5, -2.0, -0.5]


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a b"], ["a.b"]])
def test_names_that_no_key_could_hold(names):
    """Names are parts of keys, and of texts by which vLLM finds a class."""
    with pytest.raises(ValueError, match="with different names"):
        Guidance(tuple(DoctorEntry(name, "", 0.1, True) for name in names))


def test_the_config_reads_what_the_doctors_were_trained_for(tmp_path):
    """The exponents come from `guidance.json`, as in the main package."""
    records = {"flow": {"format": 1, "alpha": 1.0, "beta": 0.9}, "a": {"format": 1}, "b": None}
    doctors = {}
    for name, record in records.items():
        doctors[name] = tmp_path / name
        doctors[name].mkdir()
        (doctors[name] / "config.json").write_text("{}")
        if record is not None:
            (doctors[name] / "guidance.json").write_text(json.dumps(record))
    config = guided_config("patient", doctors)
    fields = config["hf_overrides"]
    assert config["model"] == "patient" and fields["architectures"] == ["GuidedForCausalLM"]
    found = [(doctor["name"], doctor["beta"], doctor["is_language_model"]) for doctor in fields["guided_doctors"]]
    assert found == [("flow", 0.9, False), ("a", 0.25, True), ("b", 0.25, True)]
    assert fields["guided_alpha"] is None
    json.dumps(fields)  # as a flag of the server

    with pytest.raises(ValueError, match=r"must name doctors among .*'other'"):
        guided_config("patient", doctors, beta={"other": 1.0})
    with pytest.raises(ValueError, match="must not exceed 1 in sum"):
        guided_config("patient", doctors, beta=0.7)
    (doctors["a"] / "guidance.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="must have format 1. Got format 2"):
        guided_config("patient", doctors)
    with pytest.raises(ValueError, match="has no `config.json`"):
        guided_config("patient", {"c": tmp_path / "c"})


def test_settings_need_neither_torch_nor_vllm():
    """Commands that only print flags, and the process that checks requests, start at once."""
    script = "import sys, trl_tfpo_vllm; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_prints_flags_for_a_shell(tmp_path, capsys):
    """The flags hold JSON, which a shell must not split."""
    (tmp_path / "config.json").write_text("{}")
    flags = ["--doctor", f"helpful={tmp_path}", "--reference", "helpful=a b", "--beta", "helpful=0.25", "--alpha", "1"]
    main(["--patient", "a b", *flags])
    model, patient, flag, overrides = shlex.split(capsys.readouterr().out)
    assert (model, patient, flag) == ("--model", "a b", "--hf-overrides")
    expected = guided_config("a b", {"helpful": tmp_path}, alpha=1.0, beta=0.25, reference={"helpful": "a b"})
    assert json.loads(overrides) == expected["hf_overrides"]
    for wrong, message in ((["--beta", "other=0.25"], "must name"), (["--doctor", "helpful=x"], "names must differ")):
        with pytest.raises(SystemExit):
            main(["--patient", "a", "--doctor", f"helpful={tmp_path}", *wrong])
        assert message in capsys.readouterr().err


def test_the_console_script():
    """It is the same command."""
    script = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name: pkgutil.resolve_name(target) for name, target in script.items()} == {"trl-tfpo-vllm": main}
