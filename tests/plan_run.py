# SPDX-License-Identifier: Apache-2.0

"""
What each process of `test_plan.py` runs: a short training, and a report of the bytes that the process then holds and
of the plan that it makes.
"""

import json
import os
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from conftest import FACES
from datasets import load_dataset
from processes import join_engine, leave_engine
from torch.distributed.tensor import DTensor

from trl_tfpo import TFPOConfig, TFPOTrainer
from trl_tfpo.training.plan import training_plan


def local_bytes(tensor) -> int:
    """Bytes of the part of a tensor that this process holds."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
    return tensor.nbytes


def run(folder: Path) -> None:
    """Two steps, then bytes of weights and of the optimizer, next to those of the plan."""
    args = TFPOConfig(
        str(folder / "run"),
        policy="doctor",
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # `TrainingArguments` refuses bfloat16 on CPUs
        args.bf16 = True
    if "ACCELERATE_USE_FSDP" in os.environ:  # Accelerate shards on GPUs only; this type makes it shard over gloo
        PartialState().distributed_type = DistributedType.MULTI_GPU
    names = {"doctor": str(folder / "doctor"), "patient": str(folder / "patient")}
    dataset = load_dataset("json", data_files=str(folder / "preferences.jsonl"))["train"]
    trainer = TFPOTrainer(names["doctor"], names["patient"], args=args, train_dataset=dataset, faces=FACES)
    trainer.train()
    optimizer, copies = trainer.optimizer, []
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        copies = getattr(optimizer, "fp32_partitioned_groups_flat", copies)  # of ZeRO-3
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # it steps on float32 copies of its share of the weights
        states += copies or [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plan = training_plan(dataset, trainer.processing_class, **names, args=args, faces=FACES, num_processes=2)
    if trainer.is_world_process_zero():
        report = {
            "parameters": plan.doctor_parameters,
            "weights": sum(map(local_bytes, trainer.model.parameters())),
            "optimizer": sum(map(local_bytes, states)),
            "plan": {row.phase: [row.weights, row.optimizer] for row in plan.memory},
        }
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def run_as_rank(folder: Path) -> None:
    """The same in one process of several, which was forked, in the environment that a launcher sets."""
    join_engine(folder / "cache")
    run(folder)
    leave_engine()
