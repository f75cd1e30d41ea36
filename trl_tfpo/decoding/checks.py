# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments of a guide."""

import math


def check_counts(num_doctors: int, num_betas: int, num_references: int) -> None:
    """Raise `ValueError` unless there is a doctor, and an exponent and a reference or `None` for each."""
    if not num_doctors or not num_doctors == num_betas == num_references:
        raise ValueError(
            f"There must be at least one doctor, and a `beta` and a `reference` for each. Got {num_doctors}, "
            f"{num_betas} and {num_references}; pass `None` for a doctor without a reference."
        )


def check_settings(min_patient_prob: float, min_patient_entropy: float, cache_implementation: str | None) -> None:
    """Raise `ValueError` if a threshold is out of range, or the cache implementation is unknown."""
    if not (0 <= min_patient_prob <= 1 and 0 <= min_patient_entropy < math.inf):
        raise ValueError(
            "`min_patient_prob` must be in [0, 1], and `min_patient_entropy` a number of nats, at least 0. Got "
            f"{min_patient_prob} and {min_patient_entropy}; pass 0 to switch them off."
        )
    if cache_implementation not in (None, "static"):
        raise ValueError(
            f"`cache_implementation` of doctors must be 'static' or None. Got {cache_implementation!r}; leave it "
            "out for caches that grow."
        )
