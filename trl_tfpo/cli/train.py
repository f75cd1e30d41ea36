# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo train`: a doctor from preferences."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..common._upstream import default_dtype
from ..data.tokenization import columns_of
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..training.checkpoints import resolve_checkpoint
from ..training.config import TFPOConfig
from ..training.plan import training_plan
from ..training.trainer import TFPOTrainer
from .annotate import resolve_given_faces
from .files import read_dataset, take_split
from .models import check_dtype, quantization
from .parser import DTYPE_HELP, Parser, old_name


@dataclass
class TFPOScriptArguments(ScriptArguments):
    """Models, data and faces."""

    patient: str | None = field(
        default=None,
        metadata={
            "aliases": old_name("patient_model_name_or_path"),
            "help": "Hub name or path of the frozen model to align. Not needed for an annotated dataset.",
        },
    )
    patient_load_in_4bit: bool = field(default=False, metadata={"help": "Load the patient in 4-bit NF4."})
    patient_dtype: str = field(default="auto", metadata=DTYPE_HELP)
    doctor: str | None = field(
        default=None,
        metadata={
            "aliases": old_name("doctor_model_name_or_path"),
            "help": "Hub name or path of the small model to train, with the patient's tokenizer.",
        },
    )
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the dataset on the Hub, as 'helpful-base' of Anthropic/hh-rlhf."}
    )
    chosen_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that says which of 'response_0' and 'response_1' is chosen: 'better_response_id' or "
            "'safer_response_id' of PKU-SafeRLHF."
        },
    )
    dry_run: int = field(
        default=0,
        metadata={
            "nargs": "?",
            "const": 1,
            "help": "Print what the training would read, do and hold in memory, and stop: nothing is loaded, no "
            "accelerator is needed. A number plans for as many processes.",
        },
    )
    world: bool = field(
        default=False, metadata={"help": "Patient and doctor of the controlled world, where you name none."}
    )
    faces: str = field(
        default="helpfulness", metadata={"help": "Built-in faces: 'helpfulness', 'harmlessness' or 'honesty'."}
    )
    positive_face: str | None = field(default=None, metadata={"help": "Your own faces: the wanted behaviour."})
    negative_face: str | None = field(default=None, metadata={"help": "Your own faces: its opposite."})
    face_placement: str = field(
        default="system",
        metadata={"help": "Where the faces stand: 'system', or 'user', at the end of the last user message."},
    )
    num_guided_examples: int = field(
        default=0, metadata={"help": "Print this many guided completions of training prompts at the end."}
    )


def run(arguments: Sequence[str]) -> int:
    """Train, in as many processes as are asked for."""
    types = (TFPOScriptArguments, TFPOConfig, ModelConfig)
    parsed = Parser(types, "train", "Train a doctor.").parse_or_launch(arguments, "train")
    if isinstance(parsed, int):
        return parsed
    if parsed[0].dataset_name is None:
        raise ValueError("`train` needs preferences. Pass `--dataset_name`: a Hub name, a folder or a file")
    if parsed[0].dry_run < 0:
        raise ValueError(
            f"`--dry_run` must be a number of processes. Got {parsed[0].dry_run}; leave the number out for 1"
        )
    train_doctor(*parsed)
    PartialState().destroy_process_group()  # its threads, alive at exit, may abort the process
    return 0


