# SPDX-License-Identifier: Apache-2.0

"""
A completion to be made, and how its next token is chosen.

Shapes: V vocabulary. The order is that of `generate`: `logit_bias` and penalties change the logits of the patient, guidance
comes next, then temperature, `top_k`, `top_p` and `min_p`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


BAN = -100.0  # a bias of this or less rules a token out, as in OpenAI's interface


@dataclass
class Generation:
    """
    A completion to be made.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        on_event (`Callable[[dict], None]`):
            Called from the engine's thread. First with `{"prompt"}` if `with_prompt`; then for each piece of text with
            `{"text", "tokens"}`; at last with `{"finish_reason", "num_tokens"}`: `"stop"`, `"length"`, `"timeout"`,
            `"cancelled"` or `"error"`. `prompt` and `tokens` are lists with the `id`, `logp` and `top` of each token, EOS
            included. `logp` is the log-probability in nats under the guided policy, before `logit_bias`, penalties,
            temperature and truncation; `None` for the first token of a prompt. `top` has the likeliest tokens, as
            `(id, logp)`.
        alpha (`float`, *optional*):
            Exponent of the patient; by default what the weights leave to it.
        weights (`Mapping[str, float]`, *optional*):
            Exponent of each doctor, by name; the server's default for those that are not there.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest completion in tokens. 0 is allowed with `with_prompt`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the log-probabilities of the guided policy; 0 is greedy search.
        top_p, top_k, min_p (*optional*):
            Truncation after temperature, as in `generate`; `1.0`, `0` and `0.0` switch them off.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Divides positive logits of the patient for tokens of prompt and completion, multiplies negative ones.
        presence_penalty, frequency_penalty (`float`, *optional*, defaults to `0.0`):
            Nats taken from the patient's logit of a token that the completion has: once, and for each time.
        logit_bias (`Mapping[int, float]`, *optional*):
            Nats added to the patient's logit of a token. -100 or less rules it out.
        stop (`Sequence[str]`, *optional*):
            Texts at which the completion ends; they are not part of it.
        seed (`int`, *optional*):
            Of the samples. By default they differ each time.
        num_top (`int`, *optional*, defaults to `0`):
            How many of the likeliest tokens an event has for each token.
        with_patient (`bool`, *optional*, defaults to `False`):
            Whether events have the `patient_logp` of each new token, too.
        with_prompt (`bool`, *optional*, defaults to `False`):
            Whether the tokens of the prompt are scored, too.
        continues_prompt (`bool`, *optional*, defaults to `False`):
            Whether the text goes on from that of the prompt, with the space between them, or begins anew.
    """

    prompt_ids: list[int]
    on_event: Callable[[dict], None]
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
    is_cancelled: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def changes_patient(self) -> bool:
        """Whether anything acts on the logits of the patient, before guidance."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def check(self, vocab_size: int) -> None:
        """Raise `ValueError` on settings that are out of range."""
        sampling = (self.temperature, self.top_p, self.max_new_tokens, self.num_top)
        fewest = 0 if self.with_prompt else 1
        if not (0 <= sampling[0] < math.inf and 0 < sampling[1] <= 1 and sampling[2] >= fewest and sampling[3] >= 0):
            raise ValueError(
                f"`temperature` must be at least 0, `top_p` in (0, 1], `max_new_tokens` at least {fewest} and `num_top` "
                f"at least 0. Got {sampling}; leave them out for the defaults."
            )
        truncation = (self.top_k, self.min_p, self.repetition_penalty)
        if not (truncation[0] >= 0 and 0 <= truncation[1] <= 1 and 0.01 <= truncation[2] < math.inf):
            raise ValueError(
                "`top_k` must be at least 0, `min_p` in [0, 1] and `repetition_penalty` at least 0.01. Got "
                f"{truncation}; leave them out for the defaults."
            )
        changes = [self.presence_penalty, self.frequency_penalty, *self.logit_bias.values()]
        if not all(map(math.isfinite, changes)):
            raise ValueError(f"Penalties and `logit_bias` must be finite. Got {changes}; try 0.5.")
        if unknown := [x for x in self.logit_bias if not 0 <= x < vocab_size]:
            raise ValueError(
                f"`logit_bias` must be for token ids from 0 to {vocab_size - 1}. Got {unknown[0]}; leave it out."
            )
        if sum(value <= BAN for value in self.logit_bias.values()) == vocab_size:
            raise ValueError(f"`logit_bias` must leave a token. Got {BAN} or less for all; leave one out.")


class Row:
    """A generation in progress: its tokens, and the text that may already be shown."""

    def __init__(self, generation: Generation, alpha: float, betas: list[float]):
        self.generation, self.alpha, self.betas = generation, alpha, betas
        self.ids: list[int] = []
        self.num_shown, self.held = 0, []  # characters sent, tokens not yet sent
        self.prompt, self.is_broken = [], False  # tokens of the prompt with their scores; whether one is NaN
        self.generator = torch.Generator()
        self.generator.manual_seed(generation.seed) if generation.seed is not None else self.generator.seed()
        bias = {x: -math.inf if value <= BAN else value for x, value in generation.logit_bias.items()}
        self.biased = torch.tensor(list(bias), dtype=torch.long)
        self.bias = torch.tensor(list(bias.values()))

    def change_patient(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V,) of the patient with bias and penalties."""
        generation = self.generation
        logits = logits.index_add(0, self.biased, self.bias.to(logits))
        if generation.repetition_penalty != 1:
            ids = torch.tensor([[*generation.prompt_ids, *self.ids]])
            logits = RepetitionPenaltyLogitsProcessor(generation.repetition_penalty)(ids, logits[None])[0]
        counts = Counter(self.ids)
        penalties = [generation.presence_penalty + generation.frequency_penalty * n for n in counts.values()]
        return logits.index_add(0, torch.tensor(list(counts), dtype=torch.long), -torch.tensor(penalties).to(logits))

    def sample(self, logps: torch.Tensor) -> int:
        """The next token, given the log-probabilities (V,) of the policy that is decoded."""
        generation = self.generation
        if generation.temperature == 0:
            return int(logps.argmax())
        smallest = torch.finfo(logps.dtype).tiny  # below, the likeliest token would be divided by zero
        scores = (logps - logps.max())[None] / max(generation.temperature, smallest)
        if generation.top_k:
            scores = TopKLogitsWarper(generation.top_k)(None, scores)
        if generation.top_p < 1:
            scores = TopPLogitsWarper(generation.top_p)(None, scores)
        if generation.min_p:
            scores = MinPLogitsWarper(generation.min_p)(None, scores)
        return int(scores.softmax(dim=-1).multinomial(1, generator=self.generator))
