# SPDX-License-Identifier: Apache-2.0

"""
Drafting by the doctors changes how long decoding takes, and not what comes out.

Greedy search is compared token by token; sampling by a chi-square test over all texts of a vocabulary small enough to
enumerate, against their probabilities under guidance from scratch.
"""

import itertools

import pytest
import torch
from plain_guidance import ONE, PAD, PADDED, PlainGuidance, generate, gpt2, llama, mistral
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate, speculative_guided_generate
from trl_tfpo.decoding import speculative
from trl_tfpo.decoding.doctors import Doctor, DoctorMemory


GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=PAD)


@pytest.fixture(scope="module")
def patient():
    return llama(0)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3, 8, "auto"])
@pytest.mark.parametrize(
    "doctors, weights",
    [
        ([llama(1)], dict(alpha=1.0, beta=0.8)),
        ([llama(1)], dict(beta=0.9)),
        ([gpt2(1)], dict(beta=0.95)),
        ([mistral(1)], dict(beta=0.9)),
        ([llama(1), gpt2(2)], dict(alpha=1.0, beta=[2.0, -0.5])),
        ([llama(1)], dict(beta=2.0, reference=llama(3))),
        ([llama(1)], dict(beta=0.9, min_patient_prob=0.05, min_patient_entropy=1.5)),
        ([llama(1)], dict(beta=lambda step: min(0.9, 0.1 * step))),
    ],
)
def test_greedy_search_gives_the_tokens_of_plain_guided_decoding(patient, doctors, weights, num_draft_tokens):
    """Else the faster way would be another policy."""
    guide = DoctorGuidedLogitsProcessor(doctors, **weights)
    expected = guided_generate(patient, guide, **ONE, **GREEDY)
    guide.reset()
    counts = {}
    found = guided_generate(
        patient, guide, **ONE, **GREEDY, speculative=True, num_draft_tokens=num_draft_tokens, statistics=counts
    )
    assert torch.equal(found, expected)
    assert counts["num_tokens"] == 40
    if num_draft_tokens == 3:
        assert counts["num_accepted"] > 0  # or the test shows nothing
        assert counts["num_patient_forwards"] == 40 - counts["num_accepted"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, mistral])
@pytest.mark.parametrize(
    "extra",
    [
        dict(),
        dict(repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=5),
        dict(eos_token_id=list(range(16, 20))),
        dict(max_new_tokens=1),
        dict(max_new_tokens=2),
    ],
)
def test_other_patients_and_processors(make, extra):
    """Absolute positions, a windowed cache that is cropped, processors before and after the guide, early ends."""
    patient, settings = make(0), GREEDY | extra
    for inputs in (ONE, {name: tensor[1:2] for name, tensor in PADDED.items()}):  # one row may be padded too
        guide = DoctorGuidedLogitsProcessor(llama(1), beta=0.9)
        expected = guided_generate(patient, guide, **inputs, **settings)
        assert torch.equal(guided_generate(patient, guide, **inputs, **settings, speculative=True), expected)
        found = patient.generate(
            **inputs, **settings, logits_processor=[guide], custom_generate=speculative_guided_generate
        )
        assert torch.equal(found, expected)


def test_the_patient_is_asked_less_often_and_every_token_once(patient):
    """Else nothing would be gained."""
    reads = {"patient": [], "doctor": []}
    patient, doctor = llama(0), llama(1)
    guided_generate(patient, DoctorGuidedLogitsProcessor(doctor), **ONE, **GREEDY, speculative=True)
    assert not any(DoctorMemory(Doctor(doctor)).faults().values())  # both are tried out once, which is not counted
    for name, model in (("patient", patient), ("doctor", doctor)):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, reads=reads[name]: reads.append(kwargs["input_ids"].size(1)), with_kwargs=True
        )
    counts, guide = {}, DoctorGuidedLogitsProcessor(doctor, beta=0.98)
    guided_generate(patient, guide, **ONE, **GREEDY, speculative=True, num_draft_tokens=4, statistics=counts)
    prompt = ONE["input_ids"].size(1)
    assert len(reads["patient"]) == counts["num_patient_forwards"] < 20
    assert sum(reads["patient"]) == prompt + counts["num_drafted"] + counts["num_patient_forwards"] - 1
    assert reads["doctor"] == [prompt] + [1] * (len(reads["doctor"]) - 1)  # also after drafts that were taken back
    assert len(reads["doctor"]) <= counts["num_drafted"] + counts["num_patient_forwards"]


