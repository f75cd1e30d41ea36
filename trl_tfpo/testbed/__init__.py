# SPDX-License-Identifier: Apache-2.0

"""
A controlled world in which alignment methods can be compared exactly.

It has a small language of restaurant reviews; a patient and a doctor, trained on it; oracles that score every text;
and the frontier of the best possible reward at each KL. It needs no network, and its models run on a CPU.
"""

from .frontier import Frontier, reward_kl_frontier
from .language import Attribute, Language, random_language
from .report import Comparison
from .world import World, load_world, sample_completions


__all__ = [
    "Attribute",
    "Comparison",
    "Frontier",
    "Language",
    "World",
    "load_world",
    "random_language",
    "reward_kl_frontier",
    "sample_completions",
]
