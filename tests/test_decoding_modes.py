# SPDX-License-Identifier: Apache-2.0

"""
Every mode of `generate`, with every kind of doctor, gives the tokens and scores of guidance from scratch.

Separate from `test_logits_processor.py`, whose tests take one property each: here is the product of all of them, and
long sequences of calls on one processor.
"""

import copy
import gc
import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from plain_guidance import BOS, VOCABULARY, PlainGuidance, batch, generate, gpt2, llama, run_out_of_memory
from transformers import CompileConfig, GenerationConfig

from trl_tfpo import Doctor, DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.decoding.doctors import DoctorMemory


pytestmark = pytest.mark.slow


ARCHITECTURES = {"RoPE": llama, "GPT-2 positions": gpt2}
PROMPTS = {
    "1 prompt": batch([BOS, 5, 9, 5, 9, 5]),
    "4 prompts": batch([BOS, 7, 3, 20, 21], [BOS, 11], [BOS, 4, 30, 8, 6, 12], [9, 9, 10]),
}
MODES = {
    "greedy": {},
    "sample": dict(do_sample=True, temperature=1.3, top_k=20),
    "beam": dict(num_beams=4),
    "beam-sample": dict(num_beams=4, do_sample=True),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "assisted": dict(assistant_model=True),
    "speculative": dict(speculative=True, num_draft_tokens=3),
}
COMPILED = CompileConfig(backend="eager", mode=None, dynamic=False)  # traced and guarded, without a C++ compiler
ONE_ROW_MODES = ("prompt lookup", "assisted", "speculative")


