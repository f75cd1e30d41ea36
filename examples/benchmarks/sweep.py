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
TFPO with one part left out, or one setting changed, at a time: what each part is worth, and what is behind the defaults.

```bash
python examples/benchmarks/sweep.py --attributes praise calm --seeds 0 1 2 --output runs/sweep.jsonl
python examples/benchmarks/sweep.py --world DIR --attributes NAME --changes nothing
```

Policies are measured on weighed samples of the patient for validation prompts (`patient_samples.py`), and efficiency is
interpolated between strengths. What is measured is a line of the output at once, and a run that was cut short goes on where it
stopped.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

from frontier import FULL, KLS, SHARES, interpolate, read, spread
from methods import PUBLISHED, RATE, Task, fine_tuning, full_trajectory, no_boundary, train_tfpo
from patient_samples import PatientSamples
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_tfpo import DoctorGuidedLogitsProcessor


QUICK = dict(num_pairs=16, max_steps=2, num_samples_per_prompt=8)
SETTINGS = {
    "reward_direction": ["label", "faces"],
    "importance_temperature": [1.0, 2.0, 5.0],
    "gap_floor": [1e-6, 0.2],
    "sparsity_threshold": [0.0, 0.6],
    "reward_temperature": [0.0625, 0.25],
    "reference_weight": [0.0, 0.5],
    "subtb_lambda": [0.0, 0.9],
    "value_loss_weight": [0.0, 1.0],
    "value_margin": [1.0],
    "value_head_learning_rate": [3e-4, 3e-2],
    "learning_rate": [1e-3],
}
CHANGES = {
    "nothing": {},
    "as published": PUBLISHED,
    "whole trajectory only": dict(objective=full_trajectory),
    "no boundary": dict(objective=no_boundary),
    "no flow: fine-tuned on the chosen": dict(objective=fine_tuning),
} | {f"{name}={value}": {name: value} for name, values in SETTINGS.items() for value in values}
# What is taken from the patient's exponent for each unit of beta
FORMS = {"mixture": 1.0, "between": 0.75, "product": 0.0}


def efficiencies(samples: PatientSamples, doctor: PreTrainedModel, attribute: str) -> dict[str, list[float | None]]:
    """Efficiency of each form at each of `KLS`; None where no strength leads there."""
    found, doctor_logits = {}, samples.heard(DoctorGuidedLogitsProcessor(doctor, beta=1.0))
    for form, taken in FORMS.items():

        def guide(beta: float, taken: float = taken) -> DoctorGuidedLogitsProcessor:
            return DoctorGuidedLogitsProcessor(doctor, alpha=1 - taken * beta, beta=beta)

        rows = samples.follow(guide, doctor_logits, SHARES, attribute=attribute, max_kl=max(KLS))
        points = [(row["kl"] ** 0.5, row["efficiency"]) for row in rows if row["efficiency"] is not None]
        found[form] = [interpolate(points, kl**0.5) for kl in KLS]
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attributes", nargs="+", default=["praise", "calm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--changes", nargs="+", default=list(CHANGES), choices=list(CHANGES), help="all unless given")
    parser.add_argument("--world", type=Path, help="folder of `trl_tfpo.testbed.build`; what ships unless given")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few settings, pairs, steps and samples: whether it runs")
    args = parser.parse_args(arguments)
    changes = args.changes[:3] if args.quick else args.changes
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cases = list(itertools.product(args.seeds, args.attributes))
    for seed, attribute in tqdm(cases, desc="Seeds and attributes"):
        task = Task(attribute, seed, **(QUICK if args.quick else FULL), weights=args.world)
        for change in changes:
            key = {"attribute": attribute, "seed": seed, "change": change}
            if read(args.output, **key):
                continue
            found = efficiencies(task.samples("validation"), train_tfpo(task, **RATE | CHANGES[change]), attribute)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(key | found) + "\n")
    rows = [row for row in read(args.output) if (row["seed"], row["attribute"]) in cases]
    print("\n" + table(rows))
    return rows


def table(rows: list[dict]) -> str:
    """Mean and deviation over seeds and attributes of each change, as a mixture; and the mean of each form."""
    lines = ["| changed | " + " | ".join([f"{kl} nats" for kl in KLS] + [f"mean, {form}" for form in FORMS]) + " |"]
    lines += ["|---" + "|---:" * (len(KLS) + len(FORMS)) + "|"]
    for change in dict.fromkeys(row["change"] for row in rows):
        mine = [row for row in rows if row["change"] == change]
        columns = [list(column) for column in zip(*(row["mixture"] for row in mine), strict=True)]
        columns += [[mean_of(row[form]) for row in mine] for form in FORMS]
        shown = [spread([value for value in column if value is not None]) for column in columns]
        lines.append(f"| {change} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def mean_of(values: list[float | None]) -> float | None:
    """Of those that are there, if any."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


if __name__ == "__main__":
    main()
