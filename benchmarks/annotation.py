# SPDX-License-Identifier: Apache-2.0

"""
Time of annotation, relative to a simple implementation and to the forward passes alone.

```bash
python benchmarks/annotation.py --output annotation.json
python benchmarks/annotation.py --quick
python benchmarks/annotation.py --pairs hh_rlhf.jsonl --patient SmolLM2-135M-Instruct
```

- *annotated*: `score_token_rewards`, as `annotate_token_rewards` calls it.
- *four forwards*: a separate forward pass for each completion under each face, with full logits in float32.
- *bare*: the backbone over each face's prompt once and both completions, in padded batches of the same size, and the
  language model head at the predicted tokens, without scores.

Without `--pairs` the model is a random Llama, because only its size matters. Prompts are three times as long as
completions, as in HH-RLHF; lengths are random, from a seed. Each repetition runs the three alternatives in turn and
gives two ratios. The table has medians and quartiles. On a CPU the script uses one thread and measures processor time.

With `--pairs`, a patient annotates real pairs in shards of 16 pairs of similar length, as `annotate_token_rewards`
does, under faces in the system message and in the user turn. *annotated* is compared with *rows of pairs*: the patient
reads each prompt once under each face, and the two completions share a padded row with a mask. Each shard gives one
ratio.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from datasets import load_dataset
from measuring import cell, clock, in_turn, processor, quartiles
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_tfpo import functional
from trl_tfpo.annotation import scoring
from trl_tfpo.annotation.score_cache import SHARD_SIZE
from trl_tfpo.annotation.token_rewards import score_token_rewards
from trl_tfpo.data.tokenization import all_eos_token_ids, tokenize_preferences
from trl_tfpo.faces import HELPFULNESS, Faces


FULL = dict(num_pairs=24, repetitions=5, hidden_size=512, num_layers=8, vocab_sizes=[32_000, 151_936])
QUICK = dict(num_pairs=8, repetitions=3, hidden_size=256, num_layers=4, vocab_sizes=[32_000])
MEAN_LENGTH = 60  # of a completion, in tokens
PLACEMENTS = ("system", "user")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer pairs")
    parser.add_argument("--output", help="JSON file for the measurements")
    parser.add_argument("--pairs", help="JSON file of preference pairs, instead of random ones")
    parser.add_argument("--patient", help="with `--pairs`: folder or name of the patient")
    parser.add_argument("--num_pairs", type=int, default=128, help="with `--pairs`: how many are annotated")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.pairs and (args.patient is None or args.num_pairs <= SHARD_SIZE):  # each shard gives one ratio
        parser.error(f"--pairs needs --patient, and --num_pairs above {SHARD_SIZE}")
    sizes = QUICK if args.quick else FULL
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(f"{processor(args.device)}, torch {torch.__version__}, transformers {transformers.__version__}")
    if args.pairs:
        save(args, {}, measure_pairs(args))
        return
    print("| vocabulary | pairs/s | four forwards / annotated | annotated / bare | largest difference |")
    print("|---:|---:|---:|---:|---:|")
    rows = [measure(vocab_size, args, sizes) for vocab_size in sizes["vocab_sizes"]]
    save(args, sizes, rows)


def save(args: argparse.Namespace, sizes: dict, rows: list[dict]) -> None:
    if args.output:
        report = {"arguments": vars(args), "sizes": sizes, "torch": torch.__version__, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure_pairs(args: argparse.Namespace) -> list[dict]:
    """Measure annotation of real pairs, relative to rows of pairs."""
    tokenizer = AutoTokenizer.from_pretrained(args.patient)
    patient = AutoModelForCausalLM.from_pretrained(args.patient, dtype=torch.float32).to(args.device).eval()
    dataset = load_dataset("json", data_files=args.pairs, split="train")
    print("| faces | pairs/s | rows of pairs / annotated | tokens per pair of both | largest difference |")
    print("|---|---:|---:|---:|---:|")
    return [measure_placement(placement, dataset, patient, tokenizer, args) for placement in PLACEMENTS]


def measure_placement(placement: str, dataset, patient, tokenizer, args: argparse.Namespace) -> dict:
    tokenized = tokenize_preferences(
        dataset.select(range(min(len(dataset), 2 * args.num_pairs))),  # some are unusable
        tokenizer,
        faces=Faces(HELPFULNESS.positive, HELPFULNESS.negative, placement=placement),
        eos_token_ids=all_eos_token_ids(tokenizer, patient),
        drop_unusable=True,
        convert_transcripts=True,
    )
    names = ["positive_prompt_ids", "negative_prompt_ids", "chosen_ids", "rejected_ids"]
    pairs = [{name: row[name] for name in names} for row in tokenized][: args.num_pairs]
    pairs.sort(key=lambda pair: -sum(map(len, pair.values())))
    shards = [
        {name: [pair[name] for pair in pairs[start : start + SHARD_SIZE]] for name in names}
        for start in range(0, len(pairs), SHARD_SIZE)
    ]
    longest = max(len(pair[prompt]) + len(pair[one]) for pair in pairs for prompt in names[:2] for one in names[2:])
    score = partial(
        score_token_rewards,
        patient=patient,
        reward_fn=functional.token_rewards,
        batch_size=args.batch_size,
        longest=longest,
    )
    settings = {"annotated": nullcontext, "rows of pairs": rows_of_pairs}
    seconds, num_tokens = {name: [] for name in settings}, dict.fromkeys(settings, 0)
    largest_difference = 0.0
    for index, shard in enumerate([shards[-1], *shards]):  # the shortest one warms up
        gaps = {}
        for name, setting in settings.items():
            with setting(), counted_tokens(patient) as count:
                start = clock(args.device)
                gaps[name] = score(shard)[1]
                if index > 0:
                    seconds[name].append(clock(args.device) - start)
                    num_tokens[name] += sum(count)
        differences = [(a - b).abs().max().item() for a, b in zip(*gaps.values(), strict=True)]
        largest_difference = max(largest_difference, *differences)
    row = {
        "placement": placement,
        "num_pairs": len(pairs),
        "seconds": seconds,
        "pairs_per_second": len(pairs) / sum(seconds["annotated"]),
        "rows_of_pairs_over_annotated": quartiles(seconds["rows of pairs"], seconds["annotated"]),
        "tokens_per_pair": {name: num / len(pairs) for name, num in num_tokens.items()},
        "largest_difference": largest_difference,
    }
    tokens = " and ".join(f"{num:.0f}" for num in reversed(row["tokens_per_pair"].values()))
    slower = cell(row["rows_of_pairs_over_annotated"])
    print(f"| {placement} | {row['pairs_per_second']:.2f} | {slower} | {tokens} | {largest_difference:.1e} |")
    return row


@contextmanager
def rows_of_pairs() -> Iterator[None]:
    """Context in which each row has the two completions of a pair, and a mask."""
    with patch.multiple(scoring, reads_trees=lambda _: False, MAX_TEXTS=2):
        yield


@contextmanager
def counted_tokens(patient) -> Iterator[list[int]]:
    """Context that yields the number of tokens, with padding, of each forward pass in it."""
    counts = []
    hook = patient.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    try:
        yield counts
    finally:
        hook.remove()


def measure(vocab_size: int, args: argparse.Namespace, sizes: dict) -> dict:
    torch.manual_seed(args.seed)
    patient = make_patient(vocab_size, sizes).to(args.device)
    batch = draw_pairs(vocab_size, sizes["num_pairs"], args.seed)

    def annotated():
        return score_token_rewards(
            batch, patient=patient, reward_fn=functional.token_rewards, batch_size=args.batch_size
        )[1]

    ways = {
        "annotated": annotated,
        "four forwards": lambda: four_forwards(patient, batch),
        "bare": lambda: bare(patient, batch, args.batch_size),
    }
    times = in_turn(ways, repetitions=sizes["repetitions"], device=args.device)
    gaps = zip(annotated(), four_forwards(patient, batch), strict=True)
    row = {
        "vocab_size": vocab_size,
        "pairs_per_second": len(batch["chosen_ids"]) / statistics.median(times["annotated"]),
        "four_forwards_over_annotated": quartiles(times["four forwards"], times["annotated"]),
        "annotated_over_bare": quartiles(times["annotated"], times["bare"]),
        "largest_difference": max((ours - theirs).abs().max().item() for ours, theirs in gaps),
    }
    slower, over = cell(row["four_forwards_over_annotated"]), cell(row["annotated_over_bare"])
    print(f"| {vocab_size:,} | {row['pairs_per_second']:.2f} | {slower} | {over} | {row['largest_difference']:.1e} |")
    return row


def make_patient(vocab_size: int, sizes: dict) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=sizes["hidden_size"],
            intermediate_size=3 * sizes["hidden_size"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["hidden_size"] // 64,
            max_position_embeddings=4096,
        )
    ).eval()


def draw_pairs(vocab_size: int, num_pairs: int, seed: int) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)

    def draw(mean_length):
        length = int(mean_length * torch.empty(()).log_normal_(-0.125, 0.5, generator=generator).item()) + 1
        return torch.randint(vocab_size, (min(length, 4 * mean_length),), generator=generator).tolist()

    instructions = [draw(12), draw(12)]
    prompts = [draw(3 * MEAN_LENGTH) for _ in range(num_pairs)]
    return {
        "positive_prompt_ids": [instructions[0] + prompt for prompt in prompts],
        "negative_prompt_ids": [instructions[1] + prompt for prompt in prompts],
        "chosen_ids": [draw(MEAN_LENGTH) for _ in range(num_pairs)],
        "rejected_ids": [draw(MEAN_LENGTH) for _ in range(num_pairs)],
    }


@torch.no_grad()
def four_forwards(patient, batch) -> list[torch.Tensor]:
    """Return the gaps of all completions, chosen completions first."""

    def logps(prompt, completion):
        ids = torch.tensor([prompt + completion], device=patient.device)
        log_probs = patient(ids).logits.float().log_softmax(dim=-1)
        return log_probs[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0].cpu()

    faces = zip(batch["positive_prompt_ids"] * 2, batch["negative_prompt_ids"] * 2, strict=True)
    completions = batch["chosen_ids"] + batch["rejected_ids"]
    return [
        logps(positive, completion) - logps(negative, completion)
        for (positive, negative), completion in zip(faces, completions, strict=True)
    ]


@torch.no_grad()
def bare(patient, batch, batch_size: int) -> None:
    prompts = batch["positive_prompt_ids"] + batch["negative_prompt_ids"]
    completions = [a + b for a, b in zip(batch["chosen_ids"], batch["rejected_ids"], strict=True)] * 2
    rows = sorted(zip(prompts, completions, strict=True), key=lambda row: -len(row[0]) - len(row[1]))
    for start in range(0, len(rows), batch_size // 2):
        some = rows[start : start + batch_size // 2]
        tokens = [torch.tensor(prompt + completion) for prompt, completion in some]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(patient.device)
        hidden = patient.model(input_ids=ids, use_cache=False).last_hidden_state
        for row, (prompt, completion) in zip(hidden, some, strict=True):
            patient.lm_head(row[len(prompt) : len(prompt) + len(completion)])


if __name__ == "__main__":
    main()
