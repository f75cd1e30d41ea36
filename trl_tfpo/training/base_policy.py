# SPDX-License-Identifier: Apache-2.0

r"""
Balanced policy and base policy for each value of `policy` in the settings.

| `policy` | balanced policy | base policy |
|---|---|---|
| `"ratio"` | base policy times doctor | the doctor before training |
| `"guided"` | base policy times doctor | the patient |
| `"doctor"` (the paper) | the doctor | none |

With a base policy (guided flow),

$$\log \pi(y \mid s) = \log \operatorname{softmax}\big( \log \pi_{\text{base}} + \log \pi_{\text{doctor}} \big),$$

and $\pi_{\text{base}}$ is the reference. The language model head of the doctor starts at zero, or, if rewards are
calibrated and the doctor is not an adapter, at token credits. From zero, training starts at the base policy. The
doctor learns the log-ratio to the base policy, which can multiply any patient with the same tokenizer.
"""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..common._upstream import load_sharded, shard, shards_models
from ..common.language_model import LanguageModel, inference
from ..functional import FactoredLogits
from ..models.logits import completion_logps, read_logits
from ..models.named_model import NamedModel, outline_of
from ..models.trained_exponents import trained_exponents


class Policy:
    """`policy="doctor"`: the doctor alone, without a base policy."""

    has_base = False
    needs_patient = False  # after annotation

    def base(
        self, doctor: "LanguageModel | NamedModel", patient: PreTrainedModel | NamedModel | None
    ) -> "LanguageModel | NamedModel | None":
        """Return the base policy, or `None`. `doctor` is the language model without heads and adapter."""
        return None


class RatioPolicy(Policy):
    """`policy="ratio"`: the base policy is a frozen copy of the doctor before training."""

    has_base = True

    def base(self, doctor, patient):
        if trained_exponents(outline_of(doctor)):
            raise ValueError(
                "With `policy='ratio'` the doctor must start as a language model. Got a doctor of guided flow; start "
                "from the original language model, or continue training with `policy='guided'` and its patient."
            )
        if isinstance(doctor, NamedModel):
            return NamedModel(doctor.name, **doctor.init_kwargs)
        return copy.deepcopy(doctor)


class GuidedPolicy(Policy):
    """`policy="guided"`: the base policy is the patient."""

    has_base = True
    needs_patient = True

    def base(self, doctor, patient):
        return patient


POLICIES = {"doctor": Policy(), "ratio": RatioPolicy(), "guided": GuidedPolicy()}


def place_base_policy(model: "LanguageModel | NamedModel", accelerator: Accelerator) -> torch.nn.Module:
    """
    Load the base policy and move it to the accelerator, in shards if the doctor is sharded (ZeRO-3, FSDP2).

    A quantized model, or one with a device map over several devices, is not moved. All processes must run a sharded
    model at the same time.
    """
    if isinstance(model, NamedModel):
        is_loaded, is_quantized = "loaded" in vars(model), "quantization_config" in model.init_kwargs
        if shards_models(accelerator) and not is_loaded and not is_quantized:
            return shard(load_sharded(model.name, **model.init_kwargs), accelerator)
        model = model.loaded
    is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if getattr(model, "is_quantized", False) or is_spread:
        return model
    return shard(model, accelerator) if shards_models(accelerator) else model.to(accelerator.device)


def read_base_policy(
    model: Any,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
) -> tuple[list[FactoredLogits | torch.Tensor], torch.Tensor]:
    """
    Compute logits and log-probabilities of completions under the base policy, in eval mode and without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The frozen model.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts without faces, and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            1 for tokens, 0 for padding.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the tokens of the assistant.

    Returns:
        Terms of the logits from [`~trl_tfpo.models.logits.read_logits`], at the positions that predict completion
        tokens; and `torch.Tensor` of shape `(B, T)`: log-probabilities of the completion tokens in nats, left-aligned,
        padded with 0.
    """
    with inference(model):
        logits, _ = read_logits(model, completion_mask[:, 1:], input_ids=input_ids, attention_mask=attention_mask)
        logps = completion_logps(logits, input_ids, completion_mask)
    return [term.detach() for term in logits], logps
