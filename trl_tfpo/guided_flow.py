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

r"""
Guided flow: the flow is balanced under a language model that the doctor guides, not under the doctor's own policy.

$$\log \pi(y \mid s) = \log \operatorname{softmax}\big( \log \pi_{\text{guided}} + \log \pi_{\text{doctor}} \big)$$

takes the place of $\log \pi_{\text{doctor}}$ in the balance, and $\pi_{\text{guided}}$ that of the reference: the doctor
before training (`policy="ratio"`), or the patient itself (`policy="guided"`). The doctor starts with a language model head
of zeros, so that training starts exactly at what is guided, and the doctor learns nothing but how to change it: the ratio of
the best policy to the reference, by which any patient can be multiplied. It says so in its config, and is otherwise a causal
language model like any other.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ._compat import (
    LabelledStates,
    backbone_of,
    fused_lm_head,
    fused_logps,
    has_plain_head,
    inference,
    is_sharded,
    labelled_logits,
    load_shared_out,
    prove_head,
    share_out,
    shares_out,
)
from .adapters import trained_exponents
from .atomic import FORMAT, check_format
from .guidance_head import GuidanceHead, constant_over
from .head_adapter import start_head_at, starts_at_zero
from .named_model import NamedModel, check_there


if TYPE_CHECKING:
    from peft import PeftModel


NUM_ROWS = 8  # read at once, before training
GUIDANCE_FILE = "guidance.json"
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
            Whether the head becomes a [`~trl_tfpo.guidance_head.GuidanceHead`], and the weights of the present
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
    if in_span and type(head) is torch.nn.Linear and head.bias is None and (is_outline or prove_head(model).is_plain):
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
    Let a doctor with a [`~trl_tfpo.guidance_head.GuidanceHead`] start with the same logits at every state, in place, or one with
    an adapter on its head with the same added to its own. Others are left as they are.

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


def former_doctor(doctor: "PreTrainedModel | PeftModel | NamedModel") -> PreTrainedModel | NamedModel:
    """
    A frozen copy of the doctor as it is before training, to be guided in training in the patient's stead.

    Args:
        doctor ([`~transformers.PreTrainedModel`] or [`~trl_tfpo.named_model.NamedModel`]):
            The language model. One that is given by name is loaded a second time, when it is first read.

    Raises:
        `ValueError`: when the doctor knows nothing but how to guide.
    """
    if isinstance(doctor, NamedModel):
        return NamedModel(doctor.name, **doctor.init_kwargs)
    if is_guidance(doctor):
        raise ValueError(
            "With `policy='ratio'` the doctor starts as a language model, which is guided in training. Got one that has "
            "already learned to guide; start from what it was before, or train it for its patient with `policy='guided'`."
        )
    return copy.deepcopy(doctor)


def keep_patient(patient: PreTrainedModel | NamedModel, accelerator: Accelerator) -> torch.nn.Module:
    """
    What the doctor guides, next to it: shared out between the processes where the engine shares out the doctor (ZeRO-3,
    FSDP2), otherwise whole in each. Quantized, or spread over devices, it stays as it is.

    Args:
        patient ([`~transformers.PreTrainedModel`] or [`~trl_tfpo.named_model.NamedModel`]):
            The frozen model. One that has not been loaded yet is loaded in parts under ZeRO-3.
        accelerator ([`~accelerate.Accelerator`]):
            Of the training.

    Returns:
        `torch.nn.Module`: what [`read_patient`] reads, in all processes at the same time.
    """
    if isinstance(patient, NamedModel):
        if (
            shares_out(accelerator)
            and "loaded" not in vars(patient)
            and "quantization_config" not in patient.init_kwargs
        ):
            return share_out(load_shared_out(patient.name, **patient.init_kwargs), accelerator)
        patient = patient.loaded
    is_spread = len(set(getattr(patient, "hf_device_map", {}).values())) > 1
    if getattr(patient, "is_quantized", False) or is_spread:
        return patient
    return share_out(patient, accelerator) if shares_out(accelerator) else patient.to(accelerator.device)


def read_patient(
    patient: PreTrainedModel,
    *,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
) -> tuple[LabelledStates | torch.Tensor, torch.Tensor]:
    """
    What the patient, or its stand-in, says of completions, under no instruction but the prompt.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The frozen model; read in eval mode, without gradients.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            Which tokens are real.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            The tokens of the assistant, N in all rows together, boolean.

    Returns:
        [`~trl_tfpo._compat.LabelledStates`] or `torch.Tensor` of shape `(N, V)`: what stands for the logits where completion
        tokens are predicted, row by row, or the logits themselves, float32, of a model for which that is not enough; and
        `torch.Tensor` of shape `(B, T)`: log-probabilities of the completion tokens in nats, left-aligned, zero after.
    """
    labels = input_ids.masked_fill(~completion_mask, -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    with inference(patient):
        if has_plain_head(patient):
            with fused_lm_head(patient):
                log_probs, guided = fused_logps(patient, patient, labels, **inputs)
            logps = log_probs.float().to(input_ids.device)[completion_mask[:, 1:]]  # (N,)
        else:
            guided = labelled_logits(patient, patient, labels, **inputs).to(input_ids.device)  # (N, V)
            logps = guided.log_softmax(dim=-1).gather(1, input_ids[completion_mask][:, None]).squeeze(1)  # (N,)
    num_tokens = completion_mask.sum(dim=1)  # (B,)
    is_token = torch.arange(int(num_tokens.max()), device=logps.device) < num_tokens[:, None]  # (B, T)
    return guided, logps.new_zeros(is_token.shape).masked_scatter(is_token, logps)


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
