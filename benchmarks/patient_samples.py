# SPDX-License-Identifier: Apache-2.0


"""
Measurement of policies by importance-weighted samples of the patient.

The patient is sampled once. All settings, all strengths and the frontier use these texts. KL and entropy are exact at
each token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from trl_tfpo import DoctorGuidedLogitsProcessor
from trl_tfpo.testbed import Comparison
from trl_tfpo.testbed.frontier import Frontier, find_tilt, kl_from_uniform, reward_kl_frontier


Guide = Callable[[float], DoctorGuidedLogitsProcessor]  # maps a strength to a guide; all guides have the same models


@dataclass(frozen=True)
class WeightedPolicy:
    """
    Expectations of a policy on patient samples, for each of P prompts.

    Args:
        kl, entropy, num_tokens (`torch.Tensor` of shape `(P,)`):
            KL and entropy in nats, and number of tokens, of whole completions.
        num_effective (`torch.Tensor` of shape `(P,)`):
            Effective sample size.
        rewards (`dict[str, torch.Tensor]` of shape `(P,)`):
            Reward by attribute.
    """

    kl: torch.Tensor
    entropy: torch.Tensor
    num_tokens: torch.Tensor
    num_effective: torch.Tensor
    rewards: dict[str, torch.Tensor]

    def row(self, **more) -> dict:
        """Return means over all prompts, as in an output. The entropy is in nats per token."""
        entropy = (self.entropy.mean() / self.num_tokens.mean()).item()
        numbers = {"kl": max(self.kl.mean().item(), 0.0), "entropy": entropy}
        return numbers | {"num_effective": round(self.num_effective.mean().item(), 1)} | more


@dataclass(frozen=True)
class PatientSamples:
    """
    Samples of the patient: P prompts, N samples of each, M = PN rows of L tokens.

    Args:
        ids (`torch.Tensor` of shape `(M, L)`):
            Prompts and completions, padded on the right.
        completion_mask (`torch.Tensor` of shape `(M, L)`):
            True for tokens of completions.
        rewards (`dict[str, torch.Tensor]` of shape `(P, N)`):
            Rewards by attribute.
        patient_logps (`torch.Tensor` of shape `(tokens, V)`):
            Log-probabilities of the patient where completion tokens are predicted, in nats.
    """

    ids: torch.Tensor
    completion_mask: torch.Tensor
    rewards: dict[str, torch.Tensor]
    patient_logps: torch.Tensor

    @classmethod
    def of(cls, comparison: Comparison) -> "PatientSamples":
        """Return the samples of a comparison."""
        world, completions = comparison.world, comparison.patient_completions
        rows = [completion.prompt_ids + completion.completion_ids for completion in completions]
        batch = world.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        ids, position = batch["input_ids"], torch.arange(batch["input_ids"].size(1))
        starts = torch.tensor([len(completion.prompt_ids) for completion in completions])[:, None]
        completion_mask = batch["attention_mask"].bool() & (position >= starts)
        rewards = {
            name: torch.tensor([attribute.oracle(completion.text) for completion in completions])
            for name, attribute in world.attributes.items()
        }
        shaped = {name: values.view(len(comparison.prompts), -1).double() for name, values in rewards.items()}
        return cls(ids, completion_mask, shaped, logits_of(world.patient, ids, completion_mask).log_softmax(dim=-1))

    def doctor_logits(self, guide: DoctorGuidedLogitsProcessor) -> list[torch.Tensor]:
        """Return logits of each doctor of a guide where completion tokens are predicted, (tokens, V)."""
        return [logits_of(doctor, self.ids, self.completion_mask) for doctor in guide.doctors]

    def logits_after(self, prompts: list[list[int]], model: PreTrainedModel) -> torch.Tensor:
        """Return logits of a model where completion tokens are predicted, (tokens, V), after other prompts."""
        num_samples = len(self.ids) // len(prompts)
        starts = [torch.tensor(prompt) for prompt in prompts for _ in range(num_samples)]
        texts = [ids[mask] for ids, mask in zip(self.ids, self.completion_mask, strict=True)]
        rows = [torch.cat(row) for row in zip(starts, texts, strict=True)]
        is_text = [torch.arange(len(row)) >= len(start) for row, start in zip(rows, starts, strict=True)]
        return logits_of(model, *(pad_sequence(x, batch_first=True) for x in (rows, is_text)))

    def weigh(self, guide: DoctorGuidedLogitsProcessor, doctor_logits: Sequence[torch.Tensor]) -> WeightedPolicy:
        """Weight the samples for a guided policy. `doctor_logits` are those of the guide."""
        guided = guide.combine(self.patient_logps, doctor_logits)  # (tokens, V)
        shift, probs = guided - self.patient_logps, guided.exp()
        weights = self._sums(shift.gather(1, self._tokens()).squeeze(1)).softmax(dim=1)  # (P, N)
        return self._expected(weights, kl=(probs * shift).sum(dim=1), entropy=-(probs * guided).sum(dim=1))

    def best(self, attribute: str, reward: float) -> dict:
        """Return a row of the policy with this reward and the smallest KL: samples reweighted by their rewards."""
        rewards = self.rewards[attribute]
        tilt, weights = find_tilt(rewards, lambda weights: (weights * rewards).sum(dim=1).mean(), reward)
        surprise = -self.patient_logps.gather(1, self._tokens()).squeeze(1)
        found = self._expected(weights, kl=torch.zeros_like(surprise), entropy=surprise)
        kl = kl_from_uniform(weights)
        entropy = found.entropy - kl  # the cross-entropy with the patient is entropy plus KL of the policy
        row = replace(found, kl=kl, entropy=entropy).row(beta=tilt, reward=reward)
        return row | {"efficiency": None}

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
        Return a row for each strength, up to the first KL above `max_kl`: KL in nats, reward, entropy in nats per
        token, efficiency, and the contribution of each prompt to the efficiency.
        """
        frontier, rows = reward_kl_frontier(self.rewards[attribute]), []
        for strength in strengths:
            found = self.weigh(guide(strength), doctor_logits)
            reward, gain = found.rewards[attribute], found.rewards[attribute] - self.rewards[attribute].mean(dim=1)
            row = found.row(beta=strength, reward=reward.mean().item(), **shares(frontier, gain, found.kl))
            rows.append(row)
            if row["kl"] >= max_kl:
                break
        return rows

    def _tokens(self) -> torch.Tensor:
        return self.ids[self.completion_mask][:, None]

    def _expected(self, weights: torch.Tensor, **per_token: torch.Tensor) -> WeightedPolicy:
        """Return expectations under weights (P, N) that sum to 1 for each prompt."""
        per_token |= {"num_tokens": torch.ones(len(self.patient_logps))}
        sums = {name: (weights * self._sums(values)).sum(dim=1) for name, values in per_token.items()}
        rewards = {name: (weights * values).sum(dim=1) for name, values in self.rewards.items()}
        return WeightedPolicy(**sums, num_effective=1 / weights.square().sum(dim=1), rewards=rewards)

    def _sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return sums of a value of each token (tokens,) over each completion, (P, N)."""
        row = self.completion_mask.nonzero()[:, 0]
        shape = next(iter(self.rewards.values())).shape
        return torch.zeros(len(self.ids), dtype=torch.double).index_add(0, row, values.double()).view(shape)


def shares(frontier: Frontier, gain: torch.Tensor, kl: torch.Tensor) -> dict:
    """
    Return the efficiency and the contribution of each prompt, from gains and KLs (P,); None outside the frontier.

    The efficiency is the mean of the contributions. Each contribution is corrected for the difference of its KL from
    the mean, by the slope of the frontier. Contributions can therefore be resampled for an interval.
    """
    mean_kl, mean_gain = kl.mean().item(), gain.mean().item()
    if not 1e-6 < mean_kl <= frontier.max_kl:  # the patient itself gains nothing
        return {"efficiency": None, "by_prompt": None}
    efficiency = frontier.efficiency(frontier.patient_reward + mean_gain, mean_kl)
    possible = frontier.best_reward(mean_kl) - frontier.patient_reward
    nearer, further = 0.98 * mean_kl, min(1.02 * mean_kl, frontier.max_kl)
    slope = (frontier.best_reward(further) - frontier.best_reward(nearer)) / (further - nearer)
    parts = (gain - efficiency * slope * (kl - mean_kl)) / possible
    return {"efficiency": efficiency, "by_prompt": [round(part, 5) for part in parts.tolist()]}


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Return logits of a model where completion tokens are predicted, (tokens, V)."""
    parts = zip(ids.split(256), completion_mask.split(256), strict=True)
    return torch.cat([model(input_ids=ids).logits[:, :-1][mask[:, 1:]] for ids, mask in parts])
