# SPDX-License-Identifier: Apache-2.0

"""
What is taken from TRL, PEFT, transformers and torch that is not part of their public interface, each with the reason it is
needed.

`tests/test_upstream.py` checks that every one of them still behaves as the package relies on.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from torch._subclasses.fake_tensor import FakeTensorMode  # tensors without values; public only inside torch.compile
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # documented under this name only
from torch.utils._pytree import tree_leaves, tree_map  # the same
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from trl.models.utils import prepare_deepspeed
from trl.trainer.base_config import _BaseConfig  # defaults and help texts shared by all TRL configs
from trl.trainer.base_trainer import _BaseTrainer  # model card, loss scaling flag and tags of all TRL trainers
from trl.trainer.utils import create_model_from_path  # dtype and device rules for models given by name


__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "_BaseConfig",
    "_BaseTrainer",
    "active_adapters",
    "adapter_layers",
    "backbone_of",
    "default_dtype",
    "float32_residuals",
    "in_float32",
    "inference",
    "is_peft_model",
    "is_sharded",
    "keep_differentiable",
    "keep_output_precision",
    "load_model",
    "load_sharded",
    "shard",
    "shards_models",
    "tree_leaves",
    "unsharded",
    "unwrap_peft",
    "using_adapters",
]


logger = logging.getLogger(__name__)
HALVES = (torch.bfloat16, torch.float16)


def is_peft_model(model: torch.nn.Module) -> bool:
    """Whether the model is a `PeftModel`. Accelerate's function looks into the installed packages at every call."""
    return hasattr(model, "get_base_model")


def unwrap_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """What gives the last hidden states to the language model head. Of OPT it is a part of the base model."""
    base = unwrap_peft(model)
    decoder = base.get_decoder()
    return base.base_model if decoder is base else decoder


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a process holds only its part of the parameters: DeepSpeed ZeRO-3 marks them, FSDP2 replaces them."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def unsharded() -> Iterator[None]:
    """
    Within the context every process loads models whole, and reads them so, whatever shards the doctor in training.

    Otherwise transformers shares out the parameters of a model as it loads it (ZeRO-3) or leaves them empty on all
    processes but one (FSDP), and TRL's fused head looks for shards. What scores a dataset does so before training.
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
    Let a 4-bit model be trained on a CPU after it has been read in eval mode.

    On processors with AVX512-BF16 bitsandbytes repacks the weights for good in the first forward in eval mode, and from
    then on gradients no longer pass through them: a reference that is scored, or an evaluation, would end training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_output_precision(accelerator: Accelerator) -> None:
    """Let log-probabilities and flows leave an FSDP2 model in float32: Accelerate's policy rounds what a model returns."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def default_dtype() -> str:
    """
    The dtype to load a model in where none is asked for: `"auto"`, that of its checkpoint, or `"float32"` on a CPU without
    bfloat16 instructions, which would be several times slower in half precision.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has_bfloat16 = any(value for name, value in capabilities.items() if "bf16" in name)
    return "auto" if torch.accelerator.is_available() or has_bfloat16 else "float32"


def load_model(name: str, **init_kwargs) -> PreTrainedModel:
    """
    A model by name or path, from safetensors; where there are several processes, one in each and whole, on the device of
    its own.
    """
    init_kwargs.setdefault("use_safetensors", True)  # a pickle could do anything
    init_kwargs.setdefault("trust_remote_code", False)  # otherwise transformers asks, and waits for an answer
    state = PartialState()
    if state.num_processes > 1:
        init_kwargs.setdefault("device_map", {"": state.device})  # "auto" would spread each over the devices of all
    with unsharded():
        return create_model_from_path(name, **init_kwargs)


def load_sharded(name: str, **init_kwargs) -> PreTrainedModel:
    """
    A model by name or path, on its way to [`shard`]: under ZeRO-3 each process reads its part, and none holds the
    whole; under FSDP2 it is whole in the memory of the CPU.
    """
    return create_model_from_path(
        name, **{"use_safetensors": True, "trust_remote_code": False} | init_kwargs | {"device_map": None}
    )


def shards_models(accelerator: Accelerator) -> bool:
    """Whether the engine shares out the parameters of models between processes: DeepSpeed ZeRO-3 and FSDP2 do."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def shard(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """
    A frozen model as the engine holds models, each process its part, to be read by all at the same time.

    Accelerate prepares no model for FSDP2 without an optimizer, and TRL wraps it as a whole, so that all of it is
    gathered at once.
    """
    model.requires_grad_(False)
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model).eval()
    return prepare_deepspeed(model, accelerator)


def adapter_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that hold adapters of PEFT, LoRA layers and saved modules alike."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


def active_adapters(layers: Sequence[torch.nn.Module]) -> tuple[str, ...]:
    """Names of the adapters that the layers use, none where they are switched off."""
    names = [name for layer in layers if not layer._disable_adapters for name in layer.active_adapters]
    return tuple(dict.fromkeys(names))


@contextmanager
def using_adapters(layers: Sequence[torch.nn.Module], names: Sequence[str]) -> Iterator[None]:
    """
    Within the context the layers use the adapters of these names, or none.

    `PeftModel.disable_adapter` and `set_adapter` do the same, but also walk all modules and set what requires
    gradients, which takes milliseconds, and is done here for every token.
    """
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = not names
            if names:
                layer._active_adapter = list(names)
        yield
    finally:
        for layer, (is_disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = is_disabled, active


@contextmanager
def float32_residuals(model: PreTrainedModel) -> Iterator[None]:
    """
    Within the context a model in half precision keeps its residual stream, and so its norms, in float32; matrices are multiplied in
    half precision as before. Autocast does it, once the embeddings are float32.
    """
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.float())
    try:
        with torch.autocast(model.device.type, dtype=model.dtype):
            yield
    finally:
        hook.remove()


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode and records no gradients; its mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def in_float32() -> Iterator[None]:
    """
    Within the context models in bfloat16 or float16 compute in float32, with the weights that they have.

    Each weight is converted where it is used, so the model needs no more memory than before and one weight. That is slow,
    and kernels that take nothing but half precision raise.
    """
    with _Float32(), _Float32Convolutions():
        yield


def _widened(x):
    if isinstance(x, torch.dtype):
        return torch.float32 if x in HALVES else x
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in HALVES else x


class _Float32(TorchDispatchMode):
    """Operations in half precision are done in float32. What is written in place keeps its type."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:  # a row of the table, not all of it
            return _widened(func(*args, **kwargs))
        written = {id(args[0])} if func._schema.is_mutable and args else set()
        args, kwargs = tree_map(lambda x: x if id(x) in written else _widened(x), (args, kwargs))
        return func(*args, **kwargs)


class _Float32Convolutions(TorchFunctionMode):
    """These compare the types of their arguments before they are dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)
