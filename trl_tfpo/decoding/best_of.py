# SPDX-License-Identifier: Apache-2.0

"""
Best of n: of several guided completions, the one that the doctors value most.

Guidance learns what a token leads to; a finished completion shows it. So the sum of token credits ranks completions better than
guidance could have steered them, at the price of generating several. The KL from the guided policy is at most
`log n - (n - 1) / n` nats.
"""

from collections.abc import Callable, Sequence

import torch

from ..models.token_credits import credited_rewards
from .exponents import weight_at
from .logits_processor import DoctorGuidedLogitsProcessor


def completion_rewards(
    guide: DoctorGuidedLogitsProcessor, completion_ids: torch.LongTensor, mask: torch.BoolTensor
) -> torch.Tensor:
    r"""
    Rewards of whole completions by the doctors' token credits, each times its exponent: $\sum_i \beta_i \sum_t c_i(y_t)$.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance. An exponent that follows a schedule counts with its first value.
        completion_ids (`torch.LongTensor` of shape `(B, T)`):
            Completions.
        mask (`torch.BoolTensor` of shape `(B, T)`):
            Which tokens count.

    Returns:
        `torch.Tensor` of shape `(B,)`: in nats.

    Raises:
        `ValueError`: when a doctor whose exponent is not 0 has no credits, when all exponents are 0, or on tokens for which
            there are no credits.
    """
    check_credits(guide)
    total = torch.zeros(len(completion_ids), device=completion_ids.device)
    for doctor, beta in _without_references(guide):
        if doctor.credits is not None:
            weight = torch.as_tensor(weight_at(beta, 0)).to(total)  # of all, or of each prompt
            if weight.dim():
                weight = weight.repeat_interleave(len(total) // len(weight))
            total += weight * credited_rewards(doctor.credits, completion_ids, mask)
    return total


def check_credits(guide: DoctorGuidedLogitsProcessor) -> None:
    """Raise `ValueError` when a doctor whose exponent is not 0 has no token credits, or all exponents are 0."""
    weights = [(doctor, torch.as_tensor(weight_at(beta, 0))) for doctor, beta in _without_references(guide)]
    if not any(weight.any() for _, weight in weights):
        raise ValueError(
            "Completions are ranked by doctors whose exponent is not 0 at the first token. Got 0 for all; give `beta` "
            "numbers, or leave out `best_of`."
        )
    for doctor, weight in weights:
        if doctor.credits is None and weight.any():
            raise ValueError(
                "Completions are ranked by the token credits of the doctors. Got a doctor without any; train it with "
                "`calibrate_rewards=True` and load it by `DoctorGuidedLogitsProcessor.from_pretrained`."
            )


def check_best_of(guide: DoctorGuidedLogitsProcessor, best_of: int, setting: Callable) -> None:
    """
    Raise `ValueError` when `generate` could not sample several completions, or the guide not rank them.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
        best_of (`int`):
            Completions of each prompt.
        setting (callable):
            Returns a setting of `generate`, given its name.
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
    sequences: torch.LongTensor,
    best_of: int,
    *,
    prompt_length: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> torch.LongTensor:
    """
    Of each prompt's sequences the one with the largest reward.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
        sequences (`torch.LongTensor` of shape `(B * best_of, L + T)`):
            Prompts and completions, those of one prompt together.
        best_of (`int`):
            Completions of each prompt.
        prompt_length (`int`):
            L.
        eos_token_id (`int` or sequence of `int`, *optional*):
            What ends a completion. Tokens after it do not count.
        pad_token_id (`int`, *optional*):
            What fills up a completion that something else has ended. Such tokens at the end do not count.

    Returns:
        `torch.LongTensor` of shape `(B, L + T)`
    """
    completions = sequences[:, prompt_length:]
    eos = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    is_eos = torch.isin(completions, torch.tensor(eos, dtype=torch.long, device=completions.device)).long()
    mask = is_eos.cumsum(dim=1) == is_eos  # as far as the first EOS, itself included
    if pad_token_id is not None:
        mask &= (completions != pad_token_id).flip(1).cumsum(dim=1).flip(1) > 0  # without padding at the end
    best = completion_rewards(guide, completions, mask).view(-1, best_of).argmax(dim=1)
    return sequences[torch.arange(len(best), device=best.device) * best_of + best]


def _without_references(guide: DoctorGuidedLogitsProcessor) -> list[tuple]:
    """The doctors with their exponents; references, which stand at the end, are left out."""
    pairs = list(zip(guide.doctors, guide.betas, strict=True))
    return pairs[: len(pairs) - guide.num_references]
