# SPDX-License-Identifier: Apache-2.0

"""Fixtures and helpers of the tests: tiny random models, preference data, and servers."""

import gc
import inspect
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from functools import wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


# A new cache for each worker, without scores of earlier runs
if "HF_DATASETS_CACHE" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import openai
import pytest
import torch
import uvicorn
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_tfpo import Faces


WORDS = (
    "<pad> <s> </s> <unk> <system> <user> <assistant> you are kind rude say good bad soup bread is the a very not and"
)
FACES = Faces(positive="you are kind", negative="you are rude")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' <' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def make_tokenizer(words: str = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words.split())}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_llama(seed: int, hidden_size: int = 16, vocab_size: int | None = None) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size or len(WORDS.split()),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def patient():
    return make_llama(seed=1, hidden_size=32)


@pytest.fixture
def doctor():
    return make_llama(seed=2)


def conversational_rows(num_pairs: int = 8) -> list[dict]:
    foods, adverbs = ["soup", "bread"], ["", "very ", "not "]
    return [
        {
            "prompt": [{"role": "user", "content": f"say the {foods[index % 2]}"}],
            "chosen": [
                {"role": "assistant", "content": f"the {foods[index % 2]} is {adverbs[index % 3]}good and kind"}
            ],
            "rejected": [{"role": "assistant", "content": f"the {foods[index % 2]} is {adverbs[index % 3]}bad"}],
        }
        for index in range(num_pairs)
    ]


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Save a model and its tokenizer in a folder. Return the folder, from which both can be loaded."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def preferences():
    return Dataset.from_list(conversational_rows())


def hear_interruptions():
    """For `preexec_fn`: handle SIGINT, which background processes of a shell and their children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_collection_finish():
    """Exempt imported libraries from garbage collection. Otherwise each trainer spends a third of a second on them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def neighbours(request):
    """Put the folder `SCRIPTS` of a test module first in `sys.path`, where Python puts the folder of a script."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(request.module, "SCRIPTS"):
            patch.syspath_prepend(request.module.SCRIPTS)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add to the report of a failed test of `test_upstream.py` its docstring, which says what to change."""
    report = yield
    if report.failed and item.path.name == "test_upstream.py":
        report.sections.append(("What this is about", inspect.getdoc(item.function)))
    return report


@contextmanager
def serving(app, **settings):
    """The address of a real server of the app, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)


# A server of the controlled world

KEY = "a-key-for-tests"


@pytest.fixture(scope="session")
def world():
    """The controlled world."""
    from trl_tfpo.testbed import load_world

    return load_world()


@contextmanager
def few_prompts(num: int = 3):
    """Use only `num` of the 12 prompts in each of the splits `validation` and `test` of the controlled world."""
    from trl_tfpo.testbed import World

    every = inspect.unwrap(World.prompts)  # unwrapped, because contexts can be nested

    @wraps(every)
    def prompts(world: World, split: str):
        return every(world, split)[: None if split == "train" else num]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "prompts", prompts)
        yield


@pytest.fixture(scope="session")
def doctors(world):
    """Two doctors: that of the controlled world, and one with noise in its head."""
    torch.manual_seed(0)
    shaken = AutoModelForCausalLM.from_pretrained(world.weights / "doctor").eval()
    with torch.no_grad():
        shaken.lm_head.weight.add_(torch.randn_like(shaken.lm_head.weight) / 4)
    return {"calm": world.doctor, "wild": shaken}


@pytest.fixture(scope="session")
def engine(world, doctors):
    """An engine with both doctors."""
    from trl_tfpo.server import Engine, Limits

    limits = Limits(
        max_prompt_tokens=40, max_new_tokens=64, max_rows=32, max_queue=64, max_choices=4, max_bytes=20_000
    )
    return Engine(world.patient, world.tokenizer, doctors, limits)


@pytest.fixture(scope="session")
def url(engine):
    """The address of a server of the engine, which requires `KEY`."""
    from trl_tfpo.server import make_app

    aliases = {"mild": {"calm": 0.1, "wild": 0.0}, "wild": {"wild": 0.9, "calm": 0.0}}
    with serving(make_app(engine, model_name="world", api_key=KEY, aliases=aliases)) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    """OpenAI's client for this server."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


class Endpoint(BaseHTTPRequestHandler):
    """A judge: prefers the response with more of "good", and A on a tie. It fails as `server.failures` says."""

    def do_POST(self):
        server = self.server
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers["Authorization"], payload))
            status = server.failures.pop(0) if server.failures else 200
        if status == "hang up":
            return
        if status == "slow":
            server.wake.wait(5)
        if isinstance(status, int) and status != 200:
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
        if status == "garbage":
            body = b"not JSON"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.requests, server.failures, server.lock, server.wake = [], [], threading.Lock(), threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))  # seconds until it sees the shutdown
        thread.start()
        yield server
        server.wake.set()
        server.shutdown()
        thread.join()


def pytest_terminal_summary(terminalreporter):
    """Print the numbers that tests recorded with `record_property`, such as numbers of injected faults."""
    told = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, number in report.user_properties if report.when == "call" else []:
            told[name] += number
    if told:
        terminalreporter.section("tried")
        terminalreporter.write_line("\n".join(f"{number:7,} {name}" for name, number in told.items()))
