# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["trl-tfpo[peft,plot]"]
# ///

"""
Train a doctor and guide a patient with it.

Without arguments the script runs in the controlled world, in minutes on a laptop CPU. It prints a table and
completions, and saves a figure.

```bash
python examples/train.py
```

Pass your own models and preferences as names on the Hub or local paths:

```bash
accelerate launch examples/train.py \
    --patient Qwen/Qwen3-32B \
    --patient_load_in_4bit \
    --doctor Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --faces helpfulness \
    --use_peft \
    --lora_target_modules all-linear \
    --learning_rate 5e-4 \
    --output_dir qwen3-doctor
```

A file can set the options (see `examples/configs`). `--dry_run` estimates memory for 8 processes, without training:

```bash
python examples/train.py --config examples/configs/ultrafeedback_qwen3.yaml --dry_run 8
```
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer
from trl_tfpo.cli.parser import ConfigParser
from trl_tfpo.cli.train import TFPOScriptArguments, train_doctor
from trl_tfpo.testbed import Comparison, load_world


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
PUBLISHED = dict(  # decoded with alpha=1.0
    reward_direction="label",
    importance_temperature=1.0,
    gap_floor=1e-6,
    policy="doctor",
    reward_temperature=0.125,
    reference_weight=0.0,
    subtb_lambda=1.0,
    value_head_learning_rate=WORLD_SETTINGS["learning_rate"],  # better here than the default
)


@dataclass
class Arguments(TFPOScriptArguments):
    """Options of `trl-tfpo train` and of the controlled world."""

    attribute: str = field(default="praise", metadata={"help": "Attribute to align to in the controlled world."})
    num_pairs: int = field(default=3000, metadata={"help": "Preference pairs drawn in the controlled world."})
    num_samples_per_prompt: int = field(
        default=120, metadata={"help": "Completions of each test prompt for a row of the table."}
    )


def main(script_args: Arguments, training_args: TFPOConfig, model_args: ModelConfig) -> None:
    if script_args.dataset_name is None:
        if script_args.dry_run:
            raise ValueError("A dry run needs a dataset and models. Got no `dataset_name`; pass one, or a `--config`.")
        run_world(script_args, training_args)
    else:
        train_doctor(script_args, training_args, model_args)


# The controlled world


def run_world(script_args: Arguments, training_args: TFPOConfig) -> None:
    world = load_world()
    dataset = world.preference_dataset(script_args.attribute, num_pairs=script_args.num_pairs, seed=training_args.seed)
    faces = world.attributes[script_args.attribute].faces

    def train(**settings):
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

    doctor, is_main_process = train()
    published, _ = train(output_dir=f"{training_args.output_dir}/published", **PUBLISHED)
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


def make_parser() -> ConfigParser:
    return ConfigParser((Arguments, TFPOConfig, ModelConfig))


if __name__ == "__main__":
    arguments = make_parser().parse_args_and_config()
    if arguments[0].dataset_name is None:
        parser = make_parser()
        parser.set_defaults_with_config(**WORLD_SETTINGS)
        arguments = parser.parse_args_and_config()
    main(*arguments)
    PartialState().destroy_process_group()  # otherwise its threads may abort the process at exit
