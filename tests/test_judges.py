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

"""Judges: reward models against a forward pass of their own, language models behind a real endpoint on this machine."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import make_llama, make_tokenizer
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from trl_tfpo.evaluation import ChatJudge, RewardModel, head_to_head, parse_verdict


PROMPTS = ["say the soup", [{"role": "user", "content": "say"}], "you"]
TEXTS = [" is very good and kind", "the bread is bad", " rude"]


def make_reward_model(num_labels: int = 1, **settings) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(vocab_size=22, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(**(sizes | dict(initializer_range=0.5, pad_token_id=0) | settings), num_labels=num_labels)
    return LlamaForSequenceClassification(config)


class Endpoint:
    """A judge on HTTP that prefers the longer response; `script` says what it does instead, request by request."""

    def __init__(self, answer=None):
        self.requests, self.headers, self.script = [], [], []
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(request)
                    endpoint.headers.append((self.path, dict(self.headers)))
                    step = endpoint.script.pop(0) if endpoint.script else None
                if step == "hang up":
                    return
                if step == "slow":
                    endpoint.wake.wait(5)
                status = step if isinstance(step, int) else 200
                body = b"not json"
                if step != "garbage":
                    text = (answer or endpoint.longer)(request["messages"][1]["content"])
                    body = json.dumps({"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}})
                    body = body.encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.wake = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @staticmethod
    def responses(question: str) -> list[str]:
        return [re.search(rf"<response {x}>\n(.*?)\n</response {x}>", question, re.DOTALL)[1] for x in "AB"]

    def longer(self, question: str) -> str:
        first, second = self.responses(question)
        verdict = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
        return f"I looked at both.\n\nVerdict: {verdict}"

    def close(self):
        self.wake.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


# Reward models


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_reward_is_that_of_a_forward_pass_of_its_own(batch_size):
    """Else the reward of a text would depend on its neighbours in the batch, or on the padding."""
    tokenizer, model = make_tokenizer(), make_reward_model()
    rewards = RewardModel(model, tokenizer, batch_size=batch_size)(prompts=PROMPTS, completions=TEXTS)
    conversation = [*PROMPTS[1], {"role": "assistant", "content": TEXTS[1]}]
    rows = [tokenizer(PROMPTS[0] + TEXTS[0])["input_ids"], tokenizer.apply_chat_template(conversation)["input_ids"]]
    rows.append(tokenizer(PROMPTS[2] + TEXTS[2])["input_ids"])
    assert len({*map(len, rows)}) == 3  # or nothing is padded
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert max(rewards) - min(rewards) > 0.01  # or the test shows nothing


def test_a_model_that_pads_with_its_eos_or_not_at_all_reads_the_same_last_token():
    """Else the reward would be taken at padding, or before the end."""
    tokenizer, reference = make_tokenizer(), make_reward_model()
    expected = RewardModel(reference, tokenizer)(PROMPTS[::2], TEXTS[::2])
    for pad_token_id in (None, 2):
        model = make_reward_model(pad_token_id=pad_token_id)
        model.load_state_dict(reference.state_dict())
        assert RewardModel(model, tokenizer)(PROMPTS[::2], TEXTS[::2]) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_can_be_a_reward_model():
    """Many reward models are encoders, which see padding unless it is masked."""
    sizes = dict(vocab_size=22, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=1))
    judge = RewardModel(model, make_tokenizer())
    assert judge(PROMPTS, TEXTS) == pytest.approx(
        [judge([prompt], [text])[0] for prompt, text in zip(PROMPTS, TEXTS, strict=True)], abs=1e-5
    )


def test_an_answer_that_was_begun_is_one_message():
    """Else the reward model would see a conversation that the patient did not have."""
    judge = RewardModel(make_reward_model(), make_tokenizer())
    begun = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the soup"}]
    whole = judge([begun[:1]], ["the soup is good"])
    assert judge([begun], [" is good"]) == whole


def test_a_reward_model_by_name(tmp_path):
    """A name, or a folder, is what most users have."""
    model, tokenizer = make_reward_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    by_name = RewardModel(str(tmp_path / "reward"), dtype=torch.float32)
    assert by_name(PROMPTS, TEXTS) == pytest.approx(RewardModel(model, tokenizer)(PROMPTS, TEXTS), abs=1e-6)

    patient = make_llama(seed=0)  # no classifier: its head would be random
    patient.config.num_labels = 1
    patient.save_pretrained(tmp_path / "patient")
    tokenizer.save_pretrained(tmp_path / "patient")
    with pytest.raises(ValueError, match="must come with its head"):
        RewardModel(str(tmp_path / "patient"))


def test_what_is_no_reward_model_is_refused():
    """Else the first of many logits, or a text cut short, would pass for a reward."""
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="must have one label. Got .* `num_labels`=2"):
        RewardModel(make_reward_model(num_labels=2), tokenizer)
    with pytest.raises(ValueError, match="pass `processing_class`"):
        RewardModel(make_reward_model())
    with pytest.raises(ValueError, match="must fit the 4 positions"):
        RewardModel(make_reward_model(max_position_embeddings=4), tokenizer)(PROMPTS, TEXTS)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="need a chat template"):
        RewardModel(make_reward_model(), tokenizer)(PROMPTS, TEXTS)
    with pytest.raises(ValueError):
        RewardModel(make_reward_model(), tokenizer)(PROMPTS[:1], TEXTS)


# Language models behind an endpoint


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Verdict: A", 0),
        ("because...\n**Verdict:** B.", 1),
        ("verdict: Tie\n", 0.5),
        ("Verdict: Response B", 1),
        ("One may say 'Verdict: A'\nbut no.\nVerdict: B", 1),
        ("Verdict: A is better than B", -1),
        ("Verdict: neither", -1),
        ("A", -1),
        ("", -1),
    ],
)
def test_verdicts_by_hand(answer, verdict):
    """Else reasons would be taken for a verdict."""
    assert parse_verdict(answer) == verdict


def test_a_judge_asks_the_endpoint_and_says_which_is_better(endpoint):
    """Else the verdicts would belong to the other method, or the key would not reach the endpoint."""
    judge = ChatJudge(endpoint.url, "judge-1", api_key="secret", request={"max_tokens": 9})
    conversation = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "ok"}]
    prompts = ["p", conversation, "q", "same"]
    pairs = [["long", "no"], ["no", "long"], ["abc", "def"], ["x", "x"]]
    for shuffle_order in (False, True):
        assert judge.judge(prompts, pairs, shuffle_order=shuffle_order) == [0, 1, 0.5, 0.5]
    assert endpoint.headers[0][0] == "/v1/chat/completions"
    assert endpoint.headers[0][1]["Authorization"] == "Bearer secret"
    assert {request["model"] for request in endpoint.requests} == {"judge-1"}
    assert all(request["max_tokens"] == 9 and "temperature" not in request for request in endpoint.requests)
    questions = [request["messages"][1]["content"] for request in endpoint.requests]
    assert any("user: say\n\nassistant: ok" in question for question in questions)
    assert not any("same" in question for question in questions)  # the same text twice is a tie for nothing


def test_half_of_the_pairs_are_shown_the_other_way_round(endpoint):
    """Else a judge who prefers what it reads first would favour one method."""
    prompts, pairs = [f"prompt {i}" for i in range(40)], [["first", "second one"]] * 40
    assert ChatJudge(endpoint.url, "m").judge(prompts, pairs) == [1] * 40
    shown_first = [endpoint.responses(request["messages"][1]["content"])[0] for request in endpoint.requests]
    assert 8 < shown_first.count("first") < 32


def test_nothing_is_paid_twice(endpoint, tmp_path):
    """Else a run that was killed, or is repeated, would cost as much as the first."""
    cache = tmp_path / "folder" / "judge.jsonl"
    prompts, pairs = ["p", "q", "p"], [["a", "bb"], ["aa", "b"], ["a", "bb"]]
    judge = ChatJudge(endpoint.url, "m", api_key="secret", cache_file=cache)
    assert judge.judge(prompts, pairs, shuffle_order=False) == [1, 0, 1]
    assert len(endpoint.requests) == judge.num_answered == 2  # a pair that comes twice is asked once
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert [line["usage"] for line in lines] == [{"total_tokens": 7}] * 2
    assert "secret" not in cache.read_text()

    cache.write_bytes(cache.read_bytes() + b'{"key": "cut o')  # killed while it wrote
    again = ChatJudge(endpoint.url, "m", cache_file=cache)
    assert again.judge([*prompts, "r"], [*pairs, ["b", "a longer one"]], shuffle_order=False) == [1, 0, 1, 1]
    assert len(endpoint.requests) == 3 and again.num_answered == 1
    assert ChatJudge(endpoint.url, "m", cache_file=cache).judge(["r"], [["b", "a longer one"]], False) == [1]
    assert len(endpoint.requests) == 3
    ChatJudge(endpoint.url, "other", cache_file=cache).judge(["p"], [["a", "bb"]], False)
    assert len(endpoint.requests) == 4  # another model has another opinion


@pytest.mark.parametrize("trouble", [500, 429, "garbage", "hang up"])
def test_trouble_that_passes_is_waited_out(endpoint, trouble):
    """Else one busy minute of an endpoint would end an evaluation of an hour."""
    endpoint.script = [trouble, trouble]
    judge = ChatJudge(endpoint.url, "m", backoff=0.01, num_workers=1)
    assert judge.judge(["p"], [["a", "bb"]], shuffle_order=False) == [1]
    assert len(endpoint.requests) == 3


def test_an_endpoint_that_is_too_slow_is_asked_again(endpoint):
    """Else a connection that was lost would be waited for forever."""
    endpoint.script = ["slow"]
    judge = ChatJudge(endpoint.url, "m", backoff=0.01, timeout=0.3)
    assert judge.judge(["p"], [["a", "bb"]], shuffle_order=False) == [1]
    assert len(endpoint.requests) == 2


def test_what_was_paid_for_survives_a_failure(endpoint, tmp_path):
    """Else the answers before a failure would be lost with it."""
    prompts, pairs = [f"p{i}" for i in range(6)], [["a", "bb"]] * 6
    endpoint.script = [None, None, 500, 500, 500]
    settings = dict(cache_file=tmp_path / "judge.jsonl", num_workers=1, max_retries=2, backoff=0.01)
    with pytest.raises(ConnectionError, match="must answer. Got 500.* in 3 attempts.*kept in"):
        ChatJudge(endpoint.url, "m", **settings).judge(prompts, pairs, shuffle_order=False)
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2
    asked = len(endpoint.requests)
    endpoint.script = []
    assert ChatJudge(endpoint.url, "m", **settings).judge(prompts, pairs, shuffle_order=False) == [1] * 6
    assert len(endpoint.requests) - asked == 4


def test_a_request_that_is_refused_is_not_repeated(endpoint):
    """A wrong key does not become right, and many endpoints lock out who insists."""
    endpoint.script = [401]
    with pytest.raises(ValueError, match="must accept the request. Got 401"):
        ChatJudge(endpoint.url, "m", backoff=0.01).judge(["p"], [["a", "bb"]])
    assert len(endpoint.requests) == 1
    endpoint.close()
    with pytest.raises(ConnectionError, match="must answer. Got .*in 2 attempts"):
        ChatJudge(endpoint.url, "m", backoff=0.01, max_retries=1).judge(["p"], [["a", "bb"]])


def test_bad_input_of_a_judge():
    """Else `file:` would be opened, or the third completion ignored."""
    with pytest.raises(ValueError, match="must be the URL of an endpoint"):
        ChatJudge("file:///tmp", "m")
    judge = ChatJudge("http://localhost:1/v1", "m")
    for prompts, pairs in ((["p"], []), (["p"], [["a", "b", "c"]])):
        with pytest.raises(ValueError, match="two completions for each prompt"):
            judge.judge(prompts, pairs)


# Head to head


def test_head_to_head_with_a_judge_behind_an_endpoint(endpoint):
    """Else the table of win rates would not be what the judge said."""
    ours, theirs = ["longer", "b", "same", "abc"], ["a", "longer", "same", "xyz"]
    result = head_to_head(list("pqrs"), ours, theirs, ChatJudge(endpoint.url, "m"))
    assert (result["win"], result["loss"], result["tie"], result["win_half_tie"]) == (0.25, 0.25, 0.5, 0.5)
    assert result["consistency"] == 1 and result["num_without_verdict"] == 0
    assert result["low"] <= 0.5 <= result["high"]
    assert len(endpoint.requests) == 6  # in both orders; the same text twice is not asked


@pytest.mark.parametrize(("answer", "consistency", "unparsable"), [("Verdict: A", 0, 0), ("no idea", None, 2)])
def test_a_judge_who_prefers_the_first_or_says_nothing_gives_ties(answer, consistency, unparsable):
    """Else the order, or the judge's refusals, would decide who wins."""
    endpoint = Endpoint(lambda question: answer)
    try:
        result = head_to_head(["p", "q"], ["a", "b"], ["c", "d"], ChatJudge(endpoint.url, "m"))
    finally:
        endpoint.close()
    assert (result["tie"], result["win_half_tie"]) == (1, 0.5)
    assert (result["consistency"], result["num_without_verdict"]) == (consistency, unparsable)


def test_head_to_head_takes_any_pairwise_judge():
    """Judges in the form of TRL's return ints, and -1 where they failed."""

    class First:
        def judge(self, prompts, completions, shuffle_order=True):
            assert shuffle_order is False
            return [
                -1 if prompt == "q" else int("good" in pair[1])
                for prompt, pair in zip(prompts, completions, strict=True)
            ]

    result = head_to_head(["p", "q"], ["good", "good"], ["bad", "bad"], First())
    assert (result["win"], result["tie"], result["num_without_verdict"]) == (0.5, 0.5, 1)

    class Silent:
        def judge(self, prompts, completions, shuffle_order=True):
            return [0] if len(prompts) > 1 else [7, 7]

    for prompts in (["p", "q"], ["p"]):
        with pytest.raises(ValueError, match="must give 0, 1, 0.5 or -1"):
            head_to_head(prompts, ["a"] * len(prompts), ["b"] * len(prompts), Silent())
