# SPDX-License-Identifier: Apache-2.0

"""
Evaluation of completions.

`generate_completions` samples completions. Reward functions and pairwise judges rate them. `evaluate_completions`
returns a `Report` of reward, KL from the patient, diversity and win rates, with confidence intervals.
"""

from .bootstrap import bootstrap_interval
from .completions import Completion, generate_completions
from .diversity import distinct_n, self_similarity
from .endpoint import endpoint_completions
from .judges import ChatJudge, PairwiseJudge, RewardModel, parse_verdict
from .report import Report, evaluate_completions
from .reward_and_kl import best_of_n, evaluate_guidance, guided_kl, match_kl, next_token_statistics, sampled_kl
from .strengths import measure_strengths
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
    "measure_strengths",
    "next_token_statistics",
    "parse_verdict",
    "sampled_kl",
    "self_similarity",
]
