# SPDX-License-Identifier: Apache-2.0

r"""
Guided decoding in fewer forward passes of the patient: a drafter proposes tokens, the patient checks them.

The drafter proposes a few tokens, and the patient reads all of them in one forward pass. The guided policy chooses the
token at each position. Drafts are kept until one differs from the chosen token (`acceptance.py`). Drafters are the
doctors, another language model, or the text itself (`drafts.py`). How many tokens are drafted, and whether any,
follows from measured costs and acceptance (`pace.py`).

Shapes: one row, L tokens so far, T generated tokens, k drafted tokens, V vocabulary.
"""

import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..common.language_model import LanguageModel, unwrap_peft
from .acceptance import GreedySearch, Sampling
from .doctors import Doctor
from .drafts import (
    MAX_NGRAM_SIZE,
    Assistant,
    Drafter,
    ModelDrafts,
    PromptLookup,
    RecentLogits,
    guess_of_doctors,
    share_of,
    without_adapter,
)
from .logits_processor import DoctorGuidedLogitsProcessor
from .pace import MAX_DRAFT_TOKENS, Costs, FixedLength, MeasuredPace, Pace
from .reading import accepted_inputs, next_inputs, reading_fault


STATEFUL_PROCESSORS = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
MAX_EXPERIENCES = 32  # for each patient


@dataclass
class _Experience:
    """Pace and n-grams from earlier texts of the same models with the same settings."""

    pace: MeasuredPace
    ngrams: dict[tuple[int, ...], int]


_EXPERIENCE: WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Experience]] = WeakKeyDictionary()


@torch.no_grad()
def speculative_guided_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_draft_tokens: int | Literal["auto"] = "auto",
    assistant_model: "LanguageModel | Doctor | None" = None,
    prompt_lookup_num_tokens: int | None = None,
    token_callback: Callable[[torch.Tensor], None] | None = None,
    statistics: dict[str, int] | None = None,
    **model_kwargs: object,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """
    Greedy search or sampling from the guided policy, with drafts.

    This is a `custom_generate` for `patient.generate`:
    `patient.generate(**inputs, logits_processor=[guide], custom_generate=speculative_guided_generate)`. `generate`
    prepares the arguments up to `generation_config`, and passes on the others. It keeps `assistant_model` for itself:
    pass `custom_generate=functools.partial(speculative_guided_generate, assistant_model=...)`.

    The text is that of plain guided decoding, up to rounding: a forward pass over several positions may round
    differently than one over a single position. With the same seed, sampling gives the samples of plain guided
    decoding.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient.
        input_ids (`torch.LongTensor` of shape `(1, L)`):
            The prompt, one row.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            Processors, one of them a [`DoctorGuidedLogitsProcessor`].
        stopping_criteria ([`~transformers.StoppingCriteriaList`]):
            Checked after every token.
        generation_config ([`~transformers.GenerationConfig`]):
            `do_sample`, `num_beams`, `max_length`, `return_dict_in_generate`, `output_scores`, `output_logits`,
            `prompt_lookup_num_tokens` and `max_matching_ngram_size` are read here.
        num_draft_tokens (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Tokens drafted between two forward passes of the patient. `"auto"` chooses from 0 (plain guided decoding)
            to 8 by measured times and acceptance ([`~pace.MeasuredPace`]), which are kept for later texts of these
            models.
        assistant_model ([`~transformers.PreTrainedModel`] or [`Doctor`], *optional*):
            A small language model with the patient's tokenizer that drafts in place of the doctors. For a doctor of
            guided flow, the model that it was trained from is a good choice.
        prompt_lookup_num_tokens (`int`, *optional*):
            Draft by lookup: each draft is the token that followed the last tokens at their latest occurrence. With
            `num_draft_tokens="auto"` at most this many tokens are drafted at once. By default the doctors draft if one
            of them is a language model. If all are doctors of guided flow, and one is an adapter on a model other
            than the patient, this model drafts without the adapter; otherwise the lookup drafts.
        token_callback (callable, *optional*):
            Called with each new token, of shape `(1,)`, for instance the `put` of a streamer: `generate` does not pass
            its `streamer` to a `custom_generate`.
        statistics (`dict`, *optional*):
            Counters are added to it: `num_tokens`, `num_patient_forwards`, `num_drafted`, `num_accepted`.
        **model_kwargs:
            Mask and cache, as `generate` prepares them.

    Returns:
        `torch.LongTensor` of shape `(1, L + T)`, or with `return_dict_in_generate` a
        [`~transformers.generation.GenerateDecoderOnlyOutput`].

    Raises:
        `ValueError`: on several rows, beams, no or several guides, processors that keep a state from token to token,
            a cache that is static or cannot be cropped, inputs other than text, two ways to draft, a number of drafts
            out of range, and an assistant that is not a language model.
    """
    guide = _find_guide(logits_processor)
    _check_settings(input_ids, logits_processor, generation_config, num_draft_tokens)
    num_lookup = _num_lookup(prompt_lookup_num_tokens, generation_config, assistant_model)
    patient = _PatientReader(model, model_kwargs)
    if fault := reading_fault(model, "speculation", partial(_read_drafts, model)):
        raise ValueError(
            "Speculative decoding reads several tokens at once and crops the patient's cache. Got "
            f"{type(unwrap_peft(model)).__name__}, which cannot do this ({fault}); decode without speculation."
        )
    choice = Sampling() if generation_config.do_sample else GreedySearch()
    text = _Text(input_ids, generation_config)
    with ExitStack() as stack:
        recent = {index: RecentLogits(memory) for index, memory in enumerate(guide.memories)}
        stack.enter_context(guide.external_logits(recent))
        drafter, pace = stack.enter_context(
            _drafting(patient, guide, logits_processor, choice, generation_config, assistant_model, num_lookup)
        )
        if num_draft_tokens != "auto":
            pace = FixedLength(num_draft_tokens)
        decoder = _Decoder(patient, logits_processor, stopping_criteria, choice, drafter, pace, text, token_callback)
        pace.begin_text()
        while not decoder.is_done:
            decoder.round(generation_config.max_length)
        choice.finish()
    if statistics is not None:
        for name, count in decoder.counts.items():
            statistics[name] = statistics.get(name, 0) + count
    return text.output(patient.cache)


