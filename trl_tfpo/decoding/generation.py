# SPDX-License-Identifier: Apache-2.0

"""
The front door of guided decoding: `generate` of the patient, with what it would otherwise do wrong without a word.

Shapes: B rows, L tokens of the prompt (padding included).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput

from ..common._upstream import adapter_layers, unwrap_peft, using_adapters
from ..models.adapters import check_speaks
from .best_of import check_best_of, keep_best
from .logits_processor import DoctorGuidedLogitsProcessor
from .reading import reading_fault
from .shared_forward import can_share, patient_adapters, shared_forward
from .speculative import speculative_guided_generate


def guided_generate(
    patient: PreTrainedModel,
    guide: DoctorGuidedLogitsProcessor,
    *,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    speculative: bool = False,
    keep_memory: bool = False,
    streamer: BaseStreamer | None = None,
    best_of: int = 1,
    **kwargs,
) -> ModelOutput | torch.LongTensor:
    """
    `patient.generate` under guidance.

    The same as `patient.generate(..., logits_processor=[guide])`, and beyond that the guide is told the mask and where
    the prompt ends. A doctor that is an adapter on the patient's own weights is kept apart from the patient, and where
    each text is one row they share the forward pass. What would leave the guide out is refused.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient. May be a `PeftModel` whose adapters are doctors: it is read with the adapters that are active,
            less those that are doctors.
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts, left-padded.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Their mask. May be left out where no prompt is padded.
        speculative (`bool`, *optional*, defaults to `False`):
            Let the doctors draft, [`speculative_guided_generate`]: faster, for one prompt, without beams.
        keep_memory (`bool`, *optional*, defaults to `False`):
            Keep what the doctors remember of the call before, so that a conversation that goes on is not read again.
            Otherwise their caches are freed first.
        streamer ([`~transformers.generation.BaseStreamer`], *optional*):
            Gets the tokens as they come.
        best_of (`int`, *optional*, defaults to `1`):
            Sample this many completions of each prompt, and return the one with the largest reward by the doctors' token
            credits, [`~best_of.completion_rewards`]. The KL from the guided policy is at most `log n - (n - 1) / n` nats; from
            the patient it grows by more, as the choice goes the way of the guidance. The cost is n times as large.
        **kwargs:
            Anything else for `patient.generate`, or for [`speculative_guided_generate`].

    Returns:
        What `patient.generate` returns: `(B, L + T)` ids, or an output object.

    Raises:
        `ValueError`: on an encoder-decoder, a patient that is a doctor of guided flow or has adapters that add tokens,
            padding without a mask, a cache of part of the text alone, a second guide, a mode that would leave out the
            guide, a patient that [`check_reads`] refuses, `best_of` without sampling or without token credits, and whatever
            `generate` and the guide refuse.

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
    _check_mode(patient, guide, input_ids, speculative, kwargs)
    if best_of != 1:
        of_modes = kwargs | {"speculative": speculative, "streamer": streamer}
        check_best_of(guide, best_of, lambda name: _setting(patient, of_modes, name))
        kwargs["num_return_sequences"] = best_of
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        pad_token_id = _setting(patient, kwargs, "pad_token_id")
        if pad_token_id is not None and (input_ids[:, 0] == pad_token_id).any():
            raise ValueError(
                "`attention_mask` must be given where prompts are padded. Got none, and a prompt that begins with the "
                f"padding id {pad_token_id}; pass the mask that the tokenizer returns with the ids."
            )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            "`attention_mask` must have the shape of `input_ids`. Got "
            f"{tuple(attention_mask.shape)} for ids {tuple(input_ids.shape)}; pass what the tokenizer returned together."
        )
    guide.reset(attention_mask=attention_mask, keep_memory=keep_memory)
    with without_doctors(patient, guide):
        check_reads(patient, attention_mask, prefill_chunk_size=_setting(patient, kwargs, "prefill_chunk_size"))
    if not attention_mask.all():
        for memory in guide.memories:
            if memory.doctor.prompt is None:  # else it reads another prompt, which has its own mask
                memory.check_padding()
    if speculative:
        kwargs["custom_generate"] = speculative_guided_generate
        if streamer is not None:
            kwargs["token_callback"] = _after_prompt(streamer, input_ids)
    else:
        kwargs["streamer"] = streamer
    num_calls = guide.num_calls
    is_shared = _keeps_rows(patient, kwargs) and can_share(patient, guide)
    if is_shared:
        context, patient = shared_forward(patient, guide, num_rows=len(input_ids)), unwrap_peft(patient)
    else:
        context = without_doctors(patient, guide)
    with context:
        output = patient.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=[*(kwargs.pop("logits_processor", None) or ()), guide],
            **kwargs,
        )
    if speculative and streamer is not None:
        streamer.end()
    if is_shared and getattr(output, "past_key_values", None) is not None:
        output.past_key_values.reorder_cache(
            torch.arange(len(input_ids), device=input_ids.device)
        )  # the patient's rows
    if guide.num_calls == num_calls:
        raise ValueError(
            "`generate` must ask the guide at every step. It never did, so the text is the patient's alone; leave out "
            f"the arguments that change how `generate` works. Got {sorted(kwargs)}."
        )
    if best_of == 1:
        return output
    eos_token_id = _setting(patient, kwargs, "eos_token_id")
    ends = dict(eos_token_id=eos_token_id, pad_token_id=_setting(patient, kwargs, "pad_token_id"))
    return keep_best(guide, output, best_of, prompt_length=input_ids.size(1), **ends)


