# SPDX-License-Identifier: Apache-2.0

"""Completions that are shown while a doctor is trained."""

import pytest
import torch
from conftest import FACES, conversational_rows, make_llama, make_tokenizer, save_model
from datasets import Dataset
from transformers import GenerationConfig

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    LogGuidedCompletionsCallback,
    TFPOConfig,
    TFPOTrainer,
    annotate_token_rewards,
    guided_generate,
)


GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def annotated():
    return annotate_token_rewards(
        Dataset.from_list(conversational_rows(8)), make_llama(1, 32), make_tokenizer(), faces=FACES
    )


def make_trainer(tmp_path, annotated, **settings):
    defaults = dict(max_steps=4, learning_rate=0.1, logging_steps=1, save_strategy="no", report_to="none", seed=3)
    patient = make_llama(1, 32) if settings.get("policy") == "guided" else None
    return TFPOTrainer(
        model=make_llama(2),
        patient_model=patient,
        args=TFPOConfig(str(tmp_path), disable_tqdm=True, **(defaults | settings)),
        train_dataset=annotated,
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("policy", ["ratio", "guided", "doctor"])
def test_it_shows_what_guided_decoding_would_say(policy, annotated, tmp_path, capsys):
    """Sampled texts are those of the guided patient, with the exponents that the doctor is decoded with."""
    trainer = make_trainer(tmp_path, annotated, policy=policy)
    patient = make_llama(1, 32)
    given = None if policy == "guided" else patient
    callback = LogGuidedCompletionsCallback(trainer, given, GREEDY, num_prompts=3, freq=2)
    trainer.add_callback(callback)
    trainer.train()
    assert [row["step"] for row in callback.table] == [2, 2, 2, 4, 4, 4]
    doctor, tokenizer = trainer.model.eval(), make_tokenizer()
    settings = {"beta": 0.5} if policy == "doctor" else {"alpha": 1.0, "beta": 1.0}
    for row, example in zip(callback.table[3:], annotated, strict=False):
        prompt = torch.tensor([example["prompt_ids"]])
        alone = patient.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=GREEDY)
        guide = DoctorGuidedLogitsProcessor(doctor, **settings)
        guided = guided_generate(patient, guide, input_ids=prompt, generation_config=GREEDY)
        for name, output in (("patient", alone), ("completion", guided)):
            assert row[name] == tokenizer.decode(output[0, prompt.size(1) :], skip_special_tokens=True)
    assert any(row["completion"] != row["patient"] for row in callback.table)  # the doctor has learned something
    shown = capsys.readouterr().out
    assert shown.count("Completions at step") == 2 and "guided" in shown


@pytest.mark.slow
def test_training_is_the_same_with_and_without(annotated, tmp_path):
    """A callback that samples from the random numbers of training, or leaves dropout off, changes what it shows."""
    weights = []
    patient = make_llama(1, 32)  # sets the seed
    for is_shown in (False, True):
        trainer = make_trainer(tmp_path, annotated, disable_dropout=False, per_device_train_batch_size=2)
        trainer.model.config.attention_dropout = 0.5
        if is_shown:
            trainer.add_callback(LogGuidedCompletionsCallback(trainer, patient, freq=1, num_prompts=2))
        trainer.train()
        assert trainer.model.training
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_a_patient_by_name_and_prompts_of_the_evaluation(annotated, tmp_path):
    """The patient, which the trainer has released, is loaded again by name; prompts are held-out ones if any."""
    save_model(tmp_path / "patient", make_llama(1, 32))
    trainer = TFPOTrainer(
        model=make_llama(2),
        patient_model=str(tmp_path / "patient"),
        args=TFPOConfig(
            str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=2, report_to="none", save_strategy="no"
        ),
        train_dataset=annotated,
        eval_dataset={"held out": annotated.select([5, 6])},
        processing_class=make_tokenizer(),
        faces=FACES,
    )
    callback = LogGuidedCompletionsCallback(trainer, generation_config=GREEDY)
    trainer.add_callback(callback)
    trainer.train()
    prompts = [make_tokenizer().decode(ids) for ids in annotated.select([5, 6])["prompt_ids"]]
    assert [(row["step"], row["prompt"]) for row in callback.table] == [(2, prompt) for prompt in prompts]


def test_what_it_cannot_show_is_refused(annotated, tmp_path):
    """Rather before the training than at its first evaluation."""
    trainer = make_trainer(tmp_path, annotated)
    with pytest.raises(ValueError, match="needs the patient"):
        LogGuidedCompletionsCallback(trainer, freq=1)
    with pytest.raises(ValueError, match="`freq` must be a number of steps"):
        LogGuidedCompletionsCallback(trainer, make_llama(1))
    callback = LogGuidedCompletionsCallback(trainer, make_llama(1), freq=1)
    trainer.add_callback(callback)
    trainer.model.lm_head.weight.ds_id = 0  # what DeepSpeed ZeRO-3 leaves on a parameter
    with pytest.raises(ValueError, match="does not support sharded models"):
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
