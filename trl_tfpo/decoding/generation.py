# SPDX-License-Identifier: Apache-2.0

"""
`guided_generate`: the patient's `generate` with a guide, after checks of the arguments.

Shapes: B rows, L tokens of the prompt (padding included), T generated tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput

from ..common._upstream import adapter_layers, using_adapters
from ..common.language_model import unwrap_peft
from ..models.trained_exponents import check_is_language_model
from .best_of import check_best_of, keep_best
from .logits_processor import DoctorGuidedLogitsProcessor
from .reading import reading_fault
from .shared_forward import can_share, patient_adapters, shared_forward
from .speculative import speculative_guided_generate


def guided_generate(
    patient: PreTrainedModel,
    guide: DoctorGuidedLogitsProcessor,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    speculative: bool = False,
    keep_memory: bool = False,
    streamer: BaseStreamer | None = None,
    best_of: int = 1,
    **kwargs: object,
) -> ModelOutput | torch.Tensor:
    """
    Generate from the guided policy.

    This is `patient.generate(..., logits_processor=[guide])`, with these differences. The guide receives the mask of
    the prompts. Doctors that are adapters on the patient do not change its logits. In greedy search and sampling they
    share its forward pass, if [`~shared_forward.can_share`] allows it. Arguments that would disable the guide raise an
    error.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient. In a `PeftModel`, active adapters that are not doctors of the guide belong to the patient.
        guide ([`DoctorGuidedLogitsProcessor`]):
            The doctors and the exponents.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts, left-padded.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Mask of the prompts. Required if a prompt is padded.
        speculative (`bool`, *optional*, defaults to `False`):
            Whether to draft tokens and verify several in one forward pass of the patient, where that is faster:
            [`speculative_guided_generate`]. It is for one prompt, without beams. The doctors draft, or
            `assistant_model`, or earlier text (`prompt_lookup_num_tokens`).
        keep_memory (`bool`, *optional*, defaults to `False`):
            Whether to keep the caches of the doctors from the previous call, for the next turn of a conversation.
        streamer ([`~transformers.generation.BaseStreamer`], *optional*):
            Receives the tokens during generation.
        best_of (`int`, *optional*, defaults to `1`):
            Number n of completions to sample per prompt. The completion with the largest sum of token credits is
            returned, see [`~best_of.completion_rewards`]. Its distribution has a KL of at most `log n - (n - 1) / n`
            nats from the guided policy. The KL from the patient can increase by more. The cost is n times as large.
        **kwargs:
            Further arguments of `patient.generate`, or of [`speculative_guided_generate`].

    Returns:
        The output of `patient.generate`: ids of shape `(B, L + T)`, or an output object.

    Raises:
        `ValueError`: on an encoder-decoder, a patient that is a doctor of guided flow or has adapters that add tokens,
            ids that the patient does not know, padding without a mask, a mask of another shape, `input_ids` that are
            not longer than the cache, a second guide, `inputs_embeds` and `custom_generate`, modes without logits
            processors, a patient that [`check_reads`] refuses, `best_of` without sampling or token credits or with
            beams, `speculative` or a `streamer`, and errors of `generate` and of the guide.

    Examples:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = LlamaConfig(vocab_size=11, pad_token_id=0, **sizes)
    >>> patient, doctor = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    >>> guide = DoctorGuidedLogitsProcessor(doctor, beta=0.5)
    >>> prompt = torch.tensor([[3, 4]])
    >>> settings = dict(input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    >>> plain = guided_generate(patient, guide, **settings)
    >>> torch.equal(guided_generate(patient, guide, **settings, speculative=True), plain)
    True

    ```
    """
    _check_ids(patient, input_ids)
    _check_arguments(patient, guide, input_ids, kwargs)
    if guide.strengths is not None:
        guide.strengths.warn_of_other_patient(patient)
    if best_of != 1:
        settings = kwargs | {"speculative": speculative, "streamer": streamer}
        check_best_of(guide, best_of, lambda name: _setting(patient, settings, name))
        kwargs["num_return_sequences"] = best_of
    attention_mask = _mask_of(patient, input_ids, attention_mask, kwargs)
    guide.reset(attention_mask=attention_mask, keep_memory=keep_memory)
    _use_caches_of(patient, guide, kwargs)
    with without_doctors(patient, guide):
        check_reads(patient, attention_mask, prefill_chunk_size=_setting(patient, kwargs, "prefill_chunk_size"))
    if not attention_mask.all():
        for memory in guide.memories:
            if memory.doctor.prompt is None:  # doctors with prompts of their own do not read these
                memory.check_padding()
    if speculative:
        assistant: Any = kwargs.pop("assistant_model", None)  # `generate` would keep it
        kwargs["custom_generate"] = partial(speculative_guided_generate, assistant_model=assistant)
        if streamer is not None:
            kwargs["token_callback"] = _after_prompt(streamer, input_ids)
    else:
        kwargs["streamer"] = streamer
    num_calls = guide.num_calls
    output = _generate(patient, guide, kwargs | {"input_ids": input_ids, "attention_mask": attention_mask})
    if speculative and streamer is not None:
        streamer.end()
    if guide.num_calls == num_calls:
        raise ValueError(
            f"`generate` must call the guide at every step. Got no call, with the arguments {sorted(kwargs)}; leave "
            "out those that change how `generate` works."
        )
    if best_of == 1 or not isinstance(output, torch.Tensor):  # `best_of` refuses `return_dict_in_generate`
        return output
    eos_token_id = _setting(patient, kwargs, "eos_token_id")
    ends = dict(eos_token_id=eos_token_id, pad_token_id=_setting(patient, kwargs, "pad_token_id"))
    return keep_best(guide, output, best_of, prompt_length=input_ids.size(1), **ends)


def _generate(
    patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor, kwargs: dict
) -> ModelOutput | torch.Tensor:
    """Call `generate`. Doctors on the patient's weights share its forward pass, or are switched off in it."""
    kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or ()), guide]
    appended = guide.appended_tokens() if _appends_tokens(patient, kwargs) else nullcontext()
    if not (_can_repeat_rows(patient, kwargs) and can_share(patient, guide)):
        with appended, without_doctors(patient, guide):
            return patient.generate(**kwargs)  # type: ignore[operator]  # a model's own `GenerationMixin`
    num_rows = len(kwargs["input_ids"])
    with appended, shared_forward(patient, guide, num_rows):
        output = unwrap_peft(patient).generate(**kwargs)  # type: ignore[operator]
    cache = getattr(output, "past_key_values", None)
    if cache is not None:  # drop the rows of the doctors
        cache.reorder_cache(torch.arange(num_rows, device=kwargs["input_ids"].device))
    return output


def check_reads(
    patient: PreTrainedModel, attention_mask: torch.Tensor, *, prefill_chunk_size: int | None = None
) -> None:
    """
    Raise `ValueError` when padding or `prefill_chunk_size` changes the logits of `patient.generate`.

    Some models let padding enter their state, or lose the state between parts of a prompt.
    """
    is_padded, in_pieces = not attention_mask.all(), bool(prefill_chunk_size)
    mode = " and ".join(["generate", *["is_padded"] * is_padded, *["in_pieces"] * in_pieces])
    read = partial(_generate_text, patient, is_padded=is_padded, in_pieces=in_pieces)
    if fault := reading_fault(patient, mode, read, errors_count=False):
        raise ValueError(
            "The patient must give the same logits for a prompt with or without padding, read whole or in parts. Got "
            f"{type(unwrap_peft(patient)).__name__}: {fault}. Decode prompts one by one (`batch_size=1`), or prompts "
            "of one length together, without `prefill_chunk_size`."
        )


class _ForcedTokens(LogitsProcessor):
    """Forces `generate` to reproduce the ids (B, L) of a text."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        next_ids = self.ids[:, input_ids.size(1)][:, None]
        return torch.full_like(scores, -math.inf).scatter(1, next_ids, 0.0)


def _generate_text(
    patient: PreTrainedModel, text: torch.Tensor, *, is_padded: bool, in_pieces: bool
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """
    Yield the logits of `generate` after 12, 13 and 14 tokens of a text (16,). A second row, if `is_padded`, contains
    10 tokens of padding and then the same text.
    """
    num_padding = torch.tensor([0, 10] if is_padded else [0], device=text.device)[:, None]  # (B, 1)
    positions = torch.arange(len(text), device=text.device) - num_padding  # (B, 16)
    ids = text[positions.clamp(min=0)]
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    # Without these settings the patient's values apply, with a warning
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    outputs = {"output_logits": True, "return_dict_in_generate": True}
    config = GenerationConfig(**settings, **neutral, **outputs, prefill_chunk_size=5 if in_pieces else None)
    output = patient.generate(  # type: ignore[operator]
        input_ids=ids[:, :12],
        attention_mask=(positions >= 0)[:, :12].long(),
        logits_processor=[_ForcedTokens(ids)],
        generation_config=config,
    )
    for step, logits in enumerate(output.logits):
        yield logits, positions[:, 11 + step].tolist()


def _after_prompt(streamer: BaseStreamer, input_ids: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Return a function that streams the prompts and then the tokens. Refused prompts are not streamed."""
    prompts = [input_ids.cpu()]

    def put(token: torch.Tensor) -> None:
        if prompts:
            streamer.put(prompts.pop())
        streamer.put(token)

    return put


def _mask_of(
    patient: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict
) -> torch.Tensor:
    """Check the mask (B, L). By default return one without padding."""
    if attention_mask is None:
        pad_token_id = _setting(patient, kwargs, "pad_token_id")
        if pad_token_id is not None and (input_ids[:, 0] == pad_token_id).any():
            raise ValueError(
                "Padded prompts need an `attention_mask`. Got none, and a prompt that begins with the padding id "
                f"{pad_token_id}; pass the mask that the tokenizer returns with the ids."
            )
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`. Got {tuple(attention_mask.shape)} for ids "
            f"{tuple(input_ids.shape)}; pass both from one call of the tokenizer."
        )
    return attention_mask


