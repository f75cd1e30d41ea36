# SPDX-License-Identifier: Apache-2.0

"""
The function behind `patient.generate(custom_generate="<doctor>", trust_remote_code=True)`.

The file `custom_generate/generate.py` in the folder of a doctor imports [`generate`].
"""

import functools
import inspect
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .decoding.doctors import Doctor
from .decoding.exponents import Exponent, default_beta
from .decoding.generation import guided_generate
from .decoding.loading import load_guiding_doctor
from .decoding.logits_processor import DoctorGuidedLogitsProcessor
from .models.strengths import beta_for_kl


__all__ = ["generate"]

NUM_LOADED = 2  # doctors that stay in memory


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    doctor: str | os.PathLike | None = None,
    alpha: Exponent | None = None,
    beta: Exponent | None = None,
    kl: float | None = None,
    **kwargs: object,
) -> ModelOutput | torch.Tensor:
    """
    Run [`guided_generate`] with the doctor of a Hub repository or folder.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient.
        inputs, input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts, left-padded, under one of the two names.
        doctor (`str`, *optional*):
            Hub id or folder. The default is the `custom_generate` argument of `model.generate`.
        alpha, beta (*optional*):
            Exponents of patient and doctor. The defaults are those of
            [`DoctorGuidedLogitsProcessor.from_pretrained`].
        kl (`float`, *optional*):
            Strength in nats instead of exponents, see [`DoctorGuidedLogitsProcessor.from_pretrained`].
        **kwargs:
            Further arguments of `generate`, such as `attention_mask`.

    Returns:
        The output of `model.generate`.

    Raises:
        `ValueError`: without a doctor or a prompt; if `kl` is out of range, or comes with exponents or with a doctor
            without a table; on errors of [`load_doctor`], [`DoctorGuidedLogitsProcessor`] and [`guided_generate`].
    """
    doctor = doctor or _custom_generate_of_caller()
    if doctor is None:
        raise ValueError(
            "Guidance needs a doctor. Got none; call `patient.generate(custom_generate=DOCTOR, "
            "trust_remote_code=True)`, or pass `doctor=DOCTOR`."
        )
    prompts = inputs if input_ids is None else input_ids
    if prompts is None:
        raise ValueError("Guidance needs prompts. Got none; pass `input_ids`.")
    table = None
    if kl is not None:
        beta, table = beta_for_kl([doctor], kl, {"alpha": alpha, "beta": beta})
    weights = [file.stat().st_mtime_ns for file in Path(doctor).glob("*.safetensors")]
    loaded = _load(str(doctor), model.device, max(weights, default=None))
    guide = DoctorGuidedLogitsProcessor(loaded, alpha, default_beta(loaded.exponents) if beta is None else beta)
    guide.strengths = table
    arguments: dict = kwargs
    return guided_generate(model, guide, input_ids=prompts, **arguments)


def _custom_generate_of_caller() -> str | None:
    """
    Return the `custom_generate` argument of the `model.generate` call that runs [`generate`].

    `model.generate` does not pass this argument on, so it is read from the local variables of the call. The location
    of the code does not reveal the folder, because transformers runs a cached copy. A path in the code would be wrong
    after the folder is moved or uploaded. `tests/test_hub.py` fails if transformers renames the variable.
    """
    frame = inspect.currentframe()
    for _ in range(2):  # to `generate`, and to its caller
        frame = frame and frame.f_back
    name = frame.f_locals.get("custom_generate") if frame else None
    return name if isinstance(name, str) else None


@functools.lru_cache(maxsize=NUM_LOADED)
def _load(doctor: str, device: torch.device, written: int | None) -> Doctor:
    """Load a doctor. The time of the last change, `written`, is part of the cache key."""
    return load_guiding_doctor(doctor, device_map={"": device})
