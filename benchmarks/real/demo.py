# SPDX-License-Identifier: Apache-2.0

"""
Align a small real language model on a CPU, in about twelve minutes: `make demo-real`.

```bash
python benchmarks/real/demo.py                      # make SmolLM2-135M-Instruct answer cheerfully
python benchmarks/real/demo.py --task plain         # or in plain words
python benchmarks/real/demo.py --model FOLDER       # use another chat model: a folder, or a name on the Hub
```

1. The patient answers each of 200 questions twice.
2. A noisy scorer labels the better answer.
3. The patient scores the answers under its two faces, which gives each token a reward.
4. A doctor, initialized with the first 8 layers of the patient, is trained on these rewards.
5. The doctor guides the patient on held-out questions.

Patient and doctor stay in the cache, where `trl-tfpo demo` finds them.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from datasets import Dataset
from model import NAME, fetch_model, small_doctor
from samples import Samples
from tasks import TASKS, Task, as_messages, label, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, annotate_token_rewards
from trl_tfpo.common.cache import cached_models, default_cache, doctors_folder
from trl_tfpo.data.tokenization import all_eos_token_ids, tokenize_prompt
from trl_tfpo.evaluation import best_of_n, evaluate_guidance


NUM_SHOWN = 3  # test prompts whose answers are printed
BATCH_SIZE = 8  # pairs of a training step


@contextmanager
def step(title: str) -> Iterator[list[str]]:
    """
    Yield a list of facts. After the context, print a line with title, facts and time.

    Output of libraries goes to standard error.
    """
    facts, begin = [], time.monotonic()
    with redirect_stdout(sys.stderr):
        yield facts
    print(f"{title}: {', '.join(facts)} ({time.monotonic() - begin:.0f} s)", flush=True)


def preferences(
    task: Task,
    questions: Sequence[str],
    pairs_ids: Sequence[list[list[int]]],
    *,
    eos_ids: Sequence[int],
    seed: int,
    decode: Callable[[list[int]], str],
) -> Dataset:
    """
    Label pairs of answers, given as token ids of two answers to each question. `seed` is the seed of the label noise.

    Returns:
        `Dataset`: `prompt`, `chosen`, `rejected` in TRL's conversational format, without empty or equal answers;
        `chosen_is_cut`, `rejected_is_cut`, whether the answer is truncated.
    """
    texts = [[decode(ids).strip() for ids in pair] for pair in pairs_ids]
    labels = label(task, *zip(*texts, strict=True), seed)
    rows = []
    for question, pair, pair_ids, is_first in zip(questions, texts, pairs_ids, labels, strict=True):
        if not all(pair) or pair[0] == pair[1]:
            continue
        row = {"prompt": as_messages(question)}
        for name, index in (("chosen", 1 - is_first), ("rejected", int(is_first))):
            row[name] = [{"role": "assistant", "content": pair[index]}]
            row[f"{name}_is_cut"] = pair_ids[index][-1] not in eos_ids
        rows.append(row)
    return Dataset.from_list(rows)


def without_added_end(row: dict) -> dict:
    """Remove the EOS that the chat template added to truncated answers."""
    kept = {}
    for name in ("chosen", "rejected"):
        for column in (f"{name}_ids", f"{name}_mask", f"{name}_token_rewards", f"{name}_gaps"):
            kept[column] = row[column][: len(row[column]) - row[f"{name}_is_cut"]]
    return kept


def train(
    patient: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    annotated: Dataset,
    *,
    num_layers: int,
    output: Path,
    seed: int,
) -> TFPOTrainer:
    """Train a small doctor on token rewards, and save it."""
    doctor = small_doctor(patient, num_layers)
    trainer = TFPOTrainer(
        model=doctor,
        patient_model=patient,
        args=TFPOConfig(
            str(output),
            policy="guided",
            calibrate_rewards=True,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            subtb_lambda=0.5,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            seed=seed,
        ),
        train_dataset=annotated,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a text table: the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def run(args: argparse.Namespace) -> None:
    begin, task = time.monotonic(), TASKS[args.task]
    args.output = args.output or doctors_folder(args.cache, args.model or NAME) / task.name
    questions = prompts()
    if args.num_prompts + args.num_test_prompts > len(questions):
        raise ValueError(
            f"`--num-prompts` and `--num-test-prompts` must be at most {len(questions)} together. Got "
            f"{args.num_prompts} and {args.num_test_prompts}; reduce one of them."
        )
    questions, held_out = questions[: args.num_prompts], questions[args.num_prompts :][: args.num_test_prompts]

    with step("Patient") as facts:
        name = fetch_model(args.cache) if args.model is None else args.model
        patient = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        facts += [str(name), f"{patient.num_parameters() / 1e6:.0f}M parameters"]

    with step("Answers") as facts:
        eos_ids = all_eos_token_ids(tokenizer, patient)
        samples = Samples(
            args.cache / "samples", patient, max_new_tokens=args.max_new_tokens, eos_token_id=eos_ids, seed=args.seed
        )
        prompts_ids = [tokenize_prompt(as_messages(question), tokenizer) for question in questions]
        answers = samples.of("demo", prompts_ids, 2)
        num_tokens = sum(len(ids) for pair in answers for ids in pair)
        facts += [f"two for each of {len(questions)} questions", f"{num_tokens:,} tokens"]

    with step("Labels") as facts:

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        dataset = preferences(task, questions, answers, eos_ids=eos_ids, seed=args.seed, decode=decode)
        wins = [task.score(row["chosen"][0]["content"]) - task.score(row["rejected"][0]["content"]) for row in dataset]
        wrong = sum(difference < 0 for difference in wins) / len(wins)
        facts += [f"{len(dataset)} pairs", f"the better answer loses in {wrong:.0%}"]

    with step("Token rewards") as facts:
        annotated = annotate_token_rewards(dataset, patient, tokenizer, faces=task.faces)
        annotated = annotated.map(without_added_end, features=annotated.features)
        facts += [f"from the faces {task.faces.positive!r} and {task.faces.negative!r}"]

    with step("Training") as facts:
        trainer = train(patient, tokenizer, annotated, num_layers=args.num_layers, output=args.output, seed=args.seed)
        accuracy = trainer.calibration.accuracy
        facts += [
            f"a doctor of {args.num_layers} layers",
            f"{trainer.state.global_step} steps",
            f"calibrated rewards predict {accuracy:.0%} of held-out labels",
            f"saved to {args.output}",
        ]
        del trainer

    reports = evaluate(patient, tokenizer, task, held_out, args)
    print("\n" + results(task, reports, num_samples=args.num_samples))
    for index, question in enumerate(held_out[:NUM_SHOWN]):
        print(f"\n{question}")
        for strength, report in reports.items():
            print(f"  {strength:g}: {' '.join(report['completions'][index * args.num_samples].text.split())}")
    print(
        f"\nDone in {(time.monotonic() - begin) / 60:.1f} minutes. To see it in a web page: {page_command(name, args)}"
    )


def page_command(name: str | Path, args: argparse.Namespace) -> str:
    """Return the command that opens the playground with the patient and the doctor."""
    patient, doctors = cached_models(default_cache()) or (None, [])
    if patient == Path(name) and args.output in doctors:
        return "trl-tfpo demo"
    return shlex.join(["trl-tfpo", "demo", "--patient", str(name), "--doctor", str(args.output)])


def evaluate(
    patient: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[str],
    args: argparse.Namespace,
) -> dict[float, dict]:
    """Return a report for each strength of the saved doctor, and for the patient at strength 0."""
    settings = dict(num_samples_per_prompt=args.num_samples, max_new_tokens=args.max_new_tokens, batch_size=24)
    reports = {}
    for strength in (0.0, *args.strengths):
        with step(f"Strength {strength:g}") as facts:
            guide = DoctorGuidedLogitsProcessor.from_pretrained(str(args.output), beta=strength) if strength else None
            reports[strength] = report = evaluate_guidance(
                patient,
                tokenizer,
                [as_messages(question) for question in questions],
                lambda prompts, completions: [task.score(text) for text in completions],
                guide=guide,
                seed=args.seed,
                **settings,
            )
            facts += [f"{len(report['completions'])} answers", f"mean score {report['reward']:.3f}"]
    return reports


def results(task: Task, reports: dict[float, dict], *, num_samples: int) -> str:
    """Return a table of mean score and KL from the patient at each strength."""
    rows = [[f"{task.name}, on held-out questions", "mean score", "KL in nats", "tokens", "ended"]]
    for strength, report in reports.items():
        rows.append(
            [
                f"guided at strength {strength:g}" if strength else "patient",
                f"{report['reward']:.3f} ± {report['reward_se']:.3f}",
                f"{report['kl']:.2f}",
                f"{report['num_tokens']:.1f}",
                f"{report['is_complete']:.0%}",
            ]
        )
    if num_samples >= 2:
        best = best_of_n(torch.tensor(reports[0.0]["rewards"]).view(-1, num_samples), 2)
        cells = [f"{best['reward']:.3f} ± {best['reward_se']:.3f}", f"{best['kl']:.2f}"]
        rows.append(["best of 2 by the scorer itself", *cells, "", ""])
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name on the Hub of a chat model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--task", choices=sorted(TASKS), default="cheerful", help="wanted behaviour")
    parser.add_argument(
        "--num-prompts", type=int, default=200, help="questions for training, which must give at least 32 pairs"
    )
    parser.add_argument("--num-test-prompts", type=int, default=12, help="held-out questions")
    parser.add_argument(
        "--num-samples", type=int, default=8, help="answers to each held-out question at each strength"
    )
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 1.0], help="exponents of the doctor")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="maximum number of tokens of an answer")
    parser.add_argument("--num-layers", type=int, default=8, help="layers of the doctor")
    parser.add_argument("--seed", type=int, default=0, help="seed of answers, labels and training")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the model and its answers")
    parser.add_argument("--output", type=Path, help="folder for the doctor (default: doctors/MODEL/TASK in the cache)")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (ConnectionError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