def check_reads(
    patient: PreTrainedModel, attention_mask: torch.Tensor, *, prefill_chunk_size: int | None = None
) -> None:
    """
    Raise `ValueError` when `patient.generate` would read prompts otherwise than as whole texts: upstream, some models
    take padding into their state, or lose it between pieces of a prompt.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            Mask of the prompts.
        prefill_chunk_size (`int`, *optional*):
            Tokens of a prompt that `generate` reads at once. By default all.
    """
    settings = {"is_padded": not attention_mask.all(), "in_pieces": bool(prefill_chunk_size)}
    how = " and ".join(["generate", *(name for name, value in settings.items() if value)])
    if fault := reading_fault(patient, how, partial(_generate_along, patient, **settings), errors_count=False):
        raise ValueError(
            "A prompt that is padded or split must give the logits of the prompt read alone and in one piece. Got "
            f"{type(unwrap_peft(patient)).__name__}: {fault}. Decode prompts one by one (`batch_size=1`), or those of one "
            "length together, without `prefill_chunk_size`."
        )


class _Dictated(LogitsProcessor):
    """Lets each row be continued by the ids (B, L) of a text."""

    def __init__(self, ids: torch.LongTensor):
        self.ids = ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        following = self.ids[:, input_ids.size(1)][:, None]
        return torch.full_like(scores, -math.inf).scatter(1, following, 0.0)


