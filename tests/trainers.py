# SPDX-License-Identifier: Apache-2.0

"""Trainings of a few steps on a dataset with token rewards."""

from pathlib import Path

from conftest import make_llama, make_tokenizer
from datasets import Dataset
from transformers import PreTrainedModel

from trl_tfpo import TFPOConfig, TFPOTrainer


def config(output_dir: Path, **settings) -> TFPOConfig:
    defaults = dict(
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
    )
    return TFPOConfig(str(output_dir), **(defaults | settings))


def losses(trainer: TFPOTrainer) -> list[float]:
    """The logged losses, one for each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_trainer(
    dataset: Dataset,
    output_dir: Path,
    model: PreTrainedModel | None = None,
    eval_dataset: Dataset | None = None,
    **settings,
) -> TFPOTrainer:
    """A trainer of a doctor, on a dataset with token rewards."""
    return TFPOTrainer(
        model=make_llama(2) if model is None else model,
        args=config(output_dir, **settings),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
    )
