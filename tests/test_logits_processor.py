# SPDX-License-Identifier: Apache-2.0

"""
Guided decoding with a cache is guided decoding without one.

The oracle is in `plain_guidance.py`; the product of modes, positions and doctors in `test_decoding_modes.py`.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_guidance import (
    BOS,
    DOCTORS,
    EOS,
    ONE,
    PADDED,
    SIZES,
    SPECIAL,
    VOCABULARY,
    PlainGuidance,
    batch,
    generate,
    gpt2,
    llama,
    mistral,
    run_out_of_memory,
    sharpen,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_tfpo.decoding.doctors import Doctor, DoctorMemory
from trl_tfpo.decoding.logits_processor import DoctorGuidedLogitsProcessor
from trl_tfpo.models.doctor import add_value_head


@pytest.fixture(scope="module")
def patient():
    return llama(0)


MODES = {
    "greedy": (ONE, {}),
    "greedy, padded": (PADDED, {}),
    "sampling": (ONE, dict(do_sample=True)),
    "sampling, padded": (PADDED, dict(do_sample=True, temperature=1.3, top_k=20)),
    "return sequences": (PADDED, dict(do_sample=True, num_return_sequences=3)),
    "beams": (ONE, dict(num_beams=4, num_return_sequences=2)),
    "beams, padded": (PADDED, dict(num_beams=3)),
    "beam sampling": (PADDED, dict(num_beams=3, do_sample=True)),
    "prompt lookup": (ONE, dict(prompt_lookup_num_tokens=3)),
    "prompt lookup, sampling": (ONE, dict(prompt_lookup_num_tokens=3, do_sample=True)),
    "assisted": (ONE, dict(assistant_model=True)),
    "assisted, sampling": (ONE, dict(assistant_model=True, do_sample=True)),
    "repetition penalty": (PADDED, dict(repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=3)),
    "rows that end early": (PADDED, dict(eos_token_id=list(range(16, 24)), do_sample=True)),
    "beams that end early": (PADDED, dict(eos_token_id=list(range(16, 24)), num_beams=3)),
    "patient without cache": (PADDED, dict(use_cache=False)),
}


def run_mode(patient, processor, mode: str):
    inputs, kwargs = MODES[mode]
    if "assistant_model" in kwargs:
        kwargs = kwargs | {"assistant_model": llama(9)}
    return generate(patient, processor, inputs, **kwargs)


@pytest.fixture(scope="module", params=DOCTORS)
def guided(request, patient):
    """A doctor, and what plain guidance generates in a mode; computed once, for several tests."""
    doctor, memo = DOCTORS[request.param](1), {}

    def expected(mode: str) -> torch.Tensor:
        if mode not in memo:
            memo[mode] = run_mode(patient, PlainGuidance([doctor], [0.8], 1.0, MODES[mode][0]["attention_mask"]), mode)
        return memo[mode]

    return doctor, expected


@pytest.mark.parametrize("mode", MODES)
def test_cached_guidance_generates_the_tokens_of_plain_guidance(patient, guided, mode):
    """Else a cache in the wrong order, or a doctor that reads padding, would steer by another row's text."""
    doctor, expected = guided
    mask = MODES[mode][0]["attention_mask"]
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8, attention_mask=mask)
    assert torch.equal(run_mode(patient, processor, mode), expected(mode))


@pytest.mark.slow
@pytest.mark.parametrize("is_mask_given", [True, False])
def test_one_processor_serves_all_modes_in_a_row(patient, guided, is_mask_given):
    """Else what is left of one `generate` call would leak into the next."""
    doctor, expected = guided
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8)
    for mode in MODES:
        if is_mask_given:
            processor.reset(attention_mask=MODES[mode][0]["attention_mask"])
        assert torch.equal(run_mode(patient, processor, mode), expected(mode)), mode


