# SPDX-License-Identifier: Apache-2.0

"""The most bytes that a forward and backward pass hold beside weights and gradients, by shape and without values."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..common._upstream import FakeTensorMode, TorchDispatchMode, tree_leaves, unwrap_peft


if TYPE_CHECKING:
    from peft import PeftModel


def peak_activations(
    model: "PreTrainedModel | PeftModel",
    *,
    num_rows: int,
    num_tokens: int,
    compute_dtype: torch.dtype,
    quantized: set[int] = frozenset(),
    trains: bool = False,
    casts_weights: bool = False,
    checkpoints: bool = False,
) -> int | None:
    """
    Most bytes that a pass through the backbone holds beside weights and gradients.

    The model's own operations are run on tensors that have a shape and a type but no values, which takes a second or
    so, whatever the size of the model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, best on the meta device. Left in train or eval mode, and otherwise as it was.
        num_rows (`int`):
            Rows of the batch.
        num_tokens (`int`):
            Tokens of each row.
        compute_dtype (`torch.dtype`):
            Type in which it computes: by autocast in training, unless its weights are cast.
        quantized (`set[int]`, *optional*):
            Ids of the weights that are stored in 4 or 8 bits, and come in `compute_dtype` when they are used.
        trains (`bool`, *optional*, defaults to `False`):
            Whether there is a backward pass. Without one the rows are as scoring forms them.
        casts_weights (`bool`, *optional*, defaults to `False`):
            Whether the engine casts all weights instead, as DeepSpeed and FSDP2 do.
        checkpoints (`bool`, *optional*, defaults to `False`):
            Whether activations are computed again in the backward pass.

    Returns:
        `int`, or None where the operations depend on values or have no rule for shapes (some mixtures of experts).
    """
    base = unwrap_peft(model)
    if checkpoints:
        base.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train(trains)
    # As `Trainer` does for an adapter: the layers' input needs a gradient where their weights do
    hook = base.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output.requires_grad_() if checkpoints else output
    )
    try:
        with _fake_weights(model, quantized, compute_dtype, trains, casts_weights) as weights:
            with _LiveBytes(ignored=weights) as memory:
                input_ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
                mask = torch.ones(num_rows, num_tokens, dtype=torch.long)
                if not trains and reads_branches(model):
                    mask = torch.ones(num_rows, 1, num_tokens, num_tokens, dtype=torch.bool)
                uses_autocast = trains and not casts_weights and compute_dtype != torch.float32
                with torch.set_grad_enabled(trains), torch.autocast("cpu", compute_dtype, enabled=uses_autocast):
                    states = base.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
                if trains:
                    states.float().sum().backward()
                return memory.peak
    except RuntimeError:  # of operations on tensors without values
        return None
    finally:
        hook.remove()
        if checkpoints:
            base.activation_checkpointing_disable()


def reads_branches(model: "PreTrainedModel | PeftModel") -> bool:
    """Whether two completions share a row, as far as the config tells: see `scoring`."""
    return getattr(unwrap_peft(model).config.get_text_config(), "sliding_window", None) is None


@contextmanager
def _fake_weights(
    model: torch.nn.Module, quantized: set[int], compute_dtype: torch.dtype, trains: bool, casts_weights: bool
) -> Iterator[list[torch.Tensor]]:
    """Within the context the model's tensors, which it gives, have no values."""
    tensors = [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    ]
    fakes = {}
    try:
        with FakeTensorMode():
            for module, name, tensor in tensors:
                if id(tensor) not in fakes:
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    casts = id(tensor) in quantized or (casts_weights and is_parameter)
                    fake = torch.empty(tensor.shape, dtype=compute_dtype if casts else tensor.dtype)
                    if is_parameter:
                        fake = torch.nn.Parameter(fake, requires_grad=trains and tensor.requires_grad)
                    if fake.requires_grad:  # not kept: gradients are counted elsewhere
                        fake.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
                    fakes[id(tensor)] = fake
                setattr(module, name, fakes[id(tensor)])
            yield list(fakes.values())
    finally:
        for module, name, tensor in tensors:
            setattr(module, name, tensor)


class _LiveBytes(TorchDispatchMode):
    """Within the context: bytes of the storages that are alive, other than those ignored, and the most there were."""

    def __init__(self, ignored: list[torch.Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._forget, key)
        return output

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
