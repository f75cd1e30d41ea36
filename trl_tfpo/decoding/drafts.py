# SPDX-License-Identifier: Apache-2.0

"""
Drafters: the doctors, another model, or the text itself.

A drafter proposes the next token, and states the *kind* of the proposal: a level of confidence. The rate of acceptance
is measured for each kind.

Shapes: one row, L tokens so far, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Hashable

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from ..common.language_model import LanguageModel, unwrap_peft
from .acceptance import GreedySearch
from .doctors import NO_ADAPTER, Doctor, DoctorMemory
from .logits_processor import DoctorGuidedLogitsProcessor
from .padding import PADDING


PROBABILITIES = (0.3, 0.6, 0.85, 0.97)  # of drafted tokens: bounds between the kinds of a model's drafts
MAX_NGRAM_SIZE = 3
MAX_NGRAMS = 2**17


class RecentLogits:
    """Logits of a doctor after the prefixes of one text. Each is computed once, although drafts are read twice."""

    def __init__(self, memory: DoctorMemory):
        self.memory = memory
        self.tokens: torch.Tensor | None = None
        self.logits: dict[int, torch.Tensor] = {}  # (1, V), by number of tokens

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.size(1)
        if self.tokens is not None and length in self.logits and torch.equal(tokens, self.tokens[:, :length]):
            return self.logits[length]
        if self.tokens is None or not torch.equal(tokens[:, :-1], self.tokens):
            self.logits = {}
        self.logits[length] = self.memory.logits(tokens)
        self.tokens = tokens
        return self.logits[length]


class Drafter(ABC):
    """
    Proposes tokens.

    Attributes:
        reads_doctors (`bool`): whether the doctors read a token when it is drafted. Otherwise they read it when it is
            checked.
        step_share (`float`): estimated time of a proposal without the time of the doctors, in steps of the patient.
    """

    reads_doctors = True
    step_share = 0.0

    def begin_round(self, ids: torch.Tensor) -> None:  # noqa: B027  # only some drafters need it
        """Receive the text so far (1, L)."""

    @abstractmethod
    def propose(self, ids: torch.Tensor) -> tuple[torch.Tensor, Hashable] | None:
        """
        Propose a token.

        Args:
            ids (`torch.LongTensor` of shape `(1, L)`):
                Text and drafts so far.

        Returns:
            `tuple`: the token, of shape `(1,)`, and its kind; `None` if there is no proposal.
        """


class ModelDrafts(Drafter):
    """
    Drafts from the guided policy, with a guess in place of the patient's logits.

    Args:
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guide. Drafts do not enter its trace.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            All processors, the guide among them.
        choice ([`GreedySearch`] or [`Sampling`]):
            How tokens are chosen.
        guess (callable):
            Maps ids `(1, L)` to a guess `(1, V)` of the patient's logits, or to `None`.
        step_share (`float`, *optional*, defaults to 0):
            Estimated time of a guess, in steps of the patient.
    """

    def __init__(
        self,
        guide: DoctorGuidedLogitsProcessor,
        logits_processor: LogitsProcessorList,
        choice: GreedySearch,
        guess: Callable[[torch.Tensor], torch.Tensor | None],
        step_share: float = 0.0,
    ):
        self.guide, self.logits_processor, self.choice = guide, logits_processor, choice
        self.guess, self.step_share = guess, step_share

    def propose(self, ids: torch.Tensor) -> tuple[torch.Tensor, Hashable] | None:
        logits = self.guess(ids)
        if logits is None:
            return None
        with self.guide.without_trace():
            scores = self.logits_processor(ids, logits)  # type: ignore[arg-type]  # its ids are any `Tensor`
        token = self.choice.token(scores, ids.size(1))
        probability = (scores[0, token] - scores.logsumexp(dim=-1)).exp().item()
        return token, bisect(PROBABILITIES, probability)


def guess_of_doctors(guide: DoctorGuidedLogitsProcessor, vocab_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that guesses the patient's logits from those of the doctors."""
    return lambda ids: guide.draft_logits(ids, vocab_size)


