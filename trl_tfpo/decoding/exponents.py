# SPDX-License-Identifier: Apache-2.0

"""
Exponents of patient and doctors: a number, a tensor with one number for each prompt, or a schedule of either.

Shapes: B prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch


Number = float | torch.Tensor  # a tensor has shape (B,)
Weight = Number | Callable[[int], Number]
DEFAULT_BETA = 0.5  # of a doctor that is a language model


def default_beta(trained_exponents: Mapping[str, float], num_language_models: int = 1) -> float:
    """
    Return the exponent that a doctor has by default.

    Args:
        trained_exponents (`Mapping[str, float]`):
            Exponents of its training, see [`~trl_tfpo.models.adapters.trained_exponents`]. Empty for a language model.
        num_language_models (`int`, *optional*, defaults to `1`):
            Number of doctors among which `DEFAULT_BETA` is divided.

    Returns:
        `float`: the `beta` of its training; for a language model its share of `DEFAULT_BETA`.
    """
    return trained_exponents["beta"] if trained_exponents else DEFAULT_BETA / num_language_models


def check_weight(name: str, value: Weight) -> Weight:
    """
    Check an exponent. What a schedule returns is checked at each call of the schedule.

    Args:
        name (`str`):
            Name of the argument, for the message.
        value (`float`, `torch.Tensor` of shape `(B,)` or callable):
            The exponent.

    Returns:
        `float`, `torch.Tensor` of shape `(B,)` or callable.

    Raises:
        `ValueError`: when the exponent is neither a finite number, nor a tensor of finite numbers, nor a schedule.
    """
    if callable(value):
        schedule = value
        return lambda step: _check_number(name, schedule(step))
    return _check_number(name, value)


def _check_number(name: str, value: Number) -> Number:
    try:
        value = value if isinstance(value, torch.Tensor) and value.dim() == 1 else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number, a tensor with one for each prompt, or a schedule. Got {value!r}; try 0.5."
        ) from error
    if not torch.as_tensor(value).isfinite().all():
        raise ValueError(f"`{name}` must be finite. Got {value}; try 0.5.")
    return value


def weight_at(weight: Weight, step: int) -> Number:
    """Return the exponent after `step` generated tokens."""
    return weight(step) if callable(weight) else weight


def opposite_weight(weight: Weight) -> Weight:
    """Return minus the exponent: the exponent of a doctor's reference."""
    if callable(weight):
        schedule = weight
        return lambda step: -schedule(step)
    return -weight


@overload
def remaining_weight(betas: Sequence[float]) -> float: ...
@overload
def remaining_weight(betas: Sequence[Weight]) -> Weight: ...
def remaining_weight(betas: Sequence[Weight]) -> Weight:
    """
    Return 1 minus the sum of the doctors' exponents: the exponent of the patient in a mixture.

    Raises:
        `ValueError`: when it is negative. A schedule raises when it is called.
    """
    if any(map(callable, betas)):
        return lambda step: _remainder([weight_at(beta, step) for beta in betas])
    return _remainder([weight_at(beta, 0) for beta in betas])


def _remainder(betas: Sequence[Number]) -> Number:
    alpha = 1.0 - sum(betas)
    if torch.as_tensor(alpha).min() < -1e-6:
        raise ValueError(
            "The exponents of the doctors in a mixture must not exceed 1 in sum, as the patient has the rest. Got "
            f"{betas}, thus `alpha` {alpha}; pass `alpha`, e.g. 1.0 for the product, or smaller exponents."
        )
    return alpha.clamp(min=0.0) if isinstance(alpha, torch.Tensor) else max(alpha, 0.0)
