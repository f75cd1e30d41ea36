# SPDX-License-Identifier: Apache-2.0

"""
Methods: a training function and a grid of settings for each.

All methods train a doctor on the patient's states (`states.py`) with the same pairs.
"""

from typing import TYPE_CHECKING

from signals import sparse_rewards
from states import Doctor, dpo_loss, flow_loss, genarm_loss, new_doctor, train

from trl_tfpo.models.guidance_head import fitted_direction


if TYPE_CHECKING:
    from bench import Bench


def tfpo(
    bench: "Bench", task: str, seed: int, *, learning_rate: float, epochs: int, subtb_lambda: float, map_rate: float
):
    """Train by TFPO with calibrated rewards. The logits of the doctor start as the credits of the tokens."""
    doctor, credits = credited(bench, task, seed), bench.calibration(task, seed).credits
    loss = flow_loss(lambda answer: credits[answer.ids], reward_temperature=1.0, subtb_lambda=subtb_lambda)
    settings = dict(epochs=epochs, learning_rate=learning_rate, map_rate=map_rate, seed=seed)
    return train(doctor, bench.pairs(task, seed), loss, **settings)


def credited(bench: "Bench", task: str, seed: int) -> Doctor:
    """Return a doctor without training: its logits are the credits of the tokens at every state."""
    doctor, credits = new_doctor(bench.embeddings, bench.answers["train"]), bench.calibration(task, seed).credits
    doctor.bias.data.copy_(fitted_direction(bench.embeddings, credits))
    return doctor.eval()


def sparse_tfpo(
    bench: "Bench",
    task: str,
    seed: int,
    *,
    learning_rate: float,
    rewards: dict,
    subtb_lambda: float,
    map_rate: float = 0.1,
):
    """Train by TFPO with the token rewards of the paper, or of this package without calibration."""
    pairs = bench.pairs(task, seed)
    found = {}
    for pair in pairs:
        for answer, sign in zip(pair, (1.0, -1.0), strict=True):
            found[id(answer)] = sparse_rewards(task, answer, sign, **rewards)
    loss = flow_loss(lambda answer: found[id(answer)], reward_temperature=0.25, subtb_lambda=subtb_lambda)
    doctor = new_doctor(bench.embeddings, bench.answers["train"])
    return train(doctor, pairs, loss, epochs=2, learning_rate=learning_rate, map_rate=map_rate, seed=seed)


def dpo(bench: "Bench", task: str, seed: int, *, learning_rate: float, beta: float, map_rate: float, epochs: int):
    doctor = new_doctor(bench.embeddings, bench.answers["train"])
    settings = dict(epochs=epochs, learning_rate=learning_rate, map_rate=map_rate, seed=seed)
    return train(doctor, bench.pairs(task, seed), dpo_loss(beta=beta), **settings)


def genarm(
    bench: "Bench", task: str, seed: int, *, learning_rate: float, beta: float, map_rate: float, from_patient: bool
):
    """Train an autoregressive reward model by GenARM. It multiplies the patient."""
    doctor = new_doctor(bench.embeddings, bench.answers["train"])
    loss = genarm_loss(beta=beta, starts_at_patient=from_patient, seed=seed)
    settings = dict(epochs=2, learning_rate=learning_rate, map_rate=map_rate, seed=seed)
    doctor = train(doctor, bench.pairs(task, seed), loss, **settings)
    doctor.patient_weight = float(from_patient)
    return doctor


PUBLISHED = dict(reward_direction="label", importance_temperature=1.0, gap_floor=1e-6)
METHODS = {
    "TFPO, calibrated": (
        tfpo,
        [
            dict(learning_rate=3e-3, epochs=2, subtb_lambda=x, map_rate=y)
            for x, y in ((0.0, 0.03), (0.5, 0.03), (0.5, 0.1))
        ],
    ),
    "credits alone": (credited, [{}]),
    "TFPO, not calibrated": (
        sparse_tfpo,
        [
            *(dict(learning_rate=x, rewards={}, subtb_lambda=0.95) for x in (1e-3, 1e-2)),
            *(dict(learning_rate=x, rewards={}, subtb_lambda=0.95, map_rate=0.0) for x in (3e-2, 1e-1)),
        ],
    ),
    "TFPO, published rewards": (
        sparse_tfpo,
        [
            *(dict(learning_rate=x, rewards=PUBLISHED, subtb_lambda=1.0) for x in (1e-3, 1e-2)),
            *(dict(learning_rate=x, rewards=PUBLISHED, subtb_lambda=1.0, map_rate=0.0) for x in (3e-2, 1e-1)),
        ],
    ),
    "DPO": (
        dpo,
        [
            dict(learning_rate=x, beta=y, map_rate=z, epochs=w)
            for x, y, z, w in (
                (3e-4, 0.1, 1.0, 1),
                (1e-3, 0.1, 1.0, 2),
                (3e-3, 0.1, 0.1, 2),
                (1e-2, 0.1, 0.1, 2),
                (1e-2, 0.3, 0.0, 2),
                (3e-2, 0.3, 0.0, 2),
                (1e-1, 0.1, 0.0, 2),
                (1e-1, 0.3, 0.0, 2),
            )
        ],
    ),
    "GenARM": (
        genarm,
        [
            dict(learning_rate=x, beta=y, map_rate=z, from_patient=w)
            for x, y, z, w in (
                (1e-2, 0.3, 0.0, True),
                (3e-2, 0.3, 0.0, True),
                (1e-1, 0.3, 0.0, True),
                (1e-2, 0.1, 0.0, False),
                (3e-2, 0.1, 0.0, False),
                (1e-1, 0.1, 0.0, False),
            )
        ],
    ),
}
