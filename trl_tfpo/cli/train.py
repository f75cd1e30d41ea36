# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo train`: train a doctor on preferences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..common.precision import default_dtype
from ..data.tokenization import columns_of
from ..decoding.exponents import DEFAULT_BETA
from ..decoding.generation import guided_generate
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..training.checkpoints import resolve_checkpoint
from ..training.config import TFPOConfig
from ..training.plan import training_plan
from ..training.trainer import TFPOTrainer
from . import options
from .annotate import resolve_given_faces
from .files import read_dataset, take_split
from .models import check_dtype, quantization
from .parser import Parser


@dataclass
class TFPOScriptArguments(ScriptArguments):
    """Options of `trl-tfpo train`, besides those of [`TFPOConfig`] and TRL's `ModelConfig`."""

    patient: str | None = field(
        default=None,
        metadata={
            "aliases": options.OLD_PATIENT,
            "help": "Patient: a Hub name or a folder. Not needed for an annotated dataset, except with "
            "`--policy guided`.",
        },
    )
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    patient_dtype: str = field(default="auto", metadata=options.DTYPE)
    doctor: str | None = field(
        default=None,
        metadata={
            "aliases": options.option_strings("doctor_model_name_or_path"),
            "help": "Doctor to train: a Hub name or a folder. It must have the patient's tokenizer.",
        },
    )
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder within a Hub dataset, such as 'helpful-base' of Anthropic/hh-rlhf."}
    )
    chosen_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that tells which of the columns 'response_0' and 'response_1' is chosen, by 0 or 1. In "
            "PKU-SafeRLHF: 'better_response_id' or 'safer_response_id'."
        },
    )
    dry_run: int = field(
        default=0,
        metadata={
            "nargs": "?",
            "const": 1,
            "help": "Print a plan of tokens, steps and memory for this number of processes (1 if the number is "
            "omitted), and exit. Loads no weights and needs no accelerator. 0 trains.",
        },
    )
    world: bool = field(default=False, metadata={"help": "Use patient and doctor of the controlled world by default."})
    faces: str = field(default="helpfulness", metadata=options.FACES)
    positive_face: str | None = field(default=None, metadata=options.POSITIVE_FACE)
    negative_face: str | None = field(default=None, metadata=options.NEGATIVE_FACE)
    face_placement: str = field(default="system", metadata=options.FACE_PLACEMENT)
    num_guided_examples: int = field(
        default=0, metadata={"help": "Print guided completions of this many training prompts at the end."}
    )


def run(arguments: Sequence[str]) -> int:
    """Train, in one process or several."""
    description = (
        "Train a doctor on preferences. Also accepts options of `accelerate launch`, such as "
        "`--num_processes 8` or `--accelerate_config ddp`."
    )
    types = [TFPOScriptArguments, TFPOConfig, ModelConfig]
    parsed = Parser(types, "train", description).parse_or_launch(arguments)
    if isinstance(parsed, int):
        return parsed
    script_args, training_args, model_args = parsed
    if script_args.dry_run < 0:
        raise ValueError(
            f"`--dry_run` must be a number of processes. Got {script_args.dry_run}; omit the number for 1"
        )
    train_doctor(script_args, training_args, model_args)
    PartialState().destroy_process_group()  # otherwise its threads may abort the process at exit
    return 0


def train_doctor(script_args: TFPOScriptArguments, training_args: TFPOConfig, model_args: ModelConfig) -> None:
    """Annotate, train and save. On a dry run, print a plan instead."""
    dataset_name = script_args.dataset_name
    if dataset_name is None:
        raise ValueError("`train` needs preferences. Pass `--dataset_name`: a Hub name, a folder or a file")
    doctor, patient = model_names(script_args, model_args)
    set_init_kwargs(script_args, training_args, model_args)
    dataset = read_preferences(dataset_name, script_args)
    train_dataset = take_split(dataset, script_args.dataset_train_split, dataset_name)
    faces = resolve_given_faces(
        script_args.faces, script_args.positive_face, script_args.negative_face, script_args.face_placement
    )
    quantization_config = get_quantization_config(model_args)
    patient_quantization_config = quantization(script_args.patient_load_in_4bit)
    peft_config = get_peft_config(model_args)
    if script_args.dry_run:
        plan = training_plan(
            train_dataset,
            AutoTokenizer.from_pretrained(doctor, trust_remote_code=training_args.trust_remote_code),
            doctor=doctor,
            patient=patient,
            args=training_args,
            faces=faces,
            quantization_config=quantization_config,
            patient_quantization_config=patient_quantization_config,
            peft_config=peft_config,
            num_processes=max(script_args.dry_run, training_args.world_size),
            # Without an accelerator, plan for one with mixed precision, which is the default there
            mixed_precision=training_args.bf16 or training_args.fp16 or not torch.accelerator.is_available(),
        )
        if training_args.process_index == 0:
            print(plan)
        return
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = take_split(dataset, script_args.dataset_test_split, dataset_name)
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    trainer = TFPOTrainer(
        model=doctor,
        patient_model=patient,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config,
        patient_quantization_config=patient_quantization_config,
        peft_config=peft_config,
        faces=faces,
    )
    if trainer.rewards_summary is not None:
        trainer.accelerator.print(trainer.rewards_summary)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Doctor saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    if script_args.num_guided_examples and patient is not None and trainer.accelerator.is_main_process:
        tokenized = cast("Dataset | IterableDataset", trainer.train_dataset)  # its type in TRL is a PyTorch dataset
        show_guided_examples(islice(tokenized, script_args.num_guided_examples), patient, training_args)
    trainer.end()


