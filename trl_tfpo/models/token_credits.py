# SPDX-License-Identifier: Apache-2.0

"""
Token credits: a reward for each token of the vocabulary that does not depend on its context.

A doctor that was trained on calibrated rewards (`training/calibration.py`) is saved with its credits. The reward of a
completion is the sum of the credits of its tokens. Guided completions can thus be ranked without another model.
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
    """
    Save the credits of a doctor in its folder. Without credits, delete those of a doctor that was saved there before.

    Args:
        credits (`torch.Tensor` of shape `(V,)`, *optional*):
            Credits in nats of the doctor's log-probabilities. `None` for a doctor without credits.
        folder (`str` or `os.PathLike`):
            Folder of the doctor.
    """
    if credits is None:
        (Path(folder) / CREDITS_FILE).unlink(missing_ok=True)
        return
    with atomic_write(Path(folder) / CREDITS_FILE) as part:
        save_file({"credits": credits.detach().float().cpu().contiguous()}, part)


def load_credits(path: str | os.PathLike[str], **kwargs: Any) -> torch.Tensor | None:
    """
    Load the credits `(V,)` of a doctor in a folder or on the Hub, or return `None` if it has none.

    Args:
        path (`str` or `os.PathLike`):
            Folder or name.
        **kwargs:
            Keyword arguments of `from_pretrained` of the doctor. Those that locate files are used, such as `subfolder`
            and `revision`.
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
            Whether each token counts.

    Returns:
        `torch.Tensor` of shape `(B,)`

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
            f"Completions must consist of tokens with credits, 0 to {len(credits) - 1}. Got {ids.min()} to "
            f"{ids.max()}; use a doctor with the patient's tokenizer."
        )
    return credits.to(ids.device)[ids].masked_fill(~mask, 0).sum(dim=1)
