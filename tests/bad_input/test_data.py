# SPDX-License-Identifier: Apache-2.0

"""Preferences and tokenizers that annotation refuses."""

from conftest import make_llama
from datasets import Dataset

from bad_input.calls import (
    PREFERENCES,
    ROWS,
    annotate,
    assert_refused,
    edited,
    patient_of_another_family,
    with_rows,
)


# The dataset as a whole
DATASETS = [
    ("missing columns", lambda: annotate(PREFERENCES.remove_columns("rejected")), "'chosen' and 'rejected'"),
    ("not a dataset", lambda: annotate(dataset=ROWS), "of the library Datasets. Got a `list`"),
    ("no rows", lambda: annotate(PREFERENCES.select([])), "at least one row. Got none"),
    ("vision dataset", lambda: annotate(PREFERENCES.add_column("images", [[]] * 4)), "vision"),
]

# One of its pairs
PAIRS = [
    (
        "row without a completion",
        lambda: annotate(edited(chosen=None)),
        "Row 0 .*must all be texts.*'chosen': None.*drop_unusable",
    ),
    (
        "row of numbers",
        lambda: annotate(Dataset.from_list([{"prompt": 1, "chosen": 2, "rejected": 3}])),
        "must all be texts",
    ),
    (
        "row of texts and messages",
        lambda: annotate(edited(chosen="good")),
        "must all be texts, or all lists of messages",
    ),
    ("messages without a role", lambda: annotate(edited(prompt=[{"content": "say"}])), "messages that have a role"),
    ("prompt without messages", lambda: annotate(edited(prompt=[])), "messages that have a role"),
    (
        "empty prompt",
        lambda: annotate(Dataset.from_list([{"prompt": "", "chosen": "good", "rejected": "bad"}])),
        "at least one token",
    ),
    (
        "empty completion",
        lambda: annotate(edited(chosen=[{"role": "assistant", "content": ""}])),
        "at least one token before EOS.*drop_unusable",
    ),
    ("prompt longer than max_length", lambda: annotate(max_length=5), "shorter than `max_length`.*Got 6 tokens"),
    ("nothing usable", lambda: annotate(max_length=5, drop_unusable=True), "At least one pair must be usable"),
]

# The tokenizer
TOKENIZERS = [
    ("not a tokenizer", lambda: annotate(tokenizer="words"), "must be a tokenizer.*Got a `str`"),
    ("another tokenizer", lambda: annotate(patient=patient_of_another_family()), "same tokenizer.*first is id 4"),
    (
        "tokenizer larger than the patient",
        lambda: annotate(patient=make_llama(1, 32, vocab_size=9)),
        "9 embeddings for 22",
    ),
]


@with_rows(DATASETS, PAIRS, TOKENIZERS)
def test_data_are_refused(call, message, tmp_path):
    """Rewards of the wrong tokens look like any others."""
    assert_refused(call, message, tmp_path)
