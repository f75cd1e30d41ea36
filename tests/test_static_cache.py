# SPDX-License-Identifier: Apache-2.0

"""Doctors with caches of fixed shape, and compiled steps. `test_decoding_modes.py` has all modes of `generate`."""

import pytest
import torch
from plain_guidance import BOS, batch, gpt2, llama
from transformers import CompileConfig, MistralConfig, MistralForCausalLM, StaticCache

from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate


PROMPTS = batch([BOS, 7, 3, 20, 21], [BOS, 11], [BOS, 4, 30, 8, 6, 12])
SETTINGS = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def graphs():
    """The graphs that `backend(graphs)` compiled."""
    torch._dynamo.reset()
    return []


def backend(graphs):
    """A backend that keeps the graphs, and runs them as they are. transformers copies all backends but functions."""

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return keep


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_step_is_compiled_once(make, graphs):
    """Inputs whose strides change with the length of the text would compile it again at each token."""
    patient, doctor = make(0), make(1)
    config = CompileConfig(backend=backend(graphs), mode=None, dynamic=False)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, cache_implementation="static", compile_config=config)
    found = guided_generate(patient, guide, **PROMPTS, **SETTINGS)
    num_graphs = len(graphs)
    expected = guided_generate(patient, DoctorGuidedLogitsProcessor(doctor, alpha=1.0), **PROMPTS, **SETTINGS)
    assert torch.equal(found, expected)
    assert 0 < num_graphs <= 2  # GPT-2 breaks its graph in two
    cache = guide.memories[0].cache
    other = {name: x.flip(0) for name, x in PROMPTS.items()}
    guided_generate(patient, guide, **other, **SETTINGS)
    assert len(graphs) == num_graphs and guide.memories[0].cache is cache


def test_generation_with_a_static_cache_compiles_the_doctor_too(graphs):
    """The patient decides for both. On a CPU, `generate` itself ignores a `compile_config`."""
    patient, doctor = llama(0), llama(1)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0)
    static = dict(cache_implementation="static", compile_config=CompileConfig(backend=backend(graphs), mode=None))
    found = guided_generate(patient, guide, **PROMPTS, **SETTINGS, **static)
    assert isinstance(guide.memories[0].cache, StaticCache) and len(graphs) == 1
    guided_generate(patient, guide, **PROMPTS, **SETTINGS, **static, disable_compile=True)
    assert len(graphs) == 1
    assert torch.equal(found, guided_generate(patient, guide, **PROMPTS, **SETTINGS))
    assert not isinstance(guide.memories[0].cache, StaticCache)


def test_a_text_longer_than_the_cache_doubles_it():
    """Else the last tokens would be written beyond the end, or over others."""
    patient, doctor = llama(0), llama(1)
    prompt = dict(input_ids=torch.arange(250)[None] % 29 + 3)
    static = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, cache_implementation="static")
    found = guided_generate(patient, static, **prompt, **SETTINGS | dict(max_new_tokens=12))
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0)
    assert torch.equal(found, guided_generate(patient, guide, **prompt, **SETTINGS | dict(max_new_tokens=12)))
    assert static.memories[0].cache.get_max_length() == 512


def test_models_with_a_window_keep_their_growing_cache():
    """A static cache of keys and values would ignore the window."""
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = MistralConfig(vocab_size=37, sliding_window=4, num_key_value_heads=2, pad_token_id=0, **shape)
    doctor = MistralForCausalLM(config).double().eval()
    with pytest.warns(UserWarning, match="MistralForCausalLM uses a growing cache and is not compiled"):
        guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, cache_implementation="static")
    assert not guide.memories[0].is_static


def test_other_implementations_are_refused():
    with pytest.raises(ValueError, match="must be 'static' or None. Got 'quantized'"):
        DoctorGuidedLogitsProcessor(llama(0), cache_implementation="quantized")
