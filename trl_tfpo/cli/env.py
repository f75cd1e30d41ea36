# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""`trl-tfpo env`: what is installed, ready to paste in a bug report."""

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
