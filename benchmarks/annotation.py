# SPDX-License-Identifier: Apache-2.0

"""
Time of annotation, relative to a simple implementation and to the forward passes alone.

```bash
python benchmarks/annotation.py --output annotation.json
python benchmarks/annotation.py --quick
```

- *annotated*: `score_token_rewards`, as `annotate_token_rewards` calls it.
- *four forwards*: a separate forward pass for each completion under each face, with full logits in float32.
- *bare*: the backbone over the necessary tokens (each face's prompt once, both completions), in batches of the same
  size, and the language model head at the predicted tokens, without scores.

The model is a random Llama, because only its size matters. Prompts are three times as long as completions, as in
HH-RLHF; lengths are random, from a seed. Each repetition runs the three alternatives in turn and gives two ratios. The
table has medians and quartiles. On a CPU the script uses one thread and measures processor time.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
import transformers
from measuring import cell, in_turn, quartiles
from transformers import LlamaConfig, LlamaForCausalLM

from trl_tfpo import functional
from trl_tfpo.annotation.token_rewards import score_token_rewards


FULL = dict(num_pairs=24, repetitions=5, hidden_size=512, num_layers=8, vocab_sizes=[32_000, 151_936])
QUICK = dict(num_pairs=8, repetitions=3, hidden_size=256, num_layers=4, vocab_sizes=[32_000])
MEAN_LENGTH = 60  # of a completion, in tokens


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer pairs")
    parser.add_argument("--output", help="JSON file for the measurements")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    sizes = QUICK if args.quick else FULL
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(f"{platform.machine()}, {args.device}, torch {torch.__version__}, transformers {transformers.__version__}")
    print("| vocabulary | pairs/s | four forwards / annotated | annotated / bare | largest difference |")
    print("|---:|---:|---:|---:|---:|")
    rows = [measure(vocab_size, args, sizes) for vocab_size in sizes["vocab_sizes"]]
    if args.output:
        report = {"arguments": vars(args), "sizes": sizes, "torch": torch.__version__, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


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
