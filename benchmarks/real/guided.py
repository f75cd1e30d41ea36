# SPDX-License-Identifier: Apache-2.0

"""Texts sampled from a guided patient, at KLs where importance weights are unreliable."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from samples import draw
from states import Doctor, patient_logps
from tasks import TASKS

from trl_tfpo.evaluation import distinct_n


if TYPE_CHECKING:
    from bench import Bench


AIMS = [1.0, 2.0, 4.0]  # nats
NUM_SAMPLES, ROWS = 4, 64  # samples of each prompt, and rows of a batch
MIN_P = 0.1  # of AAD: minimum probability of a token, relative to the likeliest


class Guide:
    """
    Guide for [`~samples.draw`], the patient times a doctor, which also measures the KL of the texts.

    Args:
        doctor ([`~states.Doctor`]):
            Doctor on the patient's states.
        strength (`float`):
            Exponent of the doctor.
        num_texts (`int`):
            Number of texts to draw.

    Attributes:
        kl, surprise (`torch.Tensor` of shape `(num_texts,)`):
            KL from the patient and cross-entropy with the patient, in nats, summed exactly over the states of a text.
    """

    def __init__(self, doctor: Doctor, strength: float, num_texts: int):
        self.doctor, self.strength = doctor, strength
        self.kl, self.surprise = torch.zeros(num_texts), torch.zeros(num_texts)

    def __call__(self, rows: list[int], hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        patient = logits.float().log_softmax(dim=-1)  # (B, V)
        guided = self.choose(patient, self.doctor.directions(hidden) @ self.doctor.embeddings.T)
        probs = guided.exp()
        surprise = -(probs * patient).sum(dim=-1)
        self.surprise[rows] += surprise
        self.kl[rows] += surprise + torch.special.xlogy(probs, probs).sum(dim=-1)
        return guided

    def choose(self, patient: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (B, V) of the guided patient."""
        return (patient + self.strength * guidance).log_softmax(dim=-1)


class Greedy(Guide):
    """AAD: the doctor's most probable token among those that are likely under the patient."""

    def choose(self, patient: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        is_out = patient < patient.amax(dim=-1, keepdim=True) + math.log(MIN_P)
        best = guidance.masked_fill(is_out, -math.inf).argmax(dim=-1, keepdim=True)
        return torch.full_like(patient, -math.inf).scatter(1, best, 0.0)


@torch.no_grad()
def sampled(bench: "Bench", task: str, guide: Guide, *, num_samples: int, seed: int) -> dict:
    """Return a row for texts sampled with a guide for the test prompts."""
    rows = [ids for ids in bench.prompts_ids["test"] for _ in range(num_samples)]
    generator, completions = torch.Generator().manual_seed(seed), []
    for first in range(0, len(rows), ROWS):

        def part(live, hidden, logits, first=first):
            return guide([first + row for row in live], hidden, logits)

        completions += draw(
            bench.model,
            rows[first : first + ROWS],
            max_new_tokens=bench.max_new_tokens,
            generator=generator,
            eos_token_id=bench.eos,
            guide=part,
        )
    groups = [completions[first : first + num_samples] for first in range(0, len(completions), num_samples)]
    return _row(bench, task, groups, guide.kl.view(-1, num_samples), guide.surprise.sum().item(), groups)


def patient_row(bench: "Bench", task: str) -> dict:
    """Return the row of [`sampled`] for the patient's own samples. Diversity uses the same number of texts."""
    groups = [[answer.ids.tolist() for answer in group] for group in bench.answers["test"]]
    surprise = -sum(patient_logps(bench.embeddings, a).sum().item() for group in bench.answers["test"] for a in group)
    kl = torch.zeros(len(groups), len(groups[0]))
    return _row(bench, task, groups, kl, surprise, [group[:NUM_SAMPLES] for group in groups])


def _row(bench: "Bench", task: str, groups: Sequence, kl: torch.Tensor, surprise: float, pool: Sequence) -> dict:
    """Return measures of texts (P, N), from KLs (P, N), summed cross-entropy, and the texts for the diversity."""
    texts = [[bench.text(ids) for ids in group] for group in groups]
    scores = torch.tensor([[TASKS[task].score(text) for text in group] for group in texts]).double()
    gain = scores.mean(dim=1) - bench.scores[task, "test"].mean(dim=1)
    lengths = torch.tensor([[float(len(ids)) for ids in group] for group in groups])
    own = [len(answer.ids) for group in bench.answers["test"] for answer in group]
    return {
        "kl": kl.mean().item(),
        "kl_by_prompt": [round(x, 4) for x in kl.mean(dim=1).tolist()],
        "gain": gain.mean().item(),
        "by_prompt": [round(x, 5) for x in gain.tolist()],
        "tokens": lengths.mean().item() / (sum(own) / len(own)),
        "ends": sum(ids[-1] == bench.eos for group in groups for ids in group) / lengths.numel(),
        "distinct_4": distinct_n([bench.text(ids) for group in pool for ids in group]),
        "surprise": surprise / lengths.sum().item(),
    }


def strength_at(rows: list[dict], kl: float) -> float | None:
    """Interpolate the strength at a KL from the two closest rows, as a power of the KL. None if a row is missing."""
    known = sorted({row["kl"]: row["strength"] for row in rows if "strength" in row}.items())
    if len(known) < 2:
        return None
    (k0, b0), (k1, b1) = sorted(sorted(known, key=lambda x: abs(math.log(x[0] / kl)))[:2])
    return b0 * (b1 / b0) ** (math.log(kl / k0) / math.log(k1 / k0))
