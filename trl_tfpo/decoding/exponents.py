# SPDX-License-Identifier: Apache-2.0

"""
Exponents of patient and doctors: a number, a tensor with one number per prompt, or a schedule of either.

Shapes: B prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch


Number = float | torch.Tensor  # a tensor has shape (B,)
Exponent = Number | Callable[[int], Number]
DEFAULT_BETA = 0.5  # of a doctor that is a language model


def default_beta(trained_exponents: Mapping[str, float], num_language_models: int = 1) -> float:
    """
    Return the default exponent of a doctor: the `beta` of its training, or `DEFAULT_BETA / num_language_models` for a
    language model, which has no [`~trl_tfpo.models.trained_exponents.trained_exponents`].
    """
    return trained_exponents["beta"] if trained_exponents else DEFAULT_BETA / num_language_models


def check_exponent(name: str, value: Exponent) -> Exponent:
    """
    Return an exponent. A schedule is wrapped in a function that checks each number of the schedule.

    Raises:
        `ValueError`: when the exponent is not a finite number, a tensor (B,) of finite numbers, or a schedule. The
            message contains the `name` of the argument.
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
            f"`{name}` must be a number, a tensor with one number per prompt, or a schedule. Got {value!r}; try 0.5."
        ) from error
    if not torch.as_tensor(value).isfinite().all():
        raise ValueError(f"`{name}` must be finite. Got {value}; try 0.5.")
    return value


def exponent_at(exponent: Exponent, step: int) -> Number:
    """Return the exponent after `step` generated tokens."""
    return exponent(step) if callable(exponent) else exponent


def opposite_exponent(exponent: Exponent) -> Exponent:
    """Return the negative of an exponent: the exponent of a doctor's reference."""
    if callable(exponent):
        schedule = exponent
        return lambda step: -schedule(step)
    return -exponent


@overload
def remaining_exponent(betas: Sequence[float]) -> float: ...
@overload
def remaining_exponent(betas: Sequence[Exponent]) -> Exponent: ...
def remaining_exponent(betas: Sequence[Exponent]) -> Exponent:
    """
    Return 1 minus the sum of the doctors' exponents: the exponent of the patient in a mixture.

    Raises:
        `ValueError`: when the result is negative. If an exponent is a schedule, the result is a schedule that raises
            the error when it is called.
    """
    if any(map(callable, betas)):
        return lambda step: _remainder([exponent_at(beta, step) for beta in betas])
    return _remainder([exponent_at(beta, 0) for beta in betas])


def _remainder(betas: Sequence[Number]) -> Number:
    alpha = 1.0 - sum(betas)
    if torch.as_tensor(alpha).min() < -1e-6:
        raise ValueError(
            "The exponents of doctors in a mixture must not exceed 1 in sum, because the patient has the rest. Got "
            f"{betas}, thus `alpha` {alpha}; pass `alpha`, e.g. 1.0 for the product, or smaller exponents."
        )
    return alpha.clamp(min=0.0) if isinstance(alpha, torch.Tensor) else max(alpha, 0.0)
