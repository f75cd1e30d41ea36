# SPDX-License-Identifier: Apache-2.0

"""Comparison of methods in the testbed: reward and KL of each, and the frontier, in a table and a figure."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..evaluation import best_of_n, distinct_n, evaluate_guidance, generate_completions, match_kl
from ..evaluation.guidance import GuidanceResult
from .frontier import Frontier, reward_kl_frontier
from .language import MAX_NEW_TOKENS
from .world import World


COLUMNS = {
    "method": "method",
    "beta": "beta",
    "reward": "reward",
    "kl": "KL (nats)",
    "efficiency": "efficiency",
    "grammar": "grammar",
    "distinct_4": "distinct-4",
}
POOL = 512  # completions for distinct-4, or fewer where a method has fewer


class Comparison:
    """
    A table with a row for each policy, measured on the same prompts.

    Args:
        world ([`World`]):
            Patient, tokenizer, oracles and prompts.
        attribute (`str`):
            Name of the attribute whose oracle is the reward.
        num_samples_per_prompt (`int`, *optional*, defaults to `200`):
            Samples of a guided policy for each test prompt.
        num_patient_samples_per_prompt (`int`, *optional*):
            Samples of the patient, from which the frontier is estimated. Defaults to four times as many.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all samples.
        split (`str`, *optional*, defaults to `"test"`):
            Prompts on which the rows are measured. Use `"validation"` to choose settings.

    Attributes:
        rows (`list[dict]`): one for each policy, with the keys of `COLUMNS`, `reward_se`, `kl_se`, `entropy` (nats per
            token) and `texts`. The efficiency is `None` beyond the frontier, the entropy where it was not measured.
        patient_completions (`list[Completion]`): samples of the patient, with their token ids.
        patient_rewards (`torch.Tensor` of shape `(P, N)`): their rewards.
        frontier ([`Frontier`]): best reward at each KL.

    Examples:

    ```python
    >>> from trl_tfpo import DoctorGuidedLogitsProcessor
    >>> from trl_tfpo.testbed import Comparison, load_world
    >>> world = load_world()
    >>> comparison = Comparison(world, "praise", num_samples_per_prompt=8)
    >>> guide = DoctorGuidedLogitsProcessor(world.doctor, beta=0.5)
    >>> row = comparison.add("untrained doctor", guide, beta=0.5)
    >>> len(comparison.rows)  # the patient comes first
    2

    ```
    """

    def __init__(
        self,
        world: World,
        attribute: str,
        *,
        num_samples_per_prompt: int = 200,
        num_patient_samples_per_prompt: int | None = None,
        seed: int = 0,
        split: str = "test",
    ):
        self.world, self.seed = world, seed
        self.oracle = world.attribute(attribute).oracle
        self.prompts = world.prompts(split)
        self.num_samples_per_prompt = num_samples_per_prompt
        num_patient_samples = num_patient_samples_per_prompt or 4 * num_samples_per_prompt
        patient = self._evaluate(None, num_samples_per_prompt=num_patient_samples)
        self.patient_completions = patient["completions"]
        self.patient_rewards = torch.tensor(patient["rewards"]).view(len(self.prompts), -1)  # (P, N)
        self.frontier: Frontier = reward_kl_frontier(self.patient_rewards)
        self.rows: list[dict] = []
        self._add_evaluated("patient", None, patient)

    def add(self, method: str, guide: DoctorGuidedLogitsProcessor, *, beta: float) -> dict:
        """Measure a guided policy and append its row. `beta` is for the table only."""
        result = self._evaluate(guide, num_samples_per_prompt=self.num_samples_per_prompt)
        return self._add_evaluated(method, beta, result)

    def add_at_kl(
        self,
        method: str,
        make_guide: Callable[[float], DoctorGuidedLogitsProcessor],
        target_kl: float,
        *,
        max_beta: float = 1.0,
    ) -> dict:
        """Find the strength at which the KL is `target_kl` nats on the validation prompts, then [`add`] the policy."""
        beta = match_kl(
            self.world.patient,
            self.world.tokenizer,
            self.world.prompts("validation"),
            make_guide,
            target_kl,
            max_beta=max_beta,
            tolerance=0.03,
            num_samples_per_prompt=16,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=128,
            seed=self.seed + 1,
        )
        return self.add(method, make_guide(beta), beta=beta)

    def add_best_of_n(self, n: int) -> dict:
        """Append the row of the best of `n` patient samples, chosen by the oracle."""
        result = best_of_n(self.patient_rewards, n)
        num_groups = self.patient_rewards.size(1) // n
        groups = torch.arange(self.patient_rewards.numel()).view_as(self.patient_rewards)[:, : num_groups * n]
        groups = groups.reshape(-1, n)  # n samples of one prompt each
        winners = self.patient_rewards.flatten()[groups].argmax(dim=1, keepdim=True)
        texts = [self.rows[0]["texts"][index] for index in groups.gather(1, winners).flatten().tolist()]
        return self._add_row(f"best of {n} (oracle)", None, texts, **result)

    def add_samples(self, method: str, texts: Sequence[str], *, kl: float, beta: float | None = None) -> dict:
        """
        Append the row of a policy that was sampled elsewhere.

        Args:
            method (`str`):
                Name of the policy.
            texts (sequence of `str`):
                Samples, as many of each of `prompts`. Those of the first prompt come first.
            kl (`float`):
                KL from the patient, in nats per completion.
            beta (`float`, *optional*):
                Strength, which is only shown in the table.
        """
        rewards = torch.tensor([self.oracle(text) for text in texts]).view(len(self.prompts), -1).mean(dim=1)  # (P,)
        reward, error = rewards.mean().item(), (rewards.std() / len(rewards) ** 0.5).item()
        return self._add_row(method, beta, texts, reward=reward, reward_se=error, kl=kl)

    def table(self) -> str:
        """Format the rows as a Markdown table, with standard errors."""
        lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        for row in self.rows:
            cells = [row["method"]]
            cells += ["" if row[name] is None else f"{row[name]:.2f}" for name in list(COLUMNS)[1:]]
            cells[2] += f" ± {row['reward_se']:.2f}"
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw reward against KL: the frontier and the policies, each with two standard errors. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        kls, rewards, errors = self.frontier.kls, self.frontier.rewards, 2 * self.frontier.standard_errors
        axes.plot(kls, rewards, color="black", label="frontier: no policy does better")
        axes.fill_between(kls, rewards - errors, rewards + errors, color="black", alpha=0.15, linewidth=0)
        for method in dict.fromkeys(row["method"] for row in self.rows):
            points = [row for row in self.rows if row["method"] == method]
            axes.errorbar(
                [row["kl"] for row in points],
                [row["reward"] for row in points],
                xerr=[2 * row["kl_se"] for row in points],
                yerr=[2 * row["reward_se"] for row in points],
                marker="o",
                linestyle=":",
                label=method,
            )
        axes.set(xlabel="KL from the patient (nats per completion)", ylabel="oracle reward")
        axes.set_xlim(left=-0.05)
        axes.legend(loc="lower right")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)

    def show_completions(self, guide: DoctorGuidedLogitsProcessor, num: int = 3) -> str:
        """Format guided and unguided completions of the first prompts, with the same seed, and their rewards."""
        model, tokenizer, prompts = self.world.patient, self.world.tokenizer, self.prompts[:num]
        sample = partial(
            generate_completions, model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=num
        )
        unguided, guided = sample(seed=self.seed), sample(seed=self.seed, guide=guide)
        lines = []
        for prompt, before, after in zip(prompts, unguided, guided, strict=True):
            lines.append(prompt[-1]["content"])
            lines += [
                f"  {name:<9}{self.oracle(completion.text):+3.0f}  {completion.text}"
                for name, completion in (("unguided", before), ("guided", after))
            ]
        return "\n".join(lines)

    def _evaluate(self, guide: DoctorGuidedLogitsProcessor | None, *, num_samples_per_prompt: int) -> GuidanceResult:
        return evaluate_guidance(
            self.world.patient,
            self.world.tokenizer,
            self.prompts,
            lambda prompts, completions: [self.oracle(text) for text in completions],
            guide=guide,
            num_samples_per_prompt=num_samples_per_prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=128,
            seed=self.seed,
        )

    def _add_evaluated(self, method: str, beta: float | None, result: GuidanceResult) -> dict:
        texts = [completion.text for completion in result["completions"]]
        return self._add_row(
            method,
            beta,
            texts,
            reward=result["reward"],
            reward_se=result["reward_se"],
            kl=result["kl"],
            kl_se=result["kl_se"],
            entropy=result["entropy"],
        )

    def _add_row(
        self,
        method: str,
        beta: float | None,
        texts: Sequence[str],
        *,
        reward: float,
        reward_se: float,
        kl: float,
        kl_se: float = 0.0,
        entropy: float | None = None,
    ) -> dict:
        is_on_frontier = 0 < kl <= self.frontier.max_kl
        row = {
            "method": method,
            "beta": beta,
            "reward": reward,
            "reward_se": reward_se,
            "kl": kl,
            "kl_se": kl_se,
            "entropy": entropy,
            "efficiency": self.frontier.efficiency(reward, kl) if is_on_frontier else None,
            "grammar": sum(map(self.world.is_grammatical, texts)) / len(texts),
            "distinct_4": distinct_n(evenly_chosen(texts, POOL)),
            "texts": list(texts),
        }
        self.rows.append(row)
        return row


def evenly_chosen(texts: Sequence[str], num: int) -> list[str]:
    """Choose `num` of the texts, at even distances so that all prompts are included; all texts if there are fewer."""
    num = min(num, len(texts))
    return [texts[index * len(texts) // num] for index in range(num)]
