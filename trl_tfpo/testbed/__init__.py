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
