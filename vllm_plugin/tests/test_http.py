# SPDX-License-Identifier: Apache-2.0

"""vLLM's own server, in processes of its own, with the flags that the command prints."""

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import ENGINE
from test_doctors import TEXTS
from test_engine import PROMPTS, greedy
from transformers import AutoModelForCausalLM


MAX_SECONDS = 240  # until the server answers
NUM_CLIENTS = 32


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    """A client of a server with a doctor and its reference, and a LoRA doctor."""
    command = [sys.executable, "-m", "trl_tfpo_vllm", "--patient", folders.patient]
    command += ["--doctor", f"helpful={folders.helpful}", "--reference", f"helpful={folders.harmless}"]
    command += ["--doctor", f"flow={folders.flow_lora}", "--beta", "flow=0"]
    flags = shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for name, value in ENGINE.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "guided"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(url, server, log):
    """Wait until the server answers."""
    end = time.monotonic() + MAX_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(1)
    pytest.fail(f"The server did not start:\n{log.read_text()[-4000:]}")


def complete(client, prompt, weights, **settings):
    """Greedy search by the server."""
    extra = {"vllm_xargs": weights, "ignore_eos": True, "return_token_ids": True}
    settings = dict(temperature=0, max_tokens=8) | settings
    return client.completions.create(model="guided", prompt=prompt, extra_body=extra, **settings)


def test_concurrent_clients_with_their_own_weights(client, folders):
    """The path of weights over HTTP: parsed, validated, and handed to another process. Half of the answers stream."""
    names = ("patient", "helpful", "harmless")
    models = {name: AutoModelForCausalLM.from_pretrained(getattr(folders, name)).eval() for name in names}
    weights = [{"alpha": 1.3 - index / 16, "beta_helpful": index / 8 - 1.5} for index in range(NUM_CLIENTS)]
    prompts = [PROMPTS[index % len(PROMPTS)][: 40 - index] for index in range(NUM_CLIENTS)]

    def ask(index):
        answer = complete(client, prompts[index], weights[index], stream=index % 2 == 1)
        pieces = answer if index % 2 else [answer]
        return [token for piece in pieces for choice in piece.choices for token in choice.token_ids]

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(ask, range(NUM_CLIENTS)))
    expected = []
    for prompt, given in zip(prompts, weights, strict=True):
        beta = given["beta_helpful"]
        exponents = {"patient": given["alpha"], "helpful": beta, "harmless": -beta}
        expected.append(greedy(models, prompt, exponents, num_new=8))
    assert answers == expected
    assert len({tuple(answer) for answer in expected}) > NUM_CLIENTS / 2


def test_a_lora_doctor(client):
    """The server guides with numbers of the main package."""
    text = next(text for text in TEXTS if text["weights"] == {"beta_flow_lora": 1.5, "beta_policy_lora": 0.0})
    answer = complete(client, text["prompt"], {"beta_flow": 1.5, "beta_helpful": 0.0})
    assert answer.choices[0].token_ids == text["tokens"][:8]


def test_streaming(client):
    """The text must be the same in pieces."""
    weights = {"beta_helpful": 0.4, "beta_flow": 0.6}
    pieces = complete(client, PROMPTS[2], weights, stream=True)
    text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert text and text == complete(client, PROMPTS[2], weights).choices[0].text


@pytest.mark.parametrize("weights", [{"beta_helpful": "0.5"}, {"beta_other": 0.5}, {"alpha": [1, 2]}])
def test_unusable_weights_are_the_clients_fault(client, weights):
    """The message must reach the client, and the engine must go on."""
    with pytest.raises(openai.BadRequestError, match=r"(?s)must be.*Got"):
        complete(client, PROMPTS[0], weights)
    assert complete(client, PROMPTS[0], {}).choices[0].token_ids
