# SPDX-License-Identifier: Apache-2.0

"""
Laws for random preferences, tensors and requests, drawn by hypothesis. That of the logits processor is
`test_decoding_modes.py::test_any_text_any_weights`.

`TRL_TFPO_FUZZ=900` in the environment asks the server for so many seconds, at random; `-s` shows what it answered.
"""

import itertools
import json
import os
import time
from collections import Counter

import httpx
import pytest
import torch
from conftest import WORDS, make_llama, make_tokenizer, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_tfpo import Faces, TokenRewardCollator, tfpo_objective
from trl_tfpo.annotation.token_rewards import score_token_rewards
from trl_tfpo.data.tokenization import tokenize_pair
from trl_tfpo.functional import token_rewards
from trl_tfpo.server import Engine, Limits, make_app


SECONDS = float(os.environ.get("TRL_TFPO_FUZZ", 0))
HERE = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOKENIZER, PATIENT = make_tokenizer(), make_llama(1, 32)
EOS = TOKENIZER.eos_token_id


@st.composite
def annotated_pairs(draw):
    """A pair with as many rewards as tokens, and a reference; EOS at the end, in between, or nowhere."""
    ids = st.lists(st.integers(2, 21), min_size=1, max_size=9)
    pair = {"prompt_ids": draw(ids)}
    for name in ("chosen", "rejected"):
        pair[f"{name}_ids"] = draw(ids)
        size = len(pair[f"{name}_ids"])
        for column, low in (("token_rewards", -1), ("ref_logps", -1e4)):
            pair[f"{name}_{column}"] = draw(st.lists(st.floats(low, 1, width=32), min_size=size, max_size=size))
    return pair


@settings(HERE, max_examples=60)
@given(
    st.lists(annotated_pairs(), min_size=1, max_size=4),
    st.sampled_from([None, 10, 12]),
    st.sampled_from([None, 1, 8]),
)
def test_any_batch(pairs, max_length, multiple):
    """A reward beside its token, by padding or a cut that nobody tried, trains on another text."""
    collator = TokenRewardCollator(TOKENIZER, max_length=max_length, pad_to_multiple_of=multiple)
    batch = collator(pairs)
    assert batch["input_ids"].size(1) % (multiple or 1) == 0
    for row, (name, pair) in enumerate((name, pair) for name in ("chosen", "rejected") for pair in pairs):
        whole = (pair["prompt_ids"] + pair[f"{name}_ids"])[:max_length]
        completion = whole[len(pair["prompt_ids"]) :]
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == whole
        assert batch["input_ids"][row][batch["completion_mask"][row]].tolist() == completion
        assert batch["is_complete"][row] == (completion[-1] == EOS)
        for key, column in (("token_rewards", "token_rewards"), ("reference_logps", "ref_logps")):
            expected = pair[f"{name}_{column}"][: len(completion)]
            assert batch[key][row].tolist() == expected + [0.0] * (batch[key].size(1) - len(expected))


TEXT = st.lists(st.sampled_from(WORDS.split()[3:]), min_size=1, max_size=6).map(" ".join)
SAID = TEXT.map(lambda text: [{"role": "assistant", "content": text}])


@settings(HERE, max_examples=12)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.lists(TEXT, min_size=1, max_size=3).map(
                    lambda texts: [{"role": ["user", "assistant"][i % 2], "content": x} for i, x in enumerate(texts)]
                ),
                "chosen": SAID,
                "rejected": SAID,
            }
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["label", "agreement", "faces"]),
)
def test_any_preferences(pairs, reward_direction):
    """Scored next to others, a completion must get what it would get alone: one reward for each token, never NaN."""
    faces = Faces(positive="you are kind", negative="you are rude")
    rows = [
        tokenize_pair(pair, TOKENIZER, faces=faces, system_role=True, eos_token_ids=[EOS])
        for pair in pairs
        if pair["prompt"][-1]["role"] == "user"
    ]

    def score(rows):
        def reward_fn(**logps):
            return token_rewards(reward_direction=reward_direction, **logps)

        batch = {name: [row[name] for row in rows] for name in rows[0]}
        return score_token_rewards(batch, patient=PATIENT, reward_fn=reward_fn, batch_size=16)

    if not rows:
        return
    rewards, gaps = score(rows)
    completions = [row[f"{name}_ids"] for name in ("chosen", "rejected") for row in rows]
    alone = [score([row]) for row in rows]
    for index, ids in enumerate(completions):
        own_rewards, own_gaps = (x[index // len(rows)] for x in alone[index % len(rows)])
        assert len(rewards[index]) == len(gaps[index]) == len(ids)
        assert rewards[index].abs().max() <= 1
        torch.testing.assert_close(gaps[index], own_gaps, atol=1e-4, rtol=1e-4)
        # At the threshold of importance, and at a gap of zero, rounding may decide
        is_clear = (rewards[index] != 0) == (own_rewards != 0)
        torch.testing.assert_close(rewards[index][is_clear], own_rewards[is_clear], atol=1e-2, rtol=0)


@settings(HERE, max_examples=60)
@given(st.data())
def test_any_tensors(data):
    """NaN behind a mask, or a completion of a single token, must reach neither the loss nor a gradient."""
    num_pairs, num_tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(1, num_tokens), min_size=2 * num_pairs, max_size=2 * num_pairs))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scale = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3]))

    def draw(width):
        return scale * torch.randn(2 * num_pairs, width, generator=generator, dtype=torch.float64)

    tensors = {
        "doctor_logps": -draw(num_tokens).abs(),
        "log_values": draw(num_tokens + 1),
        "token_rewards": draw(num_tokens).clamp(-1, 1),
        "reference_logps": -draw(num_tokens).abs(),
        "completion_ids": torch.randint(3, 6, (2 * num_pairs, num_tokens), generator=generator),
    }
    is_complete = torch.rand(2 * num_pairs, generator=generator) < 0.5
    options = dict(subtb_lambda=data.draw(st.sampled_from([0.0, 0.5, 0.999, 1.0])))

    def run(extra, hidden):
        """Loss, metrics and gradients with `extra` columns of padding, all padding filled with `hidden`."""
        padded, leaves = {}, {}
        for name, tensor in tensors.items():
            tensor = torch.nn.functional.pad(tensor, (0, extra))
            num_kept = lengths[:, None] + (name == "log_values")
            fill = 0 if tensor.dtype == torch.long else hidden
            padded[name] = tensor.masked_fill(torch.arange(tensor.size(1)) >= num_kept, fill)
        for name in ("doctor_logps", "log_values"):
            leaves[name] = padded[name] = padded[name].requires_grad_()
        mask = torch.arange(num_tokens + extra) < lengths[:, None]
        loss, metrics = tfpo_objective(**padded, completion_mask=mask, is_complete=is_complete, **options)
        loss.backward()
        grads = [leaves[name].grad[:, : tensors[name].size(1)] for name in leaves]
        return [loss.detach(), *metrics.values(), *grads]

    plain = run(0, 0.0)
    assert all(x.isfinite().all() for x in plain)
    for found, expected in zip(run(3, float("nan")), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(scale, 1))


