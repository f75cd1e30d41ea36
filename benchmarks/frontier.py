# SPDX-License-Identifier: Apache-2.0

"""
Reward of TFPO and of other methods at equal KL from the patient, in the controlled world.

```bash
python benchmarks/frontier.py --everything runs/results --attributes praise calm --seeds 0 1 2
python benchmarks/frontier.py --attributes praise calm --seeds 0 1 2 --output runs/frontier.jsonl
python benchmarks/frontier.py --quick
```

`--everything` runs the benchmarks of `docs/results/controlled_world.md`: the methods, two objectives
(`objectives.py`), sizes of patient and doctor (`weak_to_strong.py`), ablations (`sweep.py`, with the first seed only),
and random worlds 1 to 3 (`random_worlds.py`).

All methods (`methods.py`) have the same preference pairs, steps and batches. The settings of a method are chosen for
each attribute with the first seed, by the mean efficiency on validation prompts near the second and the third KL, or
at all strengths if a method cannot match a KL. All seeds are then trained with these settings and measured on test
prompts. Strengths are found on validation prompts. Efficiency is interpolated between measured strengths; outside
their range it is the efficiency at the nearest strength, if its KL differs by at most a fifth.

Guided methods and the frontier are measured on the same importance-weighted samples of the patient
(`patient_samples.py`). Other methods, and diversity, grammar and wins of all methods, are measured on texts sampled
from each policy.

Each measurement is appended to the output at once, so a stopped run can be resumed. Several runs can divide the work
(`--methods`, `--attributes`), each with its own output; `--report` reads several outputs. Intervals are by bootstrap
over seeds and test prompts, with fixed attributes. Intervals of diversity are the range over seeds.
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from methods import METHODS, REWARDS, Method, Task
from patient_samples import Guide, shares
from tqdm import tqdm

from trl_tfpo.evaluation import bootstrap_interval, distinct_n, self_similarity
from trl_tfpo.testbed import Comparison
from trl_tfpo.testbed.report import POOL, evenly_chosen


FULL = dict(num_pairs=3000, max_steps=500, num_samples_per_prompt=50, num_patient_samples_per_prompt=400)
QUICK = dict(num_pairs=128, max_steps=10, num_samples_per_prompt=12)
KLS = [0.3, 0.6, 1.2, 2.0]  # nats
FAR = 2.6  # nats, about the KL of a patient tuned by DPO
QUICK_KLS = [0.05, 0.1]
SHARES = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]  # of the strongest guide
NUM_KEPT = 25  # samples of each prompt whose rewards are written to the output
OURS = ("guided flow", "TFPO", "guided flow, more diverse", "TFPO, more diverse")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names of methods (default: all)")
    parser.add_argument("--attributes", nargs="+", default=["praise"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--world", type=Path, help="folder of `trl_tfpo.testbed.build` (default: the world of the package)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/frontier.jsonl"))
    parser.add_argument("--everything", type=Path, help="run all parts, with results in this folder")
    parser.add_argument("--report", type=Path, nargs="+", help="report these existing outputs")
    parser.add_argument("--quick", action="store_true", help="few pairs, steps and samples, to check that it runs")
    args = parser.parse_args(arguments)
    if unknown := set(args.methods or ()) - set(METHODS):
        parser.error(f"`--methods` must be among {list(METHODS)}. Got {sorted(unknown)}.")
    if args.everything and args.world:
        parser.error("`--everything` uses the world of the package. Leave out `--world`, or `--everything`.")
    if args.everything:
        return run_everything(args)
    if not args.report:
        measure_all(args)
    report(args, args.report or [args.output], args.output.with_suffix(".png"))


def run_everything(args: argparse.Namespace) -> None:
    """Run the benchmarks of `docs/results/controlled_world.md`, and write their results to a folder."""
    folder = args.everything
    folder.mkdir(parents=True, exist_ok=True)
    chosen = ["--methods", *args.methods] if args.methods else []
    seeds = ["--seeds", *map(str, args.seeds)]
    first = str(args.seeds[0])
    parts, outputs = {}, [folder / f"methods-{attribute}.jsonl" for attribute in args.attributes]
    for attribute, output in zip(args.attributes, outputs, strict=True):
        parts[output.stem] = ["frontier.py", *chosen, "--attributes", attribute, *seeds, "--output", output]
    parts["objectives"] = ["objectives.py", "--seed", first, "--output", folder / "objectives.jsonl"]
    for attribute in args.attributes:
        given = ["--attributes", attribute, "--seeds", first, "--output", folder / f"sweep-{attribute}.jsonl"]
        parts[f"sweep-{attribute}"] = ["sweep.py", *given]
    parts["random_worlds"] = ["random_worlds.py", "--output_dir", folder / "worlds"]
    parts["weak_to_strong"] = ["weak_to_strong.py", "--seed", first, "--output_dir", folder / "sizes"]
    run_parts(parts, folder, ["--quick"] * args.quick)
    report(args, outputs, folder / "methods.png")
    for name in parts:
        if not name.startswith("methods"):
            print(f"\n## {name}\n\n{(folder / f'{name}.md').read_text(encoding='utf-8')}")


def run_parts(parts: dict[str, list], folder: Path, arguments: list[str]) -> None:
    """Run scripts, one on each core, and write their output and run times to the folder."""

    def run(name: str) -> None:
        (script, *others), start = parts[name], time.perf_counter()
        command = [sys.executable, Path(__file__).with_name(script), *others, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # one core for each script
        with (folder / f"{name}.md").open("w", encoding="utf-8") as tables, (folder / f"{name}.log").open("w") as log:
            if subprocess.run(command, stdout=tables, stderr=log, env=environment).returncode:
                raise RuntimeError(f"{name} failed, see {log.name}; its measurements are kept for the next run.")
        with (folder / "minutes.txt").open("a", encoding="utf-8") as file:
            file.write(f"{name}: {(time.perf_counter() - start) / 60:.1f}\n")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(run, name) for name in parts]
        try:
            for part in tqdm(as_completed(futures), total=len(parts), desc="Parts"):
                part.result()
        finally:
            pool.shutdown(cancel_futures=True)


# Measurement


def measure_all(args: argparse.Namespace) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # The first seed of all tasks comes first, because it chooses the settings
    tasks = [
        Task(attribute, seed, **(QUICK if args.quick else FULL), weights=args.world)
        for seed in args.seeds
        for attribute in args.attributes
    ]
    for task, name in tqdm(list(itertools.product(tasks, args.methods or METHODS)), desc="Methods"):
        method = METHODS[name]
        if task.seed not in args.seeds[: method.num_seeds]:
            continue
        if args.quick:
            method = replace(method, grid=method.grid[:2])
        kls = QUICK_KLS if args.quick else [*KLS, FAR]
        measure(name, method, task, kls, args.output, first_seed=args.seeds[0])


def measure(name: str, method: Method, task: Task, kls: list[float], output: Path, *, first_seed: int) -> None:
    """Append the missing rows of a method to the output."""
    key = {"method": name} | task.key
    tried = key | {"seed": first_seed, "split": "validation"}
    trained = {}  # by settings, because the best one is later measured on test prompts
    for settings, split in [(settings, "validation") for settings in method.grid] + [(None, "test")]:
        if split == "validation" and (len(method.grid) == 1 or task.seed != first_seed):
            continue
        if split == "test":
            settings = best(method.grid, read(output, **tried))
        key |= {"settings": settings, "split": split}
        if read(output, **key):
            continue
        if (shown := json.dumps(settings)) not in trained:
            _ = task.gaps  # computed once for all settings of a task, outside the measured time
            start = time.process_time()
            trained[shown] = method.policy(task, **settings), time.process_time() - start
        policy, seconds = trained[shown]
        targets = kls if split == "test" else kls[1:3]
        if method.strengths is None:
            rows = follow(task, policy, targets, method.largest)
            if split == "test":  # on validation prompts no texts are sampled
                rows = sample(task, policy, [row["beta"] for row in rows], method.largest)
        else:
            comparison = task.comparison(split)
            rows = [describe(policy(comparison, x), comparison) for x in method.strengths]
        lines = [json.dumps(key | {"train_seconds": round(seconds, 1)} | row) + "\n" for row in rows]
        with output.open("a", encoding="utf-8") as file:  # all rows at once
            file.write("".join(lines))


def sample(task: Task, guide: Guide, strengths: list[float], largest: float) -> list[dict]:
    """
    Measure on test prompts: with importance-weighted samples, and with texts sampled at the second, the third and the
    last strength. At the last strength the texts replace the weighted samples, whose effective number is small.
    """
    samples, comparison = task.samples("test"), task.comparison("test")
    rows = samples.follow(guide, samples.doctor_logits(guide(largest)), strengths, attribute=task.attribute)

    def from_texts(row: dict) -> dict:
        return describe(comparison.add("guided", guide(row["beta"]), beta=row["beta"]), comparison)

    for row in rows[1:3]:
        row |= from_texts(row) | row
    for row in rows[3:][-1:]:
        row |= from_texts(row)
    return rows


def follow(task: Task, guide: Guide, kls: list[float], largest: float) -> list[dict]:
    """Return a row near each KL on validation prompts, or at the largest strength if it does not reach the KL."""
    samples, doctor_logits = task.samples("validation"), task.samples("validation").doctor_logits(guide(largest))
    follow = functools.partial(samples.follow, guide, doctor_logits, attribute=task.attribute)
    points = [(row["kl"] ** 0.5, row["beta"]) for row in follow([largest * x for x in SHARES], max_kl=max(kls))]
    points = sorted([(0.0, 0.0), *points])
    strengths = {interpolate(points, kl**0.5) for kl in kls}
    return follow(sorted(points[-1][1] if x is None else x for x in strengths))


def interpolate(points: list[tuple[float, float]], x: float, *, slack: float = 0.0) -> float | None:
    """Interpolate linearly between points sorted by x. Outside, return the nearest value within `slack`, or None."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    nearest = min(points, key=lambda point: abs(point[0] - x), default=(math.inf, None))
    return nearest[1] if abs(nearest[0] - x) <= slack else None


