# SPDX-License-Identifier: Apache-2.0

"""
Reports: measures of several methods on the same prompts, with confidence intervals, as JSON, a table or a figure.

Shapes: S seeds, P prompts, N samples of each prompt.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..common.atomic import atomic_write
from ..faces import Prompt
from .bootstrap import IntervalSettings, mean_with_interval
from .completions import Completion, Completions, Grouped, group_by_prompt, text_of
from .diversity import distinct_n, self_similarity
from .judges import PairwiseJudge, RewardFunction
from .win_rates import compare_rewards, head_to_head, rewards_by_prompt


if TYPE_CHECKING:
    from matplotlib.axes import Axes


NGRAMS = (1, 2, 3, 4)
MAX_PAIRS = 32  # per prompt, for `self_similarity_within`
Interval = dict[str, float | None]  # `mean`, `low` and `high`
Measures = Mapping[str, float | Sequence[float] | torch.Tensor]  # by name: one number, or one per completion


@dataclass(frozen=True)
class Report:
    """
    Result of [`evaluate_completions`], in plain numbers. A loaded report equals the saved one.

    Args:
        settings (`dict`):
            `baseline`, `num_prompts`, and `level`, `num_resamples` and `seed` of the intervals.
        methods (`dict`):
            By name of the method: `num_seeds` and `num_samples_per_prompt`; `measures`, each with a `mean` and an
            interval from `low` to `high` (`None` if unknown); and `head_to_head`, the win rates against the baseline,
            or `None`.
    """

    settings: dict[str, object]
    methods: dict[str, dict]

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON, atomically."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """Read a saved report. Raises `ValueError` when the file is not a report."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"A report must be a file that `Report.save` wrote. Got {str(path)!r}: {error}; save it again."
            ) from error

    def table(self) -> str:
        """Format the report as a Markdown table, with a row for each measure and a column for each method."""
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
        """Plot distinct n-grams and, if known, rewards (against KL) and win rates. Needs matplotlib."""
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
        with atomic_write(path) as part:
            figure.savefig(part, dpi=150, format=Path(path).suffix.removeprefix(".") or "png")

    def _plot_reward(self, axes: "Axes") -> None:
        rows = {name: row["measures"] for name, row in self.methods.items()}
        has_kl = all("kl" in row for row in rows.values())
        for index, (name, row) in enumerate(rows.items()):
            x: dict = row["kl"] if has_kl else _mean_alone(index)
            bars = [_error_bar(x), _error_bar(row["reward"])]
            axes.errorbar([x["mean"]], [row["reward"]["mean"]], xerr=bars[0], yerr=bars[1], marker="o", label=name)
        axes.set(ylabel="reward", xlabel="KL from the patient (nats per completion)" if has_kl else "")
        if not has_kl:
            axes.set_xticks(range(len(rows)), list(rows), rotation=20)
        else:
            axes.legend()

    def _plot_head_to_head(self, axes: "Axes") -> None:
        compared = {name: row["head_to_head"] for name, row in self.methods.items() if row["head_to_head"]}
        for index, row in enumerate(compared.values()):
            left = 0.0
            for share, color in (("win", "tab:green"), ("tie", "lightgray"), ("loss", "tab:red")):
                axes.barh(index, row[share], left=left, color=color, label=share if index == 0 else None)
                left += row[share]
            score = {"mean": row["win_half_tie"], "low": row["low"], "high": row["high"]}
            axes.errorbar([score["mean"]], [index], xerr=_error_bar(score), marker="o", color="black")
        axes.axvline(0.5, color="black", linestyle=":")
        axes.set_yticks(range(len(compared)), list(compared))
        axes.set(xlim=(0, 1), xlabel=f"against {self.settings['baseline']}; dot: win + half ties")
        axes.legend(loc="lower right")

    def _plot_diversity(self, axes: "Axes") -> None:
        for name, row in self.methods.items():
            shares = [row["measures"][f"distinct_{n}"]["mean"] for n in NGRAMS]
            axes.plot(NGRAMS, [math.nan if share is None else share for share in shares], marker="o", label=name)
        axes.set(xlabel="n", ylabel="share of n-grams that are distinct", xticks=NGRAMS, ylim=(0, 1.05))
        axes.legend()


