# SPDX-License-Identifier: Apache-2.0

"""The front door tells the guide what `generate` does not, and lets nothing pass that would leave the guide out."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_guidance import BOS, ONE, PAD, PADDED, batch, generate, llama, mistral
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration

from trl_tfpo import Doctor, DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.decoding.doctors import DoctorMemory


SETTINGS = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD)


@pytest.fixture(scope="module")
def patient():
    return llama(0)


def test_it_is_generate_with_a_guide(patient):
    """Else moving from `generate` to the front door would change texts."""
    for inputs in (ONE, PADDED):
        for extra in (dict(), dict(do_sample=True), dict(num_beams=3), dict(cache_implementation="static")):
            guide = DoctorGuidedLogitsProcessor(llama(1), attention_mask=inputs["attention_mask"])
            expected = generate(patient, guide, inputs, **(SETTINGS | extra))
            torch.manual_seed(0)
            assert torch.equal(guided_generate(patient, guide, **inputs, **(SETTINGS | extra)), expected)


def test_a_conversation_is_not_read_again(patient):
    """Else every turn would cost the doctor the whole history."""
    doctor, reads = llama(1), []
    assert not any(DoctorMemory(Doctor(doctor)).faults().values())  # tried out once, and not counted
    doctor.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].size(1)), with_kwargs=True
    )
    guide = DoctorGuidedLogitsProcessor(doctor)
    first = guided_generate(patient, guide, input_ids=ONE["input_ids"], **SETTINGS)
    second = torch.cat([first, torch.tensor([[7, 8]])], dim=1)
    found = guided_generate(patient, guide, input_ids=second, keep_memory=True, **SETTINGS)
    assert reads == [6, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1]  # the last token of the answer and two new ones
    assert torch.equal(
        found, guided_generate(patient, DoctorGuidedLogitsProcessor(doctor), input_ids=second, **SETTINGS)
    )


def test_a_patient_under_another_prompt_keeps_an_adapter_of_its_own():
    """Else a fine-tuned patient that guides itself would fall back to its base model."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(llama(0), config).double().eval()
    merged = copy.deepcopy(tuned).merge_and_unload().eval()
    found = []
    for patient in (tuned, merged, llama(0)):
        guide = DoctorGuidedLogitsProcessor(Doctor(patient, prompt=batch([BOS, 3, 3])), beta=0.4)
        found.append(guided_generate(patient, guide, input_ids=torch.tensor([[BOS, 5, 9]]), **SETTINGS).tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input_ids=PADDED["input_ids"]), r"Got \(1, 6\) for ids \(3, 8\)"),
        (
            dict(input_ids=PADDED["input_ids"], attention_mask=None),
            "Got none, and a prompt that begins with the padding id 0",
        ),
        (dict(input_ids=batch([7], [3, 4], pad=9)["input_ids"], attention_mask=None, pad_token_id=9), "padding id 9"),
        (dict(cache_implementation="paged"), "Got `cache_implementation='paged'`"),
        (dict(generation_config=GenerationConfig(cache_implementation="paged")), "Got `cache_implementation='paged'`"),
        (dict(custom_generate=lambda *args, **kwargs: None), "Got `custom_generate`"),
        (dict(inputs_embeds=torch.zeros(1, 6, 16).double()), "Got `inputs_embeds`"),
        (dict(logits_processor=[DoctorGuidedLogitsProcessor(llama(2))]), "Got another in `logits_processor`"),
    ],
)
def test_what_would_leave_the_guide_out_is_refused(patient, change, message):
    """Else the text would be the patient's alone, without a word."""
    with pytest.raises(ValueError, match=message):
        guided_generate(patient, DoctorGuidedLogitsProcessor(llama(1)), **(ONE | SETTINGS | change))