def _generate_along(
    patient: PreTrainedModel, text: torch.LongTensor, *, is_padded: bool, in_pieces: bool
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """The logits of `generate` along a text: of its first 12 tokens on, and with padding of its first 2 on as well."""
    missing = torch.tensor([0, 10] if is_padded else [0], device=text.device)[:, None]  # (B, 1)
    places = torch.arange(len(text), device=text.device) - missing  # (B, 16)
    ids = text[places.clamp(min=0)]
    output = patient.generate(
        input_ids=ids[:, :12],
        attention_mask=(places >= 0)[:, :12].long(),
        logits_processor=[_Dictated(ids)],
        generation_config=GenerationConfig(
            **{"max_new_tokens": 3, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0},
            **{"top_p": 1.0, "top_k": 50, "prefill_chunk_size": 5 if in_pieces else None},
            **{"output_logits": True, "return_dict_in_generate": True},
        ),
    )
    for step, logits in enumerate(output.logits):
        yield logits, places[:, 11 + step].tolist()


def _after_prompt(streamer: BaseStreamer, input_ids: torch.LongTensor) -> Callable[[torch.LongTensor], None]:
    """Puts tokens to the streamer, the prompt before the first: when nothing can be refused any more."""
    prompts = [input_ids.cpu()]

    def put(token):
        if prompts:
            streamer.put(prompts.pop())
        streamer.put(token)

    return put


def _check_mode(patient, guide, input_ids, speculative, kwargs) -> None:
    if not isinstance(guide, DoctorGuidedLogitsProcessor):
        raise ValueError(
            f"`guide` must be a `DoctorGuidedLogitsProcessor`. Got a `{type(guide).__name__}`; make one of the doctor."
        )
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            "`input_ids` must be token ids of shape (B, L), with at least one token. Got "
            f"{f'{tuple(input_ids.shape)}, {input_ids.dtype}' if is_tensor else type(input_ids).__name__}; pass what the "
            'tokenizer returns with `return_tensors="pt"`.'
        )
    known = getattr(patient.get_input_embeddings(), "num_embeddings", None)
    if known is not None and not 0 <= input_ids.min() <= input_ids.max() < known:
        raise ValueError(
            f"`input_ids` must be ids of the patient's tokenizer, from 0 to {known - 1}. Got {input_ids.min()} to "
            f"{input_ids.max()}; tokenize the prompt with it."
        )
    if patient.config.is_encoder_decoder:
        raise ValueError(
            f"The patient must be a causal language model. Got {type(patient).__name__}, an encoder-decoder: a doctor "
            "cannot read what its encoder has read."
        )
    check_speaks(patient, patient_adapters(patient, guide))
    if _setting(patient, kwargs, "cache_implementation") == "paged":
        raise ValueError(
            "Guidance needs `generate` to ask its processors. Got `cache_implementation='paged'`, which does not; "
            "leave it out."
        )
    if _setting(patient, kwargs, "assistant_early_exit") and any(doctor.is_on(patient) for doctor in guide.doctors):
        raise ValueError(
            "Early exit shortens the patient while it drafts, and a doctor on its weights with it. Got "
            "`assistant_early_exit`; leave it out."
        )
    if speculative:
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if _setting(patient, kwargs, name):
                raise ValueError(
                    f"With `speculative=True` the doctors draft. Got `{name}`, another way to draft; leave out one."
                )
    for name in ("custom_generate", "inputs_embeds", "inputs"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`guided_generate` takes `input_ids`, which doctors read too, and sets `custom_generate`. Got `{name}`; "
                "leave it out, or call `patient.generate(..., logits_processor=[guide])`."
            )
    if any(isinstance(other, DoctorGuidedLogitsProcessor) for other in kwargs.get("logits_processor") or ()):
        raise ValueError(
            "There must be one guide. Got another among `logits_processor`, which would take the guided policy for "
            "the patient; give one guide a list of doctors."
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() >= input_ids.size(1):
        raise ValueError(
            "`input_ids` must be the whole text, also with a cache, for doctors have not read it. Got "
            f"{input_ids.size(1)} ids and a cache of {cache.get_seq_length()} tokens; pass all ids."
        )


def _setting(patient: PreTrainedModel, kwargs: dict, name: str):
    """A setting as `generate` resolves it: an argument, else that of the config given, else the patient's."""
    given = [kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)]
    return next((value for value in given if value is not None), getattr(patient.generation_config, name, None))


def _keeps_rows(patient: PreTrainedModel, kwargs: dict) -> bool:
    """Whether this is greedy search or sampling with nothing to it: one row for each prompt, one pass for each token."""
    if any(_setting(patient, kwargs, name) not in (None, 1) for name in ("num_beams", "num_return_sequences")):
        return False
    others = (
        *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "guidance_scale", "custom_generate"),
        *("past_key_values", "cache_implementation", "output_hidden_states", "output_attentions"),
    )
    return all(_setting(patient, kwargs, name) in (None, False) for name in others)


@contextmanager
def without_doctors(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor) -> Iterator[None]:
    """
    Within the context the patient is read without those adapters on its weights that are doctors of the guide.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient. Its other active adapters stay on.
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
    """
    with using_adapters(adapter_layers(patient), patient_adapters(patient, guide)):
        yield
