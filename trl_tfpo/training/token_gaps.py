# SPDX-License-Identifier: Apache-2.0

"""
Gaps of the tokens in an annotated dataset, and their regression on token embeddings.

Shapes: P pairs, N tokens that may have a reward, U distinct tokens among them, H entries of an embedding, B rows, T
tokens of a completion, V tokens in the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from ..annotation.token_rewards import GAP_COLUMNS
from ..data.tokenization import ID_COLUMNS, MASK_COLUMNS
from ..functional import token_rewards


MIN_PROMPTS = 32  # with fewer prompts, each pair counts as independent
BATCH_SIZE = 1000  # rows of the dataset that are read at once


@dataclass(frozen=True)
class TokenGaps:
    """
    The N tokens of P pairs that may have a reward: tokens of the assistant, except EOS.

    Args:
        ids (`torch.Tensor` of shape `(N,)`):
            Token ids.
        gaps (`torch.Tensor` of shape `(N,)`):
            Positive minus negative log-probability, in nats.
        pair (`torch.Tensor` of shape `(N,)`):
            Index of the pair.
        sign (`torch.Tensor` of shape `(N,)`):
            1 in chosen and -1 in rejected completions.
        sums (`torch.Tensor` of shape `(P, 3)`):
            Sparse rewards, gaps and number of tokens: sums over the chosen completion minus sums over the rejected.
        prompt (`torch.Tensor` of shape `(P,)`):
            Index of the prompt; of the pair if the dataset has fewer than 32 distinct prompts.
    """

    ids: torch.Tensor
    gaps: torch.Tensor
    pair: torch.Tensor
    sign: torch.Tensor
    sums: torch.Tensor
    prompt: torch.Tensor


def sample_pairs(dataset: Dataset, max_pairs: int) -> Dataset:
    """Return the dataset, or a random sample of `max_pairs` pairs with a fixed seed."""
    if len(dataset) <= max_pairs:
        return dataset
    sampled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:max_pairs]
    return dataset.select(sampled.sort().values.tolist())


def read_gaps(dataset: Dataset, eos_token_ids: Sequence[int]) -> TokenGaps:
    """Read tokens and gaps of an annotated dataset."""
    names = [name for name in (*ID_COLUMNS, *GAP_COLUMNS, *MASK_COLUMNS) if name in dataset.column_names]
    dataset, eos = dataset.select_columns(names), torch.tensor(list(eos_token_ids))
    tokens, sums = [], torch.zeros(len(dataset), 3)
    prompts: dict[tuple[int, ...], int] = {}
    prompt = torch.arange(len(dataset))
    for first in range(0, len(dataset), BATCH_SIZE):
        batch = dataset[first : first + BATCH_SIZE]
        for side, sign in enumerate((1.0, -1.0)):
            ids, gaps, mask = padded_columns(batch, side)
            mask &= ~torch.isin(ids, eos)
            rows = torch.arange(first, first + len(ids))
            pair = rows[:, None].expand_as(ids)[mask]
            tokens.append((ids[mask], gaps[mask], pair, torch.full(pair.shape, sign)))
            row_sums = (sparse_rewards(gaps, mask).sum(1), gaps.masked_fill(~mask, 0).sum(1), mask.sum(1).float())
            sums[rows] += sign * torch.stack(row_sums, dim=1)
        for row, prompt_ids in enumerate(batch.get(ID_COLUMNS[0], [])):
            prompt[first + row] = prompts.setdefault(tuple(prompt_ids), len(prompts))
    if len(prompts) < MIN_PROMPTS:
        prompt = torch.arange(len(dataset))
    ids, gaps, pair, signs = (torch.cat(parts) for parts in zip(*tokens, strict=True))
    return TokenGaps(ids=ids, gaps=gaps, pair=pair, sign=signs, sums=sums, prompt=prompt)


def padded_columns(batch: dict[str, list], side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, gaps and mask (B, T) of the chosen (`side` 0) or the rejected (1) completions of a batch."""
    ids = [torch.tensor(row) for row in batch[ID_COLUMNS[1 + side]]]
    gaps = [torch.tensor(row, dtype=torch.float32) for row in batch[GAP_COLUMNS[side]]]
    masks = batch.get(MASK_COLUMNS[side]) or [[True] * len(row) for row in ids]
    masks = [torch.tensor(row, dtype=torch.bool) for row in masks]
    return pad_sequence(ids, True), pad_sequence(gaps, True), pad_sequence(masks, True)


