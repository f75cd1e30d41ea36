# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
What is taken from TRL, PEFT, transformers and torch that is not part of their public interface, each with the reason it is
needed.

`tests/test_upstream.py` checks that every one of them still behaves as the package relies on.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple
from weakref import WeakKeyDictionary

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
from transformers.utils import ModelOutput
from trl.models.utils import prepare_deepspeed
from trl.trainer import add_fused_lm_head
from trl.trainer import utils as trl_utils
from trl.trainer.base_config import _BaseConfig  # defaults and help texts shared by all TRL configs
from trl.trainer.base_trainer import _BaseTrainer  # model card, loss scaling flag and tags of all TRL trainers
from trl.trainer.utils import create_model_from_path  # dtype and device rules for models given by name

from .guidance_head import GuidanceHead
from .head_adapter import columns_beside, has_adapted_head, states_beside


__all__ = [
    "FakeTensorMode",
    "LabelledStates",
    "TorchDispatchMode",
    "_BaseConfig",
    "_BaseTrainer",
    "active_adapters",
    "adapter_layers",
    "backbone_of",
    "default_dtype",
    "float32_residuals",
    "fused_lm_head",
    "fused_logps",
    "has_fused_head",
    "has_plain_head",
    "in_float32",
    "inference",
    "is_peft_model",
    "is_sharded",
    "keep_differentiable",
    "keep_output_precision",
    "labelled_logits",
    "load_model",
    "load_shared_out",
    "plain_logps",
    "prove_head",
    "share_out",
    "shares_out",
    "tree_leaves",
    "unsharded",
    "unwrap_peft",
    "using_adapters",
]


logger = logging.getLogger(__name__)
HALVES = (torch.bfloat16, torch.float16)
NUM_POSITIONS = 256  # whose logits are held at once where the head is the model's own
TILE_WIDTH = 1024  # ids in a tile of logits where there is no Triton


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


def load_shared_out(name: str, **init_kwargs) -> PreTrainedModel:
    """
    A model by name or path, on its way to [`share_out`]: under ZeRO-3 each process reads its part, and none holds the
    whole; under FSDP2 it is whole in the memory of the CPU.
    """
    return create_model_from_path(
        name, **{"use_safetensors": True, "trust_remote_code": False} | init_kwargs | {"device_map": None}
    )


def shares_out(accelerator: Accelerator) -> bool:
    """Whether the engine shares out the parameters of models between processes: DeepSpeed ZeRO-3 and FSDP2 do."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def share_out(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
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
def fused_lm_head(model: PreTrainedModel, in_float32: bool = False) -> Iterator[None]:
    """
    Within the context `model(..., labels=labels, fused_lm_head=True).log_probs` gives per-token log-probabilities
    without ever holding the (tokens, vocabulary) logits, with the product in float32 if asked for. TRL's helper patches
    for good; this one takes it back.
    """
    base = unwrap_peft(model)
    patched = vars(base).get("forward")
    add_fused_lm_head(base, cast_lm_head_to_fp32=in_float32)
    try:
        yield
    finally:
        _restore_forward(base, patched)


class LabelledStates(NamedTuple):
    """
    Hidden states (N, H) of a model where N labels are predicted, and its head: weights (V, H) and a bias (V,) or None.

    They stand for the logits (N, V), which are never held.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self) -> torch.Tensor:
        """The logits (N, V), float32, after all."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias).float()


def has_plain_head(model: PreTrainedModel) -> bool:
    """
    Whether logits are the head's product with the last hidden states, nothing more, to TRL as well, and the head is whole,
    in floats.
    """
    return not is_sharded(model) and _has_float_head(model) and all(prove_head(model))


def has_fused_head(model: PreTrainedModel) -> bool:
    """Whether TRL's fused head gives what the model's own would give."""
    return _has_float_head(model) and prove_head(model).is_fused


def _has_float_head(model: PreTrainedModel) -> bool:
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight is not None and weight.is_floating_point() and not has_adapted_head(model)


class HeadProof(NamedTuple):
    """Whether logits are hidden states times the head, and whether they are what TRL's fused head makes of the two."""

    is_plain: bool
    is_fused: bool


_PROOFS: WeakKeyDictionary[PreTrainedModel, HeadProof] = WeakKeyDictionary()


