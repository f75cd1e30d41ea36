# SPDX-License-Identifier: Apache-2.0

"""What the first release wrote keeps loading; what a later one will write is not guessed at."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, load_doctor
from trl_tfpo.annotation.token_rewards import SETTINGS_KEY, annotation_settings
from trl_tfpo.models.trained_exponents import EXPONENTS_FILE


FIRST = Path(__file__).parent / "fixtures" / "format_1"


def make_trainer(dataset, output_dir):
    return TFPOTrainer(
        model=make_llama(2),
        args=TFPOConfig(
            str(output_dir), max_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
        ),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
    )


def test_an_annotated_dataset_of_the_first_release_trains(tmp_path):
    """Annotation by a large patient is paid once."""
    dataset = load_from_disk(FIRST / "annotated")
    assert annotation_settings(dataset)["faces"]["positive"] == "you are kind"
    assert make_trainer(dataset, tmp_path).train().global_step == 1


def test_a_doctor_of_the_first_release_guides_and_trains_on():
    """Doctors are published, and outlive the version that trained them."""
    guide = DoctorGuidedLogitsProcessor.from_pretrained(str(FIRST / "doctor"))
    assert guide.alpha == 1.0 and guide.betas == [1.0]
    assert load_doctor(FIRST / "doctor").value_head.weight.abs().sum() > 0
    patient = make_llama(1, 8).eval()
    call = dict(max_new_tokens=2, do_sample=False, output_scores=True, return_dict_in_generate=True)
    ids = torch.tensor([[1, 5, 11]])
    guided = patient.generate(ids, logits_processor=[guide], **call).scores[0]
    assert not torch.allclose(guided, patient.generate(ids, **call).scores[0].log_softmax(-1), atol=1e-4)


def test_later_formats_are_refused(tmp_path):
    """Read as if it were known, a later format would give wrong rewards or weights without a word."""
    shutil.copytree(FIRST / "doctor", tmp_path / "doctor")
    path = tmp_path / "doctor" / EXPONENTS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    for load in (load_doctor, DoctorGuidedLogitsProcessor.from_pretrained):
        with pytest.raises(ValueError, match="must have format 1. Got format 2; use the version"):
            load(str(tmp_path / "doctor"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "doctor")  # to transformers it is any model

    dataset = load_from_disk(FIRST / "annotated")
    settings = json.dumps(annotation_settings(dataset) | {"format": 2})
    dataset.info.description = f"{SETTINGS_KEY}{settings}"
    with pytest.raises(ValueError, match="annotated dataset must have format 1. Got format 2"):
        make_trainer(dataset, tmp_path)