class _Decoder:
    """The state of one generation. [`round`] adds one token or more to the text."""

    def __init__(
        self,
        patient: "_PatientReader",
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        choice: GreedySearch,
        drafter: Drafter,
        pace: Pace,
        text: "_Text",
        token_callback: Callable[[torch.Tensor], None] | None,
    ):
        self.patient, self.logits_processor, self.stopping_criteria = patient, logits_processor, stopping_criteria
        self.choice, self.drafter, self.pace, self.text = choice, drafter, pace, text
        self.token_callback, self.is_done = token_callback, False
        self.counts = dict.fromkeys(("num_tokens", "num_patient_forwards", "num_drafted", "num_accepted"), 0)

    def round(self, max_length: int) -> None:
        """Draft, check, and keep what is accepted."""
        pace, num_before = self.pace, self.text.ids.size(1)
        pace.begin_round()
        ids, kinds = self._draft(max_length - num_before - 1)
        num_checked = pace.num_to_check(kinds)
        with pace.timed(("check", num_checked + 1)):
            logits = self.patient.logits(ids[:, : num_before + num_checked], num_checked + 1)  # (k + 1, V)
        self.counts["num_patient_forwards"] += 1
        self.counts["num_drafted"] += num_checked
        for index in range(num_checked + 1):
            is_read = self.drafter.reads_doctors and index < len(kinds)
            before = self.text.ids
            with pace.timed("read" if is_read else "fresh"):
                token = self._add_token(logits[index : index + 1])
                is_same = index < len(kinds) and bool(token == ids[:, num_before + index])
            if index < len(kinds):
                pace.observe(kinds[index], is_same)
            elif not kinds and not self.is_done and pace.shadow_is_due():
                self._compare(before, token)
            self.counts["num_accepted"] += is_same and index < num_checked
            if self.is_done or not is_same:
                break
        self.patient.keep(self.text.ids.size(1) - 1)  # the last token has not been read yet
        self.choice.release(self.text.ids.size(1))
        pace.end_round(num_checked, self.text.ids.size(1) - num_before)

    def _draft(self, max_tokens: int) -> tuple[torch.Tensor, list[Hashable]]:
        """Text and drafts (1, L + k), and the kind of each draft."""
        ids, kinds = self.text.ids, list[Hashable]()
        self.drafter.begin_round(ids)
        while self.pace.wants_more(kinds, max_tokens):
            with self.pace.timed("draft"):
                proposal = self.drafter.propose(ids)
            if proposal is None:
                break
            ids = torch.cat([ids, proposal[0][:, None]], dim=1)
            kinds.append(proposal[1])
        return ids, kinds

    def _add_token(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token (1,) by the patient's logits (1, V), and add it to the text."""
        text = self.text
        raw = logits.to(copy=True, dtype=torch.float32, device=text.ids.device)
        guided = self.logits_processor(text.ids, raw)  # type: ignore[arg-type]  # its ids are any `Tensor`
        token = self.choice.token(guided, text.ids.size(1))
        text.append(token, guided, raw)
        self.counts["num_tokens"] += 1
        if self.token_callback is not None:
            self.token_callback(token.cpu())
        self.is_done = bool(self.stopping_criteria(text.ids, guided).all())
        return token

    def _compare(self, ids: torch.Tensor, token: torch.Tensor) -> None:
        """Compare the token after `ids` (1, L) with what would have been drafted."""
        with self.pace.timed("shadow"):
            proposal = self.drafter.propose(ids)
            is_same = proposal is not None and bool(proposal[0] == token)
        if proposal is not None:
            self.pace.observe(proposal[1], is_same)


@contextmanager
def _drafting(
    patient: "_PatientReader",
    guide: DoctorGuidedLogitsProcessor,
    logits_processor: LogitsProcessorList,
    choice: GreedySearch,
    generation_config: GenerationConfig,
    assistant_model: "LanguageModel | Doctor | None",
    num_lookup: int | None,
) -> Iterator[tuple[Drafter, Pace]]:
    """
    Context with the drafter and the pace of a text. The pace continues from earlier texts, but texts that are decoded
    at the same time do not share it.
    """
    model, is_sampled = patient.model, bool(generation_config.do_sample)
    vocab_size = model.config.get_text_config().vocab_size
    if assistant_model is None and num_lookup is None and all(doctor.exponents for doctor in guide.doctors):
        assistant_model = without_adapter(guide, model)
        num_lookup = MAX_DRAFT_TOKENS if assistant_model is None else None
    models: list[Hashable] = [weakref.ref(doctor.model) for doctor in guide.doctors]
    ngrams: dict[tuple[int, ...], int] = {}
    if assistant_model is not None:
        assistant = Assistant(assistant_model, patient.attention_mask, vocab_size)
        share = share_of(assistant.memory.doctor.model, model)
        drafter: Drafter = ModelDrafts(guide, logits_processor, choice, assistant, share)
        models.append(weakref.ref(assistant.memory.doctor.model))
    elif num_lookup is None:
        drafter = ModelDrafts(guide, logits_processor, choice, guess_of_doctors(guide, vocab_size))
    else:
        drafter = PromptLookup(ngrams, generation_config.max_matching_ngram_size or MAX_NGRAM_SIZE)
    weights = [weight if isinstance(weight, float) else type(weight) for weight in (guide.alpha, *guide.betas)]
    key = (*models, type(drafter), num_lookup, *weights, is_sampled, model.device, model.dtype)
    known = _EXPERIENCE.setdefault(unwrap_peft(model), {})
    experience = known.pop(key, None)
    if experience is None:
        costs = Costs(*_clock_of(model.device))
        max_tokens = min(num_lookup or MAX_DRAFT_TOKENS, MAX_DRAFT_TOKENS)
        experience = _Experience(MeasuredPace(costs, drafter.reads_doctors, drafter.step_share, max_tokens), ngrams)
    if isinstance(drafter, PromptLookup):
        drafter.next_tokens = experience.ngrams
    yield drafter, experience.pace
    known[key] = experience
    while len(known) > MAX_EXPERIENCES:
        del known[next(iter(known))]


def _clock_of(device: torch.device) -> tuple[Callable[[], float], bool]:
    """A clock that waits for the device, and whether it can be read without a delay."""
    if device.type == "cpu":  # with one thread: the CPU time of this thread, unaffected by other processes
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter, True
    synchronize = torch.get_device_module(device).synchronize

    def seconds() -> float:
        synchronize(device)
        return time.perf_counter()

    return seconds, False


def _num_lookup(given: int | None, generation_config: GenerationConfig, assistant_model: object) -> int | None:
    """Number of tokens for prompt lookup, or `None` without it."""
    number = given if given is not None else getattr(generation_config, "prompt_lookup_num_tokens", None)
    if number is None:
        return None
    if assistant_model is not None:
        raise ValueError(
            "There must be one way to draft. Got `assistant_model` and `prompt_lookup_num_tokens`; leave out one."
        )
    if not (isinstance(number, int) and number > 0):
        raise ValueError(f"`prompt_lookup_num_tokens` must be a number of tokens, at least 1. Got {number!r}; try 4.")
    return number


def _find_guide(logits_processor: LogitsProcessorList) -> DoctorGuidedLogitsProcessor:
    guides = [processor for processor in logits_processor if isinstance(processor, DoctorGuidedLogitsProcessor)]
    if len(guides) != 1:
        raise ValueError(
            f"There must be one `DoctorGuidedLogitsProcessor` among the processors. Got {len(guides)}; for several "
            "doctors give one processor a list of them."
        )
    return guides[0]


def _check_settings(
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    num_draft_tokens: int | str,
) -> None:
    if input_ids.size(0) != 1 or generation_config.num_beams > 1:
        raise ValueError(
            "Speculative decoding takes one prompt, one sequence and no beams. Got "
            f"{input_ids.size(0)} rows and {generation_config.num_beams} beams; decode the prompts one by one, or "
            "without speculation."
        )
    for processor in logits_processor:
        if isinstance(processor, STATEFUL_PROCESSORS):
            raise ValueError(
                "Speculative decoding calls processors on drafts that may be rejected. Got "
                f"{type(processor).__name__}, which relies on one call for each token; decode without speculation."
            )
    if num_draft_tokens != "auto" and not (isinstance(num_draft_tokens, int) and 0 <= num_draft_tokens < 32):
        raise ValueError(f"`num_draft_tokens` must be 'auto' or from 0 to 31. Got {num_draft_tokens!r}; try 4.")


class _Text:
    """The text so far, with the scores and logits that the settings request."""

    def __init__(self, ids: torch.Tensor, generation_config: GenerationConfig):
        self.ids, self.config = ids, generation_config
        self.scores: list[torch.Tensor] = []
        self.raw_logits: list[torch.Tensor] = []

    def append(self, token: torch.Tensor, guided: torch.Tensor, raw: torch.Tensor) -> None:
        """Add a token (1,), with its guided scores (1, V) and the patient's logits (1, V)."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        if self.config.output_scores:
            self.scores.append(guided)
        if self.config.output_logits:
            self.raw_logits.append(raw)

    def output(self, cache: DynamicCache) -> torch.Tensor | GenerateDecoderOnlyOutput:
        if not self.config.return_dict_in_generate:
            return self.ids
        outputs: dict = {"sequences": self.ids, "past_key_values": cache}
        if self.config.output_scores:
            outputs["scores"] = tuple(self.scores)
        if self.config.output_logits:
            outputs["logits"] = tuple(self.raw_logits)
        return GenerateDecoderOnlyOutput(**outputs)


class _PatientReader:
    """The patient and its cache: logits of several positions in one forward pass."""

    def __init__(self, model: PreTrainedModel, inputs: dict):
        cache, use_cache, mask = (
            inputs.get("past_key_values"),
            inputs.get("use_cache", True),
            inputs.get("attention_mask"),
        )
        known = {"past_key_values", "use_cache", "attention_mask"}
        known |= {"position_ids", "logits_to_keep", "cache_position", "token_type_ids"}
        unknown = {name for name, value in inputs.items() if value is not None and name not in known}
        if not isinstance(cache, DynamicCache) or not use_cache or unknown:
            raise ValueError(
                "Speculative decoding needs a patient that reads text, with a dynamic KV cache. Got a cache of type "
                f"{type(cache).__name__}, `use_cache={use_cache}` and the inputs {sorted(unknown)}; decode without "
                "speculation."
            )
        self.model, self.cache = model, cache
        self.cache.activate_past_recording()  # allows layers with a window to be cropped
        self.num_read = self.cache.get_seq_length()
        self.accepted = accepted_inputs(model)
        self.attention_mask = None if mask is None or mask.all() else mask

    def logits(self, ids: torch.Tensor, num_logits: int) -> torch.Tensor:
        """Logits (num_logits, V) after the last prefixes of `ids` (1, L)."""
        mask = self.attention_mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, ids.size(1) - mask.size(1)), value=1)
        inputs = next_inputs(ids, self.accepted, num_read=self.num_read, mask=mask)
        output = self.model(
            **inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=num_logits, return_dict=True
        )
        self.num_read = ids.size(1)
        return output.logits[0, -num_logits:]

    def keep(self, num_tokens: int) -> None:
        """Crop the cache to the first `num_tokens` tokens."""
        num_extra = max(0, self.num_read - num_tokens)
        if num_extra and not self.cache.is_croppable:
            raise ValueError(
                f"The patient's cache must be croppable. Got a {type(self.cache).__name__}; decode without "
                "speculation."
            )
        self.cache.crop(-num_extra)  # needed at 0 as well, to shrink windows
        self.num_read -= num_extra


def _read_drafts(model: PreTrainedModel, text: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Read a prompt, then drafts, reject some of them, and read more drafts."""
    reader = _PatientReader(model, {"past_key_values": DynamicCache(config=model.config)})
    yield reader.logits(text[None, :6], 1), [5]
    yield reader.logits(text[None, :10], 4), [*range(6, 10)]
    reader.keep(8)
    yield reader.logits(text[None, :13], 5), [*range(8, 13)]
