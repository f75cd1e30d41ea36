# SPDX-License-Identifier: Apache-2.0

r"""
LoRA for token credits on the language model head, in doctors with an adapter and `policy="doctor"`.

$$\log \pi(y \mid s) = \log \operatorname{softmax}\big( W h_s + c \, a^\top h_s \big)_y, \qquad a^\top h_s \approx 1$$

$c$ are the token credits, and $c \, a^\top$ is a LoRA of rank 1 on the head $W$. It has V + H weights; a separate head
would have V x H. It is part of an ordinary adapter that `PeftModel` loads. Training does not change it: trainable
credits would fit the noise of the pairs.
"""

import copy
import functools
import re
from typing import Any

import torch

from ..common.language_model import LanguageModel, head_of, unwrap_peft


ZERO_INITS = (True, "gaussian")  # values of `init_lora_weights` with which a LoRA starts at zero


def has_adapted_head(model: LanguageModel) -> bool:
    """Whether an adapter on the head is active and not merged."""
    head = head_of(model)
    return hasattr(head, "base_layer") and not head._disable_adapters and not head.merged


def is_plain_lora(head: Any) -> bool:
    """Whether each active adapter of a head is a LoRA without DoRA and without bias."""
    return all(
        name in getattr(head, "lora_A", {})
        and not getattr(head, "use_dora", {}).get(name, False)
        and not getattr(head, "lora_bias", {}).get(name, False)
        for name in head.active_adapters
    )


def lora_factors(head: Any, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Factors (N, R) and (V, R) for each active adapter of a head. The adapter adds their product to the logits.

    Args:
        head (`torch.nn.Module`):
            LoRA layer that satisfies [`is_plain_lora`].
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
    """
    factors = []
    for name in head.active_adapters:
        first, second = head.lora_A[name], head.lora_B[name]
        states = first(head.lora_dropout[name](hidden.to(first.weight)))
        factors.append((states * head.scaling[name], second.weight))
    return factors


def with_lora_on_head(model: LanguageModel, peft_config: Any) -> Any:
    """
    Return a copy of an adapter config that also has a LoRA of rank 1 on the head of `model`, for token credits.

    The config itself is returned if it already covers the head, or is not a LoRA that starts at zero.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    head, name = head_of(model), _name_of_head(model)
    targets = getattr(peft_config, "target_modules", None)
    if targets is None:
        targets = DEFAULT_TARGETS.get(str(getattr(model.config, "model_type", None)))
    is_plain = getattr(peft_config.peft_type, "value", peft_config.peft_type) == "LORA" and not peft_config.use_dora
    last, kept = name.rsplit(".", 1)[-1], {*(peft_config.modules_to_save or ()), *peft_config.rank_pattern}
    if not is_plain or peft_config.init_lora_weights not in ZERO_INITS or targets is None or {name, last} & kept:
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


def _name_of_head(model: LanguageModel) -> str:
    head = head_of(model)
    return next(name for name, module in model.named_modules() if module is head)


def freeze_head_lora(model: LanguageModel) -> None:
    """Freeze the LoRA of [`with_lora_on_head`]. The credits then do not change in training."""
    head, name_of_head = head_of(model), _name_of_head(unwrap_peft(model))
    configs: dict[str, Any] = model.peft_config
    for name, matrix in getattr(head, "lora_A", {}).items():
        if configs[name].rank_pattern.get(name_of_head) == 1:
            matrix.requires_grad_(False)
            head.lora_B[name].requires_grad_(False)


def save_without_embeddings(model: LanguageModel) -> None:
    """Make `save_pretrained` save an adapter on the head without the embeddings. By default PEFT saves both."""
    if hasattr(head_of(model), "base_layer"):
        save_pretrained: Any = type(model).save_pretrained
        save = functools.partial(save_pretrained, model, save_embedding_layers=False)
        vars(model)["save_pretrained"] = functools.wraps(save_pretrained)(save)


def has_zero_lora(model: LanguageModel) -> bool:
    """Whether the active adapter has a LoRA on the head that is still zero."""
    head, name = head_of(model), getattr(model, "active_adapter", None)
    if not hasattr(head, "base_layer") or name not in getattr(head, "lora_B", {}) or not is_plain_lora(head):
        return False
    return not head.lora_B[name].weight.any()


@torch.no_grad()
def set_head_lora(model: LanguageModel, logits: torch.Tensor, constant: torch.Tensor) -> None:
    """
    Set the LoRA on the head, in place, to add the same logits at every state.

    Args:
        model ([`~peft.PeftModel`]):
            Doctor with a zero LoRA, see [`has_zero_lora`].
        logits (`torch.Tensor` of shape `(V,)`):
            Logit of each token, in nats.
        constant (`torch.Tensor` of shape `(H,)`):
            Direction whose product with every hidden state is about 1.
    """
    head, name = head_of(model), model.active_adapter
    first, second = head.lora_A[name].weight, head.lora_B[name].weight  # (R, H), (V, R)
    size = first.norm(dim=1).mean() / constant.norm()  # gives the new row the mean norm of the rows
    first[0] = constant * size
    second[:, 0] = logits / (size * head.scaling[name])
