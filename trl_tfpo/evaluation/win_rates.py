# SPDX-License-Identifier: Apache-2.0

"""
Win rates: head-to-head comparison of two methods on the same prompts.

Shapes: S seeds, P prompts, N samples of each prompt; the baseline has S' seeds and M samples.
"""

from collections.abc import Sequence
from typing import Unpack

import torch

from .bootstrap import IntervalSettings, mean_with_interval
from .completions import Completions, Grouped, Prompt, group_by_prompt, text_of
from .judges import PairwiseJudge, RewardFunction, score_texts


def head_to_head(
    prompts: Sequence[Prompt],
    completions: Completions,
    baseline_completions: Completions,
    judge: RewardFunction | PairwiseJudge,
    *,
    tie_margin: float = 0.0,
    **settings: Unpack[IntervalSettings],
) -> dict[str, float | int | None]:
    """
    Compute the shares of prompts on which a method wins, loses or ties against a baseline.

    Args:
        prompts (sequence of `str` or `list[dict]`):
            P prompts, 300 in the paper.
        completions (sequence of [`Completion`] or `str`, or a sequence of such sequences, one for each seed):
            Completions of the method, grouped by prompt: those of the first prompt, then those of the second, and so
            on.
        baseline_completions:
            Completions of the baseline, for as many seeds or for one.
        judge (`Callable` or [`PairwiseJudge`]):
            A reward function `(prompts, completions) -> list[float]` compares every sample of a prompt with every
            sample of the baseline. A pairwise judge compares the first samples of each prompt in both orders. A win or
            loss needs the same verdict in both orders. Otherwise the result is a tie.
        tie_margin (`float`, *optional*, defaults to `0.0`):
            Rewards that differ by no more than this are a tie.
        **settings:
            `level`, `num_resamples` and `seed` of [`bootstrap_interval`].

    Returns:
        `dict`: the shares `win`, `loss` and `tie`; `win_half_tie`, wins plus half the ties, with its bootstrap
        interval from `low` to `high`; `num_prompts`; and, for a pairwise judge, `num_without_verdict`, the number of
        pairs that lack a verdict in at least one order, and `consistency`, the share of the other pairs with the same
        verdict in both orders. Pairs without a verdict count as ties. For a reward function `consistency` is `None`.

    Raises:
        `ValueError`: when the number of completions is not a multiple of the number of prompts, a completion belongs
            to another prompt, the baseline has several seeds but not as many as the method, a setting is out of range,
            or the judge does not return one verdict or finite reward for each question.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import head_to_head
    >>> def length(prompts, completions):
    ...     return [float(len(text)) for text in completions]
    >>> result = head_to_head(["a", "b"], ["long", "even"], ["no", "even"], length)
    >>> result["win"], result["tie"], result["win_half_tie"]
    (0.5, 0.5, 0.75)

    ```
    """
    method, baseline = group_by_prompt(prompts, completions), group_by_prompt(prompts, baseline_completions)
    if len(baseline) not in (1, len(method)):
        raise ValueError(
            "The baseline must have as many seeds as the method, or one. Got "
            f"{len(baseline)} for {len(method)}; pass one."
        )
    if isinstance(judge, PairwiseJudge):
        return _compare_by_judge(judge, prompts, method, baseline, settings)
    rewards, baseline_rewards = (rewards_by_prompt(judge, prompts, side) for side in (method, baseline))
    return compare_rewards(rewards, baseline_rewards, tie_margin=tie_margin, **settings)


def _compare_by_judge(
    judge: PairwiseJudge, prompts: Sequence[Prompt], method: Grouped, baseline: Grouped, settings: IntervalSettings
) -> dict[str, float | int | None]:
    """Win rates by a judge's verdicts on the first samples of each prompt, in both orders."""
    pairs = [
        (prompt, [text_of(ours[0]), text_of(theirs[0])])
        for i, seed in enumerate(method)
        for prompt, ours, theirs in zip(prompts, seed, baseline[i % len(baseline)], strict=True)
    ]
    asked = [*pairs, *((prompt, pair[::-1]) for prompt, pair in pairs)]
    found = judge.judge([prompt for prompt, _ in asked], [pair for _, pair in asked], shuffle_order=False)
    verdicts = torch.as_tensor(found, dtype=torch.float64)
    is_known = (verdicts == 0) | (verdicts == 0.5) | (verdicts == 1) | (verdicts == -1)
    if verdicts.shape != (len(asked),) or not is_known.all():
        raise ValueError(
            "A pairwise judge must return 0, 1, 0.5 or -1 for each pair. Got "
            f"{tuple(verdicts.shape)} verdicts for {len(asked)} pairs; see `PairwiseJudge`."
        )
    first, swapped = verdicts.view(2, len(method), len(prompts))  # (S, P) each
    has_verdict = (first >= 0) & (swapped >= 0)
    wins, losses = (first == 0) & (swapped == 1), (first == 1) & (swapped == 0)
    result = _win_rates(wins[..., None].double(), losses[..., None].double(), settings)
    same = (first == 1 - swapped)[has_verdict]
    return result | {
        "consistency": same.double().mean().item() if len(same) else None,
        "num_without_verdict": int((~has_verdict).sum()),
    }


def compare_rewards(
    rewards: torch.Tensor,
    baseline_rewards: torch.Tensor,
    *,
    tie_margin: float = 0.0,
    **settings: Unpack[IntervalSettings],
) -> dict[str, float | int | None]:
    """
    Win rates, as in [`head_to_head`], of rewards (S, P, N) against baseline rewards (S', P, M), where S' is S or 1.

    Raises `ValueError` when the margin is negative.
    """
    if not tie_margin >= 0:
        raise ValueError(f"`tie_margin` must not be negative. Got {tie_margin}; at 0 only equal rewards are a tie.")
    margins = rewards[..., None] - baseline_rewards[..., None, :]  # (S, P, N, M)
    wins, losses = (margins > tie_margin).double().mean(dim=3), (margins < -tie_margin).double().mean(dim=3)
    return _win_rates(wins, losses, settings) | {"consistency": None, "num_without_verdict": 0}


def rewards_by_prompt(reward_fn: RewardFunction, prompts: Sequence[Prompt], completions: Grouped) -> torch.Tensor:
    """Rewards (S, P, N) of completions, from one call of the reward function."""
    rows = [
        (prompt, text_of(sample))
        for seed in completions
        for prompt, samples in zip(prompts, seed, strict=True)
        for sample in samples
    ]
    rewards = score_texts(reward_fn, [prompt for prompt, _ in rows], [text for _, text in rows])
    return rewards.view(len(completions), len(prompts), -1)


def _win_rates(wins: torch.Tensor, losses: torch.Tensor, settings: IntervalSettings) -> dict[str, float | int | None]:
    """Win rates from wins and losses (S, P, N), each in [0, 1]."""
    score = mean_with_interval((1 + wins - losses) / 2, **settings)
    win, loss = wins.mean().item(), losses.mean().item()
    return {
        "win": win,
        "loss": loss,
        "tie": max(1 - win - loss, 0.0),
        "win_half_tie": score["mean"],
        "low": score["low"],
        "high": score["high"],
        "num_prompts": wins.size(1),
    }
