# SPDX-License-Identifier: Apache-2.0

r"""
Reward of a policy and its KL divergence from the patient.

A larger KL allows a larger reward. Compare methods at equal KL, with [`match_kl`].

Shapes: N completions, T tokens of a completion (EOS included), V vocabulary, P prompts, M samples per prompt. Units:
nats.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.arguments import check_counts
from ..decoding.doctors import NO_ADAPTER, Doctor
from ..decoding.generation import without_doctors
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..faces import Prompt
from ..functional import next_token_entropy
from .completions import NEUTRAL_VALUES, Completion, altering_settings, check_policy, generate_completions, pad
from .diversity import distinct_n
from .judges import RewardFunction, score_texts


MAX_ESTIMATES = 20  # of the KL, in `match_kl`


class GuidanceResult(TypedDict):
    """Result of [`evaluate_guidance`]."""

    reward: float
    reward_se: float
    kl: float
    kl_se: float
    entropy: float
    distinct_4: float
    num_tokens: float
    is_complete: float
    completions: list[Completion]
    rewards: list[float]
    kls: list[float]


@torch.no_grad()
def guided_kl(
    patient: PreTrainedModel,
    guide: DoctorGuidedLogitsProcessor,
    completions: Sequence[Completion],
    *,
    batch_size: int = 16,
) -> torch.Tensor:
    r"""
    KL divergence of the guided policy from the patient.

    $$\operatorname{KL} = \mathbb{E}_{y \sim \pi} \sum_{t=1}^{T} \sum_{v} \pi(v \mid y_{<t}) \log \frac{\pi(v \mid
    y_{<t})}{\pi_{\text{patient}}(v \mid y_{<t})}$$

    Only the prefixes are sampled. The inner sum is exact, which reduces the variance (Rao-Blackwell). The mean over
    completions is unbiased if they were sampled with the same `guide`, at temperature 1, from the whole vocabulary. A
    completion truncated at `max_new_tokens` counts up to its last token.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance used for sampling.
        completions (sequence of [`Completion`]):
            Samples from [`generate_completions`].
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per forward pass. Memory is proportional to batch size, length and vocabulary size.

    Returns:
        `torch.Tensor` of shape `(N,)`: KL of each completion, summed over its tokens, in nats, at least 0. The mean
        over completions estimates the KL of the policy.

    Raises:
        `ValueError`: when a model is in training mode, an exponent of the guide is a tensor or a schedule, a doctor
            has its own `prompt`, or the completions were sampled with settings that change the policy, such as
            `top_k`.
    """
    return next_token_statistics(patient, guide, completions, batch_size=batch_size)["kl"]


@torch.no_grad()
def next_token_statistics(
    patient: PreTrainedModel,
    policy: DoctorGuidedLogitsProcessor | Doctor | PreTrainedModel | None,
    completions: Sequence[Completion],
    *,
    batch_size: int = 16,
) -> dict[str, torch.Tensor]:
    """
    KL from the patient and next-token entropy of a policy, along completions sampled from it.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        policy ([`DoctorGuidedLogitsProcessor`], [`~transformers.PreTrainedModel`] or [`Doctor`], *optional*):
            The policy that generated the samples, at temperature 1: guidance, or another model with the patient's
            tokenizer, such as the patient after DPO. Adapters of that model are disabled in forward passes of the
            patient. `None` is the patient alone.
        completions (sequence of [`Completion`]):
            Samples of the policy from [`generate_completions`].
        batch_size (`int`, *optional*, defaults to `16`):
            As in [`guided_kl`].

    Returns:
        `dict` of tensors of shape `(N,)`: `kl`, as in [`guided_kl`], and `entropy`, the next-token entropy in nats,
        averaged over the tokens of each completion.

    Raises:
        `ValueError`: when a model is in training mode, the policy is a doctor of guided flow without a guide, an
            exponent of the guide is a tensor or a schedule, a doctor has its own `prompt`, or the completions were
            sampled with settings that change the policy, such as `top_k`.
    """
    guide = policy if isinstance(policy, DoctorGuidedLogitsProcessor) else None
    check_policy(patient, guide)
    check_counts(batch_size=batch_size)
    for completion in completions:
        _check_unaltered(completion.altered_by)
    models: list[PreTrainedModel | Doctor] = [patient]
    if isinstance(policy, DoctorGuidedLogitsProcessor):
        models += policy.doctors
    elif policy is not None:
        other = policy if isinstance(policy, Doctor) else Doctor(policy)
        if other.exponents:
            raise ValueError(
                "A policy must be a language model, or a guide. Got a doctor of guided flow, which is a ratio of two "
                "policies; pass `DoctorGuidedLogitsProcessor(doctor)`."
            )
        is_adapter = other.is_on(patient) and bool(other.adapters)
        models = [Doctor(patient, adapter=NO_ADAPTER) if is_adapter else patient, other]
    kls, entropies = [], []
    for start in range(0, len(completions), batch_size):
        batch = completions[start : start + batch_size]
        with without_doctors(patient, guide) if guide else nullcontext():
            logits = [_completion_logits(model, batch) for model in models]
        for patient_logits, *other_logits in zip(*logits, strict=True):  # (T, V) each
            if guide is not None:
                policy_logps = guide.combine(patient_logits, other_logits)
            else:
                policy_logits = (other_logits or [patient_logits])[0]
                vocab_size = min(policy_logits.size(-1), patient_logits.size(-1))  # either vocabulary may be padded
                patient_logits = patient_logits[:, :vocab_size].to(policy_logits.device)
                policy_logps = policy_logits[:, :vocab_size].float().log_softmax(dim=-1)
            patient_logps = patient_logits.to(policy_logps.dtype).log_softmax(dim=-1)
            log_ratio = (policy_logps - patient_logps).masked_fill(policy_logps == float("-inf"), 0)
            kls.append((policy_logps.exp() * log_ratio).double().sum().clamp(min=0).item())
            entropies.append(next_token_entropy(policy_logps).double().mean().item())
    return {name: torch.tensor(found, dtype=torch.float64) for name, found in (("kl", kls), ("entropy", entropies))}


def sampled_kl(policy_logps: Sequence[torch.Tensor], patient_logps: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""
    Estimate the KL divergence from the patient by the log-probabilities of the sampled tokens.

    $$\widehat{\operatorname{KL}} = \sum_{t=1}^{T} \log \pi(y_t \mid y_{<t}) - \log \pi_{\text{patient}}(y_t \mid
    y_{<t})$$

    Use it with serving engines that return only the log-probabilities of sampled tokens. The estimate is unbiased for
    completions sampled from the policy at temperature 1. Values of single completions may be negative. The variance is
    much larger than in [`next_token_statistics`], which sums over the vocabulary.

    Args:
        policy_logps (sequence of `torch.Tensor` of shape `(T_i,)`):
            Log-probability of each token of N completions under the sampled policy, in nats.
        patient_logps (sequence of `torch.Tensor` of shape `(T_i,)`):
            The same under the patient.

    Returns:
        `torch.Tensor` of shape `(N,)`: estimates in nats.

    Raises:
        `ValueError`: when the shapes differ.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.evaluation import sampled_kl
    >>> sampled_kl([torch.tensor([-1.0, -2.0])], [torch.tensor([-1.5, -4.0])])
    tensor([2.5000], dtype=torch.float64)

    ```
    """
    policy_logps = [torch.as_tensor(x).double() for x in policy_logps]
    patient_logps = [torch.as_tensor(x).double() for x in patient_logps]
    shapes = [[tuple(x.shape) for x in xs] for xs in (policy_logps, patient_logps)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Both models must have a log-probability for each token of each completion. Got shapes "
            f"{shapes[0][:3]} and {shapes[1][:3]} (the first three of {len(shapes[0])} and {len(shapes[1])}); score "
            "the same token ids with both."
        )
    estimates = [(policy - patient).sum() for policy, patient in zip(policy_logps, patient_logps, strict=True)]
    return torch.stack(estimates) if estimates else torch.zeros(0, dtype=torch.float64)


