# SPDX-License-Identifier: Apache-2.0

"""Models given by name. Their weights are loaded when first used; config and shapes are available without weights."""

import gc
import os
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..common._upstream import load_model, unsharded
from ..common.precision import default_dtype
from .fingerprint import model_fingerprint


SOURCE = ("revision", "cache_dir", "subfolder", "token")  # keyword arguments that locate files


class NamedModel:
    """
    Frozen language model given by name. Weights are loaded when first used, so cached scores do not load them.

    Args:
        name (`str`):
            Hub id or folder.
        init_kwargs:
            Keyword arguments of `from_pretrained`, such as `quantization_config`. `dtype="auto"` is the dtype of the
            checkpoint, or float32 on a CPU without bfloat16 instructions.

    Raises:
        `ValueError`: if the name is a path but not a folder.
    """

    def __init__(self, name: str, **init_kwargs: Any) -> None:
        check_model_exists(name)
        if init_kwargs.get("dtype") == "auto" and "quantization_config" not in init_kwargs:
            init_kwargs["dtype"] = default_dtype()
        self.name = name
        self.init_kwargs = init_kwargs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def _source(self) -> dict[str, Any]:
        return {key: self.init_kwargs[key] for key in SOURCE if key in self.init_kwargs}

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model without weights: config, generation config, shapes."""
        trust_remote_code = self.init_kwargs.get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(self.name, trust_remote_code=trust_remote_code, **self._source)
        try:
            outline = model_without_weights(config, "auto", trust_remote_code=trust_remote_code)
        except ValueError:  # no model class is registered for the config
            return self.loaded
        try:
            outline.generation_config = GenerationConfig.from_pretrained(self.name, **self._source)
        except OSError:  # many models have none
            pass
        return outline

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, without loading them."""
        if "loaded" in vars(self):
            return self.loaded.dtype
        dtype = self.init_kwargs.get("dtype", torch.float32)
        if dtype == "auto":
            dtype = self.outline.dtype
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The model with its weights, not sharded."""
        return load_model(self.name, **self.init_kwargs)

    def unload(self) -> None:
        """Free the memory of the weights. The next use loads them again."""
        self.__dict__.pop("loaded", None)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @cached_property
    def fingerprint(self) -> str:
        """
        Hash of the config, the keyword arguments and the source of the weights.

        The source is a Hub commit, or the names, sizes and times of the safetensors files in a folder. Weights in
        another format are loaded and hashed. All processes must read this property together.

        Raises:
            `ValueError`: if the processes find different files.
        """
        commit = extract_commit_hash(cached_file(self.name, CONFIG_NAME, **self._source), None)
        files = [(file.name, file.stat()) for file in sorted(Path(self.name).glob("*.safetensors"))]
        if not commit and not files:  # the weights are in another format
            return model_fingerprint(self.loaded)
        how = {key: str(value) for key, value in self.init_kwargs.items() if key != "device_map"}
        found = (self.outline.config.to_json_string(), how, commit or [(name, stat.st_size) for name, stat in files])
        times = () if commit else [stat.st_mtime_ns for _, stat in files]
        everywhere = [(found, times)]
        if PartialState().num_processes > 1:
            everywhere = gather_object(everywhere)
            if any(other != found for other, _ in everywhere):
                raise ValueError(
                    "All processes must load the same weights, because each scores a share of the dataset. Got "
                    f"{self.name!r} with different files in some processes; copy the folder again."
                )
        return Hasher.hash(everywhere[0])  # of process 0, because file times differ between machines


def check_model_exists(name: str | os.PathLike[str]) -> None:
    """Raise `ValueError` if a name is a path but not a folder."""
    text = os.fspath(name) if isinstance(name, (str, os.PathLike)) else ""
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or os.path.isfile(text) or not text
    if is_path and not os.path.isdir(text):
        found = "is a file" if os.path.isfile(text) else "does not exist"
        raise ValueError(f"A model must be a Hub name or a folder. Got {name!r}, which {found}; check the path.")


def outline_of(model: PreTrainedModel | NamedModel) -> PreTrainedModel:
    """The model itself, or the outline of a [`NamedModel`]."""
    return model.outline if isinstance(model, NamedModel) else model


def resolve_model(
    model: str | PreTrainedModel | NamedModel,
    name: str,
    quantization_config: BitsAndBytesConfig | None = None,
    **init_kwargs: Any,
) -> PreTrainedModel | NamedModel:
    """
    Return a [`NamedModel`] for a name or path, and a loaded model unchanged.

    `name` is the name of the argument in messages. `init_kwargs` are passed to `from_pretrained` of a model given by
    name.

    Raises:
        `ValueError`: if `model` is neither a model nor its name or path, if a path is not a folder, or if a loaded
            model comes with a quantization config.
    """
    if not isinstance(model, (str, torch.nn.Module, NamedModel)):
        raise ValueError(
            f"`{name}` must be a causal language model, or its name or path. Got {reprlib.repr(model)}; load one with "
            "`AutoModelForCausalLM.from_pretrained`, or pass its name."
        )
    if isinstance(model, str):
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        return NamedModel(model, **init_kwargs)
    if quantization_config is not None:
        raise ValueError(
            f"A quantization config applies to a `{name}` given by name or path. Got a loaded {type(model).__name__}; "
            "pass the quantization config to its `from_pretrained`."
        )
    return model


def model_without_weights(
    config: PreTrainedConfig, dtype: str | torch.dtype | None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model of a config on the meta device."""
    if dtype in ("auto", None):
        dtype = config.get_text_config().dtype or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with unsharded(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
