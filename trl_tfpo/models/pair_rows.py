# SPDX-License-Identifier: Apache-2.0

"""
Two texts in one row, so that a model reads their common beginning once.

Shapes: P pairs, 2P texts (all first texts, then all second ones), L tokens of a text, M tokens of a row. A row is

    beginning | rest of the first text | rest of the second text | padding

Each rest attends to the beginning and to itself. Its positions continue those of the beginning.
"""

import inspect
import logging
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..common.language_model import (
    LanguageModel,
    backbone_of,
    device_of,
    inference,
    is_sharded,
    keeps_all_keys,
    unwrap_peft,
)


logger = logging.getLogger(__name__)

WORTHWHILE = 0.9  # maximum number of tokens in the rows, relative to the texts, padding included
TOLERANCE = 1e-3  # maximum difference of hidden states in float32, relative to their root mean square
HALF_TOLERANCE = 0.1  # the same in half precision
COMMON, PADDING = 0, -1  # branches of tokens; the texts of a row are branches 1 and 2
MASKED = ("sdpa", "eager")  # attention that takes a mask for each pair of tokens
Read: TypeAlias = Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], torch.Tensor]
_READS: WeakKeyDictionary[PreTrainedModel, dict[tuple, bool]] = WeakKeyDictionary()


class PairRows(NamedTuple):
    """
    Texts in rows of pairs.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            `input_ids` and `position_ids` of shape `(P, M)`, `attention_mask` of shape `(P, 1, M, M)`.
        places (`torch.LongTensor` of shape `(2P, L)`):
            The place of each token in its row. 0 for padding.
    """

    inputs: dict[str, torch.Tensor]
    places: torch.Tensor

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states (2P, L, H) of the texts, given those of the rows (P, M, H)."""
        places = self.places.to(states.device)
        num_pairs = len(states)
        row = torch.arange(2 * num_pairs, device=states.device)[:, None] % num_pairs
        return states[row, places]


def worthwhile_pair_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, model: LanguageModel
) -> PairRows | None:
    """
    Put the texts of each pair in one row, if the model reads such rows and they save a tenth of the tokens.

    The arguments are those of [`pair_rows`], but the number of texts may be odd.
    """
    if len(input_ids) % 2 or not reads_pairs(model):
        return None
    rows = pair_rows(input_ids, attention_mask, model)
    return rows if rows.inputs["input_ids"].numel() <= WORTHWHILE * input_ids.numel() else None


def pair_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, model: LanguageModel) -> PairRows:
    """
    Put the texts of each pair in one row.

    Args:
        input_ids (`torch.LongTensor` of shape `(2P, L)`):
            Texts, padded on the right. Text i and text P + i are a pair.
        attention_mask (`torch.Tensor` of shape `(2P, L)`):
            Which tokens are real.
        model ([`~transformers.PreTrainedModel`]):
            The model that reads the rows. It decides the type of the mask.

    Returns:
        [`PairRows`]
    """
    is_token = attention_mask.bool()
    (first, second), lengths = input_ids.chunk(2), is_token.sum(dim=1)
    first_length, second_length = lengths[:, None].chunk(2)  # (P, 1) each
    is_common = (first == second) & torch.stack(is_token.chunk(2)).all(dim=0)
    num_common = is_common.int().cumprod(dim=1).sum(dim=1, keepdim=True)  # (P, 1)
    row_length = first_length + second_length - num_common
    place = torch.arange(int(row_length.max()), device=input_ids.device)[None]  # (1, M)
    is_second = place >= first_length  # (P, M)
    position = torch.where(is_second, place - first_length + num_common, place)
    source = position.clamp(max=input_ids.size(1) - 1)
    ids = torch.where(is_second, second.gather(1, source), first.gather(1, source))
    is_real = place < row_length

    branch = torch.where(is_second, 2, torch.where(place >= num_common, 1, COMMON)).masked_fill(~is_real, PADDING)
    is_seen = (branch[:, None] == COMMON) | (branch[:, None] == branch[:, :, None])  # (P, M, M)
    is_seen &= torch.ones(is_seen.shape[1:], dtype=torch.bool, device=branch.device).tril()

    column = torch.arange(input_ids.size(1), device=input_ids.device)[None]
    after_first = torch.where(column < num_common, column, column - num_common + first_length)
    places = torch.cat([column.expand_as(first), after_first]).masked_fill(~is_token, 0)
    ids, position = ids.masked_fill(~is_real, 0), position.masked_fill(~is_real, 0)
    inputs = {"input_ids": ids, "position_ids": position, "attention_mask": attention_mask_of(is_seen, model)}
    return PairRows(inputs, places)


def attention_mask_of(is_seen: torch.Tensor, model: LanguageModel) -> torch.Tensor:
    """
    Attention mask in the form that a model takes.

    Args:
        is_seen (`torch.BoolTensor` of shape `(B, M, M)`):
            Whether a token, in the rows of the matrix, attends to another, in its columns.
        model ([`~transformers.PreTrainedModel`]):
            The model. Its attention is "sdpa" or "eager".

    Returns:
        `torch.Tensor` of shape `(B, 1, M, M)`: boolean for the attention "sdpa", otherwise added to the attention
        scores, in the dtype of the model.
    """
    mask = is_seen[:, None]
    if unwrap_peft(model).config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)


def reads_pairs(model: LanguageModel) -> bool:
    """
    Whether a model gives the texts of a row the hidden states that each text has alone.

    Attention must take a mask for each pair of tokens. See [`reads_like_alone`] for further conditions.
    """
    return reads_like_alone(model, _states_in_pair, attention=MASKED)


def reads_like_alone(model: LanguageModel, read: Read, *, attention: Collection[str]) -> bool:
    """
    Whether `read` gives two texts the hidden states that each text has alone.

    Every layer must attend to all earlier tokens. Two short texts are read in both ways, and their hidden states are
    compared. The answer is cached. It is False for sharded models, because all processes would have to run them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        read (`Callable`):
            Function of the model without its `PeftModel` wrapper, and of the `input_ids` (2, L) and `attention_mask`
            (2, L) of two texts that are padded on the right. It returns hidden states of shape (2, L, H).
        attention (collection of `str`):
            Implementations of attention that `read` supports. With others the answer is False.
    """
    if is_sharded(model):  # first, because DeepSpeed's engine has another `config`
        return False
    base = unwrap_peft(model)
    if base.config._attn_implementation not in attention:
        return False
    found = _READS.setdefault(base, {})
    way = (read, base.config._attn_implementation, base.dtype)
    if way not in found:
        try:
            found[way] = _gives_states_alone(base, read)
        except Exception as error:  # models raise errors of any type on unsupported inputs
            logger.info("%s does not support %s: %r", type(base).__name__, read.__name__, error)
            found[way] = False
    return found[way]


def _gives_states_alone(base: PreTrainedModel, read: Read) -> bool:
    backbone = backbone_of(base)
    if not keeps_all_keys(base) or "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        return False
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 4]], device=device_of(base))
    ids = ids % base.config.get_text_config().vocab_size
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6], device=ids.device)
    with inference(base):
        apart = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        together = read(base, ids, mask)
    apart, together = (states.float()[mask.bool()] for states in (apart, together))
    tolerance = HALF_TOLERANCE if base.dtype.itemsize < 4 else TOLERANCE
    return bool((together - apart).abs().max() < tolerance * apart.square().mean().sqrt())


def _states_in_pair(base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    rows = pair_rows(input_ids, attention_mask, base)
    return rows.unpack(backbone_of(base)(**rows.inputs, use_cache=False).last_hidden_state)
