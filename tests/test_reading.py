# SPDX-License-Identifier: Apache-2.0

"""However a model is read, it says what it says of the whole text; what it cannot do is refused or done otherwise."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_llama, make_tokenizer
from hybrids import ARCHITECTURES, make

from trl_tfpo import Doctor, DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.annotation.scoring import score_completions
from trl_tfpo.common.precision import in_float32
from trl_tfpo.decoding.doctors import DoctorMemory
from trl_tfpo.decoding.generation import check_reads
from trl_tfpo.evaluation import generate_completions
from trl_tfpo.functional import FactoredLogits
from trl_tfpo.models.doctor import add_value_head
from trl_tfpo.models.logits import PLAIN, HeadForm, head_form, read_logits
from trl_tfpo.server import Engine


FAULTS = {
    "Jamba": {"in pieces"},
    "RecurrentGemma": {"with padding"},
    "Rwkv": {"with padding"},
    "Roberta": {"with positions", "with padding"},  # they begin behind the padding id
}
TEXT = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(0))
PADDED = dict(
    input_ids=torch.cat([TEXT[:, :8], torch.cat([torch.zeros(1, 5, dtype=torch.long), TEXT[:, :3]], dim=1)]),
    attention_mask=(torch.arange(8) >= torch.tensor([[0], [5]])).long(),
)
SETTINGS = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)


@torch.no_grad()
def whole_logps(model, ids):
    return model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_doctor_cannot_do_is_found_out(name, dtype):
    """Else a hybrid would guide by half of what it read; or a good model would be refused for its rounding."""
    faults = DoctorMemory(Doctor(make(name).to(dtype))).faults()
    assert {how for how, fault in faults.items() if fault} == FAULTS.get(name, set())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_doctor_says_what_it_says_of_the_whole_text(name):
    """Else hybrids that count positions from zero at each step would be nats off in plain greedy decoding."""
    doctor = make(name)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=0.0, beta=1.0)
    for length in (4, 5, 6, 11, 8, 9, 16):  # token by token, in pieces, and back
        found = guide(TEXT[:, :length], torch.zeros(1, 64))
        torch.testing.assert_close(found, whole_logps(doctor, TEXT[:, :length]), atol=1e-4, rtol=1e-4)


def test_padding_that_changes_a_doctor_is_refused_before_the_first_token(patient):
    """Else prompts of a batch would be guided by a doctor that read their padding."""
    guide, patient = DoctorGuidedLogitsProcessor(make("RecurrentGemma")), make("Llama")
    with pytest.raises(ValueError, match="padding on the left.*RecurrentGemma.*one by one"):
        guided_generate(patient, guide, **PADDED, **SETTINGS)
    assert guide.num_calls == 0
    same_length = dict(input_ids=TEXT.reshape(2, 8), attention_mask=torch.ones(2, 8, dtype=torch.long))
    assert guided_generate(patient, guide, **same_length, **SETTINGS).shape == (2, 14)


@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("name", ["RecurrentGemma", "Rwkv"])
def test_padding_that_changes_the_patient_is_refused(name, is_guided):
    """Else the answers of a batch would not be those to its prompts, which is so upstream."""
    patient, tokenizer = make(name), make_tokenizer()
    guide = DoctorGuidedLogitsProcessor(make("Llama", 1)) if is_guided else None
    with pytest.raises(ValueError, match=f"same logits for a prompt with or without padding.*{name}.*batch_size=1"):
        generate_completions(patient, tokenizer, ["good soup", "the"], guide=guide, max_new_tokens=2)
    one_by_one = generate_completions(
        patient, tokenizer, ["good soup", "the"], guide=guide, max_new_tokens=2, batch_size=1
    )
    assert len(one_by_one) == 2


def test_a_prompt_in_pieces_is_refused_where_it_is_another_prompt():
    """Else `prefill_chunk_size`, which saves memory, would cost the truth."""
    guide = DoctorGuidedLogitsProcessor(make("Llama"))
    settings = dict(input_ids=TEXT, prefill_chunk_size=4, **SETTINGS)
    with pytest.raises(ValueError, match="Jamba.*prefill_chunk_size"):
        guided_generate(make("Jamba"), guide, **settings)
    assert guided_generate(make("Llama", 1), guide, **settings).shape == (1, 22)


@pytest.mark.parametrize("name", ["Bamba", "GraniteMoeHybrid", "Jamba", "RecurrentGemma"])
def test_speculation_with_a_state_is_refused_at_the_start(name):
    """Else an answer would end at the first rejected draft, or go on wrongly."""
    guide, tokens = DoctorGuidedLogitsProcessor(make("Llama"), beta=0.9), []
    with pytest.raises(ValueError, match=f"Speculative decoding.*{name}"):
        guided_generate(make(name), guide, input_ids=TEXT, **SETTINGS, speculative=True, token_callback=tokens.append)
    assert not tokens


def test_convolutions_can_be_taken_back():
    """Speculation is refused where it is wrong, not by the kind of cache: a window of inputs can be cut."""
    guide, settings = DoctorGuidedLogitsProcessor(make("Llama"), beta=0.5), dict(input_ids=TEXT, **SETTINGS)
    patient = make("Lfm2")
    plain = guided_generate(patient, guide, **settings)
    assert torch.equal(guided_generate(patient, guide, **settings, speculative=True), plain)


@pytest.mark.parametrize("name", ["Lfm2", "Bamba", "Mamba2", "RecurrentGemma"])
def test_the_server_refuses_states_that_rows_cannot_share(name):
    """Else the operator would see an IndexError, or clients each other's state."""
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=f"keep keys and values of all tokens.*doctor.*{name}"):
        Engine(make_llama(0, vocab_size=64), tokenizer, {"doctor": make(name)})


