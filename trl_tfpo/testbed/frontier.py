# SPDX-License-Identifier: Apache-2.0

r"""
The frontier: the largest reward of any policy at a given KL divergence from the patient.

Shapes: P prompts, N patient samples of each, L points of the frontier. Units: nats for a divergence, the unit of the
reward for everything else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


MIN_EFFECTIVE_SAMPLES = 10  # per prompt; with fewer, the best samples are mistaken for the tail


@dataclass(frozen=True)
class Frontier:
    r"""
    Best expected reward as a function of the KL from the patient, computed by [`reward_kl_frontier`].

    Args:
        kls (`torch.Tensor` of shape `(L,)`):
            $\mathrm{KL}(\pi \,\|\, \pi_{\text{patient}})$ of whole completions, in nats, averaged over prompts;
            increasing from 0.
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
        """Expected reward of the patient, the frontier at KL 0."""
        return self.rewards[0].item()

    @property
    def max_kl(self) -> float:
        """Largest KL of the frontier, in nats. The samples are too few for a larger one."""
        return self.kls[-1].item()

    def best_reward(self, kl: float) -> float:
        """
        Reward of the best policy at a KL of `kl` nats.

        Raises:
            `ValueError`: when `kl` is negative or beyond `max_kl`.
        """
        return self._interpolate(self.rewards, kl)

    def standard_error(self, kl: float) -> float:
        """
        Standard error of [`best_reward`] at `kl`.

        Raises:
            `ValueError`: when `kl` is negative or beyond `max_kl`.
        """
        return self._interpolate(self.standard_errors, kl)

    def efficiency(self, reward: float, kl: float) -> float:
        """
        Return the gain of a policy over the patient, as a share of the largest gain at the same KL.

        Args:
            reward (`float`):
                Expected reward of the policy.
            kl (`float`):
                Its KL from the patient, in nats, positive.

        Returns:
            `float`: at most 1, up to the errors of the estimates; 0 for no gain, negative for a loss.

        Raises:
            `ValueError`: when `kl` is not positive or beyond `max_kl`.
        """
        if kl == 0:
            raise ValueError(
                "`kl` must be positive: at 0 the only policy is the patient, and no gain is possible. Got 0; measure "
                "a policy that differs from the patient."
            )
        return (reward - self.patient_reward) / (self.best_reward(kl) - self.patient_reward)

    def _interpolate(self, values: torch.Tensor, kl: float) -> float:
        """Interpolate `values` at `kl`, linearly in the root of the KL, as the best reward is linear in it near 0."""
        kl = float(kl)
        if not 0 <= kl <= self.max_kl:
            raise ValueError(
                f"`kl` must be in [0, {self.max_kl:.3f}], where the frontier is reliable. Got {kl}; average a "
                "negative estimate over more samples, and draw more patient samples per prompt for a larger KL."
            )
        roots = self.kls.sqrt()
        right = int(torch.searchsorted(roots, torch.tensor(kl, dtype=roots.dtype).sqrt()).clamp(1, len(roots) - 1))
        share = (kl**0.5 - roots[right - 1]) / (roots[right] - roots[right - 1])
        return torch.lerp(values[right - 1], values[right], share).item()


def reward_kl_frontier(rewards: torch.Tensor) -> Frontier:
    r"""
    Compute the frontier of reward against KL from rewards of patient samples.

    The best policy at each KL is the patient tilted by the reward, with one inverse temperature $\lambda$ for all
    prompts and a normalizer for each prompt:

    $$\pi_\lambda(y \mid x) = \pi_{\text{patient}}(y \mid x)\, e^{\lambda R(x, y)} / Z_x, \qquad
    \mathrm{KL}_x = \lambda\, \mathbb{E}_\lambda[R \mid x] - \log Z_x$$

    Reward and KL are importance-weighted estimates. At a large $\lambda$ the effective number of samples
    $N_{\text{eff}} = (\sum w)^2 / \sum w^2$ is small, and the frontier is too low by about
    $(1 / N_{\text{eff}} - 1 / N) / 2\lambda$. The frontier therefore ends where the harmonic mean of $N_{\text{eff}}$
    over prompts falls below 10. At this point the gain of a Gaussian reward is still right to 2 percent. As a rule, N
    = 300 reaches 2 nats, and N = 1600 more than 3. The frontier also ends where a larger KL gains almost no reward.

    The standard error is that of the dual form of the frontier, $\min_\lambda (\mathrm{KL} + \overline{\log Z}) /
    \lambda$. At the minimum it depends only on the noise of $\log Z_x$, whose variance is $1 / N_{\text{eff}} - 1 /
    N$. It covers the choice of the samples, not that of the prompts.

    Args:
        rewards (`torch.Tensor` of shape `(P, N)`):
            Rewards of N independent samples of the patient, at temperature 1, for each of P prompts.

    Returns:
        `Frontier`

    Raises:
        `ValueError`: when `rewards` is not a finite matrix with at least 10 samples per prompt, or when the reward
        is constant.

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
            f"`rewards` must vary within a prompt. Got the same reward for all {num_samples} samples of each; no "
            "policy can gain anything."
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


def tilted(
    rewards: torch.Tensor, grows: Callable[[torch.Tensor], torch.Tensor], wanted: float
) -> tuple[float, torch.Tensor]:
    """
    Find the tilt at which a quantity that increases with the tilt has a given value.

    Args:
        rewards (`torch.Tensor` of shape `(P, N)`):
            Rewards of N patient samples for each of P prompts.
        grows (`Callable`):
            From the weights of the samples to the quantity, such as the mean of [`kl_of`].
        wanted (`float`):
            Value of the quantity. Where it needs a tilt above 10,000, the tilt is 10,000.

    Returns:
        `tuple`: the tilt, and the weights of shape `(P, N)`.
    """
    low, high = 0.0, 1e4
    for _ in range(70):
        tilt = (low + high) / 2
        weights = (tilt * rewards).softmax(dim=1)
        low, high = (tilt, high) if grows(weights) < wanted else (low, tilt)
    return tilt, weights


def kl_of(weights: torch.Tensor) -> torch.Tensor:
    """KL (P,) in nats of weights (P, N), which sum to 1, from uniform weights."""
    return (weights * (weights * weights.size(1)).clamp(min=1e-300).log()).sum(dim=1)
