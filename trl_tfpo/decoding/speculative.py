# SPDX-License-Identifier: Apache-2.0

r"""
Guided decoding in fewer forward passes of the patient: the doctors draft, the patient verifies.

The guided policy follows the doctors, so they are good drafters for it. They draft a few tokens, and the patient reads
all of them in one forward pass. At each position the draft is accepted or replaced according to the guided
distribution, so that the samples follow exactly that distribution (speculative sampling,
https://huggingface.co/papers/2211.17192). Greedy search gives the same tokens.

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

from ..common.language_model import LanguageModel, unwrap_peft
from .logits_processor import DoctorGuidedLogitsProcessor
from .reading import accepted_inputs, next_inputs, reading_fault


MAX_DRAFT_TOKENS = 8
POSITION_COST = 0.05  # measured time of a drafted token without the doctors, in steps of the patient
MIN_CONFIDENCE = 0.4  # in all drafted tokens together; below it drafting stops
STATEFUL_PROCESSORS = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


@torch.no_grad()
def speculative_guided_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_draft_tokens: int | Literal["auto"] = "auto",
    token_callback: Callable[[torch.Tensor], None] | None = None,
    statistics: dict[str, int] | None = None,
    **model_kwargs: object,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """
    Greedy search or sampling from the guided policy, with drafts by its doctors.

    This is a `custom_generate` for `patient.generate`:
    `patient.generate(**inputs, logits_processor=[guide], custom_generate=speculative_guided_generate)`. `generate`
    prepares all arguments except `num_draft_tokens`, `token_callback` and `statistics`. With the same seed the samples
    differ from those of plain guided decoding, but they have the same distribution.

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
            `do_sample`, `return_dict_in_generate`, `output_scores` and `output_logits` are read here.
        num_draft_tokens (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Tokens drafted between two forward passes of the patient. `"auto"` adapts to the rate of acceptance, from 0
            (plain guided decoding) to 8. Greedy search also stops drafting where the doctors are not confident.
        token_callback (callable, *optional*):
            Called with each new token, of shape `(1,)`. An example is the `put` of a streamer, because `generate` does
            not pass its `streamer` to a `custom_generate`.
        statistics (`dict`, *optional*):
            Counters are added to it: `num_tokens`, `num_patient_forwards`, `num_drafted`, `num_accepted`.
        **model_kwargs:
            Mask and cache, as `generate` prepares them.

    Returns:
        `torch.LongTensor` of shape `(1, L + T)`, or with `return_dict_in_generate` a
        [`~transformers.generation.GenerateDecoderOnlyOutput`].

    Raises:
        `ValueError`: on several rows, beams, no or several guides, processors that keep a state from token to token,
            and a patient whose cache cannot be cut back.
    """
    guide = _find_guide(logits_processor)
    _check_settings(input_ids, logits_processor, generation_config, num_draft_tokens)
    patient = _PatientReader(model, model_kwargs)
    if fault := reading_fault(model, "speculation", partial(_read_drafts, model)):
        raise ValueError(
            "Speculative decoding reads several tokens at once and cuts the patient's cache back. Got "
            f"{type(unwrap_peft(model)).__name__}, which cannot be read like this ({fault}); decode without "
            "speculation."
        )
    rule = _Sampling if generation_config.do_sample else _GreedySearch
    drafter = _Drafter(guide, logits_processor, rule, model, num_draft_tokens)
    counts = dict.fromkeys(("num_tokens", "num_patient_forwards", "num_drafted", "num_accepted"), 0)
    text, is_done = _Text(input_ids, generation_config), False
    while not is_done:
        drafted_ids, drafts = drafter.draft(text.ids, generation_config.max_length - text.ids.size(1) - 1)
        logits = patient.logits(drafted_ids, len(drafts) + 1)  # (k + 1, V)
        counts["num_patient_forwards"] += 1
        counts["num_drafted"] += len(drafts)
        for index in range(len(drafts) + 1):
            raw = logits[index : index + 1].to(copy=True, dtype=torch.float32, device=text.ids.device)
            guided = logits_processor(text.ids, raw)  # type: ignore[arg-type]  # its ids are any `Tensor`
            target = rule.distribution(guided)
            if index < len(drafts):
                drafter.observe(target, drafts[index])
                token, is_accepted = rule.verify(target, drafts[index], drafted_ids[:, text.ids.size(1)])
            else:
                if not drafts:
                    drafter.observe_plain_step(target, text.ids)
                token, is_accepted = rule.token(target), False
            text.append(token, guided, raw)
            counts["num_tokens"] += 1
            counts["num_accepted"] += is_accepted
            if token_callback is not None:
                token_callback(token.cpu())
            is_done = bool(stopping_criteria(text.ids, guided).all())
            if is_done or not is_accepted:
                break
        patient.keep(text.ids.size(1) - 1)  # the last token has not been read yet
    if statistics is not None:
        for name, count in counts.items():
            statistics[name] = statistics.get(name, 0) + count
    return text.output(patient.cache)


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
    """The text so far, with the scores and logits that `generate` is asked to return."""

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
        self.cache.activate_past_recording()  # lets layers with a window be cut back
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
        """Cut the cache back to the first tokens."""
        num_extra = max(0, self.num_read - num_tokens)
        if num_extra and not self.cache.is_croppable:
            raise ValueError(f"A {type(self.cache).__name__} cannot be cut.")
        self.cache.crop(-num_extra)  # needed at 0 as well, to shrink windows
        self.num_read -= num_extra


def _read_drafts(model: PreTrainedModel, text: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Read a prompt, then drafts, reject some of them, and read more drafts."""
    reader = _PatientReader(model, {"past_key_values": DynamicCache(config=model.config)})
    yield reader.logits(text[None, :6], 1), [5]
    yield reader.logits(text[None, :10], 4), [*range(6, 10)]
    reader.keep(8)
    yield reader.logits(text[None, :13], 5), [*range(8, 13)]


class _Sampling:
    """Speculative sampling. A distribution is a tensor of probabilities (1, V)."""

    @staticmethod
    def distribution(scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(dim=-1)

    @staticmethod
    def token(probs: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(probs, num_samples=1)[:, 0]

    @staticmethod
    def agreement(target: torch.Tensor, draft: torch.Tensor) -> float:
        """Probability that a draft is accepted."""
        return torch.minimum(target, draft).sum().item()

    @staticmethod
    def confidence(probs: torch.Tensor) -> float:
        """Return 1: a flat draft does not make rejection likelier, because the target may be equally flat."""
        return 1.0

    @staticmethod
    def verify(target: torch.Tensor, draft: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Accept the token with probability `min(1, target / draft)`, else sample from `max(0, target - draft)`."""
        index = token[:, None]
        if torch.rand((), device=target.device) * draft.gather(1, index) < target.gather(1, index):
            return token, True
        rest = (target - draft).clamp(min=0)
        return _Sampling.token(rest if rest.sum() > 0 else target), False  # none left where both are equal


class _GreedySearch:
    """Greedy search. A distribution is a tensor of scores (1, V). Only its maximum matters."""

    @staticmethod
    def distribution(scores: torch.Tensor) -> torch.Tensor:
        return scores

    @staticmethod
    def token(scores: torch.Tensor) -> torch.Tensor:
        return scores.argmax(dim=-1)

    @staticmethod
    def agreement(target: torch.Tensor, draft: torch.Tensor) -> float:
        return float(target.argmax() == draft.argmax())

    @staticmethod
    def confidence(scores: torch.Tensor) -> float:
        """Probability of the likeliest token of the draft."""
        return scores.softmax(dim=-1).amax().item()

    @staticmethod
    def verify(target: torch.Tensor, draft: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, bool]:
        best = target.argmax(dim=-1)
        return best, bool(best == token)


class _Drafter:
    """
    Drafts tokens from the guided policy of a patient that agrees with the doctors.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            All processors, the guide among them.
        rule (`_Sampling` or `_GreedySearch`):
            How tokens are chosen.
        patient ([`~transformers.PreTrainedModel`]):
            The patient.
        num_tokens (`int` or `"auto"`):
            Tokens of a draft.
    """

    def __init__(
        self,
        guide: DoctorGuidedLogitsProcessor,
        logits_processor: LogitsProcessorList,
        rule: type[_Sampling] | type[_GreedySearch],
        patient: PreTrainedModel,
        num_tokens: int | Literal["auto"],
    ):
        self.guide, self.logits_processor, self.rule = guide, logits_processor, rule
        self.vocab_size = patient.config.get_text_config().vocab_size
        self.num_tokens = num_tokens if isinstance(num_tokens, int) else None
        self.length = _DraftLength.of(guide, patient)

    def distribution(self, ids: torch.Tensor) -> torch.Tensor:
        """The drafter's distribution (1, V) of the token after `ids` (1, L)."""
        logits = self.guide.draft_logits(ids, self.vocab_size)
        return self.rule.distribution(self.logits_processor(ids, logits))  # type: ignore[arg-type]

    def draft(self, ids: torch.Tensor, max_tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Extend `ids` (1, L) by at most `max_tokens`. Also returns the distribution (1, V) of each drafted token."""
        is_fixed = self.num_tokens is not None
        max_tokens = min(self.length.num_tokens() if self.num_tokens is None else self.num_tokens, max_tokens)
        drafts: list[torch.Tensor] = []
        confidence = 1.0
        while len(drafts) < max_tokens and (is_fixed or confidence > MIN_CONFIDENCE):
            drafts.append(self.distribution(ids))
            ids = torch.cat([ids, self.rule.token(drafts[-1])[:, None]], dim=1)
            confidence *= self.rule.confidence(drafts[-1])
        return ids, drafts

    def observe(self, target: torch.Tensor, draft: torch.Tensor) -> None:
        """Compare the guided distribution with that of a drafted token."""
        if self.num_tokens is None:
            self.length.observe(self.rule.agreement(target, draft))

    def observe_plain_step(self, target: torch.Tensor, ids: torch.Tensor) -> None:
        """Compare the guided distribution with what would have been drafted after `ids`. Skips most steps."""
        if self.num_tokens is None and self.length.is_check_due():
            self.length.observe(self.rule.agreement(target, self.distribution(ids)))


class _DraftLength:
    r"""
    The number of tokens to draft that gives most tokens per time.

    At a rate of acceptance $a$, a round of $k$ drafts gives $1 + a + \dots + a^k$ tokens. A round costs one step of
    the patient, and `verify_cost` more for any number of further positions. Each draft costs `draft_cost` and a
    constant. If all drafts are accepted, the doctors take one more step. The rate of acceptance is observed at every
    draft, and at every fourth position where nothing is drafted. It is never derived from a clock, so the same seed
    gives the same text.

    Args:
        draft_cost (`float`):
            Time of a step of all doctors, in steps of the patient.
        verify_cost (`float`):
            Time by which a forward pass over several positions exceeds a step, in steps of the patient.
    """

    def __init__(self, draft_cost: float, verify_cost: float):
        self.draft_cost, self.verify_cost = draft_cost, verify_cost
        self.num_agreed, self.num_observed = 0.5, 1.0  # the prior, which decays quickly
        self.num_plain_steps = 0

    @classmethod
    def of(cls, guide: DoctorGuidedLogitsProcessor, patient: PreTrainedModel) -> "_DraftLength":
        """
        Estimate the costs. That of a doctor follows from its parameters and layers as shares of the patient's, because
        layers bound the time of small models. That of verification depends on whether memory bounds the patient.
        """

        def sizes(model: LanguageModel) -> tuple[int, int]:
            return unwrap_peft(model).num_parameters(), model.config.get_text_config().num_hidden_layers

        doctors = [sizes(doctor.model) for doctor in guide.doctors]
        draft_cost = sum(part / whole for of in doctors for part, whole in zip(of, sizes(patient), strict=True)) / 2
        is_bound_by_memory = patient.device.type != "cpu" or patient.dtype != torch.float32
        return cls(draft_cost, verify_cost=0.1 if is_bound_by_memory else 0.5)

    def observe(self, agreement: float) -> None:
        """Update the rate of acceptance."""
        self.num_agreed = 0.98 * self.num_agreed + agreement
        self.num_observed = 0.98 * self.num_observed + 1

    def is_check_due(self) -> bool:
        """Whether to compare patient and draft at a position where nothing was drafted."""
        self.num_plain_steps += 1
        return self.num_plain_steps % 4 == 1

    def num_tokens(self) -> int:
        rate = self.num_agreed / self.num_observed

        def tokens_per_time(num_drafts: int) -> float:
            num_tokens = sum(rate**i for i in range(num_drafts + 1))
            time = 1 + self.verify_cost * (num_drafts > 0) + POSITION_COST * num_drafts
            return num_tokens / (time + self.draft_cost * (num_drafts + rate**num_drafts))

        return max(range(MAX_DRAFT_TOKENS + 1), key=tokens_per_time)
