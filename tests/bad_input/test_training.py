# SPDX-License-Identifier: Apache-2.0

"""Datasets, models and settings that training refuses."""

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bad_input.calls import (
    FACES,
    PERMUTED_WORDS,
    PREFERENCES,
    ROWS,
    annotate,
    assert_refused,
    patient_of_another_family,
    tiny_t5,
    with_rows,
)
from trl_tfpo import TFPOConfig, TFPOTrainer, TokenRewardCollator
from trl_tfpo.training.plan import training_plan


def train(*, model=None, tokenizer=None, train_dataset=None, settings=None, **arguments):
    """A trainer, whose arguments are checked when it is made."""
    return TFPOTrainer(
        model=model or make_llama(2),
        args=TFPOConfig("run", report_to="none", **(settings or {})),
        train_dataset=annotate() if train_dataset is None else train_dataset,
        processing_class=tokenizer or make_tokenizer(),
        **arguments,
    )


def settings(**changes):
    return TFPOConfig("run", **changes)


def collate(**changes):
    """A batch of one pair."""
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}
    rewards = {"chosen_token_rewards": [0.9, 0.0], "rejected_token_rewards": [-0.5]}
    return TokenRewardCollator(make_tokenizer(), max_length=8)([{**pair, **rewards, **changes}])


# The dataset
DATASETS = [
    ("no dataset", lambda: TFPOTrainer(model=make_llama(2), args=TFPOConfig("run")), "`train_dataset` is required"),
    ("not a dataset", lambda: train(train_dataset=ROWS), "of the library Datasets. Got a `list`"),
    ("no rows", lambda: train(train_dataset=annotate().select([])), "at least one row"),
    (
        "vision dataset",
        lambda: train(train_dataset=PREFERENCES.add_column("image", ROWS), patient_model=make_llama(1), faces=FACES),
        "vision",
    ),
    (
        "streamed raw dataset",
        lambda: train(
            train_dataset=PREFERENCES.to_iterable_dataset(),
            patient_model=make_llama(1),
            faces=FACES,
            settings={"reference_weight": 0.0},
        ),
        "A streamed dataset must have token rewards",
    ),
    (
        "streamed dataset with a reference",
        lambda: train(train_dataset=annotate().to_iterable_dataset(), settings={"max_steps": 1, "policy": "doctor"}),
        "policy='ratio'",
    ),
    (
        "annotated by another tokenizer",
        lambda: train(tokenizer=make_tokenizer(PERMUTED_WORDS)),
        "annotated with the doctor's tokenizer",
    ),
    (
        "ids of a larger vocabulary",
        lambda: train(train_dataset=Dataset.from_list([{**row, "prompt_ids": [99]} for row in annotate()])),
        "whose ids are 0 to 21. Got the token id 99",
    ),
    ("no completion ends", lambda: train(train_dataset=annotate(max_length=8)), "must end in EOS"),
]

