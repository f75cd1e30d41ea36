# SPDX-License-Identifier: Apache-2.0

"""Greedy tokens and log-probabilities of the engine, against a loop with transformers that is written out here."""

import random

import pytest
import torch
from conftest import ENGINE, start, stop
from tiny_models import NUM_TOKENS, save_config
from transformers import AutoModelForCausalLM, MambaConfig
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from trl_tfpo_vllm import guided_config
from trl_tfpo_vllm.model import GuidedForCausalLM


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
    size = min(models[name].config.vocab_size for name in exponents)
    total = 0
    for name, exponent in exponents.items():
        total = total + exponent * models[name](torch.tensor([ids])).logits[0].log_softmax(-1)[:, :size]
    return total.log_softmax(-1)


def greedy(models, prompt, exponents, num_new=NUM_NEW):
    """The tokens that a plain loop finds."""
    ids = list(prompt)
    for _ in range(num_new):
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


def test_requests_that_arrive_at_any_time(engine, models):
    """Rows of a batch change their place as requests come and go; a slot is used again by another request."""
    order = [5, 2, 7, 0, 3, 6, 1, 4, 5, 2]
    waiting = [(f"{place}", index) for place, index in enumerate(order)]
    found, step = {}, 0
    while waiting or engine.llm_engine.has_unfinished_requests():
        if waiting and step % 3 == 0:
            name, index = waiting.pop(0)
            length = NUM_NEW if index % 2 else NUM_NEW // 2
            settings = params(WEIGHTS[-1 - index], max_tokens=length)
            engine.llm_engine.add_request(name, prompts_of([PROMPTS[index]])[0], settings)
        for output in engine.llm_engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    for place, index in enumerate(order):
        expected = greedy(models, PROMPTS[index], exponents_of(WEIGHTS[-1 - index]))
        assert found[f"{place}"] == expected[: NUM_NEW if index % 2 else NUM_NEW // 2]


def test_requests_share_the_cache_of_a_prompt(engine, models):
    """Keys and values do not depend on weights. A prompt that was read with other weights is not read again."""
    prompts = [PROMPTS[-1]] * len(WEIGHTS)
    outputs = engine.generate(prompts_of(prompts), [params(weights) for weights in WEIGHTS], use_tqdm=False)
    assert outputs[-1].num_cached_tokens >= ENGINE["block_size"]
    assert tokens_of(outputs) == [greedy(models, PROMPTS[-1], exponents_of(weights)) for weights in WEIGHTS]


def test_log_probabilities_are_those_of_the_guided_policy(engine, models):
    """Of new tokens and of the prompt. A client that scores texts must not get the patient's numbers."""
    settings = [params(weights, logprobs=5, prompt_logprobs=0, max_tokens=4) for weights in WEIGHTS]
    outputs = engine.generate(prompts_of(PROMPTS), settings, use_tqdm=False)
    for output, prompt, weights in zip(outputs, PROMPTS, WEIGHTS, strict=True):
        new = list(output.outputs[0].token_ids)
        logps = logps_after(models, [*prompt, *new], exponents_of(weights))
        found = [x[token].logprob for x, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        found += [x[token].logprob for x, token in zip(output.outputs[0].logprobs, new, strict=True)]
        expected = logps[:-1].gather(1, torch.tensor([*prompt[1:], *new])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", [{"alpha": 0.0, "beta_helpful": 1.0}, {"alpha": -0.5, "beta_helpful": 1.0}])
def test_a_forbidden_token_stays_forbidden(engine, weights):
    """An exponent of zero or less must not bring back what a mask has ruled out."""
    allowed = [7, 8, 9]
    settings = params(weights, allowed_token_ids=allowed)
    (tokens,) = tokens_of(engine.generate(prompts_of(PROMPTS[2:3]), settings, use_tqdm=False))
    assert set(tokens) <= set(allowed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"beta_harmless": 0.5}, r"must be among \['beta_helpful'\]"),
        ({"beta": 0.5}, r"must be among \['beta_helpful'\]"),
        ({"beta_helpful": "0.5"}, "`beta_helpful` must be a number from -10 to 10"),
        ({"beta_helpful": 1.2}, "must not exceed 1 in sum"),
        ({"alpha": float("nan")}, "`alpha` must be a number"),
    ],
)
def test_unusable_weights_end_the_request_and_not_the_engine(engine, models, weights, message):
    """The exception must be raised when a request arrives; in a worker it would end all requests."""
    with pytest.raises(VLLMValidationError, match=message):
        engine.generate(prompts_of(PROMPTS[:1]), params(weights), use_tqdm=False)
    assert not engine.llm_engine.has_unfinished_requests()
    outputs = engine.generate(prompts_of(PROMPTS[:1]), params({}), use_tqdm=False)
    assert tokens_of(outputs) == [greedy(models, PROMPTS[0], exponents_of({}))]


