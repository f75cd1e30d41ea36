# SPDX-License-Identifier: Apache-2.0

"""
Measures: reward at a given KL from the patient, on test or validation prompts.

Up to 2 nats, estimates use the same importance-weighted samples of the patient for all methods. Strengths are found on
these samples. At 2 nats the effective sample size of 64 samples is already too small. Near 1, 2 and 4 nats, texts are
therefore also sampled from the guided patient (`guided.py`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from signals import sums
from states import Answer, Logits, weigh
from tasks import TASKS

from trl_tfpo.testbed import reward_kl_frontier


if TYPE_CHECKING:
    from bench import Bench


KLS = [0.25, 0.5, 1.0, 2.0]  # nats
OBJECTIVE_KLS = [0.5, 1.0]
BETAS = [x * y for y in (1e-3, 1e-2, 0.1, 1, 10) for x in (1, 1.8, 3.2, 5.6)]  # strengths; KLs are interpolated
FIRST_BETA = BETAS.index(0.1)
NO_TRAINING = ("best of 2 by the scorer", "best of 4 by the scorer", "best of 2 by credits", "best of 4 by credits")


def best_of_weights(weights: torch.Tensor, signal: torch.Tensor, n: int) -> torch.Tensor:
    """
    Return the probability (P, N) that each sample is the best of n.

    The n samples are drawn with replacement by `weights` (P, N) with sum 1, and ranked by `signal` (P, N).
    """
    order = signal.argsort(dim=1)
    up_to = weights.gather(1, order).cumsum(dim=1) ** n
    of_ranks = up_to.diff(dim=1, prepend=torch.zeros(len(up_to), 1).to(up_to))
    return torch.zeros_like(weights).scatter(1, order, of_ranks)


def best_of_kl(n: int) -> float:
    """Return the largest KL of the best of n samples from their distribution, in nats."""
    return math.log(n) - (n - 1) / n


def interpolated(
    groups: Sequence[Sequence[Answer]],
    logits: Logits,
    values: dict[str, torch.Tensor],
    kls: Sequence[float],
    ranked_by: torch.Tensor | None = None,
    n: int = 1,
) -> list[tuple[dict, dict[str, torch.Tensor]]]:
    """
    Return expectations of a guided patient at given KLs, linear in the root of the KL.

    Args:
        groups (P groups of N [`Answer`]):
            Samples of the patient.
        logits ([`~states.Logits`]):
            The doctor's logits on these samples, at strength 1.
        values (`dict[str, torch.Tensor]` of shape `(P, N)`):
            Values of the samples, by name.
        kls (`Sequence[float]`):
            Mean KLs, in nats.
        ranked_by (`torch.Tensor` of shape `(P, N)`, *optional*), n (`int`, *optional*):
            Signal that selects the best of n guided samples.

    Returns:
        `list` of a row with `kl`, `strength` and `num_effective`, and the expectations `(P,)` by name.
    """

    def point(beta: float) -> tuple[float, float, dict[str, torch.Tensor], float]:
        found = weigh(groups, logits, beta)
        weights = found.weights if n == 1 else best_of_weights(found.weights, ranked_by, n)
        by_prompt = {name: (weights * x).sum(dim=1) for name, x in values.items()}
        by_prompt["kl"] = (found.weights * found.kl).sum(dim=1)
        if n > 1:  # the KL of the selected samples from the patient, plus the KL of the selection
            by_prompt["kl"] += ((weights - found.weights) * found.log_ratios).sum(dim=1) + best_of_kl(n)
        num_effective = (1 / found.weights.square().sum(dim=1)).mean().item()
        return by_prompt["kl"].mean().item(), beta, by_prompt, num_effective

    points = [point(BETAS[FIRST_BETA])]
    for beta in reversed(BETAS[:FIRST_BETA]):  # smaller strengths, for a doctor with large logits
        if points[0][0] <= max(kls[0], 2 * best_of_kl(n)):
            break
        points.insert(0, point(beta))
    if n > 1:
        points.insert(0, point(0.0))
    for beta in BETAS[FIRST_BETA + 1 :]:
        if points[-1][0] > kls[-1]:
            break
        points.append(point(beta))
    rows = []
    for kl, ((k0, b0, x0, n0), (k1, b1, x1, n1)) in itertools.product(kls, itertools.pairwise(points)):
        if k0 <= kl < k1:
            share = (kl**0.5 - k0**0.5) / (k1**0.5 - k0**0.5)
            row = {"kl": kl, "strength": b0 + share * (b1 - b0), "num_effective": min(n0, n1)}
            rows.append((row, {name: torch.lerp(x0[name], x1[name], share) for name in values}))
    return rows


def measure(
    bench: "Bench", task: str, split: str, logits: Logits, ranked_by: torch.Tensor | None = None, n: int = 1
) -> list[dict]:
    """Return a row for each KL: reward, tokens, share of complete texts, gain by prompt."""
    groups, scores = bench.answers[split], bench.scores[task, split]
    tokens = torch.tensor([[float(len(a.ids)) for a in group] for group in groups]).double()
    ends = torch.tensor([[float(a.ends) for a in group] for group in groups]).double()
    rows = []
    for row, found in interpolated(
        groups, logits, {"reward": scores, "tokens": tokens, "ends": ends}, KLS, ranked_by, n
    ):
        gain = found["reward"] - scores.mean(dim=1)
        row |= {"reward": found["reward"].mean().item(), "gain": gain.mean().item()}
        row |= {"tokens": found["tokens"].mean().item() / tokens.mean().item(), "ends": found["ends"].mean().item()}
        rows.append(row | shares(bench, task, split, row["kl"], gain))
    nothing = {"kl": 0.0, "gain": 0.0, "by_prompt": [0.0] * len(groups)}  # where no strength reaches the first KL
    return rows or [nothing]


def shares(bench: "Bench", task: str, split: str, kl: float, gain: torch.Tensor) -> dict:
    """Return gains by prompt (P,), and the share of the best possible gain if the frontier reaches the KL."""
    frontier, by_prompt = bench.frontier(task, split), {"by_prompt": [round(x, 5) for x in gain.tolist()]}
    if kl > frontier.max_kl:
        return by_prompt
    return {"efficiency": gain.mean().item() / (frontier.best_reward(kl) - frontier.patient_reward)} | by_prompt


def best_of(bench: "Bench", task: str, seed: int, name: str) -> list[dict]:
    """Return a row for the best of n patient samples. `name` is one of `NO_TRAINING`."""
    n, scores = int(name.split()[2]), bench.scores[task, "test"]
    signal = scores
    if name.endswith("credits"):
        credits = bench.calibration(task, seed).credits
        signal = sums(bench.answers["test"], lambda answer: credits[answer.ids])
    even = torch.full_like(scores, 1 / scores.size(1))
    gain = (scores * best_of_weights(even, signal, n)).sum(dim=1) - scores.mean(dim=1)
    kl = best_of_kl(n)
    row = {"kl": kl, "reward": (gain + scores.mean(dim=1)).mean().item(), "gain": gain.mean().item()}
    return [row | shares(bench, task, "test", kl, gain)]


def best_possible(bench: "Bench", task: str) -> dict:
    """Return the frontier on test prompts: the best gain and its standard error at some KLs."""
    frontier = bench.frontier(task, "test")
    kls = [frontier.max_kl * (i / 40) ** 2 for i in range(41)]
    gains = [frontier.best_reward(kl) - frontier.patient_reward for kl in kls]
    return {"kls": kls, "gains": gains, "standard_errors": [frontier.standard_error(kl) for kl in kls]}


def measure_objectives(bench: "Bench", weights: dict[str, float], logits: Logits) -> list[dict]:
    """Return a row for each KL: gains in the score of each task, and by prompt in the weighted log-odds of labels."""
    factors = {name: weight * TASKS[name].noise_factor for name, weight in weights.items()}
    scores = {name: bench.scores[name, "test"] for name in weights}
    utility = sum(factor * scores[name] for name, factor in factors.items())
    frontier, rows = reward_kl_frontier(utility), []
    for row, found in interpolated(bench.answers["test"], logits, scores, OBJECTIVE_KLS):
        gains = {name: found[name] - scores[name].mean(dim=1) for name in weights}
        gain = sum(factor * gains[name] for name, factor in factors.items())
        row |= {"gains": {name: x.mean().item() for name, x in gains.items()}, "gain": gain.mean().item()}
        if row["kl"] <= frontier.max_kl:
            row["efficiency"] = row["gain"] / (frontier.best_reward(row["kl"]) - frontier.patient_reward)
        rows.append(row | {"by_prompt": [round(x, 5) for x in gain.tolist()]})
    return rows


def combined(logits: dict[str, Logits], weights: dict[str, float]) -> Logits:
    """Return weighted sums of the logits of several doctors on the same samples."""
    each = [[(w * own, w * others) for own, others in logits[name]] for name, w in weights.items()]
    return [tuple(sum(x) for x in zip(*groups, strict=True)) for groups in zip(*each, strict=True)]
