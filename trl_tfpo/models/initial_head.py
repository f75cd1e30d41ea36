# SPDX-License-Identifier: Apache-2.0

"""Initial language model head of a doctor: zero logits, or token credits."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..common.language_model import LanguageModel, backbone_of, head_of, inference, is_sharded
from .guidance_head import GuidanceHead, constant_over
from .head_adapter import has_zero_lora, set_head_lora
from .logits import PLAIN, head_form
from .trained_exponents import TRAINING_EXPONENTS


NUM_ROWS = 8  # in a batch of `start_at_credits`


def start_at_zero(model: LanguageModel, in_span: bool = False) -> None:
    """
    Set the language model head to zero, in place. The doctor then has no effect on a patient.

    The config no longer ties the head to the input embeddings. A doctor of guided flow is not changed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The language model, before an adapter is added.
        in_span (`bool`, *optional*, defaults to `False`):
            Whether to use a [`~trl_tfpo.models.guidance_head.GuidanceHead`] on the frozen weights of the current
            head. A head with a bias, a scale or a cap remains an ordinary head in any case.
    """
    if getattr(model.config, "guidance", None):
        return
    embeddings = head_of(model).weight
    _copy_config(model)
    untie_head(model)
    model.config.guidance = TRAINING_EXPONENTS
    head = head_of(model)
    has_no_bias = type(head) is torch.nn.Linear and head.bias is None
    is_outline = embeddings.device.type == "meta"  # without weights, `head_form` cannot run the model
    if in_span and has_no_bias and (is_outline or head_form(model) == PLAIN):
        model.set_output_embeddings(GuidanceHead(embeddings))
        return
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


def use_free_head(model: LanguageModel) -> None:
    """Replace an untrained GuidanceHead, in place, by a zero head with a free row for each token."""
    replaced = head_of(model)
    head = torch.nn.Linear(replaced.in_features, len(replaced.weight), bias=False).to(replaced.weight)
    torch.nn.init.zeros_(head.weight)
    replaced.weight.requires_grad_(replaced.froze_embeddings)
    model.set_output_embeddings(head)


@torch.no_grad()
def start_at_credits(model: LanguageModel, logits: torch.Tensor, rows: Any, collate: Callable) -> None:
    """
    Start a doctor at token credits: logits that are the same at every state. Changes the head in place.

    A [`~trl_tfpo.models.guidance_head.GuidanceHead`] starts at these logits. A new LoRA on the head adds them to the
    logits of the language model. Other doctors are not changed.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor.
        logits (`torch.Tensor` of shape `(V',)`):
            Logit of each token, in nats, up to a constant. V' may differ from the V rows of the head.
        rows (`Sequence[dict]`):
            Rows of the training data. They are read until there are 2 H hidden states.
        collate (`Callable`):
            Data collator.
    """
    head = head_of(model)
    if is_sharded(model) or not (isinstance(head, GuidanceHead) or has_zero_lora(model)):
        return
    wanted = logits.new_zeros(len(head.weight))
    wanted[: len(logits)] = logits[: len(wanted)]
    states, num_states = [], 0
    for first in range(0, len(rows), NUM_ROWS):
        batch = collate([rows[index] for index in range(first, min(first + NUM_ROWS, len(rows)))])
        tokens = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with inference(model):
            hidden = backbone_of(model)(**tokens).last_hidden_state[:, :-1]
        states.append(hidden[batch["completion_mask"][:, 1:].to(hidden.device)])
        num_states += len(states[-1])
        if num_states >= 2 * hidden.size(-1):
            break
    if isinstance(head, GuidanceHead):
        head.start_at(wanted.to(model.device), torch.cat(states))
    else:
        set_head_lora(model, wanted.to(model.device), constant_over(torch.cat(states)))


def _copy_config(model: LanguageModel) -> None:
    """Replace the config of a model by a copy: a config shared with the patient would mark the patient as a doctor."""
    copies: dict[int, Any] = {}  # by the identity of the original
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(getattr(module, "config", None)) in copies:
            module.config = copies[id(module.config)]


def untie_head(model: LanguageModel) -> None:
    """Untie the language model head from the input embeddings, in place. The caller then replaces its weights."""
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        model.tie_weights()  # drops the record of tied weights
