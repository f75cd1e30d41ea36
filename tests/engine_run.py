# SPDX-License-Identifier: Apache-2.0

"""
What each process of `test_engines.py` runs: a training on raw preferences, with a patient and a doctor given by name.

A job is `full`, `lora`, `ratio` or `guided`. With `-undivided`, its steps do not accumulate gradients. With
`-resumed`, it resumes the checkpoint of step 2 of the job before it.
"""

import json
import os
from pathlib import Path

from accelerate import DistributedType, PartialState
from conftest import FACES
from datasets import load_dataset
from peft import LoraConfig
from processes import join_engine, leave_engine

from trl_tfpo import TFPOConfig, TFPOTrainer, tfpo_objective
from trl_tfpo.common.language_model import is_sharded


GLOBAL_BATCH = 8  # pairs of one optimizer step, whatever the engine


class RecordingObjective:
    """The objective; `seen` has the type of each tensor, and whether bfloat16 could hold all of its values."""

    def __init__(self):
        self.seen = {}

    def __call__(self, **tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                fits = bool((tensor.bfloat16() == tensor).all())
                fitted = self.seen.get(name, {}).get("is_rounded", True)
                self.seen[name] = {"dtype": str(tensor.dtype), "is_rounded": fits and fitted}
        return tfpo_objective(**tensors)


def run(folder: Path, output: Path, job: str) -> None:
    """Train, evaluate and save: OUTPUT/JOB is the doctor, OUTPUT/JOB.json the report."""
    method, _, how = job.partition("-")
    objective = RecordingObjective()
    trainer = make_trainer(folder, training_arguments(output, method, how), method, objective)
    trainer.train(resume_from_checkpoint=str(output / method / "checkpoint-2") if how == "resumed" else None)
    evaluated = trainer.evaluate()
    trainer.save_model(str(output / job))
    if trainer.is_world_process_zero():
        report = {
            "history": trainer.state.log_history,
            "evaluated": {name: evaluated[name] for name in ("eval_loss", "eval_loss/subtb")},
            "seen": objective.seen,
            "engine": trainer.accelerator.distributed_type.value,
            "is_sharded": is_sharded(trainer.model),
            "guided_is_sharded": trainer.base_policy is not None and is_sharded(trainer.base_policy),
        }
        (output / f"{job}.json").write_text(json.dumps(report), encoding="utf-8")


def training_arguments(output: Path, method: str, how: str) -> TFPOConfig:
    """Three steps on the global batch, however many processes share it."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = 2 if num_processes > 1 and how != "undivided" else 1
    args = TFPOConfig(
        str(output / method),
        policy=method if method in ("ratio", "guided") else "doctor",
        max_steps=3,
        per_device_train_batch_size=GLOBAL_BATCH // num_processes // accumulation,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        adam_epsilon=1.0,  # with the default, steps do not depend on the scale of the gradients
        max_grad_norm=1e6,
        logging_steps=1,
        save_strategy="no" if how == "resumed" else "steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # `TrainingArguments` refuses bfloat16 on CPUs
        args.bf16 = os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if "ACCELERATE_USE_FSDP" in os.environ:  # Accelerate shards on GPUs only; this type makes it shard over gloo
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return args


def make_trainer(folder: Path, args: TFPOConfig, method: str, objective: RecordingObjective) -> TFPOTrainer:
    dataset = load_dataset("json", data_files=str(folder / "preferences.jsonl"))["train"]
    return TFPOTrainer(
        model=str(folder / "doctor"),
        patient_model=str(folder / "patient"),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if method == "lora" else None,
        faces=FACES,
        objective=objective,
    )


def run_as_rank(folder: Path, output: Path, *jobs: str) -> None:
    """Run jobs in one process of several, which was forked, in the environment that a launcher sets."""
    join_engine(output / "cache")
    for job in jobs:
        run(folder, output, job)
    leave_engine()
