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

Nothing is sampled but the patient, once for each seed. Guided policies are measured on its samples of the validation prompts,
weighed by how much likelier the policy makes them, and so is the frontier: all settings are compared on the same texts. KLs are
exact for each token, and efficiency is interpolated between strengths. What is measured is a line of the output at once, and
a run that was cut short goes on where it stopped.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from frontier import KLS, interpolate, read, spread
from methods import PUBLISHED, Task, fine_tuning, full_trajectory, no_boundary, train_tfpo
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_tfpo.functional import guided_logps
from trl_tfpo.testbed import World, reward_kl_frontier
from trl_tfpo.testbed.world import sample_completions


FULL = dict(num_pairs=3000, max_steps=500, num_samples_per_prompt=400)
QUICK = dict(num_pairs=16, max_steps=2, num_samples_per_prompt=32)
BASE = dict(learning_rate=3e-3)
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
FORMS = {"mixture": lambda beta: 1 - beta, "product": lambda beta: 1.0}  # exponent of the patient
STRENGTHS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]


@dataclass(frozen=True)
class Samples:
    """
    What the patient said: P prompts, N samples of each, M = PN rows of L tokens.

    Args:
        ids (`torch.Tensor` of shape `(M, L)`):
            Prompts and completions, padded on the right.
        completion_mask (`torch.Tensor` of shape `(M, L)`):
            Which of them are completion.
        rewards (`dict[str, torch.Tensor]` of shape `(P, N)`):
            Of each attribute.
    """

    ids: torch.Tensor
    completion_mask: torch.Tensor
    rewards: dict[str, torch.Tensor]

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        """What a model says where completion tokens are predicted, (tokens, V)."""
        parts = zip(self.ids.split(256), self.completion_mask.split(256), strict=True)
        return torch.cat([model(ids).logits[:, :-1][mask[:, 1:]] for ids, mask in parts])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of a value of each token (tokens,) over each completion, (P, N)."""
        row = self.completion_mask.nonzero()[:, 0]
        shape = next(iter(self.rewards.values())).shape
        return values.new_zeros(len(self.ids)).index_add(0, row, values).view(shape)


def draw(world: World, num_samples_per_prompt: int, seed: int) -> Samples:
    """Samples of the patient on validation prompts."""
    prompts, tokenizer = world.prompts("validation"), world.tokenizer
    texts = sample_completions(
        world.patient, tokenizer, prompts, num_samples_per_prompt=num_samples_per_prompt, seed=seed
    )
    starts, rows = [], []
    for prompt, samples in zip(prompts, texts, strict=True):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for text in samples:
            answered = [*prompt, {"role": "assistant", "content": text}]
            rows.append(tokenizer.apply_chat_template(answered, return_dict=False))
            starts.append(len(start))
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    position = torch.arange(batch["input_ids"].size(1))
    completion_mask = batch["attention_mask"].bool() & (position >= torch.tensor(starts)[:, None])
    rewards = {
        name: torch.tensor([[attribute.oracle(text) for text in samples] for samples in texts])
        for name, attribute in world.attributes.items()
    }
    return Samples(batch["input_ids"], completion_mask, rewards)


def efficiencies(
    samples: Samples, patient_logits: torch.Tensor, doctor_logits: torch.Tensor, attribute: str, form: str
) -> list[float | None]:
    """Efficiency at each of `KLS`; None where no strength leads there."""
    rewards, points = samples.rewards[attribute], []
    frontier, patient_logps = reward_kl_frontier(rewards), patient_logits.log_softmax(dim=-1)
    tokens = samples.ids[samples.completion_mask][:, None]
    for beta in STRENGTHS:
        guided = guided_logps(
            patient_logits=patient_logits, doctor_logits=[doctor_logits], alpha=FORMS[form](beta), beta=[beta]
        )  # (tokens, V)
        shift = guided - patient_logps
        weights = samples.sums(shift.gather(1, tokens).squeeze(1)).double().softmax(dim=1)  # (P, N)
        kl = (weights * samples.sums((guided.exp() * shift).sum(dim=1))).sum(dim=1).mean().item()
        if kl > frontier.max_kl:
            break
        if kl < 1e-6:  # the patient itself
            continue
        points.append((kl**0.5, frontier.efficiency((weights * rewards).sum(dim=1).mean().item(), kl)))
    return [interpolate(points, kl**0.5) for kl in KLS]


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
        samples = draw(task.world, task.num_samples_per_prompt, seed)
        patient_logits = samples.logits(task.world.patient)
        for change in changes:
            key = {"attribute": attribute, "seed": seed, "change": change}
            if any(all(row[field] == value for field, value in key.items()) for row in read(args.output)):
                continue
            doctor_logits = samples.logits(train_tfpo(task, **BASE | CHANGES[change]))
            found = {form: efficiencies(samples, patient_logits, doctor_logits, attribute, form) for form in FORMS}
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(key | found) + "\n")
    rows = [row for row in read(args.output) if (row["seed"], row["attribute"]) in cases]
    print("\n" + table(rows))
    return rows


def table(rows: list[dict]) -> str:
    """Mean and deviation over seeds and attributes of each change, as a mixture; and its mean as a product."""
    lines = ["| changed | " + " | ".join(f"{kl} nats" for kl in KLS) + " | mean | as a product |"]
    lines += ["|---" + "|---:" * (len(KLS) + 2) + "|"]
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
