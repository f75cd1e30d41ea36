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

"""Who judges: reward models against a plain forward, a chat judge against a real endpoint on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_tfpo.evaluation import ChatJudge, RewardModel, head_to_head, parse_verdict


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the response with more of "good", says A where it has no preference, and can be made to fail."""

    def do_POST(self):
        server = self.server
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers["Authorization"], payload))
            status = server.failures.pop(0) if server.failures else 200
        if status != 200:
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(b"no")
            return
        question = payload["messages"][1]["content"]
        counts = [
            question.split(f"<response {name}>")[1].split(f"</response {name}>")[0].count("good") for name in "AB"
        ]
        verdict = "I cannot say." if "mute" in question else f"**Verdict: {'AB'[counts[1] > counts[0]]}**"
        body = json.dumps({"choices": [{"message": {"content": f"Reasons.\n{verdict}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.requests, server.failures, server.lock = [], [], threading.Lock()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert RewardModel(str(tmp_path))(prompts, texts) == pytest.approx(expected, abs=1e-5)
    result = head_to_head(prompts[:2], texts[:2], texts[2:], RewardModel(model, tokenizer))
    assert result["win"] == sum(a > b for a, b in zip(expected[:2], expected[2:], strict=True)) / 2


def test_what_is_no_reward_model_is_refused(tmp_path):
    """A head that is not in the checkpoint is random, and so would be every figure of the report."""
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="one label"):
        RewardModel(reward_model(num_labels=2), tokenizer)
    with pytest.raises(ValueError, match="pass `processing_class`"):
        RewardModel(reward_model())
    with pytest.raises(ValueError, match="32 positions"):
        RewardModel(reward_model(), tokenizer)(["the soup " * 20], ["good"])
    reward_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with its head"):
        RewardModel(str(tmp_path), tokenizer)
