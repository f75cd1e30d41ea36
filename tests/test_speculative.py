# SPDX-License-Identifier: Apache-2.0

"""
Drafting changes how long decoding takes, and not what comes out.

Greedy search and sampling with a seed are compared token by token with plain guided decoding; sampling also by a
chi-square test over all texts of a vocabulary small enough to enumerate, against their probabilities under guidance
from scratch.
"""

import itertools
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from trl_tfpo.decoding.acceptance import Sampling
from trl_tfpo.decoding.doctors import Doctor, DoctorMemory
from trl_tfpo.models.trained_exponents import record_exponents


GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=PAD)


def ratio_doctor(seed: int):
    """A doctor of guided flow, whose logits are a ratio."""
    doctor = llama(seed, peak=8.0)
    doctor.config.guidance = {"alpha": 1.0, "beta": 1.0}
    return doctor


@pytest.fixture(scope="module")
def patient():
    return llama(0)


@pytest.mark.parametrize(
    "num_draft_tokens", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8)), 3, "auto"]
)
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
    "policy, num_draft_tokens", [("one doctor", 2), ("two doctors, temperature, top-p", "auto"), ("entropy gate", 1)]
)
def test_samples_follow_the_guided_distribution(policy, num_draft_tokens):
    """Else speculation would trade quality for speed without a word."""
    assert chi_square_p_value(policy, num_draft_tokens=num_draft_tokens) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("error", ["accept everything", "draft with the noise, and sample again"])
def test_the_chi_square_test_sees_a_wrong_rule_of_acceptance(monkeypatch, error):
    """Else the test above could not fail."""

    class Wrong(Sampling):
        def token(self, scores, place):
            if error == "accept everything":
                self.chosen = getattr(self, "chosen", {})
                return self.chosen.setdefault(place, super().token(scores, place))
            token = super().token(scores, place)
            self.noise.pop(place)  # an accepted draft is then kept because it was likely under both
            return token if scores[0, token] > -0.7 else super().token(scores, place)

        def release(self, place):
            pass

        def finish(self):
            pass

    monkeypatch.setattr(speculative, "Sampling", Wrong)
    assert chi_square_p_value("one doctor", num_draft_tokens=2, num_seeds=8) < 1e-6


# Other drafters


