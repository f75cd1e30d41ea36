# SPDX-License-Identifier: Apache-2.0

r"""
Cached hidden states of a patient's answers, and doctors that are functions of these states.

A *doctor on states* has the logits $e_y^\top (M h_s + b)$, where $h_s$ is the patient's last hidden state and $e$ are
the embeddings of its head. It is trained on cached states in less than a minute on a CPU. Objectives and rewards can
therefore be compared with a grid of settings and several seeds for each.

The normalizer of a guided policy is a sum over the vocabulary. It is estimated from the patient's 128 likeliest
tokens, exactly, and 64 samples of the other tokens, weighted by the remaining probability.
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

from trl_tfpo.common.atomic import atomic_write
from trl_tfpo.common.progress import Progress
from trl_tfpo.faces import apply_face
from trl_tfpo.functional import flow_potential, log_prefix_scores, subtb_loss


NUM_TOP, NUM_TAIL = 128, 64


@dataclass
class Answer:
    """
    One answer of T tokens.

    Args:
        ids (`torch.Tensor` of shape `(T,)`):
            Token ids.
        states (`torch.Tensor` of shape `(T + 1, H)`):
            The patient's last hidden states: where each token is predicted, and after the last token.
        candidates (`torch.Tensor` of shape `(T, C)`):
            Tokens that represent the vocabulary.
        log_weights (`torch.Tensor` of shape `(T, C)`):
            Log of the probability that each candidate represents.
        ends (`bool`):
            Whether the last token is EOS.
        faces (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            Gaps of the faces in nats, by task: at the tokens `(T,)` and at the candidates `(T, C)`.
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
    Computes hidden states of answers after prompts. The common start of consecutive prompts is read once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient. Its logits must be the product of its last hidden states and its head.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        eos_token_id (`int`):
            Token that ends an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_id: int):
        self.model, self.tokenizer, self.eos_token_id = model, tokenizer, eos_token_id
        self._last, self._cache = [], None  # the previous prompt, with its keys and values

    def _render(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def states(self, messages: list[dict], completions: Sequence[list[int]]) -> list[torch.Tensor]:
        """Return the last hidden states `(T_i + 1, H)` of each completion."""
        return self.states_after(self._render(messages), completions)

    @torch.inference_mode()
    def states_after(self, prompt: list[int], completions: Sequence[list[int]]) -> list[torch.Tensor]:
        """Return the same as [`states`], after a prompt of at least one token."""
        cache = None
        pairs = enumerate(zip(prompt[:-1], self._last, strict=False))
        num_shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt) - 1, len(self._last)))
        if num_shared:
            cache = copy.deepcopy(self._cache)
            cache.crop(num_shared - len(self._last))  # a negative number is the number of tokens to remove
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
        """Return the completions as answers, without faces."""
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
        """Add the gaps of a task's faces to the answers."""
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
    """Return the answers to each prompt. Each piece is cached in a file, so a stopped run can be resumed."""
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
                with atomic_write(path) as part:
                    torch.save(piece, part)
            kept = [[Answer(**answer) for answer in answers] for answers in torch.load(path)]
            if [[answer.ids.tolist() for answer in group] for group in kept] != list(
                map(list, completions[first : first + prompts_per_piece])
            ):
                raise ValueError(
                    f"A file of states must belong to these samples. Got {str(path)!r} with other samples; delete the "
                    "folder, or use another `--cache` for another model."
                )
            groups += kept
            progress.update(min(prompts_per_piece, len(prompts) - first))
    return groups


# Doctors


