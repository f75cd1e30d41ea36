# SPDX-License-Identifier: Apache-2.0

"""Adapters that start at the credits of the tokens: a LoRA of rank 1 on the language model head."""

import json

import pytest
import torch
from conftest import FACES, make_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from trainers import config

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOTrainer, annotate_token_rewards, guided_generate, load_doctor
from trl_tfpo.decoding.shared_forward import can_share
from trl_tfpo.models.doctor import make_doctor
from trl_tfpo.models.head_adapter import has_adapted_head, has_zero_lora, with_lora_on_head


TEMPERATURE = 0.5
IDS = torch.tensor([[5, 6, 7, 8, 2], [5, 9, 2, 0, 0], [4, 5, 6, 7, 8]])
ATTENTION_MASK, COMPLETION_MASK = IDS > 0, (IDS > 0) & (torch.arange(5) > 0)


@pytest.fixture
def base():
    """A model with tied embeddings, as small models have."""
    model = make_llama(2, hidden_size=16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.fixture
def trainer(base, patient, preferences, tokenizer, tmp_path):
    """Of an adapter on a model that is saved, with calibrated rewards, before any step."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    base.save_pretrained(tmp_path / "base")
    return TFPOTrainer(
        model=str(tmp_path / "base"),
        args=config(
            tmp_path / "doctor",
            max_steps=2,
            learning_rate=1e-2,
            policy="doctor",
            calibrate_rewards=True,
            reward_temperature=TEMPERATURE,
        ),
        train_dataset=Dataset.from_list(annotated.to_list() * 5),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


@torch.no_grad()
def logps(model, ids=IDS):
    return model(ids).logits.log_softmax(dim=-1)


def test_an_adapter_starts_at_the_credits(trainer, base):
    """Most of the gain is in the credits; an adapter that starts at zero has to find them in a few hundred pairs."""
    wanted = trainer.calibration.credits / TEMPERATURE
    wanted = wanted - wanted.mean()
    row = trainer.train_dataset[0]
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    added = logps(trainer.model, ids) - logps(base, ids)
    added = (added - added.mean(dim=-1, keepdim=True))[0, len(row["prompt_ids"]) - 1 : -1]
    shares = (added @ wanted) / (wanted @ wanted)  # about 1 at every state
    assert wanted.abs().max() > 0.1 and (shares - 1).abs().max() < 0.2
    torch.testing.assert_close(added, shares[:, None] * wanted, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_guided_flow_says_that_it_starts_without_credits(
    base, patient, preferences, tokenizer, tmp_path
):
    """Its head is new and starts at zero: the rewards would be calibrated, and most of what they give lost."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    with pytest.warns(UserWarning, match="Got an adapter of guided flow, which starts without them"):
        TFPOTrainer(
            model=base,
            args=config(tmp_path, max_steps=2, calibrate_rewards=True),
            train_dataset=Dataset.from_list(annotated.to_list() * 5),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4),
        )


def test_the_reference_is_the_model_without_the_credits(trainer, base):
    """Measured from the credits, what the rewards are worth would be counted twice."""
    row = trainer.train_dataset[0]
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    expected = logps(base, ids)[0, len(row["prompt_ids"]) - 1 : -1].gather(1, torch.tensor(row["chosen_ids"])[:, None])
    torch.testing.assert_close(torch.tensor(row["chosen_ref_logps"]), expected[:, 0], atol=1e-4, rtol=1e-4)


def test_credits_stay_while_the_layers_learn(trainer):
    """A free number for each token learns the noise of the pairs."""
    before = {name: x.clone() for name, x in trainer.model.named_parameters() if "lora_" in name}
    trainer.train()
    for name, matrix in trainer.model.named_parameters():
        if "lora_" in name:
            assert matrix.equal(before[name]) == ("lm_head" in name), name
    head = trainer.model.get_output_embeddings()
    assert (
        head.lora_B["default"].weight.any() and head.base_layer.weight is trainer.model.get_input_embeddings().weight
    )


def test_a_trained_doctor_goes_on_with_its_credits(trainer, tmp_path):
    """Credits that are fitted anew would undo what the layers have learned about the old ones."""
    trainer.save_model()
    doctor = make_doctor(load_doctor(tmp_path / "doctor"), has_credits=True)
    head, before = doctor.get_output_embeddings(), trainer.model.get_output_embeddings()
    assert head.lora_B["default"].weight.equal(before.lora_B["default"].weight) and not has_zero_lora(doctor)
    assert not any(x.requires_grad for x in head.parameters())
    assert any(x.requires_grad for name, x in doctor.named_parameters() if "q_proj.lora_A" in name)


