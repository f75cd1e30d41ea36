# SPDX-License-Identifier: Apache-2.0

"""
The function behind `patient.generate(custom_generate="<doctor>", trust_remote_code=True)`.

The file `custom_generate/generate.py` in the folder of a doctor imports `generate` from here.
"""

import functools
import inspect
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .decoding.doctors import Doctor
from .decoding.exponents import Weight, default_beta
from .decoding.generation import guided_generate
from .decoding.logits_processor import DoctorGuidedLogitsProcessor
from .models.saved_doctor import load_doctor
from .models.token_credits import load_credits
from .models.trained_exponents import trained_exponents


__all__ = ["generate"]

NUM_LOADED = 2  # doctors that stay loaded for the next call


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    doctor: str | os.PathLike | None = None,
    alpha: Weight | None = None,
    beta: Weight | None = None,
    **kwargs: object,
) -> ModelOutput | torch.Tensor:
    """
    Run [`guided_generate`] with the doctor of a Hub repository or folder.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The patient.
        inputs, input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts, left-padded, under either name.
        doctor (`str`, *optional*):
            Hub id or folder. By default the `custom_generate` of the `model.generate` call that runs this function.
        alpha, beta (*optional*):
            Exponents of patient and doctor, as in [`DoctorGuidedLogitsProcessor.from_pretrained`]. By default those of
            the doctor's training.
        **kwargs:
            Further arguments of `generate`, such as `attention_mask`.

    Returns:
        What `model.generate` returns.

    Raises:
        `ValueError`: when there is no doctor or no prompt, and on what [`guided_generate`] refuses.
    """
    doctor = doctor or _custom_generate_of_caller()
    if doctor is None:
        raise ValueError(
            "Guidance needs a doctor. Got none; call `patient.generate(custom_generate=DOCTOR, "
            "trust_remote_code=True)`, or pass `doctor=DOCTOR`."
        )
    prompts = inputs if input_ids is None else input_ids
    if prompts is None:
        raise ValueError("Guidance needs prompts. Got none; pass `input_ids`, which the doctor reads too.")
    weights = [file.stat().st_mtime_ns for file in Path(doctor).glob("*.safetensors")]
    loaded, trained_beta = _load(str(doctor), model.device, max(weights, default=None))
    guide = DoctorGuidedLogitsProcessor(loaded, alpha, trained_beta if beta is None else beta)
    arguments: dict = kwargs
    return guided_generate(model, guide, input_ids=prompts, **arguments)


def _custom_generate_of_caller() -> str | None:
    """
    The `custom_generate` argument of the `model.generate` call that runs [`generate`].

    This reads a local variable of `model.generate`, because nothing else names the folder. transformers withholds this
    one argument from the function. It runs a copy of the folder's code from a cache that is addressed by the content
    of the code, so the code does not know its folder either. A path written into the code would be wrong after the
    folder is moved, copied or uploaded. `tests/test_hub.py` fails if transformers renames the variable. Calls with
    `doctor=` do not depend on it.
    """
    frame = inspect.currentframe()
    for _ in range(2):  # from here to `generate` to its caller
        frame = frame and frame.f_back
    name = frame.f_locals.get("custom_generate") if frame else None
    return name if isinstance(name, str) else None


@functools.lru_cache(maxsize=NUM_LOADED)
def _load(doctor: str, device: torch.device, written: int | None) -> tuple[Doctor, float]:
    """
    Load a doctor and the exponent of its training. They are loaded again if the weights were `written` at another
    time.
    """
    model = load_doctor(doctor, with_value_head=False, device_map={"": device}).eval()
    return Doctor(model, credits=load_credits(doctor)), default_beta(trained_exponents(model))