class CandidateLogits(torch.autograd.Function):
    """
    `embeddings[candidates] @ directions`, (N, C), for candidates (N, C) and directions (N, H).

    The embeddings of all candidates would take gigabytes. The embeddings for one state fit in a processor's cache. The
    gradient is a weighted sum of embeddings, computed without copies.
    """

    @staticmethod
    def forward(ctx, directions: torch.Tensor, embeddings: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(embeddings, candidates)
        rows = embeddings.new_empty(candidates.size(1), embeddings.size(1))
        logits = embeddings.new_empty(candidates.shape)
        for state, (some, direction) in enumerate(zip(candidates, directions, strict=True)):
            torch.index_select(embeddings, 0, some, out=rows)
            torch.mv(rows, direction, out=logits[state])
        return logits

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        embeddings, candidates = ctx.saved_tensors
        return F.embedding_bag(candidates, embeddings, per_sample_weights=gradient, mode="sum"), None, None


class Doctor(torch.nn.Module):
    """
    Logits `embeddings @ (M h + b)` and log V of a patient's hidden states h. Both are zero before training.

    Args:
        embeddings (`torch.Tensor` of shape `(V, H)`):
            The patient's head.
        mean, scale (`torch.Tensor` of shape `(H,)`):
            Mean and scale by which the hidden states are standardized for M.

    Attributes:
        patient_weight (`float`):
            Factor of the patient's logits in the doctor's logits: 1 if the doctor is a language model, otherwise 0.
    """

    patient_weight = 0.0

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

    def directions(self, states: torch.Tensor) -> torch.Tensor:
        """Return vectors (N, H) at N states, whose products with the embeddings are the logits."""
        return self.standardized(states) @ self.map.T + self.bias + self.patient_weight * states

    def guidance(self, states: torch.Tensor, answer_ids: torch.Tensor, candidates: torch.Tensor):
        """Return logits of the tokens (N,) and of the candidates (N, C) at N states."""
        is_fixed = not (torch.is_grad_enabled() and self.map.requires_grad)
        if is_fixed and not self.patient_weight and not self.map.any():  # the same logits at every state
            logits = self.embeddings @ self.bias
            return logits[answer_ids], logits[candidates.long()]
        directions = self.directions(states)
        own = (self.embeddings[answer_ids] * directions).sum(dim=1)
        return own, CandidateLogits.apply(directions, self.embeddings, candidates)


def new_doctor(embeddings: torch.Tensor, groups: Sequence[Sequence[Answer]]) -> Doctor:
    """Return an untrained doctor for the states of these answers."""
    states = torch.cat([answer.states[:-1] for group in groups for answer in group])
    return Doctor(embeddings, states.mean(dim=0), states.std(dim=0) * math.sqrt(states.size(1)))


@dataclass
class Batch:
    """Log-ratios (B, T) of the guided policy to the patient, values (B, S), and mask (B, T) of B answers."""

    log_ratios: torch.Tensor
    log_values: torch.Tensor
    mask: torch.Tensor


def forward(doctor: Doctor, answers: Sequence[Answer]) -> Batch:
    lengths = [len(answer.ids) for answer in answers]
    states = torch.cat([answer.states for answer in answers])  # (N + B, H)
    is_last = torch.zeros(len(states), dtype=torch.bool)
    is_last[torch.tensor(lengths).add(1).cumsum(0) - 1] = True
    ids, candidates = (torch.cat([getattr(answer, name) for answer in answers]) for name in ("ids", "candidates"))
    log_weights = torch.cat([answer.log_weights for answer in answers])
    own, others = doctor.guidance(states[~is_last], ids, candidates)
    log_z = (others + log_weights).logsumexp(dim=1) - log_weights.logsumexp(dim=1)
    values = doctor.value(doctor.standardized(states))[:, 0].split([n + 1 for n in lengths])
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
    """Train with AdamW and a cosine schedule. The learning rate is multiplied by 10 for log V, by `map_rate` for M."""
    doctor.map.requires_grad_(map_rate > 0)
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
    """Return the sub-trajectory balance loss of the guided policy, with the patient as the reference."""

    def loss(doctor, chosen, rejected, _):
        answers = [*chosen, *rejected]
        batch = forward(doctor, answers)
        given = pad_sequence([rewards(answer) for answer in answers], batch_first=True)
        scores = log_prefix_scores(
            token_rewards=given, completion_mask=batch.mask, reward_temperature=reward_temperature
        )
        potential = flow_potential(
            log_values=batch.log_values,
            log_prefix_scores=scores,
            policy_logps=batch.log_ratios,
            completion_mask=batch.mask,
        )
        return subtb_loss(potential=potential, completion_mask=batch.mask, subtb_lambda=subtb_lambda).mean()

    return loss


def dpo_loss(*, beta: float):
    """Return the DPO loss of the guided policy, with the patient as the reference."""

    def loss(doctor, chosen, rejected, _):
        batch = forward(doctor, [*chosen, *rejected])
        a, b = batch.log_ratios.masked_fill(~batch.mask, 0).sum(dim=1).chunk(2)
        return -F.logsigmoid(beta * (a - b)).mean()

    return loss


def genarm_loss(*, beta: float, starts_at_patient: bool, num_words: int = 1024, seed: int = 0):
    """
    Return the loss of GenARM: Bradley-Terry on sums of log-probabilities of the doctor as a language model.

    Args:
        beta (`float`):
            Factor of the difference of the sums.
        starts_at_patient (`bool`):
            Whether the language model is the patient times the doctor, or the doctor alone, which starts uniform. The
            normalizer of a product is estimated from the candidates. The normalizer of a doctor alone is estimated
            from the tokens of the batch, exactly, and samples of the others, because the candidates lack rare tokens.
        num_words, seed (`int`):
            Number and seed of the samples of the vocabulary, drawn at each step.
    """
    generator = torch.Generator().manual_seed(seed)

    def own_logps(doctor: Doctor, answers: Sequence[Answer]) -> torch.Tensor:
        ids = torch.cat([answer.ids for answer in answers])
        directions = doctor.directions(torch.cat([answer.states[:-1] for answer in answers]))  # (N, H)
        own = (doctor.embeddings[ids] * directions).sum(dim=1)
        seen, num_all = ids.unique(), len(doctor.embeddings)
        others = torch.randint(num_all, (num_words,), generator=generator)
        others = others[~torch.isin(others, seen)]
        logits = directions @ doctor.embeddings[torch.cat([seen, others])].T
        share = math.log(max(num_all - len(seen), 1) / max(len(others), 1))
        logits = logits + torch.cat([torch.zeros(len(seen)), torch.full((len(others),), share)])
        return pad_sequence((own - logits.logsumexp(dim=1)).split([len(x.ids) for x in answers]), batch_first=True)

    def loss(doctor, chosen, rejected, _):
        answers = [*chosen, *rejected]
        if starts_at_patient:
            patient = pad_sequence([patient_logps(doctor.embeddings, answer) for answer in answers], batch_first=True)
            batch = forward(doctor, answers)
            logps = (batch.log_ratios + patient).masked_fill(~batch.mask, 0)
        else:
            logps = own_logps(doctor, answers)
        a, b = logps.sum(dim=1).chunk(2)
        return -F.logsigmoid(beta * (a - b)).mean()

    return loss


def patient_logps(embeddings: torch.Tensor, answer: Answer) -> torch.Tensor:
    """Return log-probabilities (T,) of an answer's tokens under the patient."""
    likeliest = answer.candidates[:, 0].long()
    return answer.log_weights[:, 0] + ((embeddings[answer.ids] - embeddings[likeliest]) * answer.states[:-1]).sum(
        dim=1
    )


# Measuring


@dataclass(frozen=True)
class Guided:
    """Log-ratios of a guided policy to the patient, and KL, in nats, on the patient's samples; (P, N) each."""

    log_ratios: torch.Tensor
    kl: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        return self.log_ratios.softmax(dim=1)


# For each prompt: logits of the tokens (N,) of all answers, and of their candidates (N, C)
Logits = list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def logits_on(doctor: Doctor, groups: Sequence[Sequence[Answer]]) -> Logits:
    """Return a doctor's logits of the tokens and the candidates, at strength 1."""
    return [
        doctor.guidance(
            torch.cat([answer.states[:-1] for answer in group]),
            torch.cat([answer.ids for answer in group]),
            torch.cat([answer.candidates for answer in group]),
        )
        for group in groups
    ]


@torch.no_grad()
def weigh(groups: Sequence[Sequence[Answer]], logits: Logits, strength: float) -> Guided:
    """Importance-weight the samples of P prompts, N for each, for the patient guided at a strength."""
    log_ratios, kls = [], []
    for group, (own, others) in zip(groups, logits, strict=True):
        patient, lengths = torch.cat([answer.log_weights for answer in group]), [len(answer.ids) for answer in group]
        guidance = strength * others.float()
        tilted = guidance + patient
        log_z = tilted.logsumexp(dim=1) - patient.logsumexp(dim=1)
        kl = (tilted.softmax(dim=1) * guidance).sum(dim=1) - log_z
        log_ratios.append(torch.stack([x.sum() for x in (strength * own - log_z).double().split(lengths)]))
        kls.append(torch.stack([x.sum() for x in kl.double().split(lengths)]))
    return Guided(torch.stack(log_ratios), torch.stack(kls))


@torch.inference_mode()
def logits_of(
    model: PreTrainedModel, reader: Reader, prompts: Sequence[list[dict]], groups: Sequence[Sequence[Answer]]
) -> Logits:
    """Return the logits of [`logits_on`] for a doctor that is a language model."""
    own_reader, logits_of_prompts = Reader(model, reader.tokenizer, reader.eos_token_id), []
    for messages, group in zip(prompts, groups, strict=True):
        states = own_reader.states(messages, [answer.ids.tolist() for answer in group])
        parts = []
        for state, answer in zip(states, group, strict=True):
            logits = model.lm_head(state[:-1])  # (T, V)
            parts.append((logits.gather(1, answer.ids[:, None])[:, 0], logits.gather(1, answer.candidates.long())))
        logits_of_prompts.append(tuple(torch.cat(x) for x in zip(*parts, strict=True)))
    return logits_of_prompts
