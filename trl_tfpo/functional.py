# SPDX-License-Identifier: Apache-2.0

r"""
The equations of LLMdoctor, in the order of the paper (https://huggingface.co/papers/2601.10416), as pure functions.

Shapes: B rows, T completion tokens (EOS included), S = T + 1 states, V vocabulary. State $s_t$ is the prompt followed
by the first $t$ completion tokens: column $t$ of a (B, S) tensor stands *before* column $t$ of a (B, T) tensor.
Units: nats. Masks are boolean: True where a token counts, False where it is treated as deleted. Entries of deleted
tokens may have any value, NaN included. `docs/paper_map.md` lists a test of every equation.

Deviations from the paper, with the function or argument that selects them:

1. The sign of a token reward may be the sign of the gap between the faces (`reward_direction`). The reward may be
   reduced where the label disagrees (`disagreement_weight`).
2. The residual of sub-trajectory balance is $\log F(s_n) - \log F(s_m) - \sum \log \pi$. The public reference code
   reverses the sign of the flows. Its residual is not zero at balance.
3. $\log V$ is zero at the end of a completed text ([`terminal_boundary`]).
4. $Q$ is the exponential of the accumulated reward. The paper does not define the map from rewards to $Q$.
5. The reward may be tempered and anchored to a reference policy (`reward_temperature`, `reference_weight`).
6. Squared residuals are averaged, not summed, over the sub-trajectories of a completion.
7. Value discrimination compares $\log V$ after the first tokens at which chosen and rejected differ.
8. $\epsilon$ in the importance is not negligible (`gap_floor`).
9. The balanced policy is a language model times the doctor ([`token_logps`]), or the doctor alone (`policy`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


TILE_WIDTH = 1024  # ids whose logits are computed at once on a CPU, where they fit in the cache


# Stage 1: token rewards


def token_importance(
    *,
    gap: torch.Tensor,
    completion_mask: torch.Tensor,
    importance_temperature: float = 3.0,
    gap_floor: float = 0.05,
) -> torch.Tensor:
    r"""
    Importance of each token: the size of its gap relative to the mean size in the completion.

    $$S_t = \tanh\Big(\frac{1}{\tau}\,\frac{|\Delta_t|}{\operatorname{mean}_j |\Delta_j| + \epsilon}\Big)$$

    Args:
        gap (`torch.Tensor` of shape `(B, T)`):
            $\Delta_t = \log \pi_{\text{pos}} - \log \pi_{\text{neg}}$ of each token, in nats.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            Tokens over which the mean is taken.
        importance_temperature (`float`, *optional*, defaults to `3.0`):
            $\tau > 0$. If the mean gap is much larger than $\epsilon$, the importance of a token with the mean gap is
            0.76 at $\tau = 1$ and 0.32 at $\tau = 3$.
        gap_floor (`float`, *optional*, defaults to `0.05`):
            $\epsilon > 0$, in nats. If the mean gap is much smaller than $\epsilon$, only tokens with gaps of at
            least about $\epsilon$ are important.

    Returns:
        `torch.Tensor` of shape `(B, T)`: importance in `[0, 1]`, zero outside the mask.

    Raises:
        `ValueError`: if temperature or floor is not positive.
    """
    _check_positive(importance_temperature, gap_floor)
    size = gap.abs().masked_fill(~completion_mask, 0)  # (B, T)
    mean = size.sum(dim=1, keepdim=True) / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.tanh(size / (mean + gap_floor) / importance_temperature)


def token_rewards(
    *,
    positive_logps: torch.Tensor,
    negative_logps: torch.Tensor,
    preference_sign: torch.Tensor,
    completion_mask: torch.Tensor,
    reward_direction: str = "agreement",
    disagreement_weight: float = 0.5,
    importance_temperature: float = 3.0,
    gap_floor: float = 0.05,
    sparsity_threshold: float = 0.3,
) -> torch.Tensor:
    r"""
    Sparse signed reward of each token, from the two faces of the patient.

    $$r_t = \operatorname{sign} \cdot S_t \cdot 1[S_t > \theta]$$

    Args:
        positive_logps, negative_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under each face, in nats.
        preference_sign (`torch.Tensor` of shape `(B,)`):
            Label: +1 for a chosen completion, -1 for a rejected one.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            Tokens that count.
        reward_direction (`str`, *optional*, defaults to `"agreement"`):
            Source of the sign: `"label"` (the paper); `"faces"`, the gap $\Delta_t$; or `"agreement"`, the gap, with
            the reward multiplied by $w$ where the label has the opposite sign.
        disagreement_weight (`float`, *optional*, defaults to `0.5`):
            $w$ in `[0, 1]`, for `"agreement"`. 1 is the same as `"faces"`.
        importance_temperature, gap_floor (`float`, *optional*, default to `3.0` and `0.05`):
            $\tau$ and $\epsilon$ of [`token_importance`].
        sparsity_threshold (`float`, *optional*, defaults to `0.3`):
            $\theta$ in `[0, 1)`. Tokens whose importance is not above it get no reward.

    Returns:
        `torch.Tensor` of shape `(B, T)`: rewards in `[-1, 1]`, zero outside the mask.

    Raises:
        `ValueError`: if a setting is unknown or out of range.
    """
    check_reward_settings(reward_direction, disagreement_weight, importance_temperature, gap_floor, sparsity_threshold)
    gap = positive_logps - negative_logps  # (B, T)
    importance = token_importance(
        gap=gap,
        completion_mask=completion_mask,
        importance_temperature=importance_temperature,
        gap_floor=gap_floor,
    )
    label, faces = preference_sign[:, None].to(gap.dtype), gap.sign()  # (B, 1), (B, T)
    agreement = faces.where(faces == label, disagreement_weight * faces)  # (B, T)
    direction = {"label": label, "faces": faces, "agreement": agreement}[reward_direction]
    return (direction * importance).masked_fill((importance <= sparsity_threshold) | ~completion_mask, 0)


def check_reward_settings(
    reward_direction: str,
    disagreement_weight: float,
    importance_temperature: float,
    gap_floor: float,
    sparsity_threshold: float,
) -> None:
    """Raise `ValueError` unless the settings of [`token_rewards`] are in range."""
    if reward_direction not in ("label", "agreement", "faces"):
        raise ValueError(
            f"`reward_direction` must be 'label', 'agreement' or 'faces'. Got {reward_direction!r}; the paper uses "
            "'label'."
        )
    if not 0 <= disagreement_weight <= 1:
        raise ValueError(
            f"`disagreement_weight` must be in [0, 1]. Got {disagreement_weight}; 0 removes rewards that contradict "
            "the label."
        )
    _check_positive(importance_temperature, gap_floor)
    if not 0 <= sparsity_threshold < 1:
        raise ValueError(
            f"`sparsity_threshold` must be in [0, 1). Got {sparsity_threshold}; at 1 no token has a reward. Try 0.3."
        )


def _check_positive(importance_temperature: float, gap_floor: float) -> None:
    if not (importance_temperature > 0 and gap_floor > 0):
        raise ValueError(
            f"`importance_temperature` and `gap_floor` must be positive. Got {importance_temperature} and "
            f"{gap_floor}; try 3.0 and 0.05 nats."
        )


# Stage 2: TFPO


def log_prefix_scores(
    *,
    token_rewards: torch.Tensor,
    completion_mask: torch.Tensor,
    reference_logps: torch.Tensor | None = None,
    reward_temperature: float = 1.0,
    reference_weight: float = 0.0,
) -> torch.Tensor:
    r"""
    Log score of every prefix: its tempered rewards, plus its weighted log-probability under a reference policy.

    $$\log Q(s_t) = \sum_{k \le t} \big( r_k / \beta + w \log \pi_{\text{ref}}(y_k \mid s_{k-1}) \big)$$

    At balance the probability of a complete text is proportional to its $Q$. With $w = 0$ (the paper) it depends on
    rewards only. With $w = 1$ it is proportional to the reference times the exponential of the tempered reward.

    Args:
        token_rewards, completion_mask (`torch.Tensor` of shape `(B, T)`):
            $r_k$, and the tokens that count.
        reference_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            $\log \pi_{\text{ref}}$, in nats. Required if `reference_weight` is not zero.
        reward_temperature (`float`, *optional*, defaults to `1.0`):
            $\beta > 0$. One unit of reward is worth $1/\beta$ nats.
        reference_weight (`float`, *optional*, defaults to `0.0`):
            $w \ge 0$.

    Returns:
        `torch.Tensor` of shape `(B, S)`: $\log Q$ in nats, zero at $s_0$.

    Raises:
        `ValueError`: if a setting is out of range, or required reference log-probabilities are missing.
    """
    check_flow_settings(reward_temperature, reference_weight)
    scores = token_rewards / reward_temperature
    if reference_weight:
        if reference_logps is None:
            raise ValueError(
                "`reference_logps` are required if `reference_weight` is not zero. Got None with weight "
                f"{reference_weight}; pass them, or set the weight to 0."
            )
        scores = scores + reference_weight * reference_logps
    return _prefix_sums(scores, completion_mask)


def check_flow_settings(reward_temperature: float, reference_weight: float) -> None:
    """Raise `ValueError` unless the settings of [`log_prefix_scores`] are in range."""
    if not reward_temperature > 0:
        raise ValueError(f"`reward_temperature` must be positive. Got {reward_temperature}; try 0.25.")
    if not reference_weight >= 0:
        raise ValueError(f"`reference_weight` must be at least 0. Got {reference_weight}; the paper uses 0.")


def terminal_boundary(
    *, log_values: torch.Tensor, completion_mask: torch.Tensor, is_complete: torch.Tensor
) -> torch.Tensor:
    r"""
    Fix the flow at the end of completed texts: $\log V(s_T) = 0$, so that $F(s_T) = Q(s_T)$.

    A truncated text has no boundary. Without any boundary, every policy is balanced by $\log V(s_t) = \sum_{k \le t}
    \log \pi - \log Q(s_t)$, and rewards have no effect.

    Args:
        log_values (`torch.Tensor` of shape `(B, S)`):
            $\log V(s_t)$, in nats, unbounded.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            Tokens that count.
        is_complete (`torch.Tensor` of shape `(B,)`):
            Whether the completion ends in EOS.

    Returns:
        `torch.Tensor` of shape `(B, S)`: `log_values`, with zeros after the last token of complete rows.
    """
    num_left = completion_mask.flip(1).cumsum(1).flip(1)  # (B, T), tokens from each position on
    has_ended = F.pad(num_left, (0, 1)) == 0  # (B, S)
    return log_values.masked_fill(has_ended & is_complete[:, None], 0)


def flow_potential(
    *,
    log_values: torch.Tensor,
    log_prefix_scores: torch.Tensor,
    policy_logps: torch.Tensor,
    completion_mask: torch.Tensor,
) -> torch.Tensor:
    r"""
    Flow potential of each state.

    $$p_t = \log F(s_t) - \sum_{k \le t} \log \pi(y_k \mid s_{k-1}), \qquad \log F = \log Q + \log V$$

    The residual of the sub-trajectory from $s_m$ to $s_n$ is $p_n - p_m$. The flow is balanced if the potential is
    constant along a completion.

    Args:
        log_values, log_prefix_scores (`torch.Tensor` of shape `(B, S)`):
            $\log V$ after [`terminal_boundary`], and $\log Q$ from [`log_prefix_scores`], in nats.
        policy_logps, completion_mask (`torch.Tensor` of shape `(B, T)`):
            $\log \pi$ of the balanced policy, in nats, and the tokens that count.

    Returns:
        `torch.Tensor` of shape `(B, S)`: $p_t$, in nats.
    """
    return log_prefix_scores + log_values - _prefix_sums(policy_logps, completion_mask)


def subtb_loss(*, potential: torch.Tensor, completion_mask: torch.Tensor, subtb_lambda: float = 1.0) -> torch.Tensor:
    r"""
    Sub-trajectory balance: mean squared residual over all sub-trajectories of each completion, in $O(T)$.

    $$\frac{\sum_{m<n} \lambda^{n-m-1} (p_n - p_m)^2}{\sum_{m<n} \lambda^{n-m-1}}$$

    $\lambda = 0$ is detailed balance. With $\lambda = 1$ the loss is twice the unbiased variance of the potential.
    With $\lambda < 1$ let $d_n = p_n - p_{n-1}$. The sums $A_n = \sum_{m<n} \lambda^{n-m-1}$, $G_n = \sum_{m<n}
    \lambda^{n-m-1} (p_n - p_m)$ and $R_n$ (the same with squares) obey $A_n = \lambda A_{n-1} + 1$, $G_n = \lambda
    G_{n-1} + A_n d_n$ and $R_n = \lambda R_{n-1} + 2 d_n G_n - A_n d_n^2$.

    Args:
        potential (`torch.Tensor` of shape `(B, S)`):
            $p_t$ from [`flow_potential`], in nats.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            Tokens that count.
        subtb_lambda (`float`, *optional*, defaults to `1.0`):
            $\lambda$ in `[0, 1]`. A smaller value gives short sub-trajectories more weight.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each row in squared nats, zero where no token counts.

    Raises:
        `ValueError`: if `subtb_lambda` is outside `[0, 1]`.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.functional import subtb_loss
    >>> potential = torch.tensor([[0.0, 1.0, 3.0]])  # residuals 1, 2 and 3
    >>> subtb_loss(potential=potential, completion_mask=torch.ones(1, 2, dtype=torch.bool)).round(decimals=3)
    tensor([4.6670])

    ```
    """
    if not 0 <= subtb_lambda <= 1:
        raise ValueError(
            f"`subtb_lambda` must be in [0, 1]. Got {subtb_lambda}; with 1 all sub-trajectories have the same weight."
        )
    state_mask = F.pad(completion_mask, (1, 0), value=True)  # (B, S), the state before the first token always counts
    num_states = state_mask.sum(dim=1)  # (B,)
    if subtb_lambda == 1:
        potential = potential.masked_fill(~state_mask, 0)
        mean = potential.sum(dim=1, keepdim=True) / num_states[:, None]
        residual = (potential - mean).masked_fill(~state_mask, 0)
        return 2 * residual.square().sum(dim=1) / (num_states - 1).clamp(min=1)

    order = state_mask.int().argsort(dim=1, descending=True, stable=True)  # masked states last
    potential = potential.masked_fill(~state_mask, 0).gather(1, order)
    step = potential.diff(dim=1).masked_fill(~state_mask.gather(1, order)[:, 1:], 0)  # (B, T), d_n
    age = torch.arange(1, step.size(1) + 1, device=step.device)  # (T,), n
    powers = subtb_lambda ** torch.arange(state_mask.size(1), dtype=torch.float64)  # float64, for lambda close to 1
    geometric = ((1 - powers) / (1 - subtb_lambda)).to(step)  # (S,), sums of the first 0, 1, ... powers
    weight = geometric[1:]  # (T,), A_n
    discounted = _discounted_cumsum(weight * step, subtb_lambda)  # (B, T), G_n
    inherited = geometric[(num_states[:, None] - age).clamp(min=0)]  # (B, T), weight of step n in the sum of R_n
    total = (inherited * (2 * step * discounted - weight * step.square())).sum(dim=1)
    normaliser = (weight * (age < num_states[:, None])).sum(dim=1)
    return total / normaliser.clamp(min=1)


def first_divergence(
    *,
    chosen_ids: torch.Tensor,
    rejected_ids: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
) -> torch.Tensor:
    """
    Index of the first token at which chosen and rejected differ.

    Args:
        chosen_ids, rejected_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids of the completions, left-aligned.
        chosen_mask, rejected_mask (`torch.Tensor` of shape `(B, T)`):
            Tokens that count, at the start of each row.

    Returns:
        `torch.Tensor` of shape `(B,)`: index in `[0, T)`, or -1 where one completion is a prefix of the other.
    """
    differs = (chosen_ids != rejected_ids) & chosen_mask & rejected_mask  # (B, T)
    return torch.where(differs.any(dim=1), differs.int().argmax(dim=1), -1)


def value_discrimination_loss(
    *,
    chosen_log_values: torch.Tensor,
    rejected_log_values: torch.Tensor,
    divergence: torch.Tensor,
    value_margin: float = 0.1,
) -> torch.Tensor:
    r"""
    Hinge loss on log V after the first tokens that differ, $y_w$ (chosen) and $y_l$ (rejected).

    $$\max\big(0,\ \gamma - (\log V(s_t \cdot y_w) - \log V(s_t \cdot y_l))\big)$$

    Args:
        chosen_log_values, rejected_log_values (`torch.Tensor` of shape `(B, S)`):
            $\log V$ along the completions, in nats.
        divergence (`torch.Tensor` of shape `(B,)`):
            $t$ from [`first_divergence`]. Where it is -1, the loss is zero.
        value_margin (`float`, *optional*, defaults to `0.1`):
            $\gamma \ge 0$, in nats.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair, in nats.

    Raises:
        `ValueError`: if the margin is negative.
    """
    if not value_margin >= 0:
        raise ValueError(f"`value_margin` must be at least 0. Got {value_margin}; try 0.1 nats.")
    after = (divergence + 1)[:, None]  # the state that contains the differing token
    advantage = (chosen_log_values.gather(1, after) - rejected_log_values.gather(1, after)).squeeze(1)  # (B,)
    return (value_margin - advantage).clamp(min=0).masked_fill(divergence < 0, 0)


# Log-probabilities of the balanced policy


class FactoredLogits(NamedTuple):
    r"""
    Factors of the logits $\ell = c \tanh\big((h W^\top + b) / c\big)$, whose (N, V) product is not stored.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states at N positions.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weights of the language model head.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the head.
        softcap (`float`, *optional*):
            $c$, for models that cap their logits. `None` stands for $\ell = h W^\top + b$.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Logits (N, stop - start), float32, of the ids from `start` to `stop`."""
        weight = self.weight[start:stop].to(self.hidden)
        bias = None if self.bias is None else self.bias[start:stop].to(self.hidden)
        logits = F.linear(self.hidden, weight, bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def dense(self) -> torch.Tensor:
        """All logits (N, V), float32."""
        return self.columns(0, len(self.weight))

    def detach(self) -> "FactoredLogits":
        """The same logits, without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return FactoredLogits(self.hidden.detach(), self.weight.detach(), bias, self.softcap)


def token_logps(*, logits: Sequence[FactoredLogits | torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    r"""
    Log-probability of each target under a product of policies, whose logits are added.

    $$\log \pi(y \mid s) = \log \operatorname{softmax}\Big( \sum_k \ell_k(s) \Big)_y$$

    If all logits are factored, they are computed in chunks of ids, and recomputed in the backward pass.

    Args:
        logits (sequence of [`FactoredLogits`] or `torch.Tensor` of shape `(N, V_k)`):
            Logits of each policy, at least one, possibly on several devices. The distribution is over the ids that all
            policies have.
        targets (`torch.LongTensor` of shape `(N,)`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(N,)`: log-probabilities in nats, float32, on the device of the first policy. They are
        differentiable once with respect to hidden states, weights and biases. If all logits are factored, a target
        that a policy does not have gets minus infinity.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.functional import FactoredLogits, token_logps
    >>> doctor = FactoredLogits(hidden=torch.eye(2), weight=torch.tensor([[0.8, 0.5], [0.2, 0.5]]).log())
    >>> patient = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    >>> token_logps(logits=[patient, doctor], targets=torch.tensor([0, 1])).exp()
    tensor([0.8000, 0.9000])

    ```
    """
    policies = [one for one in logits if isinstance(one, FactoredLogits)]
    device = logits[0].hidden.device if isinstance(logits[0], FactoredLogits) else logits[0].device
    targets = targets.to(device)
    if len(policies) == len(logits):
        factors = [factor for one in policies for factor in (one.hidden, one.weight, one.bias)]
        return _TiledLogps.apply(targets, [one.softcap for one in policies], *factors)
    dense = [one.dense() if isinstance(one, FactoredLogits) else one.float() for one in logits]
    size = min(one.size(-1) for one in dense)
    total = sum((one[:, :size].to(device) for one in dense[1:]), start=dense[0][:, :size])
    return total.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


class _TiledLogps(torch.autograd.Function):
    """[`token_logps`] of factored logits. Only the logits of one tile of ids are in memory at a time."""

    @staticmethod
    def forward(ctx, targets, softcaps, *factors):
        ctx.dtype = _compute_dtype(factors[0])
        ctx.softcaps = softcaps
        policies = _as_policies(factors, softcaps, ctx.dtype)
        log_norm = torch.full(targets.shape, -math.inf, device=targets.device)  # (N,)
        chosen = log_norm
        for start, stop in _tiles(policies):
            tile = sum(policy.columns(start, stop) for policy in policies)  # (N, W)
            log_norm = torch.logaddexp(log_norm, tile.logsumexp(dim=1))
            column = (targets - start).clamp(0, stop - start - 1)
            is_here = (targets >= start) & (targets < stop)
            chosen = torch.where(is_here, tile.gather(1, column[:, None]).squeeze(1), chosen)
        ctx.save_for_backward(targets, log_norm, *factors)
        return chosen - log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        targets, log_norm, *factors = ctx.saved_tensors
        policies = _as_policies(factors, ctx.softcaps, ctx.dtype)
        is_needed = ctx.needs_input_grad[2:]
        grads = [
            torch.zeros_like(x, dtype=torch.float32) if y else None for x, y in zip(factors, is_needed, strict=True)
        ]
        for start, stop in _tiles(policies):
            parts = [policy.columns(start, stop) for policy in policies]  # (N, W) each
            grad_tile = (sum(parts) - log_norm[:, None]).exp() * -grad_logps[:, None]
            column = (targets - start).clamp(0, stop - start - 1)
            is_here = (targets >= start) & (targets < stop)
            grad_tile.scatter_add_(1, column[:, None], (grad_logps * is_here)[:, None])
            for k, (policy, part) in enumerate(zip(policies, parts, strict=True)):
                slope = 1.0 if policy.softcap is None else 1 - (part / policy.softcap) ** 2
                grad = (grad_tile * slope).to(ctx.dtype)
                grad_hidden, grad_weight, grad_bias = grads[3 * k : 3 * k + 3]
                if grad_hidden is not None:
                    grad_hidden += (grad @ policy.weight[start:stop].to(grad)).to(grad_hidden.device)
                if grad_weight is not None:
                    grad_weight[start:stop] += (grad.T @ policy.hidden).to(grad_weight.device)
                if grad_bias is not None:
                    grad_bias[start:stop] += grad.sum(dim=0, dtype=torch.float32).to(grad_bias.device)
        return None, None, *(x if x is None else x.to(y.dtype) for x, y in zip(grads, factors, strict=True))


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype of matrix products: the dtype of autocast, or of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _as_policies(factors: Sequence, softcaps: Sequence[float | None], dtype: torch.dtype) -> list[FactoredLogits]:
    """Policies from their factors, with hidden states of one dtype on the device of the first."""
    device = factors[0].device
    triples = zip(factors[::3], factors[1::3], factors[2::3], softcaps, strict=True)
    return [
        FactoredLogits(hidden.to(device, dtype), weight, bias, softcap) for hidden, weight, bias, softcap in triples
    ]


def _tiles(policies: Sequence[FactoredLogits]) -> Iterator[tuple[int, int]]:
    """Bounds of the tiles of ids that all policies have."""
    size = min(len(policy.weight) for policy in policies)
    width = TILE_WIDTH if policies[0].weight.device.type == "cpu" else 16 * TILE_WIDTH
    for start in range(0, size, width):
        yield start, min(start + width, size)


# Stage 3: guided decoding


def guided_logps(
    *,
    patient_logits: torch.Tensor,
    doctor_logits: Sequence[torch.Tensor],
    alpha: float | torch.Tensor = 1.0,
    beta: Sequence[float | torch.Tensor] = (),
) -> torch.Tensor:
    r"""
    Next-token distribution of the patient guided by any number of doctors.

    $$\log \pi(y \mid s) = \log \operatorname{softmax}\Big( \alpha \log \pi_{\text{patient}} + \sum_i \beta_i \log
    \pi_{\text{doctor}_i} \Big)$$

    The *product* (the paper) has $\alpha = 1$. The *mixture* has $\alpha = 1 - \sum_i \beta_i$. The *ratio* gives the
    doctor $\beta$, and its reference, as a further doctor, $-\beta$.

    A patient logit of minus infinity excludes a token for every $\alpha$, a doctor logit only if $\beta$ is positive.

    Args:
        patient_logits, doctor_logits (`torch.Tensor` of shape `(..., V)`, and a sequence of these):
            Logits or log-probabilities of the patient and of each doctor.
        alpha (`float` or `torch.Tensor` of shape `(..., 1)`, *optional*, defaults to `1.0`), beta (sequence of these):
            Exponents of the patient and of each doctor.

    Returns:
        `torch.Tensor` of shape `(..., V)`: log-probabilities, in nats.

    Raises:
        `ValueError`: if there is not one `beta` for each doctor.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.functional import guided_logps
    >>> patient, doctor = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    >>> guided_logps(patient_logits=patient, doctor_logits=[doctor], beta=[1.0]).exp()
    tensor([0.8000, 0.2000])

    ```
    """
    if len(doctor_logits) != len(beta):
        raise ValueError(
            f"`beta` must have one exponent for each doctor. Got {len(beta)} exponents for {len(doctor_logits)} "
            "doctors; pass one for each."
        )
    guided = _add_weighted(None, patient_logits, alpha)
    for logits, weight in zip(doctor_logits, beta, strict=True):
        guided = _add_weighted(guided, logits, weight)
    if not _is_positive_number(alpha):
        guided = guided.masked_fill(patient_logits == float("-inf"), float("-inf"))
    return guided.log_softmax(dim=-1)


def plausible_mask(*, patient_logits: torch.Tensor, min_patient_prob: float) -> torch.Tensor:
    r"""
    Plausibility constraint of contrastive decoding (https://huggingface.co/papers/2210.15097).

    $$\pi_{\text{patient}}(y \mid s) \ge p \max_{y'} \pi_{\text{patient}}(y' \mid s)$$

    Args:
        patient_logits (`torch.Tensor` of shape `(..., V)`):
            Logits or log-probabilities of the patient.
        min_patient_prob (`float`):
            $p$, in (0, 1]. At 1 only the most probable token is plausible.

    Returns:
        `torch.Tensor` of shape `(..., V)`: True for plausible tokens, at least one in each row.

    Raises:
        `ValueError`: if `min_patient_prob` is outside (0, 1].

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.functional import plausible_mask
    >>> plausible_mask(patient_logits=torch.tensor([0.60, 0.36, 0.04]).log(), min_patient_prob=0.1)
    tensor([ True,  True, False])

    ```
    """
    if not 0 < min_patient_prob <= 1:
        raise ValueError(f"`min_patient_prob` must be in (0, 1]. Got {min_patient_prob}; try 0.1.")
    threshold = patient_logits.amax(dim=-1, keepdim=True) + math.log(min_patient_prob)
    return patient_logits >= threshold


def next_token_entropy(logits: torch.Tensor) -> torch.Tensor:
    r"""
    Entropy of the next-token distribution: $-\sum_y \pi(y \mid s) \log \pi(y \mid s)$.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits or log-probabilities, minus infinity included.

    Returns:
        `torch.Tensor` of shape `(...)`: entropies in nats, from 0 to the logarithm of the vocabulary size.
    """
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


def _add_weighted(total: torch.Tensor | None, logits: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """
    `total + weight * log pi` (..., V), up to a constant for each row.

    Minus infinity is kept where the weight is positive, and replaced by zero elsewhere. A positive number takes one
    pass, without normalization.
    """
    if _is_positive_number(weight):
        if total is None:
            return logits if weight == 1 else weight * logits
        return torch.add(total, logits, alpha=float(weight))
    weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
    absent = logits == float("-inf")
    weighted = weight * logits.log_softmax(dim=-1).masked_fill(absent, 0)
    weighted = weighted.masked_fill(absent & (weight > 0), float("-inf"))
    return weighted if total is None else total + weighted


def _is_positive_number(weight: float | torch.Tensor) -> bool:
    return isinstance(weight, (int, float)) and weight > 0


# Sums


def _prefix_sums(values: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Sums (B, S) of `values` (B, T) over the unmasked tokens of each prefix."""
    return F.pad(values.masked_fill(~completion_mask, 0).cumsum(dim=1), (1, 0))


def _discounted_cumsum(values: torch.Tensor, discount: float, block: int = 128) -> torch.Tensor:
    """
    `y[n] = discount * y[n - 1] + values[n]` along the rows of (B, T), in O(T).

    Each block is multiplied by a triangular matrix. Only the carry between blocks is serial.
    """
    length = values.size(1)
    blocks = F.pad(values, (0, -length % block)).unfold(1, block, block)  # (B, T / block, block)
    power = torch.arange(block, device=values.device)
    base = torch.as_tensor(discount, dtype=values.dtype, device=values.device)
    kernel = (base ** (power[:, None] - power).clamp(min=0)).tril()  # (block, block)
    local = blocks @ kernel.T
    carries = [torch.zeros_like(local[:, 0, 0])]
    for end in local[:, :-1, -1].unbind(dim=1):
        carries.append(base**block * carries[-1] + end)
    return (local + torch.stack(carries, dim=1)[..., None] * base ** (power + 1)).flatten(1)[:, :length]
