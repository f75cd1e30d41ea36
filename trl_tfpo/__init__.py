# SPDX-License-Identifier: Apache-2.0

"""Align a large frozen language model at decoding time with a small doctor trained by TFPO."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .annotation.report import reward_report as reward_report
    from .annotation.report import show_token_rewards as show_token_rewards
    from .annotation.token_rewards import annotate_token_rewards as annotate_token_rewards
    from .decoding.doctors import Doctor as Doctor
    from .decoding.generation import guided_generate as guided_generate
    from .decoding.logits_processor import DoctorGuidedLogitsProcessor as DoctorGuidedLogitsProcessor
    from .decoding.speculative import speculative_guided_generate as speculative_guided_generate
    from .decoding.trace import show_trace as show_trace
    from .faces import Faces as Faces
    from .models.saved_doctor import load_doctor as load_doctor
    from .training.callbacks import LogGuidedCompletionsCallback as LogGuidedCompletionsCallback
    from .training.collator import TokenRewardCollator as TokenRewardCollator
    from .training.config import TFPOConfig as TFPOConfig
    from .training.objective import tfpo_objective as tfpo_objective
    from .training.trainer import TFPOTrainer as TFPOTrainer

__version__ = "0.1.0"

_MODULES = {  # imported on first use: the command line starts faster
    "Doctor": "decoding.doctors",
    "DoctorGuidedLogitsProcessor": "decoding.logits_processor",
    "Faces": "faces",
    "LogGuidedCompletionsCallback": "training.callbacks",
    "TFPOConfig": "training.config",
    "TFPOTrainer": "training.trainer",
    "TokenRewardCollator": "training.collator",
    "annotate_token_rewards": "annotation.token_rewards",
    "guided_generate": "decoding.generation",
    "load_doctor": "models.saved_doctor",
    "reward_report": "annotation.report",
    "show_token_rewards": "annotation.report",
    "show_trace": "decoding.trace",
    "speculative_guided_generate": "decoding.speculative",
    "tfpo_objective": "training.objective",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
