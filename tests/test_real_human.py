# SPDX-License-Identifier: Apache-2.0

"""The task of people's labels, on a model that is made in a second."""

import gzip
import json
import math

import pytest
import torch
from conftest import make_tokenizer
from scripts import EOS, REAL, load, make_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer


SCRIPTS = REAL


@pytest.fixture(scope="module")
def human():
    return load(REAL, "human")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    words = "good bad who why how is it the a b c d e f considerate reckless assistant. You are"
    return make_chat_model(tmp_path_factory.mktemp("human"), words)


def transcript(*turns: str) -> str:
    return "".join(
        f"\n\n{speaker}: {turn}" for speaker, turn in zip(["Human", "Assistant"] * len(turns), turns, strict=False)
    )


def write_pairs(path, pairs):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in pairs)
    return path


def test_pairs_are_last_turns_of_one_prompt_each(human, tmp_path):
    """A prompt is in one split only, and a pair with an answer that is too long is left out."""
    tokenizer = make_tokenizer("<pad> <s> </s> <unk> <user> <assistant> who why is it good bad")
    path = write_pairs(
        tmp_path / "pairs.jsonl.gz",
        [
            (transcript("who", "it is", "why", "good it"), transcript("who", "it is", "why", "bad")),
            (transcript("who", "good"), transcript("who", "bad")),  # the same first message
            (transcript("why", "good"), transcript("it", "bad")),  # two prompts
            (transcript("why is", "good"), transcript("why is", "")),
            (transcript("why it", "good"), transcript("why it", "good")),
            (transcript("is", "good " * 20), transcript("is", "bad")),  # too long
            (transcript("is it", "good"), transcript("is it", "bad")),
        ],
    )
    pairs = human.human_pairs(path, tokenizer, max_tokens=12)
    texts = {pair.prompt[0]["content"]: [tokenizer.decode(ids) for ids in pair[1:]] for pair in pairs}
    assert texts == {"who": ["good it </s>", "bad </s>"], "is it": ["good </s>", "bad </s>"]}
    assert [len(pair.prompt) for pair in pairs if pair.prompt[0]["content"] == "who"] == [3]
    assert pairs == human.human_pairs(path, tokenizer, max_tokens=12)
    with pytest.raises(ValueError, match="at most 1 tokens. Got none.*raise `--max-tokens`"):
        human.human_pairs(path, tokenizer, max_tokens=1)