DRAFTERS = {
    "lookup": dict(),
    "lookup of two tokens": dict(prompt_lookup_num_tokens=2, num_draft_tokens=5),
    "assistant": dict(assistant_model=llama(0), num_draft_tokens=3),
    "assistant that disagrees": dict(assistant_model=gpt2(7), num_draft_tokens=3),
    "assistant of a smaller vocabulary": dict(assistant_model=llama(4, vocab_size=28), num_draft_tokens=3),
    "assistant with few positions": dict(assistant_model=gpt2(5, n_positions=12), num_draft_tokens=3),
    "assistant, auto": dict(assistant_model=llama(0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [GREEDY, GREEDY | dict(do_sample=True, temperature=1.5, top_p=0.9)])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_default_doctor_is_drafted_for(patient, drafter, settings):
    """Else a doctor of guided flow would gain nothing, or the drafter would be heard in the text."""
    guide = DoctorGuidedLogitsProcessor(ratio_doctor(1))
    torch.manual_seed(0)
    expected, counts = guided_generate(patient, guide, **ONE, **settings), {}
    after = torch.rand(())
    for _ in range(2):  # the second text profits from the first
        torch.manual_seed(0)
        drafts = DRAFTERS[drafter] | dict(speculative=True, statistics=counts)
        assert torch.equal(guided_generate(patient, guide, **ONE, **settings, **drafts), expected)
        assert torch.equal(torch.rand(()), after)  # what comes next with the same seed is the same, too
    if drafter == "assistant":  # it is the patient
        assert counts["num_accepted"] == counts["num_drafted"] > 0


def test_padding_is_hidden_from_an_assistant(patient):
    """Else an assistant would draft for another prompt, and be rejected."""
    inputs = {name: tensor[1:2] for name, tensor in PADDED.items()}
    guide, counts = DoctorGuidedLogitsProcessor(ratio_doctor(1)), {}
    drafts = dict(speculative=True, assistant_model=llama(0), num_draft_tokens=3, statistics=counts)
    guided_generate(patient, guide, **inputs, **GREEDY, **drafts)
    assert counts["num_accepted"] == counts["num_drafted"] > 0


def test_the_former_self_of_an_adapter_drafts(patient):
    """Where the doctor is an adapter on another model, that model is at hand, and needs no second copy."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(llama(0), config).double().eval()  # its base model is the patient's twin
    record_exponents(model, {"alpha": 1.0, "beta": 1.0})
    guide, counts = DoctorGuidedLogitsProcessor(model, beta=0.3), {}
    expected = guided_generate(patient, guide, **ONE, **GREEDY)
    drafts = dict(speculative=True, num_draft_tokens=3, statistics=counts)
    assert torch.equal(guided_generate(patient, guide, **ONE, **GREEDY, **drafts), expected)
    assert counts["num_accepted"] == counts["num_drafted"] > 0


def test_sampling_is_that_of_torch():
    """Else the samples of a seed would change with speculation."""
    choice = Sampling()
    for place in range(50):
        scores = torch.randn(1, 999, generator=torch.Generator().manual_seed(place))
        torch.manual_seed(place)
        expected, after = torch.multinomial(scores.softmax(-1), 1)[0], torch.get_rng_state()
        torch.manual_seed(place)
        assert torch.equal(choice.token(scores, place), expected)
        assert torch.equal(torch.get_rng_state(), after)
        choice.token(scores, place + 1000)
        choice.release(place + 1)
        choice.finish()
        assert torch.equal(torch.get_rng_state(), after)
        choice.release(10_000)


# Machines on which checks are free, or dear


class Machine:
    """A clock that advances by what patient and doctor read."""

    def __init__(self, patient, doctor, check, doctor_step):
        self.seconds, self.check, self.doctor_step = 0.0, check, doctor_step
        for model in (patient, doctor):
            model.register_forward_pre_hook(partial(self.read, is_patient=model is patient), with_kwargs=True)

    def read(self, module, args, kwargs, is_patient):
        num_tokens = kwargs["input_ids"].size(1)
        is_prompt = num_tokens > 9
        self.seconds += (2.0 if is_prompt else self.check(num_tokens)) if is_patient else self.doctor_step

    def time(self, run):
        start = self.seconds
        run()
        return self.seconds - start


CHECKS = {
    "free": lambda num_positions: 1.0,
    "cheap": lambda num_positions: 1 + 0.07 * (num_positions - 1),
    "half a step more": lambda num_positions: 1.5 + 0.05 * num_positions if num_positions > 1 else 1.0,
    "as dear as steps": lambda num_positions: 1.0 * num_positions,
}
LONG = {name: tensor.repeat(1, 2) for name, tensor in ONE.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checks", CHECKS)
@pytest.mark.parametrize("agrees", [True, False])
@pytest.mark.parametrize("do_sample", [False, True])
def test_speculation_never_loses(monkeypatch, checks, agrees, do_sample):
    """Else an option that promises speed would cost some on the next processor."""
    patient, doctor = llama(0), llama(0 if agrees else 1)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.5 if agrees else 0.01)
    settings = GREEDY | dict(do_sample=do_sample, max_new_tokens=60)
    decode = partial(guided_generate, patient, guide, **LONG, **settings)
    machine = Machine(patient, doctor, CHECKS[checks], doctor_step=0.1)
    monkeypatch.setattr(speculative, "_clock_of", lambda _: (lambda: machine.seconds, True))
    decode(), decode(speculative=True, num_draft_tokens=1)  # each model is tried out once, which is not counted
    plain = machine.time(decode)
    alone = machine.time(partial(patient.generate, **LONG, **settings))
    times = [machine.time(partial(decode, speculative=True)) for _ in range(5)]
    assert all(sum(times[:n]) <= 1.03 * n * plain for n in range(1, 6))
    if agrees and checks in ("free", "cheap"):
        assert times[-1] <= 0.67 * alone
    if not agrees:
        assert times[-1] <= 1.02 * plain


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
        (dict(**ONE, prompt_lookup_num_tokens=0), "Got 0; try 4"),
        (dict(**ONE, prompt_lookup_num_tokens=2, assistant_model=llama(9)), "one way to draft"),
        (dict(**ONE, assistant_model=ratio_doctor(9)), "must be a language model. Got a doctor of guided flow"),
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


def test_what_the_policy_rules_out_is_never_chosen():
    """Also where the noise favours it."""
    choice = Sampling()
    choice.noise[3] = torch.tensor([[1e-30, 1e30]])
    assert choice.token(torch.tensor([[-torch.inf, 0.0]]), 3).item() == 1


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


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(dict(speculative=True, num_draft_tokens=3), id="3 drafts"),
        pytest.param(dict(speculative=True), id="auto"),
        pytest.param(dict(speculative=True, assistant_model=llama(5)), id="assistant, speculative"),
        pytest.param(dict(assistant_model=llama(5)), id="assistant of generate"),
        pytest.param(dict(assistant_model=llama(0)), id="assistant that agrees"),
        pytest.param(dict(prompt_lookup_num_tokens=3), id="prompt lookup of generate"),
    ],
)
def test_a_trace_has_the_tokens_that_were_kept(patient, mode, do_sample):
    """Drafts are also passed to the processor, and rejected drafts must not stay in the trace."""
    settings = dict(max_new_tokens=12, do_sample=do_sample, eos_token_id=None, pad_token_id=0, **ONE)
    guide = DoctorGuidedLogitsProcessor(llama(1, peak=8.0), alpha=1.0, return_trace=True)
    torch.manual_seed(0)
    output = guided_generate(patient, guide, **settings, **mode)
    found = guide.trace(output)
    replay = DoctorGuidedLogitsProcessor(llama(1, peak=8.0), alpha=1.0, return_trace=True)
    for length in range(ONE["input_ids"].size(1), output.size(1)):
        replay(output[:, :length], patient(output[:, :length]).logits[:, -1])
    expected = replay.trace(output)
    assert torch.equal(found.token_ids, output[:, -12:])
    for name in ("patient_logps", "doctor_logps", "guided_logps"):
        assert torch.allclose(getattr(found, name).double(), getattr(expected, name).double(), atol=1e-4)
