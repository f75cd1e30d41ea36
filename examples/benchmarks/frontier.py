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
Reward at equal distance from the patient: this method, and others that do the same job, in the controlled world.

```bash
python examples/benchmarks/frontier.py --attributes praise calm --seeds 0 1 2 --output runs/frontier.jsonl
python examples/benchmarks/frontier.py --quick
```

All methods are given the same preference pairs, steps and batches. Where a method has settings, the best of a small grid is
taken, by its efficiency on validation prompts at the second of the KLs; then its strength is matched to each KL, also on
validation prompts, and it is measured once on test prompts. What is measured is a line of the output at once: a run that
was cut short goes on where it stopped. At the end there are the grids, a table over seeds, and a picture.

- *temperature*, *best of n*: the patient alone, sampled cooler or hotter, or the best of n samples by the oracle itself.
- *published*, *TFPO*, *guided flow*: this package, see `docs/results.md`.
- *DPO doctor*: TRL's `DPOTrainer` on the doctor, decoded as a ratio with the doctor before training.
- *GenARM*: the doctor as an autoregressive reward model (https://huggingface.co/papers/2410.08193), Bradley-Terry on its
  summed log-probabilities, decoded as a product.
- *DPO patient*: TRL's `DPOTrainer` on all weights of the patient. At strength 1 it is the tuned patient; at others it is
  realigned at decoding time with the patient as it was (https://huggingface.co/papers/2402.02992), two large passes for
  each token.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer
from trl_tfpo.testbed import Comparison, World, load_world


FULL = dict(num_pairs=3000, max_steps=500, num_samples_per_prompt=100, kls=[0.3, 0.6, 1.2, 2.0])
QUICK = dict(num_pairs=200, max_steps=20, num_samples_per_prompt=16, kls=[0.1])
Guide = Callable[[float], DoctorGuidedLogitsProcessor]


@dataclass(frozen=True)
class Task:
    """What every method is given."""

    attribute: str
    seed: int
    sizes: dict

    @cached_property
    def world(self) -> World:
        return load_world()

    @cached_property
    def pairs(self) -> Dataset:
        return self.world.preference_dataset(self.attribute, num_pairs=self.sizes["num_pairs"], seed=self.seed)

    def comparison(self, split: str) -> Comparison:
        settings = dict(num_samples_per_prompt=self.sizes["num_samples_per_prompt"], seed=self.seed, split=split)
        return Comparison(self.world, self.attribute, **settings)

    def common(self, output_dir: str) -> dict:
        """Settings of all trainers."""
        settings = dict(max_steps=self.sizes["max_steps"], per_device_train_batch_size=16, seed=self.seed, bf16=False)
        settings |= dict(lr_scheduler_type="cosine", activation_checkpointing=False, dataloader_pin_memory=False)
        return settings | dict(save_strategy="no", report_to="none", disable_tqdm=True, output_dir=output_dir)


# Methods: a task and settings in, a guide for each strength out


def train_tfpo(task: Task, objective=None, **settings) -> PreTrainedModel:
    doctor = load_world().doctor
    with tempfile.TemporaryDirectory() as folder:
        TFPOTrainer(
            model=doctor,
            patient_model=task.world.patient,
            args=TFPOConfig(**task.common(folder), scoring_batch_size=256, **settings),
            train_dataset=task.pairs,
            processing_class=task.world.tokenizer,
            faces=task.world.attributes[task.attribute].faces,
            objective=objective,
        ).train()
    return doctor.eval()


def train_dpo(task: Task, model: PreTrainedModel, **settings) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        DPOTrainer(
            model=model,
            args=DPOConfig(**task.common(folder), precompute_ref_log_probs=True, **settings),
            train_dataset=task.pairs,
            processing_class=task.world.tokenizer,
        ).train()
    return model.eval()


def tfpo(task: Task, **settings) -> Guide:
    doctor = train_tfpo(task, **settings)
    return lambda beta: DoctorGuidedLogitsProcessor(doctor, beta=beta)


def product(task: Task, **settings) -> Guide:
    doctor = train_tfpo(task, **settings)
    return lambda beta: DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=beta)


def genarm(task: Task, reward_scale: float, **settings) -> Guide:
    def bradley_terry(*, doctor_logps, completion_mask, **_):
        chosen, rejected = doctor_logps.masked_fill(~completion_mask, 0).sum(dim=1).chunk(2)
        return -F.logsigmoid(reward_scale * (chosen - rejected)).mean(), {}

    return product(task, objective=bradley_terry, reference_weight=0.0, **settings)


def dpo_doctor(task: Task, **settings) -> Guide:
    doctor, reference = train_dpo(task, load_world().doctor, **settings), load_world().doctor
    return lambda beta: DoctorGuidedLogitsProcessor(doctor, beta=beta, reference=reference)


def dpo_patient(task: Task, **settings) -> Guide:
    tuned = train_dpo(task, load_world().patient, **settings)
    return lambda beta: DoctorGuidedLogitsProcessor(tuned, beta=beta)


def temperature(task: Task) -> Guide:
    return lambda value: DoctorGuidedLogitsProcessor(task.world.patient, alpha=0.0, beta=1 / value)


PUBLISHED = dict(reward_direction="label", gap_floor=1e-6, reference_weight=0.0)
# Name: function, grid of settings, largest strength; strengths instead of KLs where there is nothing to match
METHODS = {
    "temperature": (temperature, [{}], [0.5, 0.85, 1.2]),
    "best of n": (None, [{}], [2, 4, 8, 16]),
    "published": (product, [PUBLISHED | dict(learning_rate=3e-3)], 2.0),
    "TFPO": (tfpo, [dict(learning_rate=3e-3)], 1.0),
    "guided flow": (product, [dict(policy="guided", reward_temperature=0.25, learning_rate=3e-3)], 4.0),
    "GenARM": (
        genarm,
        [dict(reward_scale=scale, learning_rate=1e-3) for scale in (0.05, 0.25)],
        4.0,
    ),
    "DPO doctor": (
        dpo_doctor,
        [dict(beta=0.1, learning_rate=rate) for rate in (3e-4, 1e-3)],
        4.0,
    ),
    "DPO patient": (
        dpo_patient,
        [dict(beta=0.1, learning_rate=3e-5), dict(beta=1.0, learning_rate=1e-4)],
        1.0,
    ),
}


# Measurement


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--attributes", nargs="+", default=["praise"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/frontier.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few pairs, steps and samples: whether it runs")
    args = parser.parse_args(arguments)
    sizes = QUICK if args.quick else FULL
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs = [(name, Task(x, seed, sizes)) for seed in args.seeds for x in args.attributes for name in args.methods]
    for name, task in tqdm(runs, desc="Methods"):
        measure(name, task, args.output)
    wanted = {(name, task.attribute, task.seed) for name, task in runs}
    rows = [row for row in read(args.output) if (row["method"], row["attribute"], row["seed"]) in wanted]
    print(f"\n{grids(rows)}\n\n{table(rows, sizes['kls'])}\n")
    plot(rows, args.output.with_suffix(".png"))
    print(f"Picture: {args.output.with_suffix('.png')}")