def describe(row: dict, comparison: Comparison) -> dict:
    """Replace the texts of a row by measures and by the rewards of some samples."""
    if "texts" not in row:
        return row
    num_samples = len(row["texts"]) // len(comparison.prompts)
    groups = [list(group) for group in zip(*[iter(row["texts"])] * num_samples, strict=True)]
    rewards = [[comparison.oracle(text) for text in group] for group in groups]
    gain = torch.tensor([statistics.mean(group) for group in rewards]) - comparison.patient_rewards.mean(dim=1)
    pool = evenly_chosen(row["texts"], POOL)
    kept = {name: value for name, value in row.items() if name not in ("method", "texts")}
    kept |= shares(comparison.frontier, gain, torch.full_like(gain, row["kl"]))
    kept |= {f"distinct_{n}": distinct_n(pool, n=n) for n in (1, 2, 3)}
    kept |= {"self_similarity": self_similarity([group[:NUM_KEPT] for group in groups]).mean().item()}
    kept |= {"num_words": statistics.mean(len(text.split()) for text in row["texts"])}
    return kept | {"rewards": [group[:NUM_KEPT] for group in rewards]}


def best(grid: list[dict], rows: list[dict]) -> dict:
    """Return the settings with the largest mean efficiency. Rows with a KL near 0 do not count."""

    def score(settings: dict) -> float:
        found = [x["efficiency"] for x in rows if x["settings"] == settings and x["efficiency"] and x["kl"] > 0.1]
        return statistics.mean(found) if found else -math.inf

    return max(grid, key=score)


