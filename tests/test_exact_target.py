# SPDX-License-Identifier: Apache-2.0

"""In a world small enough to enumerate, the objective must find the exact distribution it promises."""

import itertools

import pytest
import torch

from trl_tfpo.functional import guided_logps
from trl_tfpo.training.objective import tfpo_objective


pytestmark = pytest.mark.slow


NUM_SYMBOLS, LENGTH = 4, 5
TEXTS = torch.tensor(list(itertools.product(range(NUM_SYMBOLS), repeat=LENGTH)))  # (1024, 5)
NUM_PREFIXES = [NUM_SYMBOLS**length for length in range(LENGTH + 1)]


def prefix_index(texts):
    """Number of each prefix of each text among all prefixes of any length, (N, LENGTH + 1)."""
    columns, code = [torch.zeros(len(texts), dtype=torch.long)], torch.zeros(len(texts), dtype=torch.long)
    for t in range(LENGTH):
        code = code * NUM_SYMBOLS + texts[:, t]
        columns.append(sum(NUM_PREFIXES[: t + 1]) + code)
    return torch.stack(columns, dim=1)


class Tabular:
    """Any policy and any flow over the texts: one row of logits and one value for each prefix."""

    def __init__(self, seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = scale * torch.randn(sum(NUM_PREFIXES[:-1]), NUM_SYMBOLS, generator=generator)
        self.values = torch.zeros(sum(NUM_PREFIXES))

    def token_logps(self, texts):
        rows = self.logits[prefix_index(texts)[:, :-1]].log_softmax(-1)  # (N, LENGTH, NUM_SYMBOLS)
        return rows.gather(2, texts[..., None]).squeeze(2)


class Guided(Tabular):
    """A patient times a doctor that says nothing yet."""

    def __init__(self, patient):
        super().__init__(seed=0, scale=0.0)
        self.patient = patient

    def token_logps(self, texts):
        rows = prefix_index(texts)[:, :-1]
        guided = guided_logps(patient_logits=self.patient.logits[rows], doctor_logits=[self.logits[rows]], beta=[1.0])
        return guided.gather(2, texts[..., None]).squeeze(2)


def train(doctor, reference, rewards, *, is_complete, reference_weight, subtb_lambda, steps=1500):
    doctor.logits.requires_grad_()
    doctor.values.requires_grad_()
    optimizer = torch.optim.Adam([doctor.logits, doctor.values], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(TEXTS), (512,), generator=generator)  # balance holds on any data, not only its own
        texts = TEXTS[rows]
        loss, _ = tfpo_objective(
            doctor_logps=doctor.token_logps(texts),
            log_values=doctor.values[prefix_index(texts)],
            token_rewards=rewards[rows],
            completion_ids=texts,
            completion_mask=torch.ones_like(texts, dtype=torch.bool),
            is_complete=torch.full((len(texts),), is_complete),
            reference_logps=reference.token_logps(texts),
            reward_temperature=0.5,
            reference_weight=reference_weight,
            subtb_lambda=subtb_lambda,
            value_loss_weight=0.0,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def total_variation(doctor, reference, rewards, reference_weight):
    """Between the doctor and the target `reference ** weight * exp(sum of rewards / temperature)`, in [0, 1]."""
    score = rewards.sum(1) / 0.5 + reference_weight * reference.token_logps(TEXTS).sum(1)
    with torch.no_grad():
        return (doctor.token_logps(TEXTS).sum(1).exp() - score.softmax(0)).abs().sum().item() / 2


@pytest.mark.parametrize(
    "reference_weight, subtb_lambda", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.5)], ids=["reference", "published", "decay"]
)
def test_objective_reaches_the_exact_target(reference_weight, subtb_lambda):
    """A loss that is zero at balance may still have other minima: the trained policy itself must be right."""
    reference = Tabular(seed=1)
    rewards = Tabular(seed=2, scale=0.5).logits[prefix_index(TEXTS)[:, :-1]].gather(2, TEXTS[..., None]).squeeze(2)
    doctor = Tabular(seed=3)
    before = total_variation(doctor, reference, rewards, reference_weight)
    train(
        doctor,
        reference,
        rewards,
        is_complete=True,
        reference_weight=reference_weight,
        subtb_lambda=subtb_lambda,
    )
    assert before > 0.5
    assert total_variation(doctor, reference, rewards, reference_weight) <= 0.05


def test_guided_flow_reaches_the_tilted_patient():
    """What is decoded must be the patient times `exp(sum of rewards / temperature)`, whatever the doctor is alone."""
    patient = Tabular(seed=1)
    rewards = Tabular(seed=2, scale=0.5).logits[prefix_index(TEXTS)[:, :-1]].gather(2, TEXTS[..., None]).squeeze(2)
    guided = Guided(patient)
    torch.testing.assert_close(guided.token_logps(TEXTS), patient.token_logps(TEXTS))
    before = total_variation(guided, patient, rewards, 1.0)
    train(guided, patient, rewards, is_complete=True, reference_weight=1.0, subtb_lambda=1.0)
    assert before > 0.3
    assert total_variation(guided, patient, rewards, 1.0) <= 0.05


def test_without_the_boundary_rewards_do_not_reach_the_policy():
    """With log V free at the end the loss vanishes for a policy that never saw a reward."""
    reference = Tabular(seed=1)
    rewards = Tabular(seed=2, scale=0.5).logits[prefix_index(TEXTS)[:, :-1]].gather(2, TEXTS[..., None]).squeeze(2)
    doctor = Tabular(seed=3)
    train(doctor, reference, rewards, is_complete=False, reference_weight=1.0, subtb_lambda=1.0)
    assert total_variation(doctor, reference, rewards, 1.0) > 0.2
