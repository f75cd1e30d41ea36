# SPDX-License-Identifier: Apache-2.0

"""
Exponents of patient and doctors: numbers, tensors with one for each prompt, or schedules of either.

Shapes: B prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch


Weight = float | torch.Tensor | Callable[[int], float | torch.Tensor]
DEFAULT_BETA = 0.5  # of a doctor that is a language model


def default_beta(trained_exponents: Mapping[str, float], num_language_models: int = 1) -> float:
    """
    The exponent that a doctor has by default.

    Args:
        trained_exponents (`Mapping[str, float]`):
            The exponents of its training, see [`~trl_tfpo.models.adapters.trained_exponents`]; empty for a language model.
        num_language_models (`int`, *optional*, defaults to `1`):
            Language models among which `DEFAULT_BETA` is divided.

    Returns:
        `float`: `beta` of its training, or its part of `DEFAULT_BETA`.
    """
    return trained_exponents["beta"] if trained_exponents else DEFAULT_BETA / num_language_models


def check_weight(name: str, value: Weight) -> Weight:
    """A finite float, a finite tensor (B,), or a schedule of either."""
    if callable(value):
        return lambda step: check_weight(name, value(step))
    try:
        value = value if isinstance(value, torch.Tensor) and value.dim() == 1 else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number, a tensor with one for each prompt, or a schedule. Got {value!r}; try 0.5."
        ) from error
    if not torch.as_tensor(value).isfinite().all():
        raise ValueError(f"`{name}` must be finite. Got {value}; try 0.5.")
    return value


def weight_at(weight: Weight, step: int) -> float | torch.Tensor:
    """The weight after so many generated tokens."""
    return weight(step) if callable(weight) else weight


def opposite_weight(weight: Weight) -> Weight:
    """Minus the weight: that of a doctor's reference."""
    return (lambda step: -weight(step)) if callable(weight) else -weight


@overload
def remaining_weight(betas: Sequence[float]) -> float: ...
@overload
def remaining_weight(betas: Sequence[Weight]) -> Weight: ...
def remaining_weight(betas: Sequence[Weight]) -> Weight:
    """The exponent of the patient in a mixture: what the doctors leave of 1."""
    if any(map(callable, betas)):
        return lambda step: remaining_weight([weight_at(beta, step) for beta in betas])
    alpha = 1.0 - sum(betas)
    if torch.as_tensor(alpha).min() < -1e-6:
        raise ValueError(
            "The exponents of the doctors in a mixture must not exceed 1 in sum, as the patient has the rest. Got "
            f"{betas}, thus `alpha` {alpha}; pass `alpha`, e.g. 1.0 for the product, or smaller exponents."
        )
    return alpha.clamp(min=0.0) if isinstance(alpha, torch.Tensor) else max(alpha, 0.0)
