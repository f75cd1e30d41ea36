# SPDX-License-Identifier: Apache-2.0

r"""
Bootstrap confidence intervals of means over prompts and seeds.

Shapes: S seeds, P prompts, N samples of a prompt.
"""

import math
from typing import TypedDict, Unpack

import torch


MAX_ELEMENTS = 2**22  # resampled prompt indices in memory


class IntervalSettings(TypedDict, total=False):
    """Settings of [`bootstrap_interval`]."""

    level: float
    num_resamples: int
    seed: int


def bootstrap_interval(
    values: torch.Tensor, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    r"""
    Percentile interval of a mean over prompts, or over seeds and prompts.

    Prompts are resampled with replacement. Several seeds are also resampled, independently of the prompts. All
    seeds of a resample share its prompts. Average the samples of a prompt first, because they are not independent.
    With few seeds, the seeds' part of the interval is too short by a factor of about $\sqrt{(S - 1) / S}$.

    Args:
        values (`torch.Tensor` of shape `(P,)` or `(S, P)`):
            One finite number per prompt, or per seed and prompt.
        level (`float`, *optional*, defaults to `0.95`):
            Nominal coverage, between 0 and 1.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `0`):
            Random seed. Methods with the same seed are compared on the same resamples.

    Returns:
        `tuple[float, float]`: lower and upper end.

    Raises:
        `ValueError`: when there are fewer than two prompts, a value is not finite, or a setting is out of range.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.evaluation import bootstrap_interval
    >>> low, high = bootstrap_interval(torch.arange(100.0))
    >>> low < 49.5 < high
    True

    ```
    """
    values = torch.as_tensor(values).detach().cpu().double()
    if values.dim() not in (1, 2) or values.shape[-1] < 2 or values.shape[0] < 1 or not values.isfinite().all():
        raise ValueError(
            "`values` must be finite, of shape (P,) or (S, P) with at least two prompts. Got shape "
            f"{tuple(values.shape)}, {int((~values.isfinite()).sum())} not finite; pass finite values of more prompts."
        )
    check_interval(level, num_resamples)
    values = values.view(-1, values.shape[-1])  # (S, P)
    num_seeds, num_prompts = values.shape
    generator = torch.Generator().manual_seed(seed)
    means = []
    batch_size = max(1, MAX_ELEMENTS // num_prompts)
    for start in range(0, num_resamples, batch_size):
        num = min(batch_size, num_resamples - start)
        prompts = torch.randint(num_prompts, (num, num_prompts), generator=generator)
        by_seed = torch.stack([row[prompts].mean(dim=1) for row in values], dim=1)  # (resamples, S)
        if num_seeds > 1:
            by_seed = by_seed.gather(1, torch.randint(num_seeds, by_seed.shape, generator=generator))
        means.append(by_seed.mean(dim=1))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tail).tolist()
    return low, high


def check_interval(level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> None:
    """Raise `ValueError` unless the settings of [`bootstrap_interval`] are in range."""
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(
            f"`level` must be between 0 and 1, and `num_resamples` at least 1. Got {level} and {num_resamples}; 0.95 "
            "and 2000 are usual."
        )


def mean_with_interval(values: torch.Tensor, **settings: Unpack[IntervalSettings]) -> dict[str, float | None]:
    """
    Return the `mean` of values (S, P, N), and its bootstrap interval from `low` to `high`.

    The interval is over prompts or, for a single prompt, over its samples. A single sample of a single prompt has no
    interval: its ends are `None`. If a value is not finite, mean and ends are `None`.
    """
    check_interval(**settings)  # even without an interval
    units = values.mean(dim=2) if values.size(1) > 1 else values[:, 0]  # (S, P), or (S, N)
    mean = units.mean().item()
    is_known = units.size(1) > 1 and bool(units.isfinite().all())
    low, high = bootstrap_interval(units, **settings) if is_known else (None, None)
    return {"mean": mean if math.isfinite(mean) else None, "low": low, "high": high}