def _check_ids(patient: PreTrainedModel, input_ids: torch.Tensor) -> None:
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            "`input_ids` must be token ids of shape (B, L), with at least one token. Got "
            f"{f'{tuple(input_ids.shape)}, {input_ids.dtype}' if is_tensor else type(input_ids).__name__}; pass the "
            'ids that the tokenizer returns with `return_tensors="pt"`.'
        )
    known = getattr(patient.get_input_embeddings(), "num_embeddings", None)
    if known is not None and not 0 <= input_ids.min() <= input_ids.max() < known:
        raise ValueError(
            f"`input_ids` must be ids of the patient's tokenizer, from 0 to {known - 1}. Got {input_ids.min()} to "
            f"{input_ids.max()}; tokenize the prompt with the patient's tokenizer."
        )


def _check_arguments(
    patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor, input_ids: torch.Tensor, kwargs: dict
) -> None:
    if not isinstance(guide, DoctorGuidedLogitsProcessor):
        raise ValueError(
            f"`guide` must be a `DoctorGuidedLogitsProcessor`. Got a `{type(guide).__name__}`; make one from a doctor."
        )
    if patient.config.is_encoder_decoder:
        raise ValueError(
            f"The patient must be a causal language model. Got {type(patient).__name__}, an encoder-decoder, and "
            "doctors cannot read the input of the encoder; load another model."
        )
    check_is_language_model(patient, patient_adapters(patient, guide))
    if _setting(patient, kwargs, "cache_implementation") == "paged":
        raise ValueError(
            "Guidance needs logits processors. Got `cache_implementation='paged'`, which does not call them; leave it "
            "out."
        )
    if _setting(patient, kwargs, "assistant_early_exit") and any(doctor.is_on(patient) for doctor in guide.doctors):
        raise ValueError(
            "Early exit must not be used with a doctor on the patient's weights, because the doctor would also skip "
            "layers. Got `assistant_early_exit`; leave it out."
        )
    for name in ("custom_generate", "inputs_embeds", "inputs"):
        if kwargs.get(name) is not None:
            raise ValueError(
                "`guided_generate` needs `input_ids`, because doctors read them, and sets `custom_generate` itself. "
                f"Got `{name}`; leave it out, or call `patient.generate(..., logits_processor=[guide])`."
            )
    if any(isinstance(other, DoctorGuidedLogitsProcessor) for other in kwargs.get("logits_processor") or ()):
        raise ValueError(
            "There must be one guide. Got another in `logits_processor`; make one guide with a list of doctors."
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() >= input_ids.size(1):
        raise ValueError(
            "`input_ids` must be the whole text, even with a cache, because doctors do not read the patient's cache. "
            f"Got {input_ids.size(1)} ids and a cache of {cache.get_seq_length()} tokens; pass all ids."
        )


def _setting(patient: PreTrainedModel, kwargs: dict, name: str) -> Any:
    """Look up a setting as `generate` does: in the arguments, in `generation_config`, and in that of the patient."""
    given = [kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)]
    return next((value for value in given if value is not None), getattr(patient.generation_config, name, None))


