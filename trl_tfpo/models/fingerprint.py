# SPDX-License-Identifier: Apache-2.0

"""Fingerprints of models: hashes of weights."""

import hashlib

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher

from ..common._upstream import adapter_layers
from ..common.language_model import LanguageModel, is_sharded, unwrap_peft
from .adapters import VALUE_HEAD


NUM_SAMPLED = 64  # weights of each parameter that `patient_fingerprint` reads


def model_fingerprint(model: LanguageModel) -> str:
    """
    Hash the config and weights of a model. All processes must call this function together.

    Raises:
        `ValueError`: if the processes hold different weights.
    """
    hasher = Hasher()
    hasher.update(model.config.to_json_string())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name)
        hasher.m.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    fingerprint = hasher.hexdigest()
    if PartialState().num_processes > 1:
        fingerprints = gather_object([fingerprint])
        if len(set(fingerprints)) > 1:
            raise ValueError(
                "All processes must hold the same weights, because each scores a share of the dataset. Got the "
                f"fingerprints {fingerprints} of a {type(model).__name__}; pass its name or path, or load it with "
                "`fsdp_cpu_ram_efficient_loading: false` and the same seed."
            )
    return fingerprint


@torch.no_grad()
def patient_fingerprint(model: LanguageModel) -> str:
    """
    Hash names, shapes and 64 weights of each parameter of a language model, without its adapters.

    The hash does not depend on the machine, nor on whether the weights are float32 or bfloat16. Quantized or offloaded
    weights have another hash. Only a small part of a large model is read, so a difference in few weights may not be
    noticed.

    Returns:
        `str`: 64 hexadecimal digits, or "" for a sharded model.
    """
    base = unwrap_peft(model)
    if is_sharded(base):
        return ""
    adapted = set(adapter_layers(base))
    layers = tuple(f"{name}." for name, module in base.named_modules() if module in adapted)
    hasher = hashlib.sha256()
    for name, parameter in base.named_parameters():
        own_name = _name_without_adapters(name, layers)
        if own_name is None or VALUE_HEAD in name.split("."):
            continue
        hasher.update(f"{own_name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type != "meta":  # offloaded
            weights = parameter.detach().reshape(-1)
            weights = weights[:: max(1, len(weights) // NUM_SAMPLED)][:NUM_SAMPLED].cpu()
            weights = weights.to(torch.bfloat16) if weights.is_floating_point() else weights
            hasher.update(weights.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _name_without_adapters(name: str, layers: tuple[str, ...]) -> str | None:
    """
    Name of a parameter without PEFT's wrappers; `None` for a parameter of an adapter.

    `layers` are the prefixes of the names in the wrapped modules.
    """
    layer = next((layer for layer in layers if name.startswith(layer)), None)
    if layer is None:
        return name
    part, _, rest = name.removeprefix(layer).partition(".")
    return f"{layer}{rest}" if part in ("base_layer", "original_module") else None