def test_a_cache_of_an_earlier_turn_needs_the_whole_text(patient):
    """Else the doctors would guide without having read the prompt."""
    cache, guide = DynamicCache(), DoctorGuidedLogitsProcessor(llama(1))
    first = guided_generate(patient, guide, **ONE, **SETTINGS, past_key_values=cache)
    with pytest.raises(ValueError, match="Got 1 ids and a cache of 11 tokens; pass all ids"):
        guided_generate(patient, guide, input_ids=first[:, -1:], **SETTINGS, past_key_values=cache)
    found = guided_generate(patient, guide, input_ids=first, **SETTINGS, past_key_values=cache)
    assert torch.equal(found, guided_generate(patient, guide, input_ids=first, **SETTINGS))


def test_a_guide_that_was_never_asked_is_noticed(patient, monkeypatch):
    """Else a mode of tomorrow that skips processors would pass for guided."""
    monkeypatch.setattr(patient, "generate", lambda input_ids, **kwargs: input_ids)
    with pytest.raises(ValueError, match="must call the guide at every step. Got no call"):
        guided_generate(patient, DoctorGuidedLogitsProcessor(llama(1)), **ONE, **SETTINGS)


def test_early_exit_would_shorten_a_doctor_on_the_same_weights(patient):
    """The patient drafts with its first layers, which are the doctor's too."""
    guide = DoctorGuidedLogitsProcessor(Doctor(patient, prompt=batch([BOS, 3])))
    with pytest.raises(ValueError, match="Got `assistant_early_exit`"):
        guided_generate(patient, guide, **ONE, **SETTINGS, assistant_early_exit=1)


@pytest.mark.parametrize(
    "prompt, message",
    [
        (dict(input_ids=torch.ones(1, 3), attention_mask=torch.ones(1, 2)), r"Got \(1, 2\) for ids \(1, 3\)"),
        (dict(input_ids=torch.ones(1, 2), attention_mask=torch.tensor([[1, 0]])), "left-padded"),
    ],
)
def test_prompts_of_a_doctor_are_checked(patient, prompt, message):
    """Else a doctor would read another text than was meant."""
    with pytest.raises(ValueError, match=message):
        Doctor(patient, prompt=prompt)
    ids = torch.tensor([[BOS, 3]])
    assert torch.equal(Doctor(patient, prompt={"input_ids": ids}).with_own_prompt(ids, 2), ids)  # no mask, no padding


def test_an_encoder_decoder_patient_is_refused():
    """Its prompt is where no doctor can read it."""
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder-decoder"):
        guided_generate(T5ForConditionalGeneration(config).eval(), DoctorGuidedLogitsProcessor(llama(1)), **ONE)


def test_a_sliding_window_patient_is_guided():
    """Its own cache forgets what the doctor remembers."""
    patient, guide = mistral(0), DoctorGuidedLogitsProcessor(llama(1))
    expected = generate(patient, DoctorGuidedLogitsProcessor(llama(1)), ONE, max_new_tokens=20)
    assert torch.equal(guided_generate(patient, guide, **ONE, **(SETTINGS | dict(max_new_tokens=20))), expected)


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device."""

    NAMES = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))

    def total(self):
        return sum(self.counts[name] for name in self.NAMES)


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_host_waits_once_per_token(patient, do_sample):
    """For the check of NaN, after all forward passes; `generate` itself waits for its stopping criteria."""
    guide = DoctorGuidedLogitsProcessor([llama(1), llama(2)], alpha=1.0, beta=[0.5, 0.3])
    settings = dict(do_sample=do_sample, eos_token_id=None, pad_token_id=PAD, cache_implementation="static")
    settings |= dict(disable_compile=True)

    def num_waits(run, num_tokens):
        with Waits() as waits:
            run(max_new_tokens=num_tokens, min_new_tokens=num_tokens, **settings, **PADDED)
        return waits.total()

    def guided(**kwargs):
        return guided_generate(patient, guide, **kwargs)

    guided(max_new_tokens=9, **settings, **PADDED)  # the reading tests of the doctors
    per_token = [(num_waits(run, 9) - num_waits(run, 5)) / 4 for run in (patient.generate, guided)]
    assert per_token[1] == per_token[0] + 1
