# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo evaluate`: compare completions of several methods."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.printable import printable
from . import options
from .endpoint_methods import EndpointArguments, check_endpoint, grouped_texts, sample_methods
from .parser import Parser


if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation.judges import RewardFunction

Completions = dict[str, list[str]]  # by prompt, as JSON
Rewards = dict[tuple[str, str], float]  # by prompt, as JSON, and completion


@dataclass
class EvaluateArguments:
    """Options of `trl-tfpo evaluate`."""

    output_dir: str = field(metadata={"help": "Folder for `report.json` and `report.png`."})
    completions: list[str] = field(
        default_factory=list,
        metadata={
            "action": options.Repeated,
            "help": "Completions of each method, NAME=DATASET. A dataset is a file, a folder or a Hub name, with the "
            "columns `prompt` and `completion`. All methods need the same prompts.",
        },
    )
    reward_model: str | None = field(default=None, metadata={"help": "Reward model: a Hub name or a folder."})
    dtype: str = field(default="auto", metadata=options.DTYPE)
    world: str | None = field(
        default=None, metadata={"help": "Compute rewards by this oracle of the controlled world: 'praise' or 'calm'."}
    )
    baseline: str | None = field(default=None, metadata={"help": "Method to compare the others with."})
    level: float = field(default=0.95, metadata={"help": "Coverage of the confidence intervals."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap, and of completions from an endpoint."})
    output: str | None = field(
        default=None,
        metadata={"help": "Output for all completions and rewards: a `.jsonl` or `.parquet` file, or a folder."},
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub dataset to push completions and rewards to."})
    overwrite: bool = field(default=False, metadata=options.OVERWRITE)


def run(arguments: Sequence[str]) -> int:
    """Evaluate completions, write the report and print its table."""
    description = "Compare completions of several methods, by rewards, length and diversity."
    args, of_endpoint = Parser([EvaluateArguments, EndpointArguments], "evaluate", description).parse(arguments)
    check_endpoint(of_endpoint, has_completions=bool(args.completions))
    needs_rewards = args.output or args.push_to_hub or args.baseline is not None
    if needs_rewards and not (args.reward_model or args.world):
        names = "`--baseline`, `--output` and `--push_to_hub`"
        raise ValueError(f"{names} need rewards. Pass `--reward_model` or `--world`")

    from ..evaluation import evaluate_completions
    from .files import check_output, push_dataset, write_dataset

    folder = Path(args.output_dir)
    for output in (folder / "report.json", folder / "report.png", args.output):
        if output is not None:
            check_output(output, overwrite=args.overwrite)
    reward_fn = load_reward_fn(args)
    methods = read_methods(args.completions)
    prompts = list(next(iter(methods.values()), {}))
    sampled, measures = sample_methods(of_endpoint, prompts, is_world=args.world is not None, seed=args.seed)
    for name, of_method in sampled.items():
        if name in methods:
            raise ValueError(f"Each method must have a unique name. Got {name!r} twice; rename one")
        methods[name] = grouped_texts(of_method)
    prompts = list(next(iter(methods.values())))
    texts = {name: [text for prompt in prompts for text in grouped[prompt]] for name, grouped in methods.items()}
    rewards: Rewards = {}
    report = evaluate_completions(
        [json.loads(prompt) for prompt in prompts],
        {**texts, **sampled},
        None if reward_fn is None else recording(reward_fn, rewards),
        baseline=args.baseline,
        measures=measures,
        level=args.level,
        seed=args.seed,
    )
    report.save(folder / "report.json")
    report.plot(folder / "report.png")
    if args.output or args.push_to_hub:
        rows = rewarded_rows(methods, rewards)
        if args.output:
            write_dataset(rows, args.output)
        if args.push_to_hub:
            push_dataset(rows, args.push_to_hub)
    table = "\n".join(map(printable, report.table().splitlines()))
    print(f"{table}\n\nReport: {folder / 'report.json'}. Plot: {folder / 'report.png'}.")
    return 0


def load_reward_fn(args: EvaluateArguments) -> "RewardFunction | None":
    """Return the oracle of the controlled world, a reward model, or `None`."""
    if args.world is not None:
        from ..testbed.language import REVIEWS

        if args.world not in REVIEWS.attributes:
            raise ValueError(f"`--world` must be one of {sorted(REVIEWS.attributes)}. Got {args.world!r}")
        oracle = REVIEWS.attributes[args.world].oracle
        return lambda prompts, completions: [oracle(text) for text in completions]
    if args.reward_model is not None:
        from ..evaluation import RewardModel
        from .models import check_dtype

        return RewardModel(args.reward_model, dtype=check_dtype(args.dtype))
    return None


def recording(reward_fn: "RewardFunction", rewards: Rewards) -> "RewardFunction":
    """Return `reward_fn`, wrapped to store its results in `rewards`."""

    def recorded(prompts: Sequence[object], completions: Sequence[str]) -> Sequence[float]:
        found = reward_fn(prompts, completions)
        rewards.update(zip(zip(map(json.dumps, prompts), completions, strict=True), found, strict=True))
        return found

    return recorded


def read_methods(given: Sequence[str]) -> dict[str, Completions]:
    """Read the completions of each method from NAME=DATASET arguments. Check prompts and numbers of completions."""
    methods: dict[str, Completions] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if not separator or not name or name in methods:
            raise ValueError(f"`--completions` must be NAME=DATASET, each name once. Got {text!r}; correct it")
        methods[name] = read_completions(path)
    prompts = next(iter(methods.values()), {}).keys()
    for name, grouped in methods.items():
        sizes = {len(texts) for texts in grouped.values()}
        if grouped.keys() != prompts or len(sizes) != 1:
            raise ValueError(
                "All methods must have the same prompts, and the same number of completions per prompt. Got "
                f"{len(grouped)} prompts with {sorted(sizes)} completions of {name!r}, and {len(prompts)} prompts of "
                "the first method; generate them with the same options"
            )
    return methods


def read_completions(path: str) -> Completions:
    """Read the completions of each prompt in dataset order."""
    from .files import read_split

    rows = read_split(path, "train")
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(
            "Completions must have the columns `prompt` and `completion`. Got "
            f"{rows.column_names} in {path!r}; rename the columns"
        )
    grouped: Completions = {}
    for row in rows:
        completion = row["completion"]
        text = completion[-1].get("content") if isinstance(completion, list) and completion else completion
        if not isinstance(text, str):
            raise ValueError(f"A completion must be a text or messages. Got {completion!r} in {path!r}; correct it")
        grouped.setdefault(json.dumps(row["prompt"]), []).append(text)
    return grouped


def rewarded_rows(methods: Mapping[str, Completions], rewards: Rewards) -> "Dataset":
    """Return a dataset of the completions of all methods, with their rewards."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"method": name, "prompt": json.loads(prompt), "completion": text, "reward": rewards[prompt, text]}
            for name, grouped in methods.items()
            for prompt, texts in grouped.items()
            for text in texts
        ]
    )
