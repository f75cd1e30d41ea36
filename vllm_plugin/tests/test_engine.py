# SPDX-License-Identifier: Apache-2.0

"""Greedy tokens and log-probabilities of the engine, against a loop with transformers that is written out here."""

import json
import random

import pytest
import torch
from conftest import NUM_TOKENS, start, stop
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from trl_tfpo_vllm import guided_config


NUM_NEW = 16
LENGTHS = [1, 3, 7, 12, 20, 33, 41, 50]
PROMPTS = [[random.Random(length).randrange(3, NUM_TOKENS) for _ in range(length)] for length in LENGTHS]
WEIGHTS = [  # of patient and first doctor
    {},
    {"alpha": 1.0, "beta_helpful": 0.0},
    {"beta_helpful": 0.25},
    {"beta_helpful": 1.0},
    {"alpha": 1.0, "beta_helpful": 1.5},
    {"alpha": 1.0, "beta_helpful": -0.5},
    {"alpha": 0.0, "beta_helpful": 1.0},
    {"alpha": 1.3, "beta_helpful": 0.7},
]


@pytest.fixture(scope="module")
def models(folders):
    """The models of the loop, by name."""
    names = ("patient", "helpful", "harmless")
    return {name: AutoModelForCausalLM.from_pretrained(getattr(folders, name)).eval() for name in names}


@pytest.fixture(scope="module")
def engine(folders):
    """An engine with one doctor. `beta` is 0.5 by default, as it is a language model."""
    engine = start(**guided_config(folders.patient, {"helpful": folders.helpful}))
    yield engine
    stop(engine)


@torch.no_grad()
def logps_after(models, ids, exponents):
    """Log-probabilities (L, V) of the guided policy at each of the ids."""
    size = min(model.config.vocab_size for model in models.values())
    total = 0
    for name, exponent in exponents.items():
        total = total + exponent * models[name](torch.tensor([ids])).logits[0].log_softmax(-1)[:, :size]
    return total.log_softmax(-1)


def greedy(models, prompt, exponents):
    """The tokens that a plain loop finds."""
    ids = list(prompt)
    for _ in range(NUM_NEW):
        ids.append(int(logps_after(models, ids, exponents)[-1].argmax()))
    return ids[len(prompt) :]


def exponents_of(weights):
    """Exponents that weights of a request mean, for the engine with one doctor."""
    beta = weights.get("beta_helpful", 0.5)
    return {"patient": weights.get("alpha", 1 - beta), "helpful": beta}


def params(weights, **settings):
    """Greedy search."""
    settings = dict(temperature=0, max_tokens=NUM_NEW, ignore_eos=True) | settings
    return SamplingParams(extra_args=weights, **settings)


def tokens_of(outputs):
    """Token ids of outputs."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompts_of(ids):
    """Prompts as vLLM takes them."""
    return [{"prompt_token_ids": prompt} for prompt in ids]


def test_all_at_once_and_prompts_in_chunks(engine, models):
    """Each request must be guided by its own weights, in whatever row or chunk its tokens are."""
    outputs = engine.generate(prompts_of(PROMPTS), [params(weights) for weights in WEIGHTS], use_tqdm=False)
    expected = [
        greedy(models, prompt, exponents_of(weights)) for prompt, weights in zip(PROMPTS, WEIGHTS, strict=True)
    ]
    assert tokens_of(outputs) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