class Assistant:
    """
    A language model that guesses the patient's logits.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`Doctor`]):
            A causal language model with the patient's tokenizer, in eval mode.
        attention_mask (`torch.Tensor` of shape `(1, L)`, *optional*):
            Mask of the prompt.
        vocab_size (`int`):
            V of the patient.

    Raises:
        `ValueError`: for a model that [`Doctor`] refuses, and for a doctor of guided flow.
    """

    def __init__(self, model: "LanguageModel | Doctor", attention_mask: torch.Tensor | None, vocab_size: int):
        doctor = model if isinstance(model, Doctor) else Doctor(model)
        if doctor.exponents:
            raise ValueError(
                "`assistant_model` must be a language model. Got a doctor of guided flow, which is a ratio of two "
                "policies; pass the model that it was trained from."
            )
        self.memory, self.attention_mask, self.vocab_size = DoctorMemory(doctor), attention_mask, vocab_size
        self.recent = RecentLogits(self.memory)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor | None:
        num_known = self.memory.num_embeddings
        if ids.size(1) > self.memory.max_positions or (num_known < self.vocab_size and ids.max() >= num_known):
            return None
        tokens = ids.clone()
        if self.attention_mask is not None:
            is_padding = self.attention_mask.to(ids.device) == 0
            tokens[:, : is_padding.size(1)].masked_fill_(is_padding, PADDING)
        logits = self.recent(tokens)[:, : self.vocab_size].to(device=ids.device, dtype=torch.float32)
        return torch.nn.functional.pad(logits, (0, self.vocab_size - logits.size(1)), value=-math.inf)


class PromptLookup(Drafter):
    """
    Drafts the token that followed the last tokens at their latest occurrence, in this text or in earlier texts of the
    same models.

    Args:
        next_tokens (`dict[tuple[int, ...], int]`):
            The token that followed each sequence of tokens when it was last seen. Extended in place.
        max_ngram_size (`int`, *optional*, defaults to 3):
            Length of the longest sequence that is looked up. If it is not found, shorter sequences are looked up.
    """

    reads_doctors = False

    def __init__(self, next_tokens: dict[tuple[int, ...], int], max_ngram_size: int = MAX_NGRAM_SIZE):
        self.next_tokens, self.max_ngram_size = next_tokens, max_ngram_size
        self.text: list[int] = []

    def begin_round(self, ids: torch.Tensor) -> None:
        new = ids[0, len(self.text) :].tolist()
        for token in new:
            for size in range(1, min(self.max_ngram_size, len(self.text)) + 1):
                ngram = tuple(self.text[-size:])
                self.next_tokens.pop(ngram, None)  # moves it to the end
                self.next_tokens[ngram] = token
            self.text.append(token)
        while len(self.next_tokens) > MAX_NGRAMS:
            del self.next_tokens[next(iter(self.next_tokens))]

    def propose(self, ids: torch.Tensor) -> tuple[torch.Tensor, Hashable] | None:
        last = ids[0, -self.max_ngram_size :].tolist()
        for size in range(len(last), 0, -1):
            token = self.next_tokens.get(tuple(last[-size:]))
            if token is not None:
                return torch.tensor([token], device=ids.device), size
        return None


def share_of(model: LanguageModel, patient: PreTrainedModel) -> float:
    """
    Estimate the time of a step as a share of the patient's: the mean of the shares of parameters and layers. Layers
    count, because they limit the speed of small models.
    """

    def sizes(model: LanguageModel) -> tuple[int, int]:
        return unwrap_peft(model).num_parameters(), model.config.get_text_config().num_hidden_layers

    return sum(part / whole for part, whole in zip(sizes(model), sizes(patient), strict=True)) / 2


def without_adapter(guide: DoctorGuidedLogitsProcessor, patient: PreTrainedModel) -> Doctor | None:
    """
    Return the model under the first doctor of guided flow that is an adapter on a model other than the patient.

    Doctors with prompts of their own do not count. Without such a doctor, return `None`.
    """
    for doctor in guide.doctors:
        if doctor.exponents and doctor.adapters and doctor.prompt is None and not doctor.is_on(patient):
            return Doctor(doctor.model, adapter=NO_ADAPTER)
    return None