# The doctor
DOCTORS = [
    (
        "doctor of None",
        lambda: TFPOTrainer(model=None, train_dataset=annotate()),
        "`model` must be a causal language model, .*Got None",
    ),
    ("doctor that is not there", lambda: train(model="./absent"), "Got './absent', which does not exist"),
    ("encoder-decoder doctor", lambda: train(model=tiny_t5()), "causal language model"),
    ("not a tokenizer", lambda: train(tokenizer=object()), "must be a tokenizer"),
    ("tokenizer larger than the doctor", lambda: train(model=make_llama(2, vocab_size=9)), "9 embeddings for 22"),
    (
        "prompt learning",
        lambda: train(peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "Prompt learning",
    ),
    ("quantization of a loaded model", lambda: train(quantization_config=BitsAndBytesConfig()), "given by name"),
]

# The patient and its faces
PATIENTS = [
    ("no patient", lambda: train(train_dataset=PREFERENCES, faces=FACES), "needs a patient"),
    ("no faces", lambda: train(train_dataset=PREFERENCES, patient_model=make_llama(1)), "needs `faces`"),
    (
        "patient that is a number",
        lambda: train(patient_model=3),
        "`patient_model` must be a causal language model, .*Got 3",
    ),
    (
        "patient of another family",
        lambda: train(train_dataset=PREFERENCES, faces=FACES, patient_model=patient_of_another_family()),
        "same tokenizer",
    ),
    (
        "patient in worker processes",
        lambda: train(
            train_dataset=PREFERENCES,
            data_collator=TokenRewardCollator(make_tokenizer(), patient=make_llama(1), faces=FACES),
            settings={"dataloader_num_workers": 2},
        ),
        "dataloader_num_workers=2",
    ),
    (
        "plan without faces",
        lambda: training_plan(PREFERENCES, make_tokenizer(), doctor="doctor", args=TFPOConfig("run")),
        "needs a patient and faces",
    ),
]

# Settings
SETTINGS = [
    (
        "negative reward temperature",
        lambda: settings(reward_temperature=-0.25),
        "`reward_temperature` must be positive",
    ),
    ("negative reference weight", lambda: settings(reference_weight=-1.0), "`reference_weight` must be at least 0"),
    ("threshold of one", lambda: settings(sparsity_threshold=1.0), r"\[0, 1\)"),
    ("unknown policy", lambda: settings(policy="patient"), "`policy` must be 'doctor', 'ratio' or 'guided'"),
    ("unknown direction", lambda: settings(reward_direction="labels"), "'label', 'agreement' or 'faces'"),
    ("negative disagreement", lambda: settings(disagreement_weight=-0.5), "`disagreement_weight` must be in"),
    ("gap floor of zero", lambda: settings(gap_floor=0.0), "`gap_floor` must be positive"),
    ("importance temperature of zero", lambda: settings(importance_temperature=0.0), "must be positive"),
    ("lambda above one", lambda: settings(subtb_lambda=1.5), r"\[0, 1\]"),
    ("negative value loss weight", lambda: settings(value_loss_weight=-0.1), "`value_loss_weight` must be at least 0"),
    ("negative margin", lambda: settings(value_margin=-0.1), "`value_margin` must be at least 0"),
    (
        "negative learning rate of the head",
        lambda: settings(value_head_learning_rate=-1e-3),
        "`value_head_learning_rate` must be",
    ),
    ("NaN", lambda: settings(value_margin=float("nan")), "`value_margin` must be at least 0"),
    ("max_length of zero", lambda: settings(max_length=0), "`max_length` must be at least 1"),
    (
        "batches of nothing",
        lambda: settings(per_device_train_batch_size=0),
        "`per_device_train_batch_size` must be at least 1",
    ),
    ("negative learning rate", lambda: settings(learning_rate=-1.0), "`learning_rate` must be at least 0. Got -1.0"),
    (
        "settings in a dict",
        lambda: TFPOTrainer(model=make_llama(2), args={}, train_dataset=annotate()),
        "`args` must be a `TFPOConfig`. Got a `dict`",
    ),
    ("objective that is none", lambda: train(objective=3), "`objective` must be callable. Got 3"),
]

# Batches
COLLATOR = [
    ("neither tokenizer nor patient", lambda: TokenRewardCollator(), "Got neither; pass one"),
    ("a patient without faces", lambda: TokenRewardCollator(make_tokenizer(), patient=make_llama(1)), "needs `faces`"),
    (
        "padding to a multiple of zero",
        lambda: TokenRewardCollator(make_tokenizer(), pad_to_multiple_of=0),
        "`pad_to_multiple_of` must be at least 1. Got 0",
    ),
    ("no examples", lambda: TokenRewardCollator(make_tokenizer())([]), r"must consist of pairs with .*Got \[\]"),
    ("preferences without rewards", lambda: TokenRewardCollator(make_tokenizer())(ROWS), "annotate_token_rewards"),
    (
        "other numbers of rewards and tokens",
        lambda: collate(chosen_token_rewards=[0.1]),
        "one entry for each completion token. Got 1 for 2",
    ),
    ("long prompt", lambda: collate(prompt_ids=[5] * 9), "fewer than `max_length` tokens"),
    ("empty prompt", lambda: collate(prompt_ids=[]), "at least one token. Got 0 in the prompt"),
    ("empty completion", lambda: collate(chosen_ids=[], chosen_token_rewards=[]), "0 in the chosen completion"),
    (
        "reward that is not finite",
        lambda: collate(chosen_token_rewards=[0.1, float("nan")]),
        "`token_rewards` must be finite.* 1 values",
    ),
    (
        "reference of one completion",
        lambda: collate(chosen_ref_logps=[-1.0, -2.0]),
        "for all completions or for none. Got it for 1 of 2",
    ),
]


@with_rows(DATASETS, DOCTORS, PATIENTS, SETTINGS, COLLATOR)
def test_training_is_refused(call, message, tmp_path):
    """A doctor that learned nothing overnight looks like any other, and a failed run must not look like a result."""
    assert_refused(call, message, tmp_path)


def test_a_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    """The Trainer logs zeros instead of NaN by default, and goes on."""
    monkeypatch.chdir(tmp_path)
    doctor = make_llama(2)
    trainer = train(model=doctor, settings={"max_steps": 2, "reference_weight": 0.0})
    with torch.no_grad():
        doctor.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss must be finite. Got nan at step 0"):
        trainer.train()
    folder = tmp_path / "run" / "not-finite-0"
    batch = load_file(folder / "batch-0.safetensors")
    assert batch["input_ids"].shape == batch["completion_mask"].shape
    kept = AutoModelForCausalLM.from_pretrained(folder)
    assert kept.model.norm.weight.isnan().all() and not kept.lm_head.weight.any()  # as nothing was trained