def evaluate_completions(
    prompts: Sequence[Prompt],
    completions: Mapping[str, Completions],
    reward_fn: RewardFunction | None = None,
    *,
    baseline: str | None = None,
    judge: PairwiseJudge | None = None,
    measures: Mapping[str, Measures | Sequence[Measures]] | None = None,
    tie_margin: float = 0.0,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Report:
    """
    Measure the completions of several methods on the same prompts. The report has these measures of each method:

    - `reward`, with `reward_fn`.
    - `num_words`. For [`Completion`] objects also `num_tokens`, `is_complete` and, if times are known,
      `tokens_per_second`.
    - `distinct_1` to `distinct_4`, over the first samples of each prompt in the first seed, equally many for
      all methods.
    - `self_similarity_within`, among the samples of a prompt, and `self_similarity_across`, among the first samples of
      all prompts; both of the first seed.
    - `measures` from the caller, such as `kl` and `entropy` of [`next_token_statistics`] or `kl` of [`sampled_kl`].

    Args:
        prompts (sequence of `str` or `list[dict]`):
            P prompts.
        completions (mapping from `str` to a sequence of [`Completion`] or `str`, or to one sequence per seed):
            Completions of each method: the samples of the first prompt, then those of the second, and so on.
        reward_fn (`Callable`, *optional*):
            A [`RewardModel`] or any `(prompts, completions) -> list[float]`. It is called once per method.
        baseline (`str`, *optional*):
            Method to compare all others with by [`head_to_head`], using `judge` or, without one, `reward_fn`.
        judge ([`PairwiseJudge`], *optional*):
            For instance a [`ChatJudge`].
        measures (mapping, *optional*):
            Additional measures, by method and then by name: one number per completion, or a single number such as
            `extra_forwards_per_token`. A method with several seeds needs a sequence of mappings, one per seed.
        tie_margin (`float`, *optional*, defaults to `0.0`):
            Rewards that differ by no more than this are a tie.
        level, num_resamples, seed:
            As in [`bootstrap_interval`].

    Returns:
        [`Report`]

    Raises:
        `ValueError`: when completions or measures do not match the prompts, a method is unknown, a measure has the
            name of a built-in one, a `baseline` lacks both `judge` and `reward_fn`, a setting is out of range, or a
            reward is not finite.

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
            f"{baseline!r} and {sorted(measures)} for {sorted(completions)}; use the same names."
        )
    if baseline is not None and judge is None and reward_fn is None:
        raise ValueError(
            "A comparison needs a judge or a reward function. Got only a `baseline`; pass `judge` or `reward_fn`."
        )
    settings: IntervalSettings = {"level": level, "num_resamples": num_resamples, "seed": seed}
    grouped = {name: group_by_prompt(prompts, texts) for name, texts in completions.items()}
    pool = min(len(seeds[0][0]) for seeds in grouped.values())  # texts of each prompt
    rewards: dict[str, torch.Tensor] = {}
    rows: dict[str, dict] = {}
    for name, seeds in grouped.items():
        intervals: dict[str, Interval] = {}
        if reward_fn is not None:
            rewards[name] = rewards_by_prompt(reward_fn, prompts, seeds)
            intervals["reward"] = mean_with_interval(rewards[name], **settings)
        given = _given_measures(name, measures.get(name, {}), seeds)
        text_measures = _measures_of_texts(seeds, pool, settings)
        for reused in {*given} & {"reward", *text_measures}:
            raise ValueError(f"`measures` must have new names. Got the built-in {reused!r} for {name!r}; rename it.")
        for measure, values in given.items():
            intervals[measure] = values if isinstance(values, dict) else mean_with_interval(values, **settings)
        intervals |= text_measures
        rows[name] = {"num_seeds": len(seeds), "num_samples_per_prompt": len(seeds[0][0]), "measures": intervals}
    for name, row in rows.items():
        row["head_to_head"] = None
        if baseline is not None and name != baseline:
            row["head_to_head"] = (
                compare_rewards(rewards[name], rewards[baseline], tie_margin=tie_margin, **settings)
                if judge is None
                else head_to_head(prompts, completions[name], completions[baseline], judge, **settings)
            )
    return Report({"baseline": baseline, "num_prompts": len(prompts), **settings}, rows)


def _measures_of_texts(seeds: Grouped, pool: int, settings: IntervalSettings) -> dict[str, Interval]:
    """Compute measures that need only the completions (S, P, N) of a method."""

    def mean(function: Callable[..., float]) -> Interval:
        values = [[[float(function(sample)) for sample in samples] for samples in rows] for rows in seeds]
        return mean_with_interval(torch.tensor(values, dtype=torch.float64), **settings)

    every = [sample for rows in seeds for samples in rows for sample in samples]
    sampled = [sample for sample in every if isinstance(sample, Completion)]
    intervals = {"num_words": mean(lambda sample: len(text_of(sample).split()))}
    if len(sampled) == len(every):
        intervals["num_tokens"] = mean(lambda sample: len(sample.completion_ids))
        intervals["is_complete"] = mean(lambda sample: sample.is_complete)
        seconds = [sample.seconds for sample in sampled if sample.seconds]
        if len(seconds) == len(sampled):
            intervals["tokens_per_second"] = _mean_alone(sum(len(x.completion_ids) for x in sampled) / sum(seconds))
    texts = [[text_of(sample) for sample in samples] for samples in seeds[0]]  # (P, N)
    for n in NGRAMS:
        intervals[f"distinct_{n}"] = _mean_alone(distinct_n([text for samples in texts for text in samples[:pool]], n))
    if len(texts[0]) > 1:
        within = self_similarity(texts, max_pairs=MAX_PAIRS, seed=settings["seed"])  # (P,)
        intervals["self_similarity_within"] = (
            mean_with_interval(within.view(1, -1, 1), **settings) if len(texts) > 1 else _mean_alone(within.item())
        )
    if len(texts) > 1:
        across = self_similarity([[samples[0] for samples in texts]], seed=settings["seed"])
        intervals["self_similarity_across"] = _mean_alone(across.item())
    return intervals


def _given_measures(
    name: str, given: Measures | Sequence[Measures], seeds: Grouped
) -> dict[str, torch.Tensor | Interval]:
    """Check the measures of one method. Returns values (S, P, N) or a mean without an interval, by name."""
    if not isinstance(given, Mapping):
        by_seed = list(given)
    else:
        by_seed = [given] if given else [given] * len(seeds)
    num_values = sum(map(len, seeds[0]))
    if len(by_seed) != len(seeds) or any(set(one) != set(by_seed[0]) for one in by_seed):
        raise ValueError(
            f"`measures` must have the same names for each seed. Got {[sorted(one) for one in by_seed]} for "
            f"{len(seeds)} seeds of {name!r}; pass one mapping per seed."
        )
    measures: dict[str, torch.Tensor | Interval] = {}
    for measure in by_seed[0]:
        values = torch.stack([torch.as_tensor(one[measure], dtype=torch.float64) for one in by_seed])
        if values.dim() == 1:  # a number for each seed
            measures[measure] = _mean_alone(values.mean().item())
        elif values.shape[1:] == (num_values,):
            measures[measure] = values.view(len(seeds), len(seeds[0]), -1)
        else:
            raise ValueError(
                "A measure must be a number, or have one for each completion. Got shape "
                f"{tuple(values.shape[1:])} of {measure!r} for {num_values} completions of {name!r}; pass the numbers "
                "in the order of the completions."
            )
    return measures


def _mean_alone(value: float) -> Interval:
    """Mean without an interval."""
    return {"mean": value if math.isfinite(value) else None, "low": None, "high": None}


def _error_bar(value: dict) -> list[list[float]]:
    """Distances between a mean and the ends of its interval, as matplotlib expects them; 0 without an interval."""
    ends = [value["mean"] if value[end] is None else value[end] for end in ("low", "high")]
    return [[abs(end - value["mean"])] for end in ends]


def _cell(value: dict | None, mean: str = "mean") -> str:
    """Format a cell of the table: mean and interval, if known."""
    if value is None or value[mean] is None:
        return ""
    interval = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value[mean]:.3f}{interval}"
