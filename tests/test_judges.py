# SPDX-License-Identifier: Apache-2.0

"""Who judges: reward models against a plain forward, a chat judge against a real endpoint on this machine."""

import pytest
import torch
from conftest import make_tokenizer, save_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from trl_tfpo.evaluation import ChatJudge, RewardModel, head_to_head, parse_verdict


def make_judge(endpoint, **settings):
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    return ChatJudge(url, "a-judge", **{"backoff": 0.0, "num_workers": 2, **settings})


PROMPTS = ["one", "two", "three", [{"role": "user", "content": "mute"}]]
OURS, THEIRS = ["good", "bad", "plain", "good"], ["bad", "good", "words", "bad"]


def test_verdicts_hold_in_both_orders(endpoint, tmp_path):
    """A judge who prefers what it reads first would give the method that comes first half a win for nothing."""
    judge = make_judge(endpoint, api_key="secret", cache_file=tmp_path / "answers.jsonl")
    result = head_to_head(PROMPTS, OURS, THEIRS, judge)
    assert (result["win"], result["loss"], result["tie"]) == (0.25, 0.25, 0.5)
    assert result["win_half_tie"] == 0.5 and result["num_without_verdict"] == 1
    assert result["consistency"] == pytest.approx(2 / 3)  # where neither is good it says A in both orders
    path, key, payload = endpoint.requests[0]
    assert (path, key, payload["model"]) == ("/v1/chat/completions", "Bearer secret", "a-judge")
    assert "secret" not in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")

    swapped = head_to_head(PROMPTS, THEIRS, OURS, judge)
    assert (swapped["win"], swapped["loss"], swapped["tie"]) == (result["loss"], result["win"], result["tie"])
    assert len(endpoint.requests) == judge.num_answered == 8  # each pair and order is paid for once


def test_no_answer_is_paid_for_twice(endpoint, tmp_path):
    """Judging 300 prompts costs money: what was answered before a run broke off has to be there for the next."""
    cache_file = tmp_path / "answers.jsonl"
    endpoint.failures = [200, 200, 200] + [500] * 9
    with pytest.raises(ConnectionError, match="must answer.*Answers so far are kept"):
        make_judge(endpoint, cache_file=cache_file, num_workers=1, max_retries=1).judge(
            PROMPTS, list(zip(OURS, THEIRS, strict=True)), shuffle_order=False
        )
    with open(cache_file, "ab") as file:
        file.write(b'{"key": "cut o')
    endpoint.failures, before = [429, 503], len(endpoint.requests)
    judge = make_judge(endpoint, cache_file=cache_file)
    verdicts = judge.judge(PROMPTS, list(zip(OURS, THEIRS, strict=True)), shuffle_order=False)
    assert verdicts == [0, 1, 0, -1]
    assert judge.num_answered == 1 and len(endpoint.requests) - before == 3  # two of them refused, and sent again
    assert (
        make_judge(endpoint, cache_file=cache_file).judge(
            PROMPTS, list(zip(OURS, THEIRS, strict=True)), shuffle_order=False
        )
        == verdicts
    )
    assert len(endpoint.requests) - before == 3


@pytest.mark.parametrize(
    ("failures", "error"), [([500] * 3, ConnectionError), (["garbage"] * 3, ConnectionError), ([400], ValueError)]
)
def test_no_request_is_sent_after_one_that_failed_for_good(endpoint, tmp_path, failures, error):
    """With an endpoint that is away, each of 600 requests would be tried for minutes, and a wrong one be paid for."""
    endpoint.failures = [200, *failures]
    cache_file = tmp_path / "answers.jsonl"
    prompts = [f"prompt {index}" for index in range(8)]
    judge = make_judge(endpoint, cache_file=cache_file, num_workers=1, max_retries=2)
    with pytest.raises(error, match="Answers so far are kept"):
        judge.judge(prompts, [["good", "bad"]] * 8, shuffle_order=False)
    assert len(endpoint.requests) == 1 + len(failures)
    assert len(cache_file.read_text(encoding="utf-8").splitlines()) == judge.num_answered == 1


@pytest.mark.parametrize("failure", [408, "garbage", "hang up", "slow"])
def test_trouble_that_passes_is_waited_out(endpoint, failure):
    """One lost connection would end an evaluation of an hour, or hold it up for ever."""
    endpoint.failures = [failure]
    judge = make_judge(endpoint, timeout=0.5 if failure == "slow" else 60)
    assert judge.judge(["one"], [["good", "bad"]], shuffle_order=False) == [0]
    assert len(endpoint.requests) == 2


def test_a_conversation_is_shown_whole(endpoint):
    """A judge who sees the last turn alone judges an answer to another question."""
    conversation = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "what"}]
    make_judge(endpoint, request={"max_tokens": 9}).judge(
        [[*conversation, {"role": "user", "content": "soup"}]], ["ab"]
    )
    payload = endpoint.requests[0][2]
    assert "user: say\n\nassistant: what\n\nuser: soup" in payload["messages"][1]["content"]
    assert payload["max_tokens"] == 9 and "temperature" not in payload


def test_any_pairwise_judge_will_do():
    """A judge that fails on a pair returns -1; one that loses a pair would shift all others."""

    class Judge:
        def judge(self, prompts, completions, shuffle_order=True):
            assert not shuffle_order
            verdicts = [int("good" in second) for _, second in completions]
            return [-1 if prompt == "two" else verdict for prompt, verdict in zip(prompts, verdicts, strict=True)]

    result = head_to_head(["one", "two"], ["good", "good"], ["bad", "bad"], Judge())
    assert (result["win"], result["tie"], result["num_without_verdict"]) == (0.5, 0.5, 1)

    class Careless:
        def judge(self, prompts, completions, shuffle_order=True):
            return [0] if len(prompts) > 2 else [7, 7]

    for prompts in (["one", "two"], ["one"]):
        with pytest.raises(ValueError, match="must return 0, 1, 0.5 or -1"):
            head_to_head(prompts, ["a"] * len(prompts), ["b"] * len(prompts), Careless())


