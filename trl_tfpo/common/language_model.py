# SPDX-License-Identifier: Apache-2.0

"""Access to a language model with or without adapters: backbone, head, device, sharding, eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, DynamicLayer, PreTrainedModel


if TYPE_CHECKING:
    from peft import PeftModel

LanguageModel: TypeAlias = "PreTrainedModel | PeftModel"


def is_peft_model(model: torch.nn.Module) -> bool:
    """Whether the model is a `PeftModel`. Accelerate's `is_peft_model` is slower: it looks for PEFT at every call."""
    return hasattr(model, "get_base_model")


def unwrap_peft(model: LanguageModel) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if is_peft_model(model) else wrapped


def backbone_of(model: LanguageModel) -> torch.nn.Module:
    """The module that computes the input of the language model head. In OPT it is a part of the base model."""
    base = unwrap_peft(model)
    decoder = base.get_decoder()
    return base.base_model if decoder is base else decoder


def head_of(model: LanguageModel) -> Any:
    """The language model head: a linear layer, a PEFT layer around it, or another module."""
    return unwrap_peft(model).get_output_embeddings()


def device_of(model: LanguageModel) -> torch.device:
    """Device of the input embeddings, to which token ids are moved."""
    embeddings: Any = unwrap_peft(model).get_input_embeddings()
    return embeddings.weight.device


def keeps_all_keys(model: LanguageModel) -> bool:
    """Whether every layer attends to all earlier tokens: none has a window, chunks or a recurrent state."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the parameters are sharded, by DeepSpeed ZeRO-3 (it sets `ds_id`) or by FSDP2 (they are `DTensor`s)."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode and records no gradients. Its modes are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training
