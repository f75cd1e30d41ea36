# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo generate`: doctors guide a patient."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.printable import printable
from .parser import DTYPE_HELP, Parser, Repeated, old_name


@dataclass
class GenerateArguments:
    """Models, prompts, weights and sampling."""

    patient: str | None = field(
        default=None,
        metadata={
            "aliases": old_name("patient_model_name_or_path"),
            "help": "Hub name or path of the model that speaks.",
        },
    )
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    patient_load_in_4bit: bool = field(default=False, metadata={"help": "Load it in 4-bit NF4."})
    doctor: list[str] = field(
        default_factory=list, metadata={"action": Repeated, "help": "PATH or NAME=PATH of each doctor."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Exponent of the patient. By default what the doctors leave to it."}
    )
    beta: list[float] = field(
        default_factory=list,
        metadata={"action": Repeated, "help": "Exponent of each doctor. By default that of its training, or 0.5."},
    )
    prompt: list[str] = field(
        default_factory=list,
        metadata={"action": Repeated, "help": "Prompts, as user messages if there is a chat template."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "More prompts: the column `prompt` of a dataset (Hub name, folder or file)."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of it."})
    num_samples_per_prompt: int = field(default=1, metadata={"help": "Completions of each prompt."})
    best_of: int = field(
        default=1,
        metadata={"help": "Sample this many for each completion, and keep the best by the doctors' token credits."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the guided policy; 0 is greedy search."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens with this probability."})
    batch_size: int = field(default=16, metadata={"help": "Completions generated at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the models run code of their own."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "A `.jsonl` or `.parquet` file, or a folder, for prompts and completions, instead of printing them."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an output that exists."})
    world: bool = field(default=False, metadata={"help": "The patient and the test prompts of the controlled world."})


def load_policy(args: GenerateArguments) -> tuple:
    """Patient, tokenizer, guide if there are doctors, and prompts."""
    from transformers import AutoTokenizer

    from ..data.tokenizer_identity import check_same_tokenizer
    from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
    from .files import read_split
    from .models import check_dtype, load_patient, name_doctor

    if not args.world and args.patient is None:
        raise ValueError("a patient is needed. Pass `--patient`, or `--world` to try it")
    patient, tokenizer = load_patient(
        None if args.world else args.patient,
        dtype=args.dtype,
        in_4bit=args.patient_load_in_4bit,
        trust_remote_code=args.trust_remote_code,
        device_map="auto",
    )
    prompts = []
    if args.world and not args.prompt:
        from ..testbed.language import REVIEWS

        prompts = [REVIEWS.make_prompt(place) for place in REVIEWS.places("test")]
    prompts += [
        [{"role": "user", "content": text}] if tokenizer.chat_template is not None else text for text in args.prompt
    ]
    if args.dataset_name is not None:
        rows = read_split(args.dataset_name, args.dataset_split)
        if "prompt" not in rows.column_names:
            raise ValueError(f"The dataset must have a column `prompt`. Got {rows.column_names}; rename one")
        prompts += list(rows["prompt"])
    if not prompts:
        raise ValueError("there are no prompts. Pass `--prompt`, or a dataset with `--dataset_name`")
    for prompt in prompts:
        if not prompt or type(prompt) is not type(prompts[0]) or not isinstance(prompt, (str, list)):
            raise ValueError(
                f"Prompts must be texts, or conversations, and not empty. Got {prompt!r}, the first being {prompts[0]!r}; "
                "mend or leave out"
            )
    guide = None
    paths = [name_doctor(text)[1] for text in args.doctor]
    if paths:
        trust = {"trust_remote_code": args.trust_remote_code}
        guide = DoctorGuidedLogitsProcessor.from_pretrained(
            paths,
            args.alpha,
            args.beta or None,
            model_init_kwargs={"device_map": {"": patient.device}, "dtype": check_dtype(args.dtype), **trust},
        )
        for name in paths:
            check_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(name, **trust), names=("patient", name))
    return patient, tokenizer, guide, prompts


def run(arguments: Sequence[str]) -> int:
    """Print or write completions."""
    (args,) = Parser(GenerateArguments, "generate", "Let doctors guide a patient.").parse(arguments)
    if not args.temperature >= 0 or not 0 < args.top_p <= 1 or args.batch_size < 1:
        raise ValueError(
            "`--temperature` must not be negative, `--top_p` be in (0, 1], and `--batch_size` at least 1. Got "
            f"{args.temperature}, {args.top_p} and {args.batch_size}; leave them out for the defaults"
        )
    if args.beta and len(args.beta) != len(args.doctor):
        raise ValueError(
            f"`--beta` must have a number for each doctor. Got {len(args.beta)} for {len(args.doctor)}; give as many"
        )

    if args.best_of != 1 and not args.doctor:
        raise ValueError(
            f"`--best_of` ranks completions by a doctor's token credits. Got {args.best_of} without `--doctor`; give one"
        )

    from datasets import Dataset

    from ..evaluation import generate_completions
    from .files import check_output, write_dataset

    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite)
    patient, tokenizer, guide, prompts = load_policy(args)
    completions = generate_completions(
        patient,
        tokenizer,
        prompts,
        guide=guide,
        num_samples_per_prompt=args.num_samples_per_prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
        top_p=args.top_p,
        **({} if args.best_of == 1 else {"best_of": args.best_of}),
    )
    if args.output is not None:
        rows = [{"prompt": x.prompt, "completion": x.text, "is_complete": x.is_complete} for x in completions]
        write_dataset(Dataset.from_list(rows), args.output)
        print(f"{len(completions)} completions: {args.output}")
    for completion in completions if args.output is None else []:
        shown = completion.prompt if isinstance(completion.prompt, str) else completion.prompt[-1]["content"]
        print(f"{printable(json.dumps(shown, ensure_ascii=False))}\n  {printable(completion.text)}")
    return 0