def test_two_generations_may_interleave(patient):
    """Else a processor would need to be told when a generation begins, and be wrong when it is not."""
    doctor = llama(1)
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8)
    plain = PlainGuidance([doctor], [0.8], 1.0, ONE["attention_mask"])
    scores = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    texts = [
        [BOS, 5, 6],
        [BOS, 5, 7],
        [BOS, 5, 6, 8],
        [BOS, 5, 7, 9],
        [BOS, 5],
        [BOS, 5, 6, 8, 3, 4],
        [BOS, 5, 6, 8, 3],
        [3],
    ]
    for text in texts:
        ids = torch.tensor([text])
        torch.testing.assert_close(processor(ids, scores), plain(ids, scores))


def test_rows_may_be_permuted_repeated_and_dropped():
    """Else continuous schedulers and beams, which move rows, would get each other's guidance."""
    doctor = llama(1)
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=0.0, beta=1.0)
    ids = torch.tensor([[BOS, 5, 6], [BOS, 9, 9], [BOS, 4, 3]])
    for source in ([0, 1, 2], [2, 0, 1], [0, 0, 2, 1], [3, 3], [1]):
        ids = torch.cat([ids[source], torch.arange(3, 3 + len(source))[:, None]], dim=1)
        expected = doctor(ids).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(processor(ids, torch.zeros(len(ids), VOCABULARY).double()), expected)


class CountForwards:
    """How many columns the doctor read, in how many forwards."""

    def __init__(self, model):
        self.columns = []
        assert not any(DoctorMemory(Doctor(model)).faults().values())  # tried out once, and not counted
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _, args, kwargs):
        assert kwargs["logits_to_keep"] == 1  # else the logits of a long prompt fill the memory
        self.columns.append(kwargs["input_ids"].size(1))


@pytest.mark.parametrize("mode", ["greedy", "sampling, padded", "return sequences", "beams", "beam sampling"])
@pytest.mark.parametrize("name", DOCTORS)
def test_the_doctor_reads_every_token_once(patient, name, mode):
    """Else guidance would cost a prompt of doctor time for every token."""
    doctor = DOCTORS[name](1)
    count = CountForwards(doctor)
    inputs, kwargs = MODES[mode]
    output = run_mode(
        patient, DoctorGuidedLogitsProcessor(doctor, attention_mask=inputs["attention_mask"], beta=0.5), mode
    )
    prompt = inputs["input_ids"].size(1)
    num_steps = output.size(1) - prompt
    if "num_beams" in kwargs:
        num_steps = len(count.columns)  # beams may stop early
    assert count.columns == [prompt] + [1] * (num_steps - 1)


def test_assisted_decoding_does_not_pay_for_visits_to_a_known_prefix(patient):
    """Else every draft token would be read twice, once for the draft and once for the check."""
    doctor = llama(1)
    count, calls = CountForwards(doctor), []

    class Counted(DoctorGuidedLogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(tuple(input_ids[0].tolist()))
            return super().__call__(input_ids, scores)

    run_mode(patient, Counted(doctor, beta=0.5, attention_mask=ONE["attention_mask"]), "assisted")
    assert len(calls) > len(set(calls))  # or the test shows nothing
    assert count.columns == [ONE["input_ids"].size(1)] + [1] * (len(set(calls)) - 1)


def test_a_sliding_window_doctor_goes_back_without_reading_again(patient):
    """Else assisted decoding with a Mistral doctor would read the whole text for every rejected token."""
    doctor = mistral(1)
    count = CountForwards(doctor)
    run_mode(patient, DoctorGuidedLogitsProcessor(doctor, attention_mask=ONE["attention_mask"]), "prompt lookup")
    assert count.columns == [ONE["input_ids"].size(1)] + [1] * (len(count.columns) - 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
        ),
        lambda: Lfm2ForCausalLM(
            Lfm2Config(
                vocab_size=VOCABULARY, **SIZES, layer_types=["conv", "full_attention"], block_multiple_of=8, **SPECIAL
            )
        ),
    ],
    ids=["no KV cache", "a cache that cannot be cut"],
)
def test_doctors_with_other_caches_read_again_where_they_must(patient, make):
    """Else a state-space doctor, which has no KV cache, would be cut where nothing can be cut."""
    torch.manual_seed(3)
    doctor = sharpen(make(), 25.0)
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8)
    for mode in ("greedy", "beams", "prompt lookup", "sampling"):
        plain = PlainGuidance([doctor], [0.8], 1.0, ONE["attention_mask"])
        assert torch.equal(run_mode(patient, processor, mode), run_mode(patient, plain, mode)), mode


