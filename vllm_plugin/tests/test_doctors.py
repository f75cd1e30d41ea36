# SPDX-License-Identifier: Apache-2.0

"""LoRA doctors and references in the engine, against numbers of the main package, and preemption with two doctors."""

import json
from pathlib import Path

import pytest
import torch
from conftest import start, stop
from test_engine import PROMPTS, greedy, params, prompts_of, tokens_of
from transformers import AutoModelForCausalLM

from trl_tfpo_vllm import guided_config


TEXTS = json.loads((Path(__file__).parent / "guided_texts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["adapters", "references"])
def test_texts_of_the_main_package(folders, name):
    """Greedy tokens, and log-probabilities of prompt and tokens, are stored: see `make_fixture.py`."""
    texts = [text for text in TEXTS if text["engine"] == name]
    doctors = {doctor: getattr(folders, doctor) for doctor in texts[0]["doctors"]}
    references = {doctor: getattr(folders, reference) for doctor, reference in texts[0]["references"].items()}
    engine = start(**guided_config(folders.patient, doctors, reference=references))
    settings = [params(text["weights"], logprobs=0, prompt_logprobs=0) for text in texts]
    outputs = engine.generate(prompts_of(text["prompt"] for text in texts), settings, use_tqdm=False)
    check_sharing(engine.llm_engine.model_executor.driver_worker.worker.model_runner.model)
    stop(engine)
    assert tokens_of(outputs) == [text["tokens"] for text in texts]
    for output, text in zip(outputs, texts, strict=True):
        found = [x[token].logprob for x, token in zip(output.prompt_logprobs[1:], text["prompt"][1:], strict=True)]
        found += [x[token].logprob for x, token in zip(output.outputs[0].logprobs, text["tokens"], strict=True)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(text["logps"]), atol=1e-4, rtol=0)


def check_sharing(model):
    """The first doctor is a LoRA on the patient. What it does not change is held once."""
    layer, other = (x.model.layers[0] for x in (model.patient, model.factor0))
    assert model.factor0.model.embed_tokens is model.patient.model.embed_tokens
    assert model.factor0.lm_head is not model.patient.lm_head
    assert other.mlp.gate_up_proj is layer.mlp.gate_up_proj and other.self_attn.o_proj is layer.self_attn.o_proj
    assert other.mlp.down_proj is not layer.mlp.down_proj and other.self_attn.attn is not layer.self_attn.attn


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_preempted_requests_keep_their_weights(folders, has_prefix_cache):
    """
    A preempted request comes back as a new one, and in another slot. Of two doctors one has a smaller vocabulary. The
    cache is too small for all requests.
    """
    models = {
        name: AutoModelForCausalLM.from_pretrained(getattr(folders, name)).eval()
        for name in ("patient", "helpful", "harmless")
    }
    doctors = {"helpful": folders.helpful, "harmless": folders.harmless}
    config = guided_config(folders.patient, doctors, beta={"harmless": 0.3})
    engine = start(**config, num_gpu_blocks_override=9, enable_prefix_caching=has_prefix_cache)
    weights = [
        {},
        {"beta_harmless": 0.0, "beta_helpful": 0.0},
        {"beta_harmless": 0.6},
        {"alpha": 1.0, "beta_helpful": 1.0, "beta_harmless": -0.5},
        {"alpha": 1.0, "beta_helpful": -0.4, "beta_harmless": 0.8},
        {"alpha": 0.0, "beta_helpful": 1.0, "beta_harmless": 1.0},
        {"alpha": 1.0, "beta_helpful": 0.3, "beta_harmless": 0.0},
        {"beta_helpful": 0.5, "beta_harmless": 0.5},
    ]
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempt, num_preempted = scheduler._preempt_request, []
    scheduler._preempt_request = lambda *args, **kwargs: [num_preempted.append(1), preempt(*args, **kwargs)][1]
    prompts = [prompt[:20] for prompt in PROMPTS]
    outputs = engine.generate(prompts_of(prompts), [params(x, max_tokens=48) for x in weights], use_tqdm=False)
    del scheduler._preempt_request
    stop(engine)
    for prompt, given, tokens in zip(prompts, weights, tokens_of(outputs), strict=True):
        helpful, harmless = given.get("beta_helpful", 0.25), given.get("beta_harmless", 0.3)
        alpha = given.get("alpha", 1 - helpful - harmless)
        exponents = {"patient": alpha, "helpful": helpful, "harmless": harmless}
        assert tokens == greedy(models, prompt, exponents, num_new=48)
    assert num_preempted