# The server

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def url():
    limits = Limits(max_prompt_tokens=40, max_new_tokens=4, max_choices=2, max_bytes=20_000)
    engine = Engine(PATIENT, TOKENIZER, {"kind": make_llama(2)}, limits)
    with serving(make_app(engine, model_name="tiny", api_key=KEY)) as url:
        yield url
    assert not engine.num_rows and not engine.num_waiting


def make_likelier_to_be_answered(body):
    """Replace names and numbers by valid ones; otherwise most requests would end at the first check."""
    body["model"] = "tiny"
    for name in {"n", "max_tokens", "max_completion_tokens"} & body.keys():
        if type(body[name]) is int and body[name] > 0:
            body[name] = 1 + body[name] % 2
    if isinstance(body.get("weights"), dict):
        body["weights"] = dict(zip(["kind"], body["weights"].values(), strict=False))
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(index): value for index, value in enumerate(body["logit_bias"].values())}
    if isinstance(body.get("chat_template_kwargs"), dict):
        body["chat_template_kwargs"] = dict(
            zip(["eos_token", "bos_token"], body["chat_template_kwargs"].values(), strict=False)
        )
    if isinstance(body.get("prompt"), list):
        body["prompt"] = [known_ids(part) for part in body["prompt"][:2]]
        body["n"] = 1
    body["stream"] = body.get("stream") if "stream_options" not in body else True
    body["logprobs"] = body.get("logprobs") if "top_logprobs" not in body else True


def known_ids(part):
    """The same with ids that the tiny model knows, where there are ids."""
    if isinstance(part, list):
        return [known_ids(x) for x in part[:20]]
    return part % len(WORDS.split()) if type(part) is int and part > 0 else part


class Client:
    """Sends requests, checks each answer, and counts them."""

    def __init__(self, url: str):
        self.url, self.headers = url, {"authorization": f"Bearer {KEY}"}
        self.statuses, self.fields = Counter(), Counter()

    def send_case(self, case) -> None:
        """A request that was drawn from the schema."""
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            make_likelier_to_be_answered(case.body)
        answer = case.call(headers=self.headers, timeout=60)
        self.check(answer)
        if answer.status_code == 200 and isinstance(case.body, dict):
            self.fields.update(name for name, value in case.body.items() if value is not None)

    def send_body(self, body: bytes | str) -> None:
        """A request of any content."""
        headers = self.headers | {"content-type": "application/json"}
        for path in ("/v1/completions", "/v1/chat/completions"):
            self.check(httpx.post(self.url + path, content=body, headers=headers))

    def check(self, answer) -> None:
        """An answer is no failure of the server; an error has a message."""
        self.statuses[answer.status_code] += 1
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400 and answer.request.method != "HEAD":
            assert answer.json()["error"]["message"]


def requests_of(schema) -> list:
    """Strategies for the requests of each operation: right ones, and wrong ones where there is a body."""
    from schemathesis import GenerationMode

    strategies = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (operation.method == "post")
        strategies += [operation.as_strategy(generation_mode=mode) for mode in modes]
    return strategies


@pytest.mark.slow
def test_any_request(url):
    """Every request, right or wrong, is answered, or refused with a message."""
    schemathesis = pytest.importorskip("schemathesis")
    client = Client(url)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=client.headers)
    any_json = st.recursive(st.none() | st.text() | st.floats(), st.lists).map(json.dumps)
    questions = [(client.send_body, st.binary(max_size=99) | any_json)]
    questions += [(client.send_case, strategy) for strategy in requests_of(schema)]

    start = time.monotonic()
    examples = settings(HERE, max_examples=50, derandomize=False) if SECONDS else settings(HERE, max_examples=20)
    for send, strategy in itertools.cycle(questions) if SECONDS else questions:
        examples(given(strategy)(send))()
        if SECONDS and time.monotonic() - start >= SECONDS:
            break
    told = f"{client.statuses.total()} requests in {time.monotonic() - start:.0f} s: {dict(client.statuses)}"
    print(f"{told}; fields of requests answered by 200: {dict(client.fields)}")  # noqa: T201
