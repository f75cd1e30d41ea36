# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

r"""
What guidance gains and what it costs: reward, distance from the patient, diversity.

Shapes: N completions, T tokens of a completion (EOS included), V vocabulary, P prompts. Units: nats.

Methods are comparable at the same KL from the patient, [`match_kl`]: any reward can be had at some distance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .doctors import Doctor
from .generation import guided_generate, without_doctors
from .logits_processor import DoctorGuidedLogitsProcessor
from .tokenization import eos_token_ids, tokenize_prompt


Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Completion:
    """
    A sampled completion.

    Args:
        prompt (`str` or `list[dict]`):
            Text or messages that it completes.
        prompt_ids (`list[int]`):
            Token ids of the prompt, as the patient saw them.
        completion_ids (`list[int]`):
            Token ids of the completion, EOS included.
        text (`str`):
            The completion without special tokens.
        is_complete (`bool`):
            Whether it ends in EOS, rather than at `max_new_tokens`.
    """

    prompt: Prompt
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    is_complete: bool


@torch.no_grad()
def generate_completions(
    patient: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    guide: DoctorGuidedLogitsProcessor | None = None,
    num_samples_per_prompt: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    **generate_kwargs,
) -> list[Completion]:
    """
    What the patient says, guided or alone.

    Top-k, top-p and repetition penalty are off, whatever the patient's generation config says: these are samples of
    the policy itself. The random state of the caller is left as it was.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            A causal language model in eval mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (sequence of `str` or `list[dict]`):
            Texts, or conversations for the chat template.
        guide ([`DoctorGuidedLogitsProcessor`], *optional*):
            The guidance. `None` is the patient alone. Its mask is set here, to that of each batch.
        num_samples_per_prompt (`int`, *optional*, defaults to `1`):
            Independent samples of each prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the samples; 0 is greedy search.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions generated at once. The samples depend on it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        **generate_kwargs:
            Anything else for `patient.generate`.

    Returns:
        `list[Completion]`: the samples of the first prompt, then those of the second, and so on.

    Raises:
        `ValueError`: when there is no prompt, the patient is in training mode, or the guide has a weight for each row.
    """
    _check_policy(patient, guide)
    if len(prompts) == 0 or num_samples_per_prompt < 1:
        raise ValueError(
            "There must be at least one prompt and one sample of each. Got "
            f"{len(prompts)} prompts and `num_samples_per_prompt` {num_samples_per_prompt}."
        )
    eos_ids = eos_token_ids(processing_class, patient)
    pad_token_id = next(x for x in (processing_class.pad_token_id, *eos_ids, 0) if x is not None)
    sampling = dict(do_sample=True, temperature=temperature) if temperature > 0 else dict(do_sample=False)
    tokenized = [(prompt, tokenize_prompt(prompt, processing_class)) for prompt in prompts]
    rows = [row for row in tokenized for _ in range(num_samples_per_prompt)]
    generate = patient.generate if guide is None else partial(guided_generate, patient, guide)
    completions = []
    with torch.random.fork_rng(devices=[patient.device] if patient.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            ids, mask = _pad([ids for _, ids in batch], padding_side="left", device=patient.device)
            output = generate(
                input_ids=ids.masked_fill(mask == 0, pad_token_id),
                attention_mask=mask,
                **(
                    sampling
                    | dict(top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens)
                    | dict(pad_token_id=pad_token_id, eos_token_id=eos_ids or None)
                    | generate_kwargs
                ),
            )
            for (prompt, prompt_ids), generated in zip(batch, output[:, ids.size(1) :].tolist(), strict=True):
                end = next((i + 1 for i, x in enumerate(generated) if x in eos_ids), None)
                text = processing_class.decode(generated[:end], skip_special_tokens=True)
                completions.append(Completion(prompt, prompt_ids, generated[:end], text, end is not None))
    if guide is not None:
        guide.reset()
    return completions


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
        `ValueError`: when the patient is in training mode, or the guide has a weight for each row.
    """
    _check_policy(patient, guide)
    divergences = []
    for start in range(0, len(completions), batch_size):
        batch = completions[start : start + batch_size]
        with without_doctors(patient, guide):
            logits = [_completion_logits(model, batch) for model in (patient, *guide.doctors)]
        for patient_logits, *doctor_logits in zip(*logits, strict=True):  # (T, V) each
            guided_logps = guide.combine(patient_logits, doctor_logits)
            patient_logps = patient_logits.to(guided_logps.dtype).log_softmax(dim=-1)
            log_ratio = (guided_logps - patient_logps).masked_fill(guided_logps == float("-inf"), 0)
            divergences.append((guided_logps.exp() * log_ratio).double().sum().clamp(min=0).cpu())
    return torch.stack(divergences) if divergences else torch.zeros(0, dtype=torch.float64)


