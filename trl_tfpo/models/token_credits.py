# SPDX-License-Identifier: Apache-2.0

"""
Token credits: a reward for each token of the vocabulary, independent of the context.

A doctor trained on calibrated rewards (`training/calibration.py`) is saved with its credits. The sum of the credits of
a completion ranks guided completions without another model.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from ..common.atomic import atomic_write


CREDITS_FILE = "token_credits.safetensors"
SOURCE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


def save_credits(credits: torch.Tensor | None, folder: str | os.PathLike[str]) -> None:
    """Save the credits (V,) of a doctor, in nats, in its folder. `None` deletes the file of an earlier doctor."""
    if credits is None:
        (Path(folder) / CREDITS_FILE).unlink(missing_ok=True)
        return
    with atomic_write(Path(folder) / CREDITS_FILE) as part:
        save_file({"credits": credits.detach().float().cpu().contiguous()}, part)


def load_credits(path: str | os.PathLike[str], **kwargs: Any) -> torch.Tensor | None:
    """
    Load the credits (V,) of a doctor from a folder or the Hub, in nats; `None` if it has none.

    `kwargs` are those of `from_pretrained`. Only arguments that locate files are used, such as `revision`.
    """
    source = {name: kwargs[name] for name in SOURCE if name in kwargs}
    file = cached_file(path, CREDITS_FILE, _raise_exceptions_for_missing_entries=False, **source)
    return None if file is None else load_file(file)["credits"]


def credited_rewards(credits: torch.Tensor, completion_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sum the credits of the tokens of each completion.

    Args:
        credits (`torch.Tensor` of shape `(V,)`):
            Credit of each token of the vocabulary.
        completion_ids (`torch.LongTensor` of shape `(B, T)`):
            Token ids of the completions.
        mask (`torch.BoolTensor` of shape `(B, T)`):
            True for the tokens to sum.

    Returns:
        `torch.Tensor` of shape `(B,)`: sums in nats.

    Raises:
        `ValueError`: if an id has no credit.

    Examples:

    ```python
    >>> import torch
    >>> from trl_tfpo.models.token_credits import credited_rewards
    >>> ids = torch.tensor([[1, 2], [2, 0]])
    >>> credited_rewards(torch.tensor([9.0, 0.5, -1.0]), ids, mask=torch.tensor([[True, True], [True, False]]))
    tensor([-0.5000, -1.0000])

    ```
    """
    ids = completion_ids.masked_fill(~mask, 0)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < len(credits):
        raise ValueError(
            f"Token ids must be from 0 to {len(credits) - 1}, the ids with credits. Got {ids.min()} to {ids.max()}; "
            "use a doctor with the patient's tokenizer."
        )
    return credits.to(ids.device)[ids].masked_fill(~mask, 0).sum(dim=1)
