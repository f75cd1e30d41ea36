# SPDX-License-Identifier: Apache-2.0

"""A doctor's folder guides by itself, and an annotated dataset says what it is."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    Faces,
    TFPOConfig,
    TFPOTrainer,
    annotate_token_rewards,
    guided_generate,
)
from trl_tfpo.custom_generate import generate
from trl_tfpo.training.cards import annotation_card


FACES = Faces(positive="you are kind | always", negative="you are rude")
SETTINGS = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)


@pytest.fixture(scope="module")
def annotated():
    rows = Dataset.from_list(conversational_rows(8))
    return annotate_token_rewards(rows, make_llama(1, 32), make_tokenizer(), faces=FACES)


@pytest.fixture(scope="module", params=["doctor", "guided"])
def saved(request, annotated, tmp_path_factory):
    """The folder of a doctor, and its policy."""
    folder = tmp_path_factory.mktemp("saved") / request.param
    trainer = TFPOTrainer(
        model=make_llama(2),
        patient_model=make_llama(1, 32),
        args=TFPOConfig(
            str(folder),
            policy=request.param,
            max_steps=3,
            learning_rate=0.1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=annotated,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return folder


def prompts():
    return {
        "input_ids": torch.tensor([[0, 5, 11], [1, 5, 17]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }


def test_every_push_is_a_whole_doctor(annotated, tmp_path, monkeypatch):
    """A doctor that is pushed during training guides, and ranks its own answers, as the saved doctor does."""
    pushed = []

    def upload_folder(_, folder_path, **settings):
        pushed.append({str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")})
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **settings: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = TFPOTrainer(
        model=make_llama(2),
        args=TFPOConfig(
            str(tmp_path / "doctor"),
            calibrate_rewards=True,
            max_steps=2,
            save_steps=1,
            push_to_hub=True,
            hub_strategy="every_save",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(annotated.to_list() * 4),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert len(pushed) >= 2
    for files in pushed:
        assert {"model.safetensors", "value_head.safetensors", "guidance.json", "token_credits.safetensors"} <= files
        assert "custom_generate/generate.py" in files


def test_a_folder_is_its_own_generate(saved, tmp_path):
    """One line, also where the folder has been moved: what is trained on one machine is served on another."""
    patient = make_llama(1, 32).eval()
    moved = tmp_path / "elsewhere"
    moved.symlink_to(saved)
    call = dict(custom_generate=str(moved), trust_remote_code=True, **SETTINGS)
    for weights in ({}, {"alpha": 0.5, "beta": 0.7}):
        guide = DoctorGuidedLogitsProcessor.from_pretrained(str(saved), **weights)
        expected = guided_generate(patient, guide, **prompts(), **SETTINGS)
        assert patient.generate(**prompts(), **call, **weights).equal(expected)
        inputs = prompts()
        assert patient.generate(inputs.pop("input_ids"), **inputs, **call, **weights).equal(expected)
        assert not patient.generate(**prompts(), **SETTINGS).equal(expected)


def test_nothing_of_a_folder_runs_unasked(saved):
    """Code from a repository runs only where it is asked for."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_llama(1, 32).generate(**prompts(), **SETTINGS, custom_generate=str(saved), trust_remote_code=False)


def test_a_doctor_that_is_trained_again_is_read_again(saved):
    """Doctors stay loaded from call to call; an old one would go on guiding without a word."""
    patient = make_llama(1, 32).eval()
    call = dict(doctor=str(saved), **prompts(), **SETTINGS, output_scores=True, return_dict_in_generate=True)
    before = generate(patient, **call).scores[0]
    weights = (saved / "model.safetensors").read_bytes()
    doctor = make_llama(7)
    doctor.save_pretrained(saved)
    assert not torch.allclose(generate(patient, **call).scores[0], before)
    (saved / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="needs a doctor"):
        generate(patient, **prompts())


def test_the_model_card_says_for_what(saved):
    """Weights that were right for one form of decoding ruin another."""
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "you are kind \\| always" in card and "| data | not recorded, 8 preference pairs |" in card
    assert "pipeline(" not in card and "None" not in card  # TRL's quick start, in which it would speak alone
    assert ("`alpha=1.0`, `beta=1.0`" if saved.name == "guided" else "`beta=0.5`") in card


def test_an_annotated_dataset_has_a_card(annotated, tmp_path):
    """Token rewards without patient, faces and settings are numbers."""
    annotation_card(annotated).save(tmp_path / "README.md")
    card = DatasetCard.load(tmp_path / "README.md")
    assert "trl-tfpo" in card.data.tags
    place = "| placement of the faces | system message |"
    for told in ("8 preference pairs", "you are kind \\| always", place, '`reward_direction="agreement"`'):
        assert told in card.text


@pytest.mark.parametrize("placement, told", [(None, "system message"), ("user", "end of the last user message")])
def test_the_card_says_where_the_faces_stand(annotated, placement, told):
    """Annotations of earlier versions do not say it: their faces were the system message."""
    dataset = annotated.select(range(2))
    recorded = '"placement": "system"'
    other = "" if placement is None else f', "placement": "{placement}"'
    dataset.info.description = dataset.info.description.replace(f", {recorded}", other)
    assert recorded not in dataset.info.description
    assert f"| placement of the faces | {told} |" in annotation_card(dataset).text
