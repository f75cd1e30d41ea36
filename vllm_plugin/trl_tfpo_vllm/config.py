# SPDX-License-Identifier: Apache-2.0

"""Arguments of `vllm.LLM` for a patient with doctors."""

import os
from collections.abc import Mapping
from typing import Any

from .guidance import ARCHITECTURE, PATIENT, DoctorEntry, Guidance
from .saved_doctor import read_doctor


DEFAULT_BETA = 0.5  # of a doctor that is a language model; the same as in trl-tfpo


def guided_config(
    patient: str | os.PathLike,
    doctors: Mapping[str, str | os.PathLike],
    alpha: float | None = None,
    beta: float | Mapping[str, float] | None = None,
    reference: Mapping[str, str | os.PathLike] | None = None,
) -> dict[str, Any]:
    """
    Return keyword arguments of `vllm.LLM` for a patient with doctors.

    Args:
        patient (`str` or `os.PathLike`):
            Folder or Hub id of the patient.
        doctors (`Mapping[str, str]`):
            Folders of doctors by name: full models or LoRA adapters.
        alpha (`float`, *optional*):
            Default exponent of the patient. Without it, 1 minus the exponents of the doctors that are language models
            without a reference.
        beta (`float` or `Mapping[str, float]`, *optional*):
            Default exponent of the doctors, or of some of them by name. Without it, a doctor of guided flow has the
            exponent of its training, a doctor with a reference has 0.5, and other language models share 0.5.
        reference (`Mapping[str, str]`, *optional*):
            Reference of some doctors, by name: the model before training, a folder or the patient. Its exponent is
            `-beta`.

    Returns:
        `dict`: `model` and `hf_overrides`. Further arguments of `vllm.LLM` can be added.

    Raises:
        `ValueError`: when a doctor or reference is not a folder with a model or a plain LoRA, a doctor is its own
            reference, a language model is the reference of a doctor of guided flow, or names or exponents are invalid.
    """
    saved = {name: read_doctor(path) for name, path in doctors.items()}
    references = {name: _reference(patient, path) for name, path in (reference or {}).items()}
    betas = beta if isinstance(beta, Mapping) else {} if beta is None else dict.fromkeys(doctors, beta)
    for argument, given in (("beta", betas), ("reference", references)):
        if unknown := sorted(set(given) - set(doctors)):
            raise ValueError(f"`{argument}` must name doctors among {sorted(doctors)}. Got {unknown}; rename them.")
    for name, path in references.items():
        _check_reference(name, path, saved[name].exponents, is_itself=os.path.abspath(doctors[name]) == path)
    num_mixed = sum(not one.exponents and name not in references for name, one in saved.items())
    entries = []
    for name, one in saved.items():
        default = one.exponents["beta"] if one.exponents else DEFAULT_BETA / (1 if name in references else num_mixed)
        entries.append(
            DoctorEntry(
                name=name,
                path=os.path.abspath(doctors[name]),
                beta=betas.get(name, default),
                is_language_model=not one.exponents,
                reference=references.get(name),
            )
        )
    overrides = {"architectures": [ARCHITECTURE], **Guidance(tuple(entries), alpha).to_fields()}
    return {"model": os.fspath(patient), "hf_overrides": overrides}


def _reference(patient: str | os.PathLike, path: str | os.PathLike) -> str:
    """Return a reference as recorded for the engine: `PATIENT`, or an absolute path."""
    is_patient = os.fspath(path) == os.fspath(patient)
    if is_patient or (os.path.isdir(path) and os.path.realpath(path) == os.path.realpath(patient)):
        return PATIENT
    read_doctor(path)
    return os.path.abspath(path)


def _check_reference(name: str, path: str, exponents: Mapping[str, float], is_itself: bool) -> None:
    """Raise `ValueError` when the reference is the doctor itself, or a language model for a doctor of guided flow."""
    if is_itself:
        raise ValueError(
            f"`reference` must be the doctor before training. Got the folder of {name!r} itself, which cancels the "
            "guidance; pass the folder of the model before training."
        )
    if exponents and (path == PATIENT or not read_doctor(path).exponents):
        raise ValueError(
            f"`reference` is for a doctor that is a language model. Got one for {name!r}, a doctor of guided flow, "
            "whose logits already are a log-ratio; leave it out."
        )