def test_samples_follow_the_guided_policy(engine, models):
    """Chi-square of the first token of 400 samples, over the likeliest tokens and the rest."""
    weights = {"alpha": 0.6, "beta_helpful": 0.3}
    settings = SamplingParams(temperature=1, max_tokens=1, n=400, seed=3, extra_args=weights)
    (output,) = engine.generate(prompts_of(PROMPTS[:1]), settings, use_tqdm=False)
    tokens = torch.tensor([choice.token_ids[0] for choice in output.outputs])
    counts = tokens.bincount(minlength=64).double()
    probs = logps_after(models, PROMPTS[0], {"patient": 0.6, "helpful": 0.3})[-1].exp().double()
    top = probs.topk(6).indices
    counts = torch.cat([counts[top], counts.sum()[None] - counts[top].sum()])
    probs = torch.cat([probs[top], 1 - probs[top].sum()[None]])
    expected = probs * 400
    assert expected.min() > 4
    assert ((counts - expected).square() / expected).sum() < 22.5  # 0.999 of chi-square with 6 degrees of freedom


def test_speculation_with_a_draft_model(folders, models):
    """The patient drafts. Rows of drafts must have the weights of their request."""
    config = guided_config(folders.patient, {"helpful": folders.helpful})
    draft = {"method": "draft_model", "model": folders.patient, "num_speculative_tokens": 2}
    engine = start(**config, speculative_config=draft)
    outputs = engine.generate(prompts_of(PROMPTS), [params(weights) for weights in WEIGHTS], use_tqdm=False)
    stop(engine)
    expected = [
        greedy(models, prompt, exponents_of(weights)) for prompt, weights in zip(PROMPTS, WEIGHTS, strict=True)
    ]
    assert tokens_of(outputs) == expected


def test_tensor_parallelism(folders, models):
    """Two ranks; the doctor is sharded as the patient is."""
    engine = start(**guided_config(folders.patient, {"harmless": folders.harmless}), tensor_parallel_size=2)
    weights = [{name.replace("helpful", "harmless"): value for name, value in given.items()} for given in WEIGHTS]
    outputs = engine.generate(prompts_of(PROMPTS), [params(given) for given in weights], use_tqdm=False)
    stop(engine)
    for tokens, prompt, given in zip(tokens_of(outputs), PROMPTS, WEIGHTS, strict=True):
        alpha, beta = exponents_of(given).values()
        assert tokens == greedy(models, prompt, {"patient": alpha, "harmless": beta})


def test_an_engine_without_the_check_of_requests_does_not_start(folders, monkeypatch):
    """A version of vLLM that no longer calls the hook would let unusable weights end the engine."""
    monkeypatch.delitem(MODELS_CONFIG_MAP, "GuidedForCausalLM")
    with pytest.raises(ValueError, match="Requests must be checked when they arrive"):
        start(**guided_config(folders.patient, {"helpful": folders.helpful}))


def test_a_load_format_that_reads_the_patient_only(engine):
    """Doctors would keep the values that happened to be in memory."""
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    with pytest.raises(ValueError, match=r"weights of all models must be read. Got none of \['.*', '.*'\]"):
        model.load_weights(iter(()))


def test_a_model_with_another_state(folders):
    """Guidance by a model whose state vLLM would not page with the patient's."""
    config = MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, architectures=["MambaForCausalLM"])
    doctor = save_config(folders.root / "mamba", config)
    with pytest.raises(ValueError, match="attention alone. Got a MambaForCausalLM in '.*mamba'"):
        start(**guided_config(folders.patient, {"helpful": doctor}))


def test_a_forward_pass_without_weights_is_an_error():
    """A runner that does not hand over the weights must not serve unguided answers."""
    ids = torch.tensor([3])
    with pytest.raises(ValueError, match="needs token ids and the weights of requests"):
        GuidedForCausalLM.forward(None, ids, ids)
