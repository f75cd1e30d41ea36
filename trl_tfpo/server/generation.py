# SPDX-License-Identifier: Apache-2.0

"""
Requested completions: their settings, their events, and the sampling of their tokens.

The order of steps is that of `generate`: `logit_bias` and penalties on the patient's logits, guidance, temperature,
`top_k`, `top_p`, `min_p`.

Shapes: V vocabulary.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import torch
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


BAN = -100.0  # largest bias that rules a token out, as in OpenAI's API


class TokenScore(TypedDict):
    """
    A token and its log-probabilities in nats, before `logit_bias`, penalties, temperature and truncation.

    Keys:
        id (`int`):
            Id of the token.
        logp (`float` or `None`):
            Log-probability under the guided policy. `None` for the first token of a prompt.
        top (`list[tuple[int, float]]`):
            Ids of the likeliest tokens, and their log-probabilities under the guided policy.
        patient_logp (`float`):
            Log-probability under the patient alone. Present for new tokens if `with_patient`.
    """

    id: int
    logp: float | None
    top: list[tuple[int, float]]
    patient_logp: NotRequired[float]


class Event(TypedDict, total=False):
    """
    An event of a [`Generation`]. Each event has one of three sets of keys.

    Keys:
        prompt (`list[TokenScore]`):
            The tokens of the prompt. This is the first event if `with_prompt`.
        text (`str`), tokens (`list[TokenScore]`):
            A part of the completion, and the tokens sampled since the last part, EOS included.
        finish_reason (`str`), num_tokens (`int`):
            `"stop"`, `"length"`, `"timeout"`, `"cancelled"` or `"error"`, and the number of tokens of the completion.
            This is the last event.
    """

    prompt: list[TokenScore]
    text: str
    tokens: list[TokenScore]
    finish_reason: str
    num_tokens: int


@dataclass
class Generation:
    """
    A requested completion.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        on_event (`Callable[[Event], None]`):
            Function that receives the events of the completion, in the engine's thread.
        alpha (`float`, *optional*):
            Exponent of the patient. The default is 1 minus the exponents of the doctors that are language models.
        weights (`Mapping[str, float]`, *optional*):
            Exponents of doctors by name. Other doctors have the engine's defaults.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of tokens. 0 is allowed with `with_prompt`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the log-probabilities of the guided policy. 0 is greedy search.
        top_p, top_k, min_p (*optional*, default to `1.0`, `0` and `0.0`):
            Truncation after temperature, as in `generate`. The defaults switch it off.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Divisor of positive logits of the patient, and factor of negative ones, for tokens of prompt and
            completion.
        presence_penalty, frequency_penalty (`float`, *optional*, defaults to `0.0`):
            Nats subtracted from the patient's logits for tokens of the completion: `presence_penalty` once for each
            distinct token, `frequency_penalty` for each of its occurrences.
        logit_bias (`Mapping[int, float]`, *optional*):
            Nats added to the patient's logits, by token id. -100 or less rules a token out.
        stop (`Sequence[str]`, *optional*):
            Texts that end the completion, and are not part of it.
        seed (`int`, *optional*):
            Seed of the samples. Random by default.
        num_top (`int`, *optional*, defaults to `0`):
            Number of likeliest tokens to report for each token.
        with_patient (`bool`, *optional*, defaults to `False`):
            Whether to report `patient_logp` for each new token.
        with_prompt (`bool`, *optional*, defaults to `False`):
            Whether to score the tokens of the prompt.
        continues_prompt (`bool`, *optional*, defaults to `False`):
            Whether the text continues that of the prompt. It then includes the space between the two.
    """

    prompt_ids: list[int]
    on_event: Callable[[Event], None]
    alpha: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    seed: int | None = None
    num_top: int = 0
    with_patient: bool = False
    with_prompt: bool = False
    continues_prompt: bool = False
    is_cancelled: bool = False  # set it to cancel the completion
    started: float = field(default_factory=time.monotonic)

    @property
    def adjusts_patient(self) -> bool:
        """Whether a bias or penalty changes the patient's logits."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def check(self, vocab_size: int) -> None:
        """Raise `ValueError` on settings that are out of range."""
        fewest = 0 if self.with_prompt else 1
        for name, rule, is_valid in (
            ("temperature", "at least 0", 0 <= self.temperature < math.inf),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("top_k", "at least 0", self.top_k >= 0),
            ("min_p", "in [0, 1]", 0 <= self.min_p <= 1),
            ("repetition_penalty", "at least 0.01", 0.01 <= self.repetition_penalty < math.inf),
            ("max_new_tokens", f"at least {fewest}", self.max_new_tokens >= fewest),
            ("num_top", "at least 0", self.num_top >= 0),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {rule}. Got {getattr(self, name)}; leave it out for the default.")
        changes = [self.presence_penalty, self.frequency_penalty, *self.logit_bias.values()]
        if not all(map(math.isfinite, changes)):
            raise ValueError(f"Penalties and `logit_bias` must be finite. Got {changes}; try 0.5.")
        if unknown := [x for x in self.logit_bias if not 0 <= x < vocab_size]:
            raise ValueError(
                f"The keys of `logit_bias` must be ids from 0 to {vocab_size - 1}. Got {unknown[0]}; leave it out."
            )
        if sum(value <= BAN for value in self.logit_bias.values()) == vocab_size:
            raise ValueError(f"`logit_bias` must not rule out all tokens. Got {BAN} or less for all; leave one out.")


class Row:
    """A row of the batch: a generation in progress, with the exponents of patient and doctors."""

    def __init__(self, generation: Generation, alpha: float, betas: list[float]):
        self.generation, self.alpha, self.betas = generation, alpha, betas
        self.ids: list[int] = []
        self.num_sent = 0  # in characters
        self.unsent: list[TokenScore] = []
        self.prompt_scores: list[TokenScore] = []
        self.has_nan = False  # whether a score of the prompt is NaN
        self.generator = torch.Generator()
        if generation.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(generation.seed)
        bias = {x: -math.inf if value <= BAN else value for x, value in generation.logit_bias.items()}
        self.biased_ids = torch.tensor(list(bias), dtype=torch.long)
        self.bias = torch.tensor(list(bias.values()))

    def adjust_patient_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply bias and penalties to the patient's logits (V,)."""
        generation = self.generation
        logits = logits.index_add(0, self.biased_ids, self.bias.to(logits))
        if generation.repetition_penalty != 1:
            ids = torch.tensor([[*generation.prompt_ids, *self.ids]])
            logits = RepetitionPenaltyLogitsProcessor(generation.repetition_penalty)(ids, logits[None])[0]
        counts = Counter(self.ids)
        penalties = [generation.presence_penalty + generation.frequency_penalty * n for n in counts.values()]
        return logits.index_add(0, torch.tensor(list(counts), dtype=torch.long), -torch.tensor(penalties).to(logits))

    def sample(self, logps: torch.Tensor) -> int:
        """Sample the next token from log-probabilities (V,) with bias and penalties."""
        generation = self.generation
        if generation.temperature == 0:
            return int(logps.argmax())
        smallest = torch.finfo(logps.dtype).tiny  # a smaller temperature rounds to 0, and 0 / 0 is NaN
        scores = (logps - logps.max())[None] / max(generation.temperature, smallest)
        ids = torch.LongTensor()  # not read
        if generation.top_k:
            scores = TopKLogitsWarper(generation.top_k)(ids, scores)
        if generation.top_p < 1:
            scores = TopPLogitsWarper(generation.top_p)(ids, scores)
        if generation.min_p:
            scores = MinPLogitsWarper(generation.min_p)(ids, scores)
        return int(scores.softmax(dim=-1).multinomial(1, generator=self.generator))