# Sampling, by a chi-square test. 4 tokens, 3 steps, 64 texts.

SMALL = dict(vocab_size=4, peak=12.0, num_hidden_layers=1, pad_token_id=None, bos_token_id=None, eos_token_id=None)
SMALL_PATIENT, SMALL_DOCTORS = llama(10, **SMALL).float(), [llama(11, **SMALL).float(), llama(12, **SMALL).float()]
NUM_STEPS, NUM_TEXTS = 3, 75  # for each seed
POLICIES = {
    "one doctor": dict(doctors=SMALL_DOCTORS[:1], alpha=1.0, betas=[1.0]),
    "two doctors, temperature, top-p": dict(
        doctors=SMALL_DOCTORS, alpha=1.0, betas=[1.0, -0.4], warpers=dict(temperature=0.7, top_p=0.9)
    ),
    "entropy gate": dict(doctors=SMALL_DOCTORS[:1], alpha=0.4, betas=[0.6], options=dict(min_patient_entropy=1.0)),
}


def warpers_of(temperature: float = 1.0, top_p: float = 1.0) -> LogitsProcessorList:
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])


def exact_distribution(doctors, alpha, betas, warpers=None, options=None) -> dict[tuple[int, ...], float]:
    """Probability of every text of three tokens after the prompt, from scratch."""
    warp = warpers_of(**(warpers or {}))
    plain = PlainGuidance([doctor.double() for doctor in doctors], betas, alpha, torch.ones(1, 1, dtype=torch.long))
    exact = {}
    for text in itertools.product(range(4), repeat=NUM_STEPS):
        probability = 1.0
        for step, token in enumerate(text):
            ids = torch.tensor([[0, *text[:step]]])
            with torch.no_grad():
                logits = SMALL_PATIENT(ids).logits[:, -1].double()
            guided = plain(ids, logits)
            probs = logits.softmax(-1)
            if options and -(probs * probs.log()).sum() < options["min_patient_entropy"]:
                guided = logits.log_softmax(-1)
            probability *= warp(ids, guided).softmax(-1)[0, token].item()
        exact[text] = probability
    for doctor in doctors:
        doctor.float()
    return exact


def chi_square_p_value(policy: str, num_draft_tokens, num_seeds: int = 8) -> float:
    """Of the texts of all seeds against the exact distribution; rare texts count as one."""
    spec = POLICIES[policy]
    exact = exact_distribution(**spec)
    guide = DoctorGuidedLogitsProcessor(
        spec["doctors"], alpha=spec["alpha"], beta=spec["betas"], **spec.get("options", {})
    )
    prompt = torch.tensor([[0]])
    guide.reset(attention_mask=torch.ones_like(prompt))
    observed = dict.fromkeys(exact, 0)
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        for _ in range(NUM_TEXTS):
            ids = speculative_guided_generate(  # as `generate` calls it; its preparations take longer than this
                SMALL_PATIENT,
                prompt,
                logits_processor=LogitsProcessorList([guide, *warpers_of(**spec.get("warpers", {}))]),
                stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(1 + NUM_STEPS)]),
                generation_config=GenerationConfig(do_sample=True, num_beams=1, max_length=1 + NUM_STEPS),
                num_draft_tokens=num_draft_tokens,
                past_key_values=DynamicCache(),
            )
            observed[tuple(ids[0, 1:].tolist())] += 1
    total = num_seeds * NUM_TEXTS
    assert all(observed[text] == 0 for text in exact if exact[text] == 0)
    common = [text for text in exact if exact[text] * total >= 5]
    cells = [(observed[text], exact[text] * total) for text in common]
    rest = (total - sum(o for o, _ in cells), total - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy, num_draft_tokens",
    [
        ("one doctor", 2),
        ("one doctor", "auto"),
        ("two doctors, temperature, top-p", 2),
        ("entropy gate", 1),
    ],
)
def test_samples_follow_the_guided_distribution(policy, num_draft_tokens):
    """Else speculation would trade quality for speed without a word."""
    assert chi_square_p_value(policy, num_draft_tokens=num_draft_tokens) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["accept everything", "forget to subtract the draft"])
def test_the_chi_square_test_sees_a_wrong_rule_of_acceptance(monkeypatch, rule):
    """Else the test above could not fail."""

    def verify(target, draft, token):
        if rule == "accept everything":
            return token, True
        accepted = torch.rand(()) * draft[0, token] <= target[0, token]
        return (token, True) if accepted else (speculative._Sampling.token(target), False)

    monkeypatch.setattr(speculative._Sampling, "verify", verify)
    assert chi_square_p_value("one doctor", num_draft_tokens=2) < 1e-6


