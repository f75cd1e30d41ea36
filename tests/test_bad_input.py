# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Wrong input, one row each: the error states the rule, the value got and the remedy, and nothing is written."""

import pytest
import torch
from conftest import WORDS, conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, T5Config, T5ForConditionalGeneration

from trl_tfpo import Faces, TFPOConfig, TFPOTrainer, TokenRewardCollator, annotate_token_rewards


FACES = Faces(positive="you are kind", negative="you are rude")
ROWS = conversational_rows(4)
PERMUTED = " ".join(WORDS.split()[:4] + WORDS.split()[:3:-1])


def edited(**changes):
    return Dataset.from_list([{**row, **changes} for row in ROWS])


def annotate(dataset=None, patient=None, tokenizer=None, faces=FACES, **settings):
    return annotate_token_rewards(
        Dataset.from_list(ROWS) if dataset is None else dataset,
        patient or make_llama(1, 32),
        tokenizer or make_tokenizer(),
        faces=faces,
        **settings,
    )


def train(tmp_path, *, model=None, tokenizer=None, train_dataset=None, settings=None, **arguments):
    return TFPOTrainer(
        model=model or make_llama(2),
        args=TFPOConfig(str(tmp_path / "run"), report_to="none", **(settings or {})),
        train_dataset=annotate() if train_dataset is None else train_dataset,
        processing_class=tokenizer or make_tokenizer(),
        **arguments,
    )


def broken_patient(value):
    patient = make_llama(1, 32)
    with torch.no_grad():
        patient.model.norm.weight.fill_(value)
    return patient


def patient_of_another_family(tmp_path):
    make_llama(1, 32).save_pretrained(tmp_path / "other")
    make_tokenizer(PERMUTED).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=22, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


