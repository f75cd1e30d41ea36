# SPDX-License-Identifier: Apache-2.0

"""Entry point for Inspect. It loads all entry points for many of its commands, so this one must import little."""

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="trl-tfpo")
def trl_tfpo() -> type[ModelAPI]:
    """Return the provider of guided models."""
    from .inspect_provider import GuidedModelAPI

    return GuidedModelAPI