def distinct_n(texts: Sequence[str | Sequence[int]], n: int = 4) -> float:
    r"""
    Diversity of a pool of texts: the share of its n-grams that are distinct.

    $$\frac{\#\ \text{distinct n-grams of the pool}}{\#\ \text{n-grams of the pool}}$$

    An n-gram lies within one text. The share falls as the pool grows, for a language runs out of n-grams: compare
    pools of the same number of texts of about the same length only.

    Args:
        texts (sequence of `str` or of sequences of `int`):
            Texts, which are split at white space, or token ids.
        n (`int`, *optional*, defaults to `4`):
            Length of the n-grams, in words or tokens.

    Returns:
        `float`: in `(0, 1]`; `nan` when no text has `n` words.

    Raises:
        `ValueError`: when `n` is less than 1.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import distinct_n
    >>> distinct_n(["a b a b", "a b c"], n=2)  # a b, b a, a b; a b, b c
    0.6

    ```
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1. Got {n}; the usual is 4.")
    pool = [text.split() if isinstance(text, str) else text for text in texts]
    ngrams = [tuple(words[i : i + n]) for words in pool for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


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
        `reward_se` and `kl_se`, `distinct_4` over the words of all texts, and, one entry for each completion,
        `completions`, `rewards` and `kls`. A standard error is taken over prompts, whose samples are not independent
        of one another; over the samples, if there is one prompt.

    Raises:
        `ValueError`: when there is not one finite reward for each completion, or the temperature is not 1.
    """
    if generate_kwargs.get("temperature", 1.0) != 1.0:
        raise ValueError(
            "The KL of a guided policy is estimated from its own samples, so `temperature` must be 1. Got "
            f"{generate_kwargs['temperature']}; use `generate_completions` for other temperatures."
        )
    completions = generate_completions(
        patient, processing_class, prompts, guide=guide, batch_size=batch_size, **generate_kwargs
    )
    texts = [completion.text for completion in completions]
    rewards = torch.as_tensor(
        reward_fn(prompts=[completion.prompt for completion in completions], completions=texts), dtype=torch.float64
    )
    if rewards.shape != (len(texts),) or not rewards.isfinite().all():
        raise ValueError(
            "`reward_fn` must return a finite number for each completion. Got "
            f"{tuple(rewards.shape)} for {len(texts)} completions, {int(rewards.isfinite().sum())} finite; give "
            "texts that cannot be judged a number, too."
        )
    kls = torch.zeros_like(rewards) if guide is None else guided_kl(patient, guide, completions, batch_size=batch_size)
    lengths = [len(completion.completion_ids) for completion in completions]
    return {
        "reward": rewards.mean().item(),
        "reward_se": _standard_error(rewards, len(prompts)),
        "kl": kls.mean().item(),
        "kl_se": _standard_error(kls, len(prompts)),
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
        `ValueError`: when `n` is not between 1 and M.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import best_of_n
    >>> round(best_of_n([[0.0, 3.0, 6.0]], n=2)["reward"], 6)  # of the 3 pairs one has the best 3, two have 6
    5.0

    ```
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    num_samples = rewards.shape[1] if rewards.dim() == 2 else 0
    if not 1 <= n <= num_samples:
        raise ValueError(
            f"`n` must be between 1 and the number of samples of a prompt, {num_samples}. Got {n}; sample more."
        )
    odds = [math.comb(i, n - 1) / math.comb(num_samples, n) for i in range(num_samples)]
    best = rewards.sort(dim=1).values @ torch.tensor(odds, dtype=torch.float64)  # (P,)
    return {
        "reward": best.mean().item(),
        "reward_se": _standard_error(best, len(best)),
        "kl": math.log(n) - (n - 1) / n,
    }


def _standard_error(values: torch.Tensor, num_prompts: int) -> float:
    """Standard error of the mean of (N,) values, over prompts if there are several; `nan` for a single value."""
    if num_prompts > 1:
        values = values.view(num_prompts, -1).mean(dim=1)
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def _pad(rows: Sequence[list[int]], *, padding_side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (B, L) each, of rows of different lengths."""
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return tuple(pad_sequence(x, batch_first=True, padding_side=padding_side).to(device) for x in (ids, mask))


def _completion_logits(model: PreTrainedModel | Doctor, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """Logits (T, V) at which a model would have sampled each completion, on the CPU or wherever the model ends."""
    rows = [completion.prompt_ids + completion.completion_ids for completion in completions]
    ids, mask = _pad(rows, padding_side="right", device=model.device)  # what is padding, no token before it sees
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    ends = [(len(completion.prompt_ids) - 1, len(row) - 1) for completion, row in zip(completions, rows, strict=True)]
    return [logits[i, start:end] for i, (start, end) in enumerate(ends)]


def _check_policy(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor | None) -> None:
    doctors = guide.doctors if guide else []
    if any(model.training for model in (patient, *(doctor.model for doctor in doctors))):
        raise ValueError(
            "Patient and doctors must be in eval mode, as dropout is random. Got training mode; call `.eval()`."
        )
    if guide and not all(isinstance(weight, float) for weight in (guide.alpha, *guide.betas)):
        raise ValueError(
            "An evaluation is of one policy, so `alpha` and `beta` must be numbers. Got a weight for each row or a "
            "schedule; evaluate one strength at a time."
        )
    if any(doctor.prompt is not None for doctor in doctors):
        raise ValueError(
            "An evaluation has prompts of its own, so doctors must read those. Got a doctor with a `prompt`; leave it "
            "out."
        )
