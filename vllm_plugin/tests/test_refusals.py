# SPDX-License-Identifier: Apache-2.0

"""Engines that would serve unguided or wrong answers must not start, and say why."""

import pytest
from tiny_models import change_config, save_adapter, save_config, save_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from vllm import ModelRegistry, envs
from vllm.engine.arg_utils import EngineArgs

from trl_tfpo_vllm import guided_config
from trl_tfpo_vllm.admission import admission_of
from trl_tfpo_vllm.checks import guidance_of
from trl_tfpo_vllm.plugin import register


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def config_of(folders, doctor=None, patient=None, reference=None, **arguments):
    """The config that an engine would start with; all checks but those of the model itself."""
    references = {} if reference is None else {"helpful": reference}
    config = guided_config(patient or folders.patient, {"helpful": doctor or folders.helpful}, reference=references)
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


def test_speculation_by_hidden_states(folders):
    """The hidden states of the composite are those of several models, and hold weights."""
    draft = change_config(save_model(folders.root / "eagle", seed=4), architectures=["EagleLlamaForCausalLM"])
    speculation = {"method": "eagle", "model": draft, "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="Guidance does not support speculation by hidden states"):
        config_of(folders, speculative_config=speculation)


def test_a_quantized_patient(folders):
    """Its doctors would be built with the kernels of its format."""
    patient = change_config(save_model(folders.root / "gptq", seed=4), quantization_config=GPTQ)
    with pytest.raises(ValueError, match="Guidance does not support a quantized patient"):
        config_of(folders, patient=patient)


@pytest.mark.parametrize("role", ["patient", "doctor", "reference"])
def test_models_that_read_images(folders, role):
    """Prompts of doctors hold no images."""
    text = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(text_config=text, vision_config=vision, architectures=["LlavaForConditionalGeneration"])
    folder = save_config(folders.root / f"{role} with images", config)
    with pytest.raises(ValueError, match=f"(?i){role}.* must be a language model. Got a LlavaConfig"):
        config_of(folders, **{role: folder})


@pytest.mark.parametrize("role", ["doctor", "reference"])
def test_another_tokenizer(folders, role):
    """Ids would stand for other tokens, and guidance would push towards arbitrary ones."""
    folder = save_model(folders.root / f"other {role}", seed=4, words=["t4", "t3"])
    with pytest.raises(ValueError, match=f"(?i){role} .*'helpful' must have the patient's .* is 3: 't3' .* 't4'"):
        config_of(folders, **{role: folder})


def test_an_adapter_whose_base_is_not_found(folders):
    """No file of that name, and no model on the Hub."""
    doctor = save_adapter(folders.root / "lost", "policy_lora", base="nobody/nothing")
    with pytest.raises(ValueError, match="model that can be found. Got 'nobody/nothing'"):
        config_of(folders, doctor)


def test_no_tokenizer(folders):
    """Without it nobody can say whether ids stand for the same tokens."""
    doctor = save_model(folders.root / "bare", seed=4)
    for file in folders.root.glob("bare/tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="must be saved with their tokenizer"):
        config_of(folders, doctor)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_quantized_doctor(folders, is_adapter):
    """vLLM would build it as an ordinary model, from weights of another format."""
    base = change_config(save_model(folders.root / f"base {is_adapter}", seed=4), quantization_config=GPTQ)
    doctor = save_adapter(folders.root / "on quantized", "policy_lora", base=base) if is_adapter else base
    with pytest.raises(ValueError, match="'helpful' must not be quantized"):
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
