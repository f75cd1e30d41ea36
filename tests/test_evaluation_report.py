# SPDX-License-Identifier: Apache-2.0

"""The report: intervals that cover what they should, numbers worked by hand, a file that is whole or not there."""

import json
import math
import random

import pytest
import torch

from trl_tfpo.evaluation import (
    Completion,
    Report,
    bootstrap_interval,
    evaluate_completions,
    head_to_head,
    self_similarity,
)


def kindness(prompts, completions):
    return [float(text.count("kind")) for text in completions]


PROMPTS = ["one", "two"]
TEXTS = {"patient": ["bad", "bad and kind"], "doctor": ["kind", "kind and kind"]}


def test_intervals_cover_the_mean_as_often_as_they_say():
    """An interval that is too short makes a claim out of noise."""
    generator = torch.Generator().manual_seed(0)
    draws = 3 + torch.randn(300, 40, generator=generator, dtype=torch.float64)
    found = [bootstrap_interval(row, level=0.9, num_resamples=400, seed=i) for i, row in enumerate(draws)]
    coverage = sum(low <= 3 <= high for low, high in found) / len(found)
    assert 0.84 <= coverage <= 0.94  # 0.9 less a little, for 40 prompts; the standard error is 0.017
    assert sum(high - low for low, high in found) / len(found) == pytest.approx(2 * 1.645 / 40**0.5, rel=0.1)


def test_seeds_that_differ_widen_an_interval():
    """Prompts alone would call what one lucky seed reached a result."""
    prompts = torch.linspace(-1, 1, 30, dtype=torch.float64)
    alike = bootstrap_interval(torch.stack([prompts, prompts, prompts]))
    apart = bootstrap_interval(torch.stack([prompts - 3, prompts, prompts + 3]))
    assert alike == pytest.approx(bootstrap_interval(prompts), abs=0.05)
    assert apart[1] - apart[0] > 3 * (alike[1] - alike[0])


def test_head_to_head_by_hand():
    """Every sample against every one of the baseline: 1 win, 2 ties and 1 loss, and 4 wins."""
    ours, theirs = ["kind", "bad", "kind", "kind"], ["kind", "bad", "bad", "bad"]
    result = head_to_head(PROMPTS, ours, theirs, kindness)
    assert [result[name] for name in ("win", "tie", "loss")] == [5 / 8, 2 / 8, 1 / 8]
    assert result["win_half_tie"] == 6 / 8
    swapped = head_to_head(PROMPTS, theirs, ours, kindness)
    assert [swapped[name] for name in ("loss", "tie", "win")] == [5 / 8, 2 / 8, 1 / 8]
    assert swapped["low"] == pytest.approx(1 - result["high"]) and swapped["high"] == pytest.approx(1 - result["low"])
    assert head_to_head(PROMPTS, ours, theirs, kindness, tie_margin=1.0)["tie"] == 1