def test_a_lora_doctor_guides_with_its_adapter(patient):
    """Else a doctor that was trained with PEFT would guide with its base model."""
    base = llama(1)
    doctor = get_peft_model(
        llama(1), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=2.0, attention_mask=PADDED["attention_mask"])
    plain = PlainGuidance([doctor], [2.0], 1.0, PADDED["attention_mask"])
    output = generate(patient, processor, PADDED)
    assert torch.equal(output, generate(patient, plain, PADDED))
    plain = PlainGuidance([base], [2.0], 1.0, PADDED["attention_mask"])
    assert not torch.equal(output, generate(patient, plain, PADDED))
    with pytest.raises(ValueError, match="load the reference separately"):
        DoctorGuidedLogitsProcessor(doctor, reference=doctor.get_base_model())


@pytest.mark.parametrize("name", DOCTORS)
def test_a_doctor_in_training_guides_without_its_value_head(patient, name):
    """Else a doctor could only be tried out after it was saved and loaded again."""
    doctor = DOCTORS[name](1)
    expected = generate(patient, DoctorGuidedLogitsProcessor(doctor), PADDED)
    add_value_head(doctor)
    count = CountForwards(doctor)
    assert torch.equal(generate(patient, DoctorGuidedLogitsProcessor(doctor), PADDED), expected)
    assert count.columns == [PADDED["input_ids"].size(1)] + [1] * 11


