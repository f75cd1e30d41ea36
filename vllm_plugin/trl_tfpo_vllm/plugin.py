# SPDX-License-Identifier: Apache-2.0

"""Entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes."""

from .guidance import ARCHITECTURE


def register() -> None:
    """Register the model, and the checks of its config. Can be called several times."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checks import GuidedConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"trl_tfpo_vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = GuidedConfig