def model_names(script_args: TFPOScriptArguments, model_args: ModelConfig) -> tuple[str, str | None]:
    """Return the names of doctor and patient."""
    doctor, patient = script_args.doctor or model_args.model_name_or_path, script_args.patient
    if script_args.world:
        from ..testbed.world import SHIPPED_WEIGHTS

        doctor, patient = doctor or str(SHIPPED_WEIGHTS / "doctor"), patient or str(SHIPPED_WEIGHTS / "patient")
    if doctor is None:
        raise ValueError("`train` needs a doctor. Pass `--doctor`: a Hub name or a folder")
    if patient is None and script_args.num_guided_examples:
        raise ValueError("`--num_guided_examples` needs a patient. Pass `--patient`: a Hub name or a folder")
    return doctor, patient


def set_init_kwargs(script_args: TFPOScriptArguments, training_args: TFPOConfig, model_args: ModelConfig) -> None:
    """Add model options to the training arguments. Keyword arguments that they already have take precedence."""
    check_dtype(script_args.patient_dtype)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast("dict[str, Any]", training_args.model_init_kwargs or {}),  # JSON text is parsed already
    }
    training_args.patient_model_init_kwargs = {
        "dtype": script_args.patient_dtype,
        **cast("dict[str, Any]", training_args.patient_model_init_kwargs or {}),
    }


def read_preferences(name: str, script_args: TFPOScriptArguments) -> DatasetDict:
    """Read the preference dataset. `--chosen_id_column` converts it to pairs."""
    dataset = read_dataset(
        name,
        script_args.dataset_config,
        streaming=script_args.dataset_streaming,
        data_dir=script_args.dataset_data_dir,
    )
    column = script_args.chosen_id_column
    if column is None:
        return dataset
    return DatasetDict({name: choose_responses(split, column) for name, split in dataset.items()})


def choose_responses(dataset: Dataset | IterableDataset, chosen_id_column: str) -> Dataset | IterableDataset:
    """Make pairs from the columns `prompt`, `response_0` and `response_1`, and the index of the chosen response."""
    needed = {"prompt", "response_0", "response_1", chosen_id_column}
    if missing := needed - columns_of(dataset):
        raise ValueError(
            f"With `--chosen_id_column` a dataset needs {sorted(needed)}. Got one without {sorted(missing)}; "
            "rename its columns"
        )

    def to_pair(row: dict) -> dict:
        chosen_id = int(row[chosen_id_column])
        if chosen_id not in (0, 1):
            raise ValueError(f"`{chosen_id_column}` must be 0 or 1. Got {chosen_id}; remove such rows.")
        pair = {"chosen": row[f"response_{chosen_id}"], "rejected": row[f"response_{1 - chosen_id}"]}
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": text}] for name, text in pair.items()},
        }

    return dataset.map(to_pair, remove_columns=dataset.column_names)


def show_guided_examples(rows: Iterable[dict], patient_name: str, training_args: TFPOConfig) -> None:
    """Print greedy completions of training prompts, with and without the saved doctor."""
    folder, trust = str(training_args.output_dir), training_args.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    settings = {"dtype": default_dtype(), "use_safetensors": True, "trust_remote_code": trust}
    doctor = AutoModelForCausalLM.from_pretrained(folder, **settings)
    patient = AutoModelForCausalLM.from_pretrained(patient_name, **settings)
    for row in rows:
        input_ids = torch.tensor([row["prompt_ids"]])
        print(f"prompt   {tokenizer.decode(row['prompt_ids'][-64:])!r}")
        for label, beta in (("unguided", 0.0), ("guided", DEFAULT_BETA)):
            guide = DoctorGuidedLogitsProcessor(doctor, beta=beta)
            mask = torch.ones_like(input_ids)
            output = guided_generate(
                patient, guide, input_ids=input_ids, attention_mask=mask, do_sample=False, max_new_tokens=32
            )
            print(f"{label:<9}{tokenizer.decode(output[0, input_ids.size(1) :], skip_special_tokens=True)!r}")