def _use_caches_of(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor, kwargs: dict) -> None:
    """Give the doctors static caches and compiled steps if the settings of patient or guide request them."""
    names = ("cache_implementation", "compile_config", "disable_compile")
    implementation, compile_config, disable_compile = (_setting(patient, kwargs, name) for name in names)
    if implementation != "static":
        implementation, compile_config = guide.cache_implementation, guide.compile_config
    guide.use_caches(implementation, compile_config or guide.compile_config, bool(disable_compile))


def _appends_tokens(patient: PreTrainedModel, kwargs: dict) -> bool:
    """Whether the mode is greedy search or sampling, with one forward pass per token."""
    others = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
    has_beams = _setting(patient, kwargs, "num_beams") not in (None, 1)
    return not has_beams and all(_setting(patient, kwargs, name) in (None, False) for name in others)


def _can_repeat_rows(patient: PreTrainedModel, kwargs: dict) -> bool:
    """
    Whether rows for the doctors may be added to the forward pass.

    There must be one row per prompt, and no setting whose cache or outputs would contain the added rows.
    """
    if not _appends_tokens(patient, kwargs) or _setting(patient, kwargs, "num_return_sequences") not in (None, 1):
        return False
    others = ("guidance_scale", "past_key_values", "cache_implementation", "output_hidden_states", "output_attentions")
    return all(_setting(patient, kwargs, name) in (None, False) for name in others)


@contextmanager
def without_doctors(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor) -> Iterator[None]:
    """Within the context, adapters of the patient that are doctors of the guide are switched off."""
    with using_adapters(adapter_layers(patient), patient_adapters(patient, guide)):
        yield
