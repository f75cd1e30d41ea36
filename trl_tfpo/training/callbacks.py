# SPDX-License-Identifier: Apache-2.0

"""Callback that logs guided completions in training."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, cast

import pandas as pd
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..annotation.token_rewards import check_patient
from ..common.language_model import inference, is_sharded
from ..common.printable import cell, printable
from ..data.tokenization import all_eos_token_ids
from ..decoding.exponents import Exponent, default_beta
from ..decoding.generation import guided_generate
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..evaluation.completions import pad
from ..models.named_model import NamedModel, resolve_model
from ..models.trained_exponents import trained_exponents
from .trainer import TFPOTrainer


class LogGuidedCompletionsCallback(TrainerCallback):
    """
    Log completions of the patient, guided by the doctor in training, at regular steps.

    [`~trl.LogCompletionsCallback`] would generate with the doctor alone, but a doctor of guided flow is not a language
    model. The completions of the unguided and of the guided patient are printed as a table. If the trainer reports to
    Weights & Biases or Trackio, the table so far is also logged there as `completions`; in TensorBoard, `completions`
    is a text with the table of each step. Training does not change: random states and train or eval modes are
    restored.

    Args:
        trainer ([`TFPOTrainer`]):
            The trainer. Prompts come from its evaluation dataset, or without one from its training dataset.
        patient_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The patient, or its name or path. It stays loaded in each process. Defaults to the patient of the trainer,
            if it was given by name or with `policy="guided"`.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            Generation settings. By default up to 128 tokens are sampled at temperature 1, without top-k or top-p, with
            the same seed each time.
        num_prompts (`int`, *optional*, defaults to `8`):
            Number of prompts, taken from the start of the dataset.
        freq (`int`, *optional*):
            Steps between two tables. Defaults to the `eval_steps` of the trainer.
        alpha, beta (`float`, *optional*):
            Exponents of the patient and of the doctor, see [`DoctorGuidedLogitsProcessor`]. The defaults are 1 and 1,
            or 0.5 and 0.5 with `policy="doctor"`.

    Attributes:
        table (`list[dict]`):
            Rows with `step`, `prompt`, `patient` and `completion` of all tables so far, in the main process.

    Raises:
        `ValueError`: if there is no patient or no frequency, or if the patient has another tokenizer; in training, if
            doctor or patient is sharded (ZeRO-3, FSDP2).

    Examples:

    ```python
    >>> from trl_tfpo import LogGuidedCompletionsCallback, TFPOConfig, TFPOTrainer
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> trainer = TFPOTrainer(
    ...     model=world.doctor,
    ...     patient_model=world.patient,
    ...     args=TFPOConfig("runs/docs", max_steps=2, report_to="none", disable_tqdm=True),
    ...     train_dataset=world.preference_dataset("praise", num_pairs=8, seed=0),
    ...     processing_class=world.tokenizer,
    ...     faces=world.attributes["praise"].faces,
    ... )
    >>> callback = LogGuidedCompletionsCallback(trainer, world.patient, num_prompts=2, freq=1)
    >>> trainer.add_callback(callback)
    >>> result = trainer.train()  # doctest: +ELLIPSIS
    Completions at step 1
    ...
    >>> [row["step"] for row in callback.table]
    [1, 1, 2, 2]

    ```
    """

    def __init__(
        self,
        trainer: TFPOTrainer,
        patient_model: str | PreTrainedModel | None = None,
        generation_config: GenerationConfig | None = None,
        num_prompts: int = 8,
        freq: int | None = None,
        alpha: Exponent | None = None,
        beta: Exponent | None = None,
    ) -> None:
        self.trainer, self.freq = trainer, freq
        if freq is not None and freq < 1 or freq is None and not trainer.args.eval_steps:
            raise ValueError(
                f"`freq` must be a number of steps, at least 1. Got {freq!r}; pass `freq`, or set `eval_steps` in the "
                "`TFPOConfig`."
            )
        patient = trainer.patient_model if patient_model is None else patient_model
        if patient is None:
            raise ValueError(
                "The callback needs the patient. Got `patient_model=None`, and a trainer without a patient or with a "
                "released one; pass the patient or its name."
            )
        self.patient = resolve_model(
            patient, "patient_model", dtype="auto", trust_remote_code=trainer.args.trust_remote_code
        )
        check_patient(self.patient, trainer.processing_class)
        dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        self.prompts: list[list[int]] = [row["prompt_ids"] for row in dataset.take(num_prompts)]
        self.generation_config, self.alpha, self.beta = generation_config, alpha, beta
        self.unguided: list[str] | None = None
        self.table: list[dict] = []
        self.last_step = -1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % (self.freq or state.eval_steps) or state.global_step == self.last_step:
            return
        self.last_step = state.global_step
        self.patient = patient = self.patient.loaded if isinstance(self.patient, NamedModel) else self.patient
        if not getattr(patient, "is_quantized", False) and not hasattr(patient, "hf_device_map"):
            torch.nn.Module.to(patient, args.device)
        doctor = self.trainer.model
        if is_sharded(doctor) or is_sharded(patient):
            raise ValueError(
                "`LogGuidedCompletionsCallback` does not support sharded models. Got a doctor or patient in shards "
                "(ZeRO-3 or FSDP2); train with DDP or ZeRO-2, or leave the callback out."
            )
        with inference(patient), inference(doctor):
            beta = default_beta(trained_exponents(doctor)) if self.beta is None else self.beta
            guide = DoctorGuidedLogitsProcessor(doctor, alpha=self.alpha, beta=beta)
            if self.unguided is None:
                self.unguided = self._generate(patient, None)
            completions = self._generate(patient, guide)
        if not state.is_world_process_zero:
            return
        tokenizer = self.trainer.processing_class
        rows = [
            {"step": state.global_step, "prompt": tokenizer.decode(prompt), "patient": alone, "completion": guided}
            for prompt, alone, guided in zip(self.prompts, self.unguided, completions, strict=True)
        ]
        self.table += rows
        self._show(rows)
        self._report(rows, state.global_step)

    def _generate(self, patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor | None) -> list[str]:
        """Complete all prompts. Processes divide the prompts, and each returns all completions."""
        tokenizer, args = self.trainer.processing_class, self.trainer.args
        eos_ids = all_eos_token_ids(tokenizer, patient)
        pad_token_id = next(x for x in (tokenizer.pad_token_id, *eos_ids, 0) if x is not None)
        settings: dict[str, Any] = {"pad_token_id": pad_token_id, "eos_token_id": eos_ids or None}
        if self.generation_config is None:
            settings |= dict(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=128
            )
        else:
            settings["generation_config"] = self.generation_config
        if guide is None:
            generate = cast(Callable[..., torch.Tensor], patient.generate)
        else:
            generate = cast(Callable[..., torch.Tensor], partial(guided_generate, patient, guide))
        device: torch.device = patient.device
        texts: list[str] = []
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self.trainer.accelerator.split_between_processes(self.prompts) as prompts,
        ):
            torch.manual_seed(args.seed)
            for start in range(0, len(prompts), args.per_device_eval_batch_size):
                batch = prompts[start : start + args.per_device_eval_batch_size]
                ids, mask = pad(batch, padding_side="left", device=device)
                output = generate(input_ids=ids.masked_fill(mask == 0, pad_token_id), attention_mask=mask, **settings)
                texts += tokenizer.batch_decode(output[:, ids.size(1) :], skip_special_tokens=True)
        return gather_object(texts)

    def _show(self, rows: Sequence[dict]) -> None:
        """Print a table in the console."""
        table = Table("prompt", "patient", "guided", title=f"Completions at step {rows[0]['step']}", show_lines=True)
        for row in rows:
            table.add_row(*(escape(printable(row[name])) for name in ("prompt", "patient", "completion")))
        Console().print(table)

    def _report(self, rows: Sequence[dict], step: int) -> None:
        """Log the table so far to Weights & Biases and Trackio, and the rows of this step to TensorBoard."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("completions", _markdown(rows), step)
            elif isinstance(callback, (WandbCallback, TrackioCallback)):
                tracker = import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
                table = tracker.Table(dataframe=pd.DataFrame(self.table))
                # Without the step, the table would be at the step of the last metrics
                tracker.log({"completions": table, "train/global_step": step})


def _markdown(rows: Sequence[dict]) -> str:
    """Markdown table of completions."""
    lines = [["prompt", "patient", "guided"], ["---"] * 3]
    lines += [[cell(row[name]) for name in ("prompt", "patient", "completion")] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
