# SPDX-License-Identifier: Apache-2.0

"""
A doctor, and what it says next, remembered: a KV cache addressed by the tokens it holds.

Shapes: B rows, L tokens so far (padding included), V vocabulary.
"""

import math
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import DynamicCache, DynamicLayer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..common._upstream import active_adapters, adapter_layers, unwrap_peft, using_adapters
from ..models.adapters import check_adapters, trained_exponents
from .reading import accepted_inputs, next_inputs, reading_fault


WITH_POSITIONS = "with positions"
PADDING = -1  # stands for a padding token in `tokens`, whatever id pads the batch
NO_ADAPTER = "__base__"  # PEFT's name for the base model


@dataclass(frozen=True, eq=False)
class Doctor:
    """
    A model that guides, and how it is read. A bare model is read as it is, on the prompts of the patient.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model with the patient's tokenizer, in eval mode. May be the patient itself.
        adapter (`str`, *optional*):
            Name of the PEFT adapter to read it with, `"__base__"` for none. By default what is active now, also if
            another is later. It is switched on for the doctor alone, so it may sit on the patient's own weights, see
            [`guided_generate`].
        prompt (mapping of `torch.Tensor`, *optional*):
            Prompts of its own, one for each of the patient's: left-padded `input_ids` and `attention_mask` of shape
            `(B, L')`, as a tokenizer gives them. For a doctor that follows another instruction, or another template.
        credits (`torch.Tensor` of shape `(V,)`, *optional*):
            What each token is worth to it, in nats, see [`~trl_tfpo.models.token_credits.load_credits`]: completions are ranked by
            their sum.

    Attributes:
        adapters (`tuple[str]`): names of the adapters that it is read with.

    Raises:
        `ValueError`: for an encoder-decoder, a model in training mode, an adapter that the model does not have or that
            cannot be switched off (prompt learning, activated LoRA), adapters merged into its weights, a prompt that is
            not left-padded.
    """

    model: PreTrainedModel
    adapter: str | None = None
    prompt: Mapping[str, torch.Tensor] | None = None
    credits: torch.Tensor | None = None

    def __post_init__(self):
        check_is_doctor(self.model)
        layers = adapter_layers(self.model)
        known = getattr(self.model, "peft_config", {})
        if self.adapter not in (None, NO_ADAPTER, *known):
            raise ValueError(
                f"`adapter` must be one of the model's. Got {self.adapter!r}, and it has {sorted(known)}; load it with "
                "`model.load_adapter`."
            )
        if any(getattr(layer, "merged_adapters", None) for layer in layers):
            raise ValueError(
                "A doctor's adapters are switched on and off, so they must not be merged. Got merged ones; call "
                "`unmerge_adapter()`, or make it a model without adapters by `merge_and_unload()`."
            )
        by_name = {None: active_adapters(layers), NO_ADAPTER: ()}
        object.__setattr__(self, "adapters", by_name.get(self.adapter, (self.adapter,)))
        if self.prompt is not None:
            ids = self.prompt.get("input_ids")
            if not isinstance(ids, torch.Tensor):
                raise ValueError(
                    f"`prompt` must have the `input_ids` of a tokenizer, as a tensor. Got {reprlib.repr(self.prompt)}; "
                    'pass `tokenizer(texts, padding=True, return_tensors="pt")`.'
                )
            mask = self.prompt.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            check_left_padded(mask)
            if mask.shape != ids.shape:
                raise ValueError(
                    "`prompt` must have a mask of the shape of its ids. Got "
                    f"{tuple(mask.shape)} for ids {tuple(ids.shape)}; pass what the tokenizer returned together."
                )
            object.__setattr__(self, "prompt_tokens", ids.masked_fill(~mask.bool(), PADDING))

    def __call__(self, **inputs):
        """What the model returns, read with its adapters."""
        with using_adapters(adapter_layers(self.model), self.adapters):
            return self.model(**inputs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def exponents(self) -> dict[str, float]:
        """`alpha` and `beta` of its training, see [`~trl_tfpo.models.adapters.trained_exponents`]; empty for a language model."""
        return trained_exponents(self.model, self.adapters)

    def is_on(self, model: PreTrainedModel) -> bool:
        """Whether it shares the weights of a model."""
        return unwrap_peft(self.model) is unwrap_peft(model)

    def own_tokens(self, tokens: torch.LongTensor, num_prompt_tokens: int) -> torch.LongTensor:
        """What this doctor reads where the patient reads `tokens` (B, L), the first of them the prompt."""
        if self.prompt is None:
            return tokens
        prompt = self.prompt_tokens.to(tokens.device)
        prompt = prompt.repeat_interleave(len(tokens) // len(prompt), dim=0)
        return torch.cat([prompt, tokens[:, num_prompt_tokens:]], dim=1)


class DoctorMemory:
    """
    Next-token logits of a doctor: a pure function of tokens and weights, with a memory.

    Every call compares its tokens with those that the KV cache holds. Rows with new tokens are read on from there;
    rows permuted, repeated or dropped are looked up; beyond a common prefix the cache is cut; else all is read anew.
    What of this a model allows is tried out on a short text, [`~trl_tfpo.decoding.reading.reading_fault`].

    Args:
        doctor ([`Doctor`]):
            The doctor.
        is_trial (`bool`, *optional*, defaults to `False`):
            Whether this is the memory that is tried out.
    """

    num_recent = 32  # logits kept, for the prefixes that assisted decoding comes back to

    def __init__(self, doctor: Doctor, is_trial: bool = False):
        self.doctor, self.is_trial = doctor, is_trial
        model = doctor.model
        self.accepted = accepted_inputs(model)
        self.max_positions = _num_absolute_positions(model)
        self.num_embeddings = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
        self.weights_version = None
        self.forget()

    def forget(self) -> None:
        self.layers = adapter_layers(self.doctor.model)
        self.known_faults = {}  # by way of reading, as it is asked at every token
        self.tokens = None  # (B, n), what the cache holds
        self.cache = None  # of a model that has one
        self.recent = []  # for each of the last prefixes of `tokens`, the logits (B, V)

    @torch.no_grad()
    def logits(self, tokens: torch.LongTensor) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B, L)."""
        _check_mode(self.doctor.model)
        num_known = tokens.size(1) - 1
        if self.tokens is None or not torch.equal(tokens[:, :-1], self.tokens):  # else the plain step, one token more
            weights_version = self._weights_version()
            if self.tokens is None or not torch.equal(weights_version, self.weights_version):
                self.forget()
            self.weights_version = weights_version
            num_known = self._look_up(tokens)
            if num_known == tokens.size(1):
                num_after = self.tokens.size(1) - num_known
                if num_after < len(self.recent):
                    return self.recent[-1 - num_after]
                num_known -= 1  # logits come from reading at least one token
            num_known = self._crop(num_known)
        how = "token by token" if num_known == tokens.size(1) - 1 else "in pieces"
        if num_known and not self._can(how):
            if how == "token by token":
                warnings.warn(
                    f"The doctor {type(unwrap_peft(self.doctor.model)).__name__} reads the whole text for each token, as it "
                    f"cannot go on from its cache: {self._fault(how)}",
                    stacklevel=2,
                )
            self.forget()
            num_known = 0
        self._check_readable(tokens)
        has_padding = self.has_padding if num_known else bool((tokens == PADDING).any())
        if has_padding and not num_known:
            self.check_padding()
        self.tokens = None  # until it has read on, lest an interrupted call leave a half-true memory
        logits = self._read(tokens, num_known, has_padding)
        self.tokens, self.has_padding = tokens, has_padding
        if tokens.size(0) > 1 or num_known < tokens.size(1) - 1:
            self.recent = []  # only one text is decoded speculatively; logits between are not known
        self.recent = [*self.recent, logits][-self.num_recent :]
        return logits

    def check_padding(self) -> None:
        """Raise `ValueError` when padding on the left changes what the doctor says."""
        if not self._can("with padding"):
            raise ValueError(
                "A doctor must read prompts that are padded on the left as it reads them alone. Got "
                f"{type(unwrap_peft(self.doctor.model)).__name__}: {self._fault('with padding')}. Decode prompts one by "
                "one (`batch_size=1`), or those of one length together."
            )

    def faults(self) -> dict[str, str]:
        """What is wrong with each way of reading the doctor, empty where nothing is."""
        return {how: self._fault(how) for how in _TRIALS}

    def _can(self, how: str) -> bool:
        if not self.is_trial and how not in self.known_faults:
            self.known_faults[how] = self._fault(how)
        return not self.known_faults.get(how)

    def _fault(self, how: str) -> str:
        memory = DoctorMemory(self.doctor, is_trial=True)
        if how != WITH_POSITIONS and self._fault(WITH_POSITIONS):
            memory.accepted = memory.accepted - {"position_ids"}
        return reading_fault(self.doctor.model, f"doctor, {how}", partial(_TRIALS[how], memory), forward=self.doctor)

    def _look_up(self, tokens: torch.LongTensor) -> int:
        """How many leading columns of `tokens` the cache holds, with its rows reordered if that helps."""
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
                if self.cache is not None:
                    self.cache.reorder_cache(source)
                self.tokens, self.recent, num_known = self.tokens[source], [], num_held
        return num_known

    def _crop(self, num_known: int) -> int:
        """Cut the cache back to so many columns, or to none where it cannot be cut; returns how many."""
        num_extra = 0 if self.tokens is None else self.tokens.size(1) - num_known
        if num_extra == 0:
            return num_known
        layers = getattr(self.cache, "layers", [None])
        if num_known == 0 or any(type(layer) is not DynamicLayer for layer in layers) or not self._can("cut back"):
            self.forget()
            return 0
        self.cache.crop(-num_extra)
        self.recent = self.recent[:-num_extra]
        return num_known

    def _check_readable(self, tokens: torch.LongTensor) -> None:
        if tokens.size(1) > self.max_positions:
            length = (tokens != PADDING).sum(dim=1).max()
            if length > self.max_positions:
                raise ValueError(
                    f"Prompt and completion must fit the positions of the doctor. Got {length} tokens for "
                    f"{self.max_positions} positions; shorten the prompt or lower `max_new_tokens`."
                )

    def _read(self, tokens: torch.LongTensor, num_known: int, has_padding: bool) -> torch.Tensor:
        """Logits (B, V) of the doctor, which reads the tokens that its cache does not hold."""
        model, cache = self.doctor.model, self.cache
        if cache is None:
            num_known = 0
            config = model.config.get_text_config()
            if getattr(config, "sliding_window", None) is not None and _keeps_keys_and_values(config):
                cache = DynamicCache()  # told of no window, it keeps all states and can be cut anywhere
        if not self._can(WITH_POSITIONS):  # RoBERTa's begin behind the padding id
            self.accepted = self.accepted - {"position_ids"}
        tokens = tokens.to(model.device)
        mask = tokens != PADDING if has_padding else None
        inputs = next_inputs(tokens.clamp(min=0), self.accepted, num_read=num_known, mask=mask) | {"use_cache": True}
        if cache is not None:
            inputs["past_key_values"] = cache
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        with using_adapters(self.layers, self.doctor.adapters):
            output = model(**inputs)
        if getattr(output, "past_key_values", None) is not None:  # else the model reads all again next time
            self.cache = output.past_key_values
        return output.logits[:, -1]

    def _weights_version(self) -> torch.Tensor:
        """
        Changes when the doctor is trained: by the counters of writes in place, which fused optimizers leave alone, and
        by one value of every weight.
        """
        weights = [weight.detach() for weight in self.doctor.model.parameters() if weight.numel()]
        values = [weight.reshape(-1)[weight.numel() // 2].to(self.doctor.device, torch.float64) for weight in weights]
        counters = [0.0 if weight.is_inference() else float(weight._version) for weight in weights]
        return torch.cat([torch.stack(values).cpu(), torch.tensor(counters, dtype=torch.float64)])


def _keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether the cache of a model has keys and values, perhaps of a window, and nothing else."""
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    )


