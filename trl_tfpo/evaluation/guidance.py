# SPDX-License-Identifier: Apache-2.0

r"""
What guidance gains and how far it goes: reward and distance from the patient.

Shapes: N completions, T tokens of a completion (EOS included), V vocabulary, P prompts. Units: nats.

Methods are comparable at the same KL from the patient, [`match_kl`]: any reward can be had at some distance.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.arguments import check_counts
from ..decoding.doctors import NO_ADAPTER, Doctor
from ..decoding.generation import without_doctors
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..functional import next_token_entropy
from .completions import NEUTRAL, Completion, Prompt, altering_settings, check_policy, generate_completions, pad
from .diversity import distinct_n
from .judges import score_texts


@torch.no_grad()
def guided_kl(
    patient: PreTrainedModel,
    guide: DoctorGuidedLogitsProcessor,
    completions: Sequence[Completion],
    *,
    batch_size: int = 16,
) -> torch.Tensor:
    r"""
    How far guidance moves the patient: KL divergence of the guided policy from the patient alone.

    $$\operatorname{KL} = \mathbb{E}_{y \sim \pi} \sum_{t=1}^{T} \sum_{v} \pi(v \mid y_{<t}) \log \frac{\pi(v \mid
    y_{<t})}{\pi_{\text{patient}}(v \mid y_{<t})}$$

    The inner sum is exact; only the prefixes are sampled (Rao-Blackwell), so that the mean over samples is unbiased
    and varies little. This holds for completions that were sampled with the same `guide` at temperature 1, from the
    whole vocabulary. A completion cut at `max_new_tokens` counts up to there.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance that the completions were sampled with.
        completions (sequence of [`Completion`]):
            Samples from [`generate_completions`].
        batch_size (`int`, *optional*, defaults to `16`):
            Completions read at once. Memory grows with its product with length and vocabulary.

    Returns:
        `torch.Tensor` of shape `(N,)`: divergence summed over the tokens of each completion, in nats, at least zero.
        Its mean is the estimate.

    Raises:
        `ValueError`: when the patient is in training mode, the guide has a weight for each row, or completions were
            sampled with settings such as `top_k`, which make another policy.
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
    Distance of a policy from the patient, and how many ways it leaves open: for guidance, or for any other model.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        policy ([`DoctorGuidedLogitsProcessor`], [`~transformers.PreTrainedModel`] or [`Doctor`], *optional*):
            What the completions were sampled with, at temperature 1: guidance of the patient, or another model with
            its tokenizer (the patient after DPO, say; adapters on its weights are off when the patient is read).
            `None` is the patient alone.
        completions (sequence of [`Completion`]):
            Samples of the policy from [`generate_completions`].
        batch_size (`int`, *optional*, defaults to `16`):
            Completions read at once. Memory grows with its product with length and vocabulary.

    Returns:
        `dict`: `kl` of shape `(N,)`, as in [`guided_kl`], and `entropy` of shape `(N,)`, the entropy of the policy's
        next token in nats, averaged over the tokens of each completion.

    Raises:
        `ValueError`: when a model is in training mode, the policy is a doctor of guided flow without its guide, the guide
            has a weight for each row, or completions were sampled with settings such as `top_k`, which make another
            policy.
    """
    guide = policy if isinstance(policy, DoctorGuidedLogitsProcessor) else None
    check_policy(patient, guide)
    check_counts(batch_size=batch_size)
    for completion in completions:
        _check_is_of_policy(completion.altered_by)
    alone, others = patient, []
    if guide is not None:
        others = guide.doctors
    elif policy is not None:
        others = [policy if isinstance(policy, Doctor) else Doctor(policy)]
        if others[0].exponents:
            raise ValueError(
                "A policy must be a language model, or a guide. Got a doctor of guided flow, which is a ratio of two "
                "policies; pass `DoctorGuidedLogitsProcessor(doctor)`."
            )
        if others[0].is_on(patient) and others[0].adapters:
            alone = Doctor(patient, adapter=NO_ADAPTER)
    kls, entropies = [], []
    for start in range(0, len(completions), batch_size):
        batch = completions[start : start + batch_size]
        with without_doctors(patient, guide) if guide else nullcontext():
            logits = [_completion_logits(model, batch) for model in (alone, *others)]
        for patient_logits, *other_logits in zip(*logits, strict=True):  # (T, V) each
            if guide is not None:
                policy_logps = guide.combine(patient_logits, other_logits)
            else:
                policy_logits = (other_logits or [patient_logits])[0]
                vocab_size = min(policy_logits.size(-1), patient_logits.size(-1))  # both may be padded beyond
                patient_logits = patient_logits[:, :vocab_size].to(policy_logits.device)
                policy_logps = policy_logits[:, :vocab_size].float().log_softmax(dim=-1)
            patient_logps = patient_logits.to(policy_logps.dtype).log_softmax(dim=-1)
            log_ratio = (policy_logps - patient_logps).masked_fill(policy_logps == float("-inf"), 0)
            kls.append((policy_logps.exp() * log_ratio).double().sum().clamp(min=0).cpu())
            entropies.append(next_token_entropy(policy_logps).double().mean().cpu())
    empty = torch.zeros(0, dtype=torch.float64)
    return {"kl": torch.stack(kls) if kls else empty, "entropy": torch.stack(entropies) if kls else empty}


def sampled_kl(policy_logps: Sequence[torch.Tensor], patient_logps: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""
    KL from log-probabilities of the sampled tokens alone, as a serving engine returns them.

    $$\widehat{\operatorname{KL}} = \sum_{t=1}^{T} \log \pi(y_t \mid y_{<t}) - \log \pi_{\text{patient}}(y_t \mid y_{<t})$$

    Unbiased for completions sampled from the policy at temperature 1. Single values may be negative, and the mean
    varies far more than that of [`next_token_statistics`], which looks at all tokens of the vocabulary.

    Args:
        policy_logps (sequence of `torch.Tensor` of shape `(T_i,)`):
            Log-probability of each token of N completions under the policy that they were sampled from, in nats.
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
    policy_logps, patient_logps = ([torch.as_tensor(x).double() for x in xs] for xs in (policy_logps, patient_logps))
    shapes = [[tuple(x.shape) for x in xs] for xs in (policy_logps, patient_logps)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Both models must have a log-probability for each token of each completion. Got shapes "
            f"{shapes[0][:3]} and {shapes[1][:3]} (the first three of {len(shapes[0])} and {len(shapes[1])}); score the "
            "same token ids with both."
        )
    estimates = [(policy - patient).sum() for policy, patient in zip(policy_logps, patient_logps, strict=True)]
    return torch.stack(estimates) if estimates else torch.zeros(0, dtype=torch.float64)


def evaluate_guidance(
    patient: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward_fn: Callable[..., Sequence[float]],
    *,
    guide: DoctorGuidedLogitsProcessor | None = None,
    batch_size: int = 16,
    **generate_kwargs,
) -> dict:
    """
    Reward, distance from the patient, diversity and length of the guided policy.

    Args:
        patient, processing_class, prompts:
            As in [`generate_completions`].
        reward_fn (`Callable`):
            Called once as `reward_fn(prompts=..., completions=...)` with a prompt and a text for each of the N
            completions; returns N numbers.
        guide ([`DoctorGuidedLogitsProcessor`], *optional*):
            The guidance. `None` is the patient alone, at KL 0.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions generated, and then read, at once.
        **generate_kwargs:
            `num_samples_per_prompt`, `max_new_tokens`, `seed` and more of [`generate_completions`].

    Returns:
        `dict`: means `reward`, `kl` (nats per completion), `num_tokens` and `is_complete` with their standard errors
        `reward_se` and `kl_se`, `entropy` (nats per token), `distinct_4` over the words of all texts, and, one entry for
        each completion, `completions`, `rewards` and `kls`. A standard error is taken over prompts, whose samples are
        not independent of one another; over the samples, if there is one prompt.

    Raises:
        `ValueError`: when there is not one finite reward for each completion, or a setting of `generate` makes another
            policy than that whose KL is measured: another temperature, greedy search, beams, `top_k`, `top_p`,
            penalties, or anything that is not known to leave the policy as it is.
    """
    own = ("num_samples_per_prompt", "max_new_tokens", "seed")
    _check_is_of_policy(
        altering_settings({name: generate_kwargs[name] for name in generate_kwargs if name not in own})
    )
    completions = generate_completions(
        patient, processing_class, prompts, guide=guide, batch_size=batch_size, **generate_kwargs
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
    max_evaluations: int = 20,
    **generate_kwargs,
) -> float:
    """
    The strength of guidance that moves the patient by a wanted KL.

    Every estimate uses the same seed. The root is bracketed, and sought by interpolation of the square root of the KL,
    which is nearly linear in `beta`.

    Args:
        patient, processing_class, prompts:
            As in [`generate_completions`].
        make_guide (`Callable`):
            Makes the guidance of a `beta`, e.g. `lambda beta: DoctorGuidedLogitsProcessor(doctor, beta=beta)`. At 0 it
            is the patient alone.
        target_kl (`float`):
            Wanted KL, positive, in nats per completion.
        max_beta (`float`, *optional*, defaults to `1.0`):
            Largest `beta` to try; 1 is the most that a mixture has.
        tolerance (`float`, *optional*, defaults to `0.02`):
            Relative error of the KL to stop at. Less than its standard error is wasted.
        max_evaluations (`int`, *optional*, defaults to `20`):
            Number of estimates to give up after.
        **generate_kwargs:
            `num_samples_per_prompt`, `max_new_tokens`, `batch_size`, `seed` and more of [`generate_completions`].

    Returns:
        `float`: `beta` in `(0, max_beta]`.

    Raises:
        `ValueError`: when the target is not positive, out of reach of `max_beta`, or not met within `max_evaluations`.
    """
    if not target_kl > 0:
        raise ValueError(f"`target_kl` must be positive. Got {target_kl}; 0 is the patient alone.")

    def estimate(beta: float) -> float:
        ignored = {"reward_fn": lambda prompts, completions: [0.0] * len(completions)}
        settings = ignored | generate_kwargs
        return evaluate_guidance(patient, processing_class, prompts, guide=make_guide(beta), **settings)["kl"]

    low, low_kl = 0.0, 0.0
    high, high_kl = max_beta, estimate(max_beta)
    if high_kl < target_kl * (1 - tolerance):
        raise ValueError(
            f"`target_kl` must be within reach. Got {target_kl}, and the KL at `max_beta` {max_beta} is "
            f"{high_kl:.4g}; raise `max_beta` (with `alpha=1.0` it may exceed 1) or lower the target."
        )
    beta, kl = high, high_kl
    for _ in range(max_evaluations - 1):
        if abs(kl - target_kl) <= tolerance * target_kl:
            return beta
        share = (target_kl**0.5 - low_kl**0.5) / (high_kl**0.5 - low_kl**0.5)
        beta = low + min(max(share, 0.05), 0.95) * (high - low)  # never stuck at one end
        kl = estimate(beta)
        if kl < target_kl:
            low, low_kl = beta, kl
        else:
            high, high_kl = beta, kl
    if abs(kl - target_kl) <= tolerance * target_kl:
        return beta
    raise ValueError(
        f"`target_kl` must be met within {max_evaluations} evaluations. Got a KL of {kl:.4g} for {target_kl}; raise "
        "`num_samples_per_prompt` for a smoother estimate, or `tolerance`."
    )


def best_of_n(rewards: Sequence[Sequence[float]] | torch.Tensor, n: int) -> dict[str, float]:
    r"""
    The baseline that needs no doctor: sample `n` times from the patient and keep the best.

    From M samples of each prompt the expected best of `n` is known without resampling: in ascending order, the
    $i$-th is the best of a random $n$ of them with probability $\binom{i-1}{n-1} / \binom{M}{n}$. Its KL from the
    patient is at most $\log n - (n - 1) / n$ (https://huggingface.co/papers/2401.01879), and close to that when no
    completion is likely.

    Args:
        rewards (`torch.Tensor` of shape `(P, M)`, or nested lists):
            Rewards of M samples of the patient for each prompt.
        n (`int`):
            How many samples to choose from, from 1 to M.

    Returns:
        `dict`: mean `reward` and its standard error over prompts `reward_se`, and the upper bound of the `kl` in nats.

    Raises:
        `ValueError`: when `n` is not between 1 and M, or a reward is not finite.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import best_of_n
    >>> round(best_of_n([[0.0, 3.0, 6.0]], n=2)["reward"], 6)  # of the 3 pairs one has the best 3, two have 6
    5.0

    ```
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    num_samples = rewards.shape[1] if rewards.dim() == 2 else 0
    if not 1 <= n <= num_samples or not rewards.isfinite().all():
        raise ValueError(
            f"`n` must be between 1 and the number of samples of a prompt, {num_samples}, with finite rewards. Got {n}, "
            f"{int((~rewards.isfinite()).sum())} rewards not finite; sample more."
        )
    odds = [math.comb(i, n - 1) / math.comb(num_samples, n) for i in range(num_samples)]
    best = rewards.sort(dim=1).values @ torch.tensor(odds, dtype=torch.float64)  # (P,)
    return {
        "reward": best.mean().item(),
        "reward_se": _standard_error(best, len(best)),
        "kl": math.log(n) - (n - 1) / n,
    }


def _check_is_of_policy(altered_by: Mapping) -> None:
    if altered_by:
        rules = [f"`{name}` must be {NEUTRAL[name]}" if name in NEUTRAL else f"no `{name}`" for name in altered_by]
        raise ValueError(
            f"The KL of a policy is measured on its own samples, drawn from all tokens: {', '.join(rules)}. Got "
            f"{', '.join(map(reprlib.repr, altered_by.values()))}, which makes another policy; leave it out, or compare "
            "rewards alone, of samples from `generate_completions`."
        )


def _standard_error(values: torch.Tensor, num_prompts: int) -> float:
    """Standard error of the mean of (N,) values, over prompts if there are several; `nan` for a single value."""
    if num_prompts > 1:
        values = values.view(num_prompts, -1).mean(dim=1)
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def _completion_logits(model: PreTrainedModel | Doctor, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """Logits (T, V) at which a model would have sampled each completion, on the CPU or wherever the model ends."""
    rows = [completion.prompt_ids + completion.completion_ids for completion in completions]
    ids, mask = pad(rows, padding_side="right", device=model.device)  # what is padding, no token before it sees
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    ends = [(len(completion.prompt_ids) - 1, len(row) - 1) for completion, row in zip(completions, rows, strict=True)]
    return [logits[i, start:end] for i, (start, end) in enumerate(ends)]
