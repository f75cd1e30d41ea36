# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo generate`: sample completions from a patient, guided by doctors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..common.printable import printable
from . import options
from .parser import Parser


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
    from ..faces import Prompt


@dataclass(kw_only=True)
class GenerateArguments(options.GuideArguments):
    """Options of `trl-tfpo generate`."""

    kl: float | None = field(default=None, metadata=options.KL)
    prompt: list[str] = field(
        default_factory=list,
        metadata={"action": options.Repeated, "help": "Prompts. With a chat template they are user messages."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with more prompts in a column `prompt`: a Hub name, a folder or a file."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_samples_per_prompt: int = field(default=1, metadata={"help": "Completions per prompt."})
    best_of: int = field(
        default=1,
        metadata={"help": "Candidates per completion. The candidate with the largest sum of token credits is kept."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of a completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the guided policy, or 0 for greedy search."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most likely tokens up to this total probability, in (0, 1]."}
    )
    batch_size: int = field(default=16, metadata={"help": "Completions generated at once."})
    seed: int = field(default=0, metadata={"help": "Random seed."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)
    output: str | None = field(
        default=None,
        metadata={
            "help": "Output for prompts and completions: a `.jsonl` or `.parquet` file, or a folder. By default they "
            "are printed."
        },
    )
    overwrite: bool = field(default=False, metadata=options.OVERWRITE)
    world: bool = field(
        default=False,
        metadata={"help": "Use the patient of the controlled world and, without `--prompt`, its test prompts."},
    )


def run(arguments: Sequence[str]) -> int:
    """Print or write completions."""
    description = "Sample completions from a patient, guided by doctors."
    (args,) = Parser([GenerateArguments], "generate", description).parse(arguments)
    check_arguments(args)

    from datasets import Dataset

    from ..evaluation import generate_completions
    from .files import check_output, write_dataset
    from .models import load_patient

    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite)
    patient, tokenizer = load_patient(
        None if args.world else args.patient,
        dtype=args.dtype,
        in_4bit=args.patient_load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    completions = generate_completions(
        patient,
        tokenizer,
        read_prompts(args, tokenizer),
        guide=load_guide(args, patient, tokenizer) if args.doctor else None,
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
        return 0
    for completion in completions:
        prompt = completion.prompt if isinstance(completion.prompt, str) else completion.prompt[-1]["content"]
        print(f"{printable(json.dumps(prompt, ensure_ascii=False))}\n  {printable(completion.text)}")
    return 0


def check_arguments(args: GenerateArguments) -> None:
    """Raise `ValueError` on invalid options, before anything is loaded."""
    if not args.temperature >= 0 or not 0 < args.top_p <= 1 or args.batch_size < 1:
        raise ValueError(
            "`--temperature` must be at least 0, `--top_p` in (0, 1], and `--batch_size` at least 1. Got "
            f"{args.temperature}, {args.top_p} and {args.batch_size}; leave them out for the defaults"
        )
    if args.beta and len(args.beta) != len(args.doctor):
        raise ValueError(
            "`--beta` must have a number for each doctor. Got "
            f"{len(args.beta)} for {len(args.doctor)}; pass one for each"
        )
    options.check_kl(args.kl, args.doctor)
    if args.best_of != 1 and not args.doctor:
        raise ValueError(
            "`--best_of` ranks completions by a doctor's token credits. Got "
            f"{args.best_of} without `--doctor`; pass one"
        )
    if not args.world and args.patient is None:
        raise ValueError("a patient is needed. Pass `--patient`, or `--world` to try it")


def read_prompts(
    args: GenerateArguments, tokenizer: "PreTrainedTokenizerBase", *, world_split: str = "test"
) -> "list[Prompt]":
    """Collect the prompts of options, dataset and controlled world. All are texts, or all are conversations."""
    from .files import read_split

    prompts: list[Prompt] = []
    if args.world and not args.prompt:
        from ..testbed.language import REVIEWS

        prompts += [REVIEWS.make_prompt(place) for place in REVIEWS.places(world_split)]
    is_chat = tokenizer.chat_template is not None
    prompts += [[{"role": "user", "content": text}] if is_chat else text for text in args.prompt]
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
                "Prompts must be texts or conversations, all of one kind and not empty. Got "
                f"{prompt!r}, and {prompts[0]!r} as the first; correct or remove it"
            )
    return prompts


def load_guide(
    args: GenerateArguments, patient: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "DoctorGuidedLogitsProcessor":
    """Load the doctors, and check that they have the patient's tokenizer."""
    from transformers import AutoTokenizer

    from ..data.tokenizer_identity import check_same_tokenizer
    from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
    from .models import check_dtype, parse_doctor

    paths = [parse_doctor(text)[1] for text in args.doctor]
    trust = {"trust_remote_code": args.trust_remote_code}
    guide = DoctorGuidedLogitsProcessor.from_pretrained(
        paths,
        args.alpha,
        args.beta or None,
        kl=args.kl,
        model_init_kwargs={"device_map": {"": patient.device}, "dtype": check_dtype(args.dtype), **trust},
    )
    for path in paths:
        check_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(path, **trust), names=("patient", path))
    return guide