def add_adapters(model, num_adapters: int = 1, **kwargs):
    """The model as a `PeftModel` whose random adapters are doctors, and a copy with each adapter merged for good."""
    targets = ["c_attn", "c_fc"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(
        **(dict(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM") | kwargs)
    )
    config.fan_in_fan_out = model.config.model_type == "gpt2"
    names = [f"adapter_{index}" for index in range(num_adapters)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for name, weight in model.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                weight.data += 0.3 * torch.randn_like(weight)
    merged = []
    for name in names:
        one = copy.deepcopy(model).double()
        one.set_adapter(name)
        merged.append(one.merge_and_unload().eval())
    return model.double().eval(), merged


@pytest.fixture(scope="module", params=ARCHITECTURES)
def cast(request):
    """The patient, and for each kind of guidance the doctors given, and the same as independent models."""
    make = ARCHITECTURES[request.param]
    base = make(0)
    shared, merged = add_adapters(make(0), num_adapters=2)
    shared.set_adapter("adapter_1")
    two = [make(1), make(2)]
    return {
        "1 doctor": (base, [two[0]], [two[0]], base),
        "2 doctors": (base, two, two, base),
        "adapter doctor": (shared, [Doctor(shared, adapter="adapter_1")], [merged[1]], base),
    }


def run(patient, guide, mode: str, inputs):
    kwargs = MODES[mode] | ({"assistant_model": llama(9)} if mode == "assisted" else {})
    if mode == "speculative" and not isinstance(guide, DoctorGuidedLogitsProcessor):
        kwargs = {}  # the oracle of greedy speculation is greedy search
    settings = dict(return_dict_in_generate=True, output_scores=True, max_new_tokens=10)
    if isinstance(guide, DoctorGuidedLogitsProcessor):
        torch.manual_seed(0)
        defaults = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
        return guided_generate(patient, guide, **inputs, **(defaults | settings | kwargs))
    return generate(patient, guide, inputs, **settings, **kwargs)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("doctors", ["1 doctor", "2 doctors", "adapter doctor"])
@pytest.mark.parametrize(
    "mode, prompts",
    [(mode, prompts) for mode in MODES for prompts in PROMPTS if prompts == "1 prompt" or mode not in ONE_ROW_MODES],
)
def test_tokens_and_scores_are_those_of_guidance_from_scratch(cast, mode, prompts, doctors, cache):
    """Else some mode would be guided by another row, another time, or another model. Static caches are compiled."""
    patient, given, independent, plain_patient = cast[doctors]
    inputs, betas = PROMPTS[prompts], [0.8, 0.3][: len(given)]
    static = dict(cache_implementation=cache, compile_config=COMPILED) if cache else {}
    guide = DoctorGuidedLogitsProcessor(given, alpha=1.0, beta=betas, **static)
    found = run(patient, guide, mode, inputs)
    plain = PlainGuidance(independent, betas, 1.0, inputs["attention_mask"])
    expected = run(plain_patient, plain, mode, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-4, rtol=0)


def test_an_adapter_doctor_leaves_no_trace_in_the_patient(cast):
    """Else a guided request would change the unguided one that comes after it."""
    shared, given, _, _ = cast["adapter doctor"]
    ids = PROMPTS["1 prompt"]["input_ids"]
    active, with_adapter = shared.active_adapter, shared(ids).logits
    guide = DoctorGuidedLogitsProcessor(given, alpha=1.0, beta=0.8)
    settings = dict(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    guided_generate(shared, guide, **settings)
    assert shared.active_adapter == active and torch.equal(shared(ids).logits, with_adapter)
    hook = given[0].model.base_model.model.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(MemoryError):
        guided_generate(shared, guide, **settings)
    hook.remove()
    assert torch.equal(shared(ids).logits, with_adapter)  # also after a failure in the middle


@pytest.mark.parametrize("prompts", PROMPTS)
def test_an_adapter_doctor_is_read_in_the_patients_forward_pass(cast, prompts):
    """Else a doctor that shares the patient's weights would cost a second pass over them for every token."""
    shared, given, merged, base = cast["adapter doctor"]
    inputs, forwards = PROMPTS[prompts], []
    doctors = [*given, Doctor(shared, adapter="adapter_0"), merged[0]]  # the last one has weights of its own
    guide = DoctorGuidedLogitsProcessor(doctors, alpha=1.0, beta=[0.5, 0.4, 0.3], reference=[None, None, None])
    run(shared, guide, "greedy", inputs)  # tests how the models are read, once
    for memory in guide.memories:
        memory.faults()
    hook = shared.get_base_model().register_forward_hook(lambda *_: forwards.append(1))
    one_pass = run(shared, guide, "greedy", inputs)
    assert len(forwards) == 10
    forwards.clear()
    with shared.disable_adapter():
        guide.reset(attention_mask=inputs["attention_mask"])
        two_passes = shared.get_base_model().generate(
            **inputs, logits_processor=[guide], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    hook.remove()
    assert torch.equal(two_passes, one_pass.sequences) and len(forwards) == 30
    assert not any(layer._forward_pre_hooks for layer in shared.modules())


KINDS = {
    "plain": dict(),
    "DoRA": dict(use_dora=True),
    "biases": dict(bias="lora_only"),
    "experts and embeddings": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved modules": dict(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_of_an_adapter_on_the_patient_is_its_reference(kind, prompts):
    """Whatever kind of adapter: one that cannot share the forward pass must not be read as the base model in it."""
    shared, merged = add_adapters(llama(0), **KINDS[kind])
    guide = DoctorGuidedLogitsProcessor(
        Doctor(shared, adapter="adapter_0"), beta=0.9, reference=Doctor(shared, adapter="__base__")
    )
    inputs = PROMPTS[prompts]
    plain = PlainGuidance([merged[0], llama(0)], [0.9, -0.9], 1.0, inputs["attention_mask"])
    expected = run(llama(0), plain, "greedy", inputs).sequences
    assert torch.equal(run(shared, guide, "greedy", inputs).sequences, expected)
    assert not torch.equal(
        expected, run(llama(0), PlainGuidance([], [], 1.0, inputs["attention_mask"]), "greedy", inputs).sequences
    )


def test_doctors_on_the_patients_weights_may_differ_in_how_they_are_read():
    """An adapter that could share the forward pass, beside one with a prompt of its own that cannot."""
    shared, merged = add_adapters(llama(0), num_adapters=2)
    inputs, prompt = PROMPTS["1 prompt"], [BOS, 3, 7]
    own = Doctor(shared, adapter="adapter_1", prompt=batch(prompt))
    guide = DoctorGuidedLogitsProcessor([Doctor(shared, adapter="adapter_0"), own], alpha=1.0, beta=[0.8, 0.6])
    usual = inputs["input_ids"][0].tolist()
    plain = PromptedGuidance(merged, [0.8, 0.6], 1.0, inputs, [[usual], [prompt]])
    expected = run(llama(0), plain, "greedy", inputs).sequences
    assert torch.equal(run(shared, guide, "greedy", inputs).sequences, expected)


def test_the_patient_keeps_an_adapter_that_is_no_doctor():
    """Else a fine-tuned patient would be guided as its base model."""
    shared, merged = add_adapters(llama(0), num_adapters=2)
    inputs = PROMPTS["4 prompts"]
    shared.set_adapter("adapter_0")
    for doctor, independent, alpha, beta in (
        (Doctor(shared, adapter="adapter_1"), merged[1], 1.0, 0.8),
        (Doctor(shared, adapter="__base__"), llama(0), 1.5, -0.5),  # the fine-tuning, amplified
    ):
        guide = DoctorGuidedLogitsProcessor(doctor, alpha=alpha, beta=beta)
        for mode in ("greedy", "beam"):
            plain = PlainGuidance([independent], [beta], alpha, inputs["attention_mask"])
            expected = run(merged[0], plain, mode, inputs).sequences
            assert torch.equal(run(shared, guide, mode, inputs).sequences, expected), (mode, alpha)


def test_a_doctor_is_the_adapter_that_was_active_when_it_was_made():
    """Else switching adapters would change doctors that are in use, and what they remember would be another's."""
    shared, merged = add_adapters(llama(0), num_adapters=2)
    inputs, guides = PROMPTS["4 prompts"], []
    for name in ("adapter_0", "adapter_1"):
        shared.set_adapter(name)
        guides.append(DoctorGuidedLogitsProcessor(shared, alpha=1.0, beta=0.8))
    for guide, independent in zip(guides * 2, merged * 2, strict=True):
        plain = PlainGuidance([independent], [0.8], 1.0, inputs["attention_mask"])
        expected = run(llama(7), plain, "greedy", inputs).sequences
        assert torch.equal(run(llama(7), guide, "greedy", inputs).sequences, expected)
    with pytest.raises(ValueError, match="cancels the guidance"):
        DoctorGuidedLogitsProcessor(shared, reference=Doctor(shared, adapter="adapter_1"))
    shared.base_model.set_adapter(["adapter_0", "adapter_1"])
    assert Doctor(shared).adapters == ("adapter_0", "adapter_1")
    shared.set_adapter("adapter_0")
    shared.merge_adapter()
    with pytest.raises(ValueError, match="must not be merged"):
        Doctor(shared)


@pytest.mark.parametrize(
    "options", [dict(min_patient_entropy=2.0), dict(beta=lambda step: float(step % 2)), dict(beta=0.0)]
)
def test_an_adapter_doctor_that_is_not_heard_at_every_step(options):
    """It has a pass of its own, when it is heard."""
    shared, merged = add_adapters(llama(0))
    inputs, options = PROMPTS["4 prompts"], dict(alpha=1.0, beta=0.8) | options
    expected = run(llama(0), DoctorGuidedLogitsProcessor(merged[0], **options), "greedy", inputs).sequences
    found = run(shared, DoctorGuidedLogitsProcessor(shared, **options), "greedy", inputs).sequences
    assert torch.equal(found, expected)


def test_two_adapters_at_once_are_one_doctor():
    """Rows of one forward pass have one adapter each, so such a doctor has a pass of its own."""
    shared, _ = add_adapters(llama(0), num_adapters=2)
    shared.base_model.set_adapter(["adapter_0", "adapter_1"])
    independent = copy.deepcopy(shared).merge_and_unload(adapter_names=["adapter_0", "adapter_1"]).eval()
    inputs = PROMPTS["1 prompt"]
    plain = PlainGuidance([independent], [0.8], 1.0, inputs["attention_mask"])
    expected = run(llama(0), plain, "greedy", inputs).sequences
    guide = DoctorGuidedLogitsProcessor(shared, alpha=1.0, beta=0.8)
    assert torch.equal(run(shared, guide, "greedy", inputs).sequences, expected)


def test_an_adapter_loaded_by_transformers_is_a_doctor():
    """`model.add_adapter` makes no `PeftModel`, and has the same layers."""
    model, twin = llama(0), llama(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for one in (model, twin):
        torch.manual_seed(0)
        one.add_adapter(config, adapter_name="helpful")
        one.double().eval()
    inputs = PROMPTS["4 prompts"]
    plain = PlainGuidance([twin], [0.8], 1.0, inputs["attention_mask"])
    expected = run(llama(0), plain, "greedy", inputs).sequences
    for doctor in (model, Doctor(model, adapter="helpful")):
        guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8)
        assert torch.equal(run(model, guide, "greedy", inputs).sequences, expected)


@pytest.mark.parametrize(
    "extra",
    [
        dict(prompt_lookup_num_tokens=1),
        dict(guidance_scale=1.5),
        dict(generation_config=GenerationConfig(max_new_tokens=10, do_sample=False)),
        dict(cache_implementation="static"),
        dict(output_hidden_states=True),
    ],
)
def test_modes_that_a_shared_forward_pass_is_not_for(extra):
    """They get a pass for each model, and the same tokens."""
    shared, merged = add_adapters(llama(0))
    inputs, base = PROMPTS["1 prompt"], llama(0)
    if "generation_config" in extra:
        shared.generation_config.num_beams = base.generation_config.num_beams = 3  # filled in by `generate`
    guide = DoctorGuidedLogitsProcessor(shared, alpha=1.0, beta=0.8)
    settings = dict(max_new_tokens=10, do_sample=False, return_dict_in_generate=True) | extra
    plain = PlainGuidance(merged, [0.8], 1.0, inputs["attention_mask"])
    expected = base.generate(**inputs, **settings, logits_processor=[plain])
    found = guided_generate(shared, guide, **inputs, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    if "output_hidden_states" in extra:
        assert found.hidden_states[0][0].shape == expected.hidden_states[0][0].shape


def test_a_cache_that_comes_back_is_the_patients():
    """Else the next turn would go on from what a doctor made of the text."""
    shared, merged = add_adapters(llama(0), num_adapters=2)
    inputs = PROMPTS["1 prompt"]
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    for name, other in (("adapter_0", merged[0]), ("adapter_1", merged[1])):
        guide = DoctorGuidedLogitsProcessor(Doctor(shared, adapter=name), alpha=1.0, beta=0.8)
        shared.set_adapter(name)
        found = guided_generate(shared, guide, **inputs, **settings)
        assert found.past_key_values.layers[0].keys.size(0) == 1
        plain = DoctorGuidedLogitsProcessor(other, alpha=1.0, beta=0.8)
        ids = found.sequences
        expected = guided_generate(llama(0), plain, input_ids=ids, **settings).sequences
        again = guided_generate(shared, guide, input_ids=ids, **settings, past_key_values=found.past_key_values)
        assert torch.equal(again.sequences, expected)


def test_two_adapters_of_one_model_are_two_doctors():
    """Else helpful and harmless adapters would need two copies of the weights."""
    shared, merged = add_adapters(llama(0), num_adapters=2)
    inputs, betas = PROMPTS["4 prompts"], [0.9, -0.4]
    doctors = [Doctor(shared, adapter="adapter_0"), Doctor(shared, adapter="adapter_1")]
    guide = DoctorGuidedLogitsProcessor(doctors, alpha=1.0, beta=betas)
    expected = run(llama(0), PlainGuidance(merged, betas, 1.0, inputs["attention_mask"]), "greedy", inputs)
    assert torch.equal(run(shared, guide, "greedy", inputs).sequences, expected.sequences)


def test_the_base_of_an_adapter_is_its_reference():
    """Else ratio decoding with a LoRA doctor would hold the base model twice."""
    doctor, merged = add_adapters(llama(1))
    guide = DoctorGuidedLogitsProcessor(doctor, beta=0.9, reference=Doctor(doctor, adapter="__base__"))
    inputs = PROMPTS["4 prompts"]
    plain = PlainGuidance([merged[0], llama(1)], [0.9, -0.9], 1.0, inputs["attention_mask"])
    expected = run(llama(0), plain, "greedy", inputs)
    assert torch.equal(run(llama(0), guide, "greedy", inputs).sequences, expected.sequences)


class PromptedGuidance(PlainGuidance):
    """From scratch, with a prompt of its own for each doctor: None is the patient's."""

    def __init__(self, doctors, exponents, alpha, inputs, prompts):
        super().__init__(doctors, exponents, alpha, inputs["attention_mask"])
        self.num_prompt_tokens, self.prompts = inputs["input_ids"].size(1), prompts

    def __call__(self, input_ids, scores):
        copies = len(input_ids) // len(self.num_padding)
        rows = []
        for row, (ids, patient) in enumerate(zip(input_ids, scores, strict=True)):
            logps = self.alpha * patient.double().log_softmax(-1)
            for doctor, exponent, prompts in zip(self.doctors, self.exponents, self.prompts, strict=True):
                text = torch.cat([torch.tensor(prompts[row // copies]), ids[self.num_prompt_tokens :]])
                logps = logps + exponent * doctor(text[None], use_cache=False).logits[0, -1].log_softmax(-1)
            rows.append(logps.log_softmax(-1).to(scores.dtype))
        return torch.stack(rows)


@pytest.mark.parametrize("mode", ["greedy", "sample", "beam"])
def test_the_patient_under_two_instructions_guides_itself(mode):
    """Training-free guidance by the faces: a doctor and its reference are the patient with other prompts."""
    patient, inputs = llama(0), PROMPTS["4 prompts"]
    positive = [[BOS, 3, 7, 7], [BOS, 3, 11], [BOS, 3, 4, 30, 8], [3, 9]]
    negative = [[BOS, 4, 6, 7], [4, 11], [BOS, 4, 4, 30, 8, 12], [4, 9]]
    guide = DoctorGuidedLogitsProcessor(
        Doctor(patient, prompt=batch(*positive)), beta=0.7, reference=Doctor(patient, prompt=batch(*negative))
    )
    plain = PromptedGuidance([patient, patient], [0.7, -0.7], 1.0, inputs, [positive, negative])
    expected = run(patient, plain, mode, inputs)
    assert torch.equal(run(patient, guide, mode, inputs).sequences, expected.sequences)
    with pytest.raises(ValueError, match="Got 4 entries for 1 prompts"):
        run(patient, guide, "greedy", PROMPTS["1 prompt"])


def test_a_schedule_gives_each_step_its_weight():
    """Else guidance could not fade, or begin after a fixed opening."""
    patient, doctor, inputs = llama(0), llama(1), PROMPTS["4 prompts"]

    class Scheduled(PlainGuidance):
        def __call__(self, input_ids, scores):
            step = input_ids.size(1) - inputs["input_ids"].size(1)
            self.exponents, self.alpha = [beta(step)], 1 - beta(step)
            return super().__call__(input_ids, scores)

    def beta(step):
        return 0.9 if step % 3 == 2 else 0.0

    expected = run(patient, Scheduled([doctor], [0], 1, inputs["attention_mask"]), "greedy", inputs).sequences
    guide = DoctorGuidedLogitsProcessor(doctor, beta=beta)
    reads = []
    doctor.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].size(1)), with_kwargs=True
    )
    for _ in range(2):  # the second prompt begins at step 0 again
        reads.clear()
        assert torch.equal(run(patient, guide, "greedy", inputs).sequences, expected)
    assert reads == [inputs["input_ids"].size(1) + 2, 3, 3]  # at steps 2, 5 and 8 alone, what has come since
    with pytest.raises(ValueError, match="`beta` must be finite"):
        run(patient, DoctorGuidedLogitsProcessor(doctor, beta=lambda step: float("nan")), "greedy", inputs)
    with pytest.raises(ValueError, match="pass `alpha`"):
        run(patient, DoctorGuidedLogitsProcessor(doctor, beta=lambda step: 1.0 + step), "greedy", inputs)


def test_a_plausibility_mask_rules_out_what_the_patient_does_not_believe():
    """Else a strong doctor could bring in tokens that make no sense to the patient."""
    torch.manual_seed(0)
    scores, ids = torch.randn(1, VOCABULARY, dtype=torch.float64) * 3, torch.tensor([[BOS, 5]])
    plain = DoctorGuidedLogitsProcessor(llama(1), alpha=1.0, beta=2.0)(ids, scores).exp()
    masked = DoctorGuidedLogitsProcessor(llama(1), alpha=1.0, beta=2.0, min_patient_prob=0.1)(ids, scores).exp()
    probs = scores.softmax(-1)
    believed = probs >= 0.1 * probs.max()
    assert 1 < believed.sum() < VOCABULARY
    torch.testing.assert_close(masked, plain * believed / plain[believed].sum())
    assert DoctorGuidedLogitsProcessor(llama(1), min_patient_prob=1.0)(ids, scores).argmax() == scores.argmax()


def test_an_entropy_gate_leaves_the_patient_alone_where_it_is_sure():
    """Else doctors would be paid, and heard, where there is nothing to decide."""
    patient, inputs, nats = llama(0), PROMPTS["4 prompts"], 2.0

    class Gated(PlainGuidance):
        def __call__(self, input_ids, scores):
            probs = scores.double().softmax(-1)
            is_sure = -(probs * probs.log()).sum(-1, keepdim=True) < nats
            gates.append(is_sure)
            return torch.where(is_sure, scores.log_softmax(-1), super().__call__(input_ids, scores))

    gates, doctor = [], llama(1)
    expected = run(patient, Gated([doctor], [0.8], 1.0, inputs["attention_mask"]), "sample", inputs).sequences
    found = torch.cat(gates)
    assert found.any() and not found.all()  # or the test shows nothing
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8, min_patient_entropy=nats)
    assert torch.equal(run(patient, guide, "sample", inputs).sequences, expected)
    one, gates[:], reads = PROMPTS["1 prompt"], [], []
    expected = run(patient, Gated([doctor], [0.8], 1.0, one["attention_mask"]), "sample", one).sequences
    assert not any(DoctorMemory(Doctor(doctor)).faults().values())  # tried out once, and not counted
    doctor.register_forward_pre_hook(lambda *_: reads.append(1))
    assert torch.equal(run(patient, guide, "sample", one).sequences, expected)
    assert len(reads) == (~torch.cat(gates)).sum() < len(gates)  # it was not read where the patient was sure


def test_a_doctor_has_the_adapter_that_it_names():
    """Else a misspelt adapter would guide as the base model."""
    shared, _ = add_adapters(llama(0))
    with pytest.raises(ValueError, match="one of \\['adapter_0'\\]. Got 'helpful'"):
        Doctor(shared, adapter="helpful")
    with pytest.raises(ValueError, match="left-padded"):
        Doctor(shared, prompt={"input_ids": torch.tensor([[1, 0]]), "attention_mask": torch.tensor([[1, 0]])})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_text_any_weights(data):
    """Lengths, ends of rows, padding and exponents that nobody thought of."""
    prompt = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=7)
    inputs = batch(*data.draw(st.lists(prompt, min_size=1, max_size=4)))
    alpha, betas = data.draw(st.floats(0, 2)), [data.draw(st.floats(-1, 2)) for _ in range(2)]
    eos = data.draw(st.lists(st.integers(3, VOCABULARY - 1), max_size=12))
    kwargs = dict(
        eos_token_id=eos or None,
        do_sample=data.draw(st.booleans()),
        num_beams=data.draw(st.sampled_from([1, 1, 3])),
        max_new_tokens=data.draw(st.integers(1, 8)),
    )
    guide = DoctorGuidedLogitsProcessor(PAIR, alpha=alpha, beta=betas, attention_mask=inputs["attention_mask"])
    plain = PlainGuidance(PAIR, betas, alpha, inputs["attention_mask"])
    expected = generate(PATIENT, plain, inputs, **kwargs)
    assert torch.equal(generate(PATIENT, guide, inputs, **kwargs), expected)


PATIENT, PAIR = llama(0), [llama(1), gpt2(2)]


def live_tensor_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]  # a compiler has others
    return sum(x.untyped_storage().nbytes() for x in {x.data_ptr(): x for x in tensors}.values())


def test_many_calls_equal_as_many_fresh_processors_and_leave_nothing():
    """Else a service would go wrong, or out of memory, after a day."""
    draw = random.Random(0)
    patient, doctor = llama(0), llama(1)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8)
    modes = [dict(), dict(do_sample=True), dict(num_beams=2), dict(num_return_sequences=2, do_sample=True)]
    single = [dict(prompt_lookup_num_tokens=2), dict(speculative=True, do_sample=True)]
    text, sizes = None, []
    for call in range(300):
        num_rows = draw.choice([1, 1, 2, 4])
        inputs = batch(*([draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 6))] for _ in range(num_rows)))
        if text is not None and draw.random() < 0.3:  # a conversation that goes on
            inputs = batch(text + [draw.randrange(3, VOCABULARY)])
        mode = draw.choice(modes + single * (len(inputs["input_ids"]) == 1))
        kwargs = dict(max_new_tokens=draw.randint(1, 4), eos_token_id=[7, 8, 9], pad_token_id=0) | mode
        outputs = []
        for processor in (guide, DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.8)):
            torch.manual_seed(call)
            outputs.append(guided_generate(patient, processor, keep_memory=True, **inputs, **kwargs))
        assert torch.equal(*outputs), (call, kwargs)
        text = outputs[0][0].tolist() if len(inputs["input_ids"]) == 1 and len(outputs[0][0]) < 30 else None
        if call % 30 == 29:
            guide.reset()
            del processor, outputs
            sizes.append(live_tensor_bytes())
    assert max(sizes[1:]) <= sizes[0] + 4096


@pytest.mark.parametrize("how", ["reset", "dropped"])
def test_the_cache_is_freed(how):
    """Else every finished conversation would keep its memory."""
    guide = DoctorGuidedLogitsProcessor(llama(1))
    guided_generate(PATIENT, guide, **PROMPTS["4 prompts"], max_new_tokens=3)
    layer = weakref.ref(guide.memories[0].cache.layers[0].keys)
    assert layer() is not None
    if how == "reset":
        guide.reset()
    else:
        del guide
    gc.collect()
    assert layer() is None
