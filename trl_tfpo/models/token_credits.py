# SPDX-License-Identifier: Apache-2.0

"""
Token credits: what each token of the vocabulary is worth to a doctor, whatever its context.

A doctor that was trained on calibrated rewards (`calibration.py`) keeps their credits in its folder. Their sum is the
reward of a whole completion. So completions that were generated under guidance can be ranked without another model,
and the best of several can be kept.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from ..common.atomic import written_whole


CREDITS_FILE = "token_credits.safetensors"
SOURCE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


def save_credits(credits: torch.Tensor | None, folder: str | os.PathLike) -> None:
    """
    Write the credits of a doctor into its folder, or remove those of another that was saved there before.

    Args:
        credits (`torch.Tensor` of shape `(V,)`, *optional*):
            In nats of the doctor's own log-probabilities. `None` for a doctor without credits.
        folder (`str` or `os.PathLike`):
            Where the doctor is saved.
    """
    if credits is None:
        (Path(folder) / CREDITS_FILE).unlink(missing_ok=True)
        return
    with written_whole(Path(folder) / CREDITS_FILE) as part:
        save_file({"credits": credits.detach().float().cpu().contiguous()}, part)


def load_credits(path: str | os.PathLike, **kwargs) -> torch.Tensor | None:
    """
    The credits `(V,)` of the doctor in a folder or on the Hub; None where there are none.

    Args:
        path (`str` or `os.PathLike`):
            Folder or name.
        **kwargs:
            Of `from_pretrained` of the doctor. Those that say where its files are count, such as `subfolder` and
            `revision`.
    """
    source = {name: kwargs[name] for name in SOURCE if name in kwargs}
    file = cached_file(path, CREDITS_FILE, _raise_exceptions_for_missing_entries=False, **source)
    return None if file is None else load_file(file)["credits"]


def credited_rewards(credits: torch.Tensor, completion_ids: torch.LongTensor, mask: torch.BoolTensor) -> torch.Tensor:
    """
    Rewards of whole completions: the sum of the credits of their tokens.

    Args:
        credits (`torch.Tensor` of shape `(V,)`):
            Credit of each token.
        completion_ids (`torch.LongTensor` of shape `(B, T)`):
            Completions.
        mask (`torch.BoolTensor` of shape `(B, T)`):
            Which tokens count.

    Returns:
        `torch.Tensor` of shape `(B,)`

    Raises:
        `ValueError`: on ids for which there are no credits.

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
            f"Completions must consist of tokens that have credits, 0 to {len(credits) - 1}. Got {ids.min()} to "
            f"{ids.max()}; take a doctor with the patient's tokenizer."
        )
    return credits.to(ids.device)[ids].masked_fill(~mask, 0).sum(dim=1)
