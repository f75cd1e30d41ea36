# SPDX-License-Identifier: Apache-2.0

"""Tensors and exponents that the equations refuse."""

import torch

from bad_input.calls import assert_refused, with_rows
from trl_tfpo import functional, tfpo_objective


ZEROS, STATES, MASK = torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool)


def rewards(**settings):
    tensors = dict(positive_logps=ZEROS, negative_logps=ZEROS, preference_sign=ZEROS[:, 0], completion_mask=MASK)
    return functional.token_rewards(**tensors, **settings)


def scores(**settings):
    return functional.log_prefix_scores(token_rewards=ZEROS, completion_mask=MASK, **settings)


def subtb(subtb_lambda):
    return functional.subtb_loss(potential=STATES, completion_mask=MASK, subtb_lambda=subtb_lambda)


def discrimination(value_margin):
    return functional.value_discrimination_loss(
        chosen_log_values=STATES, rejected_log_values=STATES, divergence=ZEROS[:, 0].long(), value_margin=value_margin
    )


def objective(num_rows=2, **settings):
    zeros = torch.zeros(num_rows, 3)
    return tfpo_objective(
        doctor_logps=zeros,
        log_values=torch.zeros(num_rows, 4),
        token_rewards=zeros,
        completion_ids=zeros.long(),
        completion_mask=zeros == 0,
        is_complete=zeros[:, 0] == 0,
        **settings,
    )


# Token rewards
REWARDS = [
    ("unknown direction", lambda: rewards(reward_direction="up"), "'label', 'agreement' or 'faces'.*Got 'up'"),
    (
        "disagreement above one",
        lambda: rewards(disagreement_weight=1.5),
        r"`disagreement_weight` must be in \[0, 1\]. Got 1.5",
    ),
    ("NaN disagreement", lambda: rewards(disagreement_weight=float("nan")), "`disagreement_weight` must be in"),
    ("threshold of one", lambda: rewards(sparsity_threshold=1.0), r"\[0, 1\)"),
    ("negative threshold", lambda: rewards(sparsity_threshold=-0.1), r"\[0, 1\)"),
    ("importance temperature of zero", lambda: rewards(importance_temperature=0.0), "must be positive. Got 0.0"),
    ("gap floor of zero", lambda: rewards(gap_floor=0.0), "`gap_floor` must be positive"),
    (
        "importance at a temperature of zero",
        lambda: functional.token_importance(gap=ZEROS, completion_mask=MASK, importance_temperature=0.0),
        "must be positive. Got 0.0 and 0.05",
    ),
]

# The flow and its losses
FLOW = [
    ("no reference", lambda: scores(reference_weight=1.0), "`reference_logps` are required"),
    ("reward temperature of zero", lambda: scores(reward_temperature=0.0), "`reward_temperature` must be positive"),
    ("negative reward temperature", lambda: scores(reward_temperature=-0.25), "`reward_temperature` must be positive"),
    ("negative reference weight", lambda: scores(reference_weight=-1.0), "`reference_weight` must be at least 0"),
    ("negative lambda", lambda: subtb(-0.1), r"`subtb_lambda` must be in \[0, 1\]"),
    ("lambda above one", lambda: subtb(1.1), r"\[0, 1\]. Got 1.1"),
    ("negative margin", lambda: discrimination(-0.1), "`value_margin` must be at least 0. Got -0.1"),
]

# The objective
OBJECTIVE = [
    ("objective of rows that are no pairs", lambda: objective(num_rows=3), "must be pairs.* Got 3 rows"),
    ("objective of nothing", lambda: objective(num_rows=0), "must be pairs.* Got 0 rows"),
    ("objective without a reference", lambda: objective(), "`reference_logps` are required"),
    ("objective with a negative margin", lambda: objective(reference_weight=0.0, value_margin=-1.0), "`value_margin`"),
]

# Guided distributions
GUIDANCE = [
    (
        "a beta too many",
        lambda: functional.guided_logps(patient_logits=ZEROS, doctor_logits=[ZEROS], beta=[0.5, 0.5]),
        "one exponent for each doctor. Got 2 exponents for 1",
    ),
    (
        "share of zero",
        lambda: functional.plausible_mask(patient_logits=ZEROS, min_patient_prob=0.0),
        r"must be in \(0, 1\]. Got 0.0",
    ),
    (
        "share above one",
        lambda: functional.plausible_mask(patient_logits=ZEROS, min_patient_prob=1.5),
        r"must be in \(0, 1\]. Got 1.5",
    ),
]


@with_rows(REWARDS, FLOW, OBJECTIVE, GUIDANCE)
def test_an_equation_is_refused(call, message, tmp_path):
    """An exponent of the wrong sign, or pairs shifted by one, still give a loss that falls."""
    assert_refused(call, message, tmp_path)
