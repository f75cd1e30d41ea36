# SPDX-License-Identifier: Apache-2.0

"""
Content of the folder of a doctor: a full model or a LoRA adapter, and the exponents of its training.

This module reads only JSON, so the command that prints flags needs neither torch nor vLLM.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FORMAT = 1  # of a doctor's record of its exponents
EXPONENTS_FILE = "guidance.json"
ADAPTER_CONFIG = "adapter_config.json"
RECORD = "trl_tfpo"  # key of the record in the `auto_mapping` of an adapter's config
VALUE_HEAD = "value_head"  # of a doctor in training, not needed for decoding

# Settings of an adapter that affect only its training, or that `Lora` supports. All other settings must be off
_PLAIN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "use_rslora"),
}
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # values of `init_lora_weights`


@dataclass(frozen=True)
class SavedDoctor:
    """
    A saved doctor or reference.

    Args:
        folder ([`~pathlib.Path`]):
            Folder with the weights.
        exponents (`dict[str, float]`):
            `alpha` and `beta` of the training; empty for a language model.
        adapter (`dict[str, Any]`, *optional*):
            Config of the adapter; `None` for a full model.
    """

    folder: Path
    exponents: dict[str, float]
    adapter: dict[str, Any] | None = None

    @property
    def base(self) -> str:
        """Folder or Hub id of the full model: the doctor, or the base of its adapter."""
        return str(self.folder if self.adapter is None else self.adapter["base_model_name_or_path"])

    @property
    def revision(self) -> str | None:
        """Revision of the base on the Hub."""
        return None if self.adapter is None else self.adapter.get("revision")


def read_doctor(path: str | os.PathLike) -> SavedDoctor:
    """
    Read the folder of a doctor.

    Args:
        path (`str` or `os.PathLike`):
            Folder of a doctor saved by `TFPOTrainer`, or of a language model.

    Returns:
        [`SavedDoctor`]

    Raises:
        `ValueError`: when the folder has neither a model nor an adapter, or several adapters; an adapter is not a
            plain LoRA in safetensors, or its base or its record is missing; or the format of the record is unknown.
    """
    folder, record = _folder_of_weights(Path(path)), Path(path) / EXPONENTS_FILE
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ValueError(
            f"A doctor must be a folder with a model or an adapter. Got {str(path)!r}, which has no `config.json` and "
            f"no `{ADAPTER_CONFIG}`; pass the folder that `save_model` wrote, or a downloaded snapshot."
        )
    config = _read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"))
    if is_adapter:
        _check_plain(folder, config)
        _check_base(folder, config)
    if record.is_file():
        exponents = _read_json(record)
    else:  # early versions and other ways of saving
        exponents = _record_of_adapter(folder, config) if is_adapter else config.get("guidance") or {}
    found = exponents.pop("format", FORMAT)
    if found != FORMAT:
        raise ValueError(
            f"The doctor in {str(path)!r} must have format {FORMAT}. Got format {found}; install the version of "
            "trl-tfpo-vllm that belongs to the trl-tfpo that wrote it."
        )
    return SavedDoctor(folder, exponents, config if is_adapter else None)


def _folder_of_weights(folder: Path) -> Path:
    """Return the folder of the weights. PEFT saves an adapter with a name other than "default" in a subfolder."""
    if any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        return folder
    found = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    found = [one for one in found if not one.name.startswith("checkpoint")]
    if len(found) > 1:
        raise ValueError(
            f"A doctor is one adapter. Got {str(folder)!r} with {[one.name for one in found]}; pass the folder of one."
        )
    return found[0] if found else folder


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _record_of_adapter(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record in the config of an adapter. It must exist if the adapter has a head, as in guided flow."""
    record = (config.get("auto_mapping") or {}).get(RECORD)
    saved = set(config.get("modules_to_save") or ())
    if record is None and VALUE_HEAD in saved and len(saved) > 1:
        raise ValueError(
            f"An adapter must have a record of the exponents of its training. Got {str(folder)!r} without a record; "
            "load it with `load_doctor` of trl-tfpo, and save it again."
        )
    return dict(record or {})


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless an adapter only adds products of two matrices to weights, or replaces weights."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    found = [name for name in config.keys() - _PLAIN if config[name] not in (None, False, "none", {}, [])]
    found += [f"init_lora_weights={start!r}"] if start not in _KEEPS_BASE else []
    if kind != "LORA" or found:
        raise ValueError(
            f"An adapter must be a plain LoRA. Got {', '.join(sorted(found)) or kind} in {str(folder)!r}; merge it "
            "into its base with PEFT's `merge_and_unload`, and save it with the tokenizer."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"An adapter must be saved as safetensors. Got no `adapter_model.safetensors` in {str(folder)!r}; load it "
            "with PEFT, if you trust it, and save it again."
        )


def _check_base(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `ValueError` when the base of an adapter is missing, or is an adapter."""
    base = str(config.get("base_model_name_or_path") or "")
    is_path = os.path.isdir(base) or os.path.isabs(base) or base.startswith(".") or not base
    if is_path and not os.path.isfile(os.path.join(base, "config.json")):
        raise ValueError(
            f"The base of an adapter must be a full model. Got {base!r}, which has no `config.json`; in "
            f"{str(folder / ADAPTER_CONFIG)!r}, set `base_model_name_or_path` to the model of the training."
        )
