# SPDX-License-Identifier: Apache-2.0

"""
Answers sampled from a model at temperature 1, with a cache on disk.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trl_tfpo.common.atomic import atomic_write
from trl_tfpo.common.progress import Progress
from trl_tfpo.models.fingerprint import model_fingerprint


logger = logging.getLogger(__name__)
Guide = Callable[[list[int], torch.Tensor, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def draw(
    model: PreTrainedModel,
    prompts_ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    eos_token_id: int | Sequence[int],
    guide: Guide | None = None,
) -> list[list[int]]:
    """
    Sample one completion for each prompt, at temperature 1 and from the whole vocabulary, with or without a guide.

    Equal prompts are read once, and a completion leaves the batch when it ends. Prompts are padded on the left.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, in eval mode.
        prompts_ids (`Sequence[list[int]]` of B):
            Token ids of the prompts. For several completions of a prompt, repeat it.
        max_new_tokens (`int`):
            Maximum number of tokens of a completion.
        generator (`torch.Generator`):
            Random number generator, on the device where tokens are sampled.
        eos_token_id (`int` or `Sequence[int]`):
            Tokens that end a completion.
        guide (`Callable`, *optional*):
            Function from the indices of the unfinished completions, their last hidden states `(B', H)` and their
            logits `(B', V)` to the logits to sample from.

    Returns:
        `list[list[int]]` of B: the new token ids, with EOS if the completion has ended.

    Raises:
        `ValueError`: if there is no prompt, a prompt is empty, or `max_new_tokens` is not positive.
    """
    if not prompts_ids or not all(prompts_ids) or max_new_tokens < 1:
        raise ValueError(
            "There must be at least one prompt, each with at least one token, and `max_new_tokens` must be positive. "
            f"Got {len(prompts_ids)} prompts, the shortest of {min(map(len, prompts_ids), default=0)} tokens, and "
            f"max_new_tokens={max_new_tokens}; correct what is zero."
        )
    # B rows (unfinished completions), U distinct prompts, P tokens of the longest prompt, V words
    device = model.device
    eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), device=device)
    prompt_of_row, ids, mask = distinct_prompts(prompts_ids, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    completions: list[list[int]] = [[] for _ in prompts_ids]
    live = list(range(len(prompts_ids)))
    settings = dict(use_cache=True, output_hidden_states=guide is not None)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **settings)
    cache = output.past_key_values
    cache.batch_select_indices(prompt_of_row)
    logits, mask, positions = output.logits[prompt_of_row, -1], mask[prompt_of_row], mask.sum(1)[prompt_of_row]
    hidden = output.hidden_states[-1][prompt_of_row, -1] if guide else None
    for step in range(max_new_tokens):
        if guide:
            logits = guide(live, hidden, logits)
        probabilities = logits.float().softmax(dim=-1).to(generator.device)  # (B, V)
        tokens = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)
        for row, token in zip(live, tokens.tolist(), strict=True):
            completions[row].append(token)
        going = (~torch.isin(tokens, eos)).nonzero()[:, 0]
        if step == max_new_tokens - 1 or len(going) == 0:
            break
        if len(going) < len(live):
            cache.batch_select_indices(going)
            tokens, mask, positions = tokens[going], mask[going], positions[going]
            live = [live[index] for index in going.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        output = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            **settings,
        )
        logits, positions = output.logits[:, -1], positions + 1
        hidden = output.hidden_states[-1][:, -1] if guide else None
    return completions


def distinct_prompts(
    prompts_ids: Sequence[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the prompt of each row (B,), and the U distinct prompts, padded on the left, with their mask (U, P)."""
    index_of: dict[tuple[int, ...], int] = {}
    prompt_of_row = [index_of.setdefault(tuple(ids), len(index_of)) for ids in prompts_ids]
    longest = max(map(len, index_of))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in index_of]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in index_of]
    return tuple(torch.tensor(values, device=device) for values in (prompt_of_row, ids, mask))


class Samples:
    """
    Cache of samples of a model on disk.

    Samples are drawn in pieces: some prompts, with all their samples. A piece is a file of JSON lines,
    `{"prompt_ids": [...], "completions_ids": [[...], ...]}`, at `folder/FINGERPRINT/SPLIT-FIRST_PROMPT-KEY.jsonl`. The
    fingerprint is the hash of the model's configuration and weights, and the key is the hash of all other inputs of
    the piece. Files are written atomically. Each piece has its own seed, so a resumed run draws the same samples as an
    uninterrupted run.

    Args:
        folder (`Path`):
            Folder of the cache.
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, in eval mode.
        max_new_tokens (`int`):
            Maximum number of tokens of a completion.
        eos_token_id (`int` or `Sequence[int]`):
            Tokens that end a completion.
        seed (`int`, *optional*, defaults to 0):
            Seed of the samples.
        rows_per_piece (`int`, *optional*, defaults to 128):
            Number of completions in a piece, or all completions of one prompt if they are more. The samples depend on
            it.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int],
        seed: int = 0,
        rows_per_piece: int = 128,
    ):
        self.folder, self.model, self.seed, self.rows_per_piece = Path(folder), model, seed, rows_per_piece
        self.settings = dict(max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model."""
        return model_fingerprint(self.model)

    def of(self, split: str, prompts_ids: Sequence[list[int]], num_samples: int) -> list[list[list[int]]]:
        """
        Return the token ids of `num_samples` completions of each prompt, EOS included. Draw those that are not cached.

        `split` names the prompts in the names of files. Pieces stay valid if prompts are added at the end.
        """
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1. Got {num_samples}; raise it.")
        size = max(self.rows_per_piece // num_samples, 1)  # prompts of a piece
        samples = []
        with Progress(len(prompts_ids) * num_samples, f"Sampling {split}", "completions") as progress:
            for start in range(0, len(prompts_ids), size):
                piece = [list(ids) for ids in prompts_ids[start : start + size]]
                drawn, was_kept = self._piece(split, start, piece, num_samples)
                samples += drawn
                progress.update(len(piece) * num_samples, is_skipped=was_kept)
        return samples

    def _piece(self, split: str, start: int, prompts_ids: list[list[int]], num_samples: int) -> tuple[list, bool]:
        """Return the samples of a piece, and whether they were in the cache."""
        facts = [split, start, prompts_ids, num_samples, self.seed, self.settings]
        key = hashlib.sha256(json.dumps(facts).encode())
        file = self.folder / self.fingerprint / f"{split}-{start:05d}-{key.hexdigest()[:16]}.jsonl"
        kept = _read(file, prompts_ids)
        if kept is not None:
            return kept, True
        generator = torch.Generator(self.model.device).manual_seed(int.from_bytes(key.digest()[:4]))
        repeated = [ids for ids in prompts_ids for _ in range(num_samples)]
        flat = draw(self.model, repeated, generator=generator, **self.settings)
        drawn = [flat[first : first + num_samples] for first in range(0, len(flat), num_samples)]
        with atomic_write(file) as part, open(part, "w", encoding="utf-8") as lines:
            for ids, completions in zip(prompts_ids, drawn, strict=True):
                lines.write(json.dumps({"prompt_ids": ids, "completions_ids": completions}) + "\n")
        return drawn, False


def _read(file: Path, prompts_ids: list[list[int]]) -> list[list[list[int]]] | None:
    """Return the samples in a file, or None if the file is missing or damaged."""
    if not file.is_file():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if [row["prompt_ids"] for row in rows] == prompts_ids:
            return [row["completions_ids"] for row in rows]
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged: its samples are drawn again.", file)
    return None
