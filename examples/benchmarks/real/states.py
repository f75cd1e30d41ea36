# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

r"""
Answers of a patient with the hidden states behind them, read once and kept; and doctors that are maps of these states.

A *doctor on states* has no forward pass of its own: its logits are $e_y^\top (M h_s + b)$, where $h_s$ is the patient's last
hidden state and $e$ are its vocabulary embeddings. It is trained from the kept states in less than a minute on a CPU, so that
objectives and rewards can be compared on equal terms, each with a grid of settings and several seeds.

The normalizer of a guided policy is a sum over the vocabulary. It is estimated from the patient's 128 likeliest tokens, exactly,
and 64 samples of the others, which are weighted by the probability that is left.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_tfpo.atomic import written_whole
from trl_tfpo.faces import apply_face
from trl_tfpo.functional import subtb_loss
from trl_tfpo.progress import Progress


NUM_TOP, NUM_TAIL = 128, 64


@dataclass
class Answer:
    """
    One answer of T tokens.

    Args:
        ids (`torch.Tensor` of shape `(T,)`):
            Its tokens.
        states (`torch.Tensor` of shape `(T + 1, H)`):
            The patient's last hidden states: where each token is predicted, and after the last.
        candidates (`torch.Tensor` of shape `(T, C)`):
            Tokens that stand for the vocabulary.
        log_weights (`torch.Tensor` of shape `(T, C)`):
            Log of the probability that each stands for.
        ends (`bool`):
            Whether the last token is EOS.
        faces (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            Gaps of the faces, by task: of the tokens `(T,)`, and of the candidates `(T, C)`, in nats.
    """

    ids: torch.Tensor
    states: torch.Tensor
    candidates: torch.Tensor
    log_weights: torch.Tensor
    ends: bool
    faces: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


# Reading


class Reader:
    """
    Reads answers under prompts. What a prompt has in common with the one before it passes the model once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient: logits are the product of its last hidden states with its head.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        eos_token_id (`int`):
            What ends an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_id: int):
        self.model, self.tokenizer, self.eos_token_id = model, tokenizer, eos_token_id
        self._last, self._cache = [], None  # the prompt that was read before, and its keys and values

    def _render(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    @torch.inference_mode()
    def states(self, messages: list[dict], completions: Sequence[list[int]]) -> list[torch.Tensor]:
        """Last hidden states `(T_i + 1, H)` of each completion."""
        prompt, cache = self._render(messages), None
        pairs = enumerate(zip(prompt[:-1], self._last, strict=False))
        num_shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt) - 1, len(self._last)))
        if num_shared:
            cache = copy.deepcopy(self._cache)
            cache.crop(num_shared - len(self._last))  # tokens to remove, as a negative number
        read = self.model.base_model(
            input_ids=torch.tensor([prompt[num_shared:]]), past_key_values=cache, use_cache=True
        )
        self._last, self._cache = prompt, copy.deepcopy(read.past_key_values)
        read.past_key_values.batch_repeat_interleave(len(completions))
        ids = pad_sequence([torch.tensor(x) for x in completions], batch_first=True)
        mask = torch.ones(len(ids), len(prompt) + ids.size(1), dtype=torch.long)
        hidden = self.model.base_model(
            input_ids=ids, past_key_values=read.past_key_values, attention_mask=mask
        ).last_hidden_state
        hidden = torch.cat([read.last_hidden_state[:, -1:].expand(len(ids), -1, -1), hidden], dim=1)
        return [row[: len(x) + 1].clone() for row, x in zip(hidden, completions, strict=True)]

    @torch.inference_mode()
    def answers(
        self, messages: list[dict], completions: Sequence[list[int]], generator: torch.Generator
    ) -> list[Answer]:
        """The completions with what the patient says of them under the prompt alone."""
        answers = []
        for ids, states in zip(completions, self.states(messages, completions), strict=True):
            logps = self.model.lm_head(states[:-1]).log_softmax(dim=-1)  # (T, V)
            top, likeliest = logps.topk(min(NUM_TOP, logps.size(1)))
            rest = logps.exp().scatter(1, likeliest, 0.0)
            left = rest.sum(dim=1, keepdim=True).clamp(min=1e-9)
            sampled = torch.multinomial(rest + 1e-30, NUM_TAIL, replacement=True, generator=generator)
            weights = torch.cat([top, (left / NUM_TAIL).log().expand(-1, NUM_TAIL)], dim=1)
            candidates = torch.cat([likeliest, sampled], dim=1).int()
            answers.append(Answer(torch.tensor(ids), states, candidates, weights, ids[-1] == self.eos_token_id))
        return answers

    @torch.inference_mode()
    def read_faces(self, messages: list[dict], answers: list[Answer], task) -> None:
        """Add the gaps of a task's faces, in place."""
        ids, found = [answer.ids.tolist() for answer in answers], []
        for instruction in (task.faces.positive, task.faces.negative):
            faced = apply_face(messages, instruction, placement=task.faces.placement)
            found.append([self.model.lm_head(x[:-1]).log_softmax(dim=-1) for x in self.states(faced, ids)])
        for answer, positive, negative in zip(answers, *found, strict=True):
            gaps = positive - negative  # (T, V)
            own = gaps.gather(1, answer.ids[:, None])[:, 0]
            answer.faces[task.name] = own, gaps.gather(1, answer.candidates.long()).half()


