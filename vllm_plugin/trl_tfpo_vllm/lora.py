# SPDX-License-Identifier: Apache-2.0

r"""
Merging of a LoRA adapter into the weights of its base, tensor by tensor while they are read: $W + s B A$, with the
scale $s$ of the adapter.

Shapes: V vocabulary, H hidden size, R rank, I inputs and O outputs of a layer.
"""

import math
import re
from collections.abc import Iterable, Iterator

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .saved_doctor import VALUE_HEAD, SavedDoctor


class Lora:
    """
    Tensors of a LoRA adapter.

    Args:
        saved ([`SavedDoctor`]):
            A doctor that is an adapter.
        config ([`~transformers.PreTrainedConfig`]):
            Config of the base. Its `tie_word_embeddings` is set to False if the adapter changes the embeddings or the
            head of a base that ties them, because the two then differ.

    Raises:
        `ValueError`: when the adapter has tensors that a plain LoRA lacks.
    """

    def __init__(self, saved: SavedDoctor, config: PreTrainedConfig):
        self.config = saved.adapter or {}
        self.matrices: dict[str, dict[str, torch.Tensor]] = {}  # A (R, I) and B (O, R), by name of the weight
        self.replaced: dict[str, torch.Tensor] = {}  # weights that were saved as a whole
        for key, tensor in load_file(saved.folder / "adapter_model.safetensors").items():
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
                self.matrices.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
            elif "lora_" in name:
                raise ValueError(
                    f"An adapter must be a plain LoRA on linear layers. Got {key!r} in {str(saved.folder)!r}; merge "
                    "it into its base with PEFT's `merge_and_unload`, and save it with the tokenizer."
                )
            elif not name.startswith(f"{VALUE_HEAD}."):
                self.replaced[name] = tensor
        self.folder = saved.folder
        self.embeddings, self.head = _names_of_ends(config)
        changed = self.matrices.keys() | self.replaced.keys()
        self.unties = config.tie_word_embeddings and bool({self.embeddings, self.head} & changed)
        if self.unties:
            config.tie_word_embeddings = False

    def merge(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Yield the weights of the doctor.

        Args:
            weights (iterable of `(str, torch.Tensor)`):
                Names and tensors of the base.

        Returns:
            Iterator of `(str, torch.Tensor)`. Sums of a weight and a product are in float32.

        Raises:
            `ValueError`: when a shape differs; and at the end, when the adapter changes weights that the base lacks.
        """
        seen = set()
        for name, tensor in weights:
            if self.unties and name == self.head:  # a copy of the embeddings
                continue
            names = [name, self.head] if self.unties and name == self.embeddings else [name]
            seen.update(names)
            yield from ((each, self._changed(each, tensor)) for each in names)
        if missing := sorted((self.matrices.keys() | self.replaced.keys()) - seen):
            raise ValueError(
                f"An adapter must fit its base. Got {missing[:3]} in {str(self.folder)!r}, which the base lacks; name "
                "the base that the adapter was trained on in its `adapter_config.json`."
            )

    def _changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight (O, I) of the doctor, given the weight of the base."""
        weight = self._fitting(name, self.replaced.get(name, tensor), tensor)
        if name not in self.matrices:
            return weight
        first, second = (self.matrices[name][part].to(tensor.device, torch.float32) for part in "AB")
        product = self._fitting(name, self._scale(name, len(first)) * (second @ first), tensor)
        return weight.to(tensor.device, torch.float32) + product

    def _fitting(self, name: str, weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Return the weight. Raise `ValueError` if its shape differs from that of the base."""
        if weight.shape != tensor.shape:
            raise ValueError(
                f"An adapter must fit its base. Got {name!r} of shape {tuple(weight.shape)} in {str(self.folder)!r}, "
                f"for {tuple(tensor.shape)}; name the base of its training in its `adapter_config.json`."
            )
        return weight

    def _scale(self, name: str, rank: int) -> float:
        """Return the factor of a product of rank `rank`, as in PEFT."""
        layer = name.removesuffix(".weight")
        alphas = self.config.get("alpha_pattern") or {}
        matching = [alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
        alpha = matching[0] if matching else self.config["lora_alpha"]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _names_of_ends(config: PreTrainedConfig) -> tuple[str, str]:
    """Return the names of the weights (V, H) of embeddings and language model head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {module: name for name, module in model.named_modules()}
    return f"{names[model.get_input_embeddings()]}.weight", f"{names[model.get_output_embeddings()]}.weight"