def train_doctor(script_args: TFPOScriptArguments, training_args: TFPOConfig, model_args: ModelConfig) -> None:
    """Annotate, train and save; or, on a dry run, say what that would take."""
    doctor = script_args.doctor or model_args.model_name_or_path
    patient = script_args.patient
    if script_args.world:
        from ..testbed.world import SHIPPED

        doctor, patient = doctor or str(SHIPPED / "doctor"), patient or str(SHIPPED / "patient")
    if doctor is None:
        raise ValueError("`train` needs a doctor. Pass `--doctor`: a Hub name or a folder")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    check_dtype(script_args.patient_dtype)
    training_args.patient_model_init_kwargs = {
        "dtype": script_args.patient_dtype,
        **(training_args.patient_model_init_kwargs or {}),
    }
    dataset = read_dataset(
        script_args.dataset_name,
        script_args.dataset_config,
        streaming=script_args.dataset_streaming,
        data_dir=script_args.dataset_data_dir,
    )
    if script_args.chosen_id_column is not None:
        dataset = DatasetDict(
            {name: choose_responses(split, script_args.chosen_id_column) for name, split in dataset.items()}
        )
    train_dataset = take_split(dataset, script_args.dataset_train_split, script_args.dataset_name)
    faces = resolve_given_faces(
        script_args.faces, script_args.positive_face, script_args.negative_face, script_args.face_placement
    )
    settings = dict(
        args=training_args,
        quantization_config=get_quantization_config(model_args),
        patient_quantization_config=quantization(script_args.patient_load_in_4bit),
        peft_config=get_peft_config(model_args),
        faces=faces,
    )
    if script_args.dry_run:
        plan = training_plan(
            train_dataset,
            AutoTokenizer.from_pretrained(doctor, trust_remote_code=training_args.trust_remote_code),
            doctor=doctor,
            patient=patient,
            num_processes=max(script_args.dry_run, training_args.world_size),
            # Where there is no accelerator, as by default on one
            mixed_precision=training_args.bf16 or training_args.fp16 or not torch.accelerator.is_available(),
            **settings,
        )
        if training_args.process_index == 0:
            print(plan)
        return

    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = take_split(dataset, script_args.dataset_test_split, script_args.dataset_name)
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    trainer = TFPOTrainer(
        model=doctor,
        patient_model=patient,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        **settings,
    )
    if trainer.rewards_summary is not None:
        trainer.accelerator.print(trainer.rewards_summary)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Doctor saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if script_args.num_guided_examples and trainer.accelerator.is_main_process:
        show_guided_examples(script_args.num_guided_examples, patient, trainer)
    trainer.end()


def choose_responses(dataset: Dataset | IterableDataset, chosen_id_column: str) -> Dataset | IterableDataset:
    """Preference pairs from a `prompt`, `response_0`, `response_1`, and the number of the one that is chosen."""
    needed = {"prompt", "response_0", "response_1", chosen_id_column}
    if missing := needed - columns_of(dataset):
        raise ValueError(f"With `--chosen_id_column` a dataset needs {sorted(needed)}. Got none of {sorted(missing)}")

    def to_pair(row):
        chosen_id = int(row[chosen_id_column])
        if chosen_id not in (0, 1):
            raise ValueError(f"`{chosen_id_column}` must be 0 or 1. Got {chosen_id}; leave such rows out.")
        pair = {"chosen": row[f"response_{chosen_id}"], "rejected": row[f"response_{1 - chosen_id}"]}
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": text}] for name, text in pair.items()},
        }

    return dataset.map(to_pair, remove_columns=dataset.column_names)


def show_guided_examples(num_examples: int, patient_name: str, trainer: TFPOTrainer) -> None:
    """The saved doctor, loaded as any causal language model, guides the patient."""
    settings = {"dtype": default_dtype(), "use_safetensors": True, "trust_remote_code": trainer.args.trust_remote_code}
    doctor = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, **settings)
    patient = AutoModelForCausalLM.from_pretrained(patient_name, **settings)
    for row in trainer.train_dataset.select(range(min(num_examples, len(trainer.train_dataset)))):
        input_ids = torch.tensor([row["prompt_ids"]])
        attention_mask = torch.ones_like(input_ids)
        processor = DoctorGuidedLogitsProcessor(doctor, attention_mask=attention_mask)
        settings = dict(input_ids=input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=32)
        print(f"prompt   {trainer.processing_class.decode(row['prompt_ids'][-64:])!r}")
        for label, processors in (("unguided", []), ("guided", [processor])):
            output = patient.generate(**settings, logits_processor=processors)[0, input_ids.size(1) :]
            print(f"{label:<9}{trainer.processing_class.decode(output, skip_special_tokens=True)!r}")
