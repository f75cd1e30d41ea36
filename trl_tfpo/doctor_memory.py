# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
What doctors say next, remembered: KV caches addressed by the tokens they hold.

Shapes: B rows, L tokens so far (padding included), V vocabulary.
"""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache, DynamicLayer, PreTrainedModel

from ._compat import unwrap_peft


PADDING = -1  # stands for a padding token in `tokens`, whatever id pads the batch


class DoctorMemory:
    """
    Next-token logits of doctors: a pure function of tokens and weights, with a memory.

    Every call compares its tokens with those that the KV caches hold. Rows with new tokens are read on from there;
    rows permuted, repeated or dropped are looked up; beyond a common prefix the caches are cut; else all is read anew.
    """

    num_recent = 32  # logits kept, for the prefixes that assisted decoding comes back to

    def __init__(self, models: Sequence[PreTrainedModel]):
        self.models = models
        self.accepted = [
            {
                *inspect.signature(model.forward).parameters,
                *inspect.signature(type(unwrap_peft(model)).forward).parameters,
            }
            for model in models
        ]
        self.max_positions = min(map(_num_absolute_positions, models))
        self.num_embeddings = min(getattr(m.get_input_embeddings(), "num_embeddings", math.inf) for m in models)
        self.forget()

    def forget(self) -> None:
        self.tokens = None  # (B, n), what the caches hold
        self.caches = {}  # of the models that have one, by their index
        self.recent = []  # for each of the last prefixes of `tokens`, the logits (B, V) of the models
        self.weights = [w for model in self.models for w in model.parameters() if not w.is_inference()]

    @torch.no_grad()
    def logits(self, tokens: torch.LongTensor) -> list[torch.Tensor]:
        """Logits (B, V) of every model after `tokens` (B, L)."""
        self._check_readable(tokens)
        if self.tokens is None or self._weights_version() != self.weights_version:
            self.forget()
        num_known = self._look_up(tokens)
        if num_known == tokens.size(1):
            num_after = self.tokens.size(1) - num_known
            if num_after < len(self.recent):
                return self.recent[-1 - num_after]
            num_known -= 1  # logits come from reading at least one token
        num_known = self._crop(num_known)
        self.tokens = None  # until all have read on, lest an interrupted call leave a half-true memory
        logits = [self._read(index, tokens, num_known) for index in range(len(self.models))]
        self.tokens, self.weights_version = tokens, self._weights_version()
        if tokens.size(0) > 1 or num_known < tokens.size(1) - 1:
            self.recent = []  # only one text is decoded speculatively; logits between are not known
        self.recent = [*self.recent, logits][-self.num_recent :]
        return logits

    def _look_up(self, tokens: torch.LongTensor) -> int:
        """How many leading columns of `tokens` the caches hold, with their rows reordered if that helps."""
        if self.tokens is None:
            return 0
        num_held, num_known = self.tokens.size(1), 0
        if tokens.size(0) == self.tokens.size(0):
            num_shared = min(num_held, tokens.size(1))
            same = (tokens[:, :num_shared] == self.tokens[:, :num_shared]).all(dim=0)
            num_known = int(same.int().cumprod(dim=0).sum())
        if num_known < num_held < tokens.size(1):
            row = torch.cat([self.tokens, tokens[:, :num_held]]).unique(dim=0, return_inverse=True)[1]
            is_same = row[len(self.tokens) :, None] == row[: len(self.tokens)]  # (B, rows held)
            if is_same.any(dim=1).all():
                source = is_same.int().argmax(dim=1)
                for cache in self.caches.values():
                    cache.reorder_cache(source)
                self.tokens, self.recent, num_known = self.tokens[source], [], num_held
        return num_known

    def _crop(self, num_known: int) -> int:
        """Cut the caches back to so many columns, or to none where a cache cannot be cut; returns how many."""
        num_extra = 0 if self.tokens is None else self.tokens.size(1) - num_known
        if num_extra == 0:
            return num_known
        layers = [layer for cache in self.caches.values() for layer in getattr(cache, "layers", [None])]
        if num_known == 0 or any(type(layer) is not DynamicLayer for layer in layers):
            self.forget()
            return 0
        for cache in self.caches.values():
            cache.crop(-num_extra)
        self.recent = self.recent[:-num_extra]
        return num_known

    def _check_readable(self, tokens: torch.LongTensor) -> None:
        for model in self.models:
            check_is_doctor(model)
        if tokens.size(1) > self.max_positions:
            length = (tokens != PADDING).sum(dim=1).max()
            if length > self.max_positions:
                raise ValueError(
                    f"Prompt and completion must fit the positions of the doctor. Got {length} tokens for "
                    f"{self.max_positions} positions; shorten the prompt or lower `max_new_tokens`."
                )
        if (largest := tokens.max()) >= self.num_embeddings:
            raise ValueError(
                f"The doctor must know every token. Got id {largest}, and it knows {self.num_embeddings}; take a "
                "doctor with the patient's tokenizer, and a `pad_token_id` that both know."
            )

    def _read(self, index: int, tokens: torch.LongTensor, num_known: int) -> torch.Tensor:
        """Logits (B, V) of one model, which reads the tokens that its cache does not hold."""
        model, cache = self.models[index], self.caches.get(index)
        if cache is None:
            num_known = 0
            if getattr(model.config.get_text_config(), "sliding_window", None) is not None:
                cache = DynamicCache()  # told of no window, it keeps all states and can be cut anywhere
        tokens = tokens.to(model.device)
        mask = tokens != PADDING
        inputs = {"input_ids": tokens[:, num_known:].clamp(min=0), "use_cache": True}
        if cache is not None:
            inputs["past_key_values"] = cache
        if not mask.all():
            inputs["attention_mask"] = mask.long()
            if "position_ids" in self.accepted[index]:
                inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, num_known:]
        if "logits_to_keep" in self.accepted[index]:
            inputs["logits_to_keep"] = 1
        output = model(**inputs)
        if getattr(output, "past_key_values", None) is not None:  # else the model reads all again next time
            self.caches[index] = output.past_key_values
        return output.logits[:, -1]

    def _weights_version(self) -> int:
        """Changes whenever a weight is written in place."""
        return sum(weight._version for weight in self.weights)


def check_is_doctor(model: PreTrainedModel) -> None:
    """Raise `ValueError` unless the model is a causal language model in eval mode."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"A doctor must be a causal language model. Got {type(model).__name__}, an encoder-decoder, which cannot "
            "read a prompt and its completion as one text."
        )
    if model.training:
        raise ValueError("A doctor must be in eval mode, as dropout is random. Got training mode; call `.eval()`.")


def _num_absolute_positions(model: PreTrainedModel) -> float:
    """Size of the table of learned positions; infinity where positions are rotary or relative."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    return limit if any(table.num_embeddings - limit in (0, 2) for table in tables) else math.inf  # OPT has 2 more
