# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo evaluate`: completions in, a report out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.printable import printable
from .parser import DTYPE_HELP, Parser, Repeated


@dataclass
class EvaluateArguments:
    """Completions, and who judges them."""

    completions: list[str] = field(
        metadata={
            "action": Repeated,
            "help": "NAME=DATASET for each method, a file, a folder or a Hub name: rows with `prompt` and `completion`, as "
            "`trl-tfpo generate` writes them. All have the same prompts.",
        }
    )
    output_dir: str = field(metadata={"help": "Folder for `report.json` and `report.png`."})
    reward_model: str | None = field(default=None, metadata={"help": "Hub name or path of a reward model."})
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    world: str | None = field(
        default=None, metadata={"help": "The oracle of the controlled world instead: 'praise' or 'calm'."}
    )
    baseline: str | None = field(default=None, metadata={"help": "The method that the others are compared with."})
    level: float = field(default=0.95, metadata={"help": "Coverage of the intervals."})
    seed: int = field(default=0, metadata={"help": "Seed of the resampling."})
    output: str | None = field(
        default=None,
        metadata={"help": "A `.jsonl` or `.parquet` file, or a folder, for all completions with their rewards."},
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Push completions and rewards to this dataset repository."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace outputs that exist."})


def read_completions(path: str) -> dict[str, list[str]]:
    """Completions of each prompt, as a key in JSON, in the order of the file."""
    from .files import read_split

    rows, grouped = read_split(path, "train"), {}
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(
            f"Completions must have the columns `prompt` and `completion`. Got {rows.column_names} in {path!r}; rename them"
        )
    for row in rows:
        completion = row["completion"]
        text = completion[-1].get("content") if isinstance(completion, list) and completion else completion
        if not isinstance(text, str):
            raise ValueError(f"A completion must be a text or messages. Got {completion!r} in {path!r}; mend it")
        grouped.setdefault(json.dumps(row["prompt"]), []).append(text)
    return grouped


def run(arguments: Sequence[str]) -> int:
    """Write the report, and print its table."""
    (args,) = Parser(EvaluateArguments, "evaluate", "Measure completions, and compare methods.").parse(arguments)
    if (args.output or args.push_to_hub) and not (args.reward_model or args.world):
        raise ValueError("`--output` and `--push_to_hub` are for rewards. Pass `--reward_model` or `--world` as well")

    from datasets import Dataset

    from ..evaluation import RewardModel, evaluate_completions
    from .files import check_output, push_dataset, write_dataset
    from .models import check_dtype

    folder = Path(args.output_dir)
    for output in (folder / "report.json", folder / "report.png", args.output):
        if output is not None:
            check_output(output, overwrite=args.overwrite)
    reward_fn = RewardModel(args.reward_model, dtype=check_dtype(args.dtype)) if args.reward_model else None
    if args.world is not None:
        from ..testbed.language import REVIEWS

        if args.world not in REVIEWS.attributes:
            raise ValueError(f"`--world` must be one of {sorted(REVIEWS.attributes)}. Got {args.world!r}")
        oracle = REVIEWS.attributes[args.world].oracle

        def reward_fn(prompts, completions):
            return [oracle(text) for text in completions]

    methods = {}
    for given in args.completions:
        name, separator, path = given.partition("=")
        if not separator or not name or name in methods:
            raise ValueError(f"`--completions` must be NAME=DATASET, each name once. Got {given!r}; write it so")
        methods[name] = read_completions(path)
    prompts = list(next(iter(methods.values())))
    for name, grouped in methods.items():
        sizes = {len(texts) for texts in grouped.values()}
        if set(grouped) != set(prompts) or len(sizes) != 1:
            raise ValueError(
                f"All methods must have the same prompts, and as many completions of each. Got {name!r} with "
                f"{len(grouped)} prompts, {sorted(sizes)} completions, where the first has {len(prompts)} prompts"
            )
    rewards = {}

    def scored(prompts, completions):
        found = reward_fn(prompts, completions)
        rewards.update(zip(zip(map(json.dumps, prompts), completions, strict=True), found, strict=True))
        return found

    report = evaluate_completions(
        [json.loads(prompt) for prompt in prompts],
        {name: [text for prompt in prompts for text in grouped[prompt]] for name, grouped in methods.items()},
        None if reward_fn is None else scored,
        baseline=args.baseline,
        level=args.level,
        seed=args.seed,
    )
    report.save(folder / "report.json")
    report.plot(folder / "report.png")
    if args.output or args.push_to_hub:
        rows = Dataset.from_list(
            [
                {"method": name, "prompt": json.loads(prompt), "completion": text, "reward": rewards[prompt, text]}
                for name, grouped in methods.items()
                for prompt, texts in grouped.items()
                for text in texts
            ]
        )
        if args.output:
            write_dataset(rows, args.output)
        if args.push_to_hub:
            push_dataset(rows, args.push_to_hub)
    table = "\n".join(map(printable, report.table().splitlines()))
    print(f"{table}\n\nReport: {folder / 'report.json'}. Picture: {folder / 'report.png'}.")
    return 0
