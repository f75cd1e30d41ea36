# SPDX-License-Identifier: Apache-2.0

r"""
The frontier: the largest reward of any policy at each KL divergence from the patient.

Shapes: P prompts, N patient samples per prompt, L points of the frontier. KL is in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


MIN_EFFECTIVE_SAMPLES = 10  # per prompt; with fewer, the estimate of the tail is biased


@dataclass(frozen=True)
class Frontier:
    r"""
    Best expected reward as a function of KL from the patient. [`reward_kl_frontier`] computes it.

    Args:
        kls (`torch.Tensor` of shape `(L,)`):
            $\mathrm{KL}(\pi \,\|\, \pi_{\text{patient}})$ of whole completions, averaged over prompts, in nats.
            Increases from 0.
        rewards (`torch.Tensor` of shape `(L,)`):
            Best expected reward at each KL.
        standard_errors (`torch.Tensor` of shape `(L,)`):
            Standard error of each reward.
    """

    kls: torch.Tensor
    rewards: torch.Tensor
    standard_errors: torch.Tensor

    @property
    def patient_reward(self) -> float:
        """Expected reward of the patient, at KL 0."""
        return self.rewards[0].item()

    @property
    def max_kl(self) -> float:
        """Largest KL of the frontier in nats. Estimates at larger KL need more samples."""
        return self.kls[-1].item()

    def best_reward(self, kl: float) -> float:
        """Reward of the best policy at `kl` nats. Raises `ValueError` when `kl` is not in `[0, max_kl]`."""
        return self._interpolate(self.rewards, kl)

    def standard_error(self, kl: float) -> float:
        """Standard error of [`best_reward`]. Raises `ValueError` when `kl` is not in `[0, max_kl]`."""
        return self._interpolate(self.standard_errors, kl)

    def efficiency(self, reward: float, kl: float) -> float:
        """
        Gain of a policy over the patient, as a share of the largest possible gain at the same KL.

        Args:
            reward (`float`):
                Expected reward of the policy.
            kl (`float`):
                KL of the policy from the patient, in nats.

        Returns:
            `float`: at most 1, apart from estimation error; 0 for no gain, negative for a loss.

        Raises:
            `ValueError`: when `kl` is not in `(0, max_kl]`.
        """
        if kl == 0:
            raise ValueError(
                "`kl` must be positive, because only the patient has KL 0. Got 0; measure a policy that differs from "
                "the patient."
            )
        return (reward - self.patient_reward) / (self.best_reward(kl) - self.patient_reward)

    def _interpolate(self, values: torch.Tensor, kl: float) -> float:
        """Interpolate `values` linearly in the root of the KL. Near 0 the best reward is linear in this root."""
        kl = float(kl)
        if not 0 <= kl <= self.max_kl:
            raise ValueError(
                f"`kl` must be in [0, {self.max_kl:.3f}], where the frontier is reliable. Got {kl}; draw more patient "
                "samples per prompt for a larger KL, and average a negative estimate over more samples."
            )
        roots = self.kls.sqrt()
        right = int(torch.searchsorted(roots, torch.tensor(kl, dtype=roots.dtype).sqrt()).clamp(1, len(roots) - 1))
        share = (kl**0.5 - roots[right - 1]) / (roots[right] - roots[right - 1])
        return torch.lerp(values[right - 1], values[right], share).item()


def reward_kl_frontier(rewards: torch.Tensor) -> Frontier:
    r"""
    Compute the frontier of reward against KL from the rewards of patient samples.

    The best policy at each KL is the patient, exponentially tilted by the reward. All prompts have the same tilt
    $\lambda$:

    $$\pi_\lambda(y \mid x) = \pi_{\text{patient}}(y \mid x)\, e^{\lambda R(x, y)} / Z_x, \qquad
    \mathrm{KL}_x = \lambda\, \mathbb{E}_\lambda[R \mid x] - \log Z_x$$

    Reward and KL are importance-weighted estimates. For a large $\lambda$ the effective number of samples
    $N_{\text{eff}} = (\sum w)^2 / \sum w^2$ is small, and the frontier is too low by about
    $(1 / N_{\text{eff}} - 1 / N) / 2\lambda$. The frontier therefore ends where the harmonic mean of $N_{\text{eff}}$
    over prompts falls below 10. There the gain of a Gaussian reward is accurate to 2 percent. Typically N = 300
    reaches 2 nats, and N = 1600 more than 3. The frontier also ends where a larger KL adds almost no reward.

    The standard error is that of the dual form of the frontier, $\min_\lambda (\mathrm{KL} + \overline{\log Z}) /
    \lambda$. At the minimum it depends only on the noise of $\log Z_x$, which has variance $1 / N_{\text{eff}} - 1 /
    N$. The standard error accounts for the sampling of texts, but not of prompts.

    Args:
        rewards (`torch.Tensor` of shape `(P, N)`):
            Rewards of N independent samples of the patient, at temperature 1, for each of P prompts.

    Returns:
        `Frontier`

    Raises:
        `ValueError`: when `rewards` is not a finite matrix with at least 10 samples per prompt, or is constant within
            each prompt.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.testbed import reward_kl_frontier
    >>> frontier = reward_kl_frontier(torch.tensor([[0.0, 1.0]]).repeat(1, 500))  # a fair coin
    >>> round(frontier.best_reward(0.1308), 3)  # tilted to odds of 3 to 1: KL = log 2 - H(3/4)
    0.75

    ```
    """
    rewards = torch.as_tensor(rewards)
    if rewards.ndim != 2 or rewards.size(1) < MIN_EFFECTIVE_SAMPLES or not rewards.isfinite().all():
        raise ValueError(
            f"`rewards` must be a finite (P, N) matrix, with N at least {MIN_EFFECTIVE_SAMPLES}. Got shape "
            f"{tuple(rewards.shape)}; draw more samples of each prompt."
        )
    rewards = rewards.cpu().double()
    num_samples = rewards.size(1)
    scale = rewards.std(dim=1).square().mean().sqrt()
    if scale == 0:
        raise ValueError(
            f"`rewards` must vary within a prompt. Got the same reward for all {num_samples} samples of each; use "
            "another reward function."
        )
    mean = rewards.mean(dim=1, keepdim=True)
    points = [(torch.zeros_like(scale), mean.mean(), (rewards.var(dim=1).mean() / rewards.numel()).sqrt())]
    for tilt in torch.logspace(-2, 2, 400, dtype=torch.float64) / scale:  # lambda
        tilted = tilt * (rewards - mean)  # (P, N), centered for precision
        log_z = tilted.logsumexp(dim=1) - math.log(num_samples)  # (P,)
        weights = tilted.softmax(dim=1)
        kl = (weights * tilted).sum(dim=1) - log_z  # (P,)
        spread = weights.square().sum(dim=1) - 1 / num_samples  # (P,), 1 / N_eff - 1 / N
        reward = (weights * rewards).sum(dim=1).mean()
        error = spread.mean().div(len(rewards)).sqrt() / tilt
        too_few = (spread + 1 / num_samples).mean() > 1 / MIN_EFFECTIVE_SAMPLES
        saturated = reward - points[-1][1] < 1e-6 * scale
        if too_few or saturated:
            break
        points.append((kl.mean(), reward, error))
    return Frontier(*(torch.stack(column) for column in zip(*points, strict=True)))


def find_tilt(
    rewards: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor], target: float
) -> tuple[float, torch.Tensor]:
    """
    Find the tilt of rewards (P, N) at which a statistic of the sample weights reaches a target.

    `statistic` maps weights (P, N) to a number that increases with the tilt, such as the mean of
    [`kl_from_uniform`]. Returns the tilt, at most 10,000, and the weights.
    """
    low, high = 0.0, 1e4
    for _ in range(70):
        tilt = (low + high) / 2
        weights = (tilt * rewards).softmax(dim=1)
        low, high = (tilt, high) if statistic(weights) < target else (low, tilt)
    return tilt, weights


def kl_from_uniform(weights: torch.Tensor) -> torch.Tensor:
    """KL (P,) in nats of normalized weights (P, N) from uniform weights."""
    return (weights * (weights * weights.size(1)).clamp(min=1e-300).log()).sum(dim=1)
