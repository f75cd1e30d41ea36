# SPDX-License-Identifier: Apache-2.0

r"""
A LoRA on the language model head: where a doctor that is an adapter on a language model starts at its credits.

$$\log \pi(y \mid s) \propto (W h_s)_y + c_y \, a^\top h_s, \qquad a^\top h_s \approx 1$$

$c$ are the credits of the tokens, and $c \, a^\top$ is a LoRA of rank 1 on the head $W$. It takes V + H numbers, where a head of its
own would take V x H, and is a part of an ordinary adapter, which `PeftModel` loads. Training leaves it as it is: one free number
for each token would learn the noise of the pairs. The adapters of the layers decide how much the credits count at each state, and
what else there is to say.
"""

import copy
import functools
import re
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

HAS_USUAL_START = (True, "gaussian")  # of `init_lora_weights`, where the product of the two matrices starts at zero


def has_adapted_head(model: "PreTrainedModel | PeftModel") -> bool:
    """Whether the head is read with an adapter on it, so that its weights are not all that it is."""
    head = model.get_output_embeddings()
    return hasattr(head, "base_layer") and not head._disable_adapters and not head.merged


def has_columns(head: torch.nn.Module) -> bool:
    """Whether all that the active adapters of a head do is to add a product of two matrices to its weights."""
    return all(
        name in getattr(head, "lora_A", {})
        and not getattr(head, "use_dora", {}).get(name, False)
        and not getattr(head, "lora_bias", {}).get(name, False)
        for name in head.active_adapters
    )


def adapter_factors(head: torch.nn.Module, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    What the active adapters add to the logits of a head, see [`has_columns`].

    Args:
        head (`torch.nn.Module`):
            The LoRA layer.
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.

    Returns:
        For each adapter its hidden states (N, R) and weights (V, R): the logits are their product.
    """
    return [
        (head.lora_A[name](hidden.to(head.lora_A[name].weight.dtype)) * head.scaling[name], head.lora_B[name].weight)
        for name in head.active_adapters
    ]


def with_head(model: PreTrainedModel, peft_config: "PeftConfig") -> "PeftConfig":
    """
    The config of an adapter that has a place for credits as well: rank 1 on the language model head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The language model, before it gets the adapter.
        peft_config ([`~peft.PeftConfig`]):
            Left as it is.

    Returns:
        [`~peft.PeftConfig`]: a copy; or the config itself where the head has its place in it already, or the adapter is no LoRA
        that starts at zero.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS

    head, name = model.get_output_embeddings(), _place_of_head(model)
    targets = getattr(peft_config, "target_modules", None)
    if targets is None:
        targets = USUAL_TARGETS.get(getattr(model.config, "model_type", None))
    is_plain = getattr(peft_config.peft_type, "value", peft_config.peft_type) == "LORA" and not peft_config.use_dora
    last, kept = name.rsplit(".", 1)[-1], {*(peft_config.modules_to_save or ()), *peft_config.rank_pattern}
    if not is_plain or peft_config.init_lora_weights not in HAS_USUAL_START or targets is None or {name, last} & kept:
        return peft_config
    if targets == "all-linear":
        from transformers.pytorch_utils import Conv1D

        kinds = torch.nn.Linear | Conv1D
        targets = {key for key, module in model.named_modules() if isinstance(module, kinds) and module is not head}
    elif isinstance(targets, str):
        if re.fullmatch(targets, name):
            return peft_config
        targets = f"(?:{targets})|{re.escape(name)}"
    if not isinstance(targets, str) and {name, last} & {*targets}:
        return peft_config
    peft_config = copy.deepcopy(peft_config)
    peft_config.target_modules = targets if isinstance(targets, str) else {*targets, name}
    peft_config.rank_pattern = {**peft_config.rank_pattern, name: 1}
    peft_config.alpha_pattern = {**peft_config.alpha_pattern, name: 1}
    return peft_config


def _place_of_head(model: PreTrainedModel) -> str:
    """The name of its head among the modules of a model."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def keep_head(model: "PeftModel") -> None:
    """Let training leave credits as they are: the place on the head that [`with_head`] has made."""
    head, place = model.get_output_embeddings(), _place_of_head(model.get_base_model())
    for name, matrix in getattr(head, "lora_A", {}).items():
        if model.peft_config[name].rank_pattern.get(place) == 1:
            matrix.requires_grad_(False)
            head.lora_B[name].requires_grad_(False)


def save_without_embeddings(model: "PeftModel") -> None:
    """Let an adapter that is partly on the head be saved without the embeddings, which PEFT would save with it."""
    if hasattr(model.get_output_embeddings(), "base_layer"):
        save = functools.partial(type(model).save_pretrained, model, save_embedding_layers=False)
        model.save_pretrained = functools.wraps(type(model).save_pretrained)(save)


def starts_at_zero(model: "PreTrainedModel | PeftModel") -> bool:
    """Whether the active adapter has a LoRA on the head that changes nothing yet."""
    head, name = model.get_output_embeddings(), getattr(model, "active_adapter", None)
    if not hasattr(head, "base_layer") or name not in getattr(head, "lora_B", {}) or not has_columns(head):
        return False
    return not head.lora_B[name].weight.any()


@torch.no_grad()
def start_head_at(model: "PeftModel", logits: torch.Tensor, constant: torch.Tensor) -> None:
    """
    Let the active adapter add the same logits to those of the head at every state, in place.

    Args:
        model ([`~peft.PeftModel`]):
            The doctor, see [`starts_at_zero`].
        logits (`torch.Tensor` of shape `(V,)`):
            In nats.
        constant (`torch.Tensor` of shape `(H,)`):
            Its product with every hidden state is about 1.
    """
    head, name = model.get_output_embeddings(), model.active_adapter
    first, second = head.lora_A[name].weight, head.lora_B[name].weight  # (R, H), (V, R)
    size = first.norm(dim=1).mean() / constant.norm()  # as long as the other rows
    first[0] = constant * size
    second[:, 0] = logits / (size * head.scaling[name])