def read_all(
    reader: Reader,
    prompts: Sequence[list[dict]],
    completions: Sequence[Sequence[list[int]]],
    tasks: Iterable,
    folder: Path,
    split: str,
    prompts_per_piece: int = 8,
) -> list[list[Answer]]:
    """The answers to each prompt. Pieces are files of their own, so a run that was stopped goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    groups, firsts = [], range(0, len(prompts), prompts_per_piece)
    with Progress(len(prompts), f"Reading {split}", "prompts") as progress:
        for first in firsts:
            path = folder / f"{split}-{first:05d}-{'-'.join(task.name for task in tasks) or 'no-faces'}.pt"
            if not path.is_file():
                piece, generator = [], torch.Generator().manual_seed(first)
                for messages, ids in list(zip(prompts, completions, strict=True))[first : first + prompts_per_piece]:
                    answers = reader.answers(messages, ids, generator)
                    for task in tasks:
                        reader.read_faces(messages, answers, task)
                    piece.append([vars(answer) for answer in answers])
                with written_whole(path) as part:
                    torch.save(piece, part)
            groups += [[Answer(**answer) for answer in answers] for answers in torch.load(path)]
            progress.update(min(prompts_per_piece, len(prompts) - first))
    return groups


# Doctors


class Doctor(torch.nn.Module):
    """
    Logits `embeddings @ (M h + b)` from a patient's hidden states h, and the value of a state; both start at zero.

    Args:
        embeddings (`torch.Tensor` of shape `(V, H)`):
            The patient's head.
        mean, scale (`torch.Tensor` of shape `(H,)`):
            Of the hidden states; M sees them standardized to a mean square norm of 24.
    """

    def __init__(self, embeddings: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        size = embeddings.size(1)
        self.embeddings, self.mean, self.scale = embeddings, mean, scale
        self.map = torch.nn.Parameter(torch.zeros(size, size))
        self.bias = torch.nn.Parameter(torch.zeros(size))
        self.value = torch.nn.Linear(size, 1)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def standardized(self, states: torch.Tensor) -> torch.Tensor:
        return (states - self.mean) / self.scale

    def guidance(self, states: torch.Tensor, answer_ids: torch.Tensor, candidates: torch.Tensor):
        """Logits of the tokens (N,) and of the candidates (N, C) at N standardized states."""
        direction = states @ self.map.T + self.bias  # (N, H)
        own = (self.embeddings[answer_ids] * direction).sum(dim=1)
        return own, (self.embeddings[candidates.long()] @ direction[..., None]).squeeze(-1)


def new_doctor(embeddings: torch.Tensor, groups: Sequence[Sequence[Answer]]) -> Doctor:
    """An untrained doctor for the states of these answers."""
    states = torch.cat([answer.states[:-1] for group in groups for answer in group])
    return Doctor(embeddings, states.mean(dim=0), states.std(dim=0) * math.sqrt(states.size(1)))


@dataclass
class Batch:
    """Answers of B rows and N tokens together: log-ratios of the guided policy to the patient, and values, (B, T) and (B, S)."""

    log_ratios: torch.Tensor
    log_values: torch.Tensor
    mask: torch.Tensor


def forward(doctor: Doctor, answers: Sequence[Answer]) -> Batch:
    lengths = [len(answer.ids) for answer in answers]
    states = doctor.standardized(torch.cat([answer.states for answer in answers]))  # (N + B, H)
    is_last = torch.zeros(len(states), dtype=torch.bool)
    is_last[torch.tensor(lengths).add(1).cumsum(0) - 1] = True
    ids, candidates = (torch.cat([getattr(answer, name) for answer in answers]) for name in ("ids", "candidates"))
    log_weights = torch.cat([answer.log_weights for answer in answers])
    own, others = doctor.guidance(states[~is_last], ids, candidates)
    log_z = (others + log_weights).logsumexp(dim=1) - log_weights.logsumexp(dim=1)
    values = doctor.value(states)[:, 0].split([n + 1 for n in lengths])
    values = [torch.cat([v[:-1], v[-1:] * (not answer.ends)]) for v, answer in zip(values, answers, strict=True)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ratios = pad_sequence((own - log_z).split(lengths), batch_first=True)
    return Batch(ratios, pad_sequence(values, batch_first=True), mask)


def train(
    doctor: Doctor,
    pairs: Sequence[tuple[Answer, Answer]],
    loss: Callable[[Doctor, Sequence[Answer], Sequence[Answer], torch.Tensor], torch.Tensor],
    *,
    epochs: int,
    learning_rate: float,
    map_rate: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Doctor:
    """AdamW with a cosine schedule; the value learns ten times as fast, the map `map_rate` times."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [doctor.map], "lr": learning_rate * map_rate},
            {"params": [doctor.bias], "lr": learning_rate},
            {"params": doctor.value.parameters(), "lr": 10 * learning_rate},
        ],
        weight_decay=0.0,
    )
    num_steps, generator = epochs * (len(pairs) // batch_size), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / num_steps)) / 2)
    for _ in range(epochs):
        for some in torch.randperm(len(pairs), generator=generator).split(batch_size):
            if len(some) < batch_size:
                continue
            chosen, rejected = zip(*(pairs[i] for i in some.tolist()), strict=True)
            optimizer.zero_grad()
            loss(doctor, chosen, rejected, some).backward()
            torch.nn.utils.clip_grad_norm_(doctor.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return doctor.eval()


def flow_loss(rewards: Callable[[Answer], torch.Tensor], *, reward_temperature: float, subtb_lambda: float):
    """Sub-trajectory balance of the guided policy, with the patient as the reference."""

    def loss(doctor, chosen, rejected, _):
        answers = [*chosen, *rejected]
        batch = forward(doctor, answers)
        given = pad_sequence([rewards(answer) for answer in answers], batch_first=True) / reward_temperature
        gains = (given - batch.log_ratios).masked_fill(~batch.mask, 0).cumsum(dim=1)
        potential = F.pad(gains, (1, 0)) + batch.log_values
        return subtb_loss(potential=potential, completion_mask=batch.mask, subtb_lambda=subtb_lambda).mean()

    return loss


def dpo_loss(*, beta: float):
    """Direct preference optimization of the guided policy, with the patient as the reference."""

    def loss(doctor, chosen, rejected, _):
        batch = forward(doctor, [*chosen, *rejected])
        a, b = batch.log_ratios.masked_fill(~batch.mask, 0).sum(dim=1).chunk(2)
        return -F.logsigmoid(beta * (a - b)).mean()

    return loss


# Measuring


@dataclass(frozen=True)
class Guided:
    """A guided policy on the patient's samples: weights, KL in nats, (P, N), and expectations follow from them."""

    weights: torch.Tensor
    kl: torch.Tensor


@torch.no_grad()
def logits_on(doctor: Doctor, groups: Sequence[Sequence[Answer]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits of the tokens and the candidates of each answer, at strength 1."""
    return [
        [doctor.guidance(doctor.standardized(a.states[:-1]), a.ids, a.candidates) for a in group] for group in groups
    ]


@torch.no_grad()
def weigh(groups: Sequence[Sequence[Answer]], logits: list, strength: float) -> Guided:
    """The samples of P prompts, N each, importance-weighted for the patient guided at a strength."""
    log_weights, kls = [], []
    for group, said in zip(groups, logits, strict=True):
        for answer, (own, others) in zip(group, said, strict=True):
            tilted = strength * others.float() + answer.log_weights
            log_z = tilted.logsumexp(dim=1) - answer.log_weights.logsumexp(dim=1)
            log_weights.append((strength * own - log_z).sum())
            kls.append(((tilted.softmax(dim=1) * strength * others.float()).sum(dim=1) - log_z).sum())
    shape = len(groups), -1
    return Guided(torch.stack(log_weights).double().view(shape).softmax(dim=1), torch.stack(kls).double().view(shape))


@torch.inference_mode()
def logits_of(
    model: PreTrainedModel, reader: Reader, prompts: Sequence[list[dict]], groups: Sequence[Sequence[Answer]]
):
    """What [`logits_on`] gives, of a doctor that is a model: it reads the prompts and the answers itself."""
    own_reader, said = Reader(model, reader.tokenizer, reader.eos_token_id), []
    for messages, group in zip(prompts, groups, strict=True):
        states = own_reader.states(messages, [answer.ids.tolist() for answer in group])
        logits = [model.lm_head(x[:-1]) for x in states]  # (T, V)
        said.append(
            [
                (x.gather(1, answer.ids[:, None])[:, 0], x.gather(1, answer.candidates.long()))
                for x, answer in zip(logits, group, strict=True)
            ]
        )
    return said
