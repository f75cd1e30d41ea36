# SPDX-License-Identifier: Apache-2.0

r"""
Balanced policy and base policy for each value of `policy` in the settings.

| `policy` | the flow is balanced under | base policy |
|---|---|---|
| `"ratio"` | base policy times doctor | the doctor before training |
| `"guided"` | base policy times doctor | the patient |
| `"doctor"` (the paper) | the doctor | none |

With a base policy (guided flow),

$$\log \pi(y \mid s) = \log \operatorname{softmax}\big( \log \pi_{\text{base}} + \log \pi_{\text{doctor}} \big),$$

and $\pi_{\text{base}}$ is the reference. The doctor's language model head starts at zero, so training starts at the
base policy, and the doctor learns the log-ratio to it. This ratio can multiply any patient with the same tokenizer.
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
from ..models.named_model import NamedModel
from ..models.trained_exponents import trained_exponents


class Policy:
    """`policy="doctor"`: the doctor's own policy, without a base policy."""

    has_base = False
    needs_patient = False  # in training, beyond annotation

    def base(
        self, doctor: "LanguageModel | NamedModel", patient: PreTrainedModel | NamedModel | None
    ) -> "LanguageModel | NamedModel | None":
        """The base policy, made before the doctor gets its heads. `None` for a doctor with a policy of its own."""
        return None


class RatioPolicy(Policy):
    """`policy="ratio"`: the base policy is a frozen copy of the doctor before training."""

    has_base = True

    def base(self, doctor, patient):
        if isinstance(doctor, NamedModel):
            return NamedModel(doctor.name, **doctor.init_kwargs)  # loaded when it is first read
        if trained_exponents(doctor):
            raise ValueError(
                "With `policy='ratio'` the doctor starts as a language model. Got a doctor of guided flow; start from "
                "the model before its training, or continue its training for its patient with `policy='guided'`."
            )
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
    Put the base policy where the doctor is trained: sharded where the engine shards the doctor (ZeRO-3, FSDP2),
    otherwise whole in each process. A model that is quantized, or spread over devices, stays where it is.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~trl_tfpo.models.named_model.NamedModel`]):
            The frozen model. Under ZeRO-3, a model that is not loaded yet is loaded in shards.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the training.

    Returns:
        `torch.nn.Module`: the model for [`read_base_policy`]. All processes must read it at the same time.
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
    Compute logits and log-probabilities of completions under the base policy. Prompts contain no face.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The frozen model; read in eval mode, without gradients.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            Which tokens are real.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the tokens of the assistant: N in all rows together.

    Returns:
        Logits where completion tokens are predicted, as [`~trl_tfpo.models.logits.read_logits`] returns them; and
        `torch.Tensor` of shape `(B, T)`: log-probabilities of the completion tokens in nats, left-aligned, padded with
        0.
    """
    with inference(model):
        logits, _ = read_logits(model, completion_mask[:, 1:], input_ids=input_ids, attention_mask=attention_mask)
        logps = completion_logps(logits, input_ids, completion_mask)
    return [one.detach() for one in logits], logps
