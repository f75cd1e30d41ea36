# SPDX-License-Identifier: Apache-2.0

"""
Rewards of seven weightings of two objectives, praise and calm, at one KL from the patient in the controlled world.

```bash
python benchmarks/objectives.py --seed 0
```

- *two doctors*, *two doctors, guided flow*: trained once each; the weighting is chosen at decoding time.
- *MOD*: two patients tuned by DPO, mixed at decoding time (https://huggingface.co/papers/2406.18853).
- *soup*: the averaged weights of these two patients (https://huggingface.co/papers/2306.04488).
- *DPO for each weighting*: a patient tuned on labels of the weighted oracle, for each weighting.

The strength of each policy is matched to the KL on validation prompts; tuned patients are mixed with the original
patient. Rewards and KL are importance-weighted estimates on patient samples for test prompts. The hypervolume is the
area between the front and the patient's own rewards, divided by the area for the best possible policies: the same
samples, reweighted by the weighted reward, at the same KL. Each measurement is appended to the output at once, so a
stopped run can be resumed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from frontier import FULL, follow, read
from methods import DPO_GRID, GUIDED, RATE, Task, train_dpo, train_tfpo
from patient_samples import Guide, PatientSamples

from trl_tfpo import DoctorGuidedLogitsProcessor
from trl_tfpo.testbed import Attribute
from trl_tfpo.testbed.frontier import find_tilt, kl_from_uniform


NAMES = ("praise", "calm")
QUICK = dict(num_pairs=32, max_steps=2, num_samples_per_prompt=8)
DPO = DPO_GRID[0]  # the other setting is better for each objective alone, but worse in all three methods
LARGEST = {"two doctors": 4.0, "two doctors, guided flow": 4.0}  # strengths; 1 for other methods, which are mixtures


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl", type=float, default=1.0, help="nats per completion")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives.jsonl"))
    parser.add_argument(
        "--quick", action="store_true", help="few pairs, steps, samples and weightings, to check that it runs"
    )
    args = parser.parse_args(arguments)
    sizes, num_weightings = (QUICK, 2) if args.quick else (FULL, 7)
    tasks = {name: Task(name, args.seed, **sizes) for name in NAMES}
    task = tasks[NAMES[0]]
    samples = task.samples("test")  # with the rewards of both objectives
    origin = tuple(samples.rewards[name].mean().item() for name in NAMES)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    print("| method | hypervolume | trainings | KL (nats) | praise and calm, by weighting |\n|---|---:|---:|---|---|")
    for method, (guides, num_trainings) in make_methods(tasks, num_weightings).items():
        key = task.key | {"attribute": "both", "method": method, "target": args.kl}
        for index in range(num_weightings):
            weight = index / (num_weightings - 1)
            if read(args.output, **key, weight=weight):
                continue
            guide = guides(weight)
            (near,) = follow(task, guide, [args.kl], LARGEST.get(method, 1.0))
            reached = samples.weigh(guide(near["beta"]), samples.doctor_logits(guide(near["beta"])))
            rewards = [reached.rewards[name].mean().item() for name in NAMES]
            line = key | {"weight": weight, "rewards": rewards} | reached.row(beta=near["beta"])
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        lines = sorted(read(args.output, **key), key=lambda line: line["weight"])
        points, kls = [line["rewards"] for line in lines], [line["kl"] for line in lines]
        found[method] = hypervolume(points, origin) / hypervolume(tilted_front(samples, kls), origin)
        shown = ", ".join(f"({praise:.2f}, {calm:.2f})" for praise, calm in points)
        kl = f"{min(kls):.2f} to {max(kls):.2f}"
        print(f"| {method} | {found[method]:.3f} | {num_trainings} | {kl} | {shown} |", flush=True)
    return found


def make_methods(tasks: dict[str, Task], num_weightings: int) -> dict[str, tuple[Callable[[float], Guide], int]]:
    """
    Return for each method a function from the weight of praise to a guide, and the number of trainings. A model is
    trained at its first use.
    """

    @cache
    def doctor(name: str):
        return train_tfpo(tasks[name], **RATE)

    @cache
    def flow(name: str):
        return train_tfpo(tasks[name], **GUIDED)

    @cache
    def tuned(name: str):
        return train_dpo(tasks[name], tasks[name].fresh("patient"), **DPO)

    def mix(model, **settings):
        def guides(weight: float) -> Guide:
            both = [model(name) for name in NAMES]
            return lambda s: DoctorGuidedLogitsProcessor(both, beta=[s * weight, s * (1 - weight)], **settings)

        return guides

    def soup(weight: float) -> Guide:
        model = tasks[NAMES[0]].fresh("patient")
        praise, calm = (tuned(name).state_dict() for name in NAMES)
        model.load_state_dict({key: weight * praise[key] + (1 - weight) * calm[key] for key in praise})
        return lambda s: DoctorGuidedLogitsProcessor(model.eval(), beta=s)

    def retrained(weight: float) -> Guide:
        task = mixed_task(tasks[NAMES[0]], weight)
        ends = {1.0: NAMES[0], 0.0: NAMES[1]}  # weightings with the labels of one objective
        model = tuned(ends[weight]) if weight in ends else train_dpo(task, task.fresh("patient"), **DPO)
        return lambda s: DoctorGuidedLogitsProcessor(model, beta=s)

    return {
        "two doctors": (mix(doctor), 2),
        "two doctors, guided flow": (mix(flow, alpha=1.0), 2),
        "MOD": (mix(tuned), 2),
        "soup": (soup, 2),
        "DPO for each weighting": (retrained, num_weightings),
    }


def mixed_task(task: Task, weight: float) -> Task:
    """Return the same task with labels by the weighted sum of both rewards."""
    world = task.world
    words = {
        word: share * sign
        for name, share in zip(NAMES, (weight, 1 - weight), strict=True)
        for word, sign in world.attributes[name].words.items()
    }
    mixed = Attribute("mixed", world.attributes[NAMES[0]].faces, words)
    language = replace(world.language)
    language.__dict__["attributes"] = world.attributes | {"mixed": mixed}  # replaces the cached property
    new = replace(task, attribute="mixed")
    new.__dict__["world"] = replace(world, language=language)
    return new


def tilted_front(samples: PatientSamples, kls: list[float]) -> list[tuple[float, ...]]:
    """Return rewards of the best policy for each weighting, at the KLs of a method, by reweighted patient samples."""
    rewards, front = [samples.rewards[name] for name in NAMES], []  # (P, N) each
    for index, kl in enumerate(kls):
        weight = index / (len(kls) - 1)
        mixed = weight * rewards[0] + (1 - weight) * rewards[1]
        _, policy = find_tilt(mixed, lambda weights: kl_from_uniform(weights).mean(), kl)
        front.append(tuple((policy * reward).sum(dim=1).mean().item() for reward in rewards))
    return front


def hypervolume(points: list[tuple[float, ...]], origin: tuple[float, ...]) -> float:
    """Return the area above the origin that the points dominate."""
    area, reached = 0.0, origin[1]
    for x, y in sorted(points, key=lambda point: -point[0]):
        if x > origin[0] and y > reached:
            area, reached = area + (x - origin[0]) * (y - reached), y
    return area


if __name__ == "__main__":
    main()
