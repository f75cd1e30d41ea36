# SPDX-License-Identifier: Apache-2.0

"""Checks of PEFT adapters on doctors and patients."""

from typing import TYPE_CHECKING

from ..common._upstream import adapter_layers
from ..common.language_model import LanguageModel


if TYPE_CHECKING:
    from peft import PeftConfig

VALUE_HEAD = "value_head"  # submodule of a doctor, saved with its adapter


def check_adapters(model: LanguageModel, name: str = "A doctor") -> None:
    """
    Raise `ValueError` unless all adapters of a model change weights only and can be disabled.

    `name` is the subject of the message. Prompt learning and activated LoRA are not supported.
    """
    configs = getattr(model, "peft_config", None) or {}
    switchable = {
        adapter
        for layer in (adapter_layers(model) if configs else [])
        for attribute in getattr(layer, "adapter_layer_names", ())
        if hasattr(getattr(layer, attribute, None), "keys")
        for adapter in getattr(layer, attribute)
    }
    for adapter, config in configs.items():
        reason = why_unsupported(config)
        if reason is None and adapter not in switchable:
            reason = "Its layers cannot be disabled"
        if reason:
            raise ValueError(
                f"{name} may have adapters of its weights only, such as LoRA. Got the adapter {adapter!r}, a "
                f"{type(config).__name__}. {reason}; load the model without it."
            )


def why_unsupported(config: "PeftConfig") -> str | None:
    """Reason why adapters with this config are not supported, or `None` if they are."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "Prompt learning adds tokens to the input, which the other models do not read"
    if getattr(config, "alora_invocation_tokens", None):
        return "Activated LoRA needs invocation tokens in the input, and decoding with a cache reads single tokens"
    return None
