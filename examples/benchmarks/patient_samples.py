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


"""
Policies measured on samples of the patient, weighed by how much likelier a policy makes each of them.

Nothing is sampled but the patient, once: all settings and strengths are compared on the same texts, and so is the frontier. The
KL of each token is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trl_tfpo import DoctorGuidedLogitsProcessor
from trl_tfpo.evaluation import generate_completions
from trl_tfpo.testbed import World, reward_kl_frontier
from trl_tfpo.testbed.language import MAX_NEW_TOKENS


Guide = Callable[[float], DoctorGuidedLogitsProcessor]  # of a strength; always with the same models


@dataclass(frozen=True)
class PatientSamples:
    """
    What the patient said: P prompts, N samples of each, M = PN rows of L tokens.

    Args:
        ids (`torch.Tensor` of shape `(M, L)`):
            Prompts and completions, padded on the right.
        completion_mask (`torch.Tensor` of shape `(M, L)`):
            Which of them are completion.
        rewards (`dict[str, torch.Tensor]` of shape `(P, N)`):
            Of each attribute.
        patient_logps (`torch.Tensor` of shape `(tokens, V)`):
            Log-probabilities of the patient where completion tokens are predicted, in nats.
    """

    ids: torch.Tensor
    completion_mask: torch.Tensor
    rewards: dict[str, torch.Tensor]
    patient_logps: torch.Tensor

    def heard(self, guide: DoctorGuidedLogitsProcessor) -> list[torch.Tensor]:
        """What each doctor of a guide says where completion tokens are predicted, (tokens, V)."""
        return [logits_of(doctor, self.ids, self.completion_mask) for doctor in guide.doctors]

    def follow(
        self,
        guide: Guide,
        doctor_logits: Sequence[torch.Tensor],
        strengths: Sequence[float],
        *,
        attribute: str,
        max_kl: float = math.inf,
    ) -> list[dict]:
        """
        Strength, KL in nats and efficiency of guided policies, up to the first that is `max_kl` away; `doctor_logits` is what
        was [`heard`] from the guide's doctors, whatever the strength.
        """
        rewards, rows = self.rewards[attribute], []
        frontier, tokens = reward_kl_frontier(rewards), self.ids[self.completion_mask][:, None]
        for strength in strengths:
            guided = guide(strength).combine(self.patient_logps, doctor_logits)  # (tokens, V)
            shift = guided - self.patient_logps
            weights = self._sums(shift.gather(1, tokens).squeeze(1)).double().softmax(dim=1)  # (P, N)
            kl = (weights * self._sums((guided.exp() * shift).sum(dim=1))).sum(dim=1).mean().item()
            reward = (weights * rewards).sum(dim=1).mean().item()
            is_known = 1e-6 < kl <= frontier.max_kl  # the patient itself gains nothing
            efficiency = frontier.efficiency(reward, kl) if is_known else None
            rows.append({"beta": strength, "kl": max(kl, 0.0), "efficiency": efficiency})
            if kl >= max_kl:
                break
        return rows

    def _sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of a value of each token (tokens,) over each completion, (P, N)."""
        row = self.completion_mask.nonzero()[:, 0]
        shape = next(iter(self.rewards.values())).shape
        return values.new_zeros(len(self.ids)).index_add(0, row, values).view(shape)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """What a model says where completion tokens are predicted, (tokens, V)."""
    parts = zip(ids.split(256), completion_mask.split(256), strict=True)
    return torch.cat([model(input_ids=ids).logits[:, :-1][mask[:, 1:]] for ids, mask in parts])


def draw(world: World, num_samples_per_prompt: int, seed: int, split: str) -> PatientSamples:
    """Samples of the patient on the prompts of a split."""
    prompts = world.prompts(split)
    completions = generate_completions(
        world.patient,
        world.tokenizer,
        prompts,
        num_samples_per_prompt=num_samples_per_prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=128,
        seed=seed,
    )
    rows = [completion.prompt_ids + completion.completion_ids for completion in completions]
    batch = world.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    ids, position = batch["input_ids"], torch.arange(batch["input_ids"].size(1))
    starts = torch.tensor([len(completion.prompt_ids) for completion in completions])[:, None]
    completion_mask = batch["attention_mask"].bool() & (position >= starts)
    rewards = {
        name: torch.tensor([attribute.oracle(completion.text) for completion in completions]).view(len(prompts), -1)
        for name, attribute in world.attributes.items()
    }
    patient_logps = logits_of(world.patient, ids, completion_mask).log_softmax(dim=-1)
    return PatientSamples(ids, completion_mask, rewards, patient_logps)
