# SPDX-License-Identifier: Apache-2.0

"""Loading of the patient and the doctors given by options."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..common.language_model import LanguageModel
from ..common.precision import default_dtype
from ..data.tokenizer_identity import check_same_tokenizer
from ..models.named_model import NamedModel
from ..models.saved_doctor import load_doctor
from .options import DTYPES


def check_dtype(dtype: str) -> str:
    """Check a dtype, and return it for `from_pretrained`. `"auto"` becomes float32 where half precision is slow."""
    if dtype not in DTYPES:
        raise ValueError(f"The data type must be one of {DTYPES}. Got {dtype!r}; leave it out for 'auto'")
    return default_dtype() if dtype == "auto" else dtype


def quantization(in_4bit: bool, in_8bit: bool = False) -> BitsAndBytesConfig | None:
    """Return the quantization of a patient, or `None`."""
    if in_4bit and in_8bit:
        raise ValueError("A patient must be loaded in 4 or in 8 bits. Got both options; leave one out")
    if in_4bit:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    return BitsAndBytesConfig(load_in_8bit=True) if in_8bit else None


def name_patient(
    name: str,
    *,
    dtype: str = "auto",
    in_4bit: bool = False,
    in_8bit: bool = False,
    trust_remote_code: bool = False,
    **settings: object,
) -> tuple[NamedModel, PreTrainedTokenizerBase]:
    """Return a patient that loads on first use, and its tokenizer."""
    check_dtype(dtype)
    if quantized := quantization(in_4bit, in_8bit):
        settings["quantization_config"] = quantized
    patient = NamedModel(name, dtype=dtype, trust_remote_code=trust_remote_code, **settings)
    return patient, AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_patient(
    name: str | None, *, dtype: str = "auto", in_4bit: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a patient, in eval mode, and its tokenizer. `None` is the patient of the controlled world."""
    if name is None:
        from ..testbed import load_world

        world = load_world()
        return world.patient, world.tokenizer
    patient, tokenizer = name_patient(
        name, dtype=dtype, in_4bit=in_4bit, trust_remote_code=trust_remote_code, device_map="auto"
    )
    return patient.loaded.eval(), tokenizer


def parse_doctor(text: str) -> tuple[str, str]:
    """Split NAME=PATH into the name and the path of a doctor. Without NAME, the name is the last part of PATH."""
    label, separator, path = text.partition("=")
    if not separator or Path(text).is_dir():
        label, path = Path(text).resolve().name, text
    if not label or not path:
        raise ValueError(f"`--doctor` must be NAME=PATH, or a path. Got {text!r}; correct it")
    return label, path


def load_models(
    name: str | None,
    doctor_options: Sequence[str],
    *,
    dtype: str = "auto",
    in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, LanguageModel]]:
    """
    Load models in eval mode: the patient, its tokenizer, and the doctors by name.

    `name` is the patient, or `None` for the controlled world. `doctor_options` has NAME=PATH or PATH for each
    doctor. Only the patient is loaded in 4 bits.
    """
    patient, tokenizer = load_patient(name, dtype=dtype, in_4bit=in_4bit, trust_remote_code=trust_remote_code)
    doctors: dict[str, LanguageModel] = {}
    for text in doctor_options:
        label, path = parse_doctor(text)
        if label in doctors:
            raise ValueError(f"Each doctor must have a unique name. Got {label!r} twice; write `--doctor NAME=PATH`")
        doctors[label] = load_doctor(
            path,
            with_value_head=False,
            device_map={"": patient.device},
            dtype=check_dtype(dtype),
            trust_remote_code=trust_remote_code,
        ).eval()
        doctor_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_same_tokenizer(tokenizer, doctor_tokenizer, names=("patient", f"doctor {label!r}"))
    return patient, tokenizer, doctors
