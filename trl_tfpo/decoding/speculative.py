# SPDX-License-Identifier: Apache-2.0

r"""
Guided decoding in fewer forward passes of the patient: the doctor drafts, the patient checks.

A doctor is small, and it guides: the guided policy is drawn towards what it says. So it is a good drafter of the very
text that it steers. It drafts a few tokens, the patient reads them all in one forward pass, and at each position the
guided distribution is formed and the draft accepted or replaced so that what comes out follows that distribution
exactly (speculative sampling, https://huggingface.co/papers/2211.17192; greedy search gives the same tokens).

Shapes: one row, L tokens so far, k drafted tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

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

from ..common._upstream import unwrap_peft
from .logits_processor import DoctorGuidedLogitsProcessor
from .reading import accepted_inputs, next_inputs, reading_fault


MAX_DRAFT_TOKENS = 8
POSITION_COST = 0.05  # of a drafted token beside the doctors, in steps of the patient; measured
MIN_CONFIDENCE = 0.4  # in all drafted tokens together, below which a further one is not worth its step
STATEFUL_PROCESSORS = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


@torch.no_grad()
def speculative_guided_generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_draft_tokens: int | Literal["auto"] = "auto",
    draft_cost: float | None = None,
    verify_cost: float | None = None,
    token_callback: Callable[[torch.LongTensor], None] | None = None,
    statistics: dict[str, int] | None = None,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """
    Greedy search or sampling from the guided policy, drafted by its doctors.

    A `custom_generate` for `patient.generate`, which prepares all arguments but the named ones below:
    `patient.generate(**inputs, logits_processor=[guide], custom_generate=speculative_guided_generate)`. All doctors
    draft together: the tokens of the guided policy, if the patient agreed with them. For the same seed the samples
    differ from those of plain guided decoding; their distribution does not.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient.
        input_ids (`torch.LongTensor` of shape `(1, L)`):
            The prompt. One row.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            With one [`DoctorGuidedLogitsProcessor`] among them.
        stopping_criteria ([`~transformers.StoppingCriteriaList`]):
            Asked after every token.
        generation_config ([`~transformers.GenerationConfig`]):
            `do_sample`, `return_dict_in_generate`, `output_scores` and `output_logits` count here.
        num_draft_tokens (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Tokens drafted between two forward passes of the patient. `"auto"` follows the rate of acceptance, from 0
            (plain guided decoding) to 8; greedy search also stops drafting where the doctors become unsure.
        draft_cost (`float`, *optional*):
            For `"auto"`: time of the doctors' step in units of the patient's. By default the mean of their ratios
            of parameters and of layers, as small models are bound by their layers.
        verify_cost (`float`, *optional*):
            For `"auto"`: time that a forward pass of the patient over several positions takes more than its step, in
            units of that step. By default 0.5 in float32 on a CPU, where it is not bound by memory, and 0.1 elsewhere.
        token_callback (callable, *optional*):
            Called with each token, shape `(1,)`, as it is decided; for example the `put` of a streamer, as `generate`
            does not hand its `streamer` to a `custom_generate`.
        statistics (`dict`, *optional*):
            Counters are added to it: `num_tokens`, `num_patient_forwards`, `num_drafted`, `num_accepted`.
        **model_kwargs:
            Mask and cache, as `generate` prepares them.

    Returns:
        `torch.LongTensor` of shape `(1, L + T)`, or with `return_dict_in_generate` a
        [`~transformers.generation.GenerateDecoderOnlyOutput`].

    Raises:
        `ValueError`: on several rows, beams, no or several guides, processors that keep a state from token to token, a
            patient whose cache cannot be cut back.
    """
    guide = _find_guide(logits_processor)
    if input_ids.size(0) != 1 or generation_config.num_beams > 1:
        raise ValueError(
            "Speculative decoding takes one prompt, one sequence and no beams. Got "
            f"{input_ids.size(0)} rows and {generation_config.num_beams} beams; decode the prompts one by one, or "
            "without speculation."
        )
    for processor in logits_processor:
        if isinstance(processor, STATEFUL_PROCESSORS):
            raise ValueError(
                "Speculative decoding asks processors about drafts that may be taken back. Got "
                f"{type(processor).__name__}, which counts on one call for each token; decode without speculation."
            )
    if num_draft_tokens != "auto" and not (isinstance(num_draft_tokens, int) and 0 <= num_draft_tokens < 32):
        raise ValueError(f"`num_draft_tokens` must be 'auto' or from 0 to 31. Got {num_draft_tokens!r}; try 4.")
    patient = _Reader(model, **model_kwargs)
    if fault := reading_fault(model, "speculation", partial(_read_drafts, model)):
        raise ValueError(
            "Speculative decoding reads several tokens at once and cuts the patient's cache back. Got "
            f"{type(unwrap_peft(model)).__name__}, which cannot be read so ({fault}); decode without speculation."
        )
    pace = None
    if num_draft_tokens == "auto":
        pace = _Pace(
            draft_cost=_default_draft_cost(guide, model) if draft_cost is None else draft_cost,
            verify_cost=_default_verify_cost(model) if verify_cost is None else verify_cost,
        )
    vocab_size = model.config.get_text_config().vocab_size
    max_length = generation_config.max_length
    pick = _sample if generation_config.do_sample else _take_likeliest
    counts = dict.fromkeys(("num_tokens", "num_patient_forwards", "num_drafted", "num_accepted"), 0)
    scores, raw_logits = [], []

    def draft_distribution(ids):
        return pick.distribution(logits_processor(ids, guide.draft_logits(ids, vocab_size)))

    ids, is_done = input_ids, False
    while not is_done:
        # The doctors draft
        num_drafts = num_draft_tokens if pace is None else pace.num_draft_tokens()
        num_drafts = max(0, min(num_drafts, max_length - ids.size(1) - 1))
        drafted, drafts = ids, []
        confidence = 1.0
        while len(drafts) < num_drafts and (pace is None or confidence > MIN_CONFIDENCE):
            drafts.append(draft_distribution(drafted))
            drafted = torch.cat([drafted, pick.token(drafts[-1])[:, None]], dim=1)
            confidence *= pick.confidence(drafts[-1])
        num_drafts = len(drafts)
        # The patient reads it all
        logits = patient.logits(drafted, num_drafts + 1)  # (k + 1, V)
        counts["num_patient_forwards"] += 1
        counts["num_drafted"] += num_drafts
        # Draft by draft, the guided distribution decides
        for index in range(num_drafts + 1):
            raw = logits[index : index + 1].to(copy=True, dtype=torch.float32, device=ids.device)
            guided = logits_processor(ids, raw)
            target = pick.distribution(guided)
            if index < num_drafts:
                if pace is not None:
                    pace.saw(pick.agreement(target, drafts[index]))
                token, is_accepted = pick.verify(target, drafts[index], drafted[:, ids.size(1)])
            else:
                if pace is not None and num_drafts == 0 and pace.is_curious():
                    pace.saw(pick.agreement(target, draft_distribution(ids)))
                token, is_accepted = pick.token(target), False
            ids = torch.cat([ids, token[:, None]], dim=1)
            counts["num_tokens"] += 1
            counts["num_accepted"] += is_accepted
            if generation_config.output_scores:
                scores.append(guided)
            if generation_config.output_logits:
                raw_logits.append(raw)
            if token_callback is not None:
                token_callback(token.cpu())
            is_done = bool(stopping_criteria(ids, guided).all())
            if is_done or not is_accepted:
                break
        patient.keep(ids.size(1) - 1)  # the last token is decided, and not yet read
    if statistics is not None:
        for name, count in counts.items():
            statistics[name] = statistics.get(name, 0) + count
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=tuple(scores) if generation_config.output_scores else None,
        logits=tuple(raw_logits) if generation_config.output_logits else None,
        past_key_values=patient.cache,
    )


class _Reader:
    """The patient and its cache: logits of several positions in one forward pass."""

    def __init__(self, model, *, past_key_values=None, attention_mask=None, use_cache=True, **others):
        known = {"position_ids", "logits_to_keep", "cache_position", "token_type_ids"}
        unknown = {name for name, value in others.items() if value is not None and name not in known}
        if not isinstance(past_key_values, DynamicCache) or not use_cache or unknown:
            raise ValueError(
                "Speculative decoding needs a patient that reads text, with a dynamic KV cache. Got a cache of type "
                f"{type(past_key_values).__name__}, `use_cache={use_cache}` and the inputs {sorted(unknown)}; decode "
                "without speculation."
            )
        self.model, self.cache = model, past_key_values
        self.cache.activate_past_recording()  # of layers with a window, so that they can be cut back
        self.num_read = self.cache.get_seq_length()
        self.accepted = accepted_inputs(model)
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        self.attention_mask = attention_mask

    def logits(self, ids: torch.LongTensor, num_logits: int) -> torch.Tensor:
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
        """Forget all but the first tokens."""
        num_extra = max(0, self.num_read - num_tokens)
        if num_extra and not self.cache.is_croppable:
            raise ValueError(f"A {type(self.cache).__name__} cannot be cut.")
        self.cache.crop(-num_extra)  # also with nothing to cut, so that windows shrink
        self.num_read -= num_extra


def _read_drafts(model: PreTrainedModel, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """A prompt, drafts of which some are taken back, and more drafts."""
    reader = _Reader(model, past_key_values=DynamicCache(config=model.config))
    yield reader.logits(text[None, :6], 1), [5]
    yield reader.logits(text[None, :10], 4), [*range(6, 10)]
    reader.keep(8)
    yield reader.logits(text[None, :13], 5), [*range(8, 13)]


class _sample:
    """Speculative sampling. A distribution is a tensor of probabilities (1, V)."""

    @staticmethod
    def distribution(scores):
        return scores.softmax(dim=-1)

    @staticmethod
    def token(probs):
        return torch.multinomial(probs, num_samples=1)[:, 0]

    @staticmethod
    def agreement(target, draft) -> float:
        """Probability that a draft is accepted."""
        return torch.minimum(target, draft).sum().item()

    @staticmethod
    def confidence(probs) -> float:
        """Of acceptance, by the draft alone: it tells nothing, for two distributions may agree on an open question."""
        return 1.0

    @staticmethod
    def verify(target, draft, token) -> tuple[torch.LongTensor, bool]:
        """The drafted token with probability `min(1, target / draft)`, else one from what the draft falls short of."""
        index = token[:, None]
        if torch.rand((), device=target.device) * draft.gather(1, index) < target.gather(1, index):
            return token, True
        rest = (target - draft).clamp(min=0)
        return _sample.token(rest if rest.sum() > 0 else target), False  # no rest but rounding: both are the same


class _take_likeliest:
    """Greedy search. A distribution is the scores (1, V), of which the maximum counts."""

    @staticmethod
    def distribution(scores):
        return scores

    @staticmethod
    def token(scores):
        return scores.argmax(dim=-1)

    @staticmethod
    def agreement(target, draft) -> float:
        return float(target.argmax() == draft.argmax())

    @staticmethod
    def confidence(scores) -> float:
        """Of acceptance, by the draft alone: the probability of its likeliest token."""
        return scores.softmax(dim=-1).amax().item()

    @staticmethod
    def verify(target, draft, token) -> tuple[torch.LongTensor, bool]:
        best = target.argmax(dim=-1)
        return best, bool(best == token)


class _Pace:
    r"""
    How many tokens to draft: the number that gives most tokens for the time.

    With a rate of acceptance $a$ a round of $k$ drafts gives $1 + a + \dots + a^k$ tokens. It costs a step of the
    patient, `verify_cost` more if it has several positions (how many hardly matters while they are few), and for each
    draft a step of the doctors and some bookkeeping; one more step of the doctors if all are accepted. The rate is seen
    at every position that both have read, so it goes on being seen when nothing is drafted. No clock is read, so that
    the same seed gives the same text.
    """

    def __init__(self, draft_cost: float, verify_cost: float):
        self.draft_cost, self.verify_cost = draft_cost, verify_cost
        self.num_agreed, self.num_seen = 0.5, 1.0  # where nothing has been seen, soon forgotten
        self.num_plain = 0

    def saw(self, agreement: float) -> None:
        self.num_agreed = 0.98 * self.num_agreed + agreement
        self.num_seen = 0.98 * self.num_seen + 1

    def is_curious(self) -> bool:
        """Whether to look what would have been drafted; now and then is enough."""
        self.num_plain += 1
        return self.num_plain % 4 == 1

    def num_draft_tokens(self) -> int:
        rate = self.num_agreed / self.num_seen

        def tokens_for_time(num_drafts):
            num_tokens = sum(rate**i for i in range(num_drafts + 1))
            time = 1 + self.verify_cost * (num_drafts > 0) + POSITION_COST * num_drafts
            return num_tokens / (time + self.draft_cost * (num_drafts + rate**num_drafts))

        return max(range(MAX_DRAFT_TOKENS + 1), key=tokens_for_time)


def _find_guide(logits_processor: LogitsProcessorList) -> DoctorGuidedLogitsProcessor:
    guides = [processor for processor in logits_processor if isinstance(processor, DoctorGuidedLogitsProcessor)]
    if len(guides) != 1:
        raise ValueError(
            f"There must be one `DoctorGuidedLogitsProcessor` among the processors. Got {len(guides)}; for several "
            "doctors give one processor a list of them."
        )
    return guides[0]


def _default_draft_cost(guide: DoctorGuidedLogitsProcessor, patient: PreTrainedModel) -> float:
    """Time of all doctors in units of the patient's, between the ratios of parameters and of layers."""

    def sizes(model):
        return unwrap_peft(model).num_parameters(), model.config.get_text_config().num_hidden_layers

    doctors = [sizes(doctor.model) for doctor in guide.doctors]
    return sum(part / whole for doctor in doctors for part, whole in zip(doctor, sizes(patient), strict=True)) / 2


def _default_verify_cost(patient: PreTrainedModel) -> float:
    return 0.5 if patient.device.type == "cpu" and patient.dtype == torch.float32 else 0.1
