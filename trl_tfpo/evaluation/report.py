# SPDX-License-Identifier: Apache-2.0

"""
The report: what several methods say to the same prompts, measured, with intervals, as numbers and as a figure.

Shapes: S seeds, P prompts, N samples of each.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..common.atomic import written_whole
from .bootstrap import mean_with_interval
from .completions import Completion, Prompt, by_prompt, text_of
from .diversity import distinct_n, self_similarity
from .head_to_head import compare_rewards, head_to_head, rewards_by_prompt
from .judges import PairwiseJudge


NGRAMS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Report:
    """
    What [`evaluate_completions`] found. Plain numbers only, so that it is the same after a round through its file.

    Args:
        settings (`dict`):
            `baseline`, `num_prompts`, and `level`, `num_resamples` and `seed` of the intervals.
        methods (`dict`):
            By name: `num_seeds` and `num_samples_per_prompt`; `measures`, of which each has a `mean` and an interval
            `low` to `high`, `None` where there is none; and `head_to_head` against the baseline, if any.
    """

    settings: dict
    methods: dict[str, dict]

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON: the whole file, or none."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with written_whole(path) as part:
            part.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """Read a report that was saved. Raises `ValueError` when the file holds something else."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"A report must be a file that `Report.save` wrote. Got {str(path)!r}: {error}; make it again."
            ) from error

    def table(self) -> str:
        """The report as a Markdown table: a row for each measure, a column for each method."""
        names = list(dict.fromkeys(name for row in self.methods.values() for name in row["measures"]))
        lines = [["", *self.methods]]
        for name in names:
            lines.append([name, *(_cell(row["measures"].get(name)) for row in self.methods.values())])
        compared = [row["head_to_head"] for row in self.methods.values()]
        if any(compared):
            baseline = self.settings["baseline"]
            lines.append([f"win + half ties against {baseline}", *(_cell(x, "win_half_tie") for x in compared)])
            for name in ("win", "tie", "loss"):
                lines.append([name, *("" if x is None else f"{x[name]:.3f}" for x in compared)])
            if any(x and x["num_without_verdict"] for x in compared):
                counts = ("" if x is None else str(x["num_without_verdict"]) for x in compared)
                lines.append(["pairs without a verdict", *counts])
        lines.insert(1, ["---", *["---:"] * len(self.methods)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw what is known of: reward against KL, head to head, distinct n-grams. Needs matplotlib."""
        from matplotlib.figure import Figure

        measures = {name: row["measures"] for name, row in self.methods.items()}
        compared = {name: row["head_to_head"] for name, row in self.methods.items() if row["head_to_head"]}
        panels = [self._plot_diversity]
        if compared:
            panels.insert(0, self._plot_head_to_head)
        if any("reward" in row for row in measures.values()):
            panels.insert(0, self._plot_reward)
        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        for index, panel in enumerate(panels):
            panel(figure.add_subplot(1, len(panels), index + 1))
        with written_whole(path) as part:
            figure.savefig(part, dpi=150, format=Path(path).suffix.removeprefix(".") or "png")

    def _plot_reward(self, axes) -> None:
        rows = {name: row["measures"] for name, row in self.methods.items()}
        has_kl = all("kl" in row for row in rows.values())
        for index, (name, row) in enumerate(rows.items()):
            x = row["kl"] if has_kl else {"mean": index, "low": None, "high": None}
            bars = [[[abs(end - value["mean"])] for end in _ends(value)] for value in (x, row["reward"])]
            axes.errorbar([x["mean"]], [row["reward"]["mean"]], xerr=bars[0], yerr=bars[1], marker="o", label=name)
        axes.set(ylabel="reward", xlabel="KL from the patient (nats per completion)" if has_kl else "")
        if not has_kl:
            axes.set_xticks(range(len(rows)), list(rows), rotation=20)
        else:
            axes.legend()

    def _plot_head_to_head(self, axes) -> None:
        compared = {name: row["head_to_head"] for name, row in self.methods.items() if row["head_to_head"]}
        for index, row in enumerate(compared.values()):
            left = 0.0
            for share, color in (("win", "tab:green"), ("tie", "lightgray"), ("loss", "tab:red")):
                axes.barh(index, row[share], left=left, color=color, label=share if index == 0 else None)
                left += row[share]
            low, high = _ends({"mean": row["win_half_tie"], "low": row["low"], "high": row["high"]})
            bars = [[abs(end - row["win_half_tie"])] for end in (low, high)]
            axes.errorbar([row["win_half_tie"]], [index], xerr=bars, marker="o", color="black")
        axes.axvline(0.5, color="black", linestyle=":")
        axes.set_yticks(range(len(compared)), list(compared))
        axes.set(xlim=(0, 1), xlabel=f"against {self.settings['baseline']}; dot: win + half ties")
        axes.legend(loc="lower right")

    def _plot_diversity(self, axes) -> None:
        for name, row in self.methods.items():
            shares = [row["measures"][f"distinct_{n}"]["mean"] for n in NGRAMS]
            axes.plot(NGRAMS, [math.nan if share is None else share for share in shares], marker="o", label=name)
        axes.set(xlabel="n", ylabel="share of n-grams that are distinct", xticks=NGRAMS, ylim=(0, 1.05))
        axes.legend()


def evaluate_completions(
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[Completion | str] | Sequence[Sequence[Completion | str]]],
    reward_fn: Callable[..., Sequence[float]] | None = None,
    *,
    baseline: str | None = None,
    judge: PairwiseJudge | None = None,
    measures: Mapping[str, Mapping | Sequence[Mapping]] | None = None,
    tie_margin: float = 0.0,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Report:
    """
    Measure what methods say to the same prompts.

    - `reward`, with `reward_fn`.
    - `num_words`, and for a [`Completion`] `num_tokens`, `is_complete` and `tokens_per_second`, if its time is known.
    - `distinct_1` to `distinct_4`, over a pool of as many texts for every method: the first samples of the first seed.
    - `self_similarity_within`, of samples of a prompt, and `self_similarity_across`, of first samples of different
      prompts, in the first seed.
    - whatever is in `measures`: `kl` and `entropy` from [`next_token_statistics`], `kl` from [`sampled_kl`].

    Args:
        prompts (sequence of `str` or `list[dict]`):
            P prompts.
        completions (mapping from `str` to a sequence of [`Completion`] or `str`, or to one for each seed):
            For each method what it said: the samples of the first prompt, then those of the second, and so on.
        reward_fn (`Callable`, *optional*):
            An oracle, a [`RewardModel`], or any `(prompts, completions) -> list[float]`; called once for each method.
        baseline (`str`, *optional*):
            Name of the method that all others are compared with, [`head_to_head`], by `judge` or else by `reward_fn`.
        judge ([`PairwiseJudge`], *optional*):
            For instance a [`ChatJudge`].
        measures (mapping, *optional*):
            For some methods more that is known of them: by name one number for each completion, or a single one
            (`extra_forwards_per_token`, say). For methods with several seeds a sequence of such mappings.
        tie_margin (`float`, *optional*, defaults to `0.0`):
            Rewards that differ by no more than this are a tie.
        level, num_resamples, seed:
            Of [`bootstrap_interval`].

    Returns:
        [`Report`]

    Raises:
        `ValueError`: when completions or measures do not fit the prompts, a name is not that of a method, or there
            is nobody to judge.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import evaluate_completions
    >>> def kindness(prompts, completions):
    ...     return [float(text.count("kind")) for text in completions]
    >>> prompts = ["say a word", "say another"]
    >>> texts = {"patient": ["bad", "bad and kind"], "doctor": ["kind", "kind and kind"]}
    >>> report = evaluate_completions(prompts, texts, kindness, baseline="patient")
    >>> report.methods["doctor"]["measures"]["reward"]["mean"], report.methods["doctor"]["head_to_head"]["win"]
    (1.5, 1.0)

    ```
    """
    measures = measures or {}
    if not completions or not {*measures, *([baseline] if baseline is not None else [])} <= set(completions):
        raise ValueError(
            "`baseline` and `measures` must name methods of `completions`. Got "
            f"{baseline!r} and {sorted(measures)} for {sorted(completions)}; give them the same names."
        )
    if baseline is not None and judge is None and reward_fn is None:
        raise ValueError(
            "A comparison needs somebody who judges. Got a `baseline` alone; pass `reward_fn` or `judge`."
        )
    settings = {"level": level, "num_resamples": num_resamples, "seed": seed}
    grouped = {name: by_prompt(prompts, of_method) for name, of_method in completions.items()}
    pool = min(len(seeds[0][0]) for seeds in grouped.values())  # texts of each prompt
    rewards, rows = {}, {}
    for name, seeds in grouped.items():
        known = {}
        if reward_fn is not None:
            rewards[name] = rewards_by_prompt(reward_fn, prompts, seeds)
            known["reward"] = mean_with_interval(rewards[name], **settings)
        given = _given_measures(name, measures.get(name, {}), seeds)
        of_texts = _measures_of_texts(seeds, pool, settings)
        for taken in {*given} & {"reward", *of_texts}:
            raise ValueError(f"`measures` must have new names. Got {taken!r} of {name!r}; give it another.")
        for measure, values in given.items():
            known[measure] = values if isinstance(values, dict) else mean_with_interval(values, **settings)
        known |= of_texts
        rows[name] = {"num_seeds": len(seeds), "num_samples_per_prompt": len(seeds[0][0]), "measures": known}
    for name, row in rows.items():
        row["head_to_head"] = None
        if baseline is not None and name != baseline:
            if judge is not None:
                sides = [completions[name], completions[baseline]]
                row["head_to_head"] = head_to_head(prompts, *sides, judge, **settings)
            else:
                sides = [rewards[name], rewards[baseline]]
                row["head_to_head"] = compare_rewards(*sides, tie_margin=tie_margin, **settings)
    return Report({"baseline": baseline, "num_prompts": len(prompts)} | settings, rows)


def _measures_of_texts(seeds: list[list[list]], pool: int, settings: dict) -> dict[str, dict]:
    """What the completions (S, P, N) of a method say of themselves."""

    def mean(function) -> dict:
        values = [[[float(function(sample)) for sample in samples] for samples in rows] for rows in seeds]
        return mean_with_interval(torch.tensor(values, dtype=torch.float64), **settings)

    every = [sample for rows in seeds for samples in rows for sample in samples]
    known = {"num_words": mean(lambda sample: len(text_of(sample).split()))}
    if all(isinstance(sample, Completion) for sample in every):
        known["num_tokens"] = mean(lambda sample: len(sample.completion_ids))
        known["is_complete"] = mean(lambda sample: sample.is_complete)
        if all(sample.seconds for sample in every):
            num_tokens = sum(len(sample.completion_ids) for sample in every)
            known["tokens_per_second"] = _number(num_tokens / sum(sample.seconds for sample in every))
    texts = [[text_of(sample) for sample in samples] for samples in seeds[0]]  # (P, N)
    for n in NGRAMS:
        known[f"distinct_{n}"] = _number(distinct_n([text for samples in texts for text in samples[:pool]], n))
    if len(texts[0]) > 1:
        within = self_similarity(texts, max_pairs=32, seed=settings["seed"])  # (P,)
        known["self_similarity_within"] = (
            mean_with_interval(within.view(1, -1, 1), **settings) if len(texts) > 1 else _number(within.item())
        )
    if len(texts) > 1:
        across = self_similarity([[samples[0] for samples in texts]], seed=settings["seed"])
        known["self_similarity_across"] = _number(across.item())
    return known


def _given_measures(name: str, given: Mapping | Sequence[Mapping], seeds: list[list[list]]) -> dict:
    """Measures by name: values (S, P, N), or a mean that is known as it is."""
    given = [given] * len(seeds) if isinstance(given, Mapping) and not given else given
    given = [given] if isinstance(given, Mapping) else list(given)
    num_values = sum(map(len, seeds[0]))
    if len(given) != len(seeds) or any(set(one) != set(given[0]) for one in given):
        raise ValueError(
            f"`measures` must have the same names for each seed. Got {[sorted(one) for one in given]} for {len(seeds)} "
            f"seeds of {name!r}; give a mapping for each."
        )
    measures = {}
    for measure in given[0]:
        values = torch.stack([torch.as_tensor(one[measure], dtype=torch.float64) for one in given])
        if values.dim() == 1:  # a number for each seed
            measures[measure] = _number(values.mean().item())
        elif values.shape[1:] == (num_values,):
            measures[measure] = values.view(len(seeds), len(seeds[0]), -1)
        else:
            raise ValueError(
                "A measure must be a number, or have one for each completion. Got shape "
                f"{tuple(values.shape[1:])} of {measure!r} for {num_values} completions of {name!r}; pass the numbers "
                "in the order of the completions."
            )
    return measures


def _number(value: float) -> dict[str, float | None]:
    """A mean without an interval."""
    return {"mean": value if math.isfinite(value) else None, "low": None, "high": None}


def _ends(value: dict) -> tuple[float, float]:
    """Ends of an interval, the mean itself where there is none."""
    return tuple(value["mean"] if value[end] is None else value[end] for end in ("low", "high"))


def _cell(value: dict | None, mean: str = "mean") -> str:
    if value is None or value[mean] is None:
        return ""
    interval = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value[mean]:.3f}{interval}"
