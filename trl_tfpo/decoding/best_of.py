# SPDX-License-Identifier: Apache-2.0

"""
Best of n: the guided completion with the largest sum of the doctors' token credits.

During generation, guidance can only estimate the credits of future tokens. The credits of a finished completion are
known, so selection by their sum increases the reward, at n times the cost. The KL of the resulting policy from the
guided policy is at most `log n - (n - 1) / n` nats.

Shapes: B prompts with n completions each (those of a prompt are consecutive rows), L tokens of the prompt, T of a
completion.
"""

from collections.abc import Callable, Sequence

import torch

from ..models.token_credits import credited_rewards
from .doctors import Doctor
from .exponents import Exponent, exponent_at
from .logits_processor import DoctorGuidedLogitsProcessor


def completion_rewards(
    guide: DoctorGuidedLogitsProcessor, completion_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    r"""
    Compute the rewards of completions: the sum of token credits, $\sum_i \beta_i \sum_t c_i(y_t)$.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The doctors and their exponents $\beta_i$. Of a schedule, only the first value is used.
        completion_ids (`torch.LongTensor` of shape `(B * n, T)`):
            Completions.
        mask (`torch.BoolTensor` of shape `(B * n, T)`):
            Tokens that are part of a completion.

    Returns:
        `torch.Tensor` of shape `(B * n,)`: rewards in nats.

    Raises:
        `ValueError`: when a doctor whose exponent is not 0 has no credits, all exponents are 0, or a token has no
            credit.
    """
    check_credits(guide)
    total = torch.zeros(len(completion_ids), device=completion_ids.device)
    for doctor, beta in _without_references(guide):
        if doctor.credits is not None:
            weight = torch.as_tensor(exponent_at(beta, 0)).to(total)  # () or (B,)
            if weight.dim():
                weight = weight.repeat_interleave(len(total) // len(weight))
            total += weight * credited_rewards(doctor.credits, completion_ids, mask)
    return total


def check_credits(guide: DoctorGuidedLogitsProcessor) -> None:
    """Raise `ValueError` when a doctor whose exponent is not 0 has no token credits, or all exponents are 0."""
    weights = [(doctor, torch.as_tensor(exponent_at(beta, 0))) for doctor, beta in _without_references(guide)]
    if not any(weight.any() for _, weight in weights):
        raise ValueError(
            "Completions are ranked by doctors whose exponent is not 0 at the first token. Got 0 for all; change "
            "`beta`, or leave out `best_of`."
        )
    for doctor, weight in weights:
        if doctor.credits is None and weight.any():
            raise ValueError(
                "Completions are ranked by the token credits of the doctors. Got a doctor without credits; train it "
                "with `calibrate_rewards=True` and load it with `DoctorGuidedLogitsProcessor.from_pretrained`."
            )


def check_best_of(guide: DoctorGuidedLogitsProcessor, best_of: int, setting: Callable[[str], object]) -> None:
    """
    Raise `ValueError` when `generate` cannot sample several completions, or the guide cannot rank them.

    `setting` returns the value of a setting of `generate`, given its name.
    """
    if not isinstance(best_of, int) or best_of < 1:
        raise ValueError(f"`best_of` must be a number of completions, at least 1. Got {best_of!r}; 2 is a good start.")
    found = [f"`{name}`" for name in ("num_beams", "num_return_sequences") if setting(name) not in (None, 1)]
    found += [f"`{name}`" for name in ("return_dict_in_generate", "speculative", "streamer") if setting(name)]
    if not setting("do_sample"):
        found.append("`do_sample=False`")
    if found:
        raise ValueError(
            f"`best_of` samples completions and returns the ids of one of them. Got {' and '.join(found)}; pass "
            "`do_sample=True` and leave out other modes."
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
    Select the sequence with the largest reward for each prompt.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The doctors and their exponents.
        sequences (`torch.LongTensor` of shape `(B * n, L + T)`):
            Prompts and completions.
        best_of (`int`):
            Number n of completions per prompt.
        prompt_length (`int`):
            Number L of tokens in a prompt.
        eos_token_id (`int` or sequence of `int`, *optional*):
            Ids that end a completion. Later tokens do not count.
        pad_token_id (`int`, *optional*):
            Padding id of completions that a stopping criterion ended. Padding at the end of a row does not count.

    Returns:
        `torch.LongTensor` of shape `(B, L + T)`.
    """
    completions = sequences[:, prompt_length:]
    eos = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    is_eos = torch.isin(completions, torch.tensor(eos, dtype=torch.long, device=completions.device)).long()
    mask = is_eos.cumsum(dim=1) == is_eos  # up to and including the first EOS
    if pad_token_id is not None:
        mask &= (completions != pad_token_id).flip(1).cumsum(dim=1).flip(1) > 0  # exclude final padding
    best = completion_rewards(guide, completions, mask).view(-1, best_of).argmax(dim=1)
    return sequences[torch.arange(len(best), device=best.device) * best_of + best]


def _without_references(guide: DoctorGuidedLogitsProcessor) -> list[tuple[Doctor, Exponent]]:
    """The doctors that are not references, with their exponents."""
    pairs = list(zip(guide.doctors, guide.betas, strict=True))
    return pairs[: len(pairs) - guide.num_references]
