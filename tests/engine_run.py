# SPDX-License-Identifier: Apache-2.0

"""
What `test_engines.py` launches: raw preferences, a patient and a doctor by name, training, a save, a resume.

    accelerate launch --config_file ENGINE.yaml engine_run.py FOLDER OUTPUT JOB [JOB ...]

A job is `full`, `lora`, `ratio` or `guided`, with `-undivided` to take each step without accumulation, or with `-resumed` to go on from
the second checkpoint of the job before it. FOLDER has `preferences.jsonl`, `patient` and `doctor`. OUTPUT/JOB becomes the saved
doctor, OUTPUT/JOB.json what was seen.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import load_dataset
from peft import LoraConfig

from trl_tfpo import Faces, TFPOConfig, TFPOTrainer, tfpo_objective
from trl_tfpo.common._upstream import is_sharded


GLOBAL_BATCH = 8  # pairs of one optimizer step, whatever the engine
FACES = Faces(positive="you are kind", negative="you are rude")


def run(folder: Path, output: Path, job: str) -> None:
    """Train on one global batch after another, save, and write what the objective saw and the trainer logged."""
    method, _, how = job.partition("-")
    resumed = how == "resumed"
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
        save_strategy="no" if resumed else "steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # `TrainingArguments` refuses bfloat16 on CPUs
        args.bf16 = os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if "ACCELERATE_USE_FSDP" in os.environ:  # Accelerate shards on GPUs only; taking CPUs for these, over gloo as well
        PartialState().distributed_type = DistributedType.MULTI_GPU
    seen = {}

    def objective(**tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                is_rounded = bool((tensor.bfloat16() == tensor).all())
                seen[name] = {
                    "dtype": str(tensor.dtype),
                    "is_rounded": is_rounded and seen.get(name, {}).get("is_rounded", True),
                }
        return tfpo_objective(**tensors)

    dataset = load_dataset("json", data_files=str(folder / "preferences.jsonl"))["train"]
    trainer = TFPOTrainer(
        model=str(folder / "doctor"),
        patient_model=str(folder / "patient"),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if method == "lora" else None,
        faces=FACES,
        objective=objective,
    )
    trainer.train(resume_from_checkpoint=str(output / method / "checkpoint-2") if resumed else None)
    evaluated = trainer.evaluate()
    trainer.save_model(str(output / job))
    if trainer.is_world_process_zero():
        report = {
            "history": trainer.state.log_history,
            "evaluated": {name: evaluated[name] for name in ("eval_loss", "eval_loss/subtb")},
            "seen": seen,
            "engine": trainer.accelerator.distributed_type.value,
            "is_sharded": is_sharded(trainer.model),
            "guided_is_sharded": trainer.base_policy is not None and is_sharded(trainer.base_policy),
        }
        (output / f"{job}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled; gloo does
    for job in sys.argv[3:]:
        run(Path(sys.argv[1]), Path(sys.argv[2]), job)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # one that leaves while the other writes may abort as well
        torch.distributed.destroy_process_group()
    # Threads of groups that an engine still holds ask for the interpreter when they let go of their last tensors; one that is
    # about to end aborts the process then, with everything trained and saved. It is left without that ending.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
