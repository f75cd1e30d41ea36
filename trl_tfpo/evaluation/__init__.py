# SPDX-License-Identifier: Apache-2.0

"""
Evaluation: from completions to a report.

The completions come from `generate_completions` or from elsewhere. A reward function or a pairwise judge rates them.
`evaluate_completions` collects reward, KL from the patient, diversity and win rates in a `Report`, with confidence
intervals.
"""

from .bootstrap import bootstrap_interval
from .completions import Completion, generate_completions
from .diversity import distinct_n, self_similarity
from .endpoint import endpoint_completions
from .guidance import best_of_n, evaluate_guidance, guided_kl, match_kl, next_token_statistics, sampled_kl
from .judges import ChatJudge, PairwiseJudge, RewardModel, parse_verdict
from .report import Report, evaluate_completions
from .win_rates import head_to_head


__all__ = [
    "ChatJudge",
    "Completion",
    "PairwiseJudge",
    "Report",
    "RewardModel",
    "best_of_n",
    "bootstrap_interval",
    "distinct_n",
    "endpoint_completions",
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
