# SPDX-License-Identifier: Apache-2.0

"""Settings of [`TFPOTrainer`]."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from ..common._upstream import _BaseConfig
from ..common.arguments import check_counts, check_types, explains_unknown
from ..functional import check_flow_settings, check_reward_settings
from .base_policy import POLICIES


T = TypeVar("T")


def help_from_docstring(config_class: type[T]) -> type[T]:
    """Class decorator: take the command-line help of the fields of a dataclass from its docstring."""
    entries = re.findall(r"^ +(\w+) \(`.*\):\n((?: {12}.*\n)+)", config_class.__doc__ or "", flags=re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    for each in fields(config_class):  # type: ignore[arg-type]  # a dataclass
        if each.name in texts:
            each.metadata = MappingProxyType({"help": texts[each.name]})
    return config_class


@explains_unknown()
@help_from_docstring
@dataclass
class TFPOConfig(_BaseConfig):
    r"""
    Settings of [`TFPOTrainer`], in addition to those of [`~transformers.TrainingArguments`].

    The published method is `TFPOConfig(reward_direction="label", importance_temperature=1.0, gap_floor=1e-6,
    policy="doctor", reference_weight=0.0, subtb_lambda=1.0)`, decoded with `alpha=1.0`.

    Parameters:
        > Parameters that control the models

        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` for a doctor given by name.
        patient_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` for a patient given by name. `dtype` defaults to that of the
            checkpoint, or to float32 on a CPU without bfloat16 instructions.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models given by name may run their own code.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the doctor.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of prompt and completion together. Longer completions are truncated at the end;
            `None` disables truncation.
        drop_unusable (`bool`, *optional*, defaults to `False`):
            Whether to drop unusable pairs instead of raising an error. A pair is unusable if its prompt or a
            completion is empty, if its prompt has `max_length` or more tokens, or if the chat template cannot render
            it.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether to convert transcripts with turns of `\n\nHuman:` and `\n\nAssistant:` (HH-RLHF) to messages.
        pad_to_multiple_of (`int`, *optional*):
            Pad batches to a multiple of this many tokens.
        scoring_batch_size (`int`, *optional*, defaults to `16`):
            Sequences in one forward pass of the patient, and of the reference, before training.

        > Parameters that control the token rewards

        reward_direction (`str`, *optional*, defaults to `"agreement"`):
            Sign of a token reward. `"label"` (the paper): the sign of the label. `"faces"`: the sign of the gap
            between the faces. `"agreement"`: the sign of the gap; the reward is multiplied by `disagreement_weight` if
            the label has the opposite sign.
        disagreement_weight (`float`, *optional*, defaults to `0.5`):
            Factor, in [0, 1], of a reward that contradicts the label. Only with `reward_direction="agreement"`.
        importance_temperature (`float`, *optional*, defaults to `3.0`):
            Temperature of token importance, greater than 0; tau in the paper. At smaller values, tokens with a small
            gap become as important as tokens with a large one.
        gap_floor (`float`, *optional*, defaults to `0.05`):
            Added to the mean absolute gap of a completion, in nats, greater than 0; epsilon in the paper. Without it,
            gaps that are only noise would count as important in a completion whose gaps are all tiny.
        sparsity_threshold (`float`, *optional*, defaults to `0.3`):
            Largest importance that gets reward 0, in [0, 1); theta in the paper.
        calibrate_rewards (`bool`, *optional*):
            Whether to fit the token rewards to the labels, see `trl_tfpo.training.calibration`. The other settings of
            token rewards then have no effect, and the doctor starts at the token credits. Exceptions: in guided flow,
            an adapter and a head with a bias, scale or cap start at zero; with `policy="doctor"`, only a new LoRA
            starts at the credits. By default, rewards are calibrated if they then explain held-out labels better. This
            default needs guided flow without an adapter or sharding, at least 128 pairs that are not streamed, an
            evaluation dataset with gaps if there is one, and an annotation before training that records the default
            `reward_direction` and `reward_fn`.

        > Parameters that control the objective

        policy (`str`, *optional*, defaults to `"ratio"`):
            Policy whose flow is balanced. `"ratio"`: the doctor before training times the doctor. `"guided"`: the
            patient times the doctor. In both (*guided flow*), the first factor is frozen, stays in memory, and is the
            reference. `"doctor"` (the paper): the doctor alone, which stays a language model and can draft for the
            patient.
        reward_temperature (`float`, *optional*, defaults to `0.25`):
            A token reward of 1 is worth `1 / reward_temperature` nats.
        reference_weight (`float`, *optional*, defaults to `1.0`):
            Exponent of the reference in the target; 0 in the paper. Values slightly below 1, such as 0.95, favour
            tokens that are unlikely under the reference, and make texts more diverse. With `policy="doctor"` the
            reference is the doctor before training.
        subtb_lambda (`float`, *optional*, defaults to `0.95`):
            Decay in [0, 1]: sub-trajectories of n tokens have weight `subtb_lambda ** (n - 1)`. At 0.95, lengths up to
            about 20 tokens count; at 1, all lengths count equally.
        value_loss_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the value discrimination loss, at least 0; lambda in the paper.
        value_margin (`float`, *optional*, defaults to `0.1`):
            Margin of the value discrimination loss in nats, at least 0; gamma in the paper.
        value_head_learning_rate (`float`, *optional*):
            Initial learning rate of the value head, at least 0. Defaults to ten times `learning_rate`, because the
            head starts at zero and its values span many nats.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on an accelerator if `fp16` is not set, instead of `False`.

    Raises:
        `ValueError`: if a parameter has the wrong type or is out of range.
        `TypeError`: if a parameter does not exist. For parameters of other TRL trainers, it names the replacement.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "patient_model_init_kwargs"]

    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # TRL says bool, with None as default
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    model_init_kwargs: dict[str, Any] | str | None = None
    patient_model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    disable_dropout: bool = True
    max_length: int | None = 1024
    drop_unusable: bool = False
    convert_transcripts: bool = False
    pad_to_multiple_of: int | None = None
    scoring_batch_size: int = 16
    reward_direction: str = "agreement"
    disagreement_weight: float = 0.5
    importance_temperature: float = 3.0
    gap_floor: float = 0.05
    sparsity_threshold: float = 0.3
    calibrate_rewards: bool | None = None
    policy: str = "ratio"
    reward_temperature: float = 0.25
    reference_weight: float = 1.0
    subtb_lambda: float = 0.95
    value_loss_weight: float = 0.1
    value_margin: float = 0.1
    value_head_learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_reward_settings(
            self.reward_direction,
            self.disagreement_weight,
            self.importance_temperature,
            self.gap_floor,
            self.sparsity_threshold,
        )
        if self.policy not in POLICIES:
            raise ValueError(f"`policy` must be 'doctor', 'ratio' or 'guided'. Got {self.policy!r}; try 'ratio'.")
        check_flow_settings(self.reward_temperature, self.reference_weight)
        if not 0 <= self.subtb_lambda <= 1:
            raise ValueError(
                f"`subtb_lambda` must be in [0, 1]. Got {self.subtb_lambda}; at 1 all sub-trajectories count equally."
            )
        for name in ("value_loss_weight", "value_margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0. Got {getattr(self, name)}; try 0.1.")
        if self.value_head_learning_rate is not None and not self.value_head_learning_rate >= 0:
            raise ValueError(
                f"`value_head_learning_rate` must be at least 0. Got {self.value_head_learning_rate}; leave it out "
                "for ten times `learning_rate`."
            )
        if not self.learning_rate >= 0:
            raise ValueError(f"`learning_rate` must be at least 0. Got {self.learning_rate}; try 1e-4.")
        check_counts(
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            scoring_batch_size=self.scoring_batch_size,
            per_device_train_batch_size=self.per_device_train_batch_size,
        )
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True  # TRL sets the deprecated alias, which warns for every config
        if self.bf16 is None:  # TRL's default of True raises an error without an accelerator
            self.bf16 = not self.fp16 and torch.accelerator.is_available()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            # Without a backend, processes on CPUs would train independently
            self.ddp_backend = self.ddp_backend or "gloo"
            self.use_cpu = "ACCELERATE_USE_DEEPSPEED" not in os.environ  # DeepSpeed detects the CPU itself
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # without an accelerator, torch ignores it with a warning


def output_folder(args: TrainingArguments) -> Path:
    """Output folder, with the default of `TrainingArguments`."""
    return Path(args.output_dir or "trainer_output")


def resolve_args(args: TFPOConfig | None, model: object) -> TFPOConfig:
    """The settings, by default with an output folder named after the model. Other objects raise `ValueError`."""
    if args is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", model)
        return TFPOConfig(f"{str(name).split('/')[-1]}-TFPO")
    if not isinstance(args, TFPOConfig):
        raise ValueError(
            f"`args` must be a `TFPOConfig`. Got a `{type(args).__name__}`; pass the settings to `TFPOConfig`."
        )
    return args
