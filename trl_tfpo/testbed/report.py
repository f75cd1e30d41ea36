# SPDX-License-Identifier: Apache-2.0

"""Comparison of methods in the controlled world: reward, KL and frontier, as a table and a figure."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..evaluation import best_of_n, distinct_n, evaluate_guidance, generate_completions, match_kl
from ..evaluation.reward_and_kl import GuidanceResult
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
POOL = 512  # maximum number of texts for distinct-4


class Comparison:
    """
    A table with a row for each policy, measured on the same prompts.

    Args:
        world ([`World`]):
            Patient, tokenizer, oracles and prompts.
        attribute (`str`):
            Name of the attribute whose oracle is the reward.
        num_samples_per_prompt (`int`, *optional*, defaults to `200`):
            Samples of each guided policy per prompt.
        num_patient_samples_per_prompt (`int`, *optional*):
            Patient samples per prompt, for the frontier. Defaults to `4 * num_samples_per_prompt`.
        seed (`int`, *optional*, defaults to `0`):
            Random seed.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the prompts. Use `"validation"` to choose settings.

    Attributes:
        rows (`list[dict]`): one for each policy, with the keys of `COLUMNS`, `reward_se`, `kl_se`, `entropy` (nats per
            token) and `texts`. `efficiency` is `None` at KL 0 and beyond the frontier, and `entropy` if it was not
            measured.
        patient_completions (`list[Completion]`): samples of the patient.
        patient_rewards (`torch.Tensor` of shape `(P, N)`): rewards of these samples.
        frontier ([`Frontier`]): best reward at each KL.

    Raises:
        `ValueError`: on an unknown attribute or split, or fewer than 10 patient samples per prompt.

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
        patient = self._evaluate(None, num_patient_samples)
        self.patient_completions = patient["completions"]
        self.patient_rewards = torch.tensor(patient["rewards"]).view(len(self.prompts), -1)  # (P, N)
        self.frontier: Frontier = reward_kl_frontier(self.patient_rewards)
        self.rows: list[dict] = []
        self._add_evaluated("patient", None, patient)

    def add(self, method: str, guide: DoctorGuidedLogitsProcessor, *, beta: float) -> dict:
        """Measure a guided policy, and append and return its row. `beta` is only shown in the table."""
        return self._add_evaluated(method, beta, self._evaluate(guide, self.num_samples_per_prompt))

    def add_at_kl(
        self,
        method: str,
        make_guide: Callable[[float], DoctorGuidedLogitsProcessor],
        target_kl: float,
        *,
        max_beta: float = 1.0,
    ) -> dict:
        """Find the `beta` with a KL of `target_kl` nats on the validation prompts, then [`add`] the policy."""
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
        """Append the row of the best of `n` patient samples by the oracle."""
        result = best_of_n(self.patient_rewards, n)
        indices = torch.arange(self.patient_rewards.numel()).view_as(self.patient_rewards)  # (P, N)
        groups = indices[:, : indices.size(1) // n * n].reshape(-1, n)  # n samples of one prompt each
        winners = self.patient_rewards.flatten()[groups].argmax(dim=1, keepdim=True)
        texts = [self.rows[0]["texts"][index] for index in groups.gather(1, winners).flatten().tolist()]
        return self._add_row(f"best of {n} (oracle)", None, texts, **result)

    def add_samples(self, method: str, texts: Sequence[str], *, kl: float, beta: float | None = None) -> dict:
        """
        Append the row of a policy from existing samples.

        Args:
            method (`str`):
                Name of the policy.
            texts (sequence of `str`):
                Samples of the first of `prompts`, then those of the second, and so on, equally many of each.
            kl (`float`):
                KL from the patient, in nats per completion.
            beta (`float`, *optional*):
                Strength. It is only shown in the table.
        """
        rewards = torch.tensor([self.oracle(text) for text in texts]).view(len(self.prompts), -1).mean(dim=1)  # (P,)
        reward, error = rewards.mean().item(), (rewards.std() / len(rewards) ** 0.5).item()
        return self._add_row(method, beta, texts, reward=reward, reward_se=error, kl=kl)

    def table(self) -> str:
        """Format the rows as a Markdown table, with the standard error of the reward."""
        lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        for row in self.rows:
            cells = [row["method"]]
            cells += ["" if row[name] is None else f"{row[name]:.2f}" for name in list(COLUMNS)[1:]]
            cells[2] += f" ± {row['reward_se']:.2f}"
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Plot reward against KL of frontier and policies, with two standard errors. Needs matplotlib."""
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
        """Format guided and unguided completions of the first `num` prompts, with the same seed, and rewards."""
        model, tokenizer, prompts = self.world.patient, self.world.tokenizer, self.prompts[:num]
        sample = partial(
            generate_completions, model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=num
        )
        unguided, guided = sample(seed=self.seed), sample(seed=self.seed, guide=guide)
        lines = []
        for prompt, before, after in zip(prompts, unguided, guided, strict=True):
            lines.append(prompt[-1]["content"])
            for name, text in (("unguided", before.text), ("guided", after.text)):
                lines.append(f"  {name:<9}{self.oracle(text):+3.0f}  {text}")
        return "\n".join(lines)

    def _evaluate(self, guide: DoctorGuidedLogitsProcessor | None, num_samples_per_prompt: int) -> GuidanceResult:
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
        errors = {"reward_se": result["reward_se"], "kl_se": result["kl_se"]}
        measures = {"reward": result["reward"], "kl": result["kl"], "entropy": result["entropy"], **errors}
        return self._add_row(method, beta, texts, **measures)

    def _add_row(
        self, method: str, beta: float | None, texts: Sequence[str], *, reward: float, kl: float, **measures: float
    ) -> dict:
        is_on_frontier = 0 < kl <= self.frontier.max_kl
        row: dict = {"method": method, "beta": beta, "reward": reward, "kl": kl, "kl_se": 0.0, "entropy": None}
        row |= measures | {
            "efficiency": self.frontier.efficiency(reward, kl) if is_on_frontier else None,
            "grammar": sum(map(self.world.is_grammatical, texts)) / len(texts),
            "distinct_4": distinct_n(evenly_chosen(texts, POOL)),
            "texts": list(texts),
        }
        self.rows.append(row)
        return row


def evenly_chosen(texts: Sequence[str], num: int) -> list[str]:
    """Choose at most `num` texts at even distances, to include all prompts."""
    num = min(num, len(texts))
    return [texts[index * len(texts) // num] for index in range(num)]
