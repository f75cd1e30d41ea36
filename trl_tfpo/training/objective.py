# SPDX-License-Identifier: Apache-2.0

"""Objective of the doctor: sub-trajectory balance plus value discrimination (stage 2 of LLMdoctor)."""

import torch

from ..functional import (
    first_divergence,
    flow_potential,
    log_prefix_scores,
    subtb_loss,
    terminal_boundary,
    value_discrimination_loss,
)


def tfpo_objective(
    *,
    doctor_logps: torch.Tensor,
    log_values: torch.Tensor,
    token_rewards: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    is_complete: torch.Tensor,
    reference_logps: torch.Tensor | None = None,
    reward_temperature: float = 0.25,
    reference_weight: float = 1.0,
    subtb_lambda: float = 0.95,
    value_loss_weight: float = 0.1,
    value_margin: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Loss of token-level flow-guided preference optimization for a batch of pairs.

    $$L = L_{\text{SubTB}} + \lambda L_{\text{value}}$$

    [`TFPOTrainer`] accepts any callable with the same tensors as keyword arguments. P pairs give B = 2P rows, chosen
    completions first; T tokens, S = T + 1 states.

    Args:
        doctor_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the balanced policy, in nats.
        log_values (`torch.Tensor` of shape `(B, S)`):
            Output of the value head at each state, in nats.
        token_rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            True for tokens, False for padding.
        is_complete (`torch.Tensor` of shape `(B,)`):
            True if the completion ends in EOS, False if it was truncated.
        reference_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probability of each token under the reference, in nats.
        reward_temperature (`float`, *optional*, defaults to `0.25`):
            Divisor of the rewards, see [`~trl_tfpo.functional.log_prefix_scores`].
        reference_weight (`float`, *optional*, defaults to `1.0`):
            Exponent of the reference in the target; 0 in the paper.
        subtb_lambda (`float`, *optional*, defaults to `0.95`):
            Sub-trajectories of n tokens have weight `subtb_lambda ** (n - 1)`, see
            [`~trl_tfpo.functional.subtb_loss`].
        value_loss_weight (`float`, *optional*, defaults to `0.1`):
            $\lambda$, weight of the value discrimination loss.
        value_margin (`float`, *optional*, defaults to `0.1`):
            $\gamma$, margin of the value discrimination loss in nats.

    Returns:
        `torch.Tensor`: the loss, a scalar, mean over pairs; and `dict[str, torch.Tensor]`: detached scalars.

    Raises:
        `ValueError`: if the rows are not pairs, a setting is out of range, or reference log-probabilities are missing.
    """
    if len(completion_ids) == 0 or len(completion_ids) % 2:
        raise ValueError(
            "The rows must be pairs, all chosen completions before all rejected ones. Got "
            f"{len(completion_ids)} rows; pass both completions of each pair."
        )
    log_values = terminal_boundary(log_values=log_values, completion_mask=completion_mask, is_complete=is_complete)
    scores = log_prefix_scores(
        token_rewards=token_rewards,
        completion_mask=completion_mask,
        reference_logps=reference_logps,
        reward_temperature=reward_temperature,
        reference_weight=reference_weight,
    )
    potential = flow_potential(
        log_values=log_values,
        log_prefix_scores=scores,
        policy_logps=doctor_logps,
        completion_mask=completion_mask,
    )
    subtb = subtb_loss(potential=potential, completion_mask=completion_mask, subtb_lambda=subtb_lambda).mean()

    (chosen_ids, rejected_ids), (chosen_mask, rejected_mask) = completion_ids.chunk(2), completion_mask.chunk(2)
    divergence = first_divergence(
        chosen_ids=chosen_ids, rejected_ids=rejected_ids, chosen_mask=chosen_mask, rejected_mask=rejected_mask
    )
    chosen_log_values, rejected_log_values = log_values.chunk(2)
    value = value_discrimination_loss(
        chosen_log_values=chosen_log_values,
        rejected_log_values=rejected_log_values,
        divergence=divergence,
        value_margin=value_margin,
    ).mean()

    uniform = subtb_loss(potential=potential.detach(), completion_mask=completion_mask)  # twice the variance
    metrics = {
        "loss/subtb": subtb,
        "loss/value": value,
        "flow/potential_std": (uniform / 2).sqrt().mean(),
        "values/start": log_values[:, 0].mean(),
    }
    return subtb + value_loss_weight * value, {name: metric.detach() for name, metric in metrics.items()}


def pair_rewards(
    *,
    doctor_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    completion_mask: torch.Tensor,
    reward_temperature: float,
) -> torch.Tensor:
    r"""
    Implicit rewards of whole completions, defined as in [`~trl.DPOTrainer`].

    $$r(y) = \tau_r \big( \log \pi(y \mid x) - \log \pi_{\text{ref}}(y \mid x) \big)$$

    For the target policy with `reference_weight=1`, they are the sums of the token rewards, up to a constant for each
    prompt.

    Args:
        doctor_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the balanced policy, in nats.
        reference_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the reference, in nats.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            True for tokens, False for padding.
        reward_temperature (`float`):
            $\tau_r$, the reward of one nat; `beta` of DPO.

    Returns:
        `torch.Tensor` of shape `(P, 2)`: rewards of the chosen and of the rejected completion of each pair, detached.
    """
    ratios = (doctor_logps.detach() - reference_logps).masked_fill(~completion_mask, 0).sum(dim=1)  # (B,)
    return reward_temperature * torch.stack(ratios.chunk(2), dim=1)


def describe_batch(
    *,
    doctor_logps: torch.Tensor,
    completion_mask: torch.Tensor,
    token_rewards: torch.Tensor,
    gaps: torch.Tensor | None = None,
    rewards: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    Metrics of a batch of pairs that do not depend on the objective.

    Args:
        doctor_logps, completion_mask, token_rewards (`torch.Tensor` of shape `(B, T)`):
            As in [`tfpo_objective`].
        gaps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Positive minus negative log-probability of the patient, in nats.
        rewards (`torch.Tensor` of shape `(P, 2)`, *optional*):
            Result of [`pair_rewards`], if there is a reference.

    Returns:
        `dict[str, torch.Tensor]`: detached scalars. `token_rewards/sparsity` is the share of tokens without a reward.
        `token_rewards/agreement` is the sum of absolute gaps of tokens whose gap has the sign of the label, divided
        by the sum of all absolute gaps. The others are means over completions or pairs. Names with `rewards/` mean the
        same as in [`~trl.DPOTrainer`].
    """
    token_rewards = token_rewards.masked_fill(~completion_mask, 0)
    chosen_rewards, rejected_rewards = token_rewards.sum(dim=1).chunk(2)
    chosen_logps, rejected_logps = doctor_logps.detach().masked_fill(~completion_mask, 0).sum(dim=1).chunk(2)
    metrics = {
        "token_rewards/sparsity": 1 - (token_rewards != 0).sum() / completion_mask.sum(),
        "token_rewards/chosen": chosen_rewards.mean(),
        "token_rewards/rejected": rejected_rewards.mean(),
        "logps/chosen": chosen_logps.mean(),
        "logps/rejected": rejected_logps.mean(),
    }
    if gaps is not None:
        gaps = gaps.masked_fill(~completion_mask, 0)
        chosen_gaps, rejected_gaps = gaps.chunk(2)
        agreeing = chosen_gaps.clamp(min=0).sum() + (-rejected_gaps).clamp(min=0).sum()
        metrics["token_rewards/agreement"] = agreeing / gaps.abs().sum().clamp(min=1e-6)
    if rewards is not None:
        margins = rewards[:, 0] - rewards[:, 1]  # (P,)
        metrics["rewards/chosen"], metrics["rewards/rejected"] = rewards.mean(dim=0)
        metrics["rewards/margins"], metrics["rewards/accuracies"] = margins.mean(), (margins > 0).float().mean()
    return metrics
