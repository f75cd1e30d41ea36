# SPDX-License-Identifier: Apache-2.0

"""
Files of a saved doctor: weights of a causal language model, value head, exponents, credits, strengths and model card.

The value head of a full model has a separate file: otherwise transformers would report unexpected weights when it
loads the folder as a causal language model. The value head of an adapter is among the weights of the adapter.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy

from ..annotation.token_rewards import check_patient
from ..common._upstream import _BaseTrainer
from ..common.arguments import check_counts
from ..common.language_model import inference, is_peft_model, is_sharded
from ..data.tokenizer_identity import tokenizer_fingerprint
from ..evaluation.strengths import different_prompts, measure_strengths
from ..faces import Prompt
from ..models.adapters import VALUE_HEAD
from ..models.named_model import NamedModel, resolve_model
from ..models.saved_doctor import VALUE_HEAD_FILE, fold_map, load_value_head, save_value_head
from ..models.strengths import STRENGTHS_FILE, StrengthTable, delete_strengths
from ..models.token_credits import CREDITS_FILE, save_credits
from ..models.trained_exponents import EXPONENTS_FILE, center_head, save_exponents
from .calibration import Calibration
from .cards import CUSTOM_GENERATE_FOLDER, complete_model_card, save_custom_generate
from .config import TFPOConfig, output_folder


class DoctorFiles(_BaseTrainer):
    """Methods of [`TFPOTrainer`] that measure and save doctors, and load checkpoints."""

    args: TFPOConfig
    model: PreTrainedModel
    patient_model: PreTrainedModel | NamedModel | None
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None
    calibration: Calibration | None
    rewards_summary: str | None
    _measured: tuple[int, StrengthTable] | None = None  # step and result of `measure_strengths`

    def measure_strengths(
        self,
        patient_model: str | PreTrainedModel | None = None,
        prompts: Sequence[Prompt | list[int]] | None = None,
        *,
        num_prompts: int = 32,
        **settings: Any,
    ) -> StrengthTable:
        """
        Measure the KL from the patient at several exponents of the doctor. `save_model` saves the table with the
        doctor, until training continues. Call this method in all processes.

        Args:
            patient_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                The patient, or its name or path. Defaults to the patient of the trainer, if it was given by name or
                with `policy="guided"`.
            prompts (sequence of `str`, `list[dict]` or `list[int]`, *optional*):
                Validation prompts. Defaults to those of the evaluation dataset.
            num_prompts (`int`, *optional*, defaults to `32`):
                Number of different prompts, taken from the start of the evaluation dataset.
            settings:
                Further arguments of [`~trl_tfpo.evaluation.measure_strengths`], such as `max_new_tokens`.
                `batch_size` defaults to `per_device_eval_batch_size`.

        Returns:
            [`~trl_tfpo.models.strengths.StrengthTable`]: the KLs.

        Raises:
            `ValueError`: if there is no patient or no prompt, if patient or doctor is sharded, or on an error of
                [`~trl_tfpo.evaluation.measure_strengths`].
        """
        check_counts(num_prompts=num_prompts)
        given = self.patient_model if patient_model is None else patient_model
        if given is None:
            raise ValueError(
                "The strengths of a doctor depend on the patient. Got `patient_model=None`, and a trainer without a "
                "patient or with a released one; pass the patient or its name."
            )
        prompts = self._validation_prompts(num_prompts) if prompts is None else prompts
        trust = self.args.trust_remote_code
        resolved = resolve_model(given, "patient_model", dtype="auto", trust_remote_code=trust)
        patient = resolved.loaded if isinstance(resolved, NamedModel) else resolved
        check_patient(patient, self.processing_class)  # also refuses a sharded patient
        doctor = self.accelerator.unwrap_model(self.model)
        if is_sharded(doctor):
            raise ValueError(
                "Strengths are measured by generation, which needs whole models. Got a doctor in shards (ZeRO-3 or "
                "FSDP2); save it, and run `trl-tfpo strengths` in one process."
            )
        if not getattr(patient, "is_quantized", False) and not hasattr(patient, "hf_device_map"):
            torch.nn.Module.to(patient, self.args.device)
        settings = {"batch_size": self.args.per_device_eval_batch_size} | settings
        with inference(patient), inference(doctor):
            table = measure_strengths(patient, doctor, self.processing_class, prompts, **settings)
        if isinstance(resolved, NamedModel):
            resolved.unload()
        self._measured = (self.state.global_step, table)
        return table

    @property
    def strengths(self) -> StrengthTable | None:
        """The table of [`measure_strengths`], unless the doctor has been trained since then."""
        step, table = self._measured or (None, None)
        return table if step == self.state.global_step else None

    def _validation_prompts(self, num_prompts: int) -> list[list[int]]:
        """Token ids of different prompts from the start of the evaluation dataset, or of the first of several."""
        dataset = self.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        if dataset is None:
            raise ValueError(
                "Strengths are measured on validation prompts. Got no `eval_dataset`; pass one to the trainer, or "
                "`prompts` that are not used for the final evaluation."
            )
        return different_prompts(dataset, num_prompts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the doctor with its value head, exponents, credits, strengths and model card."""
        center_head(self.accelerator.unwrap_model(self.model))  # in all processes, which hold the same weights
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir) if output_dir else output_folder(self.args)
        model = self.accelerator.unwrap_model(self.model)
        head = {}
        if not is_peft_model(model):
            state_dict = dict(model.state_dict() if state_dict is None else state_dict)
            head = {name: state_dict.pop(name) for name in list(state_dict) if VALUE_HEAD in name.split(".")}
            head |= fold_map(model, state_dict)
        if state_dict is not None and is_sharded(model):
            center_head(model, state_dict)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if head:
            save_value_head({name.rsplit(".", 1)[-1]: tensor for name, tensor in head.items()}, folder)
        save_exponents(model, folder)
        credits = None if self.calibration is None else self.calibration.credits / self.args.reward_temperature
        save_credits(credits, folder)
        save_custom_generate(folder)
        self.create_model_card()
        card = output_folder(self.args) / "README.md"
        if card.is_file() and folder.resolve() != card.parent.resolve():  # replaces the empty card of PEFT
            shutil.copyfile(card, folder / card.name)
        if self.strengths is None:
            delete_strengths(folder)
        else:
            self.strengths.save(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` copies its own files from the checkpoint to the folder that it pushes
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            target = output_folder(self.args)
            for name in (VALUE_HEAD_FILE, EXPONENTS_FILE, CREDITS_FILE, STRENGTHS_FILE):
                if (Path(checkpoint_folder) / name).is_file():
                    shutil.copyfile(Path(checkpoint_folder) / name, target / name)
                else:
                    (target / name).unlink(missing_ok=True)
            shutil.copytree(
                Path(checkpoint_folder) / CUSTOM_GENERATE_FOLDER, target / CUSTOM_GENERATE_FOLDER, dirs_exist_ok=True
            )
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(  # type: ignore[override]  # TRL takes other arguments than transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card of TRL, with a quick start that guides a patient."""
        model_name = model_name or (self.args.hub_model_id or output_folder(self.args).name).split("/")[-1]
        is_file = dataset_name is not None and Path(dataset_name).exists()  # a local file has no link
        super().create_model_card(model_name=model_name, dataset_name=None if is_file else dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_model_card(
                self.args,
                doctor=self.hub_model_id or model_name,
                dataset=self.train_dataset,
                dataset_name=Path(dataset_name).name if dataset_name and is_file else dataset_name,
                is_adapter=is_peft_model(self.model),
                rewards_summary=self.rewards_summary,
                tokenizer=tokenizer_fingerprint(self.processing_class),
                strengths=self.strengths,
            )

    # `Trainer` does not load the value head of a full model. DeepSpeed and FSDP do.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            target = model if isinstance(model, PreTrainedModel) else self.model
            load_value_head(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_value_head(self.model, best)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if VALUE_HEAD not in key.split(".")]
        super()._issue_warnings_after_load(load_result)
