# SPDX-License-Identifier: Apache-2.0

"""
Static KV caches: tensors of fixed shape, with which a compiled forward pass decodes token after token.

Shapes: B rows, L tokens so far (padding included), C columns read at once, N columns of the cache.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_masks_for_generate

from ..common.language_model import LanguageModel, unwrap_peft


MIN_COLUMNS = 256  # of a cache; a longer text needs a larger power of two, and another compilation


class InPlaceCache(StaticCache):
    """
    A static cache that is cropped and reordered in place, so that the addresses in CUDA graphs stay valid.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Config of a model whose layers all keep the keys of all tokens.
        num_tokens (`int`):
            Tokens that must fit. The number of columns is a power of two, at least 256.
    """

    def __init__(self, config: PreTrainedConfig, num_tokens: int):
        super().__init__(config=config, max_cache_len=max(MIN_COLUMNS, 1 << (num_tokens - 1).bit_length()))

    def can_hold(self, num_rows: int, num_tokens: int) -> bool:
        """Whether the cache has the right number of rows and enough columns for another text."""
        states = self._states()
        return bool(states) and len(states[0]) == num_rows and self.get_max_length() >= num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns. The mask hides them until they are written again."""
        for layer in self.layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row i by row `beam_idx[i]`. Another number of rows needs new tensors."""
        states = self._states()
        if states and len(beam_idx) != len(states[0]):
            return super().reorder_cache(beam_idx)
        for one in states:
            one.copy_(one.index_select(0, beam_idx.to(one.device)))

    def _states(self) -> list[torch.Tensor]:
        """The keys and values of all layers that have some."""
        layers = [layer for layer in self.layers if isinstance(layer, StaticLayer)]
        return [states for layer in layers for states in (layer.keys, layer.values) if states is not None]


def static_inputs(
    model: LanguageModel, cache: StaticCache, inputs: Mapping[str, torch.Tensor], mask: torch.Tensor
) -> dict[str, Any]:
    """
    Inputs of a forward pass with the strides and masks that a compiled one expects at every step.

    As in `generate`, the masks are made outside of the compiled region. Slices of a longer tensor are copied, because
    the model would be compiled again for another stride.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        cache ([`~transformers.StaticCache`]):
            Its cache, of N columns.
        inputs (mapping from `str` to `torch.Tensor`):
            `input_ids` and, if the model takes them, `position_ids` of shape `(B, C)`.
        mask (`torch.Tensor` of shape `(B, L)`):
            Mask of the whole text.

    Returns:
        `dict`: the inputs, and an `attention_mask` of shape `(B, 1, C, N)`, or one for each type of layer.
    """
    base, ids = unwrap_peft(model), inputs["input_ids"]
    make = getattr(base, "create_masks_for_generate", create_masks_for_generate)
    masks = make(
        config=base.config,
        inputs_embeds=torch.empty((*ids.shape, 0), dtype=base.dtype, device=ids.device),
        attention_mask=mask,
        past_key_values=cache,
        position_ids=inputs.get("position_ids"),
    )
    by_type = masks if isinstance(masks, dict) else {"": masks}
    by_type = {name: None if x is None else x.contiguous() for name, x in by_type.items()}
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    return copies | {"attention_mask": by_type if isinstance(masks, dict) else by_type[""]}


def compiled(model: LanguageModel, compile_config: CompileConfig | None) -> Callable:
    """Return the compiled forward pass of a model, which transformers keeps on the model."""
    return unwrap_peft(model).get_compiled_call(compile_config)
