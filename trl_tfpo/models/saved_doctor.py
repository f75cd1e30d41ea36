# SPDX-License-Identifier: Apache-2.0

"""Load saved doctors, and write and read the file with their value head and the map of their GuidanceHead."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, cached_file

from ..common.atomic import atomic_write
from ..common.language_model import LanguageModel
from .adapters import VALUE_HEAD
from .doctor import add_value_head
from .guidance_head import GuidanceHead
from .initial_head import untie_head
from .named_model import SOURCE
from .trained_exponents import load_exponents, record_exponents, trained_exponents


VALUE_HEAD_FILE = "value_head.safetensors"  # of a full model


def load_doctor(path: str | os.PathLike, with_value_head: bool = True, **kwargs) -> LanguageModel:
    """
    Load a trained doctor with its value head, to continue training or to inspect the flow.

    Decoding does not need the value head: use `AutoModelForCausalLM.from_pretrained(path)`, or for an adapter
    `PeftModel.from_pretrained(base, path)`.

    Args:
        path (`str`):
            Folder or Hub id of a doctor saved by [`TFPOTrainer`]: a full model or an adapter.
        with_value_head (`bool`, *optional*, defaults to `True`):
            Whether to restore the value head.
        kwargs:
            Passed to `from_pretrained` of the language model. `use_safetensors` defaults to `True`.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: the doctor, in eval mode.

    Raises:
        `ValueError`: if the folder does not exist, or its format is not supported; if `path` has several adapters or,
            with `with_value_head`, no value head; if an adapter is not saved as safetensors, or does not record the
            exponents that it was trained for.
    """
    kwargs.setdefault("use_safetensors", True)  # a pickle can run code
    kwargs.setdefault("trust_remote_code", False)  # by default transformers asks in the terminal
    recorded = load_exponents(path, **{key: kwargs[key] for key in SOURCE if key in kwargs})
    path = _adapter_folder(path)
    adapter_config = cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    if adapter_config is not None:
        return _load_adapter(path, adapter_config, with_value_head, recorded, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if recorded:
        model.config.guidance = recorded
    if with_value_head:
        add_value_head(model)
        getattr(model, VALUE_HEAD).load_state_dict(_read_value_head(path))
    return model.eval()


def _load_adapter(
    path: str | os.PathLike, adapter_config: str, with_value_head: bool, recorded: dict[str, float] | None, **kwargs
) -> LanguageModel:
    """Load a doctor that was saved as an adapter, together with the base model that its config names."""
    from peft import PeftModel

    if not cached_file(path, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False):
        raise ValueError(
            f"An adapter must be saved as safetensors. Got no `adapter_model.safetensors` in {str(path)!r}; if you "
            "trust the adapter, load it with PEFT and save it again."
        )
    config = json.loads(Path(adapter_config).read_text(encoding="utf-8"))
    saved_modules = set(config.get("modules_to_save") or ())
    base: Any = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], **kwargs)
    if saved_modules - {VALUE_HEAD}:
        untie_head(base)
    if with_value_head:
        if VALUE_HEAD not in saved_modules:
            raise _no_value_head(path)
        add_value_head(base)
    model = PeftModel.from_pretrained(base, path)
    if recorded is not None:
        record_exponents(model, recorded)  # early versions saved adapters without a record
    if exponents := trained_exponents(model):
        # `merge_and_unload` keeps only the config of the base model
        base.config.guidance, base.guiding_adapter = exponents, model.active_adapter
    return model


def _adapter_folder(path: str | os.PathLike) -> str | os.PathLike:
    """Folder of the adapter at `path`: a subfolder if the name of the adapter is not "default"."""
    if not Path(path).is_dir() or any((Path(path) / name).exists() for name in ("adapter_config.json", CONFIG_NAME)):
        return path
    named = sorted(file.parent for file in Path(path).glob("*/adapter_config.json"))
    named = [folder for folder in named if not folder.name.startswith(PREFIX_CHECKPOINT_DIR)]
    if len(named) > 1:
        raise ValueError(
            f"A doctor must be one adapter. Got {str(path)!r} with {[folder.name for folder in named]}; pass the "
            "subfolder of one."
        )
    return named[0] if named else path


def save_value_head(state: dict[str, torch.Tensor], folder: str | os.PathLike) -> None:
    """Save the value head of a full model, and the map of a GuidanceHead, as a separate file in its folder."""
    with atomic_write(Path(folder) / VALUE_HEAD_FILE) as part:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, part)


def fold_map(model: LanguageModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Replace the parameters of a [`~trl_tfpo.models.guidance_head.GuidanceHead`] in `state_dict`, in place, by the
    weights of an ordinary head. The model does not change.

    Returns:
        `dict[str, torch.Tensor]`: the map of the GuidanceHead, needed to resume training; empty for other heads.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, GuidanceHead):
        return {}
    name = next(name for name, module in model.named_modules() if module is head)
    if f"{name}.map" in state_dict:  # an engine has gathered the parameters
        map = state_dict.pop(f"{name}.map")
        state_dict[f"{name}.weight"] = head.folded(state_dict[f"{name}.weight"], map)
        return {"map": map}
    return {"map": head.map}


def load_value_head(model: LanguageModel, folder: str | os.PathLike) -> None:
    """Load the file of [`save_value_head`] into a full model, if the folder has one."""
    path = Path(folder) / VALUE_HEAD_FILE
    if path.is_file():
        state, head = load_file(path), model.get_output_embeddings()
        map = state.pop("map", None)
        getattr(model, VALUE_HEAD).load_state_dict(state)
        if map is not None and isinstance(head, GuidanceHead):
            head.map.data.copy_(map)


def _read_value_head(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of the value head of a saved full model, from the shards of its weights or from a separate file."""
    file_names = ["model.safetensors"]
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        file_names = sorted({name for key, name in weight_map.items() if key.startswith(f"{VALUE_HEAD}.")})
    state = {}
    for name in file_names:
        with safe_open(cached_file(path, name), framework="pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(f"{VALUE_HEAD}.")]
            state.update({key.removeprefix(f"{VALUE_HEAD}."): tensors.get_tensor(key) for key in keys})
    if state:
        return state
    separate = cached_file(path, VALUE_HEAD_FILE, _raise_exceptions_for_missing_entries=False)
    if separate is None:
        raise _no_value_head(path)
    return {name: tensor for name, tensor in load_file(separate).items() if name != "map"}


def _no_value_head(path: str | os.PathLike) -> ValueError:
    return ValueError(
        f"`load_doctor` needs a model with a value head. Got {str(path)!r} without one; pass `with_value_head=False`, "
        "or a folder saved by `TFPOTrainer`."
    )
