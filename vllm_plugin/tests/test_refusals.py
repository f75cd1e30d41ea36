# SPDX-License-Identifier: Apache-2.0

"""Engines that would serve unguided or wrong answers must not start, and say why."""

import json
from pathlib import Path

import pytest
from tiny_models import save_model
from vllm import ModelRegistry, envs
from vllm.engine.arg_utils import EngineArgs

from trl_tfpo_vllm import guided_config
from trl_tfpo_vllm.admission import admission_of
from trl_tfpo_vllm.checks import guidance_of
from trl_tfpo_vllm.plugin import register


def config_of(folders, doctor=None, **arguments):
    """The config that an engine would start with; all checks but those of the model itself."""
    config = guided_config(folders.patient, {"helpful": doctor or folders.helpful})
    return EngineArgs(**config, dtype="float32", **{"max_model_len": 96} | arguments).create_engine_config()


def test_the_plugin_is_found_and_adds_the_check_of_requests(folders):
    """Installing the distribution is all; and an engine must not start without the check."""
    register()  # again
    assert "GuidedForCausalLM" in ModelRegistry.get_supported_archs()
    model_config = config_of(folders, logits_processors=["other:Class"]).model_config
    assert model_config.logits_processors == ["other:Class", admission_of(guidance_of(model_config))]


def test_the_older_runner(folders, monkeypatch):
    """It ignores the weights of requests, and would serve all of them unguided without a word."""
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="Guidance needs Model Runner V2.*set VLLM_USE_V2_MODEL_RUNNER=1"):
        config_of(folders)


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA adapters of requests"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"runner": "pooling"}, "pooling"),
    ],
)
def test_unsupported_modes(folders, arguments, mode):
    """They are refused by name."""
    with pytest.raises(ValueError, match=f"Guidance does not support {mode}"):
        config_of(folders, **arguments)


def test_another_tokenizer(folders):
    """Ids would stand for other tokens, and guidance would push towards arbitrary ones."""
    doctor = save_model(folders.root / "other", seed=4, words=["t4", "t3"])
    with pytest.raises(ValueError, match="2 ids that differ for doctor 'helpful'; the first is 3: 't3' .* 't4'"):
        config_of(folders, doctor)


def test_no_tokenizer(folders):
    """Without it nobody can say whether ids stand for the same tokens."""
    doctor = save_model(folders.root / "bare", seed=4)
    for file in folders.root.glob("bare/tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="must be saved with their tokenizer"):
        config_of(folders, doctor)


def test_a_quantised_doctor(folders):
    """vLLM would build it as an ordinary model, from weights of another format."""
    doctor = save_model(folders.root / "quantised", seed=4)
    path = Path(doctor) / "config.json"
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match="'helpful' must not be quantised"):
        config_of(folders, doctor)


def test_too_few_embeddings(folders):
    """A token that the doctor cannot read would end the engine."""
    doctor = save_model(folders.root / "small", seed=4, vocab_size=60)
    with pytest.raises(ValueError, match="an embedding for every token. Got 60 embeddings and the id 60"):
        config_of(folders, doctor)


def test_too_few_positions(folders):
    """vLLM checks the positions of the patient only."""
    doctor = save_model(folders.root / "short", seed=4, positions=64)
    with pytest.raises(ValueError, match="Got 64, and a `max_model_len` of 96; pass `max_model_len=64`"):
        config_of(folders, doctor)
    assert config_of(folders, doctor, max_model_len=64)


def test_no_doctors(folders):
    """`hf_overrides` written by hand."""
    arguments = EngineArgs(model=folders.patient, hf_overrides={"architectures": ["GuidedForCausalLM"]})
    with pytest.raises(ValueError, match="needs doctors in `hf_overrides`"):
        arguments.create_engine_config()
