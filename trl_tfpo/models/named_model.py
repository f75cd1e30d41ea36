# SPDX-License-Identifier: Apache-2.0

"""A model by name: what it is can be told without its weights, and these are loaded when they are first read."""

import gc
import os
import reprlib
from functools import cached_property
from pathlib import Path

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

from ..common._upstream import default_dtype, load_model, unsharded
from .fingerprint import model_fingerprint


SOURCE = ("revision", "cache_dir", "subfolder", "token")  # keyword arguments that say where files are


class NamedModel:
    """
    A frozen language model that may not have to be loaded: a dataset it has already annotated needs nothing of it.

    Args:
        name (`str`):
            Hub id or folder.
        init_kwargs:
            Keyword arguments of `from_pretrained`, such as `quantization_config`. A `dtype` of `"auto"` is that of the
            checkpoint, or float32 on a CPU without bfloat16 instructions.

    Raises:
        `ValueError`: when a path is meant, and there is no folder.
    """

    def __init__(self, name: str, **init_kwargs):
        check_there(name)
        if init_kwargs.get("dtype") == "auto" and "quantization_config" not in init_kwargs:
            init_kwargs["dtype"] = default_dtype()
        self.name = name
        self.init_kwargs = init_kwargs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def _source(self) -> dict:
        return {key: self.init_kwargs[key] for key in SOURCE if key in self.init_kwargs}

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model without weights: config, generation config, shapes."""
        config = AutoConfig.from_pretrained(
            self.name, trust_remote_code=self.init_kwargs.get("trust_remote_code", False), **self._source
        )
        try:
            outline = model_without_weights(
                config, "auto", trust_remote_code=self.init_kwargs.get("trust_remote_code", False)
            )
        except ValueError:  # of a class that is not found by its config
            return self.loaded
        try:
            outline.generation_config = GenerationConfig.from_pretrained(self.name, **self._source)
        except OSError:  # many models have none
            pass
        return outline

    @property
    def dtype(self) -> torch.dtype:
        """What it is loaded in, told without loading it."""
        if "loaded" in vars(self):
            return self.loaded.dtype
        dtype = self.init_kwargs.get("dtype", torch.float32)
        if dtype == "auto":
            dtype = self.outline.dtype
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The model itself, whole in each process."""
        return load_model(self.name, **self.init_kwargs)

    def let_go(self) -> None:
        """Free the memory of the weights; they are loaded again when they are read again."""
        self.__dict__.pop("loaded", None)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @cached_property
    def fingerprint(self) -> str:
        """
        Hash of where the weights come from, and how they are loaded: a commit of the Hub, or the names, sizes and
        times of the files in a folder. Where there are several processes, each of them has to ask.

        Raises:
            `ValueError`: when the processes find different files.
        """
        commit = extract_commit_hash(cached_file(self.name, CONFIG_NAME, **self._source), None)
        files = [(file.name, file.stat()) for file in sorted(Path(self.name).glob("*.safetensors"))]
        if not commit and not files:  # in another format
            return model_fingerprint(self.loaded)
        how = {key: str(value) for key, value in self.init_kwargs.items() if key != "device_map"}
        found = (self.outline.config.to_json_string(), how, commit or [(name, stat.st_size) for name, stat in files])
        times = () if commit else [stat.st_mtime_ns for _, stat in files]
        everywhere = [(found, times)]
        if PartialState().num_processes > 1:
            everywhere = gather_object(everywhere)
            if any(other != found for other, _ in everywhere):
                raise ValueError(
                    "Every process must load the same weights, as each scores its share of a dataset. Got "
                    f"{self.name!r} with other files on some; copy the folder anew."
                )
        return Hasher.hash(everywhere[0])  # a copy on another machine has other times


def check_there(name: str | os.PathLike) -> None:
    """Raise `ValueError` when what should name a model on the Hub, or its folder, is a path to no folder."""
    text = os.fspath(name) if isinstance(name, (str, os.PathLike)) else ""
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or os.path.isfile(text) or not text
    if is_path and not os.path.isdir(text):
        raise ValueError(f"A model must be a Hub name or a folder. Got {name!r}, which is not there; check the path.")


def outline_of(model: PreTrainedModel | NamedModel) -> PreTrainedModel:
    """The model, or one of the same config and shapes without its weights."""
    return model.outline if isinstance(model, NamedModel) else model


def resolve_model(
    model: str | PreTrainedModel | NamedModel,
    name: str,
    quantization_config: BitsAndBytesConfig | None = None,
    **init_kwargs,
) -> PreTrainedModel | NamedModel:
    """
    A model given by name or path, not loaded yet; a model as it is.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model.
        name (`str`):
            What a message calls it.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For a model given by name.
        init_kwargs:
            Keyword arguments of `from_pretrained`, likewise.

    Returns:
        [`~transformers.PreTrainedModel`] or [`NamedModel`]

    Raises:
        `ValueError`: when it is neither, or a model that is loaded already is to be quantized.
    """
    if not isinstance(model, (str, torch.nn.Module, NamedModel)):
        raise ValueError(
            f"`{name}` must be a causal language model, or its name or path. Got {reprlib.repr(model)}; load one with "
            "`AutoModelForCausalLM.from_pretrained`, or pass what you would load."
        )
    if isinstance(model, str):
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        return NamedModel(model, **init_kwargs)
    if quantization_config is not None:
        raise ValueError(
            f"A quantization config applies to a `{name}` given by name or path. Got a loaded {type(model).__name__}; "
            "quantize it when you load it."
        )
    return model


def model_without_weights(
    config: PreTrainedConfig, dtype: str | torch.dtype | None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that a config describes, on the meta device. Its attention is SDPA, whatever will be used."""
    if dtype in ("auto", None):
        dtype = config.get_text_config().dtype or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with unsharded(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
