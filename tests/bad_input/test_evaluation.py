# SPDX-License-Identifier: Apache-2.0

"""Prompts, samples, rewards and reports that evaluation refuses."""

import torch
from conftest import make_llama, make_tokenizer

from bad_input.calls import assert_refused, guide, with_rows, write
from trl_tfpo import evaluation


TEXTS = ["you are", "are you"]


def complete(patient=None, prompts=TEXTS, **settings):
    return evaluation.generate_completions(
        patient or make_llama(1), make_tokenizer(), prompts, **dict(max_new_tokens=2) | settings
    )


def length(prompts, completions):
    """A reward."""
    return [float(len(text)) for text in completions]


def measure(reward_fn=length, **settings):
    return evaluation.evaluate_guidance(
        make_llama(1), make_tokenizer(), TEXTS, reward_fn, max_new_tokens=2, **settings
    )


def report(methods=None, reward_fn=length, **settings):
    methods = methods or {"patient": ["bad", "bad"], "doctor": ["kind", "bad"]}
    return evaluation.evaluate_completions(TEXTS, methods, reward_fn, **settings)


def judge(base_url="http://localhost/v1", **settings):
    return evaluation.ChatJudge(base_url, "model", **settings)


# Completions
COMPLETIONS = [
    ("no prompt", lambda: complete(prompts=[]), r"at least one prompt.* Got \[\]"),
    ("a text instead of prompts", lambda: complete(prompts="you are"), "a sequence .*Got 'you are'.*pass a list"),
    ("prompt without tokens", lambda: complete(prompts=[""]), "must have at least one token. Got none for ''"),
    ("prompt that is a number", lambda: complete(prompts=[3]), "must be a text, or messages that have a role. Got 3"),
    ("prompt without messages", lambda: complete(prompts=[[]]), r"messages that have a role. Got \[\]"),
    ("no samples", lambda: complete(num_samples_per_prompt=0), "`num_samples_per_prompt` 0"),
    ("batches of nothing", lambda: complete(batch_size=-1), "`batch_size` must be at least 1. Got -1"),
    ("negative temperature", lambda: complete(temperature=-1.0), "`temperature` must be at least 0.* Got -1.0"),
    (
        "temperature that is no number",
        lambda: complete(temperature=float("nan")),
        "`temperature` must be at least 0.* Got nan",
    ),
    ("top_p above one", lambda: complete(top_p=7.0), r"`top_p` in \(0, 1\]. Got 1.0 and 7.0"),
    ("no new tokens", lambda: complete(max_new_tokens=0), "`max_new_tokens` must be greater than 0"),
    ("patient in training mode", lambda: complete(patient=make_llama(1).train()), "must be in eval mode"),
]

# KL from the patient
KL = [
    ("a weight for each row", lambda: complete(guide=guide(beta=torch.tensor([0.1, 0.2]))), "one strength at a time"),
    (
        "KL of a weight for each row",
        lambda: evaluation.guided_kl(make_llama(1), guide(beta=torch.tensor([0.1, 0.2])), []),
        "one strength at a time",
    ),
    (
        "KL in batches of nothing",
        lambda: evaluation.next_token_statistics(make_llama(1), None, [], batch_size=0),
        "`batch_size` must be at least 1",
    ),
    (
        "KL of tokens that differ",
        lambda: evaluation.sampled_kl([torch.zeros(3)], [torch.zeros(1)]),
        "the same token ids with both",
    ),
    ("KL at a temperature", lambda: measure(temperature=0.7), "`temperature` must be 1. Got 0.7"),
    (
        "KL of zero",
        lambda: evaluation.match_kl(make_llama(1), make_tokenizer(), TEXTS, guide, 0.0),
        "`target_kl` must be positive. Got 0.0",
    ),
]

# Rewards of completions
REWARDS = [
    (
        "a reward too few",
        lambda: measure(lambda **_: [1.0]),
        r"a finite number for each completion. Got \[1.0\] for 2",
    ),
    (
        "reward that is not finite",
        lambda: measure(lambda **_: [1.0, float("nan")]),
        "a finite number for each completion",
    ),
    ("no rewards", lambda: measure(lambda **_: None), "a finite number for each completion. Got None"),
]

