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

"""Align a large frozen language model at decoding time with a small doctor trained by TFPO."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callbacks import LogGuidedCompletionsCallback
    from .data_collator import TokenRewardCollator
    from .doctors import Doctor
    from .faces import Faces
    from .generation import guided_generate
    from .logits_processor import DoctorGuidedLogitsProcessor
    from .modeling_doctor import load_doctor
    from .objective import tfpo_objective
    from .speculative import speculative_guided_generate
    from .tfpo_config import TFPOConfig
    from .tfpo_trainer import TFPOTrainer
    from .token_rewards import annotate_token_rewards
    from .visible import reward_report, show_token_rewards, show_trace

__version__ = "0.1.0"

_MODULES = {  # read when first used, so that the command line answers at once
    "Doctor": "doctors",
    "DoctorGuidedLogitsProcessor": "logits_processor",
    "Faces": "faces",
    "LogGuidedCompletionsCallback": "callbacks",
    "TFPOConfig": "tfpo_config",
    "TFPOTrainer": "tfpo_trainer",
    "TokenRewardCollator": "data_collator",
    "annotate_token_rewards": "token_rewards",
    "guided_generate": "generation",
    "load_doctor": "modeling_doctor",
    "reward_report": "visible",
    "show_token_rewards": "visible",
    "show_trace": "visible",
    "speculative_guided_generate": "speculative",
    "tfpo_objective": "objective",
}
__all__ = [
    "Doctor",
    "DoctorGuidedLogitsProcessor",
    "Faces",
    "LogGuidedCompletionsCallback",
    "TFPOConfig",
    "TFPOTrainer",
    "TokenRewardCollator",
    "annotate_token_rewards",
    "guided_generate",
    "load_doctor",
    "reward_report",
    "show_token_rewards",
    "show_trace",
    "speculative_guided_generate",
    "tfpo_objective",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
