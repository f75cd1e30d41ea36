# SPDX-License-Identifier: Apache-2.0

"""
Names and exponents of the doctors of an engine, and the exponents of a request.

Keys of a request, in `SamplingParams(extra_args=...)` or over HTTP in `vllm_xargs`:

- `alpha`: exponent of the patient. The default is that of the engine, or 1 minus the exponents of the doctors that are
  language models without a reference. Other doctors do not reduce it.
- `beta_NAME`: exponent of the doctor with this name. The default is that of the engine. The doctor's reference has the
  opposite exponent.

This module imports only the standard library, so the command that prints flags needs neither torch nor vLLM.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


ARCHITECTURE = "GuidedForCausalLM"
MAX_WEIGHT = 10.0  # in absolute value; the same as in `trl-tfpo serve`
PATIENT = "patient"  # as the reference of a doctor; other references are absolute paths
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class DoctorEntry:
    """
    A doctor of the engine.

    Args:
        name (`str`):
            Name in requests: letters, digits, `_` and `-`.
        path (`str`):
            Folder of the doctor.
        beta (`float`):
            Default exponent.
        is_language_model (`bool`):
            False for a doctor of guided flow.
        reference (`str`, *optional*):
            Folder of the doctor before training, or `"patient"` if it is the patient. Its exponent is `-beta`, so the
            *ratio* of doctor and reference guides the patient.
    """

    name: str
    path: str
    beta: float
    is_language_model: bool
    reference: str | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether the default exponent of the patient is reduced by that of the doctor (the *mixture*)."""
        return self.is_language_model and self.reference is None


@dataclass(frozen=True)
class Guidance:
    """
    The doctors of an engine, in order, and the default exponent of the patient.

    Args:
        doctors (`tuple[DoctorEntry, ...]`):
            Doctors with different names, at least one.
        alpha (`float`, *optional*):
            Default exponent of the patient. Without it, 1 minus the exponents of the doctors that are language models
            without a reference.

    Raises:
        `ValueError`: when there is no doctor, a name is invalid or not unique, a default exponent is out of range, or
            the default exponents of a mixture exceed 1 in sum without `alpha`.
    """

    doctors: tuple[DoctorEntry, ...]
    alpha: float | None = None

    def __post_init__(self):
        names = [doctor.name for doctor in self.doctors]
        if not names or len(set(names)) != len(names) or not all(map(_NAME.fullmatch, names)):
            raise ValueError(
                "There must be at least one doctor, with different names of letters, digits, `_` and `-`. Got "
                f"{names}; rename them."
            )
        self.request_weights(None)

    @classmethod
    def from_fields(cls, doctors: Iterable[Mapping[str, Any]], alpha: float | None) -> "Guidance":
        """Read the fields `guided_doctors` and `guided_alpha` of the patient's config."""
        return cls(tuple(DoctorEntry(**doctor) for doctor in doctors), alpha)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields that [`from_fields`] reads."""
        return {"guided_doctors": [asdict(doctor) for doctor in self.doctors], "guided_alpha": self.alpha}

    def encoded(self) -> str:
        """Return a Python name for [`decoded`]. vLLM passes classes to processes by name."""
        return "x" + json.dumps(self.to_fields()).encode().hex()

    @classmethod
    def decoded(cls, name: str) -> "Guidance":
        """Read a name from [`encoded`]."""
        fields = json.loads(bytes.fromhex(name.removeprefix("x")))
        return cls.from_fields(fields["guided_doctors"], fields["guided_alpha"])

    @property
    def factors(self) -> list[str]:
        """
        Folders of the models in the product besides the patient: doctors, then references. A model with several roles
        is listed once.
        """
        references = [doctor.reference for doctor in self.doctors if doctor.reference not in (None, PATIENT)]
        return list(dict.fromkeys([doctor.path for doctor in self.doctors] + references))

    def request_weights(self, extra_args: Mapping[str, Any] | None) -> list[float]:
        """
        Return the exponents of the models in a request.

        Args:
            extra_args (`Mapping[str, Any]`, *optional*):
                Keys as above. Other keys are ignored unless they begin with `beta`.

        Returns:
            `list[float]` of length `1 + D`: the exponent of the patient, then of each of the D `factors`. Exponents of
            a model with several roles are added.

        Raises:
            `ValueError`: on an unknown doctor, an exponent that is not a number in [-10, 10], and exponents of a
                mixture above 1 in sum without `alpha`.
        """
        given = extra_args or {}
        keys = {f"beta_{doctor.name}": doctor for doctor in self.doctors}
        if unknown := sorted(key for key in given if key.startswith("beta") and key not in keys):
            raise ValueError(f"Exponents of doctors must be among {sorted(keys)}. Got {unknown}; rename them.")
        betas = [_checked(key, given.get(key, doctor.beta)) for key, doctor in keys.items()]
        alpha = given.get("alpha", self.alpha)
        if alpha is None:
            mixed = [beta for beta, doctor in zip(betas, self.doctors, strict=True) if doctor.is_mixed]
            alpha = 1.0 - sum(mixed)
            if alpha < -1e-6:
                raise ValueError(
                    "The exponents of the doctors in a mixture must not exceed 1 in sum, because the patient has the "
                    f"rest. Got {mixed}; pass `alpha`, e.g. 1.0 for the product, or smaller exponents."
                )
            alpha = max(alpha, 0.0)
        weights = dict.fromkeys([PATIENT, *self.factors], 0.0)
        weights[PATIENT] = _checked("alpha", alpha)
        for beta, doctor in zip(betas, self.doctors, strict=True):
            weights[doctor.path] += beta
            if doctor.reference is not None:
                weights[doctor.reference] -= beta
        return list(weights.values())


def _checked(key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or abs(value) > MAX_WEIGHT:
        raise ValueError(
            f"`{key}` must be a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}. Got {value!r}; try 0.5, or leave it "
            "out for the default."
        )
    return float(value)
