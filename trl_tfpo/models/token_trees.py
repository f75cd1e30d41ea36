# SPDX-License-Identifier: Apache-2.0

"""
Texts as token trees, so that a model reads each common beginning once.

Shapes: M tokens of a row, B rows, L tokens of the longest row. The texts of a tree are sorted by token ids. Each adds
a *branch* to the row: the tokens after its longest common beginning with the text before it.

    row:    the cat sat | ran | a dog        texts: the cat sat, the cat ran, a dog

A token attends to the tokens before it in its text. Its position is the number of these tokens. Texts without a common
beginning may share a row.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from ..common.language_model import LanguageModel, backbone_of, device_of, unwrap_peft
from .pair_rows import attention_mask_of, reads_like_alone


ATTENTION = "trl_tfpo_token_tree"  # name of the attention in transformers
BLOCK = 128  # maximum number of queries in one attention call


class Branch(NamedTuple):
    """Tokens `start` to `stop` of a row. Each attends to the ranges in `context`, and to the branch up to itself."""

    start: int
    stop: int
    context: list[slice]


class Block(NamedTuple):
    """Queries of one attention call, the ranges of keys and values, and the mask (queries, keys), 0 or -inf."""

    queries: slice
    seen: list[slice]
    mask: torch.Tensor


@dataclass(frozen=True)
class TokenTree:
    """
    Texts in one row.

    Args:
        input_ids (`list[int]` of length M):
            Tokens of the row.
        position_ids (`list[int]` of length M):
            Position of each token in its texts.
        branches (`list[Branch]`):
            Branches in the order of the row. They cover it.
        paths (`list[list[int]]`):
            For each text, the place of each of its tokens in the row.
    """

    input_ids: list[int]
    position_ids: list[int]
    branches: list[Branch]
    paths: list[list[int]]

    @cached_property
    def blocks(self) -> list[Block]:
        """The calls of the attention, in the order of the row."""
        blocks = []
        for branch in self.branches:
            context = [place for places in branch.context for place in range(places.start, places.stop)]
            for start in range(branch.start, branch.stop, BLOCK):
                stop = min(start + BLOCK, branch.stop)
                keys = [*context, *range(branch.start, stop)]
                mask = torch.full((stop - start, len(keys)), -math.inf).triu(len(keys) - (stop - start) + 1)
                blocks.append(Block(slice(start, stop), _ranges(keys), mask))
        return blocks


def token_tree(texts: list[list[int]]) -> TokenTree:
    """
    Put texts in one row that has each of their common beginnings once.

    Args:
        texts (`list[list[int]]`):
            Token ids, in ascending order of the lists.

    Examples:

    ```python
    >>> from trl_tfpo.models.token_trees import token_tree
    >>> tree = token_tree([[1, 2, 3], [1, 2, 4]])
    >>> tree.input_ids, tree.position_ids, tree.paths
    ([1, 2, 3, 4], [0, 1, 2, 2], [[0, 1, 2], [0, 1, 3]])

    ```
    """
    tree = TokenTree([], [], [], [])
    for index, text in enumerate(texts):
        num_common = common_length(texts[index - 1], text) if index else 0
        start = len(tree.input_ids)
        stop = start + len(text) - num_common
        common = tree.paths[-1][:num_common] if index else []
        if stop > start:
            tree.branches.append(Branch(start, stop, _ranges(common)))
        tree.input_ids.extend(text[num_common:])
        tree.position_ids.extend(range(num_common, len(text)))
        tree.paths.append([*common, *range(start, stop)])
    return tree


def common_length(one: list[int], other: list[int]) -> int:
    """Number of equal tokens at the beginning of two texts."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _ranges(places: Iterable[int]) -> list[slice]:
    """Ascending places as ranges."""
    ranges: list[slice] = []
    for place in places:
        if ranges and ranges[-1].stop == place:
            ranges[-1] = slice(ranges[-1].start, place + 1)
        else:
            ranges.append(slice(place, place + 1))
    return ranges


# Rows with padding, on the right


