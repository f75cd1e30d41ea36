# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo env`: print versions, for a bug report."""

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from .. import __version__


PACKAGES = [
    *["trl-tfpo", "trl", "transformers", "torch", "accelerate", "datasets", "peft", "deepspeed", "bitsandbytes"],
    *["safetensors", "tokenizers", "huggingface_hub", "fastapi", "gradio"],
]


def run(arguments: Sequence[str]) -> int:
    """Print versions, platform and accelerators."""
    if not set(arguments) <= {"-h", "--help"}:
        raise ValueError(f"`env` takes no options. Got {list(arguments)}; leave them out")
    if arguments:
        print("usage: trl-tfpo env\n\nPrint versions, platform and accelerators.")
        return 0
    import torch

    facts = {"Platform": platform.platform(), "Python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["trl-tfpo"] = __version__
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    facts["Accelerators"] = f"{torch.accelerator.device_count()} x {accelerator.type}" if accelerator else "none"
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return 0