def evaluate_guidance(
    patient: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward_fn: RewardFunction,
    *,
    guide: DoctorGuidedLogitsProcessor | None = None,
    batch_size: int = 16,
    **generate_kwargs: object,
) -> GuidanceResult:
    """
    Measure reward, KL from the patient, entropy, diversity and length of a guided policy.

    Args:
        patient, processing_class, prompts:
            As in [`generate_completions`].
        reward_fn (`Callable`):
            Called once as `reward_fn(prompts=..., completions=...)` with a prompt and a text for each of the N
            completions; returns N numbers.
        guide ([`DoctorGuidedLogitsProcessor`], *optional*):
            The guidance. `None` is the patient alone, at KL 0.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per batch, for generation and measurement.
        **generate_kwargs:
            `num_samples_per_prompt`, `max_new_tokens`, `seed` and other arguments of [`generate_completions`].

    Returns:
        `dict`: the means `reward`, `kl` (nats per completion), `entropy` (nats per token), `num_tokens` and
        `is_complete`; the standard errors `reward_se` and `kl_se`; `distinct_4` over the words of all texts; and the
        lists `completions`, `rewards` and `kls`. Standard errors are over prompts, because samples of a prompt are not
        independent. With a single prompt they are over its samples.

    Raises:
        `ValueError`: when `reward_fn` does not return one finite reward per completion, or a setting of `generate`
            changes the policy: temperature, greedy search, beams, `top_k`, `top_p`, penalties, or an unknown setting;
            on errors of [`generate_completions`].
    """
    arguments: dict = generate_kwargs
    own = ("num_samples_per_prompt", "max_new_tokens", "seed")
    _check_unaltered(altering_settings({name: arguments[name] for name in arguments if name not in own}))
    completions = generate_completions(
        patient, processing_class, prompts, guide=guide, batch_size=batch_size, **arguments
    )
    texts = [completion.text for completion in completions]
    rewards = score_texts(reward_fn, [completion.prompt for completion in completions], texts)
    statistics = next_token_statistics(patient, guide, completions, batch_size=batch_size)
    kls, entropies = statistics["kl"], statistics["entropy"]
    lengths = [len(completion.completion_ids) for completion in completions]
    return {
        "reward": rewards.mean().item(),
        "reward_se": _standard_error(rewards, len(prompts)),
        "kl": kls.mean().item(),
        "kl_se": _standard_error(kls, len(prompts)),
        "entropy": entropies.mean().item(),
        "distinct_4": distinct_n(texts, n=4),
        "num_tokens": sum(lengths) / len(lengths),
        "is_complete": sum(completion.is_complete for completion in completions) / len(completions),
        "completions": completions,
        "rewards": rewards.tolist(),
        "kls": kls.tolist(),
    }


