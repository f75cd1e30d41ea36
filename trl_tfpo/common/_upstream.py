# SPDX-License-Identifier: Apache-2.0

"""
Private parts of TRL, PEFT, Accelerate, transformers and bitsandbytes that this package uses.

Tests, most of them in `tests/test_upstream.py`, check that each part still behaves as this package requires.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from trl.models.utils import prepare_deepspeed
from trl.trainer.base_config import _BaseConfig  # defaults and help texts shared by all TRL configs
from trl.trainer.base_trainer import _BaseTrainer  # model card, loss scaling flag and tags of all TRL trainers
from trl.trainer.utils import create_model_from_path  # dtype and device rules for models given by name


__all__ = [
    "_BaseConfig",
    "_BaseTrainer",
    "active_adapters",
    "adapter_layers",
    "keep_differentiable",
    "keep_output_precision",
    "load_model",
    "load_sharded",
    "shard",
    "shards_models",
    "unsharded",
    "using_adapters",
]


@contextmanager
def unsharded() -> Iterator[None]:
    """
    Within the context every process loads whole models, even under an engine that shards them.

    Outside the context transformers shards a model when it loads it (ZeRO-3), or loads the parameters on one process
    only (FSDP). Datasets are scored by unsharded models before training.
    """
    zero = deepspeed_integration._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed_integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = zero
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp


def keep_differentiable(model: torch.nn.Module) -> None:
    """
    Keep a 4-bit model on a CPU differentiable after a forward pass in eval mode.

    On processors with AVX512-BF16, bitsandbytes repacks the weights in the first forward pass in eval mode. Gradients
    do not pass through repacked weights, so training could not continue after an evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def keep_output_precision(accelerator: Accelerator) -> None:
    """Keep the outputs of an FSDP2 model in float32: Accelerate's mixed-precision policy rounds them."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def load_model(name: str, **init_kwargs) -> PreTrainedModel:
    """
    Load a model by name or path.

    Each of several processes loads the whole model onto its own device. A single process may use all its GPUs.
    """
    init_kwargs.setdefault("use_safetensors", True)  # a pickle can run code
    init_kwargs.setdefault("trust_remote_code", False)  # by default transformers asks the user
    state = PartialState()
    if state.num_processes > 1:
        init_kwargs.setdefault("device_map", {"": state.device})  # "auto" would spread each model over all devices
    with unsharded():
        return create_model_from_path(name, **init_kwargs)


def load_sharded(name: str, **init_kwargs) -> PreTrainedModel:
    """
    Load a model by name or path for [`shard`].

    With ZeRO-3 each process loads only its shard. With FSDP2 each process loads the whole model into CPU memory, or
    only the first process does (`fsdp_cpu_ram_efficient_loading`).
    """
    defaults = {"use_safetensors": True, "trust_remote_code": False}
    return create_model_from_path(name, **defaults | init_kwargs | {"device_map": None})


def shards_models(accelerator: Accelerator) -> bool:
    """Whether the engine shards parameters among processes: DeepSpeed ZeRO-3 or FSDP2."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def shard(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """
    Freeze a model and shard it as the engine does. All processes must run its forward passes at the same time.

    For FSDP2 this calls an internal function of Accelerate, because Accelerate's public function needs an optimizer,
    and TRL's function gathers all parameters at once.
    """
    model.requires_grad_(False)
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model).eval()
    return prepare_deepspeed(model, accelerator)


def adapter_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules with PEFT adapters: LoRA layers, and the modules in `modules_to_save`."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


def active_adapters(layers: Sequence[torch.nn.Module]) -> tuple[str, ...]:
    """Names of the adapters that are active in at least one layer."""
    states: list[Any] = list(layers)
    names = [name for layer in states if not layer._disable_adapters for name in layer.active_adapters]
    return tuple(dict.fromkeys(names))


@contextmanager
def using_adapters(layers: Sequence[torch.nn.Module], names: Sequence[str]) -> Iterator[None]:
    """
    Within the context the layers use only the adapters of these names.

    Decoding switches adapters for every token. `PeftModel.disable_adapter` and `set_adapter` take milliseconds,
    because they traverse all modules and set which parameters require gradients.
    """
    states: list[Any] = list(layers)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in states]
    try:
        for layer in states:
            layer._disable_adapters = not names
            if names:
                layer._active_adapter = list(names)
        yield
    finally:
        for layer, (is_disabled, active) in zip(states, before, strict=True):
            layer._disable_adapters, layer._active_adapter = is_disabled, active
