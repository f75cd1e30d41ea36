# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo strengths`: measure or show the KL from the patient at each strength of a doctor."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.printable import printable
from . import options
from .parser import Parser


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..faces import Prompt
    from ..models.strengths import StrengthTable


@dataclass
class StrengthsArguments:
    """Options of `trl-tfpo strengths`."""

    doctor: str = field(metadata={"help": "Doctor: a folder. To show a saved table, a Hub name is also possible."})
    patient: str | None = field(
        default=None,
        metadata=options.PATIENT | {"help": "Patient to measure with. Without it, the saved table is shown."},
    )
    dtype: str = field(default="auto", metadata=options.DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    prompt: list[str] = field(
        default_factory=list, metadata={"action": options.Repeated, "help": "Validation prompts."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preference dataset, or one with a column `prompt`: a Hub name, a folder or a file."},
    )
    dataset_split: str = field(
        default="test", metadata={"help": "Split of the dataset. A file has the split 'train'."}
    )
    convert_transcripts: bool = field(
        default=False, metadata={"help": "Convert transcripts with turns of Human and Assistant to messages."}
    )
    num_prompts: int = field(default=32, metadata={"help": "Maximum number of different prompts."})
    num_samples_per_prompt: int = field(default=4, metadata={"help": "Completions per prompt and strength."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "Maximum length of a completion, in tokens. The KL grows with the length."}
    )
    strengths: list[float] = field(
        default_factory=list,
        metadata={
            "action": options.Repeated,
            "help": "Exponents of the doctor. By default 0.125, 0.25, 0.5, 1 and 2 for a doctor of guided flow, and "
            "0.2, 0.4, 0.6, 0.8 and 1 for a language model.",
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Completions generated at once."})
    seed: int = field(default=0, metadata={"help": "Random seed."})
    kl: float | None = field(default=None, metadata={"help": "Print only the exponent at this KL."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing table."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)
    world: bool = field(
        default=False,
        metadata={
            "help": "Use the patient of the controlled world and, without other prompts, its validation prompts."
        },
    )


def run(arguments: Sequence[str]) -> int:
    """Measure the table and save it with the doctor, or show the saved table."""
    description = (
        "Measure the KL of the guided policy from the patient at several strengths of a doctor, and save the table in "
        "the folder of the doctor. Without a patient, show the saved table."
    )
    (args,) = Parser([StrengthsArguments], "strengths", description).parse(arguments)
    if args.world or args.patient is not None:
        table = measure(args)
    else:
        from ..models.strengths import load_strengths

        saved = load_strengths(args.doctor)
        if saved is None:
            raise ValueError(
                f"{args.doctor!r} has no table of strengths. To measure it, pass `--patient`, and `--dataset_name` or "
                "`--prompt`"
            )
        table = saved
    if args.kl is not None:
        print(f"{table.beta_at(args.kl):.4g}")
    else:
        facts = (
            f"KL from the patient {table.patient!r}, {table.num_prompts} prompts, {table.num_samples_per_prompt} "
            f"sample(s) each, at most {table.max_new_tokens} tokens"
        )
        print(f"{printable(facts)}\n\n{table.as_table()}")
    return 0


def measure(args: StrengthsArguments) -> "StrengthTable":
    """Measure the table, and save it in the folder of the doctor."""
    if args.num_prompts < 1:
        raise ValueError(f"`--num_prompts` must be at least 1. Got {args.num_prompts}; leave it out for 32")

    from ..common.atomic import check_writable
    from ..evaluation import measure_strengths
    from ..models.strengths import STRENGTHS_FILE
    from .models import load_models

    folder = Path(args.doctor)
    if not folder.is_dir():
        raise ValueError(
            f"The table is saved in the folder of the doctor. Got {args.doctor!r}, which is not a folder; download it"
        )
    if (folder / STRENGTHS_FILE).exists() and not args.overwrite:
        raise ValueError(f"{args.doctor!r} already has a table of strengths. Pass `--overwrite` to replace it")
    check_writable(folder)
    patient, tokenizer, doctors = load_models(
        None if args.world else args.patient,
        [f"doctor={folder}"],
        dtype=args.dtype,
        in_4bit=args.patient_load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    table = measure_strengths(
        patient,
        doctors["doctor"],
        tokenizer,
        read_validation_prompts(args, patient, tokenizer),
        strengths=args.strengths or None,
        num_samples_per_prompt=args.num_samples_per_prompt,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    table.save(folder)
    return table


def read_validation_prompts(
    args: StrengthsArguments, patient: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "list[Prompt | list[int]]":
    """Collect different prompts of options, dataset and controlled world. Those of preferences are token ids."""
    from ..annotation.token_rewards import check_annotated_for
    from ..data.tokenization import all_eos_token_ids, tokenize_preferences
    from ..evaluation.strengths import different_prompts
    from .files import read_split
    from .generate import GenerateArguments, read_prompts

    prompts: list[Prompt | list[int]] = []
    rows = None if args.dataset_name is None else read_split(args.dataset_name, args.dataset_split)
    if rows is not None and "prompt_ids" in rows.column_names:
        check_annotated_for(rows, tokenizer)
        prompts += different_prompts(rows, args.num_prompts)
    elif rows is not None and {"chosen", "rejected"} <= set(rows.column_names):
        tokenized = tokenize_preferences(
            rows.to_iterable_dataset(),  # only as many as are needed
            tokenizer,
            faces=None,
            eos_token_ids=all_eos_token_ids(tokenizer, patient),
            drop_unusable=True,
            convert_transcripts=args.convert_transcripts,
        )
        prompts += different_prompts(tokenized, args.num_prompts)
    if args.prompt or not prompts:
        name = None if prompts else args.dataset_name
        source = GenerateArguments(
            prompt=args.prompt, dataset_name=name, dataset_split=args.dataset_split, world=args.world
        )
        prompts = [*read_prompts(source, tokenizer, world_split="validation"), *prompts]
    different = {json.dumps(prompt): prompt for prompt in prompts}
    return list(different.values())[: args.num_prompts]
