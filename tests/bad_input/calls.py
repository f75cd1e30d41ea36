# SPDX-License-Identifier: Apache-2.0

"""Helpers of the tables: a check of refusals, and calls that are valid except for what a row changes."""

import contextlib
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FACES, WORDS, conversational_rows, make_llama, make_tokenizer, save_model
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from trl_tfpo import DoctorGuidedLogitsProcessor, annotate_token_rewards


ROWS = conversational_rows(4)
PREFERENCES = Dataset.from_list(ROWS)
PERMUTED_WORDS = " ".join(WORDS.split()[:4] + WORDS.split()[:3:-1])
FOLDER = tempfile.TemporaryDirectory(prefix="bad-input-")  # what calls read; they run in another folder


def with_rows(*tables: list[tuple]):
    """Parametrize a test by rows, each a name for the fault and the arguments `call` and `message` of the test."""
    return pytest.mark.parametrize(
        ("call", "message"), [pytest.param(*row, id=name) for table in tables for name, *row in table]
    )


def assert_refused(call, message: str, folder: Path) -> None:
    """Call in an empty folder: a `ValueError` with this message (a regular expression), and the folder stays empty."""
    with contextlib.chdir(folder), pytest.raises(ValueError, match=f"(?s){message}"):
        call()
    assert not list(folder.iterdir())


def write(name: str, text: str) -> Path:
    """A file with this text."""
    path = Path(FOLDER.name) / name
    path.write_text(text, encoding="utf-8")
    return path


def edited(**changes) -> Dataset:
    """The preferences with other values in some columns."""
    return Dataset.from_list([{**row, **changes} for row in ROWS])


def annotate(dataset=None, patient=None, tokenizer=None, faces=FACES, **settings) -> Dataset:
    return annotate_token_rewards(
        PREFERENCES if dataset is None else dataset,
        patient or make_llama(1, 32),
        tokenizer or make_tokenizer(),
        faces=faces,
        **settings,
    )


def guide(doctor="make one", **settings) -> DoctorGuidedLogitsProcessor:
    return DoctorGuidedLogitsProcessor(make_llama(2) if doctor == "make one" else doctor, **settings)


def broken_patient(value: float):
    """A patient whose hidden states are all this value."""
    patient = make_llama(1, 32)
    with torch.no_grad():
        patient.model.norm.weight.fill_(value)
    return patient


@cache
def patient_of_another_family() -> str:
    """The folder of a patient whose tokenizer has the same words under other ids."""
    folder = str(Path(FOLDER.name) / "other")
    save_model(folder, make_llama(1, 32), make_tokenizer(PERMUTED_WORDS))
    return folder


def tiny_t5() -> T5ForConditionalGeneration:
    """An encoder-decoder, which cannot be a patient or a doctor."""
    return T5ForConditionalGeneration(T5Config(vocab_size=22, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