def test_a_doctor_that_says_nothing_yet_may_be_read():
    """A doctor of guided flow starts with a head of zeros, of which nothing can be told; later it is asked again."""
    doctor = make("Rwkv")
    head = doctor.get_output_embeddings().weight
    weights = head.detach().clone()
    head.data.zero_()
    assert not any(DoctorMemory(Doctor(doctor)).faults().values())
    head.data.copy_(weights)
    assert DoctorMemory(Doctor(doctor)).faults()["with padding"]


@pytest.mark.parametrize("vocab_size", [3, 4, 5, 8, 64])
def test_a_small_vocabulary_is_no_fault(vocab_size):
    """Else a model of a toy world would be refused, as a text of one token over and over differs by rounding alone."""
    model = make_llama(0, vocab_size=vocab_size)
    assert not any(DoctorMemory(Doctor(model)).faults().values())
    mask = (torch.arange(4) >= torch.tensor([[0], [2]])).long()
    check_reads(model, mask)
    check_reads(model, mask, prefill_chunk_size=2)


@pytest.mark.parametrize("name", ["Llama", "Mamba2", "Bamba", "Lfm2"])
def test_halves_compute_in_float32(name):
    """Else rounding would hide what is wrong with a model in bfloat16."""
    half = make(name).bfloat16()
    same = copy.deepcopy(half).float()
    with torch.no_grad():
        with in_float32():
            found = half(input_ids=TEXT, use_cache=False).logits
        torch.testing.assert_close(found, same(input_ids=TEXT, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert {parameter.dtype for parameter in half.parameters()} >= {torch.bfloat16}


HEADS = {
    "Llama": PLAIN,
    "OPT": PLAIN,
    "Gemma2": HeadForm(softcap=30.0),
    "Cohere2": HeadForm(scale=0.0625),
    "RecurrentGemma": HeadForm(softcap=30.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_known_by_what_it_does(name, dtype):
    """A cap on logits has another name in every config; a head that is zero, as at the start, must not hide it."""
    model = make(name).to(dtype)
    model.get_output_embeddings().weight.data.zero_()
    assert head_form(model) == HEADS[name]


def test_a_head_that_looks_at_more_than_states_is_left_alone():
    """A model of somebody else's code, with a head that cannot be tried out, is read by its own forward."""
    model, forward = make("Llama"), type(make("Llama")).forward

    class Strange(type(model)):
        def forward(self, input_ids=None, **kwargs):
            output = forward(self, input_ids=input_ids, **kwargs)
            output.logits = output.logits / (1 + self.model.norm(output.logits[..., :32]).abs().amax(-1, keepdim=True))
            return output

    model.__class__ = Strange
    assert head_form(model) is None
    logits, _ = read_logits(model, torch.ones(1, 15, dtype=torch.bool), input_ids=TEXT)
    assert not isinstance(logits[0], FactoredLogits)


def normalizing(head):
    """Replace a head by one that normalizes its weights, as Baichuan's does."""

    class NormalizingHead(torch.nn.Linear):
        def forward(self, states):
            return torch.nn.functional.linear(states, torch.nn.functional.normalize(self.weight))

    head.__class__ = NormalizingHead


def offloading(head):
    """Keep the weights of a head on the CPU, and a placeholder in the module."""
    cpu_offload(head, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("change", [normalizing, offloading])
def test_a_head_whose_weights_are_not_its_product_computes_its_own_logits(change):
    """The product with the weights in the module would be something else."""
    model = make("Llama")
    change(model.get_output_embeddings())
    expected = model(TEXT).logits[0, :-1]
    logits, _ = read_logits(model, torch.ones(1, 15, dtype=torch.bool), input_ids=TEXT)
    torch.testing.assert_close(logits[0], expected)


def test_a_cap_is_the_nearest_number_of_the_config():
    """In half precision several numbers fit."""
    model = make("Gemma2").to(torch.bfloat16)
    model.config.some_size = 29
    model.config.final_logit_softcapping = 29.4
    assert head_form(model) == HeadForm(softcap=29.4)


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_those_of_the_models_own_head(name):
    """Else annotation would reward what the patient does not say, by nats."""
    model = make(name)
    if name == "RecurrentGemma":
        model.config.logits_soft_cap = 3.0  # as tight as a real cap is to real logits
    prompts, completions = [TEXT[0, :4].tolist()] * 2, [TEXT[0, 4:9].tolist(), TEXT[0, 9:].tolist()]
    for prompt, completion, found in zip(
        prompts, completions, score_completions(model, prompts, completions, batch_size=2), strict=True
    ):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, 3:-1].log_softmax(dim=-1)
        expected = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_doctor_is_trained_by_its_own_head(name):
    """Else what is trained would not be what is decoded."""
    doctor = make(name)
    mask = torch.arange(16)[None] >= 6
    own = doctor(input_ids=TEXT, use_cache=False).logits[0, 5:-1]
    (logits,), hidden = read_logits(doctor, mask[:, 1:], input_ids=TEXT)
    torch.testing.assert_close(logits.dense(), own, atol=1e-4, rtol=1e-4)
    assert hidden.shape == (1, 16, 32)
    add_value_head(doctor)
    output = doctor(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), completion_mask=mask)
    expected = own.log_softmax(dim=-1).gather(1, TEXT[0, 6:, None])[:, 0]
    torch.testing.assert_close(output.doctor_logps[0], expected, atol=1e-4, rtol=1e-4)
    assert output.log_values.shape == (1, 11)
    found = torch.autograd.grad(output.doctor_logps.sum(), doctor.get_input_embeddings().weight, retain_graph=True)[0]
    torch.testing.assert_close(
        found, torch.autograd.grad(expected.sum(), doctor.get_input_embeddings().weight)[0], atol=1e-3, rtol=1e-3
    )
