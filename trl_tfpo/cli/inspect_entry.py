# SPDX-License-Identifier: Apache-2.0

"""Entry point for Inspect. Many commands of Inspect load all entry points, so this one must import little."""

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="trl-tfpo")
def trl_tfpo() -> type[ModelAPI]:
    """Return the provider of guided models."""
    from .inspect_provider import GuidedModelAPI

    return GuidedModelAPI