FORMS = {
    "product": (dict(alpha=1.0, beta=0.5), 1.0, [0.5]),
    "mixture, the default": (dict(beta=0.3), 0.7, [0.3]),
    "ratio, the default with a reference": (dict(beta=0.6, reference=llama(2)), 1.0, [0.6, -0.6]),
    "two doctors": (dict(beta=[0.3, 0.2]), 0.5, [0.3, 0.2]),
    "two doctors, one with a reference": (dict(beta=[0.3, 0.2], reference=[None, llama(3)]), 0.7, [0.3, 0.2, -0.2]),
    "two doctors, one weight": (dict(beta=0.25), 0.5, [0.25, 0.25]),
    "steer away": (dict(beta=-0.5), 1.5, [-0.5]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_have_the_exponents_they_say(patient, form):
    """Else a published `beta` would mean something else here."""
    settings, alpha, exponents = FORMS[form]
    doctors = [llama(1), gpt2(4)] if form.startswith("two") else [llama(1)]
    references = settings.get("reference", [])
    references = [r for r in (references if isinstance(references, list) else [references]) if r is not None]
    processor = DoctorGuidedLogitsProcessor(
        doctors if len(doctors) > 1 else doctors[0], attention_mask=PADDED["attention_mask"], **settings
    )
    assert processor.alpha == pytest.approx(alpha)
    plain = PlainGuidance(doctors + references, exponents, alpha, PADDED["attention_mask"])
    assert torch.equal(generate(patient, processor, PADDED), generate(patient, plain, PADDED))


@pytest.mark.parametrize("copies", [1, 2])
def test_a_weight_for_each_prompt_is_that_prompt_alone(copies):
    """Else two users of one batch would get each other's strength of guidance."""
    doctor, ids = llama(1), torch.tensor([[BOS, 5, 6], [BOS, 9, 4]]).repeat_interleave(copies, dim=0)
    scores = torch.randn(2 * copies, VOCABULARY, dtype=torch.float64)
    together = DoctorGuidedLogitsProcessor(doctor, beta=torch.tensor([0.2, 0.9]))(ids, scores)
    for rows, beta in ((slice(0, copies), 0.2), (slice(copies, None), 0.9)):
        alone = DoctorGuidedLogitsProcessor(doctor, beta=beta)(ids[rows], scores[rows])
        torch.testing.assert_close(together[rows], alone)
    with pytest.raises(ValueError, match="3 entries for 2 rows"):
        DoctorGuidedLogitsProcessor(doctor, beta=torch.full((3,), 0.5))(ids[:2], scores[:2])


def test_with_a_mask_there_are_as_many_weights_as_prompts():
    """Else two weights for four prompts would be given out by their order in the batch."""
    scores, ids = torch.zeros(3, VOCABULARY, dtype=torch.float64), PADDED["input_ids"]
    guide = DoctorGuidedLogitsProcessor(llama(1), beta=torch.tensor([0.5]), attention_mask=PADDED["attention_mask"])
    with pytest.raises(ValueError, match="Got 1 entries for 3 prompts"):
        guide(ids, scores)


def test_beta_zero_is_the_patient_alone(patient):
    """Else switching guidance off would not give back the model that was evaluated."""
    scores = torch.randn(1, VOCABULARY, dtype=torch.float64)
    output = DoctorGuidedLogitsProcessor(llama(1), beta=0.0)(ONE["input_ids"], scores)
    torch.testing.assert_close(output, scores.log_softmax(-1))
    torch.manual_seed(0)
    alone = patient.generate(**ONE, max_new_tokens=12, do_sample=True, eos_token_id=None)
    assert torch.equal(generate(patient, DoctorGuidedLogitsProcessor(llama(1), beta=0.0), ONE, do_sample=True), alone)


def test_a_constant_added_to_the_doctors_logits_changes_nothing():
    """Else beams would be ranked by an offset that no probability depends on."""
    doctor, shifted = llama(1), llama(1)
    shifted.lm_head.bias = torch.nn.Parameter(torch.full((VOCABULARY,), 7.0, dtype=torch.float64))
    scores = torch.randn(1, VOCABULARY, dtype=torch.float64)
    torch.testing.assert_close(
        DoctorGuidedLogitsProcessor(shifted)(ONE["input_ids"], scores),
        DoctorGuidedLogitsProcessor(doctor)(ONE["input_ids"], scores),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_left_alone_and_log_probabilities_come_back(dtype):
    """Else `output_logits` would report guided scores as the patient's, and halves would round the product."""
    scores = torch.randn(1, VOCABULARY).to(dtype)
    scores[0, 7] = -float("inf")
    before = scores.clone()
    output = DoctorGuidedLogitsProcessor(llama(1))(ONE["input_ids"], scores)
    assert torch.equal(scores, before)
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(output.exp().sum(dim=-1), torch.ones(1, dtype=output.dtype))
    assert output[0, 7] == -float("inf")  # what the patient bans stays banned


@pytest.mark.parametrize("pad", [EOS, BOS])
def test_a_padding_id_that_also_begins_or_ends_texts_needs_the_mask(patient, pad):
    """Else GPT-2 like doctors, which pad with EOS, would read padding as text."""
    doctor = gpt2(1, pad_token_id=None, eos_token_id=pad)
    inputs = batch([7, 3, 20, 21], [11, 5], pad=pad)
    expected = generate(patient, PlainGuidance([doctor], [0.8], 1.0, inputs["attention_mask"]), inputs)
    settings = dict(alpha=1.0, beta=0.8)
    processor = DoctorGuidedLogitsProcessor(doctor, attention_mask=inputs["attention_mask"], **settings)
    assert torch.equal(generate(patient, processor, inputs), expected)
    with pytest.warns(UserWarning, match="a guess. Pass `attention_mask") as warned:
        processor = DoctorGuidedLogitsProcessor(doctor, **settings)
        assert torch.equal(generate(patient, processor, inputs), expected)  # the longest row has no padding
        generate(patient, processor, inputs)
        one = batch([pad, 7, 3, 20])  # begins with BOS, not with padding
        expected = generate(patient, PlainGuidance([doctor], [0.8], 1.0, one["attention_mask"]), one)
        assert torch.equal(generate(patient, processor, one), expected)
    assert len(warned) == 1


def test_a_mask_is_not_used_for_other_prompts(patient):
    """Else the second batch of a processor would be read with the padding of the first."""
    processor = DoctorGuidedLogitsProcessor(llama(1), attention_mask=PADDED["attention_mask"])
    first = generate(patient, processor, PADDED)
    assert torch.equal(generate(patient, processor, PADDED), first)  # the same prompts once more
    for inputs in (
        ONE,
        batch([BOS, 7, 3, 20, 21], [BOS, 11], [BOS, 4, 30, 8, 6, 12, 13, 15]),  # one token differs
        batch([BOS, 7, 3, 20, 21], [BOS, 11], [BOS, 4, 30, 8, 6, 12, 13, 14, 15]),  # another length
        {name: tensor[:2] for name, tensor in PADDED.items()},  # another number of rows
    ):
        with pytest.raises(ValueError, match=r"call `reset\(attention_mask=...\)`"):
            generate(patient, processor, inputs)
    processor.reset(attention_mask=ONE["attention_mask"])
    generate(patient, processor, ONE)
    processor = DoctorGuidedLogitsProcessor(llama(1), attention_mask=ONE["attention_mask"])
    with pytest.raises(ValueError, match="do not continue its prompts"):
        generate(patient, processor, PADDED)


def test_weights_changed_between_calls_are_noticed(patient):
    """Else a doctor in training would be evaluated by what it thought of the prompt before the last step."""
    doctor = llama(1)
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8, attention_mask=ONE["attention_mask"])
    before = generate(patient, processor, ONE)
    doctor.load_state_dict(llama(5).state_dict())
    after = generate(patient, processor, ONE)
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(patient, PlainGuidance([doctor], [0.8], 1.0, ONE["attention_mask"]), ONE))


@pytest.mark.parametrize("how", ["AdamW", "fused AdamW", "data"])
def test_training_between_calls_is_noticed(patient, how):
    """Fused optimizers, the default of Trainer, and writes through `.data` leave PyTorch's own counter alone."""
    doctor = llama(1)
    processor = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8, attention_mask=ONE["attention_mask"])
    generate(patient, processor, ONE)
    if how == "data":
        for weight in doctor.parameters():
            weight.data.mul_(1.1)
    else:
        optimizer = torch.optim.AdamW(doctor.parameters(), lr=0.1, fused=how.startswith("fused"))
        doctor(ONE["input_ids"], labels=ONE["input_ids"]).loss.backward()
        optimizer.step()
    plain = PlainGuidance([doctor], [0.8], 1.0, ONE["attention_mask"])
    assert torch.equal(generate(patient, processor, ONE), generate(patient, plain, ONE))