def test_what_the_endpoint_refuses_is_not_sent_again(endpoint):
    """A wrong key would be tried for an hour, and be locked."""
    endpoint.failures = [401] * 9
    with pytest.raises(ValueError, match="must accept the request. Got 401"):
        make_judge(endpoint, num_workers=1).judge(["one"], [["a", "b"]])
    assert len(endpoint.requests) == 1
    assert make_judge(endpoint).judge(["one"], [["same", "same"]]) == [0.5]
    assert len(endpoint.requests) == 1
    with pytest.raises(ValueError, match="two completions for each prompt"):
        make_judge(endpoint).judge(["one"], [["a"]])
    with pytest.raises(ValueError, match="URL of an endpoint"):
        ChatJudge("localhost:8000", "a-judge")


def test_order_on_screen_does_not_change_whose_verdict_it_is(endpoint):
    """Swapped and not swapped back, wins would be losses for half of the prompts."""
    prompts = [f"prompt {index}" for index in range(12)]
    pairs = [["good", "bad"] if index % 3 else ["bad", "good"] for index in range(12)]
    verdicts = make_judge(endpoint).judge(prompts, pairs)
    assert verdicts == [0 if index % 3 else 1 for index in range(12)]
    shown_first = [payload["messages"][1]["content"].index("good") for _, _, payload in endpoint.requests]
    assert len(set(shown_first)) > 1  # some of them were


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("Verdict: A", 0.0),
        ("Verdict: A is worse.\n**Verdict: B**", 1.0),
        ("verdict - tie.", 0.5),
        ("Verdict: A and B", -1.0),
        ("", -1.0),
    ],
)
def test_verdicts_are_read_from_the_end(answer, verdict):
    """A judge that argues first names both on the way."""
    assert parse_verdict(answer) == verdict


def reward_model(**settings):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(vocab_size=len(make_tokenizer()), initializer_range=0.5, max_position_embeddings=32)
    return LlamaForSequenceClassification(
        LlamaConfig(**shape, **{"num_labels": 1, "pad_token_id": 0} | settings)
    ).eval()


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_a_reward_does_not_depend_on_its_neighbours(pad_token_id, tmp_path):
    """Read at a padding token, the reward of a short text is a constant."""
    model, tokenizer = reward_model(pad_token_id=pad_token_id), make_tokenizer()
    prompts = [[{"role": "user", "content": "say the soup"}], [{"role": "user", "content": "say the bread"}]] * 2
    texts = ["the soup is very good and kind", "bad", "the bread is bad", "good and kind"]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        messages = [*prompt, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        expected.append(model(torch.tensor([ids])).logits[0, 0].item())
    assert RewardModel(model, tokenizer, batch_size=3)(prompts, texts) == pytest.approx(expected, abs=1e-5)
    save_model(tmp_path, model, tokenizer)
    assert RewardModel(str(tmp_path))(prompts, texts) == pytest.approx(expected, abs=1e-5)
    result = head_to_head(prompts[:2], texts[:2], texts[2:], RewardModel(model, tokenizer))
    assert result["win"] == sum(a > b for a, b in zip(expected[:2], expected[2:], strict=True)) / 2


def test_a_model_that_pads_with_its_eos_reads_the_same_last_token():
    """Found by the padding of the tokenizer, the last token would be one too early, or padding."""
    tokenizer, model = make_tokenizer(), reward_model()
    texts = ["the soup is very good", "bad"]  # without EOS at the end
    expected = RewardModel(model, tokenizer)(["say ", "say "], texts)
    pads_with_eos = reward_model(pad_token_id=2)
    pads_with_eos.load_state_dict(model.state_dict())
    assert RewardModel(pads_with_eos, tokenizer)(["say ", "say "], texts) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_can_be_a_reward_model():
    """Many reward models are encoders, which see padding unless it is masked."""
    shape = dict(vocab_size=len(make_tokenizer()), hidden_size=16, intermediate_size=16, initializer_range=0.5)
    config = BertConfig(**shape, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    judge = RewardModel(BertForSequenceClassification(config), make_tokenizer())
    prompts, texts = ["say the soup ", "you "], ["is very good", "bad"]
    alone = [judge([prompt], [text])[0] for prompt, text in zip(prompts, texts, strict=True)]
    assert judge(prompts, texts) == pytest.approx(alone, abs=1e-5)


def test_an_answer_that_was_begun_is_one_message():
    """Two assistant turns in a row are a conversation that the patient did not have."""
    judge = RewardModel(reward_model(), make_tokenizer())
    begun = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the soup"}]
    assert judge([begun], [" is good"]) == judge([begun[:1]], ["the soup is good"])


def test_what_is_no_reward_model_is_refused(tmp_path):
    """A head that is not in the checkpoint is random, and so would be every figure of the report."""
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="one label"):
        RewardModel(reward_model(num_labels=2), tokenizer)
    with pytest.raises(ValueError, match="pass `processing_class`"):
        RewardModel(reward_model())
    with pytest.raises(ValueError, match="32 positions"):
        RewardModel(reward_model(), tokenizer)(["the soup " * 20], ["good"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="need a chat template"):
        RewardModel(reward_model(), tokenizer)([[{"role": "user", "content": "say"}]], ["good"])
    reward_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have all weights"):
        RewardModel(str(tmp_path), tokenizer)
