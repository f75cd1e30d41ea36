# SPDX-License-Identifier: Apache-2.0

"""Log-likelihoods and greedy answers of a patient under several doctors and strengths, in one pass of the patient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from samples import distinct_prompts
from states import Reader
from tax_data import Text
from transformers import PreTrainedModel

from trl_tfpo.functional import guided_logps


if TYPE_CHECKING:
    from bench import Bench


STATES, ROWS = 128, 4  # states of a product with the head, and of a normalization, which then stays in the cache


@dataclass
class Guide:
    """
    A doctor at several strengths, or the patient alone.

    Args:
        key (`dict`):
            What identifies its rows in the output: `doctor`, `seed` and `id`.
        strengths (`list[float]`):
            Exponents.
        head (`Callable`, *optional*):
            Function from hidden states (N, H) to logits (N, V). The patient alone has none.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model with these hidden states, by default the patient.
    """

    key: dict
    strengths: list[float]
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    model: PreTrainedModel | None = None


class Scorer:
    """Log-likelihoods of texts under guided patients. T tokens of a text, N of them in a chunk, V words."""

    def __init__(self, bench: "Bench", guides: Sequence[Guide]):
        models = {id(guide.model): guide.model for guide in guides} | {id(None): bench.model}
        self.guides, self.head = guides, bench.model.get_output_embeddings()
        self.readers = {key: Reader(model, bench.tokenizer, bench.eos) for key, model in models.items()}

    @torch.inference_mode()
    def __call__(self, text: Text) -> list[list[float]]:
        """Return the log-likelihood of a text in nats, for each guide and each of its strengths."""
        hidden = {
            key: reader.states_after(text.prompt_ids, [text.ids])[0][:-1] for key, reader in self.readers.items()
        }  # (T, H)
        ids, sums = torch.tensor(text.ids), [[0.0] * len(guide.strengths) for guide in self.guides]
        for first in range(0, len(ids), STATES):
            here = slice(first, first + STATES)
            patient = self.head(hidden[id(None)][here])  # (N, V)
            for total, guide in zip(sums, self.guides, strict=True):
                doctor = guide.head(hidden[id(guide.model)][here]) if guide.head else None
                for level, strength in enumerate(guide.strengths):
                    total[level] += log_likelihood(patient, doctor, strength, ids[here])
        return sums


def log_likelihood(
    patient_logits: torch.Tensor, doctor_logits: torch.Tensor | None, strength: float, ids: torch.Tensor
) -> float:
    """Return the sum of the guided log-probabilities of tokens (N,), from logits (N, V)."""
    total = 0.0
    for first in range(0, len(ids), ROWS):
        here = slice(first, first + ROWS)
        doctors, betas = ([], []) if doctor_logits is None else ([doctor_logits[here]], [strength])
        logps = guided_logps(patient_logits=patient_logits[here], doctor_logits=doctors, beta=betas)
        total += logps.gather(1, ids[here, None]).double().sum().item()
    return total


@torch.inference_mode()
def greedy_answers(
    patient: PreTrainedModel,
    guides: Sequence[Guide],
    prompts_ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
) -> list[list[list[list[int]]]]:
    """
    Return the most probable next tokens of each guide at each strength, one answer to each prompt.

    Answers are the same up to the token where a guide changes the choice. Equal beginnings are therefore read once, by
    the patient and by each doctor: a row of the batch is a prompt with the tokens so far, for some of the answers.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient. Its logits must be the product of its last hidden states and its head, as for all models here.
        guides (`Sequence[Guide]`):
            Doctors with their strengths.
        prompts_ids (`Sequence[list[int]]` of P):
            Token ids of the prompts.
        max_new_tokens (`int`):
            Maximum number of tokens of an answer.
        eos_token_id (`int`):
            Token that ends an answer.

    Returns:
        `list` by guide, strength and prompt: token ids, with EOS if the answer has ended.
    """
    answers = [[[[] for _ in prompts_ids] for _ in guide.strengths] for guide in guides]
    models = {id(guide.model): guide.model or patient for guide in guides} | {id(None): patient}
    head, caches = patient.get_output_embeddings(), dict.fromkeys(models)
    row_of_prompt, ids, mask = distinct_prompts(prompts_ids, patient.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # For each row, which answers (guide, level, prompt) it is the beginning of
    rows = [[] for _ in ids]
    for prompt, row in enumerate(row_of_prompt.tolist()):
        rows[row] += [(g, level, prompt) for g, guide in enumerate(guides) for level in range(len(guide.strengths))]
    for step in range(max_new_tokens):
        hidden = {}
        for key, model in models.items():
            read = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=caches[key], use_cache=True
            )
            hidden[key], caches[key] = read.last_hidden_state[:, -1], read.past_key_values
        patient_logits = head(hidden[id(None)])  # (B, V)
        children: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for g, guide in enumerate(guides):
            mine = [row for row, members in enumerate(rows) if any(member[0] == g for member in members)]
            doctor = guide.head(hidden[id(guide.model)][mine]) if guide.head and mine else None
            for level, strength in enumerate(guide.strengths):
                guided = patient_logits[mine] if doctor is None else patient_logits[mine] + strength * doctor
                for row, token in zip(mine, guided.argmax(dim=-1).tolist(), strict=True):
                    for member in [x for x in rows[row] if x[:2] == (g, level)]:
                        answers[g][level][member[2]].append(token)
                        if token != eos_token_id:
                            children.setdefault((row, token), []).append(member)
        if not children or step == max_new_tokens - 1:
            break
        parents = torch.tensor([row for row, _ in children])
        for cache in caches.values():
            cache.batch_select_indices(parents)
        rows, ids = list(children.values()), torch.tensor([[token] for _, token in children])
        mask = torch.cat([mask[parents], mask.new_ones(len(parents), 1)], dim=1)
        positions = positions[parents, -1:] + 1
    return answers
