# SPDX-License-Identifier: Apache-2.0

"""Fingerprint of a model: a hash of its config and weights."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher

from ..common.language_model import LanguageModel


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