def prove_head(model: PreTrainedModel) -> HeadProof:
    """
    What a model does to hidden states: scales and caps go by many names in configs, so it is tried out.

    Made-up hidden states and a made-up head take the place of the model's, so no weight is read: this may be asked of a
    model that is sharded or quantized, or whose head is zero. The answer is kept for the model.
    """
    base = unwrap_peft(model)
    if base in _PROOFS:
        return _PROOFS[base]
    head, device = base.get_output_embeddings(), base.get_input_embeddings().weight.device
    size = getattr(head, "in_features", None) or head.weight.size(-1)
    num_tokens = min(8, size)
    ints = torch.randint(
        -64, 65, (64, size), generator=torch.Generator().manual_seed(0)
    )  # exact in half precision, too
    weight = ints.to(device, base.dtype)
    hidden = torch.eye(num_tokens, size, device=device, dtype=base.dtype)[None]
    labels = torch.arange(num_tokens, device=device)[None]
    own_forward = vars(head).get("forward")
    proof = HeadProof(is_plain=False, is_fused=False)
    try:
        with torch.no_grad(), fused_lm_head(base), _backbone_says(base, hidden), _head_is(base, weight, None):
            head.forward = lambda states: torch.nn.functional.linear(states, weight.to(states))
            logits = base.forward(input_ids=labels, use_cache=False).logits.float()
            is_plain = torch.equal(logits[0], (hidden[0] @ weight.T).float())
            proof = HeadProof(is_plain=is_plain, is_fused=False)
            fused = base.forward(input_ids=labels, shift_labels=labels, fused_lm_head=True).log_probs
        tolerance = 0.5 if base.dtype.itemsize < 4 else 1e-3  # nats; the logits are up to 64
        logps = logits.log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
        proof = HeadProof(is_plain=is_plain, is_fused=bool((fused - logps).abs().max() <= tolerance))
    except Exception as error:  # a forward that needs more than hidden states: its own logits are always right
        logger.info("The head of %s could not be tried out: %r", type(base).__name__, error)
    finally:
        _restore_forward(head, own_forward)
    _PROOFS[base] = proof
    return proof


class _Said:
    """In place of what a backbone returns: hidden states, and nothing else."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name):
        return None

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]


@contextmanager
def _backbone_says(base: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Within the context the model's forward is that of its head, on hidden states (1, N, H) that are given."""
    backbone = backbone_of(base)
    forward = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: _Said(hidden)
    try:
        yield
    finally:
        _restore_forward(backbone, forward)


@contextmanager
def _head_is(base: PreTrainedModel, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
    """Within the context TRL finds a head of these weights where it looks for the model's."""
    base.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=bias)
    try:
        yield
    finally:
        del base.get_output_embeddings


def _restore_forward(module: torch.nn.Module, forward: Callable | None) -> None:
    if forward is not None:
        module.forward = forward
    else:
        vars(module).pop("forward", None)


def fused_logps(
    forward: Callable[..., ModelOutput],
    model: PreTrainedModel,
    labels: torch.LongTensor,
    /,
    guided: LabelledStates | None = None,
    **inputs,
) -> tuple[torch.Tensor, LabelledStates]:
    """
    Log-probabilities (B, L - 1) of `labels` (B, L) after their first column, zero where a label is -100, and what they were
    made of, without gradients.

    `forward` is the model's, with TRL's fused head. That projects every position to the vocabulary where there is no
    Triton, prompts and padding included; here only those that predict a label reach it. Nor do its tiles, made for
    Triton, fit a processor's cache: there smaller ones take a third of the time, and little memory.

    With `guided` they are those of the product of two models: the sum of their logits is one product as well, of their
    hidden states side by side with a head as wide as both, over the ids that both have.
    """
    has_label = labels[:, 1:] != -100
    tile_width = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    try:
        if not trl_utils._use_triton(model.get_output_embeddings().weight.device):
            trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = TILE_WIDTH
        with _only_labelled(model, has_label, guided, fuses=True) as kept, _wide_head(model, guided):
            outputs = forward(**inputs, shift_labels=labels[:, 1:][has_label][None], fused_lm_head=True)
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile_width
    log_probs, head = outputs.log_probs[0], model.get_output_embeddings()
    states = LabelledStates(kept[0].detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())
    return log_probs.new_zeros(has_label.shape).masked_scatter(has_label.to(log_probs.device), log_probs), states


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


