# SPDX-License-Identifier: Apache-2.0

"""Faces, patients and settings that annotation refuses, and rewards that cannot be shown."""

from dataclasses import replace

from conftest import make_tokenizer

from bad_input.calls import (
    FACES,
    PREFERENCES,
    ROWS,
    annotate,
    assert_refused,
    broken_patient,
    edited,
    tiny_t5,
    with_rows,
)
from trl_tfpo import Faces, annotate_token_rewards, reward_report, show_token_rewards


# The faces
FACES_OF_A_PATIENT = [
    ("identical faces", lambda: Faces(positive="be kind", negative="be kind "), "must differ"),
    ("blank face", lambda: Faces(positive="be kind", negative=" "), "non-blank"),
    ("face that is no text", lambda: Faces(positive=3, negative="be rude"), "non-blank instruction. Got positive=3"),
    ("unknown faces", lambda: annotate(faces="kindness"), "'harmlessness'"),
    ("faces of a dict", lambda: annotate(faces={"positive": "a"}), "must be a `Faces` or one of"),
    ("faces at no place", lambda: Faces("be kind", "be rude", placement="end"), "'system' or 'user'. Got 'end'"),
    (
        "faces in a user turn that is not there",
        lambda: annotate(edited(prompt=[{"role": "system", "content": "x"}]), faces=replace(FACES, placement="user")),
        r"needs a user message.*Got roles \['system'\].*placement='system'",
    ),
    ("faces the patient cannot tell apart", lambda: annotate(patient=broken_patient(0.0)), "not zero.*faces"),
]

# The patient
PATIENTS = [
    (
        "no patient",
        lambda: annotate_token_rewards(PREFERENCES, None, make_tokenizer(), faces=FACES),
        "`patient` must be a causal language model, .*Got None",
    ),
    (
        "patient that is not there",
        lambda: annotate(patient="./absent"),
        "Got './absent', which does not exist; check the path",
    ),
    ("encoder-decoder patient", lambda: annotate(patient=tiny_t5()), "causal language model"),
    ("NaN log-probabilities", lambda: annotate(patient=broken_patient(float("nan"))), "must be finite.*nan"),
    ("infinite log-probabilities", lambda: annotate(patient=broken_patient(float("inf"))), "must be finite"),
]

# How tokens are rewarded, and in which batches
SETTINGS = [
    ("mistyped setting", lambda: annotate(sparsity_treshold=0.3), r"Got \['sparsity_treshold'\] for `token_rewards`"),
    ("unknown direction", lambda: annotate(reward_direction="up"), "'label', 'agreement' or 'faces'"),
    (
        "disagreement above one",
        lambda: annotate(disagreement_weight=1.5),
        r"`disagreement_weight` must be in \[0, 1\]. Got 1.5",
    ),
    ("threshold of one", lambda: annotate(sparsity_threshold=1.0), r"\[0, 1\)"),
    ("negative threshold", lambda: annotate(sparsity_threshold=-0.1), r"\[0, 1\)"),
    ("batches of nothing", lambda: annotate(batch_size=0), "`batch_size` must be at least 1. Got 0"),
    ("negative length", lambda: annotate(max_length=-1), "`max_length` must be at least 1. Got -1"),
]

# A reward function of the caller
REWARD_FUNCTIONS = [
    ("reward function that is none", lambda: annotate(reward_fn=3), "`reward_fn` must be callable. Got 3"),
    (
        "reward function that forgets to return",
        lambda: annotate(reward_fn=lambda **_: None),
        "one finite reward for each token.*Got NoneType",
    ),
    (
        "rewards of another shape",
        lambda: annotate(reward_fn=lambda positive_logps, **_: positive_logps[:, :1]),
        "one finite reward",
    ),
    (
        "rewards that are not finite",
        lambda: annotate(reward_fn=lambda positive_logps, **_: positive_logps / 0),
        "one finite reward",
    ),
]

# What is shown
VIEWS = [
    ("heat map of preferences", lambda: show_token_rewards(ROWS[0], make_tokenizer()), "annotate_token_rewards"),
    (
        "report of preferences",
        lambda: reward_report(PREFERENCES, make_tokenizer(), "report"),
        "must have pairs with the columns",
    ),
]


@with_rows(FACES_OF_A_PATIENT, PATIENTS, SETTINGS, REWARD_FUNCTIONS, VIEWS)
def test_annotation_is_refused(call, message, tmp_path):
    """Rewards without a meaning look like any others."""
    assert_refused(call, message, tmp_path)