# Statistics
STATISTICS = [
    ("n-grams of nothing", lambda: evaluation.distinct_n(["a"], 0), "`n` must be at least 1. Got 0"),
    (
        "pairs of nothing",
        lambda: evaluation.self_similarity([["a", "b"]], max_pairs=0),
        "`max_pairs` must be at least 1",
    ),
    ("best of more than there are", lambda: evaluation.best_of_n([[0.0, 1.0]], n=3), "`n` must be between 1 .* Got 3"),
    (
        "best of what is not finite",
        lambda: evaluation.best_of_n([[0.0, float("nan")]], n=1),
        "finite rewards.* 1 rewards that are not finite",
    ),
    ("interval of one prompt", lambda: evaluation.bootstrap_interval([1.0]), "at least two prompts"),
    ("interval of what is not finite", lambda: evaluation.bootstrap_interval([1.0, float("inf")]), "1 not finite"),
    ("level of one", lambda: evaluation.bootstrap_interval([1.0, 2.0], level=1.0), "`level` must be between 0 and 1"),
    ("no resamples", lambda: evaluation.bootstrap_interval([1.0, 2.0], num_resamples=0), "`num_resamples` at least 1"),
]

# Two methods, head to head
COMPARISONS = [
    (
        "completions of half the prompts",
        lambda: evaluation.head_to_head(TEXTS, ["a"], ["a", "b"], length),
        "the same number of completions",
    ),
    (
        "other numbers of seeds",
        lambda: evaluation.head_to_head(["a"], [["x"]] * 3, [["y"]] * 2, length),
        "Got 2 for 3",
    ),
    (
        "negative tie margin",
        lambda: evaluation.head_to_head(["a"], ["x"], ["y"], length, tie_margin=-1.0),
        "`tie_margin` must not be negative",
    ),
]

# Reports of methods
REPORTS = [
    ("no methods", lambda: evaluation.evaluate_completions(TEXTS, {}), "must name methods"),
    ("unknown baseline", lambda: report(baseline="dpo"), "must name methods .* Got 'dpo'"),
    ("nobody to judge", lambda: report(reward_fn=None, baseline="patient"), "a judge or a reward function"),
    ("completion of no prompt", lambda: report(methods={"doctor": ["one text"]}), "2 prompts"),
    ("measure of another size", lambda: report(measures={"doctor": {"kl": [0.1]}}), "one for each completion"),
    ("measure that is there", lambda: report(measures={"doctor": {"reward": [0.1, 0.2]}}), "new names"),
    ("level above one", lambda: report(level=1.5), "`level` must be between 0 and 1"),
    (
        "level above one for a single prompt",
        lambda: evaluation.evaluate_completions(["a"], {"doctor": ["x"]}, length, level=1.5),
        "`level` must be between 0 and 1",
    ),
    (
        "report of something else",
        lambda: evaluation.Report.load(write("other.json", '{"a": 1}')),
        "a file that `Report.save` wrote",
    ),
    (
        "report that is cut",
        lambda: evaluation.Report.load(write("cut.json", '{"settings": ')),
        "a file that `Report.save` wrote",
    ),
]

# Reward models and judges
JUDGES = [
    (
        "reward model that is not there",
        lambda: evaluation.RewardModel("./absent"),
        "Got './absent', which does not exist",
    ),
    ("reward model of two labels", lambda: evaluation.RewardModel(make_llama(1)), "must have one label"),
    ("endpoint without http", lambda: judge("localhost:8000"), "URL of an endpoint.* Got 'localhost:8000'"),
    ("judge without workers", lambda: judge(num_workers=0), "number of requests must be at least 1.* Got 0"),
    ("judge of one completion", lambda: judge().judge(["a"], [["x"]]), "two completions for each prompt"),
]


@with_rows(COMPLETIONS, KL, REWARDS, STATISTICS, COMPARISONS, REPORTS, JUDGES)
def test_evaluation_is_refused(call, message, tmp_path):
    """A report on texts shifted by one looks like any other."""
    assert_refused(call, message, tmp_path)