def match_kl(
    patient: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    make_guide: Callable[[float], DoctorGuidedLogitsProcessor],
    target_kl: float,
    *,
    max_beta: float = 1.0,
    tolerance: float = 0.02,
    **generate_kwargs: object,
) -> float:
    """
    Find the `beta` at which a guided policy has a given KL from the patient.

    The search brackets `beta`, and interpolates the square root of the KL, which is nearly linear in `beta`. All
    estimates use the same seed.

    Args:
        patient, processing_class, prompts:
            As in [`generate_completions`].
        make_guide (`Callable`):
            Maps `beta` to guidance, e.g. `lambda beta: DoctorGuidedLogitsProcessor(doctor, beta=beta)`. `beta` 0 must
            give the patient alone.
        target_kl (`float`):
            KL to reach, in nats per completion. Must be positive.
        max_beta (`float`, *optional*, defaults to `1.0`):
            Largest `beta` to try. A mixture allows at most 1.
        tolerance (`float`, *optional*, defaults to `0.02`):
            Relative error of the KL at which the search stops. A tolerance below the standard error has no benefit.
        **generate_kwargs:
            `num_samples_per_prompt`, `max_new_tokens`, `batch_size`, `seed` and other arguments of
            [`generate_completions`].

    Returns:
        `float`: `beta` in `(0, max_beta]`.

    Raises:
        `ValueError`: when the target is not positive, exceeds the KL at `max_beta`, or is not reached in 20 estimates.
    """
    if not target_kl > 0:
        raise ValueError(f"`target_kl` must be positive. Got {target_kl}; use the patient alone for 0.")

    arguments: dict = generate_kwargs

    def no_reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return [0.0] * len(completions)

    def estimate(beta: float) -> float:
        guide = make_guide(beta)
        found = evaluate_guidance(patient, processing_class, prompts, no_reward, guide=guide, **arguments)
        return found["kl"]

    low, low_kl, high, high_kl, beta = 0.0, 0.0, max_beta, math.inf, max_beta
    for _ in range(MAX_ESTIMATES):
        kl = estimate(beta)
        if abs(kl - target_kl) <= tolerance * target_kl:
            return beta
        if kl > target_kl:
            high, high_kl = beta, kl
        elif beta < max_beta:
            low, low_kl = beta, kl
        else:
            raise ValueError(
                f"`target_kl` must not exceed the KL at `max_beta`. Got {target_kl} and {kl:.4g} at {max_beta}; raise "
                "`max_beta` (with `alpha=1.0` it may exceed 1) or lower the target."
            )
        share = (target_kl**0.5 - low_kl**0.5) / (high_kl**0.5 - low_kl**0.5)
        beta = low + min(max(share, 0.05), 0.95) * (high - low)  # away from both ends
    raise ValueError(
        f"`target_kl` must be reached in {MAX_ESTIMATES} estimates. Got a KL of {kl:.4g} for {target_kl}; raise "
        "`num_samples_per_prompt` for a smoother estimate, or `tolerance`."
    )


