# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

# /// script
# dependencies = ["trl-tfpo[peft,plot]"]
# ///

"""
Train a doctor and guide a patient with it.

Without arguments, in the controlled world (minutes on a laptop CPU): a table, a picture, and completions side by side.

```bash
python examples/train.py
```

With your own models and preferences (names on the Hub or local paths):

```bash
accelerate launch examples/train.py \
    --patient_model_name_or_path Qwen/Qwen3-32B \
    --patient_load_in_4bit \
    --doctor_model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --faces helpfulness \
    --use_peft \
    --lora_target_modules all-linear \
    --learning_rate 5e-4 \
    --output_dir qwen3-doctor
```

The same from a file, `examples/configs` has some; and what it would cost in 8 processes, without loading or running it:

```bash
python examples/train.py --config examples/configs/ultrafeedback_qwen3.yaml --dry_run 8
```
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_tfpo import DoctorGuidedLogitsProcessor, Faces, TFPOConfig, TFPOTrainer
from trl_tfpo.plan import training_plan


WORLD_SETTINGS = dict(
    output_dir="runs/world",
    max_steps=500,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    activation_checkpointing=False,
    scoring_batch_size=256,
    logging_steps=50,
    save_strategy="no",
    dataloader_pin_memory=False,
)
PUBLISHED = dict(reward_direction="label", gap_floor=1e-6, reference_weight=0.0)  # decoded with alpha=1.0


@dataclass
class TFPOScriptArguments(ScriptArguments):
    """Models, data and faces."""

    patient_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The frozen model to align. Not needed for an annotated dataset."}
    )
    patient_load_in_4bit: bool = field(default=False, metadata={"help": "Load the patient in 4-bit NF4."})
    doctor_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The small model to train, with the patient's tokenizer."}
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
    faces: str = field(
        default="helpfulness", metadata={"help": "Built-in faces: 'helpfulness', 'harmlessness' or 'honesty'."}
    )
    positive_face: str | None = field(default=None, metadata={"help": "Your own faces: the wanted behaviour."})
    negative_face: str | None = field(default=None, metadata={"help": "Your own faces: its opposite."})
    num_guided_examples: int = field(
        default=0, metadata={"help": "Print this many guided completions of training prompts at the end."}
    )
    attribute: str = field(default="praise", metadata={"help": "What to align to in the controlled world."})
    num_pairs: int = field(default=3000, metadata={"help": "Preference pairs drawn in the controlled world."})
    num_samples_per_prompt: int = field(
        default=120, metadata={"help": "Completions of each test prompt behind a row of the table."}
    )


def main(script_args: TFPOScriptArguments, training_args: TFPOConfig, model_args: ModelConfig) -> None:
    if script_args.dataset_name is None:
        if script_args.dry_run:
            raise ValueError("A dry run needs a dataset and models. Got no `dataset_name`; pass one, or a `--config`.")
        run_world(script_args, training_args)
    else:
        run_real(script_args, training_args, model_args)


# Your own models and data


def run_real(script_args: TFPOScriptArguments, training_args: TFPOConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_preferences(
        script_args.dataset_name,
        script_args.dataset_config,
        script_args.dataset_streaming,
        data_dir=script_args.dataset_data_dir,
    )
    if script_args.chosen_id_column is not None:
        dataset = DatasetDict(
            {name: choose_responses(split, script_args.chosen_id_column) for name, split in dataset.items()}
        )
    train_dataset = dataset[script_args.dataset_train_split]
    faces = script_args.faces
    if script_args.positive_face and script_args.negative_face:
        faces = Faces(positive=script_args.positive_face, negative=script_args.negative_face)
    doctor = script_args.doctor_model_name_or_path or model_args.model_name_or_path
    settings = dict(
        args=training_args,
        quantization_config=get_quantization_config(model_args),
        patient_quantization_config=(
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
            if script_args.patient_load_in_4bit
            else None
        ),
        peft_config=get_peft_config(model_args),
        faces=faces,
    )
    if script_args.dry_run:
        plan = training_plan(
            train_dataset,
            AutoTokenizer.from_pretrained(doctor, trust_remote_code=training_args.trust_remote_code),
            doctor=doctor,
            patient=script_args.patient_model_name_or_path,
            num_processes=max(script_args.dry_run, training_args.world_size),
            # Where there is no accelerator, as by default on one
            mixed_precision=training_args.bf16 or training_args.fp16 or not torch.accelerator.is_available(),
            **settings,
        )
        if training_args.process_index == 0:
            print(plan)
        return

    trainer = TFPOTrainer(
        model=doctor,
        patient_model=script_args.patient_model_name_or_path,
        train_dataset=train_dataset,
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        **settings,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Doctor saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if script_args.num_guided_examples and trainer.accelerator.is_main_process:
        show_guided_examples(script_args, training_args, trainer)
    trainer.end()


def load_preferences(name: str, config: str | None, streaming: bool, data_dir: str | None = None) -> DatasetDict:
    """A dataset by Hub name, a folder (of files, or written by `save_to_disk`), or a JSON lines or Parquet file."""
    path = Path(name)
    if path.is_file():
        builder = "parquet" if ".parquet" in path.suffixes else "json"
        return load_dataset(builder, data_files={"train": str(path)}, streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        dataset = load_from_disk(path)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    return load_dataset(name, config, data_dir=data_dir, streaming=streaming)


def choose_responses(dataset: Dataset | IterableDataset, chosen_id_column: str) -> Dataset | IterableDataset:
    """Preference pairs from a `prompt`, `response_0`, `response_1`, and the number of the one that is chosen."""

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


def show_guided_examples(script_args: TFPOScriptArguments, training_args: TFPOConfig, trainer: TFPOTrainer) -> None:
    """The saved doctor, loaded as any causal language model, guides the patient."""
    from transformers import AutoModelForCausalLM

    doctor = AutoModelForCausalLM.from_pretrained(training_args.output_dir, dtype="auto")
    patient = AutoModelForCausalLM.from_pretrained(script_args.patient_model_name_or_path, dtype="auto")
    for row in trainer.train_dataset.select(range(script_args.num_guided_examples)):
        input_ids = torch.tensor([row["prompt_ids"]])
        attention_mask = torch.ones_like(input_ids)
        processor = DoctorGuidedLogitsProcessor(doctor, attention_mask=attention_mask)
        settings = dict(input_ids=input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=32)
        print(f"prompt   {trainer.processing_class.decode(row['prompt_ids'][-64:])!r}")
        for label, processors in (("unguided", []), ("guided", [processor])):
            output = patient.generate(**settings, logits_processor=processors)[0, input_ids.size(1) :]
            print(f"{label:<9}{trainer.processing_class.decode(output, skip_special_tokens=True)!r}")


# The controlled world


def run_world(script_args: TFPOScriptArguments, training_args: TFPOConfig) -> None:
    from trl_tfpo.testbed import Comparison, load_world

    world = load_world()
    dataset = world.preference_dataset(script_args.attribute, num_pairs=script_args.num_pairs, seed=training_args.seed)
    faces = world.attributes[script_args.attribute].faces

    def train_doctor(**settings):
        fresh = load_world()
        trainer = TFPOTrainer(
            model=fresh.doctor,
            patient_model=world.patient,
            args=TFPOConfig(**(training_args.to_dict() | settings)),
            train_dataset=dataset,
            processing_class=world.tokenizer,
            faces=faces,
        )
        trainer.train()
        trainer.save_model()
        is_main_process = trainer.accelerator.is_main_process
        trainer.accelerator.wait_for_everyone()
        return fresh.doctor.eval(), is_main_process

    doctor, is_main_process = train_doctor()
    published, _ = train_doctor(output_dir=f"{training_args.output_dir}/published", **PUBLISHED)
    if not is_main_process:
        return

    comparison = Comparison(
        world,
        script_args.attribute,
        num_samples_per_prompt=script_args.num_samples_per_prompt,
        seed=training_args.seed,
    )

    def guide(beta):
        return DoctorGuidedLogitsProcessor(doctor, beta=beta)

    def published_guide(beta):
        return DoctorGuidedLogitsProcessor(published, alpha=1.0, beta=beta)

    for target_kl in (0.5, 1.5):
        row = comparison.add_at_kl("doctor-guided", guide, target_kl)
        if target_kl == 0.5:
            beta = row["beta"]
    comparison.add_at_kl("published setting", published_guide, 0.5, max_beta=2.0)
    comparison.add_best_of_n(4)

    output_dir = Path(training_args.output_dir)
    comparison.plot(output_dir / "reward_kl.png")
    report = [{name: value for name, value in row.items() if name != "texts"} for row in comparison.rows]
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{comparison.show_completions(guide(2 * beta))}\n\n{comparison.table()}\n")
    print(f"Picture: {output_dir / 'reward_kl.png'}. Doctor: {output_dir}.")


def make_parser() -> TrlParser:
    return TrlParser((TFPOScriptArguments, TFPOConfig, ModelConfig))


if __name__ == "__main__":
    arguments = make_parser().parse_args_and_config()
    if arguments[0].dataset_name is None:
        parser = make_parser()
        parser.set_defaults_with_config(**WORLD_SETTINGS)
        arguments = parser.parse_args_and_config()
    main(*arguments)
