# SPDX-License-Identifier: Apache-2.0

"""Settings of [`TFPOTrainer`]."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..common._upstream import _BaseConfig
from ..common.arguments import check_types, explains_unknown
from ..functional import check_flow_settings, check_reward_settings


@explains_unknown
@dataclass
class TFPOConfig(_BaseConfig):
    r"""
    Settings of the [`TFPOTrainer`], on top of those of [`~transformers.TrainingArguments`].

    The published method is `TFPOConfig(reward_direction="label", importance_temperature=1.0, gap_floor=1e-6, policy="doctor",
    reference_weight=0.0, subtb_lambda=1.0)`, decoded with `alpha=1.0`.

    Parameters:
        > Parameters that control the models

        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` when the doctor is given by name.
        patient_model_init_kwargs (`dict` or `str`, *optional*):
            The same for the patient. Its `dtype` is `"auto"` unless given: that of the checkpoint, or float32 on a CPU
            without bfloat16 instructions.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models given by name may run code of their own.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether the doctor is trained without dropout.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `1024`):
            Longest sequence of prompt and completion, in tokens; completions are cut at the end. `None`: no limit.
        drop_unusable (`bool`, *optional*, defaults to `False`):
            Whether to leave out unusable pairs rather than to raise: those with an empty prompt or completion, with a
            prompt of `max_length` or more tokens, or that the chat template cannot render.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether texts with turns of `"\n\nHuman:"` and `"\n\nAssistant:"` (HH-RLHF) are read as messages.
        pad_to_multiple_of (`int`, *optional*):
            Pad batches to a multiple of this many tokens.
        scoring_batch_size (`int`, *optional*, defaults to `16`):
            Sequences in one forward of the patient, and of the reference, before training.

        > Parameters that control the token rewards

        reward_direction (`str`, *optional*, defaults to `"agreement"`):
            Sign of a token reward: that of the label (`"label"`, the paper) or of the faces (`"faces"`, `"agreement"`). By
            `"agreement"` a reward counts in full only where the label has the same sign.
        disagreement_weight (`float`, *optional*, defaults to `0.5`):
            What is left, in `[0, 1]`, of a reward that the label contradicts, by `"agreement"`.
        importance_temperature (`float`, *optional*, defaults to `3.0`):
            $\tau > 0$. Smaller makes tokens that the faces see a little differently as important as those that they see very
            differently.
        gap_floor (`float`, *optional*, defaults to `0.05`):
            $\epsilon > 0$, in nats. In a completion on which the faces differ by much less than this on average, they
            differ by noise, and no token is important.
        sparsity_threshold (`float`, *optional*, defaults to `0.3`):
            $\theta$ in `[0, 1)`. Tokens of lower importance have no reward.

        calibrate_rewards (`bool`, *optional*):
            Whether the labels decide how much each source of token rewards counts, see [`~trl_tfpo.training.calibration.calibrate`].
            The rewards above are then one source of several, and `reward_direction` has no effect. The doctor starts with the
            credit that each token gets whatever its context; an adapter of guided flow starts at zero. By default held-out labels
            decide, with guided flow without an adapter, at least 128 pairs, and a dataset by [`annotate_token_rewards`] with
            `reward_direction="agreement"` and without a `reward_fn`; calibrated rewards are used where they explain these
            labels better than the rewards above do. With fewer pairs they are not used.

        > Parameters that control the objective

        policy (`str`, *optional*, defaults to `"ratio"`):
            Whose flow is balanced. By *guided flow* it is that of a language model times the doctor, which learns nothing but
            how to guide: of the doctor before training (`"ratio"`), or of the patient (`"guided"`). That model is kept beside
            the doctor, is read once for each batch, and is the reference. With `"doctor"` (the paper) it is that of the doctor
            alone, which stays a language model of its own, and can draft for the patient.
        reward_temperature (`float`, *optional*, defaults to `0.25`):
            A reward of 1 is worth `1 / reward_temperature` nats.
        reference_weight (`float`, *optional*, defaults to `1.0`):
            Exponent of the reference in what is learned; 0 is the paper. A little below 1, such as 0.95, what the reference
            finds unlikely is worth a little, and texts are more diverse. With `policy="doctor"` the reference is the doctor
            before training, and scores the dataset once beforehand.
        subtb_lambda (`float`, *optional*, defaults to `0.95`):
            Sub-trajectories of n tokens weigh `subtb_lambda ** n`, in `[0, 1]`: at 0.95 those of up to 20 tokens or so
            count, at 1 all of them alike.
        value_loss_weight (`float`, *optional*, defaults to `0.1`):
            $\lambda \ge 0$, weight of the value discrimination loss.
        value_margin (`float`, *optional*, defaults to `0.1`):
            $\gamma \ge 0$, its margin in nats.
        value_head_learning_rate (`float`, *optional*):
            Learning rate of the value head at the start of the schedule, at least 0. By default ten times `learning_rate`: the
            head is new, and what it says spans many nats.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on an accelerator if `fp16` is not set, instead of `False`.

    Raises:
        `ValueError`: when a parameter is of another type than its field, or out of its range.
        `TypeError`: on an argument that there is not. Where TRL's other trainers have it, the message says what to use instead.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "patient_model_init_kwargs"]

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` when the doctor is given by name."}
    )
    patient_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained` when the patient is given by name."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether models given by name may run code of their own."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether the doctor is trained without dropout."})
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence of prompt and completion, in tokens; completions are cut at the end."},
    )
    drop_unusable: bool = field(
        default=False,
        metadata={
            "help": "Whether to leave out pairs that are empty, too long, or that the chat template cannot render, rather "
            "than to raise."
        },
    )
    convert_transcripts: bool = field(
        default=False,
        metadata={
            "help": "Whether transcripts with turns of 'Human:' and 'Assistant:' (HH-RLHF) are read as messages."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this many tokens."}
    )
    scoring_batch_size: int = field(
        default=16,
        metadata={"help": "Sequences in one forward of the patient, and of the reference, before training."},
    )
    reward_direction: str = field(
        default="agreement",
        metadata={
            "help": "Sign of a token reward: that of the 'label' (the paper), of the 'faces', or 'agreement', of the faces, "
            "in full where the label agrees."
        },
    )
    disagreement_weight: float = field(
        default=0.5,
        metadata={"help": "What is left, in [0, 1], of a reward that the label contradicts, by 'agreement'."},
    )
    importance_temperature: float = field(
        default=3.0,
        metadata={
            "help": "tau in the paper. Smaller makes a little difference between the faces count like a large one."
        },
    )
    gap_floor: float = field(
        default=0.05,
        metadata={
            "help": "epsilon in the paper, in nats. Where the faces differ by much less on average, no token is important."
        },
    )
    sparsity_threshold: float = field(
        default=0.3, metadata={"help": "theta in the paper, in [0, 1). Less important tokens have no reward."}
    )
    calibrate_rewards: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the labels decide how much each source of token rewards counts. By default held-out labels say "
            "whether that explains them better, from 128 pairs on."
        },
    )
    policy: str = field(
        default="ratio",
        metadata={
            "help": "Whose flow is balanced: 'ratio', the doctor before training times the doctor; 'guided', patient times "
            "doctor, for which the patient stays loaded; or 'doctor', the doctor alone."
        },
    )
    reward_temperature: float = field(
        default=0.25, metadata={"help": "A token reward of 1 is worth 1 / reward_temperature nats."}
    )
    reference_weight: float = field(
        default=1.0,
        metadata={
            "help": "Exponent of the reference in what is learned; 0 is the paper. With `policy='doctor'` it is the doctor "
            "before training, and scores the dataset once beforehand."
        },
    )
    subtb_lambda: float = field(
        default=0.95, metadata={"help": "Sub-trajectories of n tokens weigh subtb_lambda ** n, in [0, 1]."}
    )
    value_loss_weight: float = field(
        default=0.1, metadata={"help": "lambda in the paper, weight of the value discrimination loss."}
    )
    value_margin: float = field(
        default=0.1, metadata={"help": "gamma in the paper, margin of the value discrimination loss in nats."}
    )
    value_head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value head. By default ten times that of the rest."}
    )

    def __post_init__(self):
        check_types(self)
        check_reward_settings(
            self.reward_direction,
            self.disagreement_weight,
            self.importance_temperature,
            self.gap_floor,
            self.sparsity_threshold,
        )
        if self.policy not in ("doctor", "ratio", "guided"):
            raise ValueError(f"`policy` must be 'doctor', 'ratio' or 'guided'. Got {self.policy!r}; try 'ratio'.")
        check_flow_settings(self.reward_temperature, self.reference_weight)
        if not 0 <= self.subtb_lambda <= 1:
            raise ValueError(
                f"`subtb_lambda` must be in [0, 1]. Got {self.subtb_lambda}; 1 weighs all sub-trajectories alike."
            )
        for name in ("value_loss_weight", "value_margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0. Got {getattr(self, name)}; try 0.1.")
        if self.value_head_learning_rate is not None and not self.value_head_learning_rate >= 0:
            raise ValueError(
                f"`value_head_learning_rate` must be at least 0. Got {self.value_head_learning_rate}; leave it out for "
                "ten times that of the rest."
            )
        if not self.learning_rate >= 0:
            raise ValueError(f"`learning_rate` must be at least 0. Got {self.learning_rate}; try 1e-4.")
        for name in ("max_length", "pad_to_multiple_of", "scoring_batch_size", "per_device_train_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 token or sequence. Got {value}; leave it out.")
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True  # TRL sets the deprecated name, with a warning for every config
        if self.bf16 is None:  # TRL's default of True is an error on a machine without an accelerator
            self.bf16 = not self.fp16 and torch.accelerator.is_available()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            # Several processes on CPUs would train apart, without a word
            self.ddp_backend = self.ddp_backend or "gloo"
            self.use_cpu = "ACCELERATE_USE_DEEPSPEED" not in os.environ  # DeepSpeed finds the CPU itself
        super().__post_init__()


def output_folder(args: TrainingArguments) -> Path:
    """Return the output folder, for which `TrainingArguments` has a default."""
    return Path(args.output_dir or "trainer_output")


def resolve_args(args: TFPOConfig | None, model: object) -> TFPOConfig:
    """The settings, by default those of a run that is named after the model. Raises `ValueError` for any other object."""
    if args is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", model)
        return TFPOConfig(f"{str(name).split('/')[-1]}-TFPO")
    if not isinstance(args, TFPOConfig):
        raise ValueError(f"`args` must be a `TFPOConfig`. Got a `{type(args).__name__}`; make one of the settings.")
    return args
