# SPDX-License-Identifier: Apache-2.0

"""The doctor: a causal language model like any other, until its completions are to be scored."""

import pickle

import pytest
import torch
from conftest import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from trl_tfpo import load_doctor
from trl_tfpo.models.doctor import add_value_head


INPUT_IDS = torch.tensor([[5, 6, 7, 8, 2], [5, 9, 2, 0, 0], [4, 5, 6, 7, 8]])
ATTENTION_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
COMPLETION_MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)


def make_gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=22, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_output_is_left_aligned_on_the_completion(make):
    """Off by one, and every log-probability belongs to the neighbouring token."""
    doctor = make(3)
    with torch.no_grad():
        plain = doctor(INPUT_IDS, attention_mask=ATTENTION_MASK, output_hidden_states=True)
    add_value_head(doctor)
    torch.nn.init.normal_(doctor.value_head.weight)
    with torch.no_grad():
        output = doctor(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, completion_mask=COMPLETION_MASK)
    assert output.completion_mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert output.completion_ids[output.completion_mask].tolist() == [7, 8, 2, 9, 2, 8]
    logps = plain.logits.log_softmax(-1)
    for row, start in enumerate((2, 1, 4)):
        for t in range(output.completion_mask[row].sum()):
            wanted = logps[row, start + t - 1, INPUT_IDS[row, start + t]]
            torch.testing.assert_close(output.doctor_logps[row, t], wanted, atol=1e-5, rtol=1e-5)
        for t in range(output.completion_mask[row].sum() + 1):
            wanted = doctor.value_head(plain.hidden_states[-1][row, start + t - 1])
            torch.testing.assert_close(output.log_values[row, t], wanted, atol=1e-5, rtol=1e-5)


def test_what_others_say_is_in_the_state_before_the_next_turn():
    """A state of its own for each token of a user would let flow leak into words that nobody chose."""
    doctor = make_llama(3)
    add_value_head(doctor)
    torch.nn.init.normal_(doctor.value_head.weight)
    ids, mask = (
        torch.tensor([[5, 6, 7, 2, 8, 9], [5, 6, 7, 2, 0, 0]]),
        torch.tensor([[0, 1, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0]]),
    )
    with torch.no_grad():
        plain = doctor(ids, output_hidden_states=True)
        output = doctor(input_ids=ids, attention_mask=(ids > 0).long(), completion_mask=mask.bool())
    assert output.completion_ids.tolist() == [[6, 8, 9], [6, 7, 2]]
    assert output.completion_mask.all()
    values = doctor.value_head(plain.hidden_states[-1])
    torch.testing.assert_close(output.log_values, values.gather(1, torch.tensor([[0, 3, 4, 5], [0, 1, 2, 3]])))
    logps = plain.logits.log_softmax(-1)[0, [0, 3, 4], [6, 8, 9]]
    torch.testing.assert_close(output.doctor_logps[0], logps, atol=1e-5, rtol=1e-5)


def test_gradients_match_the_plain_forward():
    """The fused head computes its own backward; the doctor learns from it."""
    doctor, twin = make_llama(3), make_llama(3)
    add_value_head(doctor)
    output = doctor(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, completion_mask=COMPLETION_MASK)
    output.doctor_logps[output.completion_mask].square().sum().backward()
    logps = twin(INPUT_IDS, attention_mask=ATTENTION_MASK).logits[:, :-1].log_softmax(-1)
    logps.gather(2, INPUT_IDS[:, 1:, None])[..., 0][COMPLETION_MASK[:, 1:]].square().sum().backward()
    for name, other in twin.named_parameters():
        torch.testing.assert_close(doctor.get_parameter(name).grad, other.grad, atol=1e-4, rtol=1e-4)


def test_forward_and_generate_are_unchanged():
    """A doctor still has to speak."""
    doctor, twin = make_llama(3), make_llama(3)
    add_value_head(doctor)
    torch.testing.assert_close(doctor(INPUT_IDS).logits, twin(INPUT_IDS).logits)
    settings = dict(attention_mask=ATTENTION_MASK[:1], max_new_tokens=5, do_sample=False)
    assert doctor.generate(INPUT_IDS[:1], **settings).equal(twin.generate(INPUT_IDS[:1], **settings))


def test_a_doctor_can_be_pickled():
    """Processes that are spawned receive models as pickles. The class of a doctor has no name of its own."""
    doctor = make_llama(3)
    add_value_head(doctor)
    restored = pickle.loads(pickle.dumps(doctor))
    batch = dict(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, completion_mask=COMPLETION_MASK)
    torch.testing.assert_close(restored(**batch).doctor_logps, doctor(**batch).doctor_logps)


def test_values_are_float32_whatever_the_model_is():
    """bfloat16 has a spacing of half a nat at 100: flows would not be comparable."""
    doctor = make_llama(3).to(torch.bfloat16)
    add_value_head(doctor)
    output = doctor(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, completion_mask=COMPLETION_MASK)
    assert doctor.value_head.weight.dtype == output.log_values.dtype == output.doctor_logps.dtype == torch.float32


def test_full_model_round_trip(tmp_path):
    """The folder is an ordinary model for everybody else, and a doctor for us."""
    doctor = make_llama(3)
    add_value_head(doctor)
    torch.nn.init.normal_(doctor.value_head.weight)
    doctor.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain, "value_head")
    torch.testing.assert_close(plain(INPUT_IDS).logits, doctor(INPUT_IDS).logits)
    assert load_doctor(tmp_path).value_head.weight.equal(doctor.value_head.weight)
    assert not hasattr(load_doctor(tmp_path, with_value_head=False), "value_head")


def test_adapter_round_trip(tmp_path):
    """An adapter loaded onto a headless base loses its values in silence; `load_doctor` does not."""
    make_llama(3).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    doctor = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    add_value_head(doctor)
    head = doctor.get_base_model().value_head
    trainable = [name for name, parameter in doctor.named_parameters() if parameter.requires_grad]
    assert any("value_head" in name for name in trainable)
    torch.nn.init.normal_(head.modules_to_save["default"].weight)
    doctor.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    loaded = load_doctor(tmp_path / "adapter")
    assert (
        loaded.get_base_model()
        .value_head.modules_to_save["default"]
        .weight.equal(head.modules_to_save["default"].weight)
    )
    batch = dict(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, completion_mask=COMPLETION_MASK)
    torch.testing.assert_close(loaded(**batch).log_values, doctor.eval()(**batch).log_values)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(plain(INPUT_IDS).logits, doctor(INPUT_IDS).logits)


def test_a_model_without_value_head_is_named(tmp_path):
    """Starting again from zero values, unasked, would look like a failed resume."""
    make_llama(3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with_value_head=False"):
        load_doctor(tmp_path)