def test_similarity_by_hand():
    """Samples that are all the same, the sign of a collapsed policy, must be at one end of the scale."""
    texts = ["a b c", "a b c", "a x c", ""]
    pairs = [1, 2 / 3, 2 / 3, 0, 0, 0]  # 1 - edits over the longer, in words
    assert self_similarity([texts]).item() == pytest.approx(sum(pairs) / 6)
    assert self_similarity([["same"] * 5]).item() == 1
    assert math.isnan(self_similarity([["alone"]]).item())
    rows = torch.randint(5, (2, 40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    few, all_pairs = self_similarity(rows, max_pairs=400), self_similarity(rows, max_pairs=1000)
    assert torch.allclose(few, all_pairs, atol=0.02) and not torch.equal(few, all_pairs)


def test_similarity_is_that_of_the_textbook_table():
    """All pairs are computed in one table, and a wrong step in it would be in every report."""

    def edits(first, second):
        table = {(i, 0): i for i in range(len(first) + 1)} | {(0, j): j for j in range(len(second) + 1)}
        for i, one in enumerate(first, 1):
            for j, other in enumerate(second, 1):
                steps = (table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (one != other))
                table[i, j] = min(steps)
        return table[len(first), len(second)]

    rng = random.Random(0)
    pairs = [[[rng.randrange(4) for _ in range(rng.randrange(13))] for _ in range(2)] for _ in range(60)]
    expected = [1 - edits(one, other) / max(len(one), len(other), 1) for one, other in pairs]
    assert self_similarity(pairs).tolist() == pytest.approx(expected)


def test_a_figure_of_equal_numbers_is_drawn(tmp_path):
    """A mean that rounding puts beside its interval would cost the figure of a long run."""
    prompts = [f"prompt {index}" for index in range(7)]
    texts = {"patient": ["bad"] * 21, "doctor": ["kind", "kind", "bad"] * 7}
    report = evaluate_completions(prompts, texts, kindness, baseline="patient")
    row = report.methods["doctor"]["head_to_head"]
    row["low"], row["high"] = row["win_half_tie"] + 1e-16, row["win_half_tie"] + 2e-16
    report.plot(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 0


def test_completions_of_other_prompts_are_refused():
    """Shifted by one prompt, a method would be judged on answers to other questions."""
    completions = [Completion(prompt, [1], [2], "kind", True) for prompt in PROMPTS]
    measures = evaluate_completions(PROMPTS, {"doctor": completions}, kindness).methods["doctor"]["measures"]
    assert measures["num_tokens"]["mean"] == measures["is_complete"]["mean"] == 1
    assert "tokens_per_second" not in measures  # nobody timed them
    timed = [Completion(prompt, [1], [2, 3, 4], "kind", True, seconds=0.5) for prompt in PROMPTS]
    measures = evaluate_completions(PROMPTS, {"doctor": timed}, kindness).methods["doctor"]["measures"]
    assert measures["tokens_per_second"] == {"mean": 6.0, "low": None, "high": None}
    with pytest.raises(ValueError, match="in the order of the prompts"):
        evaluate_completions(PROMPTS, {"doctor": completions[::-1]}, kindness)


def test_a_report_is_the_same_after_its_file(tmp_path, monkeypatch):
    """What was shown and what was kept must not differ, and a full disk must not cost the report before."""
    report = evaluate_completions(
        PROMPTS,
        TEXTS,
        kindness,
        baseline="patient",
        measures={"doctor": {"kl": [0.1, 0.3], "extra_forwards_per_token": 1.0}},
    )
    measures = report.methods["doctor"]["measures"]
    assert measures["reward"]["mean"] == 1.5 and measures["kl"]["mean"] == pytest.approx(0.2)
    assert measures["extra_forwards_per_token"] == {"mean": 1.0, "low": None, "high": None}
    assert measures["distinct_1"]["mean"] == 2 / 4 and measures["num_words"]["mean"] == 2
    assert report.methods["doctor"]["head_to_head"]["win"] == 1 and report.methods["patient"]["head_to_head"] is None
    path = tmp_path / "runs" / "report.json"
    report.save(path)
    assert Report.load(path) == report
    assert json.loads(path.read_text(encoding="utf-8"))["settings"]["baseline"] == "patient"

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            report.save(path)
    assert Report.load(path) == report and [file.name for file in path.parent.iterdir()] == ["report.json"]

    table = report.table()
    assert "| reward | 0.500" in table and "| win + half ties against patient |  | 1.000" in table
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_several_seeds_are_one_method():
    """The samples of three seeds are not three times as many prompts."""
    report = evaluate_completions(PROMPTS, {"doctor": [["kind", "bad"], ["bad", "bad"]]}, kindness)
    row = report.methods["doctor"]
    assert (row["num_seeds"], row["num_samples_per_prompt"], row["measures"]["reward"]["mean"]) == (2, 1, 0.25)
