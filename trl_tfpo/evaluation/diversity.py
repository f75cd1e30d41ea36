# SPDX-License-Identifier: Apache-2.0

"""
Diversity of texts: distinct n-grams and edit similarity.

Both measures take texts or token ids. Texts are split at white space.

Shapes: N pairs of texts, L words of the longer text.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


BATCH_SIZE = 2048  # pairs


def distinct_n(texts: Sequence[str | Sequence[int]], n: int = 4) -> float:
    r"""
    Share of distinct n-grams in a pool of texts.

    $$\frac{\#\ \text{distinct n-grams of the pool}}{\#\ \text{n-grams of the pool}}$$

    An n-gram lies within one text. The share falls with the size of the pool, because n-grams repeat. Compare only
    pools with the same number of texts of similar length.

    Args:
        texts (sequence of `str` or of sequences of `int`):
            Texts or token ids.
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
        raise ValueError(f"`n` must be at least 1. Got {n}; 4 is usual.")
    pool = [text.split() if isinstance(text, str) else text for text in texts]
    ngrams = [tuple(words[i : i + n]) for words in pool for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def self_similarity(
    groups: Sequence[Sequence[str | Sequence[int]]], *, max_pairs: int = 1000, seed: int = 0
) -> torch.Tensor:
    r"""
    Mean edit similarity over the pairs of texts in each group:

    $$1 - \frac{\operatorname{Levenshtein}(a, b)}{\max(|a|, |b|)}$$

    Distance and length are in words, or in tokens for token ids. The similarity is 1 for equal texts, and 0 for texts
    without a common word. High similarity among the samples of a prompt indicates a collapsed policy. Unlike
    Self-BLEU, the mean over pairs does not depend on the size of the group.

    Args:
        groups (sequence of sequences of `str` or of sequences of `int`):
            G groups of texts or token ids, for instance the samples of each prompt.
        max_pairs (`int`, *optional*, defaults to `1000`):
            Maximum number of pairs per group. Pairs of larger groups are drawn without replacement.
        seed (`int`, *optional*, defaults to `0`):
            Random seed.

    Returns:
        `torch.Tensor` of shape `(G,)`: in `[0, 1]`; `nan` for a group of fewer than two texts.

    Raises:
        `ValueError`: when `max_pairs` is less than 1.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import self_similarity
    >>> self_similarity([["a b c", "a b c"], ["a b c d", "a c d e"], ["a", "b"]])
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)

    ```
    """
    if max_pairs < 1:
        raise ValueError(
            f"`max_pairs` must be at least 1. Got {max_pairs}; with 1000 the standard error is below 0.02."
        )
    vocabulary: dict = {}
    rng = random.Random(seed)
    first, second, owners = [], [], []
    for owner, texts in enumerate(groups):
        words = [text.split() if isinstance(text, str) else text for text in texts]
        ids = [
            torch.tensor([vocabulary.setdefault(x, len(vocabulary)) for x in row], dtype=torch.long) for row in words
        ]
        num_pairs = len(ids) * (len(ids) - 1) // 2
        for pair in range(num_pairs) if num_pairs <= max_pairs else rng.sample(range(num_pairs), max_pairs):
            later = (1 + math.isqrt(1 + 8 * pair)) // 2  # pairs in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
            first.append(ids[pair - later * (later - 1) // 2])
            second.append(ids[later])
            owners.append(owner)
    group = torch.tensor(owners, dtype=torch.long)  # (N,)
    total = torch.zeros(len(groups), dtype=torch.float64).index_add(0, group, _edit_similarities(first, second))
    return total / torch.bincount(group, minlength=len(groups))


def _edit_similarities(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """Similarities (N,) of pairs of id sequences. Each step computes one row of each edit-distance table."""
    order = sorted(range(len(first)), key=lambda index: max(len(first[index]), len(second[index])))
    similarities = torch.empty(len(first), dtype=torch.float64)
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        rows = [first[index] for index in batch], [second[index] for index in batch]
        lengths = [torch.tensor([len(row) for row in side]) for side in rows]  # (N,)
        one, other = (pad_sequence(side, batch_first=True, padding_value=-1) for side in rows)  # (N, L)
        columns = torch.arange(other.size(1) + 1)
        row = columns.expand(len(batch), -1)  # from no word of `one`: insert all
        distances = lengths[1].clone()
        for step in range(1, one.size(1) + 1):
            delete = row + 1
            replace = row[:, :-1] + (one[:, step - 1 : step] != other)
            best = torch.cat([delete[:, :1], torch.minimum(delete[:, 1:], replace)], dim=1)
            row = (best - columns).cummin(dim=1).values + columns  # or insert words
            at_end = row.gather(1, lengths[1][:, None])[:, 0]
            distances = torch.where(lengths[0] == step, at_end, distances)
        longest = torch.maximum(*lengths)
        similarities[batch] = 1 - distances.double() / longest.clamp(min=1)
    return similarities
