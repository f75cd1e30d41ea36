# SPDX-License-Identifier: Apache-2.0

"""How methods compare in the testbed: at the same KL, against the frontier, in a table and a picture."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..evaluation import best_of_n, distinct_n, evaluate_guidance, generate_completions, match_kl
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
POOL = 512  # completions over which distinct-4 is taken, the same number for every method that has as many


class Comparison:
    """
    Rows of a table, one for each policy, all measured on the same prompts.

    Args:
        world ([`World`]):
            Patient, tokenizer, oracles and prompts.
        attribute (`str`):
            Name of the attribute whose oracle is the reward.
        num_samples_per_prompt (`int`, *optional*, defaults to `200`):
            Samples of a guided policy for each test prompt.
        num_patient_samples_per_prompt (`int`, *optional*):
            Samples of the patient, on which the frontier and the gain of every other row rest. Defaults to four times as
            many.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all samples.
        split (`str`, *optional*, defaults to `"test"`):
            Prompts on which the rows are measured. `"validation"` is for choosing settings.

    Attributes:
        rows (`list[dict]`): one for each policy added, with the keys of `COLUMNS`, `reward_se`, `kl_se`, `entropy` (nats per
            token) and `texts`; the efficiency is None where the frontier is not known, the entropy where it is not.
        patient_completions (`list[Completion]`): what the patient said, with its token ids.
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
        self._add_row("patient", None, patient)

    def add(self, method: str, guide: DoctorGuidedLogitsProcessor, *, beta: float) -> dict:
        """Measure a guided policy and append its row; `beta` is what the table shows as its strength."""
        result = self._evaluate(guide, num_samples_per_prompt=self.num_samples_per_prompt)
        return self._add_row(method, beta, result)

    def add_at_kl(
        self,
        method: str,
        make_guide: Callable[[float], DoctorGuidedLogitsProcessor],
        target_kl: float,
        *,
        max_beta: float = 1.0,
    ) -> dict:
        """Find, on the validation prompts, the strength at which the policy is `target_kl` nats away; then [`add`]."""
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
        """Append what choosing the best of `n` patient samples by the oracle itself would reach."""
        result = best_of_n(self.patient_rewards, n)
        num_groups = self.patient_rewards.size(1) // n
        groups = torch.arange(self.patient_rewards.numel()).view_as(self.patient_rewards)[:, : num_groups * n]
        groups = groups.reshape(-1, n)  # n samples of one prompt each
        winners = self.patient_rewards.flatten()[groups].argmax(dim=1, keepdim=True)
        result["texts"] = [self.rows[0]["texts"][index] for index in groups.gather(1, winners).flatten().tolist()]
        return self._add_row(f"best of {n} (oracle)", None, result)

    def add_samples(self, method: str, texts: Sequence[str], *, kl: float, beta: float | None = None) -> dict:
        """
        Append the row of a policy that was sampled elsewhere.

        Args:
            method (`str`):
                Its name.
            texts (sequence of `str`):
                As many samples of each prompt of `prompts`, those of the first prompt first.
            kl (`float`):
                Its distance from the patient, in nats per completion.
            beta (`float`, *optional*):
                What the table shows as its strength.
        """
        rewards = torch.tensor([self.oracle(text) for text in texts]).view(len(self.prompts), -1).mean(dim=1)  # (P,)
        result = {"reward": rewards.mean().item(), "reward_se": (rewards.std() / len(rewards) ** 0.5).item(), "kl": kl}
        return self._add_row(method, beta, result | {"texts": list(texts)})

    def table(self) -> str:
        """The rows as a Markdown table, with standard errors."""
        lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        for row in self.rows:
            cells = [row["method"]]
            cells += ["" if row[name] is None else f"{row[name]:.2f}" for name in list(COLUMNS)[1:]]
            cells[2] += f" ± {row['reward_se']:.2f}"
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the reward-KL plane: the frontier with twice its standard error, and the policies."""
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
                xerr=[2 * row.get("kl_se", 0) for row in points],
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
        """Guided next to unguided completions of the first test prompts, from the same seed."""
        settings = dict(max_new_tokens=MAX_NEW_TOKENS, seed=self.seed, batch_size=num)
        arguments = (self.world.patient, self.world.tokenizer, self.prompts[:num])
        unguided = generate_completions(*arguments, **settings)
        guided = generate_completions(*arguments, guide=guide, **settings)
        return "\n".join(
            f"{prompt[-1]['content']}\n"
            + "\n".join(
                f"  {name:<9}{self.oracle(c.text):+3.0f}  {c.text}" for name, c in (("unguided", a), ("guided", b))
            )
            for prompt, a, b in zip(self.prompts, unguided, guided, strict=False)
        )

    def _evaluate(self, guide: DoctorGuidedLogitsProcessor | None, *, num_samples_per_prompt: int) -> dict:
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

    def _add_row(self, method: str, beta: float | None, result: dict) -> dict:
        is_on_frontier = 0 < result["kl"] <= self.frontier.max_kl
        texts = result.get("texts") or [completion.text for completion in result["completions"]]
        row = {
            "method": method,
            "beta": beta,
            "reward": result["reward"],
            "reward_se": result["reward_se"],
            "kl": result["kl"],
            "kl_se": result.get("kl_se", 0.0),
            "entropy": result.get("entropy"),
            "efficiency": self.frontier.efficiency(result["reward"], result["kl"]) if is_on_frontier else None,
            "grammar": sum(map(self.world.is_grammatical, texts)) / len(texts),
            "distinct_4": distinct_n(evenly_chosen(texts, POOL)),
            "texts": texts,
        }
        self.rows.append(row)
        return row


def evenly_chosen(texts: Sequence[str], num: int) -> list[str]:
    """`num` of the texts, evenly spread over all of them so that every prompt is there; all where there are fewer."""
    num = min(num, len(texts))
    return [texts[index * len(texts) // num] for index in range(num)]