def test_an_interrupted_call_leaves_no_half_true_memory(patient):
    """Else a retry after running out of memory would guide by a cache that is one token ahead."""
    first, second = llama(1), llama(2)
    processor = DoctorGuidedLogitsProcessor([first, second], beta=0.3)
    scores, ids = torch.zeros(1, VOCABULARY, dtype=torch.float64), torch.tensor([[BOS, 4, 5, 6]])
    processor(ids[:, :3], scores)
    hook = second.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(MemoryError):
        processor(ids, scores)
    hook.remove()
    torch.testing.assert_close(
        processor(ids, scores), DoctorGuidedLogitsProcessor([first, second], beta=0.3)(ids, scores)
    )


@pytest.mark.parametrize("size", [VOCABULARY - 4, VOCABULARY + 4])
def test_vocabularies_of_different_padding_meet_in_the_common_tokens(patient, size):
    """Else rows that pad the vocabulary would take probability from tokens that exist."""
    doctor, scores = llama(1, vocab_size=size), torch.randn(1, VOCABULARY, dtype=torch.float64)
    ids, common = torch.tensor([[BOS, 5, 9]]), min(size, VOCABULARY)
    with pytest.warns(UserWarning, match=f"32 tokens, and a doctor for {size}"):
        output = DoctorGuidedLogitsProcessor(doctor, beta=0.5)(ids, scores)
    with torch.no_grad():
        logits = doctor(ids).logits[:, -1, :common]
    expected = (scores[:, :common].softmax(-1) * logits.softmax(-1)).sqrt()
    torch.testing.assert_close(output[:, :common].exp(), expected / expected.sum())
    assert (output[:, common:] == -float("inf")).all()
    same = [word_tokenizer(), word_tokenizer()]
    DoctorGuidedLogitsProcessor(doctor, beta=0.5, processing_classes=same)(ids, scores)  # no warning


