# SPDX-License-Identifier: Apache-2.0

"""Requests that a server refuses: what is wrong, the request, the status and a part of the message."""

import json

import httpx
import pytest
from conftest import KEY, serving

from trl_tfpo.server import Engine, Limits, make_app


CHAT = {"model": "world", "messages": [{"role": "user", "content": "please review the park inn."}]}
TEXT = {"model": "world", "prompt": "the park inn"}


def chat(**fields):
    """A request to continue a conversation, with these fields."""
    return "POST", "/v1/chat/completions", CHAT | fields


def text(**fields):
    """A request to continue a text, with these fields."""
    return "POST", "/v1/completions", TEXT | fields


def message(content, role="user", **others):
    """A conversation of one message."""
    return chat(messages=[{"role": role, "content": content, **others}])


# Models, doctors and exponents
MODELS = [
    ("no such model", chat(model="/etc/passwd"), 404, "must be 'world'"),
    ("no such model for a text", text(model="../world"), 404, "must be 'world'"),
    ("unknown doctor", chat(weights={"kind": 1.0}), 400, "must name doctors"),
    ("weights above one", chat(weights={"calm": 0.9, "wild": 0.9}), 400, "must not exceed 1 in sum"),
    ("weight that is no number", chat(weights={"calm": "much"}), 400, "weights.calm"),
    (
        "weight that is not finite",
        ("POST", "/v1/completions", b'{"model": "world", "prompt": "a", "alpha": Infinity}'),
        400,
        "alpha",
    ),
    ("weight out of range", text(alpha=11), 400, "alpha"),
    ("half a character in a name", text(weights={"\ud800": 1.0}), 400, "must name doctors"),
]

# Messages
MESSAGES = [
    ("no messages", chat(messages=[]), 400, "messages"),
    ("unknown role", message("a", role="doctor"), 400, "role"),
    (
        "message of an image",
        message([{"type": "image_url", "image_url": {"url": "a"}}]),
        400,
        "content.parts.0.type: Input should be 'text'",
    ),
    ("message of no parts", message([]), 400, "content.parts"),
    ("message of nothing", message(None, role="assistant"), 400, "content: Field required"),
    (
        "message that calls a tool",
        message("", role="assistant", tool_calls=[{}]),
        400,
        "tool_calls: List should have at most 0 items",
    ),
    ("message that refuses", message("a", role="assistant", refusal="no"), 400, "refusal"),
    ("half a character in a message", message("\udfff"), 400, "lone surrogates"),
]

# Prompts
PROMPTS = [
    ("no prompt", ("POST", "/v1/completions", {"model": "world"}), 400, "prompt"),
    ("empty prompt", text(prompt=""), 400, "1 to 40 tokens. Got 0"),
    ("too many prompts", text(prompt=["a"] * 5), 400, "number of prompts must be at most 4. Got 5"),
    ("too many choices of prompts", text(prompt=["a", "b"], n=3), 400, "at most 4. Got 6"),
    ("a list of no prompts", text(prompt=[]), 400, "prompt.texts: List should have at least 1"),
    ("one empty prompt of two", text(prompt=[[5], []]), 400, "prompt.lists of ids.1"),
    ("prompts of two kinds", text(prompt=["a", 5]), 400, "prompt.texts.1"),
    ("ids that are no numbers", text(prompt=[5, True]), 400, "prompt.ids.1"),
    ("an id beyond the vocabulary", text(prompt=[10**30]), 400, "ids that all models know"),
    ("a negative id", text(prompt=[[5], [-1]]), 400, "prompt.lists of ids.1.0"),
    ("half a character", text(prompt="a \ud800"), 400, "lone surrogates"),
    ("long prompt", message("the park inn " * 50), 400, "1 to 40 tokens"),
]

# Variables of the chat template
TEMPLATES = [
    (
        "a variable that the template lacks",
        chat(chat_template_kwargs={"enable_thinking": True}),
        400,
        "variables of the chat template. Got 'enable_thinking'",
    ),
    (
        "a template of one's own",
        chat(chat_template_kwargs={"chat_template": "a"}),
        400,
        "variables of the chat template. Got 'chat_template'",
    ),
    ("an argument as a variable", chat(chat_template_kwargs={"tokenize": False}), 400, "Got 'tokenize'"),
    (
        "half a character in a variable",
        chat(chat_template_kwargs={"bos_token": "\ud800"}),
        400,
        "chat_template_kwargs",
    ),
]

# Fields that are not supported
UNSUPPORTED = [
    ("unknown field", chat(wieghts={}), 400, "wieghts"),
    ("unknown field of a text", text(messages=[]), 400, "messages"),
    ("tools", chat(tools=[{"type": "function"}]), 400, "other values are not supported, so leave it out"),
    ("a tool that must be used", chat(tool_choice="required"), 400, "tool_choice"),
    (
        "an answer in JSON",
        chat(response_format={"type": "json_object"}),
        400,
        "response_format.type: Input should be 'text'; other values are not supported",
    ),
    ("spoken answers", chat(modalities=["text", "audio"]), 400, "modalities"),
    ("answers that are stored", chat(store=True), 400, "store: Input should be False; other values"),
    ("effort", chat(reasoning_effort="high"), 400, "reasoning_effort"),
    ("the best of two", text(best_of=2), 400, "best_of"),
    ("a suffix", text(suffix="b"), 400, "suffix"),
    ("half a character in a field", text(**{"\ud800": 1}), 400, "valid string"),
]

