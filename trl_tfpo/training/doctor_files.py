# SPDX-License-Identifier: Apache-2.0

"""
A doctor's folder: weights that load as any language model's, the value head beside them, exponents and a card.

The value head of a full model has a file of its own, so that loading the folder as a plain causal language model reports
nothing unexpected. That of an adapter is saved with the adapter, whose config names it.
"""

import shutil
from pathlib import Path
from typing import Any

from ..common._upstream import _BaseTrainer, is_peft_model, is_sharded
from ..models.adapters import VALUE_HEAD, center_head
from ..models.doctor import fold_map, load_value_head, save_value_head
from ..models.guidance import save_guidance
from ..models.token_credits import save_credits
from .cards import complete_model_card, save_custom_generate


class DoctorFiles(_BaseTrainer):
    """The part of [`TFPOTrainer`] that writes folders and reads checkpoints."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the doctor, with its value head, its exponents and its card."""
        center_head(self.accelerator.unwrap_model(self.model))  # in each process, which hold the same weights
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder, model = Path(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
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
            save_value_head({name.rsplit(".", 1)[-1]: tensor for name, tensor in head.items()}, folder)  # and the map
        save_guidance(model, folder)
        credits = None if self.calibration is None else self.calibration.credits / self.args.reward_temperature
        save_credits(credits, folder)
        save_custom_generate(folder)
        self.create_model_card()
        card = Path(self.args.output_dir) / "README.md"
        if card.is_file() and folder.resolve() != card.parent.resolve():  # PEFT has left its empty one there
            shutil.copyfile(card, folder / card.name)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's model card, and how the model is used: as a doctor, next to a patient."""
        model_name = model_name or (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
        is_file = dataset_name is not None and Path(dataset_name).exists()  # to which there is no link
        super().create_model_card(model_name=model_name, dataset_name=None if is_file else dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_model_card(
                self.args,
                doctor=self.hub_model_id or model_name,
                dataset=self.train_dataset,
                dataset_name=Path(dataset_name).name if is_file else dataset_name,
                is_adapter=is_peft_model(self.model),
                rewards_summary=self.rewards_summary,
            )

    # Value heads of full models, which are not in the files that Trainer reads. Engines that shard keep their own.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_value_head(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_value_head(self.model, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if VALUE_HEAD not in key.split(".")]
        super()._issue_warnings_after_load(load_result)
