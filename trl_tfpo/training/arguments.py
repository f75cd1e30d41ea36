# SPDX-License-Identifier: Apache-2.0

"""Resolve the arguments of [`TFPOTrainer`]: models, tokenizer, reward function and objective."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer import disable_dropout_in_model

from .. import functional
from ..common._upstream import keep_differentiable
from ..common.language_model import LanguageModel, is_peft_model
from ..data.tokenization import resolve_processing_class
from ..data.tokenizer_identity import check_embeddings
from ..models.doctor import make_doctor
from ..models.named_model import NamedModel, resolve_model
from .base_policy import Policy
from .checks import check_decoder_only, warn_of_ignored
from .config import TFPOConfig
from .objective import tfpo_objective


if TYPE_CHECKING:
    from peft import PeftConfig


def resolve_patient(
    patient_model: str | PreTrainedModel | None, args: TFPOConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel | NamedModel | None:
    """The patient, given as a model or by name."""
    warn_of_ignored(patient_model, "patient_model", _parsed(args.patient_model_init_kwargs))
    if patient_model is None:
        return None
    init_kwargs: dict[str, Any] = {"dtype": "auto", "trust_remote_code": args.trust_remote_code}
    init_kwargs |= _parsed(args.patient_model_init_kwargs)
    return resolve_model(patient_model, "patient_model", quantization_config, **init_kwargs)


def _parsed(init_kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """Keyword arguments that [`TFPOConfig`] has parsed if they were JSON."""
    return init_kwargs if isinstance(init_kwargs, dict) else {}


def resolve_doctor(
    model: "str | LanguageModel", args: TFPOConfig, quantization_config: BitsAndBytesConfig | None
) -> "LanguageModel | NamedModel":
    """The language model that becomes the doctor, given as a model or by name."""
    warn_of_ignored(model, "model", _parsed(args.model_init_kwargs))
    # With several processes, Accelerate or DeepSpeed places the model
    init_kwargs: dict[str, Any] = {"device_map": None} if args.distributed_state.num_processes > 1 else {}
    init_kwargs |= {"trust_remote_code": args.trust_remote_code} | _parsed(args.model_init_kwargs)
    return resolve_model(model, "model", quantization_config, **init_kwargs)  # type: ignore[arg-type]  # `PeftModel`


def resolve_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: LanguageModel, args: TFPOConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer. Sets its padding token in the configs of the doctor."""
    processing_class = resolve_processing_class(processing_class, model, args.trust_remote_code)
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    model.generation_config.pad_token_id = processing_class.pad_token_id
    check_embeddings("doctor", model, processing_class)
    return processing_class


def prepare_doctor(
    model: LanguageModel, args: TFPOConfig, policy: Policy, peft_config: "PeftConfig | None"
) -> LanguageModel:
    """The doctor with its heads and adapter."""
    check_decoder_only(model)
    model = make_doctor(model, peft_config, guides=policy.has_base, has_credits=bool(args.calibrate_rewards))
    keep_differentiable(model)
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model


def reward_fn_of(args: TFPOConfig) -> Callable[..., torch.Tensor]:
    """[`~trl_tfpo.functional.token_rewards`] with these settings."""
    return partial(
        functional.token_rewards,
        reward_direction=args.reward_direction,
        disagreement_weight=args.disagreement_weight,
        importance_temperature=args.importance_temperature,
        gap_floor=args.gap_floor,
        sparsity_threshold=args.sparsity_threshold,
    )


def objective_of(args: TFPOConfig) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """[`~trl_tfpo.training.objective.tfpo_objective`] with these settings."""
    return partial(
        tfpo_objective,
        reward_temperature=args.reward_temperature,
        reference_weight=args.reference_weight,
        subtb_lambda=args.subtb_lambda,
        value_loss_weight=args.value_loss_weight,
        value_margin=args.value_margin,
    )
