# SPDX-License-Identifier: Apache-2.0

"""A hash of a model: other weights, another fingerprint."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel


def model_fingerprint(model: PreTrainedModel) -> str:
    """
    Hash of the model's configuration and weights: other weights, another fingerprint.

    Where there are several processes, each of them has to ask.

    Raises:
        `ValueError`: when the processes hold different weights.
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
                f"Every process must hold the same weights, as each scores its share of a dataset. Got {fingerprints} "
                f"of a {type(model).__name__}; pass its name or path, or load it with "
                "`fsdp_cpu_ram_efficient_loading: false` and the same seed."
            )
    return fingerprint
