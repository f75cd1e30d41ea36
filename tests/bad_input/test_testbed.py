# SPDX-License-Identifier: Apache-2.0

"""Questions that the controlled world refuses."""

import torch

from bad_input.calls import assert_refused, with_rows
from trl_tfpo import testbed
from trl_tfpo.testbed import load_world


# The world and its preferences
WORLD = [
    (
        "unknown attribute",
        lambda: load_world().preference_dataset("prais", num_pairs=1, seed=0),
        r"one of \['calm', 'praise'\]. Got 'prais'",
    ),
    ("no pairs", lambda: load_world().preference_dataset("praise", num_pairs=0, seed=0), "at least one prompt"),
    ("unknown split", lambda: load_world().prompts("dev"), "`split` must be one of .* Got 'dev'"),
    (
        "world that is not there",
        lambda: load_world("absent"),
        "must hold the folders 'patient' and 'doctor'.*testbed.build",
    ),
    ("comparison of an unknown attribute", lambda: testbed.Comparison(load_world(), "prais"), "Got 'prais'"),
]

# The best reward at each KL
FRONTIER = [
    (
        "frontier of nine samples",
        lambda: testbed.reward_kl_frontier(torch.randn(4, 9)),
        r"finite \(P, N\) matrix.* Got shape \(4, 9\)",
    ),
    ("frontier of a list", lambda: testbed.reward_kl_frontier([1.0] * 50), r"finite \(P, N\) matrix"),
    (
        "frontier of what is not finite",
        lambda: testbed.reward_kl_frontier(torch.full((2, 50), float("nan"))),
        r"finite \(P, N\) matrix",
    ),
    ("frontier of one reward", lambda: testbed.reward_kl_frontier(torch.ones(2, 50)), "must vary within a prompt"),
]


@with_rows(WORLD, FRONTIER)
def test_the_world_refuses(call, message, tmp_path):
    """A frontier of too few samples would be believed, and methods measured against it."""
    assert_refused(call, message, tmp_path)