def test_what_prompts_share_is_read_once(chat_model, human):
    """States read with the shared cache of prompts are those of whole forward passes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    reader, completions = human.Reader(model.eval(), tokenizer, EOS), [[7, 8, EOS], [9, EOS]]
    prompts = ["who is it good", "who is it bad", "who", "who", "who is", "why the a b c"]
    for content in prompts:
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for ids, states in zip(completions, reader.states(messages, completions), strict=True):
            hidden = model.model(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) - 1 :]
            torch.testing.assert_close(states, hidden, atol=1e-5, rtol=1e-4)


def test_fewer_candidates_stand_for_the_same_probability(human):
    """With fewer candidates, a normalizer is unbiased, and exact without guidance."""
    chance = torch.Generator().manual_seed(0)
    answer = human.Answer(
        ids=torch.tensor([7, EOS]),
        states=torch.zeros(3, 4),
        candidates=torch.arange(90).expand(2, -1),
        log_weights=torch.rand(2, 90, generator=chance).sort(dim=1, descending=True).values.log(),
        ends=True,
    )
    guidance = torch.randn(90, generator=chance)
    exact = (answer.log_weights + guidance).exp().sum(dim=1)
    found = []
    for _ in range(400):
        few = human.thinned(answer, chance)
        assert few.candidates.shape == few.log_weights.shape == (2, 64) and few.ids is answer.ids
        torch.testing.assert_close(few.log_weights.logsumexp(dim=1), answer.log_weights.logsumexp(dim=1))
        assert (few.candidates[:, :32] == answer.candidates[:, :32]).all()
        found.append((few.log_weights + guidance[few.candidates]).exp().sum(dim=1))
    found = torch.stack(found)
    assert ((found.mean(dim=0) - exact).abs() < 4 * found.std(dim=0) / 20).all()


def test_the_best_scale_is_the_log_odds_of_agreement(human):
    """Where three of four pairs agree by one nat, the best scale is log 3; where most disagree, it is 0."""
    margins = torch.tensor([1.0, 1.0, 1.0, -1.0]).double()
    assert human.best_scale(margins) == pytest.approx(math.log(3), rel=0.06)
    assert human.best_scale(margins * 1000) == pytest.approx(math.log(3) / 1000, rel=0.06)
    assert human.best_scale(-margins) == 0


def test_settings_are_chosen_without_the_test_pairs(human):
    """The setting that is better on test pairs, and worse on validation pairs, would be too good."""
    row = {"method": "DPO", "seconds": 1.0}
    rows = [
        row | {"settings": {"x": x}, "seed": seed, "validation": [1.0] * 8 + [-1.0] * lost, "test": test}
        for seed in (0, 1, 2)
        for x, lost, test in ((1, 4, [1.0, 1.0]), (2, 2, [1.0, 0.0]))
    ]
    (found,) = human.results(
        [*rows, rows[0] | {"settings": {"x": 3}, "validation": [1.0]}]
    ).values()  # of one seed only
    assert found.settings == {"x": 2} and found.agrees.tolist() == [1.0, 0.5] * 3
    assert found.validation_accuracy == pytest.approx(0.8)
    scale = math.log(4)  # 8 of 10 agree
    expected = [-math.log1p(math.exp(-scale * margin)) for margin in (1.0, 0.0)] * 3
    assert found.log_likelihoods.tolist() == pytest.approx(expected, abs=0.02)


def test_an_interval_of_pairs(human):
    """Half of 400 pairs agree: the standard error is 0.025."""
    low, high = (float(x) for x in human.interval(torch.tensor([0.0, 1.0] * 200).double(), 3)[7:-1].split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


@pytest.mark.slow
def test_the_human_task_from_pairs_to_a_table(chat_model, human, tmp_path, capsys):
    """
    People prefer answers that say "good": scores that see words find that, the length does not. What has been measured
    is not measured again.
    """
    first = [f"{x} {y} {z}" for x in "abcdef" for y in "abcdef" for z in "abcdef"][:70]
    pairs = [(transcript(x, "it is good"), transcript(x, "it is bad")) for x in first]
    arguments = ["--quick", "--model", str(chat_model), "--cache", str(tmp_path), "--max-tokens", "20"]
    arguments += ["--pairs", str(write_pairs(tmp_path / "pairs.jsonl.gz", pairs))]
    arguments += ["--output", str(tmp_path / "human.jsonl")]
    human.main(arguments)
    printed, written = capsys.readouterr().out, (tmp_path / "human.jsonl").read_text()
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    accuracy = {name: float(cell.split()[0]) for name, cell, *_ in cells[1:]}
    assert set(accuracy) == set(human.SCORES)
    assert accuracy["length"] == 0.5
    seeing = (
        "calibrated rewards",
        "linear, mean hidden state",
        "linear, last hidden state",
        "TFPO, calibrated",
        "DPO",
    )
    assert min(accuracy[name] for name in seeing) > 0.9
    seeds = [json.loads(line) for line in written.splitlines()]
    assert {row["seed"] for row in seeds} == {0, 1, 2} and {len(row["test"]) for row in seeds} == {16}
    human.main(arguments)
    assert (tmp_path / "human.jsonl").read_text() == written and capsys.readouterr().out == printed
    with pytest.raises(ValueError, match="There must be 56 pairs of at most 20 tokens. Got 30.*reduce `--num-fold`"):
        write_pairs(tmp_path / "pairs.jsonl.gz", pairs[:30])
        human.main(arguments)
