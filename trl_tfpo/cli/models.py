# SPDX-License-Identifier: Apache-2.0

"""Loading patients and doctors that options name."""

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
    """
    Return a dtype for `from_pretrained`. `"auto"` becomes float32 where half precision would be slow.

    Raises:
        `ValueError`: when it is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {DTYPES}. Got {dtype!r}; leave it out for 'auto'")
    return default_dtype() if dtype == "auto" else dtype


def quantization(in_4bit: bool, in_8bit: bool = False) -> BitsAndBytesConfig | None:
    """Return the quantization of a patient, or `None`."""
    if in_4bit and in_8bit:
        raise ValueError("A patient is loaded in 4 or in 8 bits. Got both options; leave one out")
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
    """Return a patient that is loaded on demand, and its tokenizer."""
    check_dtype(dtype)
    if quantized := quantization(in_4bit, in_8bit):
        settings["quantization_config"] = quantized
    patient = NamedModel(name, dtype=dtype, trust_remote_code=trust_remote_code, **settings)
    return patient, AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_patient(
    name: str | None, *, dtype: str = "auto", in_4bit: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a patient in eval mode, and its tokenizer. Without a name they are those of the controlled world."""
    if name is None:
        from ..testbed import load_world

        world = load_world()
        return world.patient, world.tokenizer
    patient, tokenizer = name_patient(
        name, dtype=dtype, in_4bit=in_4bit, trust_remote_code=trust_remote_code, device_map="auto"
    )
    return patient.loaded.eval(), tokenizer


def name_doctor(text: str) -> tuple[str, str]:
    """
    Split NAME=PATH into name and path of a doctor. The name of a path alone is its last part.

    Raises:
        `ValueError`: when the name or the path is empty.
    """
    label, separator, path = text.partition("=")
    if not separator or Path(text).is_dir():
        label, path = Path(text).resolve().name, text
    if not label or not path:
        raise ValueError(f"`--doctor` must be NAME=PATH, or a path. Got {text!r}; write it so")
    return label, path


def load_models(
    name: str | None,
    given: Sequence[str],
    *,
    dtype: str = "auto",
    in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, LanguageModel]]:
    """
    Load models in eval mode.

    Args:
        name (`str` or `None`):
            Name of the patient; `None` for that of the controlled world.
        given (sequence of `str`):
            NAME=PATH, or PATH, of each doctor.
        dtype, in_4bit, trust_remote_code:
            As in the options. Only the patient is loaded in 4 bits.

    Returns:
        `tuple`: the patient, its tokenizer, and the doctors by name.
    """
    patient, tokenizer = load_patient(name, dtype=dtype, in_4bit=in_4bit, trust_remote_code=trust_remote_code)
    doctors: dict[str, LanguageModel] = {}
    for text in given:
        label, path = name_doctor(text)
        if label in doctors:
            raise ValueError(
                f"Each doctor must have a name of its own. Got {label!r} twice; write `--doctor NAME=PATH`"
            )
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