def plain_logps(model: PreTrainedModel, labels: torch.LongTensor, /, **inputs) -> torch.Tensor:
    """
    The log-probabilities (B, L - 1) of [`fused_logps`] by the model's own head, for those that TRL's does not fit: some
    positions at a time, without gradients, in float32.
    """
    base, has_label = unwrap_peft(model), labels[:, 1:] != -100
    with _only_labelled(model, has_label, num_shown=1) as kept:
        model(**inputs, use_cache=False)
    targets, logps = labels[:, 1:][has_label].to(kept[0].device), []
    for some, ids in zip(kept[0].split(NUM_POSITIONS), targets.split(NUM_POSITIONS), strict=True):
        with _backbone_says(base, some[None]), in_float32():
            logits = base.forward(input_ids=ids[None], use_cache=False).logits[0].float()
        logps.append(logits.log_softmax(dim=-1).gather(1, ids[:, None].to(logits.device))[:, 0])
    logps = torch.cat(logps)
    return logps.new_zeros(has_label.shape).masked_scatter(has_label.to(logps.device), logps)


def labelled_logits(
    forward: Callable[..., ModelOutput], model: PreTrainedModel, labels: torch.LongTensor, /, **inputs
) -> torch.Tensor:
    """Logits (N, V), float32, at the N positions that predict one of `labels` (B, L) which is not -100, row by row."""
    with _only_labelled(model, labels[:, 1:] != -100):
        return forward(**inputs, use_cache=False).logits[0].float()


@contextmanager
def _only_labelled(
    model: PreTrainedModel,
    has_label: torch.Tensor,
    guided: LabelledStates | None = None,
    num_shown: int | None = None,
    fuses: bool = False,
) -> Iterator[list[torch.Tensor]]:
    """
    Within the context the language model head is given one row: the positions (B, L - 1) that predict a label, or the
    first of them, with the states of what is guided beside them. The list that it yields will hold the hidden states
    (N, H) of the model itself.
    """
    kept, head = [], model.get_output_embeddings()
    is_adapted = fuses and has_adapted_head(model)

    def keep_labelled(_, args, output):
        hidden_states = output.last_hidden_state
        kept[:] = [hidden_states[:, :-1][has_label.to(hidden_states.device)]]
        shown = kept[0]
        if fuses and isinstance(head, GuidanceHead):
            shown = head.to_embedding_space(shown)
        elif is_adapted:
            shown = torch.cat([shown, states_beside(head, shown)], dim=-1)
        if guided is not None:
            beside = guided.hidden.to(shown)
            shown = shown + beside if _share_embeddings(head, guided) else torch.cat([shown, beside], dim=-1)
        output.last_hidden_state = shown[None, :num_shown]
        return output

    hook = backbone_of(model).register_forward_hook(keep_labelled)
    try:
        yield kept
    finally:
        hook.remove()


def _wide_head(model: PreTrainedModel, guided: LabelledStates | None) -> AbstractContextManager[None]:
    """Within the context the head that TRL looks up has beside it the one of what is guided, or what adapters add to it."""
    base, head = unwrap_peft(model), model.get_output_embeddings()
    if guided is None and has_adapted_head(model):
        return _head_is(base, torch.cat([head.weight, columns_beside(head)], dim=1), head.bias)
    if guided is None:
        return nullcontext()
    if _share_embeddings(head, guided):
        return _head_is(base, head.weight, guided.bias)
    size = min(len(head.weight), len(guided.weight))
    weight = torch.cat([head.weight[:size], guided.weight[:size].to(head.weight)], dim=1)
    biases = [bias[:size].to(weight) for bias in (head.bias, guided.bias) if bias is not None]
    return _head_is(base, weight, sum(biases) if biases else None)


def _share_embeddings(head: torch.nn.Module, guided: LabelledStates) -> bool:
    """Whether a guiding head and what it guides have the same vocabulary embeddings, so that hidden states can be added."""
    if not isinstance(head, GuidanceHead) or head.weight.shape != guided.weight.shape:
        return False
    key = tuple((x.data_ptr(), x._version, x.dtype) for x in (head.weight, guided.weight))
    if vars(head).get("_compared", (None,))[0] != key:
        head._compared = key, head.weight.dtype == guided.weight.dtype and torch.equal(head.weight, guided.weight)
    return head._compared[1]


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
