# SPDX-License-Identifier: Apache-2.0

"""
Doctors, and a cache of their next-token logits.

Shapes: B rows, L tokens so far (padding included), V vocabulary.
"""

import math
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..common._upstream import active_adapters, adapter_layers, using_adapters
from ..common.language_model import LanguageModel, unwrap_peft
from ..models.adapters import check_adapters
from ..models.trained_exponents import trained_exponents
from .padding import PADDING, check_left_padded
from .reading import accepted_inputs, next_inputs, reading_fault


NO_ADAPTER = "__base__"  # PEFT's name for the base model
NUM_RECENT = 32  # logits kept for the prefixes to which assisted decoding returns

# Ways to read a doctor, each of which is tested on a short text before it is used
WITH_POSITIONS = "with positions"
TOKEN_BY_TOKEN = "token by token"  # nosec B105
IN_PIECES = "in pieces"
CUT_BACK = "cut back"
WITH_PADDING = "with padding"


@dataclass(frozen=True, eq=False)
class Doctor:
    """
    A model that guides the patient, and how it is read. A bare model reads the prompts of the patient.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model with the patient's tokenizer, in eval mode. It may be the patient itself.
        adapter (`str`, *optional*):
            Name of the PEFT adapter of the doctor; `"__base__"` for none. By default the adapter that is active now,
            even if another one is activated later. The adapter is on only while the doctor is read, so it may be an
            adapter on the patient, see [`guided_generate`].
        prompt (mapping of `torch.Tensor`, *optional*):
            Prompts for the doctor, one for each prompt of the patient: left-padded `input_ids` and `attention_mask` of
            shape `(B, L')`, as returned by a tokenizer. Use it for a doctor with another instruction or chat template.
        credits (`torch.Tensor` of shape `(V,)`, *optional*):
            Token credits in nats, see [`~trl_tfpo.models.token_credits.load_credits`]. Their sum ranks completions.

    Attributes:
        adapters (`tuple[str]`): names of the adapters with which the doctor is read.
        prompt_tokens (`torch.LongTensor` of shape `(B, L')`, *optional*): ids of `prompt`, padding hidden.

    Raises:
        `ValueError`: for an encoder-decoder, a model in training mode, an adapter that the model does not have or that
            cannot be switched off (prompt learning, activated LoRA), merged adapters, or a prompt that is not
            left-padded.
    """

    model: LanguageModel
    adapter: str | None = None
    prompt: Mapping[str, torch.Tensor] | None = None
    credits: torch.Tensor | None = None
    adapters: tuple[str, ...] = field(init=False)
    prompt_tokens: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_is_doctor(self.model)
        layers = adapter_layers(self.model)
        known = getattr(self.model, "peft_config", {})
        if self.adapter not in (None, NO_ADAPTER, *known):
            raise ValueError(
                f"`adapter` must be one of the model's. Got {self.adapter!r}, and it has {sorted(known)}; load it "
                "with `model.load_adapter`."
            )
        if any(getattr(layer, "merged_adapters", None) for layer in layers):
            raise ValueError(
                "The adapters of a doctor are switched on and off, so they must not be merged. Got merged ones; call "
                "`unmerge_adapter()`, or make it a model without adapters with `merge_and_unload()`."
            )
        adapters = () if self.adapter == NO_ADAPTER else (self.adapter,) if self.adapter else active_adapters(layers)
        object.__setattr__(self, "adapters", adapters)
        if self.prompt is not None:
            object.__setattr__(self, "prompt_tokens", _prompt_tokens(self.prompt))

    def __call__(self, **inputs: object) -> CausalLMOutputWithPast:
        """Run the model with the adapters of the doctor."""
        with using_adapters(adapter_layers(self.model), self.adapters):
            return self.model(**inputs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def exponents(self) -> dict[str, float]:
        """
        `alpha` and `beta` of the training, see [`~trl_tfpo.models.adapters.trained_exponents`]. Empty for a language
        model.
        """
        return trained_exponents(self.model, self.adapters)

    def is_on(self, model: LanguageModel) -> bool:
        """Whether the doctor shares the weights of a model."""
        return unwrap_peft(self.model) is unwrap_peft(model)

    def own_tokens(self, tokens: torch.Tensor, num_prompt_tokens: int) -> torch.Tensor:
        """Replace the prompt, the first columns of the patient's tokens (B, L), by the prompt of the doctor."""
        if self.prompt_tokens is None:
            return tokens
        prompt = self.prompt_tokens.to(tokens.device)
        prompt = prompt.repeat_interleave(len(tokens) // len(prompt), dim=0)
        return torch.cat([prompt, tokens[:, num_prompt_tokens:]], dim=1)


def _prompt_tokens(prompt: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Ids of a tokenizer's output, with [`PADDING`] in place of padding ids."""
    ids = prompt.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f"`prompt` must have the `input_ids` of a tokenizer, as a tensor. Got {reprlib.repr(prompt)}; "
            'pass `tokenizer(texts, padding=True, return_tensors="pt")`.'
        )
    mask = prompt.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    check_left_padded(mask)
    if mask.shape != ids.shape:
        raise ValueError(
            "The mask of `prompt` must have the shape of its ids. Got "
            f"{tuple(mask.shape)} for ids {tuple(ids.shape)}; pass what the tokenizer returned together."
        )
    return ids.masked_fill(~mask.bool(), PADDING)


class DoctorMemory:
    """
    Next-token logits of a doctor, with a KV cache that is addressed by the tokens in it.

    The logits depend on the tokens and the weights only, never on the cache. Each call compares its tokens with the
    cached tokens. New tokens are read after the cache; reordered, repeated or dropped rows are looked up; after a
    common prefix the cache is cut; otherwise the whole text is read. A way of reading is used only if the model passes
    a test of it on a short text, [`~trl_tfpo.decoding.reading.reading_fault`].

    Args:
        doctor ([`Doctor`]):
            The doctor.
        is_trial (`bool`, *optional*, defaults to `False`):
            Whether this object runs such a test. It then takes every way of reading.
    """

    def __init__(self, doctor: Doctor, is_trial: bool = False):
        self.doctor, self.is_trial = doctor, is_trial
        model = doctor.model
        self.accepted = accepted_inputs(model)
        self.max_positions = _num_absolute_positions(model)
        self.num_embeddings: float = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
        self.weights_version: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Free the cache."""
        self.layers = adapter_layers(self.doctor.model)
        self.known_faults: dict[str, str] = {}  # by way of reading; looked up at every token
        self.tokens: torch.Tensor | None = None  # (B, n), in the cache
        self.has_padding = False  # whether `tokens` have padding
        self.cache: Cache | None = None  # of models that return one
        self.recent: list[torch.Tensor] = []  # logits (B, V) after each of the last prefixes of `tokens`

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        Logits of the next token.

        Args:
            tokens (`torch.LongTensor` of shape `(B, L)`):
                Ids of prompts and completions so far, [`PADDING`] where there is none.

        Returns:
            `torch.Tensor` of shape `(B, V)`.

        Raises:
            `ValueError`: in training mode, when the model has fewer positions than the text has tokens, or cannot read
                the padding.
        """
        _check_mode(self.doctor.model)
        num_known = tokens.size(1) - 1
        if self.tokens is None or not torch.equal(tokens[:, :-1], self.tokens):  # not simply one token more
            self._forget_if_trained()
            num_known = self._look_up(tokens)
            if self.tokens is not None and num_known == tokens.size(1):
                num_after = self.tokens.size(1) - num_known
                if num_after < len(self.recent):
                    return self.recent[-1 - num_after]
                num_known -= 1  # only a forward pass gives logits
            num_known = self._crop(num_known)
        how = TOKEN_BY_TOKEN if num_known == tokens.size(1) - 1 else IN_PIECES
        if num_known and not self._can_read(how):
            if how == TOKEN_BY_TOKEN:
                warnings.warn(
                    f"The doctor {type(unwrap_peft(self.doctor.model)).__name__} reads the whole text for each token, "
                    f"because it cannot continue from its cache: {self._fault(how)}",
                    stacklevel=2,
                )
            self.forget()
            num_known = 0
        self._check_length(tokens)
        has_padding = self.has_padding if num_known else bool((tokens == PADDING).any())
        if has_padding and not num_known:
            self.check_padding()
        self.tokens = None  # an interrupted forward pass must not leave tokens that do not match the cache
        logits = self._read(tokens, num_known, has_padding)
        self.tokens, self.has_padding = tokens, has_padding
        if tokens.size(0) > 1 or num_known < tokens.size(1) - 1:
            self.recent = []  # only speculation needs them, with one row, and there must be no gap
        self.recent = [*self.recent, logits][-NUM_RECENT:]
        return logits

    def check_padding(self) -> None:
        """Raise `ValueError` when padding on the left changes the logits of the doctor."""
        if not self._can_read(WITH_PADDING):
            raise ValueError(
                "A doctor must read prompts that are padded on the left as it reads them alone. Got "
                f"{type(unwrap_peft(self.doctor.model)).__name__}: {self._fault(WITH_PADDING)}. Decode prompts one by "
                "one (`batch_size=1`), or those of one length together."
            )

    def faults(self) -> dict[str, str]:
        """Test every way of reading the doctor. Returns the fault of each, empty where there is none."""
        return {how: self._fault(how) for how in _TRIALS}

    def _can_read(self, how: str) -> bool:
        if not self.is_trial and how not in self.known_faults:
            self.known_faults[how] = self._fault(how)
        return not self.known_faults.get(how)

    def _fault(self, how: str) -> str:
        memory = DoctorMemory(self.doctor, is_trial=True)
        if how != WITH_POSITIONS and self._fault(WITH_POSITIONS):
            memory.accepted = memory.accepted - {"position_ids"}
        return reading_fault(self.doctor.model, f"doctor, {how}", partial(_TRIALS[how], memory), forward=self.doctor)

    def _look_up(self, tokens: torch.Tensor) -> int:
        """Count the leading columns of `tokens` in the cache. Reorders its rows where that makes them more."""
        if self.tokens is None:
            return 0
        num_held, num_known = self.tokens.size(1), 0
        if tokens.size(0) == self.tokens.size(0):
            num_shared = min(num_held, tokens.size(1))
            same = (tokens[:, :num_shared] == self.tokens[:, :num_shared]).all(dim=0)
            num_known = int(same.int().cumprod(dim=0).sum())
        if num_known < num_held < tokens.size(1):
            row = torch.cat([self.tokens, tokens[:, :num_held]]).unique(dim=0, return_inverse=True)[1]
            is_same = row[len(self.tokens) :, None] == row[: len(self.tokens)]  # (B, rows in the cache)
            if is_same.any(dim=1).all():
                source = is_same.int().argmax(dim=1)
                if self.cache is not None:
                    self.cache.reorder_cache(source)
                self.tokens, self.recent, num_known = self.tokens[source], [], num_held
        return num_known

    def _crop(self, num_known: int) -> int:
        """Cut the cache back to `num_known` columns, or empty it where it cannot be cut. Returns how many are left."""
        num_extra = 0 if self.tokens is None else self.tokens.size(1) - num_known
        if num_extra == 0:
            return num_known
        layers = getattr(self.cache, "layers", [None])
        is_croppable = num_known > 0 and all(type(layer) is DynamicLayer for layer in layers)
        if self.cache is None or not is_croppable or not self._can_read(CUT_BACK):
            self.forget()
            return 0
        self.cache.crop(-num_extra)
        self.recent = self.recent[:-num_extra]
        return num_known

    def _check_length(self, tokens: torch.Tensor) -> None:
        if tokens.size(1) > self.max_positions:
            length = (tokens != PADDING).sum(dim=1).max()
            if length > self.max_positions:
                raise ValueError(
                    f"Prompt and completion must fit the positions of the doctor. Got {length} tokens for "
                    f"{self.max_positions} positions; shorten the prompt or lower `max_new_tokens`."
                )

    def _read(self, tokens: torch.Tensor, num_known: int, has_padding: bool) -> torch.Tensor:
        """Run the doctor on the tokens that are not in the cache. Returns logits (B, V)."""
        model, cache = self.doctor.model, self.cache
        if cache is None:
            num_known = 0
            config = model.config.get_text_config()
            if getattr(config, "sliding_window", None) is not None and _has_key_value_cache(config):
                cache = DynamicCache()  # without the config it ignores the window, keeps all states and can be cut
        if not self._can_read(WITH_POSITIONS):  # RoBERTa's positions start after the padding id
            self.accepted = self.accepted - {"position_ids"}
        tokens = tokens.to(model.device)
        mask = tokens != PADDING if has_padding else None
        settings: dict[str, Cache | int] = {"use_cache": True}
        if cache is not None:
            settings["past_key_values"] = cache
        if "logits_to_keep" in self.accepted:
            settings["logits_to_keep"] = 1
        inputs = next_inputs(tokens.clamp(min=0), self.accepted, num_read=num_known, mask=mask)
        with using_adapters(self.layers, self.doctor.adapters):
            output = model(**inputs, **settings)
        if getattr(output, "past_key_values", None) is not None:  # a model without one reads the whole text each time
            self.cache = output.past_key_values
        return output.logits[:, -1]

    def _forget_if_trained(self) -> None:
        """Free the cache if the weights have changed since it was filled."""
        version = self._weights_version()
        if self.tokens is None or self.weights_version is None or not torch.equal(version, self.weights_version):
            self.forget()
        self.weights_version = version

    def _weights_version(self) -> torch.Tensor:
        """
        A vector that changes when the doctor is trained: for each weight the counter of writes in place, and one of
        its values, because fused optimizers do not advance the counter.
        """
        weights = [weight.detach() for weight in self.doctor.model.parameters() if weight.numel()]
        values = [weight.reshape(-1)[weight.numel() // 2].to(self.doctor.device, torch.float64) for weight in weights]
        counters = [0.0 if weight.is_inference() else float(weight._version) for weight in weights]
        return torch.cat([torch.stack(values).cpu(), torch.tensor(counters, dtype=torch.float64)])


def _has_key_value_cache(config: PreTrainedConfig) -> bool:
    """Whether the cache of a model consists of keys and values, with or without a window."""
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    )


# Tests of the ways to read a doctor. Each reads parts of a text (16,), and yields logits (B, V) with the index of the
# token that each row ends in.

_Readings = Iterator[tuple[torch.Tensor, list[int]]]


def _read_with_positions(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
    yield memory.logits(text[None]), [len(text) - 1]


def _read_token_by_token(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
    for length in range(6, 10):
        yield memory.logits(text[None, :length]), [length - 1]


def _read_in_pieces(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
    for length in (5, 9, 14):
        yield memory.logits(text[None, :length]), [length - 1]


def _read_cut_back(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
    for length in (12, 6, 7):
        yield memory.logits(text[None, :length]), [length - 1]


def _read_with_padding(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
    """Read two rows, one of them mostly padding, and swap them at the end."""
    padding = text.new_full((10,), PADDING)
    for num_more in range(3):
        rows = [text[: 12 + num_more], torch.cat([padding, text[: 2 + num_more]])]
        ends = [11 + num_more, 1 + num_more]
        if num_more == 2:
            rows, ends = rows[::-1], ends[::-1]
        yield memory.logits(torch.stack(rows)), ends


_TRIALS = {
    WITH_POSITIONS: _read_with_positions,
    TOKEN_BY_TOKEN: _read_token_by_token,
    IN_PIECES: _read_in_pieces,
    CUT_BACK: _read_cut_back,
    WITH_PADDING: _read_with_padding,
}


def check_is_doctor(model: LanguageModel) -> None:
    """Raise `ValueError` unless the model is a causal language model in eval mode, with adapters that can be off."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"A doctor must be a language model. Got {reprlib.repr(model)}; load one with `load_doctor`, or pass its "
            "name to `DoctorGuidedLogitsProcessor.from_pretrained`."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"A doctor must be a causal language model. Got {type(model).__name__}, an encoder-decoder, which cannot "
            "read a prompt and its completion as one text."
        )
    check_adapters(model)
    _check_mode(model)


def _check_mode(model: LanguageModel) -> None:
    if model.training:
        raise ValueError(
            "A doctor must be in eval mode, because dropout is random. Got training mode; call `.eval()`."
        )


def _num_absolute_positions(model: LanguageModel) -> float:
    """Size of the table of learned positions; infinity where positions are rotary or relative."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    of_tokens = set(model.get_input_embeddings().modules())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in of_tokens]
    return limit if any(table.num_embeddings - limit in (0, 2) for table in tables) else math.inf  # OPT has 2 more


def check_reference(doctor: Doctor, reference: Doctor | None) -> None:
    """Raise `ValueError` when the reference is the doctor itself, or the doctor is one of guided flow."""
    if reference is None:
        return
    is_the_doctor = (
        reference.is_on(doctor.model) and reference.prompt is doctor.prompt and reference.adapters == doctor.adapters
    )
    if is_the_doctor:
        raise ValueError(
            "`reference` must be the doctor before training. Got the module of the doctor itself (an adapter changes "
            "its base model in place), which undoes the guidance; load the reference separately, or for a doctor that "
            f"is an adapter pass `reference=Doctor(model, adapter={NO_ADAPTER!r})`."
        )
    if doctor.exponents and not reference.exponents:
        raise ValueError(
            "`reference` is for a doctor that is a language model. Got one for a doctor of guided flow, whose logits "
            "are the log-ratio to its reference already; leave it out."
        )
