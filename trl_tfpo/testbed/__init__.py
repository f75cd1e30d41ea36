# SPDX-License-Identifier: Apache-2.0

"""
A controlled world for exact comparison of alignment methods.

It consists of a small language of restaurant reviews, a patient and a doctor trained on it, oracles that score texts,
and the frontier of the best possible reward at each KL. It needs no network and runs on a CPU.
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
