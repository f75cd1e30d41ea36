# SPDX-License-Identifier: Apache-2.0

"""
Alignment tax: what guidance by a doctor changes elsewhere, at several distances from the patient.

```bash
python benchmarks/real/tax.py --pairs hh-rlhf/harmless-base-test.jsonl.gz --llmbar Dataset/LLMBar \
    --xstest xstest_prompts.csv --text wiki.test.tokens \
    --doctor ~/.cache/trl-tfpo/doctors/SmolLM2-135M-Instruct/cheerful
python benchmarks/real/tax.py --report
python benchmarks/real/tax.py --quick --model FOLDER --pairs FILE
```

1. *Pairs* of LLMBar and of HH-RLHF: how often the guided patient gives the better answer the larger log-likelihood.
2. *XSTest*: the share of refusals (`tax_data.is_refusal`) of unsafe and of safe prompts, in greedy answers.
3. *Neutral text*: perplexity.

Doctors are trained by two methods of `bench.py` on the patient's hidden states, and guide at strengths with the same
KL on validation prompts. Saved doctors (`--doctor`, as `demo.py` writes them) guide at fixed strengths. The patient
reads each text once, and all doctors and strengths share its logits. Each piece is appended to the output when it is
measured, so a stopped run can be resumed.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench import FIRST, FULL, QUICK, Bench, trained, write
from human import agreement
from measures import interpolated
from model import default_cache
from states import Doctor, Logits, Reader, logits_of, logits_on, weigh
from tables import OURS, read
from tasks import TASKS, as_messages, prompts
from tax_data import Item, Question, hh, is_refusal, llmbar, windows, xstest
from tax_measures import Guide, Scorer, greedy_answers
from transformers import PreTrainedModel, set_seed

from trl_tfpo import load_doctor
from trl_tfpo.common.progress import Progress
from trl_tfpo.evaluation import bootstrap_interval
from trl_tfpo.models.fingerprint import model_fingerprint
from trl_tfpo.models.trained_exponents import trained_exponents


STRENGTHS = [0.25, 0.5, 1.0, 2.0]  # of saved doctors
AIMS = [0.5, 1.0, 2.0]  # nats at which the methods of the bench are compared
RIVAL = "DPO"
PIECE, PROMPTS = 16, 8  # items and prompts of a piece
NUM_WINDOWS, WINDOW = 32, 256  # of neutral text
MAX_NEW_TOKENS = 32


# Doctors


def saved_guide(bench: Bench, messages: Sequence[list[dict]], folder: Path, output: Path) -> Guide:
    """
    Return a saved doctor at `STRENGTHS`. Append its KLs on validation prompts to the output.

    Raises:
        `ValueError`: if the doctor is an adapter, or not a factor of the patient (`alpha=1`).
    """
    model = load_doctor(folder, with_value_head=False, dtype=torch.float32)
    if not isinstance(model, PreTrainedModel) or trained_exponents(model).get("alpha") != 1:
        raise ValueError(
            f"A saved doctor must be a full model of guided flow, for `alpha=1`. Got {str(folder)!r} with exponents "
            f"{trained_exponents(model)}; pass a doctor of `demo.py`, or merge the adapter."
        )
    key = {"doctor": Path(folder).name, "seed": None, "id": model_fingerprint(model)}
    if not read(output, part="strengths", **key):
        groups, reader = bench.answers["validation"], Reader(bench.model, bench.tokenizer, bench.eos)
        logits = logits_of(model, reader, messages, groups)
        kls, nums = zip(*(kl_of(groups, logits, strength) for strength in STRENGTHS), strict=True)
        write(output, [{"part": "strengths", **key, "strengths": STRENGTHS, "kls": kls, "num_effective": nums}])
    return Guide(key, STRENGTHS, model.get_output_embeddings(), model)


def kl_of(groups: Sequence, logits: Logits, strength: float) -> tuple[float, float]:
    """Return the KL in nats per answer at a strength, by importance weights, and the effective number of samples."""
    found = weigh(groups, logits, strength)
    kl = (found.weights * found.kl).sum(dim=1).mean().item()
    return kl, (1 / found.weights.square().sum(dim=1)).mean().item()


def trained_guide(args: argparse.Namespace, bench: Bench, method: str, seed: int) -> Guide:
    """Train a doctor on hidden states by a method of the bench, at strengths with the KLs `AIMS` on validation."""
    doctor, facts = trained(args, bench, args.task, seed, method)
    groups = bench.answers["validation"]
    aims = [aim / 10 for aim in AIMS] if args.quick else AIMS
    rows = [row for row, _ in interpolated(groups, logits_on(doctor, groups), {}, aims)]
    if len(rows) < len(aims) and not args.quick:
        raise ValueError(
            f"A doctor must reach {aims[-1]} nats at some strength. Got {[row['kl'] for row in rows]} of {method}, "
            f"seed {seed}; leave the method or the seed out."
        )
    strengths, kls, nums = ([row[name] for row in rows] for name in ("strength", "kl", "num_effective"))
    key = {"doctor": method, "seed": seed, "id": json.dumps(facts["settings"])}
    if not read(args.tax, part="strengths", **key):
        write(args.tax, [{"part": "strengths", **key, "strengths": strengths, "kls": kls, "num_effective": nums}])
    return Guide(key, strengths, head_of(doctor))


def head_of(doctor: Doctor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from the patient's hidden states (N, H) to a doctor's logits (N, V)."""
    if doctor.patient_weight == 0 and not doctor.map.any():  # the same logits at every state
        table = (doctor.embeddings @ doctor.bias).detach()
        return lambda hidden: table.expand(len(hidden), -1)
    return lambda hidden: doctor.directions(hidden) @ doctor.embeddings.T