def plain_rows(trees: list[TokenTree], model: LanguageModel) -> dict[str, torch.Tensor]:
    """
    Inputs of a forward pass over trees of one text each.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` of shape `(B, L)`.
    """
    input_ids = _padded([tree.input_ids for tree in trees], model)
    return {"input_ids": input_ids, "attention_mask": _padded([[1] * len(tree.input_ids) for tree in trees], model)}


def masked_rows(trees: list[TokenTree], model: LanguageModel) -> dict[str, torch.Tensor]:
    """
    Inputs of a forward pass over trees, one in each row, for a model that reads rows with a mask for each pair of
    tokens, see [`~trl_tfpo.models.pair_rows.reads_pairs`].

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `position_ids` of shape `(B, L)`, and `attention_mask` of shape
        `(B, 1, L, L)`.
    """
    input_ids = _padded([tree.input_ids for tree in trees], model)
    length, device = input_ids.size(1), input_ids.device
    is_seen = torch.eye(length, dtype=torch.bool, device=device).repeat(len(trees), 1, 1)  # (B, L, L)
    is_earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    for row, tree in zip(is_seen, trees, strict=True):
        for start, stop, context in tree.branches:
            for places in context:
                row[start:stop, places] = True
            row[start:stop, start:stop] = is_earlier[: stop - start, : stop - start]
    return {
        "input_ids": input_ids,
        "position_ids": _padded([tree.position_ids for tree in trees], model),
        "attention_mask": attention_mask_of(is_seen, model),
    }


def _padded(rows: list[list[int]], model: LanguageModel) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(device_of(model))  # (B, L)


# One row without padding, and attention along its branches


def reads_trees(model: LanguageModel) -> bool:
    """
    Whether a model reads a tree in one row with [`attention_along_branches`], and gives each text the hidden states
    that it has alone.

    Only on a CPU: there, a call of the attention for each branch costs less than masked pairs of tokens. The answer is
    cached.
    """
    return reads_like_alone(model, _states_in_tree, attention=["sdpa"])


def _states_in_tree(base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Hidden states (2, L, H) of two texts that are padded on the right, read as a tree."""
    if input_ids.device.type != "cpu" or base.config.get_text_config() is not base.config:
        raise ValueError(f"Trees are for text models on a CPU. Got {type(base).__name__} on {input_ids.device}.")
    texts = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    tree = token_tree([texts[index] for index in order])
    with attention_along_branches(base):
        (states,) = backbone_of(base)(**tree_row(tree, base), use_cache=False).last_hidden_state
    paths = dict(zip(order, tree.paths, strict=True))
    return pad_sequence([states[paths[index]] for index in range(len(texts))], batch_first=True)


def tree_row(tree: TokenTree, model: LanguageModel) -> dict[str, Any]:
    """Inputs of a forward pass over one tree, within [`attention_along_branches`]."""
    device = device_of(model)
    return {
        "input_ids": torch.tensor([tree.input_ids], device=device),
        "position_ids": torch.tensor([tree.position_ids], device=device),
        "token_tree": tree,
    }


@contextmanager
def attention_along_branches(model: LanguageModel) -> Iterator[None]:
    """Within the context the model, whose attention is "sdpa", reads the inputs of [`tree_row`]."""
    base = unwrap_peft(model)
    base.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    token_tree: TokenTree,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention of one row, of which each token attends to the tokens before it in its text.

    Queries are (1, heads, M, D), keys and values may have fewer heads. A call of the attention has at most [`BLOCK`]
    queries, so that few of its pairs of tokens are masked.
    """
    if attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(
            f"Attention along branches needs plain attention. Got a mask, a softcap or a position bias in "
            f"{type(module).__name__}; read each text alone."
        )
    outputs = []
    for queries, seen, mask in token_tree.blocks:
        keys, values = ([x[:, :, places] for places in seen] for x in (key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, queries],
                torch.cat(keys, dim=2) if len(keys) > 1 else keys[0],
                torch.cat(values, dim=2) if len(values) > 1 else values[0],
                attn_mask=mask.to(query.dtype),
                scale=scaling,
                enable_gqa=key.size(1) != query.size(1),
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
