# SPDX-License-Identifier: Apache-2.0

"""What the patient says under the guidance of the doctor in training, while it is trained."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel, TrainerCallback
from transformers.integrations import is_trackio_available, is_wandb_available

from ..annotation.token_rewards import check_patient
from ..common._upstream import inference, is_sharded
from ..common.printable import printable
from ..data.tokenization import all_eos_token_ids
from ..decoding.exponents import Weight
from ..decoding.generation import guided_generate
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..evaluation.completions import pad
from ..models.guidance import GUIDANCE, is_guidance
from ..models.named_model import NamedModel, resolve_model
from .trainer import TFPOTrainer


class LogGuidedCompletionsCallback(TrainerCallback):
    """
    Shows what the patient says under the guidance of the doctor, every few steps of its training.

    [`~trl.LogCompletionsCallback`] would let the doctor speak alone, which a doctor of guided flow cannot. The completions
    are a table in the console and, as `completions`, in Weights & Biases and Trackio where the trainer reports to them. It
    has a column for the patient alone. Training is the same with and without: random numbers and modes are left as they
    were.

    Args:
        trainer ([`TFPOTrainer`]):
            The trainer. Prompts are those of its evaluation dataset, or of the training dataset if it has none.
        patient_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The patient, or its name or path; kept loaded in each process. Not needed where the trainer has one: one given by
            name, or that of `policy="guided"`.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            How to generate. By default up to 128 tokens are sampled from the guided policy itself, with the same random
            numbers each time.
        num_prompts (`int`, *optional*, defaults to `8`):
            How many prompts, from the first on.
        freq (`int`, *optional*):
            Steps between two tables. Defaults to the `eval_steps` of the trainer.
        alpha, beta (`float`, *optional*):
            Exponents of the patient and of the doctor, see [`DoctorGuidedLogitsProcessor`]. By default those that the doctor
            is trained for: 1 and 1, or with `policy="doctor"` 0.5 and 0.5.

    Attributes:
        table (`list[dict]`): rows with `step`, `prompt`, `patient` and `completion` of all tables so far, in the main process.

    Raises:
        `ValueError`: when there is no patient, or no frequency; when the patient has another tokenizer; and in training when
            the engine has sharded the doctor (ZeRO-3, FSDP2).

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
        alpha: Weight | None = None,
        beta: Weight | None = None,
    ):
        self.trainer, self.freq = trainer, freq
        if freq is not None and freq < 1 or freq is None and not trainer.args.eval_steps:
            raise ValueError(
                f"`freq` must be a number of steps, at least 1. Got {freq!r}, and the trainer has no `eval_steps`; pass "
                "`freq`."
            )
        patient_model = trainer.patient_model if patient_model is None else patient_model
        if patient_model is None:
            raise ValueError(
                "The callback needs the patient that the doctor guides. Got `patient_model=None`, and the trainer has let go "
                "of its own; pass it, or its name."
            )
        settings = {"dtype": "auto", "trust_remote_code": trainer.args.trust_remote_code}
        self.patient = resolve_model(patient_model, "patient_model", **settings)
        check_patient(self.patient, trainer.processing_class)
        dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        self.prompts = [row["prompt_ids"] for row in dataset.take(num_prompts)]
        self.generation_config, self.weights = generation_config, {"alpha": alpha, "beta": beta}
        self.of_patient: list[str] | None = None
        self.table: list[dict] = []
        self.last_step = -1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (self.freq or state.eval_steps) or state.global_step == self.last_step:
            return
        self.last_step = state.global_step
        if isinstance(self.patient, NamedModel):
            self.patient = self.patient.loaded
        if not getattr(self.patient, "is_quantized", False) and not hasattr(self.patient, "hf_device_map"):
            self.patient.to(args.device)
        doctor = self.trainer.model
        if is_sharded(doctor) or is_sharded(self.patient):
            raise ValueError(
                "`LogGuidedCompletionsCallback` needs doctor and patient whole in each process. Got a model that is sharded "
                "(ZeRO-3 or FSDP2); train with DDP or ZeRO-2, or leave the callback out."
            )
        with inference(self.patient), inference(doctor):
            weights = {name: weight for name, weight in self.weights.items() if weight is not None}
            if "beta" not in weights and is_guidance(doctor):
                weights["beta"] = GUIDANCE["beta"]
            guide = DoctorGuidedLogitsProcessor(doctor, **weights)
            if self.of_patient is None:
                self.of_patient = self._generate(None)
            completions = self._generate(guide)
        if not state.is_world_process_zero:
            return
        tokenizer = self.trainer.processing_class
        rows = [
            {"step": state.global_step, "prompt": tokenizer.decode(prompt), "patient": alone, "completion": guided}
            for prompt, alone, guided in zip(self.prompts, self.of_patient, completions, strict=True)
        ]
        self.table += rows
        self._show(rows)
        self._report(args.report_to)

    def _generate(self, guide: DoctorGuidedLogitsProcessor | None) -> list[str]:
        """A completion of each prompt, in all processes; each process generates its share."""
        tokenizer, args = self.trainer.processing_class, self.trainer.args
        eos_ids = all_eos_token_ids(tokenizer, self.patient)
        pad_token_id = next(x for x in (tokenizer.pad_token_id, *eos_ids, 0) if x is not None)
        settings = {"pad_token_id": pad_token_id, "eos_token_id": eos_ids or None}
        if self.generation_config is None:
            settings |= dict(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=128
            )
        else:
            settings["generation_config"] = self.generation_config
        generate = self.patient.generate if guide is None else partial(guided_generate, self.patient, guide)
        device, texts = self.patient.device, []
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
        table = Table("prompt", "patient", "guided", title=f"Completions at step {rows[0]['step']}", show_lines=True)
        for row in rows:
            table.add_row(*(escape(printable(row[name])) for name in ("prompt", "patient", "completion")))
        Console().print(table)

    def _report(self, report_to: Sequence[str]) -> None:
        trackers = []
        if "wandb" in report_to and is_wandb_available():
            import wandb

            trackers += [wandb] if wandb.run is not None else []
        if "trackio" in report_to and is_trackio_available():
            import trackio

            trackers.append(trackio)
        for tracker in trackers:
            tracker.log({"completions": tracker.Table(dataframe=pd.DataFrame(self.table))})
