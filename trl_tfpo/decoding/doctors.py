# SPDX-License-Identifier: Apache-2.0

"""
Doctors, their next-token logits and their KV caches.

Shapes: B rows, L tokens so far (padding included), V vocabulary.
"""

import math
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import Cache, CompileConfig, DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..common._upstream import active_adapters, adapter_layers, using_adapters
from ..common.language_model import LanguageModel, keeps_all_keys, unwrap_peft
from ..models.adapters import check_adapters
from ..models.trained_exponents import trained_exponents
from .padding import PADDING, check_left_padded
from .reading import accepted_inputs, next_inputs, reading_fault
from .static_cache import InPlaceCache, compiled, static_inputs


NO_ADAPTER = "__base__"  # PEFT's name for the base model
KEY_VALUE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # caches that hold only keys and values
NUM_RECENT = 32  # prefixes whose logits are kept, because assisted decoding returns to them

# Reading modes. Each is tested on a short text before its first use
WITH_POSITIONS = "with positions"
TOKEN_BY_TOKEN = "token by token"  # nosec B105
IN_PIECES = "in pieces"
CROPPED = "cropped"
WITH_PADDING = "with padding"


@dataclass(frozen=True, eq=False)
class Doctor:
    """
    A model that guides the patient, with its adapter and prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model with the patient's tokenizer, in eval mode. It may be the patient itself.
        adapter (`str`, *optional*):
            Name of the PEFT adapter of the doctor, or `"__base__"` for the base model. The default is the adapter that
            is active when the `Doctor` is made. The adapter is active only during the forward pass of the doctor, so
            it may be an adapter on the patient, see [`guided_generate`].
        prompt (mapping of `torch.Tensor`, *optional*):
            Prompts for the doctor, one for each prompt of the patient: left-padded `input_ids` and `attention_mask` of
            shape `(B, L')`, as returned by a tokenizer. They may have another instruction or chat template. By default
            the doctor reads the prompts of the patient.
        credits (`torch.Tensor` of shape `(V,)`, *optional*):
            Token credits in nats, see [`~trl_tfpo.models.token_credits.load_credits`]. Their sum ranks completions.

    Attributes:
        adapters (`tuple[str]`): names of the adapters that are active in the forward pass of the doctor.
        prompt_tokens (`torch.LongTensor` of shape `(B, L')`, *optional*): ids of `prompt`, with -1 for padding.

    Raises:
        `ValueError`: for a model that is not a causal language model or is in training mode, an unknown adapter, an
            adapter that cannot be switched off (prompt learning, activated LoRA), merged adapters, or a prompt without
            `input_ids`, with a mask of another shape, or with padding that is not on the left.
    """

    model: LanguageModel
    adapter: str | None = None
    prompt: Mapping[str, torch.Tensor] | None = None
    credits: torch.Tensor | None = None
    adapters: tuple[str, ...] = field(init=False)
    prompt_tokens: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_causal_lm(self.model)
        layers = adapter_layers(self.model)
        known = getattr(self.model, "peft_config", {})
        if self.adapter not in (None, NO_ADAPTER, *known):
            raise ValueError(
                f"`adapter` must be an adapter of the model, one of {sorted(known)}. Got {self.adapter!r}; load it "
                "with `model.load_adapter`."
            )
        if any(getattr(layer, "merged_adapters", None) for layer in layers):
            raise ValueError(
                "The adapters of a doctor are switched on and off, so they must not be merged. Got merged adapters; "
                "call `unmerge_adapter()`, or `merge_and_unload()` for a model without adapters."
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
        """`alpha` and `beta` with which a doctor of guided flow was trained. Empty for a language model."""
        return trained_exponents(self.model, self.adapters)

    def is_on(self, model: LanguageModel) -> bool:
        """Whether the doctor shares the weights of a model."""
        return unwrap_peft(self.model) is unwrap_peft(model)

    def with_own_prompt(self, tokens: torch.Tensor, num_prompt_tokens: int) -> torch.Tensor:
        """Replace the prompts in the patient's tokens (B, L) by the prompts of the doctor, if it has any."""
        if self.prompt_tokens is None:
            return tokens
        prompt = self.prompt_tokens.to(tokens.device)
        prompt = prompt.repeat_interleave(len(tokens) // len(prompt), dim=0)
        return torch.cat([prompt, tokens[:, num_prompt_tokens:]], dim=1)


def _prompt_tokens(prompt: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the ids in the output of a tokenizer, with [`PADDING`] in place of padding ids."""
    ids = prompt.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f"`prompt` must contain `input_ids`, a tensor. Got {reprlib.repr(prompt)}; "
            'pass `tokenizer(texts, padding=True, return_tensors="pt")`.'
        )
    mask = prompt.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    check_left_padded(mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"The mask of `prompt` must have the shape of its ids. Got {tuple(mask.shape)} for ids "
            f"{tuple(ids.shape)}; pass both from one call of the tokenizer."
        )
    return ids.masked_fill(~mask.bool(), PADDING)


class DoctorMemory:
    """
    Next-token logits of a doctor, with a KV cache that is addressed by the tokens in it.

    The logits depend only on the tokens and the weights. Each call compares its tokens with the cached tokens:

    - if they continue the cached tokens, only the new tokens are read;
    - if rows were reordered, repeated or dropped, the cache is reordered;
    - if they share only a prefix with the cached tokens, the cache is cropped to it;
    - otherwise the whole text is read.

    A reading mode is used only if the model passes a test of it, [`~trl_tfpo.decoding.reading.reading_fault`]. The
    object that runs such a test has `is_test=True` and uses every mode.
    """

    def __init__(self, doctor: Doctor, is_test: bool = False, is_static: bool = False):
        self.doctor, self.is_test, self.is_static = doctor, is_test, is_static
        self.compile_config: CompileConfig | None = None
        self.disable_compile = is_test
        self.cache: Cache | None = None  # None for models that return no cache
        self.unused_cache: InPlaceCache | None = None  # of an earlier text
        model = doctor.model
        self.accepted = accepted_inputs(model)
        self.max_positions = _num_absolute_positions(model)
        self.num_embeddings: float = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
        self.weights_version: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Free the cache. A static cache is kept for other texts, because CUDA graphs contain its address."""
        if isinstance(self.cache, InPlaceCache):
            self.unused_cache = self.cache
        self.layers = adapter_layers(self.doctor.model)
        self.known_faults: dict[str, str] = {}  # by reading mode
        self.tokens: torch.Tensor | None = None  # (B, n), in the cache
        self.has_padding = False  # whether `tokens` have padding
        self.cache = None
        self.recent: list[torch.Tensor] = []  # logits (B, V) after the longest prefixes of `tokens`

    def use_static_cache(
        self, is_static: bool, compile_config: CompileConfig | None = None, disable_compile: bool = False
    ) -> None:
        """
        Choose between a cache that grows with the text and a cache of fixed shape.

        Args:
            is_static (`bool`):
                Whether the shape is fixed, so that steps of one token can be compiled. Models with a layer that does
                not keep the keys of all tokens use a growing cache, with a warning.
            compile_config ([`~transformers.CompileConfig`], *optional*):
                Settings of the compiler. Without them, steps are compiled on accelerators only.
            disable_compile (`bool`, *optional*, defaults to `False`):
                Whether to disable compilation.
        """
        if is_static and not keeps_all_keys(self.doctor.model):
            warnings.warn(
                f"{type(unwrap_peft(self.doctor.model)).__name__} uses a growing cache and is not compiled, because "
                "not all of its layers keep the keys of all tokens.",
                stacklevel=3,
            )
            is_static = False
        if is_static != self.is_static:
            self.forget()
            self.unused_cache = None
        self.is_static, self.compile_config, self.disable_compile = is_static, compile_config, disable_compile

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, is_next: bool = False) -> torch.Tensor:
        """
        Compute the logits (B, V) of the next token after `tokens` (B, L), whose padding is [`PADDING`].

        With `is_next`, the cached tokens are known to be `tokens[:, :-1]`, and are not compared.

        Raises:
            `ValueError`: when the model is in training mode, has too few positions, or cannot read padded text.
        """
        _check_eval_mode(self.doctor.model)
        num_known = tokens.size(1) - 1
        is_next = is_next and self.tokens is not None and self.tokens.shape == (len(tokens), num_known)
        if not (is_next or (self.tokens is not None and torch.equal(tokens[:, :-1], self.tokens))):
            self._forget_if_trained()
            num_known = self._match_cache(tokens)
            if self.tokens is not None and num_known == tokens.size(1):
                num_after = self.tokens.size(1) - num_known
                if num_after < len(self.recent):
                    return self.recent[-1 - num_after]
                num_known -= 1  # the logits need a forward pass of the last token
            num_known = self._crop(num_known)
        if isinstance(self.cache, InPlaceCache) and tokens.size(1) > self.cache.get_max_length():
            self.forget()
            num_known = 0
        mode = TOKEN_BY_TOKEN if num_known == tokens.size(1) - 1 else IN_PIECES
        if num_known and not self._can_read(mode):
            if mode == TOKEN_BY_TOKEN:
                warnings.warn(
                    f"The doctor {type(unwrap_peft(self.doctor.model)).__name__} reads the whole text for each token, "
                    f"because it cannot continue from its cache: {self._fault(mode)}",
                    stacklevel=2,
                )
            self.forget()
            num_known = 0
        self._check_length(tokens)
        has_padding = self.has_padding if num_known else bool((tokens == PADDING).any())
        if has_padding and not num_known:
            self.check_padding()
        self.tokens = None  # if the forward pass is interrupted, tokens and cache do not match
        logits = self._read(tokens, num_known, has_padding)
        self.tokens, self.has_padding = tokens, has_padding
        if tokens.size(0) > 1 or num_known < tokens.size(1) - 1:
            self.recent = []  # they are for assisted decoding: one row, consecutive prefixes
        self.recent = [*self.recent, logits][-NUM_RECENT:]
        return logits

    def check_padding(self) -> None:
        """Raise `ValueError` when padding on the left changes the logits of the doctor."""
        if not self._can_read(WITH_PADDING):
            raise ValueError(
                "A doctor must give the same logits with and without padding on the left. Got "
                f"{type(unwrap_peft(self.doctor.model)).__name__}: {self._fault(WITH_PADDING)}. Decode prompts one by "
                "one (`batch_size=1`), or prompts of one length together."
            )

    def faults(self) -> dict[str, str]:
        """Test all reading modes. Returns the fault of each mode, an empty string for none."""
        return {mode: self._fault(mode) for mode in _READING_TESTS}

    def _can_read(self, mode: str) -> bool:
        if not self.is_test and mode not in self.known_faults:
            self.known_faults[mode] = self._fault(mode)
        return not self.known_faults.get(mode)

    def _fault(self, mode: str) -> str:
        memory = DoctorMemory(self.doctor, is_test=True, is_static=self.is_static)
        if mode != WITH_POSITIONS and self._fault(WITH_POSITIONS):
            memory.accepted = memory.accepted - {"position_ids"}
        read = partial(_READING_TESTS[mode], memory)
        name = f"doctor, {mode}, static" if self.is_static else f"doctor, {mode}"
        return reading_fault(self.doctor.model, name, read, forward=self.doctor)

    def _match_cache(self, tokens: torch.Tensor) -> int:
        """Count the leading columns of `tokens` in the cache. Reorders the cache if that increases the count."""
        if self.tokens is None:
            return 0
        num_cached, num_known = self.tokens.size(1), 0
        if tokens.size(0) == self.tokens.size(0):
            num_shared = min(num_cached, tokens.size(1))
            same = (tokens[:, :num_shared] == self.tokens[:, :num_shared]).all(dim=0)
            num_known = int(same.int().cumprod(dim=0).sum())
        if num_known < num_cached < tokens.size(1):
            row = torch.cat([self.tokens, tokens[:, :num_cached]]).unique(dim=0, return_inverse=True)[1]
            is_same = row[len(self.tokens) :, None] == row[: len(self.tokens)]  # (B, rows in the cache)
            if is_same.any(dim=1).all():
                source = is_same.int().argmax(dim=1)
                if self.cache is not None:
                    self.cache.reorder_cache(source)
                self.tokens, self.recent, num_known = self.tokens[source], [], num_cached
        return num_known

    def _crop(self, num_known: int) -> int:
        """Crop the cache to `num_known` columns, or clear it. Returns the number of columns left."""
        num_extra = 0 if self.tokens is None else self.tokens.size(1) - num_known
        if num_extra == 0:
            return num_known
        layers = getattr(self.cache, "layers", [None])
        is_croppable = num_known > 0 and all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
        if self.cache is None or not is_croppable or not self._can_read(CROPPED):
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
            is_sliding = getattr(config, "sliding_window", None) is not None
            if self.is_static:
                cache = self._empty_static_cache(*tokens.shape)
            elif is_sliding and all(type(layer) in KEY_VALUE_LAYERS for layer in DynamicCache(config=config).layers):
                cache = DynamicCache()  # without a config it keeps states outside the window, so it can be cropped
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
        read: Callable = model
        if isinstance(cache, InPlaceCache):
            inputs = static_inputs(model, cache, inputs, torch.ones_like(tokens) if mask is None else mask.long())
            if num_known and tokens.size(1) - num_known == 1 and self._is_compiled():
                read = compiled(model, self.compile_config)
        with using_adapters(self.layers, self.doctor.adapters):
            output = read(**inputs, **settings)
        if getattr(output, "past_key_values", None) is not None:
            self.cache = output.past_key_values
        logits = output.logits[:, -1]
        return logits if read is model else logits.clone()  # the next replay of a CUDA graph overwrites its outputs

    def _empty_static_cache(self, num_rows: int, num_tokens: int) -> InPlaceCache:
        cache, self.unused_cache = self.unused_cache, None
        if cache is None or not cache.can_hold(num_rows, num_tokens):
            return InPlaceCache(self.doctor.model.config, num_tokens)
        cache.reset()
        return cache

    def _is_compiled(self) -> bool:
        """Whether steps of one token are compiled: on accelerators, and on a CPU if there is a `compile_config`."""
        return not self.disable_compile and (self.compile_config is not None or self.doctor.device.type != "cpu")

    def _forget_if_trained(self) -> None:
        """Free the cache if the weights have changed since it was filled."""
        version = self._weights_version()
        if self.tokens is None or self.weights_version is None or not torch.equal(version, self.weights_version):
            self.forget()
        self.weights_version = version

    def _weights_version(self) -> torch.Tensor:
        """
        Return a vector that changes when the doctor is trained.

        For each weight it contains the counter of in-place writes, and one value of the weight, because fused
        optimizers do not advance the counter.
        """
        weights = [weight.detach() for weight in self.doctor.model.parameters() if weight.numel()]
        values = [weight.reshape(-1)[weight.numel() // 2].to(self.doctor.device, torch.float64) for weight in weights]
        counters = [0.0 if weight.is_inference() else float(weight._version) for weight in weights]
        return torch.cat([torch.stack(values).cpu(), torch.tensor(counters, dtype=torch.float64)])


# Tests of the reading modes. Each reads parts of a text (16,), and yields logits (B, V) with the index of the last
# token of each row.

_Readings = Iterator[tuple[torch.Tensor, list[int]]]


def _read_prefixes(*lengths: int) -> Callable[[DoctorMemory, torch.Tensor], _Readings]:
    """Return a test that reads prefixes of the text, one after the other."""

    def read(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
        for length in lengths:
            yield memory.logits(text[None, :length]), [length - 1]

    return read


def _read_with_padding(memory: DoctorMemory, text: torch.Tensor) -> _Readings:
    """Read two rows, the second mostly padding, and swap them at the end."""
    padding = text.new_full((10,), PADDING)
    for num_more in range(3):
        rows = [text[: 12 + num_more], torch.cat([padding, text[: 2 + num_more]])]
        ends = [11 + num_more, 1 + num_more]
        if num_more == 2:
            rows, ends = rows[::-1], ends[::-1]
        yield memory.logits(torch.stack(rows)), ends


_READING_TESTS = {
    WITH_POSITIONS: _read_prefixes(16),
    TOKEN_BY_TOKEN: _read_prefixes(6, 7, 8, 9),
    IN_PIECES: _read_prefixes(5, 9, 14),
    CROPPED: _read_prefixes(12, 6, 7),
    WITH_PADDING: _read_with_padding,
}


def check_causal_lm(model: LanguageModel, name: str = "A doctor") -> None:
    """
    Raise `ValueError` unless the model is a causal language model in eval mode, and its adapters can be switched off.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} must be a language model. Got {reprlib.repr(model)}; load one with `load_doctor` or "
            "`DoctorGuidedLogitsProcessor.from_pretrained`."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} must be a causal language model. Got {type(model).__name__}, an encoder-decoder, which cannot "
            "read a prompt and its completion as one text; load another model."
        )
    check_adapters(model, name)
    _check_eval_mode(model, name)


def _check_eval_mode(model: LanguageModel, name: str = "A doctor") -> None:
    if model.training:
        raise ValueError(f"{name} must be in eval mode, because dropout is random. Got training mode; call `.eval()`.")


def _num_absolute_positions(model: LanguageModel) -> float:
    """Number of learned position embeddings; infinity for rotary or relative positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    token_embeddings = set(model.get_input_embeddings().modules())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in token_embeddings]
    return limit if any(table.num_embeddings - limit in (0, 2) for table in tables) else math.inf  # OPT has 2 more


def check_reference(doctor: Doctor, reference: Doctor | None) -> None:
    """Raise `ValueError` when the reference is the doctor itself, or a language model for a doctor of guided flow."""
    if reference is None:
        return
    is_same = reference.is_on(doctor.model) and reference.adapters == doctor.adapters
    if is_same and reference.prompt is doctor.prompt:
        raise ValueError(
            "`reference` must be the doctor before training. Got the doctor itself (an adapter changes its base model "
            "in place), which cancels the guidance; load the reference separately, or for a doctor that is an adapter "
            f"pass `reference=Doctor(model, adapter={NO_ADAPTER!r})`."
        )
    if doctor.exponents and not reference.exponents:
        raise ValueError(
            "`reference` is for doctors that are language models. Got a doctor of guided flow, whose logits are "
            "already the log-ratio to its reference; leave `reference` out."
        )