# Sampling
SAMPLING = [
    ("negative temperature", chat(temperature=-1), 400, "temperature"),
    ("top_p of zero", chat(top_p=0), 400, "top_p"),
    ("a penalty out of range", text(presence_penalty=2.5), 400, "presence_penalty"),
    ("a penalty that overflows", text(repetition_penalty=1e-300), 400, "repetition_penalty"),
    (
        "a bias for an unknown token",
        text(logit_bias={"174": 1}),
        400,
        "The keys of `logit_bias` must be ids from 0 to 173. Got 174",
    ),
    ("a bias for a word", text(logit_bias={"park": 1}), 400, "logit_bias.park"),
    (
        "a penalty for a patient without a say",
        text(alpha=0, frequency_penalty=1),
        400,
        "its exponent must be above 0. Got 0",
    ),
    ("negative seed", text(seed=-1), 400, "seed"),
]

# Numbers of answers and tokens
SIZES = [
    ("too many choices", chat(n=5), 400, "at most 4"),
    ("no choices", text(n=0), 400, "n:"),
    ("too many tokens", chat(max_tokens=65), 400, "at most 64"),
    ("no tokens", text(max_tokens=0), 400, "`max_tokens` must be at least 1 without `echo`"),
    ("no tokens of a conversation", chat(max_tokens=0), 400, "max_tokens"),
    ("likeliest tokens without the rest", chat(top_logprobs=2), 400, "`top_logprobs` needs `logprobs`"),
    (
        "usage of a stream that is none",
        text(stream_options={"include_usage": True}),
        400,
        "`stream_options` needs `stream`",
    ),
    ("too many log-probabilities", text(logprobs=6), 400, "logprobs"),
    ("empty stop", chat(stop=[""]), 400, "stop"),
    ("too many stops", text(stop=["a"] * 65), 400, "stop"),
]

# Bodies
BODIES = [
    ("large request", chat(user="a" * 30_000), 413, "at most 20000 bytes"),
    ("not JSON", ("POST", "/v1/chat/completions", b"{"), 400, "JSON"),
    ("not text", ("POST", "/v1/chat/completions", b"\xff\xfe"), 400, "JSON"),
    ("a list", ("POST", "/v1/chat/completions", b"[]"), 400, "body"),
    ("nested beyond reading", ("POST", "/v1/completions", b"[" * 19_000), 400, "parsing the body"),
    ("a form", ("POST", "/v1/completions", b"model=world&prompt=a"), 400, "JSON"),
    ("of unknown length", ("POST", "/v1/completions", iter([b"{}"])), 411, "Content-Length"),
]

# Methods and paths
ROUTES = [
    ("read what is written", ("GET", "/v1/chat/completions", None), 405, "Method Not Allowed"),
    ("write what is read", ("POST", "/v1/models", {}), 405, "Method Not Allowed"),
    ("write to health", ("DELETE", "/health", None), 405, "Method Not Allowed"),
    ("write to metrics", ("PUT", "/metrics", None), 405, "Method Not Allowed"),
    ("ask as a page of another site would", ("OPTIONS", "/v1/chat/completions", None), 405, "Method Not Allowed"),
    ("no such model by its name", ("GET", "/v1/models/etc/passwd", None), 404, "must be 'world'"),
    ("a path with a slash too many", ("GET", "/v1/models/", None), 404, "must be 'world'"),
    ("no such path", ("GET", "/v1/engines", None), 404, "Not Found"),
    ("a path to a file", ("GET", "/../../etc/passwd", None), 404, "Not Found"),
    ("pages of documentation", ("GET", "/docs", None), 404, "Not Found"),
]

REQUESTS = [
    row
    for rows in (MODELS, MESSAGES, PROMPTS, TEMPLATES, UNSUPPORTED, SAMPLING, SIZES, BODIES, ROUTES)
    for row in rows
]


@pytest.fixture(scope="module")
def url(world):
    """A server with low limits."""
    limits = Limits(max_prompt_tokens=40, max_new_tokens=64, max_choices=4, max_bytes=20_000)
    engine = Engine(world.patient, world.tokenizer, {"calm": world.doctor, "wild": world.doctor}, limits)
    with serving(make_app(engine, model_name="world", api_key=KEY)) as url:
        yield url


@pytest.mark.parametrize(("request_", "status", "message"), [pytest.param(*row, id=name) for name, *row in REQUESTS])
def test_a_request_is_refused(request_, status, message, url):
    """Clients are programs: they need a status and a body of the form they know, never a traceback."""
    method, path, body = request_
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx.request(method, url + path, content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert message.lower() in error["message"].lower() and error["type"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/x"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
    ],
)
@pytest.mark.parametrize("key", [None, "", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff"])
def test_nothing_is_said_without_the_key(method, path, key, url):
    """A server whose key can be left out, or guessed by its beginning, has none."""
    headers = {} if key is None else {"authorization": key.encode("latin-1")}
    answer = httpx.request(method, url + path, json=TEXT if method == "POST" else None, headers=headers, timeout=60)
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