def best_of_n(rewards: Sequence[Sequence[float]] | torch.Tensor, n: int) -> dict[str, float]:
    r"""
    Reward and KL of the best of `n` patient samples: a baseline without a doctor.

    The expected reward is computed from M samples per prompt without resampling: in ascending order, sample $i$ is the
    best of $n$ random samples with probability $\binom{i-1}{n-1} / \binom{M}{n}$. The KL from the patient is at most
    $\log n - (n - 1) / n$ (https://huggingface.co/papers/2401.01879), and close to this bound if every single
    completion is unlikely.

    Args:
        rewards (`torch.Tensor` of shape `(P, M)`, or nested lists):
            Rewards of M patient samples per prompt.
        n (`int`):
            Number of samples to choose from, from 1 to M.

    Returns:
        `dict`: the mean `reward`, its standard error over prompts `reward_se`, and the upper bound `kl` in nats.

    Raises:
        `ValueError`: when `n` is not between 1 and M, or a reward is not finite.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import best_of_n
    >>> round(best_of_n([[0.0, 3.0, 6.0]], n=2)["reward"], 6)  # the best of a pair is 3 for one of the 3 pairs, else 6
    5.0

    ```
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    num_samples = rewards.shape[1] if rewards.dim() == 2 else 0
    if not 1 <= n <= num_samples or not rewards.isfinite().all():
        raise ValueError(
            f"`n` must be between 1 and the {num_samples} samples of each prompt, with finite rewards. Got "
            f"{n}, and {int((~rewards.isfinite()).sum())} rewards that are not finite; sample more."
        )
    odds = [math.comb(i, n - 1) / math.comb(num_samples, n) for i in range(num_samples)]
    best = rewards.sort(dim=1).values @ torch.tensor(odds, dtype=torch.float64)  # (P,)
    return {
        "reward": best.mean().item(),
        "reward_se": _standard_error(best, len(best)),
        "kl": math.log(n) - (n - 1) / n,
    }


def _check_unaltered(altered_by: Mapping[str, object]) -> None:
    if altered_by:
        rules = [
            f"`{name}` must be {NEUTRAL_VALUES[name]}" if name in NEUTRAL_VALUES else f"no `{name}`"
            for name in altered_by
        ]
        raise ValueError(
            f"The KL of a policy is measured on its own samples: {', '.join(rules)}. Got "
            f"{', '.join(map(reprlib.repr, altered_by.values()))}; leave it out, or compare only the rewards of "
            "samples from `generate_completions`."
        )


def _standard_error(values: torch.Tensor, num_prompts: int) -> float:
    """Standard error of the mean of values (N,), over prompts or, for a single prompt, over values."""
    if num_prompts > 1:
        values = values.view(num_prompts, -1).mean(dim=1)
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def _completion_logits(model: PreTrainedModel | Doctor, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """Logits (T, V) at the positions that predict the tokens of each completion, on the model's device."""
    rows = [completion.prompt_ids + completion.completion_ids for completion in completions]
    ids, mask = pad(rows, padding_side="right", device=model.device)  # padding does not change earlier logits
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False)["logits"]
    ends = [(len(completion.prompt_ids) - 1, len(row) - 1) for completion, row in zip(completions, rows, strict=True)]
    return [logits[i, start:end] for i, (start, end) in enumerate(ends)]