def read(output: Path, **key) -> list[dict]:
    """Return the rows of an output that have these values, or no rows if it does not exist."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if all(row.get(field) == value for field, value in key.items())]


# Report


def report(args: argparse.Namespace, outputs: list[Path], picture: Path) -> None:
    """Print tables and draw a figure from the outputs, for the given methods, attributes and seeds."""
    kls, names = QUICK_KLS if args.quick else [*KLS, FAR], args.methods or list(METHODS)
    rows = [row for path in outputs for row in read(path) if row["method"] in names]
    rows = [row for row in rows if row["attribute"] in args.attributes and row["seed"] in args.seeds]
    check_is_one_run(rows)
    gains = {f"{kl} nats": cells(rows, "by_prompt", "kl", kl, math.sqrt) for kl in kls}
    more = {f"{field} at {x}": cells(rows, field, "reward", x) for field in ("distinct_4", "entropy") for x in REWARDS}
    print(f"\n{grids(rows)}\n\n{efficiencies(rows, kls)}\n\n{versus(rows, gains, '.3f', wins_near=kls[1])}\n")
    print(f"{diversity(rows)}\n\n{versus(rows, more, '.3f')}\n")
    plot(rows, picture)
    print(f"Picture: {picture}")


def check_is_one_run(rows: list[dict]) -> None:
    """Raise `ValueError` if the rows of a method on test prompts have different settings or sizes."""
    names, measured = ["settings", *(field.name for field in fields(Task))], {}
    for row in (row for row in rows if row["split"] == "test"):
        found = [row.get(name) for name in names]
        known = measured.setdefault((row["method"], row["attribute"], row["seed"]), found)
        if known != found:
            raise ValueError(
                f"A method must have one setting and one size. Got {known} and {found} for {row['method']!r}; remove "
                "the rows of one of them from the output, or use another output."
            )


def cells(rows: list[dict], value: str, at: str, x: float, scale: Callable[[float], float] = float) -> dict:
    """Return a value for each method, attribute and seed whose rows reach `at` = x, interpolated to x."""
    found, tested = {}, [row for row in rows if row["split"] == "test" and row.get(value) is not None and row[at] > 0]
    for key in sorted({(row["method"], row["attribute"], row["seed"]) for row in tested}):
        mine = [row for row in tested if (row["method"], row["attribute"], row["seed"]) == key]
        points = sorted(((scale(row[at]), np.array(row[value])) for row in mine), key=lambda point: point[0])
        y = interpolate(points, scale(x), slack=0.1 * scale(x))
        if y is not None:
            found[key] = y
    return found


def values_of(found: dict, method: str) -> dict:
    return {key[1:]: value for key, value in found.items() if key[0] == method}


def names_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def grids(rows: list[dict]) -> str:
    """Return a table of the settings tried on validation prompts, with their efficiencies."""
    lines = ["| method | attribute | settings | efficiency (validation) |", "|---|---|---|---|"]
    tried = [row for row in rows if row["split"] == "validation"]
    for (name, attribute, settings), mine in itertools.groupby(
        tried, lambda row: (row["method"], row["attribute"], row["settings"])
    ):
        shown = ", ".join(f"{key}={value}" for key, value in settings.items())
        found = ", ".join(f"{row['efficiency'] or math.nan:.2f} at {row['kl']:.2f}" for row in mine)
        lines.append(f"| {name} | {attribute} | {shown} | {found} |")
    return "\n".join(lines)


def efficiencies(rows: list[dict], kls: list[float]) -> str:
    """
    Return a table of costs, and of efficiency at each KL: mean and standard deviation over seeds and attributes. If
    only some runs reach a KL, their number is shown.
    """
    shown = " | ".join(f"{kl} nats" for kl in kls)
    lines = [f"| method | seeds | {shown} | grammar | passes for a token | training (s) |"]
    lines += ["|---" + "|---:" * (len(kls) + 2) + "|---|---:|"]
    at = {kl: cells(rows, "efficiency", "kl", kl, math.sqrt) for kl in kls}
    for name in names_of(rows):
        mine = [row for row in rows if row["method"] == name and row["split"] == "test"]
        shown = [str(len({row["seed"] for row in mine}))]
        num = len({(row["attribute"], row["seed"]) for row in mine})
        for found in (values_of(at[kl], name) for kl in kls):
            shown += [spread(list(found.values())) + (f" ({len(found)} of {num})" if 0 < len(found) < num else "")]
        grammar = [row["grammar"] for row in mine if "grammar" in row]
        shown += [f"{statistics.mean(grammar):.2f}" if grammar else "", METHODS[name].passes]
        seconds = statistics.median(row["train_seconds"] for row in mine) if mine else 0
        shown += [f"{seconds:.0f}" if seconds >= 1 else ""]  # empty for a method without training
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def versus(rows: list[dict], columns: dict[str, dict], form: str, *, wins_near: float | None = None) -> str:
    """Return a table of differences between ours and others on the same runs, with head-to-head wins near a KL."""
    ours, attributes = [name for name in names_of(rows) if name in OURS], {row["attribute"] for row in rows}
    lines = ["| ours | against | " + " | ".join(columns) + (" | win + half ties |" if wins_near else " |")]
    lines += ["|---|---" + "|---:" * (len(columns) + bool(wins_near)) + "|"]
    for name, other in itertools.product(ours, names_of(rows)):
        if other in ours and ours.index(other) <= ours.index(name):
            continue  # this pair is already listed
        shown = []
        for column in columns.values():
            mine, theirs = values_of(column, name), values_of(column, other)
            differences = {key: mine[key] - theirs[key] for key in mine if key in theirs}
            shown.append(interval(differences, attributes, form, sign="+"))
        shown += [interval(wins(rows, name, other, wins_near), attributes, ".2f")] if wins_near else []
        if any(shown):
            lines.append(f"| {name} | {other} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def wins(rows: list[dict], name: str, other: str, kl: float) -> dict:
    """Return win + half ties of `name` against `other` on each prompt, by the oracle, near a KL."""
    shares, tested = {}, [row for row in rows if row["split"] == "test" and "rewards" in row]
    for key in sorted({(row["attribute"], row["seed"]) for row in tested}):
        mine = [row for row in tested if (row["attribute"], row["seed"]) == key]
        sides = [
            min((row for row in mine if row["method"] == method), key=lambda row: abs(row["kl"] - kl), default=None)
            for method in (name, other)
        ]
        if None in sides or abs(sides[1]["kl"] - sides[0]["kl"]) > 0.1 * kl:
            continue
        a, b = (np.array(side["rewards"]) for side in sides)  # (P, N)
        margin = a[:, :, None] - b[:, None, :]
        shares[key] = ((margin > 0) + (margin == 0) / 2).mean(axis=(1, 2))
    return shares


def diversity(rows: list[dict]) -> str:
    """Return a table of diversity at equal reward, mean over seeds and attributes."""
    fields = ["distinct_1", "distinct_2", "distinct_3", "distinct_4", "entropy", "self_similarity", "num_words", "kl"]
    lines = ["| method | reward | " + " | ".join(fields) + " |", "|---" + "|---:" * (len(fields) + 1) + "|"]
    for reward, name in itertools.product(REWARDS, names_of(rows)):
        shown = []
        for field in fields:
            values = list(values_of(cells(rows, field, "reward", reward), name).values())
            shown.append(f"{np.mean(values):.3f}" if values else "")
        if any(shown):
            lines.append(f"| {name} | {reward} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def interval(found: dict, attributes: set[str], form: str, sign: str = "") -> str:
    """
    Return the mean over attributes and seeds, with an interval: by bootstrap over prompts and seeds if each prompt has
    a value, otherwise the range. Attributes are fixed. Seeds that lack an attribute are left out.
    """
    seeds = [seed for seed in sorted({seed for _, seed in found}) if all((x, seed) in found for x in attributes)]
    if not seeds:
        return ""
    by_seed = torch.tensor(np.array([np.mean([found[x, seed] for x in attributes], axis=0) for seed in seeds]))
    mean = f"{by_seed.mean().item():{sign}{form}}"
    if by_seed.numel() < 2:
        return mean
    low, high = bootstrap_interval(by_seed) if by_seed.dim() == 2 else map(float, by_seed.aminmax())  # (S, P), or (S,)
    return f"{mean} ({low:{sign}{form}} to {high:{sign}{form}})"


def plot(rows: list[dict], path: Path) -> None:
    """Draw efficiency against KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in names_of(rows):
        mine = [row for row in rows if row["method"] == name and row["split"] == "test" and row["efficiency"]]
        axes.plot([row["kl"] for row in mine], [row["efficiency"] for row in mine], "o", alpha=0.7, label=name)
    axes.set(xlabel="KL from the patient (nats per completion)", ylabel="share of the possible gain", ylim=(0, 1.1))
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