def _with_positions(memory: DoctorMemory, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    yield memory.logits(text[None]), [len(text) - 1]


def _token_by_token(memory: DoctorMemory, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    for length in range(6, 10):
        yield memory.logits(text[None, :length]), [length - 1]


def _in_pieces(memory: DoctorMemory, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    for length in (5, 9, 14):
        yield memory.logits(text[None, :length]), [length - 1]


def _cut_back(memory: DoctorMemory, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    for length in (12, 6, 7):
        yield memory.logits(text[None, :length]), [length - 1]


def _with_padding(memory: DoctorMemory, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Two rows, one of them mostly padding, which change places."""
    padding = text.new_full((10,), PADDING)
    for num_more in range(3):
        rows = [text[: 12 + num_more], torch.cat([padding, text[: 2 + num_more]])]
        places = [11 + num_more, 1 + num_more]
        if num_more == 2:
            rows, places = rows[::-1], places[::-1]
        yield memory.logits(torch.stack(rows)), places


_TRIALS = {
    WITH_POSITIONS: _with_positions,
    "token by token": _token_by_token,
    "in pieces": _in_pieces,
    "cut back": _cut_back,
    "with padding": _with_padding,
}


def check_is_doctor(model: PreTrainedModel) -> None:
    """Raise `ValueError` unless the model is a causal language model in eval mode, with adapters of its weights only."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"A doctor must be a language model. Got {reprlib.repr(model)}; load one with `load_doctor`, or name it to "
            "`DoctorGuidedLogitsProcessor.from_pretrained`."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"A doctor must be a causal language model. Got {type(model).__name__}, an encoder-decoder, which cannot "
            "read a prompt and its completion as one text."
        )
    check_adapters(model)
    _check_mode(model)


def _check_mode(model: PreTrainedModel) -> None:
    if model.training:
        raise ValueError("A doctor must be in eval mode, as dropout is random. Got training mode; call `.eval()`.")


def check_left_padded(attention_mask: torch.Tensor) -> None:
    """Raise `ValueError` unless every row of the mask is zeros, or none, before ones."""
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            "`attention_mask` must have shape (B, L), with at least one token. Got "
            f"{type(attention_mask).__name__} of shape {shape}; pass what the tokenizer returned with "
            '`return_tensors="pt"`.'
        )
    if not (attention_mask[:, -1].all() and (attention_mask.int().diff(dim=1) >= 0).all()):
        raise ValueError(
            "`attention_mask` must be left-padded, zeros before ones in every row. Got something else; set "
            "`padding_side='left'` on the tokenizer that makes the prompts."
        )


def _num_absolute_positions(model: PreTrainedModel) -> float:
    """Size of the table of learned positions; infinity where positions are rotary or relative."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    of_tokens = set(model.get_input_embeddings().modules())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in of_tokens]
    return limit if any(table.num_embeddings - limit in (0, 2) for table in tables) else math.inf  # OPT has 2 more


def special_ids(model: PreTrainedModel, name: str) -> list[int]:
    """Ids of the BOS, EOS or padding tokens, as far as the model knows them."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    values = [getattr(config, f"{name}_token_id", None) for config in configs]
    return [i for value in values if value is not None for i in (value if isinstance(value, list) else [value])]


def guess_mask(input_ids: torch.LongTensor, model: PreTrainedModel) -> tuple[torch.BoolTensor, str | None]:
    """
    Mask (B, L) without the leading padding ids; where these are also BOS or EOS, the longest row has none, and there is
    a doubt to be told.
    """
    bos, eos, pad = (special_ids(model, name) for name in ("bos", "eos", "pad"))
    if not pad + eos:
        return torch.ones_like(input_ids, dtype=torch.bool), None
    pad_token_id, doubt = (pad + eos)[0], None  # as `generate` does, EOS where there is no padding token
    run = (input_ids == pad_token_id).int().cumprod(dim=1).sum(dim=1, keepdim=True)  # (B, 1)
    if pad_token_id in bos + eos and run.any():
        run = run - run.min()
        doubt = (
            f"Prompts begin with id {pad_token_id}, which both pads and begins or ends texts: what is padding is a "
            'guess. Pass `attention_mask=inputs["attention_mask"]` to `DoctorGuidedLogitsProcessor`.'
        )
    position = torch.arange(input_ids.size(1), device=input_ids.device)
    return position >= run.clamp(max=input_ids.size(1) - 1), doubt


def check_reference(doctor: Doctor, reference: Doctor | None) -> None:
    """Raise `ValueError` when the reference of a doctor is the doctor itself, or the doctor has one in its weights."""
    is_the_doctor = (
        reference is not None
        and reference.is_on(doctor.model)
        and reference.prompt is doctor.prompt
        and reference.adapters == doctor.adapters
    )
    if is_the_doctor:
        raise ValueError(
            "`reference` must be the doctor before training. Got the module of the doctor itself (an adapter changes "
            "its base model in place), which undoes the guidance; load the reference separately, or for a doctor that "
            f"is an adapter pass `reference=Doctor(model, adapter={NO_ADAPTER!r})`."
        )
    if reference is not None and doctor.exponents and not reference.exponents:
        raise ValueError(
            "`reference` is for a doctor that is a language model. Got one for a doctor of guided flow, which is the ratio "
            "to its reference already; leave it out."
        )
