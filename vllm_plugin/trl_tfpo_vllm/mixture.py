# SPDX-License-Identifier: Apache-2.0

"""
Guided policy from the logits of patient and doctors; weights as columns of hidden states.

Shapes: T tokens, V vocabulary, D doctors and references. A row of weights has the exponent of the patient, then those
of doctors and references.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


NUM_PIECES = 3  # of 8 bits each in bfloat16: together the 24 bits of a float32


def guided_logps(
    patient_logits: torch.Tensor, doctor_logits: Sequence[torch.Tensor], weights: torch.Tensor
) -> torch.Tensor:
    r"""
    Log-probabilities of the next token under the guided policy, $\pi \propto \pi_{\text{patient}}^\alpha \prod_i
    \pi_{\text{doctor}_i}^{\beta_i}$.

    A token with logit minus infinity under the patient is excluded for any exponent, under a doctor only if its
    exponent is positive. Tokens without a logit of some model are excluded, because the padding of vocabularies may
    differ.

    Args:
        patient_logits (`torch.Tensor` of shape `(T, V)`):
            Logits or log-probabilities of the patient, in float32 or float64.
        doctor_logits (sequence of `torch.Tensor` of shape `(T, V')`):
            Logits or log-probabilities of each doctor. `V'` may differ from `V`.
        weights (`torch.Tensor` of shape `(T, 1 + D)`):
            Exponents of the patient and of each doctor.

    Returns:
        `torch.Tensor` of shape `(T, V)`: log-probabilities, in nats.

    Raises:
        `ValueError`: when there is not one exponent for each model.
    """
    if weights.size(-1) != 1 + len(doctor_logits):
        raise ValueError(
            f"`weights` must have one column for the patient and one for each doctor. Got {weights.size(-1)} columns "
            f"for {len(doctor_logits)} doctors."
        )
    weights = weights.to(patient_logits)
    size = patient_logits.size(-1)
    num_common = min(size, *(logits.size(-1) for logits in doctor_logits)) if doctor_logits else size
    patient_logits = patient_logits[:, :num_common]
    guided = _weighted(patient_logits, weights[:, :1])
    for index, logits in enumerate(doctor_logits, start=1):
        guided = guided + _weighted(logits[:, :num_common].to(patient_logits), weights[:, index : index + 1])
    guided = guided.masked_fill(patient_logits == float("-inf"), float("-inf")).log_softmax(dim=-1)
    return F.pad(guided, (0, size - num_common), value=float("-inf"))


def _weighted(logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight * log pi`, (T, V). Minus infinity becomes 0 unless the weight (T, 1) is positive."""
    is_absent = logits == float("-inf")
    weighted = weight * logits.log_softmax(dim=-1).masked_fill(is_absent, 0)
    return weighted.masked_fill(is_absent & (weight > 0), float("-inf"))


def pack_weights(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Convert float32 weights to another dtype without loss of precision, as sums of three numbers.

    Args:
        weights (`torch.Tensor` of shape `(T, 1 + D)`):
            Exponents, in float32.
        dtype (`torch.dtype`):
            Dtype of the hidden states.

    Returns:
        `torch.Tensor` of shape `(T, 3 * (1 + D))`.
    """
    pieces, rest = [], weights
    for _ in range(NUM_PIECES):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    return torch.cat(pieces, dim=-1)


def unpack_weights(packed: torch.Tensor) -> torch.Tensor:
    """Return the float32 weights (T, 1 + D) from the output of [`pack_weights`], (T, 3 * (1 + D))."""
    return packed.float().unflatten(-1, (NUM_PIECES, -1)).sum(dim=-2)
