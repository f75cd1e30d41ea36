# SPDX-License-Identifier: Apache-2.0

"""Measures of guided decoding, against enumeration of all texts of a tiny language and numbers worked by hand."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_tfpo.decoding.logits_processor import DoctorGuidedLogitsProcessor
from trl_tfpo.evaluation import (
    Completion,
    best_of_n,
    distinct_n,
    evaluate_guidance,
    generate_completions,
    guided_kl,
    match_kl,
    next_token_statistics,
    sampled_kl,
)


WORDS = ["<pad>", "</s>", "yes", "no"]
EOS = 1
PROMPTS = ["yes no yes", "no", "yes yes"]


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def patient():
    return llama(0)


@pytest.fixture(scope="module")
def guide():
    return DoctorGuidedLogitsProcessor(llama(1), beta=0.6)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}no{% endif %}"
    )
    return tokenizer


def logps(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def all_completions(max_length: int) -> list[list[int]]:
    """Every text up to EOS or the length limit."""
    texts = itertools.chain.from_iterable(itertools.product(range(4), repeat=n) for n in range(1, max_length + 1))
    return [list(text) for text in texts if EOS not in text[:-1] and (text[-1] == EOS or len(text) == max_length)]


def test_kl_is_that_of_the_enumerated_language(patient, guide):
    """Else two methods would be compared at distances that are not the distance."""
    prompt_ids, doctor = [2, 3], guide.doctors[0].model
    completions, log_guided, log_patient = [], [], []
    for text in all_completions(3):
        completions.append(Completion("", prompt_ids, text, "", text[-1] == EOS))
        guided_sum = patient_sum = 0.0
        for t, token in enumerate(text):
            one, other = logps(patient, prompt_ids + text[:t]), logps(doctor, prompt_ids + text[:t])
            mixed = one.exp() ** 0.4 * other.exp() ** 0.6
            guided_sum += (mixed[token] / mixed.sum()).log()
            patient_sum += one[token]
        log_guided.append(guided_sum)
        log_patient.append(patient_sum)
    log_guided, log_patient = torch.stack(log_guided), torch.stack(log_patient)
    torch.testing.assert_close(log_guided.exp().sum().item(), 1.0)  # all texts are there
    exact = (log_guided.exp() * (log_guided - log_patient)).sum()
    for batch_size in (1, 7):
        kls = guided_kl(patient, guide, completions, batch_size=batch_size)
        assert kls.shape == (len(completions),) and (kls >= 0).all()
        torch.testing.assert_close((log_guided.exp() * kls).sum(), exact)


def test_kl_of_samples_estimates_it(patient, tokenizer, guide):
    """Else the samples would be of another policy than the one whose distance is measured."""
    text = PROMPTS[0]
    estimate = evaluate_guidance(
        patient,
        tokenizer,
        [text],
        lambda prompts, completions: [0.0] * len(completions),
        guide=guide,
        num_samples_per_prompt=600,
        max_new_tokens=3,
        batch_size=200,
    )
    ids, doctor, exact = tokenizer(text)["input_ids"], guide.doctors[0].model, 0.0
    for completion in all_completions(3):
        guided_sum = patient_sum = 0.0
        for t, token in enumerate(completion):
            one, other = logps(patient, ids + completion[:t]), logps(doctor, ids + completion[:t])
            guided_sum += (0.4 * one + 0.6 * other).log_softmax(-1)[token]
            patient_sum += one[token]
        exact += (guided_sum.exp() * (guided_sum - patient_sum)).item()
    assert abs(estimate["kl"] - exact) < 4 * estimate["kl_se"]
    assert estimate["kl_se"] < 0.1 * exact  # or the test shows nothing


def test_kl_of_another_model_is_that_of_the_enumerated_language(patient):
    """Else a fine-tuned patient would be put at a wrong distance, next to guidance at the right one."""
    tuned, prompt_ids = llama(5), [2, 3]
    completions, log_tuned, log_patient, entropies = [], [], [], []
    for text in all_completions(3):
        completions.append(Completion("", prompt_ids, text, "", text[-1] == EOS))
        steps = [[logps(model, prompt_ids + text[:t]) for t in range(len(text))] for model in (tuned, patient)]
        sums = [torch.stack([step[token] for step, token in zip(of, text, strict=True)]) for of in steps]
        log_tuned.append(sums[0])
        log_patient.append(sums[1])
        entropies.append(torch.stack([-(step.exp() * step).sum() for step in steps[0]]).mean())
    probs = torch.stack([row.sum() for row in log_tuned]).exp()
    single = sampled_kl(log_tuned, log_patient)
    exact = (probs * single).sum()
    found = next_token_statistics(patient, tuned, completions, batch_size=7)
    torch.testing.assert_close((probs * found["kl"]).sum(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["entropy"], torch.stack(entropies), rtol=1e-5, atol=1e-6)
    assert (single < 0).any() and (found["kl"] >= 0).all()
    alone = next_token_statistics(patient, None, completions)
    assert alone["kl"].abs().max() == 0 and alone["entropy"].min() > 0
    with pytest.raises(ValueError, match="the same token ids with both"):
        sampled_kl(log_tuned, log_patient[:-1])


def test_adapters_on_the_patient_are_off_when_it_is_read(patient):
    """Else a patient fine-tuned by LoRA would be compared with itself, at no distance."""
    tuned = get_peft_model(llama(0), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).double().eval()
    completions = [Completion("", [2, 3], [3, 2, EOS], "", True)]
    apart = next_token_statistics(patient, tuned, completions)
    shared = next_token_statistics(tuned.get_base_model(), tuned, completions)
    assert apart["kl"].item() > 1e-4
    for name in ("kl", "entropy"):
        torch.testing.assert_close(shared[name], apart[name])


def test_prompts_of_different_lengths_do_not_see_each_others_padding(patient, tokenizer, guide):
    """Else the distance of a short prompt would depend on its neighbours in the batch."""
    completions = generate_completions(patient, tokenizer, PROMPTS, guide=guide, max_new_tokens=6, batch_size=3)
    together = guided_kl(patient, guide, completions, batch_size=3)
    alone = torch.cat([guided_kl(patient, guide, [completion]) for completion in completions])
    torch.testing.assert_close(together, alone)
    greedy = dict(guide=guide, max_new_tokens=6, temperature=0.0)
    together = generate_completions(patient, tokenizer, PROMPTS, batch_size=3, **greedy)
    assert together == generate_completions(patient, tokenizer, PROMPTS, batch_size=1, **greedy)


def test_completions_end_at_their_eos(patient, tokenizer, guide):
    """Else padding would count as text, in length, reward and distance."""
    completions = generate_completions(
        patient, tokenizer, PROMPTS, guide=guide, num_samples_per_prompt=20, max_new_tokens=5, batch_size=60
    )
    assert [c.prompt for c in completions] == [prompt for prompt in PROMPTS for _ in range(20)]
    assert {c.is_complete for c in completions} == {True, False}
    for c in completions:
        assert c.prompt_ids == tokenizer(c.prompt)["input_ids"]
        assert c.is_complete == (c.completion_ids[-1] == EOS)
        assert EOS not in c.completion_ids[:-1]
        assert c.is_complete or len(c.completion_ids) == 5
        assert c.text == tokenizer.decode(c.completion_ids, skip_special_tokens=True)


def test_conversations_go_through_the_chat_template(patient, tokenizer):
    """Else a chat model would be evaluated without the words that make it answer."""
    prompts = [[{"role": "user", "content": "yes yes"}], [{"role": "assistant", "content": "yes"}]]
    user, prefilled = generate_completions(patient, tokenizer, prompts, max_new_tokens=2)
    assert user.prompt_ids == [2, 2, 3]
    assert prefilled.prompt_ids == [2]  # an answer that was begun is continued


def test_samples_are_of_the_policy_itself(tokenizer):
    """Else a top-k or a repetition penalty saved with the patient would bias every estimate unseen."""
    patient = llama(0)
    kwargs = dict(num_samples_per_prompt=5, max_new_tokens=5, seed=3)
    plain = generate_completions(patient, tokenizer, PROMPTS, **kwargs)
    patient.generation_config = GenerationConfig(
        top_k=1, top_p=0.1, temperature=0.2, repetition_penalty=3.0, eos_token_id=EOS, do_sample=True
    )
    assert generate_completions(patient, tokenizer, PROMPTS, **kwargs) == plain
    assert generate_completions(patient, tokenizer, PROMPTS, top_k=1, **kwargs) != plain


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.9},
        {"suppress_tokens": [2]},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 5},
        {"num_beams": 3},
        {"typical_p": 0.2},
        {"sequence_bias": [[[3], 9.0]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_patient_says_of_generation_does_not_apply(tokenizer, settings):
    """Sampling ignores the generation config of a model: samples are of the policy that is measured."""
    plain = llama(0)
    kwargs = dict(num_samples_per_prompt=5, max_new_tokens=5, seed=3)
    expected = generate_completions(plain, tokenizer, PROMPTS, **kwargs)
    config = GenerationConfig(eos_token_id=EOS, **settings)
    plain.generation_config = config
    assert generate_completions(plain, tokenizer, PROMPTS, **kwargs) == expected
    assert plain.generation_config is config  # and is left as it was
    with_adapter = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))  # which does nothing yet
    assert generate_completions(with_adapter.double().eval(), tokenizer, PROMPTS, **kwargs) == expected


ALTERING = [
    {"top_k": 1},
    {"top_p": 0.5},
    {"do_sample": False},
    {"temperature": 0.0},
    {"temperature": 1.5},
    {"repetition_penalty": 1.2},
    {"num_beams": 2},
    {"min_p": 0.1},
    {"suppress_tokens": [2]},
    {"eos_token_id": 2},
    {"generation_config": GenerationConfig(top_k=1)},
    {"logits_processor": []},
    {"a_setting_of_the_future": True},
]


@pytest.mark.parametrize("settings", ALTERING, ids=lambda settings: "-".join(f"{k}" for k in settings))
def test_the_kl_is_of_the_policy_that_was_sampled(patient, tokenizer, guide, settings):
    """Rewards of truncated samples beside the KL of the whole policy look like more for less."""
    call = dict(max_new_tokens=3, batch_size=3, **settings)
    with pytest.raises(ValueError, match="measured on its own samples"):
        evaluate_guidance(patient, tokenizer, PROMPTS, lambda **_: [0.0] * 3, guide=guide, **call)
    with pytest.raises(ValueError, match="measured on its own samples"):
        match_kl(patient, tokenizer, PROMPTS, lambda beta: guide, 0.1, **call)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 0.0}, {"num_beams": 2}])
def test_completions_know_of_which_policy_they_are(patient, tokenizer, guide, settings):
    """They are often measured later, by somebody who did not sample them."""
    altered = generate_completions(patient, tokenizer, PROMPTS, guide=guide, max_new_tokens=3, **settings)
    for policy in (guide, None):
        with pytest.raises(ValueError, match="measured on its own samples"):
            next_token_statistics(patient, policy, altered)


def test_settings_that_change_nothing_are_taken(patient, tokenizer, guide):
    """A rule that is too strict would make people copy settings out of their calls."""
    neutral = dict(top_k=0, top_p=1.0, repetition_penalty=1.0, do_sample=True, num_beams=1, use_cache=True, min_p=0.0)
    neutral |= dict(num_return_sequences=1, no_repeat_ngram_size=0, cache_implementation="dynamic", typical_p=None)
    call = dict(guide=guide, max_new_tokens=3, temperature=1)
    found = evaluate_guidance(patient, tokenizer, PROMPTS, lambda **_: [0.0] * 3, **call, **neutral)
    plain = evaluate_guidance(patient, tokenizer, PROMPTS, lambda **_: [0.0] * 3, guide=guide, max_new_tokens=3)
    assert found["completions"] == plain["completions"] and found["kls"] == plain["kls"]


def test_the_seed_decides_and_the_callers_random_state_is_left_alone(patient, tokenizer):
    """Else evaluating during a run would change the run."""
    kwargs = dict(num_samples_per_prompt=10, max_new_tokens=5)
    torch.manual_seed(5)
    first = generate_completions(patient, tokenizer, PROMPTS, seed=1, **kwargs)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert generate_completions(patient, tokenizer, PROMPTS, seed=1, **kwargs) == first
    assert generate_completions(patient, tokenizer, PROMPTS, seed=2, **kwargs) != first


def test_evaluation_by_hand(patient, tokenizer, guide):
    """Else a table of results would average something else than it says."""
    seen = {}

    def reward_fn(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [float(text.split().count("yes")) for text in completions]

    kwargs = dict(num_samples_per_prompt=4, max_new_tokens=5, seed=2)
    result = evaluate_guidance(patient, tokenizer, PROMPTS, reward_fn, guide=guide, **kwargs)
    completions = result["completions"]
    assert completions == generate_completions(patient, tokenizer, PROMPTS, guide=guide, **kwargs)
    assert seen == {"prompts": [c.prompt for c in completions], "completions": [c.text for c in completions]}
    rewards = [c.completion_ids.count(2) for c in completions]
    assert result["rewards"] == rewards
    means = [sum(rewards[i : i + 4]) / 4 for i in (0, 4, 8)]  # prompts are the unit
    mean = sum(means) / 3
    assert result["reward"] == pytest.approx(mean)
    assert result["reward_se"] == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in means) / 2 / 3))
    assert result["kls"] == guided_kl(patient, guide, completions).tolist()
    assert result["kl"] == pytest.approx(sum(result["kls"]) / 12)
    entropies = next_token_statistics(patient, guide, completions)["entropy"]
    assert result["entropy"] == pytest.approx(entropies.mean().item())
    assert result["num_tokens"] == pytest.approx(sum(len(c.completion_ids) for c in completions) / 12)
    assert result["is_complete"] == pytest.approx(sum(c.is_complete for c in completions) / 12)
    assert result["distinct_4"] == pytest.approx(distinct_n([c.text for c in completions]), nan_ok=True)
    assert list(result) == [
        *("reward", "reward_se", "kl", "kl_se", "entropy", "distinct_4", "num_tokens", "is_complete"),
        *("completions", "rewards", "kls"),
    ]


def test_the_patient_alone_is_at_no_distance(patient, tokenizer):
    """Else the baseline would seem to pay for nothing."""
    kwargs = dict(reward_fn=lambda prompts, completions: [1.0] * len(completions), max_new_tokens=4)
    alone = evaluate_guidance(patient, tokenizer, PROMPTS, **kwargs)
    idle = DoctorGuidedLogitsProcessor(llama(1), beta=0.0)
    assert alone["kl"] == alone["kl_se"] == 0
    assert evaluate_guidance(patient, tokenizer, PROMPTS, guide=idle, **kwargs)["kl"] == pytest.approx(0, abs=1e-6)


def test_match_kl_finds_the_beta_of_a_kl(patient, tokenizer, monkeypatch):
    """Else methods would be compared at different distances from the patient."""
    doctor, evaluated = llama(1), []

    def make_guide(beta):
        evaluated.append(beta)
        return DoctorGuidedLogitsProcessor(doctor, beta=beta)

    kwargs = dict(num_samples_per_prompt=20, max_new_tokens=4, batch_size=60, seed=1)
    reward = {"reward_fn": lambda prompts, completions: [0.0] * len(completions)}
    wanted = evaluate_guidance(patient, tokenizer, PROMPTS, **reward, guide=make_guide(0.37), **kwargs)["kl"]
    evaluated.clear()
    beta = match_kl(patient, tokenizer, PROMPTS, make_guide, wanted, tolerance=0.01, **kwargs)
    found = evaluate_guidance(patient, tokenizer, PROMPTS, **reward, guide=make_guide(beta), **kwargs)["kl"]
    assert found == pytest.approx(wanted, rel=0.01)
    assert len(evaluated) <= 9

    with pytest.raises(ValueError, match="exceed the KL at `max_beta`. Got 100"):
        match_kl(patient, tokenizer, PROMPTS, make_guide, 100.0, **kwargs)
    with pytest.raises(ValueError, match="`target_kl` must be positive"):
        match_kl(patient, tokenizer, PROMPTS, make_guide, 0.0, **kwargs)
    monkeypatch.setattr("trl_tfpo.evaluation.reward_and_kl.MAX_ESTIMATES", 2)
    with pytest.raises(ValueError, match="reached in 2 estimates"):
        match_kl(patient, tokenizer, PROMPTS, make_guide, wanted / 7, tolerance=1e-9, **kwargs)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b c d e"], 4, 1.0),
        (["a a a a a a"], 4, 1 / 3),
        (["a b c d", "a b c d"], 4, 1 / 2),  # the pool counts, not each text
        (["a b", "c d"], 2, 1.0),  # b c is in no text
        ([[1, 2, 1, 2], (1, 2)], 2, 2 / 4),
        (["a  b\nc"], 1, 1.0),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    """Else a diversity would not be comparable with that of any paper."""
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_distinct_n_of_nothing():
    """Else short answers would count as perfectly uniform, or perfectly diverse."""
    assert math.isnan(distinct_n(["a b c"], 4))
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        distinct_n(["a"], 0)


def test_best_of_n_is_the_mean_over_all_choices():
    """Else the baseline to beat would be drawn from the luck of one subset."""
    rewards = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(1, 7):
        subsets = [[max(choice) for choice in itertools.combinations(row, n)] for row in rewards.tolist()]
        means = [sum(best) / len(best) for best in subsets]
        result = best_of_n(rewards, n)
        assert result["reward"] == pytest.approx(sum(means) / 3)
        assert result["reward_se"] == pytest.approx(torch.tensor(means).std().item() / math.sqrt(3))
        assert result["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
    for refused, n in ((rewards, 0), (rewards, 7), ([1.0, 2.0], 1)):
        with pytest.raises(ValueError, match="`n` must be between 1"):
            best_of_n(refused, n)


@pytest.mark.parametrize("rewards", [[1.0], [[1.0]] * 3, [1.0, float("nan"), 2.0]])
def test_there_is_a_finite_reward_for_each_completion(patient, tokenizer, rewards):
    """Else a reward function that skips empty texts would shift all others."""
    with pytest.raises(ValueError, match="a finite number for each completion"):
        evaluate_guidance(patient, tokenizer, PROMPTS, lambda prompts, completions: rewards, max_new_tokens=2)


def test_what_is_no_policy_is_refused(patient, tokenizer, guide):
    """Else dropout, a temperature or a mixed batch would be evaluated as if it were the guided policy."""
    trained = llama(2)
    trained.train()
    with pytest.raises(ValueError, match="must be in eval mode"):
        generate_completions(trained, tokenizer, PROMPTS)
    per_row = DoctorGuidedLogitsProcessor(llama(1), beta=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="one strength at a time"):
        generate_completions(patient, tokenizer, PROMPTS, guide=per_row)
    with pytest.raises(ValueError, match="one strength at a time"):
        guided_kl(patient, per_row, [])
    with pytest.raises(ValueError, match="`temperature` must be 1"):
        evaluate_guidance(patient, tokenizer, PROMPTS, lambda **_: [], guide=guide, temperature=0.7)
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_completions(patient, tokenizer, [])
