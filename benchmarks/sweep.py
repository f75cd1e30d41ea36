# SPDX-License-Identifier: Apache-2.0


"""
Ablations: TFPO without one of its parts, or with one changed setting.

```bash
python benchmarks/sweep.py --attributes praise calm --seeds 0 1 2 --output runs/sweep.jsonl
python benchmarks/sweep.py --world DIR --attributes NAME --changes nothing
```

Policies are measured on importance-weighted samples of the patient for validation prompts (`patient_samples.py`), and
efficiency is interpolated between strengths. Each measurement is appended to the output at once, so a stopped run can
be resumed.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from frontier import FULL, KLS, SHARES, interpolate, read, spread
from methods import RATE, REWARDS, Task, fine_tuning, full_trajectory, no_boundary, tfpo
from tqdm import tqdm


QUICK = dict(num_pairs=16, max_steps=2, num_samples_per_prompt=8)
PARTS = {
    "nothing": {},
    "whole trajectory only": dict(objective=full_trajectory),
    "no value discrimination": dict(value_loss_weight=0.0),
    "no sparsity": dict(sparsity_threshold=0.0),
    "no boundary": dict(objective=no_boundary),
    "no reference": dict(reference_weight=0.0),
    "no agreement: by the label": dict(reward_direction="label"),
    "no agreement: by the faces, `reward_temperature=0.35`": dict(reward_direction="faces", reward_temperature=0.35),
    "no flow: fine-tuned on the chosen": dict(objective=fine_tuning),
}
SETTINGS = {
    "policy": ["guided"],
    "disagreement_weight": [0.0],
    "importance_temperature": [1.0],
    "gap_floor": [1e-6],
    "reward_temperature": [0.125, 0.5],
    "reference_weight": [0.95, 0.9],
    "subtb_lambda": [1.0, 0.9],
    "value_head_learning_rate": [3e-3],
    "value_margin": [1.0],
}
CHANGES = PARTS | {f"{name}={value}": {name: value} for name, values in SETTINGS.items() for value in values}
LARGEST = 4.0  # largest strength


def measure(task: Task, **settings) -> dict:
    """
    Train a doctor with these settings. Return its efficiency at each of `KLS`, and its entropy in nats per token at
    the first of `REWARDS`. Values that no strength reaches are None.
    """
    samples, guide = task.samples("validation"), tfpo(task, **RATE | settings)
    strengths = [LARGEST * share for share in SHARES]
    rows = samples.follow(
        guide, samples.doctor_logits(guide(1.0)), strengths, attribute=task.attribute, max_kl=max(KLS)
    )
    points = [(row["kl"] ** 0.5, row["efficiency"]) for row in rows if row["efficiency"] is not None]
    return {
        "efficiencies": [interpolate(points, kl**0.5, slack=0.1 * kl**0.5) for kl in KLS],
        "entropy": interpolate([(row["reward"], row["entropy"]) for row in rows], REWARDS[0]),
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attributes", nargs="+", default=["praise", "calm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--changes", nargs="+", default=list(CHANGES), choices=list(CHANGES), help="names of changes (default: all)"
    )
    parser.add_argument(
        "--world", type=Path, help="folder of `trl_tfpo.testbed.build` (default: the world of the package)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sweep.jsonl"))
    parser.add_argument(
        "--quick", action="store_true", help="few settings, pairs, steps and samples, to check that it runs"
    )
    args = parser.parse_args(arguments)
    changes = args.changes[:3] if args.quick else args.changes
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if args.quick else FULL
    cases = itertools.product(args.seeds, args.attributes)
    tasks = [Task(attribute, seed, **sizes, weights=args.world) for seed, attribute in cases]
    for task, change in tqdm(list(itertools.product(tasks, changes)), desc="Changes"):
        key = task.key | {"change": change}
        if read(args.output, **key):
            continue
        found = measure(task, **CHANGES[change])
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(key | found) + "\n")
    rows = [row for task in tasks for row in read(args.output, **task.key)]
    print("\n" + table(rows))
    return rows


def table(rows: list[dict]) -> str:
    """Return a table of each change: efficiency at each KL and its mean, and entropy, over seeds and attributes."""
    columns = [*(f"{kl} nats" for kl in KLS), "mean", f"entropy at reward {REWARDS[0]}"]
    lines = ["| changed | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for change in dict.fromkeys(row["change"] for row in rows):
        mine = [row for row in rows if row["change"] == change]
        found = list(zip(*(row["efficiencies"] for row in mine), strict=True))
        found += [[statistics.mean(known) for row in mine if (known := without_none(row["efficiencies"]))]]
        found += [[row["entropy"] for row in mine]]
        lines.append(f"| {change} | " + " | ".join(spread(without_none(values)) for values in found) + " |")
    return "\n".join(lines)


def without_none(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


if __name__ == "__main__":
    main()