@pytest.mark.parametrize("settings", [dict(alpha=1.5, beta=-0.5), dict(beta=lambda step: 0.0 if step < 3 else 0.5)])
def test_ids_that_a_doctor_does_not_have_never_come(settings):
    """Else a text would break off when the doctor has to read one, however it is weighed."""
    patient = llama(0, vocab_size=VOCABULARY + 4)
    with torch.no_grad():
        patient.lm_head.weight[VOCABULARY + 1] = 0
        patient.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY + 4, dtype=torch.float64))
        patient.lm_head.bias[VOCABULARY + 1] = 100.0
    with pytest.warns(UserWarning, match="36 tokens, and a doctor for 32"):
        output = generate(patient, DoctorGuidedLogitsProcessor(llama(1), **settings), ONE)
    assert (output < VOCABULARY).all()


def word_tokenizer(words: str = "<unk> yes no") -> PreTrainedTokenizerFast:
    model = WordLevel({word: index for index, word in enumerate(words.split())}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")


@pytest.mark.parametrize("beta", [1.2, [0.7, 0.6], torch.tensor([0.1, 1.1])])
def test_a_mixture_has_no_negative_patient(beta):
    """Else too much doctor would silently be decoding away from the patient."""
    doctor = [llama(1), llama(2)] if isinstance(beta, list) else llama(1)
    with pytest.raises(ValueError, match="pass `alpha`, e.g. 1.0 for the product"):
        DoctorGuidedLogitsProcessor(doctor, beta=beta)
    DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=beta)


def test_there_is_a_weight_and_a_reference_for_each_doctor():
    """Else a list that is one short would drop a doctor."""
    for settings in (dict(beta=[0.5]), dict(reference=[llama(3)])):
        with pytest.raises(ValueError, match="a `beta` and a `reference` for each"):
            DoctorGuidedLogitsProcessor([llama(1), llama(2)], **settings)
    with pytest.raises(ValueError, match="at least one doctor"):
        DoctorGuidedLogitsProcessor([])
    doctor = llama(1)
    with pytest.raises(ValueError, match="cancels the guidance"):
        DoctorGuidedLogitsProcessor(doctor, reference=doctor)


def test_different_tokenizers_are_refused():
    """Else the doctor would read other words than the patient wrote."""
    tokenizer = word_tokenizer()
    DoctorGuidedLogitsProcessor(llama(1), processing_classes=[tokenizer, word_tokenizer()])
    with pytest.raises(ValueError, match="id 1: 'yes' for the patient, 'no' for the doctor"):
        DoctorGuidedLogitsProcessor(llama(1), processing_classes=[tokenizer, word_tokenizer("<unk> no yes")])
    with pytest.raises(ValueError, match="Got 1 for 1 patient, 1 doctors and 0 references"):
        DoctorGuidedLogitsProcessor(llama(1), processing_classes=[tokenizer])


def test_a_doctor_in_training_mode_is_refused():
    """Else dropout would make the same prompt come out differently."""
    doctor = llama(1)
    processor = DoctorGuidedLogitsProcessor(doctor)
    doctor.train()
    with pytest.raises(ValueError, match=r"call `.eval\(\)`"):
        processor(ONE["input_ids"], torch.zeros(1, VOCABULARY))
    with pytest.raises(ValueError, match=r"call `.eval\(\)`"):
        DoctorGuidedLogitsProcessor(doctor)


