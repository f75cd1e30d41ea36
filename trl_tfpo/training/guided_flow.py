# SPDX-License-Identifier: Apache-2.0

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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..common._upstream import backbone_of, inference, is_sharded, load_shared_out, share_out, shares_out
from ..functional import FactoredLogits, token_logps
from ..models.guidance import is_guidance
from ..models.guidance_head import GuidanceHead, constant_over
from ..models.head_adapter import start_head_at, starts_at_zero
from ..models.named_model import NamedModel
from ..models.states import read_logits


if TYPE_CHECKING:
    from peft import PeftModel


NUM_ROWS = 8  # read at once, before training


@torch.no_grad()
def start_at_credits(model: PreTrainedModel, logits: torch.Tensor, rows: Sequence[dict], collate: Callable) -> None:
    """
    Let a doctor with a [`~trl_tfpo.models.guidance_head.GuidanceHead`] start with the same logits at every state, in place, or one with
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


def former_doctor(doctor: "PreTrainedModel | PeftModel | NamedModel") -> PreTrainedModel | NamedModel:
    """
    A frozen copy of the doctor as it is before training, to be guided in training in the patient's stead.

    Args:
        doctor ([`~transformers.PreTrainedModel`] or [`~trl_tfpo.models.named_model.NamedModel`]):
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
        patient ([`~transformers.PreTrainedModel`] or [`~trl_tfpo.models.named_model.NamedModel`]):
            The frozen model. One that has not been loaded yet is loaded in parts under ZeRO-3.
        accelerator ([`~accelerate.Accelerator`]):
            Of the training.

    Returns:
        `torch.nn.Module`: what [`read_base_policy`] reads, in all processes at the same time.
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


def read_base_policy(
    model: PreTrainedModel,
    *,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
) -> tuple[list[FactoredLogits | torch.Tensor], torch.Tensor]:
    """
    What the base policy says of completions, under no instruction but the prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The frozen model; read in eval mode, without gradients.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            Which tokens are real.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            The tokens of the assistant, N in all rows together, boolean.

    Returns:
        Its logits where completion tokens are predicted, as [`~trl_tfpo.models.states.read_logits`] returns them; and
        `torch.Tensor` of shape `(B, T)`: log-probabilities of the completion tokens in nats, left-aligned, zero after.
    """
    has_label = completion_mask[:, 1:]
    with inference(model):
        logits, hidden = read_logits(model, has_label, input_ids=input_ids, attention_mask=attention_mask)
        logps = token_logps(logits=logits, targets=input_ids[:, 1:][has_label].to(hidden.device))  # (N,)
    num_tokens = completion_mask.sum(dim=1)  # (B,)
    is_token = torch.arange(int(num_tokens.max()), device=input_ids.device) < num_tokens[:, None]  # (B, T)
    logps = logps.to(input_ids.device)
    return [one.detach() for one in logits], logps.new_zeros(is_token.shape).masked_scatter(is_token, logps)