def test_the_folder_is_a_small_ordinary_adapter(trainer, base, tmp_path):
    """An adapter on the head is saved without the tied embeddings, which PEFT adds: 113 MB for a model of 135M."""
    trainer.train()
    trainer.save_model()
    state = load_file(tmp_path / "doctor" / "adapter_model.safetensors")
    assert all("lora_" in name or "value_head" in name for name in state)
    of_head = sum(x.numel() for name, x in state.items() if "lm_head" in name)
    assert of_head == base.config.vocab_size + base.config.hidden_size
    before = logps(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "doctor").eval()
    torch.testing.assert_close(logps(loaded), logps(trainer.model.eval()), atol=1e-5, rtol=1e-5)
    assert (logps(loaded) - before).abs().max() > 0.1
    with loaded.disable_adapter():
        torch.testing.assert_close(logps(loaded), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha, beta", [(None, 0.7), (-0.5, 1.5)])
def test_it_is_decoded_in_one_pass_as_in_two(trainer, base, tmp_path, alpha, beta):
    """A head that ignores which row is the doctor's would give its credits to the patient as well."""
    trainer.train()
    trainer.save_model()
    alone = make_llama(2, hidden_size=16)
    alone.load_state_dict(base.state_dict())
    doctor = PeftModel.from_pretrained(base, tmp_path / "doctor").eval()
    prompt = dict(input_ids=IDS[[0, 2]], attention_mask=ATTENTION_MASK[[0, 2]].long())
    settings = dict(max_new_tokens=6, do_sample=False, output_logits=True, output_scores=True)
    settings |= dict(return_dict_in_generate=True, eos_token_id=None)
    guides = [DoctorGuidedLogitsProcessor(doctor, alpha=alpha, beta=beta) for _ in range(2)]
    assert can_share(doctor, guides[0]) and not can_share(alone, guides[1])
    one, two = (
        guided_generate(x, guide, **prompt, **settings) for x, guide in zip((doctor, alone), guides, strict=True)
    )
    assert one.sequences.equal(two.sequences)
    for a, b in zip(one.scores, two.scores, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), atol=1e-4, rtol=1e-4)
    patient_logps, doctor_logps = (logps(model, prompt["input_ids"])[:, -1] for model in (alone, doctor))
    expected = (1 - beta) * patient_logps + beta * doctor_logps
    torch.testing.assert_close(one.scores[0].log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"r": 3}, {"r": 3, "use_dora": True}, {"r": 3, "lora_bias": True}], ids=str)
def test_log_probabilities_and_gradients_are_those_of_the_adapted_head(base, settings):
    """A fused head that reads the weights alone would train an adapter of another model."""
    peft_config = LoraConfig(target_modules=["q_proj", "lm_head"], lora_alpha=5, init_lora_weights=False, **settings)
    doctor = make_doctor(base, peft_config)
    assert has_adapted_head(doctor)
    said = doctor(input_ids=IDS, attention_mask=ATTENTION_MASK.long(), completion_mask=COMPLETION_MASK)
    loss = said.doctor_logps[said.completion_mask].square().sum()
    trained = [x for name, x in doctor.named_parameters() if "lora_" in name]
    found = torch.autograd.grad(loss, trained)
    plain = doctor(IDS, attention_mask=ATTENTION_MASK.long()).logits[:, :-1].log_softmax(dim=-1)
    plain = plain.gather(2, IDS[:, 1:, None])[..., 0][COMPLETION_MASK[:, 1:]]
    torch.testing.assert_close(said.doctor_logps[said.completion_mask], plain, atol=1e-5, rtol=1e-4)
    for a, b in zip(found, torch.autograd.grad(plain.square().sum(), trained), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "targets, layers", [("all-linear", None), (["q_proj", "v_proj"], [1]), (r".*layers\.1.*_proj", None), (None, None)]
)
def test_the_head_is_added_to_any_targets(base, targets, layers):
    """Targets by name, by pattern or by default: with one of them the credits would be left out without a word."""
    peft_config = LoraConfig(r=4, target_modules=targets, layers_to_transform=layers)
    before = json.dumps(peft_config.to_dict(), default=str)
    plain = make_doctor(make_llama(2), peft_config)
    doctor = make_doctor(base, peft_config, has_credits=True)
    assert json.dumps(peft_config.to_dict(), default=str) == before
    names = [{name for name, _ in model.named_parameters() if "lora_A" in name} for model in (plain, doctor)]
    assert names[1] - names[0] == {"base_model.model.lm_head.lora_A.default.weight"} and names[0] < names[1]
    head = doctor.get_output_embeddings()
    assert head.r["default"] == 1 and head.scaling["default"] == 1
    assert not any(x.requires_grad for x in head.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=str,
)
def test_adapters_without_a_place_for_credits_are_left_as_they_are(base, settings):
    """An adapter that rewrites the weights under it would change the embeddings that the head is tied to."""
    peft_config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings)
    assert with_lora_on_head(base, peft_config) is peft_config