def measure(name: str, task: Task, output: Path) -> None:
    """Append the rows of a method that the output does not have yet."""
    function, grid, strengths = METHODS[name]
    key = {"method": name, "attribute": task.attribute, "seed": task.seed}
    done = {
        json.dumps(row["settings"], sort_keys=True) + row["split"] + str(row["target"])
        for row in read(output)
        if all(row[field] == value for field, value in key.items())
    }
    guides, comparisons = {}, {}

    def row(settings: dict, split: str, target: float) -> None:
        text = json.dumps(settings, sort_keys=True)
        if text + split + str(target) in done:
            return
        if split not in comparisons:
            comparisons[split] = task.comparison(split)
        comparison = comparisons[split]
        if function is None:
            found, seconds = comparison.add_best_of_n(target), 0.0
        else:
            if text not in guides:
                start = time.process_time()
                guides[text] = function(task, **settings), time.process_time() - start
            guide, seconds = guides[text]
            if isinstance(strengths, list):
                found = comparison.add(name, guide(target), beta=target)
            else:
                try:
                    found = comparison.add_at_kl(name, guide, target, max_beta=strengths)
                except ValueError:  # out of reach, so as near as it gets
                    found = comparison.add(name, guide(strengths), beta=strengths)
        found = {field: value for field, value in found.items() if field not in ("method", "texts")}
        line = key | {"settings": settings, "split": split, "target": target, "train_seconds": seconds} | found
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    targets = strengths if isinstance(strengths, list) else task.sizes["kls"]
    if len(grid) > 1:
        for settings in grid:
            row(settings, "validation", targets[min(1, len(targets) - 1)])
        chosen = [
            line
            for line in read(output)
            if line["split"] == "validation" and all(line[field] == value for field, value in key.items())
        ]
        grid = [max(chosen, key=lambda line: line["efficiency"] or 0)["settings"]]
    for target in targets:
        row(grid[0], "test", target)


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.is_file() else []


# Report


def grids(rows: list[dict]) -> str:
    """What was tried on validation prompts, and how it did."""
    lines = ["| method | attribute | seed | settings | efficiency (validation) |", "|---|---|---:|---|---:|"]
    for row in rows:
        if row["split"] == "validation":
            settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
            lines.append(
                f"| {row['method']} | {row['attribute']} | {row['seed']} | {settings} | {row['efficiency'] or 0:.3f} |"
            )
    return "\n".join(lines)


def table(rows: list[dict], kls: list[float]) -> str:
    """Efficiency near each KL, mean and standard deviation over seeds and attributes, and what it took."""
    lines = ["| method | " + " | ".join(f"{kl} nats" for kl in kls) + " | grammar | distinct-4 | training (s) |"]
    lines += ["|---" + "|---:" * (len(kls) + 3) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name and row["split"] == "test"]
        cells = []
        for kl in kls:
            near = [row["efficiency"] for row in mine if row["efficiency"] and abs(row["kl"] / kl - 1) < 0.3]
            cells.append(spread(near) if near else "")
        cells += [f"{statistics.mean(row[field] for row in mine):.2f}" for field in ("grammar", "distinct_4")]
        cells += [f"{statistics.median(row['train_seconds'] for row in mine):.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def plot(rows: list[dict], path: Path) -> None:
    """Efficiency against KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name and row["split"] == "test" and row["efficiency"]]
        axes.plot([row["kl"] for row in mine], [row["efficiency"] for row in mine], "o", alpha=0.7, label=name)
    axes.set(xlabel="KL from the patient (nats per completion)", ylabel="share of the possible gain", ylim=(0, 1.1))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
