# SPDX-License-Identifier: Apache-2.0

"""
Time and memory of a training step, relative to TRL's DPO on the same model, pairs and lengths.

```bash
python benchmarks/training.py --output training.json
python benchmarks/training.py --quick
python benchmarks/training.py --pairs FILE     # a file of HH-RLHF
```

1. *Step.* Forward, backward and optimizer of `TFPOTrainer` and of `DPOTrainer` with precomputed reference: time, and
   peak memory without models and optimizers.
2. *Sub-trajectory balance.* Forward and backward of the loss over all pairs of prefixes in linear time, relative to a
   matrix of all pairs and to a loop over lengths, for 8 completions.
3. *Memory.* Forward and backward of the doctor's log-probabilities in chunks, relative to logits and a log-softmax
   over the whole vocabulary: peak without the model and its gradients.

`--pairs` instead measures a training step that reads the prompt of a pair once, relative to a step that reads it for
each completion. The patient is SmolLM2-135M-Instruct, and the doctor has its first 8 layers.

Each repetition runs the alternatives in turn and gives one ratio. The table has medians and quartiles. On a CPU the
script uses one thread and measures processor time.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset, load_dataset
from measuring import cell, in_turn, peak_mebibytes, processor, quartiles
from real.model import default_cache, fetch_model, small_doctor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from trl_tfpo import Faces, TFPOConfig, TFPOTrainer
from trl_tfpo.functional import subtb_loss
from trl_tfpo.models import pair_rows
from trl_tfpo.models.doctor import add_value_head


FULL = dict(repetitions=8, hidden_size=512, num_layers=8, vocab_size=32_000, num_tokens=4096, large_vocab=151_936)
FULL |= dict(lengths=[128, 256, 512, 1024, 2048, 4096])
QUICK = FULL | dict(repetitions=3, hidden_size=256, num_layers=4, lengths=[128, 1024])
BATCH_SIZE, PROMPT_LENGTH, COMPLETION_LENGTH = 4, 180, 60


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer lengths and repetitions")
    parser.add_argument("--output", help="JSON file for the measurements")
    parser.add_argument("--pairs", help="JSON lines of preference pairs, for the step that reads prompts once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    sizes = QUICK if args.quick else FULL
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = {"arguments": vars(args), "sizes": sizes, "torch": torch.__version__}
    if args.pairs:
        report["prompts"] = prompts_once(args)
    else:
        report["memory"] = memory(args, sizes)
        report["subtb"] = balance(args, sizes)
        report["step"] = step(args, sizes)
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# A training step


def step(args: argparse.Namespace, sizes: dict) -> dict:
    tokenizer = make_tokenizer(sizes["vocab_size"])
    pairs = draw_pairs(sizes["vocab_size"], num_pairs=BATCH_SIZE * 2)
    common = dict(per_device_train_batch_size=BATCH_SIZE, report_to="none", use_cpu=args.device == "cpu")
    common |= dict(dataloader_pin_memory=False, bf16=False, max_length=None, gradient_checkpointing=False)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(tokenizer, sizes)
        trainers = {
            "TFPO": TFPOTrainer(
                model=model,
                patient_model=make_model(tokenizer, sizes | dict(hidden_size=64, num_layers=1)),
                args=TFPOConfig(folder, gap_floor=1e-6, **common),  # the faces of a random patient hardly differ
                train_dataset=pairs,
                processing_class=tokenizer,
                faces=Faces(positive="w11 w12 w13", negative="w14 w15 w16"),
            ),
            "DPO": DPOTrainer(
                model=make_model(tokenizer, sizes),
                args=DPOConfig(folder, precompute_ref_log_probs=True, **common),
                train_dataset=pairs,
                processing_class=tokenizer,
            ),
        }
        batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
        for trainer in trainers.values():
            trainer.create_optimizer()
            trainer.current_gradient_accumulation_steps = 1
        steps = {name: partial(take_step, trainer, batches[name]) for name, trainer in trainers.items()}
        seconds = in_turn(steps, repetitions=sizes["repetitions"], device=args.device)
        peaks = {name: peak_mebibytes(one_step, device=args.device) for name, one_step in steps.items()}
    shapes = {name: list(batch["input_ids"].shape) for name, batch in batches.items()}
    potential = torch.randn(2 * BATCH_SIZE, COMPLETION_LENGTH + 1, device=args.device)
    loss = in_turn({"loss": partial(forward_backward, linear, potential)}, repetitions=5, device=args.device)["loss"]
    row = {
        "shapes": shapes,
        "tfpo_over_dpo": quartiles(seconds["TFPO"], seconds["DPO"]),
        "peak_mebibytes": peaks,
        "subtb_share_of_step": statistics.median(loss) / statistics.median(seconds["TFPO"]),
    }
    print(f"\nStep, batches {shapes}: time of TFPO over DPO {cell(row['tfpo_over_dpo'])}")
    print(f"Peak memory of a step: TFPO {peaks['TFPO']:,.0f} MiB, DPO {peaks['DPO']:,.0f} MiB")
    print(f"Sub-trajectory balance takes {100 * row['subtb_share_of_step']:.2f}% of the step")
    return row


def take_step(trainer, batch: dict) -> None:
    trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def prompts_once(args: argparse.Namespace, num_batches: int = 2, batch_size: int = 8) -> dict:
    """Measure a step on real pairs that reads each prompt once, relative to a step that reads it twice."""
    folder = fetch_model(default_cache())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = load_dataset("json", data_files=args.pairs, split=f"train[:{2 * num_batches * batch_size}]")
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = TFPOTrainer(
            model=small_doctor(folder, num_layers=8),
            patient_model=AutoModelForCausalLM.from_pretrained(folder),
            args=TFPOConfig(
                output_dir,
                per_device_train_batch_size=batch_size,
                max_length=512,
                drop_unusable=True,
                convert_transcripts=True,
                calibrate_rewards=False,
                bf16=False,
                report_to="none",
                use_cpu=args.device == "cpu",
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
            faces=Faces(positive="Answer helpfully and kindly.", negative="Answer badly and rudely."),
        )
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        batches = list(islice(trainer.get_train_dataloader(), num_batches))

        def take_steps(limit: float) -> None:
            with patch.object(pair_rows, "WORTHWHILE", limit):
                for batch in batches:
                    trainer.training_step(trainer.model, dict(batch))
                    trainer.optimizer.zero_grad()

        ways = {"once": partial(take_steps, pair_rows.WORTHWHILE), "twice": partial(take_steps, 0.0)}
        seconds = in_turn(ways, repetitions=5, device=args.device)
    row = {
        "shapes": [list(batch["input_ids"].shape) for batch in batches],
        "once_over_twice": quartiles(seconds["once"], seconds["twice"]),
    }
    print(f"Batches {row['shapes']}, {processor(args.device)}: time of a step that reads each prompt once, over one")
    print(f"that reads it twice: {cell(row['once_over_twice'])}")
    return row


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, vocab_size))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(tokenizer: PreTrainedTokenizerFast, sizes: dict) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes["hidden_size"],
        intermediate_size=3 * sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=max(1, sizes["hidden_size"] // 64),
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def draw_pairs(vocab_size: int, num_pairs: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return " ".join(f"w{index}" for index in torch.randint(3, vocab_size, (length,), generator=generator).tolist())

    return Dataset.from_list(
        [
            {
                "prompt": draw(PROMPT_LENGTH),
                "chosen": " " + draw(COMPLETION_LENGTH - 1),
                "rejected": " " + draw(COMPLETION_LENGTH - 1),
            }
            for _ in range(num_pairs)
        ]
    )


# Sub-trajectory balance


def balance(args: argparse.Namespace, sizes: dict) -> list[dict]:
    rows = []
    print("\n| states | all pairs / linear | loop over lengths / linear |\n|---:|---:|---:|")
    for length in sizes["lengths"]:
        potential = torch.randn(8, length + 1, device=args.device)
        ways = {"linear": linear, "pairs": all_pairs, "lengths": by_length}
        runs = {name: partial(forward_backward, run, potential) for name, run in ways.items()}
        seconds = in_turn(runs, repetitions=sizes["repetitions"], device=args.device)
        losses = [run(potential).item() for run in ways.values()]
        torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=1e-4, atol=0)
        row = {"length": length} | {name: quartiles(seconds[name], seconds["linear"]) for name in ("pairs", "lengths")}
        print(f"| {length + 1:,} | {cell(row['pairs'])} | {cell(row['lengths'])} |", flush=True)
        rows.append(row)
    return rows


def linear(potential: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(len(potential), potential.size(1) - 1, dtype=torch.bool, device=potential.device)
    return subtb_loss(potential=potential, completion_mask=mask).mean()


def all_pairs(potential: torch.Tensor) -> torch.Tensor:
    residuals = potential[:, None] - potential[:, :, None]  # (B, S, S)
    count = potential.size(1) * (potential.size(1) - 1) / 2
    return (residuals.triu(1) ** 2).sum(dim=(1, 2)).div(count).mean()


def by_length(potential: torch.Tensor) -> torch.Tensor:
    total = 0.0
    for length in range(1, potential.size(1)):
        total = total + ((potential[:, length:] - potential[:, :-length]) ** 2).sum(dim=1)
    return total.div(potential.size(1) * (potential.size(1) - 1) / 2).mean()


def forward_backward(loss, potential: torch.Tensor) -> None:
    loss(potential.detach().requires_grad_()).backward()


# Memory


def memory(args: argparse.Namespace, sizes: dict) -> dict:
    num_tokens, vocab_size = sizes["num_tokens"], sizes["large_vocab"]
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=8192, **shape)).to(args.device)
    add_value_head(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(vocab_size, (1, num_tokens), device=args.device)
    ways = {"chunked": chunked_logps, "naive": naive_logps}
    for way in ways.values():
        way(model, ids[:, :8])  # warm-up, because the first call keeps some memory
    peaks = {name: peak_mebibytes(partial(way, model, ids), device=args.device) for name, way in ways.items()}
    row = peaks | {"chunked_over_naive": peaks["chunked"] / peaks["naive"]}
    print(
        f"Memory, {num_tokens:,} tokens and a vocabulary of {vocab_size:,}: {peaks['chunked']:,.0f} MiB "
        f"in chunks, {peaks['naive']:,.0f} MiB at once: {row['chunked_over_naive']:.2f}"
    )
    return row


def chunked_logps(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    completion_mask = torch.ones_like(ids, dtype=torch.bool)
    completion_mask[:, 0] = False
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=completion_mask)
    (output.doctor_logps.sum() + output.log_values.sum()).backward()


def naive_logps(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    logps = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float().log_softmax(dim=-1)
    logps.gather(2, ids[:, 1:, None]).sum().backward()


if __name__ == "__main__":
    main()
