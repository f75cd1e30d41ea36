# SPDX-License-Identifier: Apache-2.0

"""
Sharing of equal modules between models.

A LoRA doctor on the patient differs from it only in the adapted layers. Because vLLM fuses and shards layers, modules
are compared after loading, and not by the names in the adapter. Whole modules are shared instead of tensors, so vLLM
packs their weights once. During loading both models are in memory.
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
    """Whether layers with equal names and weights compute the same function in models with these configs."""
    first, second = ({k: v for k, v in x.to_dict().items() if k not in _NOT_OF_LAYERS} for x in (config, other))
    return first == second


def share_modules(model: nn.Module, other: nn.Module, apart: Collection[nn.Module] = ()) -> None:
    """
    Replace modules of a model, in place, by modules of another model with the same name, class and weights.

    Args:
        model, other (`nn.Module`):
            Models whose configs are alike, with loaded weights.
        apart (collection of `nn.Module`):
            Modules that are not shared, such as attention, which has its own cache.
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