def sparse_rewards(gaps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the token rewards (B, T) of [`~trl_tfpo.functional.token_rewards`] from gaps without labels."""
    return token_rewards(
        positive_logps=gaps,
        negative_logps=torch.zeros_like(gaps),
        preference_sign=torch.ones(len(gaps)),
        completion_mask=mask,
        reward_direction="faces",
    )


def centered_embeddings(
    embeddings: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Center the embeddings (V, H) of the tokens that occur in `ids` (N,).

    Returns:
        `torch.Tensor` of shape `(U, H)`: embeddings of the distinct tokens minus the mean, float32, on the CPU;
        `torch.Tensor` of shape `(H,)`: the mean over all N tokens; and `torch.Tensor` of shape `(N,)`: for each token
        its row among the embeddings.
    """
    used, rows = ids.unique(return_inverse=True)
    centered = embeddings.detach()[used.to(embeddings.device)].float().cpu()
    mean = torch.bincount(rows).float() @ centered / len(rows)
    return centered - mean, mean, rows


def predict_gaps(
    centered: torch.Tensor, rows: torch.Tensor, tokens: TokenGaps, ridges: Sequence[float]
) -> tuple[torch.Tensor, float]:
    """
    Regress the gaps, minus their mean, on token embeddings.

    The ridge is chosen by cross-validation: each half of the pairs is predicted from the other half.

    Args:
        centered, rows (`torch.Tensor` of shape `(U, H)` and `(N,)`):
            From [`centered_embeddings`].
        tokens ([`TokenGaps`]):
            The tokens.
        ridges (`Sequence[float]`):
            Ridges to compare, in units of the mean variance of an entry of the embeddings.

    Returns:
        `torch.Tensor` of shape `(H,)`: coefficients fitted on all pairs; and `float`: the explained share of the
        variance of held-out gaps, negative if the prediction is worse than the mean.
    """
    gaps = tokens.gaps - tokens.gaps.mean()

    def moments(selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments (H, H) of embeddings of selected tokens, and the product (H,) of embeddings and gaps."""
        count = torch.bincount(rows[selected], minlength=len(centered)).float()
        total = torch.zeros(len(centered)).index_add_(0, rows[selected], gaps[selected])
        present = centered[count > 0]
        return present.T @ (present * count[count > 0, None]), present.T @ total[count > 0]

    def solve(second: torch.Tensor, product: torch.Tensor, ridge: float) -> torch.Tensor:
        penalty = ridge * second.diagonal().mean().clamp(min=1e-8) * torch.eye(len(second))
        return torch.linalg.solve(second.double() + penalty, product.double()).float()

    (second_even, product_even), (second_odd, product_odd) = (moments(tokens.pair % 2 == half) for half in (0, 1))

    def held_out_error(ridge: float) -> float:
        """Sum of squared errors on both halves minus the sum of squared gaps."""
        from_even, from_odd = solve(second_even, product_even, ridge), solve(second_odd, product_odd, ridge)
        error_of_odd = from_even @ second_odd @ from_even - 2 * from_even @ product_odd
        error_of_even = from_odd @ second_even @ from_odd - 2 * from_odd @ product_even
        return error_of_odd.item() + error_of_even.item()

    errors = [held_out_error(ridge) for ridge in ridges]
    best = errors.index(min(errors))
    coefficients = solve(second_even + second_odd, product_even + product_odd, ridges[best])
    return coefficients, -errors[best] / gaps.square().sum().clamp(min=1e-12).item()
