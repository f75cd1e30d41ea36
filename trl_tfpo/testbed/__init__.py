# SPDX-License-Identifier: Apache-2.0

"""
A controlled world in which alignment methods can be compared exactly.

A small language of restaurant reviews, a patient and a doctor that speak it, oracles that measure every text, and the
frontier of what any policy can reach. It needs no network, and its models run on a CPU.
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
