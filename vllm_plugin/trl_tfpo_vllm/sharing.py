# SPDX-License-Identifier: Apache-2.0

"""
Hold modules that two models have in common once.

A LoRA doctor on the patient differs from it in the adapted layers only. Modules are compared after loading, rather
than by what an adapter names, as vLLM fuses layers and shards them. A module, not a tensor, is shared, so that vLLM
packs its weights once. During loading both models are in memory.
"""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedConfig


_NOT_OF_LAYERS = {  # fields of a config that no layer reads
    *("_name_or_path", "architectures", "dtype", "guidance", "guided_alpha", "guided_doctors", "tie_word_embeddings"),
    "transformers_version",
}


def are_alike(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether layers of the same name and weights are the same function in models with these configs."""
    first, second = ({k: v for k, v in x.to_dict().items() if k not in _NOT_OF_LAYERS} for x in (config, other))
    return first == second


def share_modules(model: nn.Module, other: nn.Module, apart: Collection[nn.Module] = ()) -> None:
    """
    Replace modules of a model by those of another where class and weights are equal, in place.

    Args:
        model, other (`nn.Module`):
            Models whose configs are alike, with loaded weights.
        apart (collection of `nn.Module`):
            Modules that stay, such as attention, which has a cache of its own.
    """
    twins, kept = dict(other.named_modules(remove_duplicate=False)), set(apart)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        twin, weights = twins.get(name), dict(module.named_parameters(recurse=False))
        if twin is None or type(module) is not type(twin) or module in kept or not weights or any(module.children()):
            continue
        theirs = dict(twin.named_parameters(recurse=False))
        if weights.keys() == theirs.keys() and all(torch.equal(weights[key], theirs[key]) for key in weights):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, twin)
