# SPDX-License-Identifier: Apache-2.0

"""
How good are completions? Completions in, a report out.

`generate_completions` samples them, or they come from anywhere else. A reward function or a pairwise judge says which
are good; `evaluate_completions` puts reward, distance from the patient, diversity and head-to-head comparisons into one
`Report`, with intervals.
"""

from .bootstrap import bootstrap_interval
from .completions import Completion, generate_completions
from .diversity import distinct_n, self_similarity
from .guidance import best_of_n, evaluate_guidance, guided_kl, match_kl, next_token_statistics, sampled_kl
from .head_to_head import head_to_head
from .judges import ChatJudge, PairwiseJudge, RewardModel, parse_verdict
from .report import Report, evaluate_completions


__all__ = [
    "ChatJudge",
    "Completion",
    "PairwiseJudge",
    "Report",
    "RewardModel",
    "best_of_n",
    "bootstrap_interval",
    "distinct_n",
    "evaluate_completions",
    "evaluate_guidance",
    "generate_completions",
    "guided_kl",
    "head_to_head",
    "match_kl",
    "next_token_statistics",
    "parse_verdict",
    "sampled_kl",
    "self_similarity",
]