def test_an_encoder_decoder_is_refused():
    """Else it would fail inside its decoder, with no word about doctors."""
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder-decoder"):
        DoctorGuidedLogitsProcessor(T5ForConditionalGeneration(config).eval())


def test_ids_are_needed(patient):
    """Else with `inputs_embeds` alone the doctor would guide without having read the prompt."""
    processor = DoctorGuidedLogitsProcessor(llama(1))
    with pytest.raises(ValueError, match="not `inputs_embeds` alone"):
        embeds = patient.get_input_embeddings()(ONE["input_ids"])
        patient.generate(inputs_embeds=embeds, logits_processor=[processor], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"shape \(B, L\)"):
        processor(torch.tensor([1, 2, 3]), torch.zeros(1, VOCABULARY))


def test_a_mask_must_be_left_padded():
    """Else the text would go on after a hole."""
    for mask in ([[1, 1, 0]], [[0, 1, 0, 1]], [[0, 0]]):
        with pytest.raises(ValueError, match="padding_side='left'"):
            DoctorGuidedLogitsProcessor(llama(1), attention_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match=r"must have shape \(B, L\)"):
        DoctorGuidedLogitsProcessor(llama(1), attention_mask=torch.tensor([1, 1]))


def test_positions_end_where_the_doctors_table_ends(patient):
    """Else a text too long would be an index error, or on a GPU the end of the process."""
    doctor = gpt2(1, n_positions=10)
    with pytest.raises(ValueError, match="Got 11 tokens for 10 positions"):
        generate(patient, DoctorGuidedLogitsProcessor(doctor), ONE)
    long_padding = batch([BOS, 5], [BOS, 6])
    long_padding = {name: torch.nn.functional.pad(tensor, (9, 0)) for name, tensor in long_padding.items()}
    generate(patient, DoctorGuidedLogitsProcessor(doctor), long_padding, max_new_tokens=8)  # padding has no position
    generate(patient, DoctorGuidedLogitsProcessor(llama(1, max_position_embeddings=10)), ONE)  # rotary ones go on


def test_adapted_embeddings_are_no_table_of_positions(patient):
    """Else a doctor with as many tokens as positions would refuse long texts once its embeddings are adapted."""
    doctor = llama(1, max_position_embeddings=VOCABULARY)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    doctor = get_peft_model(doctor, config).double().eval()
    generate(patient, DoctorGuidedLogitsProcessor(doctor), ONE, max_new_tokens=VOCABULARY)


def test_tokens_unknown_to_the_doctor_are_refused():
    """Else a token that only the patient has would be an index error, or on a GPU the end of the process."""
    processor = DoctorGuidedLogitsProcessor(llama(1, vocab_size=8))
    with pytest.raises(ValueError, match="must be below 8, .* Got 9"):
        processor(torch.tensor([[BOS, 9]]), torch.zeros(1, VOCABULARY))


@pytest.mark.parametrize("culprit", ["the patient", "doctor 0", "their product"])
def test_nan_is_not_sampled_from(culprit):
    """Else an overflow would come out as token 0 for ever."""
    doctor, scores = llama(1), torch.zeros(1, VOCABULARY)
    if culprit == "the patient":
        scores[0, 3] = float("nan")
    elif culprit == "doctor 0":
        with torch.no_grad():
            doctor.lm_head.weight[3] = float("nan")
    else:
        doctor.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY, dtype=torch.float64))
        with torch.no_grad():
            doctor.lm_head.bias[:16] = -float("inf")
        scores[:, 16:] = -float("inf")
    with pytest.raises(ValueError, match=f"Got NaN from {culprit}"):
        DoctorGuidedLogitsProcessor(doctor)(ONE["input_ids"], scores)


def test_continuous_batching_is_declined():
    """Else `generate_batch` would hand over single tokens as if they were whole texts."""
    assert DoctorGuidedLogitsProcessor.supports_continuous_batching is False