# The pace


def test_the_pace_follows_the_acceptance():
    """Else a doctor that disagrees would make decoding slower than without drafts."""
    length = speculative._DraftLength(draft_cost=0.1, verify_cost=0.1)
    first = length.num_tokens()
    for _ in range(100):
        length.observe(0.98)
    assert length.num_tokens() == speculative.MAX_DRAFT_TOKENS > first > 0
    for _ in range(100):
        length.observe(0.02)
    assert length.num_tokens() == 0
    for _ in range(100):
        length.observe(0.9)  # seen on plain steps, it drafts again
    assert length.num_tokens() > 0


# What comes with it


def test_streams_scores_and_stops_like_generate(patient, capsys):
    """Else a chat would show nothing until the end, and a stop word would be overrun by a draft."""

    class Ids:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    class StopAtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.size(1) >= 13])

    guide = DoctorGuidedLogitsProcessor(llama(1), beta=0.95)
    settings = GREEDY | dict(stopping_criteria=[StopAtLength()], return_dict_in_generate=True)
    settings |= dict(output_scores=True, output_logits=True)
    expected = guided_generate(patient, guide, **ONE, **settings)
    found = guided_generate(patient, guide, **ONE, **settings, speculative=True, streamer=TextStreamer(Ids()))
    assert torch.equal(found.sequences, expected.sequences) and found.sequences.size(1) == 13
    torch.testing.assert_close(torch.cat(found.scores), torch.cat(expected.scores))
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits))
    assert capsys.readouterr().out.split() == list(map(str, found.sequences[0].tolist()))
    assert found.past_key_values.get_seq_length() == 12


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(**PADDED), "Got 3 rows and 1 beams"),
        (dict(**ONE, num_beams=2), "Got 1 rows and 2 beams|Got 2 rows"),
        (dict(**ONE, do_sample=True, num_return_sequences=2), "Got 2 rows"),
        (dict(**ONE, cache_implementation="static"), "Got a cache of type StaticCache"),
        (dict(**ONE, use_cache=False), "use_cache=False"),
        (dict(**ONE, output_hidden_states=True), "the inputs \\['output_hidden_states'\\]"),
        (dict(**ONE, guidance_scale=2.0), "Got UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        (dict(**ONE, prompt_lookup_num_tokens=2), "Got `prompt_lookup_num_tokens`, another way to draft"),
        (dict(**ONE, assistant_model=llama(9)), "Got `assistant_model`, another way to draft"),
        (dict(**ONE, num_draft_tokens=-1), "Got -1; try 4"),
        (dict(**ONE, num_draft_tokens="many"), "Got 'many'; try 4"),
    ],
)
def test_what_cannot_be_right_is_refused(patient, change, message):
    """Else it would fail somewhere inside, or be slow without a word."""
    with pytest.raises(ValueError, match=message):
        guided_generate(patient, DoctorGuidedLogitsProcessor(llama(1)), max_new_tokens=4, speculative=True, **change)


def test_a_refused_call_streams_nothing(patient):
    """Else a client would get a prompt, and no end."""

    class Streamer:
        def put(self, value):
            raise AssertionError("put")

        end = None

    with pytest.raises(ValueError, match="Got 3 rows"):
        guided_generate(
            patient, DoctorGuidedLogitsProcessor(llama(1)), **PADDED, speculative=True, streamer=Streamer()
        )


def test_what_the_policy_rules_out_is_never_accepted(monkeypatch):
    """Also when the random number is exactly zero."""
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.zeros(()))
    token, is_accepted = speculative._Sampling.verify(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    )
    assert token.item() == 1 and not is_accepted


def test_a_guide_is_needed(patient):
    """Else speculation would draft with nothing."""
    with pytest.raises(ValueError, match="Got 0; for several doctors"):
        generate(patient, TemperatureLogitsWarper(0.7), ONE, custom_generate=speculative_guided_generate)


def test_a_patient_without_a_kv_cache_is_refused():
    """Its states cannot be taken back."""
    torch.manual_seed(0)
    patient = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    with pytest.raises(ValueError, match="decode without speculation"):
        guided_generate(patient, DoctorGuidedLogitsProcessor(llama(1)), **ONE, max_new_tokens=4, speculative=True)
