# SPDX-License-Identifier: Apache-2.0

"""Arguments of `vllm.LLM` for a patient with doctors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .guidance import ARCHITECTURE, DoctorEntry, Guidance


DEFAULT_BETA = 0.5  # of doctors that are language models, in sum; the same as in trl-tfpo
FORMAT = 1  # of a doctor's `guidance.json`


def guided_config(
    patient: str | os.PathLike,
    doctors: Mapping[str, str | os.PathLike],
    alpha: float | None = None,
    beta: float | Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """
    Return keyword arguments of `vllm.LLM` for a patient that doctors guide.

    Args:
        patient (`str` or `os.PathLike`):
            Folder or Hub id of the patient.
        doctors (`Mapping[str, str]`):
            Folders of doctors that trl-tfpo saved as full models, by name.
        alpha (`float`, *optional*):
            Default exponent of the patient. Without it, 1 less the exponents of the doctors that are language models.
        beta (`float` or `Mapping[str, float]`, *optional*):
            Default exponent of the doctors, or of some of them by name. Without it, the exponent of the doctor's
            training; doctors that are language models share 0.5.

    Returns:
        `dict`: `model` and `hf_overrides`. Further arguments of `vllm.LLM` can be added.

    Raises:
        `ValueError`: when a doctor is not a folder with a full model, or exponents are unusable.
    """
    trained = {name: trained_exponents(path) for name, path in doctors.items()}
    num_language_models = sum(not exponents for exponents in trained.values())
    given = beta if isinstance(beta, Mapping) else dict.fromkeys(doctors, beta)
    if unknown := sorted(set(given) - set(doctors)):
        raise ValueError(f"`beta` must name doctors among {sorted(doctors)}. Got {unknown}; rename them.")
    entries = []
    for name, path in doctors.items():
        default = trained[name]["beta"] if trained[name] else DEFAULT_BETA / num_language_models
        exponent = given.get(name)
        exponent = default if exponent is None else exponent
        entries.append(DoctorEntry(name, os.path.abspath(path), exponent, is_language_model=not trained[name]))
    guidance = Guidance(tuple(entries), alpha)
    overrides = {"architectures": [ARCHITECTURE], **guidance.to_fields()}
    return {"model": os.fspath(patient), "hf_overrides": overrides}


def trained_exponents(path: str | os.PathLike) -> dict[str, float]:
    """
    Read the exponents that a doctor was trained for, and check that its folder holds a full model.

    Args:
        path (`str` or `os.PathLike`):
            Folder of the doctor.

    Returns:
        `dict[str, float]`: `alpha` and `beta`; empty for a doctor with a policy of its own.

    Raises:
        `ValueError`: when there is no such folder, it holds an adapter, or its format is unknown.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"A doctor must be a full model. Got {str(path)!r}, an adapter; merge it into its base with PEFT's "
            "`merge_and_unload`, and save it with the tokenizer."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"A doctor must be a folder with a full model. Got {str(path)!r}, which has no `config.json`; pass the "
            "folder that `save_model` wrote, or a downloaded snapshot."
        )
    record = folder / "guidance.json"
    if not record.is_file():
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("guidance") or {}
    exponents = json.loads(record.read_text(encoding="utf-8"))
    found = exponents.pop("format", FORMAT)
    if found != FORMAT:
        raise ValueError(
            f"The doctor in {str(path)!r} must have format {FORMAT}. Got format {found}; install the version of "
            "trl-tfpo-vllm that belongs to the trl-tfpo that wrote it."
        )
    return exponents
