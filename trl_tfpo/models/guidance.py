# SPDX-License-Identifier: Apache-2.0

"""How a language model becomes a doctor that guides, and the file that says so beside its weights."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..common._upstream import backbone_of, inference, is_sharded
from ..common.atomic import FORMAT, check_format
from .adapters import trained_exponents
from .guidance_head import GuidanceHead, constant_over
from .head_adapter import start_head_at, starts_at_zero
from .named_model import check_there
from .states import PLAIN, head_form


if TYPE_CHECKING:
    from peft import PeftModel


GUIDANCE_FILE = "guidance.json"
NUM_ROWS = 8  # read at once by `start_at_credits`
GUIDANCE = {"alpha": 1.0, "beta": 1.0}  # exponents of the patient and of the doctor in training


def start_guidance(model: PreTrainedModel, in_span: bool = False) -> None:
    """
    Set the language model head to zero, in place, so that the doctor leaves any patient as it is.

    A head that is tied to the embeddings gets weights of its own. A doctor that has been trained by guided flow keeps what it
    has learned.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The language model, before an adapter is added.
        in_span (`bool`, *optional*, defaults to `False`):
            Whether the head becomes a [`~trl_tfpo.models.guidance_head.GuidanceHead`], and the weights of the present
            one are frozen. A head that is more than a product gets weights of its own nevertheless.
    """
    is_new, embeddings = not getattr(model.config, "guidance", None), model.get_output_embeddings().weight
    if is_new:
        _own_config(model)
        untie_head(model)
        model.config.guidance = GUIDANCE
    head = model.get_output_embeddings()
    if not is_new:
        return
    is_outline = embeddings.device.type == "meta"  # whose logits cannot be looked at
    if in_span and type(head) is torch.nn.Linear and head.bias is None and (is_outline or head_form(model) == PLAIN):
        model.set_output_embeddings(GuidanceHead(embeddings))
        return
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


def free_head(model: PreTrainedModel) -> None:
    """Put a head of zeros, with a free row for each token, in the place of a new GuidanceHead, in place."""
    former = model.get_output_embeddings()
    head = torch.nn.Linear(former.in_features, len(former.weight), bias=False).to(former.weight)
    torch.nn.init.zeros_(head.weight)
    former.weight.requires_grad_(former.froze_embeddings)
    model.set_output_embeddings(head)


@torch.no_grad()
def start_at_credits(model: PreTrainedModel, logits: torch.Tensor, rows: Sequence[dict], collate: Callable) -> None:
    """
    Let a doctor start with the same logits at every state, in place.

    A [`~trl_tfpo.models.guidance_head.GuidanceHead`] starts at them. An adapter on the head adds them to the logits of
    the language model. Other doctors are left as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The doctor.
        logits (`torch.Tensor` of shape `(V',)`):
            Of the tokens, in nats, up to a constant.
        rows (`Sequence[dict]`):
            Rows of the training data. Reading stops after twice as many states as a hidden state has entries.
        collate (`Callable`):
            From rows to a batch.
    """
    head = model.get_output_embeddings()
    if is_sharded(model) or not (isinstance(head, GuidanceHead) or starts_at_zero(model)):
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
        start_head_at(model, wanted.to(model.device), constant_over(torch.cat(states)))


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a config of its own: one that was made from the patient's would say that the patient is a doctor."""
    own = {}  # copies, by the identity of what they are copies of
    copy.deepcopy(model.config, own)
    for module in model.modules():
        if id(getattr(module, "config", None)) in own:
            module.config = own[id(module.config)]


def untie_head(model: PreTrainedModel) -> None:
    """Let the language model head have weights of its own, in place: it will be replaced, and the embeddings will not."""
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        model.tie_weights()  # forgets that they were


def is_guidance(model: "PreTrainedModel | PeftModel") -> bool:
    """Whether the model is a doctor of guided flow, trained or about to be."""
    return bool(trained_exponents(model))


def save_guidance(model: "PreTrainedModel | PeftModel", output_dir: str | os.PathLike) -> None:
    """Write down the exponents that the doctor was trained for, if there are any, and its format, next to its weights."""
    contents = {"format": FORMAT} | trained_exponents(model)
    (Path(output_dir) / GUIDANCE_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def load_guidance(path: str | os.PathLike) -> dict[str, float] | None:
    """
    The exponents `alpha` and `beta` that the doctor in a folder, or on the Hub, was trained for; empty for a doctor with a
    policy of its own, `None` where nothing is written down.

    Raises:
        `ValueError`: when there is no such folder, or a later version of this package wrote it, in another format.
    """
    check_there(path)
    file = cached_file(path, GUIDANCE_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    contents = json.loads(Path(file).read_text(encoding="utf-8"))
    check_format(contents.pop("format", FORMAT), f"The doctor in {str(path)!r}")
    return contents