EMPTY = [{"role": "assistant", "content": ""}]
ANNOTATION = {
    "missing columns": (lambda _: annotate(Dataset.from_list(ROWS).remove_columns("rejected")), "'chosen' and 'rejected'"),
    "empty completion": (lambda _: annotate(edited(chosen=EMPTY)), "at least one token before EOS.*drop_unusable"),
    "empty prompt": (lambda _: annotate(Dataset.from_list([{"prompt": "", "chosen": "good", "rejected": "bad"}])), "at least one token"),
    "prompt longer than max_length": (lambda _: annotate(max_length=5), "shorter than `max_length`.*Got 6 tokens"),
    "nothing usable": (lambda _: annotate(max_length=5, drop_unusable=True), "At least one pair must be usable"),
    "another tokenizer": (lambda tmp: annotate(patient=patient_of_another_family(tmp)), "same tokenizer.*first is id 4"),
    "tokenizer larger than the patient": (lambda _: annotate(patient=make_llama(1, 32, vocab_size=9)), "9 embeddings for 22"),
    "identical faces": (lambda _: Faces(positive="be kind", negative="be kind "), "must differ"),
    "blank face": (lambda _: Faces(positive="be kind", negative=" "), "non-blank"),
    "unknown faces": (lambda _: annotate(faces="kindness"), "'harmlessness'"),
    "faces the patient cannot tell apart": (lambda _: annotate(patient=broken_patient(0.0)), "not zero.*faces"),
    "NaN log-probabilities": (lambda _: annotate(patient=broken_patient(float("nan"))), "must be finite.*nan"),
    "infinite log-probabilities": (lambda _: annotate(patient=broken_patient(float("inf"))), "must be finite"),
    "vision dataset": (lambda _: annotate(Dataset.from_list(ROWS).add_column("images", [[]] * 4)), "vision"),
    "encoder-decoder patient": (lambda _: annotate(patient=tiny_t5()), "causal language model"),
    "unknown direction": (lambda _: annotate(reward_direction="up"), "'label', 'agreement' or 'faces'"),
    "threshold of one": (lambda _: annotate(sparsity_threshold=1.0), r"\[0, 1\)"),
    "negative threshold": (lambda _: annotate(sparsity_threshold=-0.1), r"\[0, 1\)"),
    "rewards of another shape": (lambda _: annotate(reward_fn=lambda positive_logps, **_: positive_logps[:, :1]), "one finite reward"),
    "rewards that are not finite": (lambda _: annotate(reward_fn=lambda positive_logps, **_: positive_logps / 0), "one finite reward"),
}  # fmt: skip
TRAINING = {
    "no dataset": (lambda tmp: TFPOTrainer(model=make_llama(2), args=TFPOConfig(str(tmp / "run"))), "`train_dataset` is required"),
    "no patient": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS), faces=FACES), "needs a patient"),
    "no faces": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS), patient_model=make_llama(1)), "needs `faces`"),
    "annotated by another tokenizer": (lambda tmp: train(tmp, tokenizer=make_tokenizer(PERMUTED)), "annotated with the doctor's tokenizer"),
    "patient of another family": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS), faces=FACES, patient_model=patient_of_another_family(tmp)), "same tokenizer"),
    "tokenizer larger than the doctor": (lambda tmp: train(tmp, model=make_llama(2, vocab_size=9)), "9 embeddings for 22"),
    "streamed raw dataset": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(), patient_model=make_llama(1), faces=FACES, settings={"reference_weight": 0.0}), "token rewards already"),
    "streamed dataset with a reference": (lambda tmp: train(tmp, train_dataset=annotate().to_iterable_dataset(), settings={"max_steps": 1}), "reference_weight=0"),
    "vision dataset": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS).add_column("image", ROWS), patient_model=make_llama(1), faces=FACES), "vision"),
    "adapter on lm_head": (lambda tmp: train(tmp, peft_config=LoraConfig(target_modules=["lm_head"])), "lm_head"),
    "prompt learning": (lambda tmp: train(tmp, peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "Prompt learning"),
    "encoder-decoder doctor": (lambda tmp: train(tmp, model=tiny_t5()), "causal language model"),
    "not a tokenizer": (lambda tmp: train(tmp, tokenizer=object()), "must be a tokenizer"),
    "no completion ends": (lambda tmp: train(tmp, train_dataset=annotate(max_length=8)), "must end in EOS"),
    "quantization of a loaded model": (lambda tmp: train(tmp, quantization_config=BitsAndBytesConfig()), "given by name"),
    "patient in worker processes": (
        lambda tmp: train(
            tmp,
            train_dataset=Dataset.from_list(ROWS),
            data_collator=TokenRewardCollator(make_tokenizer(), patient=make_llama(1), faces=FACES),
            settings={"dataloader_num_workers": 2},
        ),
        "dataloader_num_workers=2",
    ),
}  # fmt: skip
SETTINGS = {
    "negative reward temperature": ({"reward_temperature": -0.25}, "`reward_temperature` must be positive"),
    "negative reference weight": ({"reference_weight": -1.0}, "`reference_weight` must be at least 0"),
    "threshold of one": ({"sparsity_threshold": 1.0}, r"\[0, 1\)"),
    "unknown policy": ({"policy": "patient"}, "`policy` must be 'doctor' or 'guided'"),
    "unknown direction": ({"reward_direction": "labels"}, "'label', 'agreement' or 'faces'"),
    "gap floor of zero": ({"gap_floor": 0.0}, "`gap_floor` must be positive"),
    "importance temperature of zero": ({"importance_temperature": 0.0}, "must be positive"),
    "lambda above one": ({"subtb_lambda": 1.5}, r"\[0, 1\]"),
    "negative value loss weight": ({"value_loss_weight": -0.1}, "`value_loss_weight` must be at least 0"),
    "negative margin": ({"value_margin": -0.1}, "`value_margin` must be at least 0"),
    "negative learning rate of the head": ({"value_head_learning_rate": -1e-3}, "`value_head_learning_rate` must be"),
    "NaN": ({"value_margin": float("nan")}, "`value_margin` must be at least 0"),
    "max_length of zero": ({"max_length": 0}, "`max_length` must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("attempt, message", ANNOTATION.values(), ids=ANNOTATION)
def test_annotation_refuses(attempt, message, tmp_path):
    """Rewards of the wrong tokens, or of nothing, look like any others once they are in the dataset."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        attempt(tmp_path)


@pytest.mark.parametrize("attempt, message", TRAINING.values(), ids=TRAINING)
def test_trainer_refuses(attempt, message, tmp_path):
    """Better an error in the first second than a doctor that has learned nothing overnight."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        attempt(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, message", SETTINGS.values(), ids=SETTINGS)
def test_config_refuses(settings, message, tmp_path):
    """Settings are checked where they are given."""
    with pytest.raises(ValueError, match=message):
        TFPOConfig(str(tmp_path), **settings)


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    """The Trainer logs zeros instead of NaN by default, and goes on."""
    doctor = make_llama(2)
    trainer = train(tmp_path, model=doctor, settings={"max_steps": 2, "reference_weight": 0.0})
    with torch.no_grad():
        doctor.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss must be finite. Got nan at step 0"):
        trainer.train()
    folder = tmp_path / "run" / "not-finite-0"
    batch = load_file(folder / "batch-0.safetensors")
    assert batch["input_ids"].shape == batch["completion_mask"].shape
    kept = AutoModelForCausalLM.from_pretrained(folder)
    assert kept.model.norm.weight.isnan().all() and kept.lm_head.weight.equal(doctor.lm_head.weight)