# The run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="HH-RLHF file or dataset: prompts of the bench, and held-out pairs")
    parser.add_argument("--llmbar", type=Path, help="folder Dataset/LLMBar of princeton-nlp/LLMBar")
    parser.add_argument("--xstest", type=Path, help="xstest_prompts.csv of paul-rottger/exaggerated-safety")
    parser.add_argument("--text", type=Path, help="file of neutral text, such as the test split of WikiText-2")
    parser.add_argument("--doctor", type=Path, nargs="*", default=[], help="folders of saved doctors")
    parser.add_argument("--task", default="cheerful", choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=[OURS, RIVAL], choices=[OURS, RIVAL])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="XSTest: only the first")
    parser.add_argument("--num-pairs", type=int, default=300, help="held-out pairs of HH-RLHF")
    parser.add_argument("--max-tokens", type=int, default=320, help="of a prompt and an output of LLMBar")
    parser.add_argument("--model", type=Path, help="folder or name of a patient (default: SmolLM2 from PyPI)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="cache folder of bench.py")
    parser.add_argument("--bench", type=Path, default=Path("runs/real/bench.jsonl"), help="output of bench.py")
    parser.add_argument("--output", type=Path, default=Path("runs/real/tax.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the tables of an existing output")
    parser.add_argument("--quick", action="store_true", help="few items, to check that it runs")
    args = parser.parse_args(arguments)
    if not args.report:
        if args.pairs is None:
            parser.error("--pairs is required to measure")
        for path in (args.output, args.bench):
            path.parent.mkdir(parents=True, exist_ok=True)
        set_seed(0)
        run(args)
    report(args.output)


def run(args: argparse.Namespace) -> None:
    # `trained` reads the validation results of the bench from `args.output`
    bench_args = argparse.Namespace(**vars(args) | {"prompts": args.pairs, "output": args.bench, "tax": args.output})
    bench, sizes = Bench(bench_args), QUICK if args.quick else FULL
    questions = prompts(args.pairs)
    validation = [as_messages(x) for x in questions[FIRST["validation"] :][: sizes["validation"]]]
    seen = questions[: FIRST["train"] + sizes["train"]]
    tokenizer = bench.tokenizer
    parts: dict[str, list[Item]] = {
        "HH-RLHF": hh(args.pairs, tokenizer, max_tokens=100, num_pairs=args.num_pairs, seen=seen)
    }
    if args.text:
        parts["text"] = windows(args.text, tokenizer, num_tokens=8 if args.quick else WINDOW, num_windows=NUM_WINDOWS)
    if args.llmbar:
        parts["LLMBar"] = llmbar(args.llmbar, tokenizer, args.max_tokens)
    xs = xstest(args.xstest) if args.xstest else []
    check_data(args, bench, parts | ({"XSTest": xs} if xs else {}))

    guides = [Guide({"doctor": "patient", "seed": None, "id": None}, [0.0])]
    guides += [saved_guide(bench, validation, folder, args.output) for folder in args.doctor]
    guides += [trained_guide(bench_args, bench, method, seed) for seed in args.seeds for method in args.methods]
    bench.answers.clear()  # 0.5 GB
    for name in ("HH-RLHF", "text"):
        if name in parts:
            run_texts(args, bench, guides, name, parts[name])
    if xs:
        run_xstest(args, bench, [guide for guide in guides if guide.key["seed"] in (None, args.seeds[0])], xs)
    if args.llmbar:
        run_texts(args, bench, guides, "LLMBar", parts["LLMBar"])


def check_data(args: argparse.Namespace, bench: Bench, parts: dict) -> None:
    """Append a digest of patient, task and texts of each part to the output. Raise `ValueError` if it has another."""
    fingerprint = model_fingerprint(bench.model)
    for name, items in parts.items():
        digest = hashlib.sha256(json.dumps([fingerprint, args.task, items]).encode()).hexdigest()[:16]
        known = read(args.output, part="data", name=name)
        if known and known[0]["digest"] != digest:
            raise ValueError(
                f"An output must be of one patient, one task and one set of texts. Got {str(args.output)!r} with "
                f"another patient, another task or other texts of {name}; pass another `--output`."
            )
        if not known:
            write(args.output, [{"part": "data", "name": name, "digest": digest, "num": len(items)}])


def run_texts(
    args: argparse.Namespace, bench: Bench, guides: Sequence[Guide], part: str, items: Sequence[Item]
) -> None:
    """Append log-likelihoods of the texts of each item, by guide and strength."""
    with Progress(len(items), f"Scoring {part}", "items") as progress:
        for first in range(0, len(items), PIECE):
            texts = [text for item in items[first : first + PIECE] for text in item]
            key = {"part": part, "first": first}
            missing = [guide for guide in guides if not read(args.output, **key, **guide.key)]
            if missing:
                scorer = Scorer(bench, missing)
                by_text = [scorer(text) for text in texts]
                num_tokens = [len(text.ids) for text in texts]
                rows = []
                for g, guide in enumerate(missing):
                    logps = [[round(x[g][level], 5) for x in by_text] for level in range(len(guide.strengths))]
                    rows.append(key | guide.key | {"logps": logps, "num_tokens": num_tokens})
                write(args.output, rows)
            progress.update(len(items[first : first + PIECE]), is_skipped=not missing)


def run_xstest(args: argparse.Namespace, bench: Bench, guides: Sequence[Guide], questions: Sequence[Question]) -> None:
    """Append greedy answers to each prompt, by guide and strength."""
    with Progress(len(questions), "Answering XSTest", "prompts") as progress:
        for first in range(0, len(questions), PROMPTS):
            some = questions[first : first + PROMPTS]
            key = {"part": "XSTest", "first": first}
            missing = [guide for guide in guides if not read(args.output, **key, **guide.key)]
            if missing:
                messages = [[{"role": "user", "content": question.text}] for question in some]
                ids = [
                    bench.tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False)
                    for x in messages
                ]
                found = greedy_answers(
                    bench.model,
                    missing,
                    ids,
                    max_new_tokens=4 if args.quick else MAX_NEW_TOKENS,
                    eos_token_id=bench.eos,
                )
                is_safe = [question.is_safe for question in some]
                rows = []
                for guide, levels in zip(missing, found, strict=True):
                    texts = [[bench.text(answer) for answer in answers] for answers in levels]
                    rows.append(key | guide.key | {"answers": texts, "is_safe": is_safe})
                write(args.output, rows)
            progress.update(len(some), is_skipped=not missing)


# Report

PERPLEXITY = "perplexity"
Values = dict[str, torch.Tensor]  # by column of the table, a value (P,) for each of P items


def values_of(rows: Sequence[dict], level: int) -> Values:
    """Return the values of a guide's rows at one strength: 0 or 1, and for neutral text nats per token."""
    found: Values = {}
    for part in ("LLMBar", "HH-RLHF"):
        if mine := [row for row in rows if row["part"] == part]:
            sums, nums = (x.view(-1, 2) for x in _scores(mine, level))  # chosen and rejected
            found[f"{part}, sum"] = agreement(sums[:, 0] - sums[:, 1])
            found[f"{part}, per token"] = agreement(sums[:, 0] / nums[:, 0] - sums[:, 1] / nums[:, 1])
    if mine := [row for row in rows if row["part"] == "XSTest"]:
        refusals = torch.tensor([is_refusal(x) for row in mine for x in row["answers"][level]]).double()
        is_safe = torch.tensor([x for row in mine for x in row["is_safe"]])
        found["refusals, unsafe"], found["refusals, safe"] = refusals[~is_safe], refusals[is_safe]
    if mine := [row for row in rows if row["part"] == "text"]:
        sums, nums = _scores(mine, level)
        found[PERPLEXITY] = -sums / nums
    return found


def _scores(rows: Sequence[dict], level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-likelihoods and numbers of tokens of all texts of some rows."""
    sums = torch.tensor([x for row in rows for x in row["logps"][level]])
    return sums.double(), torch.tensor([x for row in rows for x in row["num_tokens"]]).double()


def absolute(name: str, values: torch.Tensor) -> str:
    """Return a share in percent, or a perplexity, with its 95% interval over items."""
    numbers = [values.mean().item(), *bootstrap_interval(values)]
    numbers = [math.exp(x) for x in numbers] if name == PERPLEXITY else [100 * x for x in numbers]
    return "{:.1f} ({:.1f} to {:.1f})".format(*numbers)


def change(name: str, values: torch.Tensor) -> str:
    """
    Return the mean of paired differences (S, P) with its 95% interval over seeds and items: of shares in percentage
    points, of a perplexity in percent.
    """
    numbers = [values.mean().item(), *bootstrap_interval(values)]
    numbers = [math.expm1(x) for x in numbers] if name == PERPLEXITY else numbers
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in numbers))


def report(output: Path) -> None:
    """Print the tables of an output, in Markdown: the patient, what each doctor changes, and TFPO minus DPO."""
    rows, by_guide = read(output), {}
    for row in sorted(rows, key=lambda row: row.get("first", -1)):  # the same items at the same places
        if "first" in row:
            by_guide.setdefault((row["doctor"], row["id"]), {}).setdefault(row["seed"], []).append(row)
    patient = next((seeds[None] for (name, _), seeds in by_guide.items() if name == "patient"), [])
    alone = {name: values for name, values in values_of(patient, 0).items() if len(values) > 1}  # for an interval
    if not alone:
        print("\nNothing has been measured.")
        return
    counts = {name: len(values) for name, values in alone.items()}
    print("\nItems: " + ", ".join(f"{name} {num}" for name, num in counts.items() if not name.endswith("token")))
    print("\n| doctor | strength | KL (nats) | " + " | ".join(alone) + " |\n|---" + "|---:" * (len(alone) + 2) + "|")
    print("| patient | 0 | 0 | " + " | ".join(absolute(*x) for x in alone.items()) + " |")
    changes: dict[tuple[str, float], dict[str, torch.Tensor]] = {}
    for (name, identity), seeds in by_guide.items():
        if name == "patient":
            continue
        points = {
            x["seed"]: x for x in rows if x["part"] == "strengths" and (x["doctor"], x["id"]) == (name, identity)
        }
        for level in range(min(len(x["strengths"]) for x in points.values())):
            values = {seed: values_of(mine, level) for seed, mine in seeds.items()}
            found = {
                column: torch.stack([x[column] - of_patient for x in measured])  # (S, P)
                for column, of_patient in alone.items()
                if (measured := [x for x in values.values() if len(x.get(column, ())) == len(of_patient)])
            }
            strengths = sorted(points[seed]["strengths"][level] for seed in seeds)
            shown = " to ".join(f"{x:.3g}" for x in dict.fromkeys((strengths[0], strengths[-1])))
            kl = sum(points[seed]["kls"][level] for seed in seeds) / len(seeds)
            changes[name, kl] = found
            cells = [change(column, found[column]) if column in found else "" for column in alone]
            print(f"| {name} | {shown} | {kl:.2f} | " + " | ".join(cells) + " |")
    print_versus(changes, list(alone))


def print_versus(changes: dict[tuple[str, float], dict[str, torch.Tensor]], columns: Sequence[str]) -> None:
    """Print the differences of TFPO and DPO at equal KL, paired by seed and item."""
    kls = [kl for name, kl in changes if name == OURS and (RIVAL, kl) in changes]
    if not kls:
        return
    print(f"\n| KL (nats), {OURS} minus {RIVAL} | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
    for kl in kls:
        ours, rival = changes[OURS, kl], changes[RIVAL, kl]
        cells = [change(x, ours[x] - rival[x]) if x in ours and x in rival else "" for x in columns]
        print(f"| {kl:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
