# SPDX-License-Identifier: Apache-2.0

"""What `patient.generate(custom_generate="<doctor>", trust_remote_code=True)` runs: the doctor's folder refers to it."""

import functools
import inspect
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .decoding.doctors import Doctor
from .decoding.exponents import Weight, default_beta
from .decoding.generation import guided_generate
from .decoding.logits_processor import DoctorGuidedLogitsProcessor
from .models.adapters import trained_exponents
from .models.doctor import load_doctor
from .models.token_credits import load_credits


NUM_LOADED = 2  # doctors that stay loaded for the next call


def generate(
    model: PreTrainedModel,
    inputs: torch.LongTensor | None = None,
    *,
    input_ids: torch.LongTensor | None = None,
    doctor: str | None = None,
    alpha: Weight | None = None,
    beta: Weight | None = None,
    **kwargs,
) -> ModelOutput | torch.LongTensor:
    """
    [`guided_generate`] by the doctor of a Hub repository or folder.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient.
        inputs, input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts, left-padded, under either name.
        doctor (`str`, *optional*):
            Hub id or folder. Defaults to what `generate` was given as `custom_generate`.
        alpha, beta (*optional*):
            Weights of patient and doctor, as of [`DoctorGuidedLogitsProcessor.from_pretrained`]: by default those for
            which the doctor was trained.
        **kwargs:
            Anything else for `generate`, such as `attention_mask`.

    Returns:
        What `model.generate` returns.

    Raises:
        `ValueError`: when there is no doctor, and whatever [`guided_generate`] refuses.
    """
    if doctor is None:
        # `generate` does not say where it found the function that it calls
        doctor = inspect.currentframe().f_back.f_locals.get("custom_generate")
    if not isinstance(doctor, str):
        raise ValueError(
            "Guidance needs a doctor. Got none; call `patient.generate(custom_generate=DOCTOR, trust_remote_code=True)`, "
            "or pass `doctor=DOCTOR`."
        )
    weights = [file.stat().st_mtime_ns for file in Path(doctor).glob("*.safetensors")]
    loaded, trained_beta = _load(doctor, model.device, max(weights, default=None))
    guide = DoctorGuidedLogitsProcessor(loaded, alpha, trained_beta if beta is None else beta)
    return guided_generate(model, guide, input_ids=inputs if input_ids is None else input_ids, **kwargs)


@functools.lru_cache(maxsize=NUM_LOADED)
def _load(doctor: str, device: torch.device, written: int | None) -> tuple[Doctor, float]:
    """The doctor, and its weight; loaded again when its folder was `written` again."""
    model = load_doctor(doctor, with_value_head=False, device_map={"": device}).eval()
    return Doctor(model, credits=load_credits(doctor)), default_beta(trained_exponents(model))
