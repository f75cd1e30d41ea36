# SPDX-License-Identifier: Apache-2.0

"""
Best of n: the guided completion with the largest sum of the doctors' token credits.

Guidance estimates the credits of future tokens. In a finished completion they are known, so the best of n gains
reward, at n times the cost. Its KL from the guided policy is at most `log n - (n - 1) / n` nats.

Shapes: B rows (the completions of a prompt follow each other), L tokens of the prompt, T of a completion, V
vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from ..models.token_credits import credited_rewards
from .doctors import Doctor
from .exponents import Weight, weight_at
from .logits_processor import DoctorGuidedLogitsProcessor


def completion_rewards(
    guide: DoctorGuidedLogitsProcessor, completion_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    r"""
    Rewards of completions: the doctors' token credits, weighted by their exponents, $\sum_i \beta_i \sum_t c_i(y_t)$.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance. A schedule counts with its first value.
        completion_ids (`torch.LongTensor` of shape `(B, T)`):
            Completions.
        mask (`torch.BoolTensor` of shape `(B, T)`):
            Mask of the completions. Other tokens are not counted.

    Returns:
        `torch.Tensor` of shape `(B,)`: in nats.

    Raises:
        `ValueError`: when a doctor whose exponent is not 0 has no credits, when all exponents are 0, or on tokens
            without credits.
    """
    check_credits(guide)
    total = torch.zeros(len(completion_ids), device=completion_ids.device)
    for doctor, beta in _without_references(guide):
        if doctor.credits is not None:
            weight = torch.as_tensor(weight_at(beta, 0)).to(total)  # () or (prompts,)
            if weight.dim():
                weight = weight.repeat_interleave(len(total) // len(weight))
            total += weight * credited_rewards(doctor.credits, completion_ids, mask)
    return total


def check_credits(guide: DoctorGuidedLogitsProcessor) -> None:
    """Raise `ValueError` when a doctor whose exponent is not 0 has no token credits, or all exponents are 0."""
    weights = [(doctor, torch.as_tensor(weight_at(beta, 0))) for doctor, beta in _without_references(guide)]
    if not any(weight.any() for _, weight in weights):
        raise ValueError(
            "Completions are ranked by doctors whose exponent is not 0 at the first token. Got 0 for all; pass "
            "another `beta`, or leave out `best_of`."
        )
    for doctor, weight in weights:
        if doctor.credits is None and weight.any():
            raise ValueError(
                "Completions are ranked by the token credits of the doctors. Got a doctor without any; train it with "
                "`calibrate_rewards=True` and load it by `DoctorGuidedLogitsProcessor.from_pretrained`."
            )


def check_best_of(guide: DoctorGuidedLogitsProcessor, best_of: int, setting: Callable[[str], object]) -> None:
    """
    Raise `ValueError` when `generate` cannot sample several completions, or the guide cannot rank them.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
        best_of (`int`):
            Completions of each prompt.
        setting (callable):
            From the name of a setting of `generate` to its value.
    """
    if not isinstance(best_of, int) or best_of < 1:
        raise ValueError(f"`best_of` must be a number of completions, at least 1. Got {best_of!r}; 2 is a good start.")
    found = [f"`{name}`" for name in ("num_beams", "num_return_sequences") if setting(name) not in (None, 1)]
    found += [f"`{name}`" for name in ("return_dict_in_generate", "speculative", "streamer") if setting(name)]
    if not setting("do_sample"):
        found.append("`do_sample=False`")
    if found:
        raise ValueError(
            f"`best_of` samples completions and returns one of them, as ids. Got {' and '.join(found)}; sample with "
            "`do_sample=True` and without the others."
        )
    check_credits(guide)


def keep_best(
    guide: DoctorGuidedLogitsProcessor,
    sequences: torch.Tensor,
    best_of: int,
    *,
    prompt_length: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """
    Select for each prompt the sequence with the largest reward.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
        sequences (`torch.LongTensor` of shape `(B * best_of, L + T)`):
            Prompts and completions. The sequences of a prompt follow each other.
        best_of (`int`):
            Completions of each prompt.
        prompt_length (`int`):
            L.
        eos_token_id (`int` or sequence of `int`, *optional*):
            Ids that end a completion. Tokens after them are not counted.
        pad_token_id (`int`, *optional*):
            Padding of completions that a stopping criterion has ended. Such ids at the end are not counted.

    Returns:
        `torch.LongTensor` of shape `(B, L + T)`
    """
    completions = sequences[:, prompt_length:]
    eos = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    is_eos = torch.isin(completions, torch.tensor(eos, dtype=torch.long, device=completions.device)).long()
    mask = is_eos.cumsum(dim=1) == is_eos  # up to the first EOS, included
    if pad_token_id is not None:
        mask &= (completions != pad_token_id).flip(1).cumsum(dim=1).flip(1) > 0  # without padding at the end
    best = completion_rewards(guide, completions, mask).view(-1, best_of).argmax(dim=1)
    return sequences[torch.arange(len(best), device=best.device) * best_of + best]


def _without_references(guide: DoctorGuidedLogitsProcessor) -> list[tuple[Doctor, Weight]]:
    """The doctors and their exponents, without the references at the end."""
    pairs = list(zip(guide.doctors, guide.betas, strict=True))
    return pairs[: len(pairs) - guide.num_references]
