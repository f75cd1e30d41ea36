# SPDX-License-Identifier: Apache-2.0

"""
Rewards of whole texts, and the gain of a perfect doctor for each reward.

Samples of the patient for validation prompts are reweighted by the exponential of the reward, without training.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from states import Answer

from trl_tfpo.functional import token_rewards
from trl_tfpo.testbed.frontier import find_tilt, kl_from_uniform
from trl_tfpo.training.calibration import Calibration, calibrate


if TYPE_CHECKING:
    from bench import Bench


SIGNAL_KLS = [0.1, 0.25, 0.5, 1.0]  # nats


def gain_by(signal: torch.Tensor, scores: torch.Tensor, kl: float) -> float:
    """Return the gain of samples with scores (P, N), reweighted by a signal (P, N), at a mean KL in nats."""
    _, weights = find_tilt(signal, lambda weights: kl_from_uniform(weights).mean(), kl)
    return ((weights * scores).sum(dim=1).mean() - scores.mean()).item()


def calibrated(task: str, pairs: Sequence[tuple[Answer, Answer]], embeddings: torch.Tensor, eos: int) -> Calibration:
    """Calibrate token rewards on pairs (chosen, rejected) and the gaps of a task's faces."""
    columns = {name: [] for name in ("chosen_ids", "rejected_ids", "chosen_gaps", "rejected_gaps")}
    for pair in pairs:
        for side, answer in zip(("chosen", "rejected"), pair, strict=True):
            columns[f"{side}_ids"].append(answer.ids.tolist())
            columns[f"{side}_gaps"].append(answer.faces[task][0].tolist())
    return calibrate(Dataset.from_dict(columns), embeddings, [eos])


def sums(groups: list[list[Answer]], reward: Callable[[Answer], torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.stack([reward(answer).sum() for answer in group]) for group in groups]).double()


def sparse_rewards(task: str, answer: Answer, sign: float = 1.0, **settings) -> torch.Tensor:
    """Return the token rewards of `functional.token_rewards` from the gaps of an answer."""
    gap = answer.faces[task][0][None]
    return token_rewards(
        positive_logps=gap,
        negative_logps=torch.zeros_like(gap),
        preference_sign=torch.tensor([sign]),
        completion_mask=torch.ones_like(gap, dtype=torch.bool),
        **settings,
    )[0]


def signals(bench: "Bench", task: str, seed: int) -> list[dict]:
    """Return a row for each reward: its share of the best possible gain on validation prompts, and its correlation."""
    groups, scores = bench.answers["validation"], bench.scores[task, "validation"]
    calibration = bench.calibration(task, seed)

    def gaps(answer: Answer) -> torch.Tensor:
        return answer.faces[task][0].masked_fill(answer.ids == bench.eos, 0)

    rewards = {
        "length": lambda answer: torch.ones(len(answer.ids)),
        "sparse token rewards, by the faces": lambda answer: sparse_rewards(task, answer, reward_direction="faces"),
        "raw gaps": gaps,
        "mean gap": lambda answer: gaps(answer) / len(answer.ids),
        "gaps clipped at 1 nat": lambda answer: gaps(answer).clamp(-1, 1),
        "usual gap of each token": lambda answer: calibration.usual[answer.ids],
        "calibrated rewards": lambda answer: calibration.credits[answer.ids],
    }
    rows = []
    for name, reward in rewards.items():
        signal = sums(groups, reward)
        a, b = ((x - x.mean(dim=1, keepdim=True)).flatten() for x in (signal, scores))
        row = {"signal": name, "task": task, "seed": seed, "correlation": (a @ b / (a.norm() * b.norm())).item()}
        for kl in SIGNAL_KLS:
            gain, best = (gain_by(x, scores, kl) for x in (signal, scores))
            row[f"{kl} nats"] = gain / best
        rows.append(row)
    return rows
