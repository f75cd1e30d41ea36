# SPDX-License-Identifier: Apache-2.0

"""The server: every answer is the one that would have been given alone, whatever else is asked at the same time."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from conftest import KEY, hear_interruptions, save_model
from transformers import AutoModelForCausalLM

from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.cli import main
from trl_tfpo.models.initial_head import start_at_zero
from trl_tfpo.server import Engine, Generation, Limits
from trl_tfpo.server.engine import Row
from trl_tfpo.testbed import load_world


def ask(client, prompt, *, weights=None, alpha=None, **settings):
    extra = {name: value for name, value in (("weights", weights), ("alpha", alpha)) if value is not None}
    return client.chat.completions.create(model="world", messages=prompt, extra_body=extra, **settings)


def alone(world, doctors, prompt, weights, alpha=None):
    """Greedy answer of the library, for one prompt."""
    inputs = world.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    guide = DoctorGuidedLogitsProcessor(
        list(doctors.values()), alpha=alpha, beta=[weights.get(x, 0.25) for x in doctors]
    )
    output = guided_generate(world.patient, guide, **inputs, do_sample=False, max_new_tokens=64)
    return world.tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


# Answers


def test_answers_are_those_of_the_library(client, world, doctors):
    """A server that decodes by rules of its own would serve another policy than the one that was measured."""
    prompt, answers = world.prompts("test")[0], []
    for weights, alpha in (({}, None), ({"calm": 0.8, "wild": 0.1}, None), ({"calm": 0.0, "wild": 0.9}, 1.0)):
        answer = ask(client, prompt, weights=weights, alpha=alpha, temperature=0)
        assert answer.choices[0].message.content == alone(world, doctors, prompt, weights, alpha)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        answers.append(answer.choices[0].message.content)
    assert len(set(answers)) > 1


def test_exponents_are_those_of_the_library(world):
    """Another default, or another rest for the patient, would be another policy than that of `generate`."""
    guiding = load_world().doctor
    start_at_zero(guiding)
    doctors = {"calm": world.doctor, "guiding": guiding.eval()}
    engine = Engine(world.patient, world.tokenizer, doctors)
    assert engine.default_weights == {"calm": 0.5, "guiding": 1.0}
    for weights, alpha in (
        ({}, 0.5),
        ({"calm": 0.8, "guiding": 2.0}, 0.2),
        ({"calm": 1.0}, 0.0),
        ({"calm": -0.5}, 1.5),
    ):
        found, betas = engine.exponents(Generation([1], print, weights=weights))
        guide = DoctorGuidedLogitsProcessor(list(doctors.values()), beta=betas)
        assert betas == guide.betas and found == guide.alpha == pytest.approx(alpha)
    with pytest.raises(ValueError, match="must not exceed 1 in sum"):
        engine.exponents(Generation([1], print, weights={"calm": 1.2}))
    engine.close()


@pytest.mark.slow
def test_32_clients_get_what_each_would_get_alone(client, engine, world, doctors, monkeypatch):
    """One batch with the weights or the caches of two requests mixed up gives a wrong answer that reads well."""
    read, sizes = engine._read, []

    def read_when_all_are_there(model, cache, ids, mask):
        while not sizes and engine.num_waiting + len(engine._joining) < 32:
            time.sleep(0.01)
        sizes.append(len(ids))
        return read(model, cache, ids, mask)

    monkeypatch.setattr(engine, "_read", read_when_all_are_there)
    prompts = [*world.prompts("test"), *world.prompts("validation")]
    requests = [(prompts[i % len(prompts)], {"calm": 0.1 * (i % 5), "wild": 0.1 * (i % 4)}) for i in range(32)]

    def stream(request):
        prompt, weights = request
        chunks = ask(client, prompt, weights=weights, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert len(pieces) > 8  # as they come, and not at the end
        return "".join(pieces)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(stream, requests))
    for (prompt, weights), answer in zip(requests, answers, strict=True):
        assert answer == alone(world, doctors, prompt, weights)
    assert max(sizes) == 32  # in one batch, not one after the other


def test_samples_depend_on_their_seed_alone(client, world):
    """A seed that works only on an idle server reproduces nothing."""
    prompt = world.prompts("test")[1]
    first = [x.message.content for x in ask(client, prompt, seed=5, n=3).choices]
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(ask, client, other, seed=9) for other in world.prompts("test")[:5]]
        again = [x.message.content for x in ask(client, prompt, seed=5, n=3).choices]
        assert all(other.result().choices for other in others)
    assert first == again and len(set(first)) == 3
    assert [x.message.content for x in ask(client, prompt, seed=6).choices] == [first[1]]


def test_stops(client, world):
    """A stop that spans tokens must not be shown in part, and not at all."""
    prompt = world.prompts("test")[0]
    whole = ask(client, prompt, temperature=0).choices[0].message.content
    stop = whole[12:22]
    for stream in (False, True):
        answer = ask(client, prompt, temperature=0, stop=[stop], stream=stream)
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            if stream
            else answer.choices[0].message.content
        )
        assert text == whole[: whole.index(stop)]
    short = ask(client, prompt, temperature=0, max_tokens=4).choices[0]
    assert short.finish_reason == "length" and whole.startswith(short.message.content)


@torch.no_grad()
def test_logprobs(client, world, doctors):
    """Log-probabilities of the patient alone, or of another step, would go unnoticed."""
    prompt = world.prompts("test")[2]
    answer = ask(client, prompt, temperature=0, logprobs=True, top_logprobs=3, weights={"calm": 0.3, "wild": 0.2})
    entries = answer.choices[0].logprobs.content
    ids = world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([ids + world.tokenizer.convert_tokens_to_ids([x.token.strip() for x in entries])])
    logps = [model(ids).logits[0].log_softmax(-1) for model in (world.patient, *doctors.values())]
    guided = (0.5 * logps[0] + 0.3 * logps[1] + 0.2 * logps[2]).log_softmax(-1)[-len(entries) - 1 : -1]
    for entry, row, token in zip(entries, guided, ids[0, -len(entries) :], strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [x.logprob for x in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    text = client.completions.create(
        model="world", prompt="the park", temperature=0, logprobs=2, max_tokens=1
    ).choices[0]
    assert (
        len(text.logprobs.token_logprobs) == len(text.logprobs.tokens) == 1 and len(text.logprobs.top_logprobs[0]) == 2
    )
    assert text.text.strip() == text.logprobs.tokens[0].strip() and text.finish_reason == "length"


def test_top_p_and_temperature():
    """A nucleus that lets the tail in, or shuts the head out, changes the distribution without a trace."""
    row = Row(Generation([1], print, temperature=0.5, top_p=0.7, seed=0), 1.0, [])
    logps = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    drawn = torch.bincount(torch.tensor([row.sample(logps) for _ in range(4000)]), minlength=4) / 4000
    squares = torch.tensor([0.16, 0.09, 0.0, 0.0])  # of 0.30; the third would begin beyond 0.7 of it
    assert torch.allclose(drawn, squares / squares.sum(), atol=0.03)


# Faults


def test_a_client_that_leaves_frees_its_row(client, engine, world):
    """Rows of clients that are gone would fill the batch until nobody is served."""
    before = engine.num_tokens
    stream = ask(client, world.prompts("test")[0], n=4, stream=True, seed=0)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    for _ in range(100):
        if engine.num_rows == 0 and engine.num_waiting == 0:
            break
        time.sleep(0.05)
    assert engine.num_rows == 0 and engine.num_tokens > before
    assert ask(client, world.prompts("test")[0], temperature=0).choices[0].finish_reason == "stop"


def test_time_and_queue_are_limited(world, doctors):
    """One client must not be able to keep the server from the others."""
    limits = Limits(max_rows=1, max_queue=2, max_seconds=1e-9, max_new_tokens=64)
    engine = Engine(world.patient, world.tokenizer, doctors, limits)
    events, done = [], threading.Event()

    def on_event(event):
        events.append(event)
        done.set() if "finish_reason" in event else None

    engine.submit(Generation([1, 9], on_event))
    assert done.wait(20) and events[-1]["finish_reason"] == "timeout"
    engine.close()
    with pytest.raises(OverflowError, match="At most 2"):
        engine.submit(Generation([1, 9], on_event))


def test_who_leaves_the_queue_leaves_room(world, doctors, monkeypatch):
    """Clients that gave up while they waited would fill the queue, and others be sent away from it."""
    engine = Engine(world.patient, world.tokenizer, doctors, Limits(max_rows=1, max_queue=2, max_new_tokens=64))
    read = engine._read
    monkeypatch.setattr(engine, "_read", lambda *given: time.sleep(0.05) or read(*given))
    ends, ended = [], threading.Event()

    def on_event(event):
        if "finish_reason" in event:
            ends.append(event["finish_reason"])
            ended.set()

    running = Generation([1, 9], lambda event: None, max_new_tokens=64, seed=0)
    engine.submit(running)
    while engine.num_waiting:
        time.sleep(0.01)
    waiting = [Generation([1, 9], on_event) for _ in range(2)]
    for generation in waiting:
        engine.submit(generation)
    with pytest.raises(OverflowError):
        engine.submit(Generation([1, 9], on_event))
    waiting[0].is_cancelled = True
    assert ended.wait(20) and ends == ["cancelled"] and engine.num_rows == 1
    engine.submit(Generation([1, 9], on_event))
    engine.close()


def test_a_failing_batch_answers_its_clients(world, doctors, monkeypatch):
    """An exception in the engine's thread would leave every client waiting for ever."""
    engine = Engine(world.patient, world.tokenizer, doctors)
    events, done = [], threading.Event()

    def on_event(event):
        events.append(event)
        done.set() if "finish_reason" in event else None

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_read", lambda *_: 1 / 0)
        engine.submit(Generation([1, 9], on_event))
        assert done.wait(20) and events[-1]["finish_reason"] == "error"
    done.clear()
    engine.submit(Generation([1, 9], on_event, max_new_tokens=3))
    assert done.wait(20) and events[-1]["finish_reason"] in ("length", "stop")
    engine.close()


def test_a_failing_listener_ends_its_own_completion(world, doctors):
    """The thread must go on for the other clients."""

    def fail(event):
        raise RuntimeError("gone")

    engine = Engine(world.patient, world.tokenizer, doctors)
    events = queue.Queue()
    try:
        engine.submit(Generation([1, 2], on_event=fail))
        engine.submit(Generation([1, 2], on_event=events.put, max_new_tokens=2))
        while "finish_reason" not in events.get(timeout=30):
            pass
        assert engine.num_waiting == 0
    finally:
        engine.close()


def test_answers_end_where_positions_do(world, doctors):
    """Beyond its positions a model speaks nonsense, and nobody would know why."""
    engine = Engine(world.patient, world.tokenizer, doctors, Limits(max_prompt_tokens=10_000, max_new_tokens=10_000))
    events, done = [], threading.Event()

    def on_event(event):
        events.append(event)
        done.set() if "finish_reason" in event else None

    with pytest.raises(ValueError, match="1 to 255 tokens. Got 256"):
        engine.submit(Generation([9] * 256, on_event))
    engine.submit(Generation([9] * 254, on_event, max_new_tokens=100, seed=0))
    assert done.wait(60) and events[-1]["num_tokens"] <= 2
    engine.close()


def test_a_patient_in_training_is_refused(world, doctors):
    """Dropout in a server is noise in every answer."""
    patient = load_world().patient.train()
    with pytest.raises(ValueError, match="eval"):
        Engine(patient, world.tokenizer, doctors)


def test_a_key_is_needed(url):
    """A server whose key can be left out, or guessed by its beginning, has none."""
    for key in ("", KEY[:-1], KEY + "x"):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key or "x", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        model = client.models.list().data[0]
    assert model.id == "world" and model.doctors == {"calm": 0.25, "wild": 0.25}
    assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok"}


def test_metrics_count(client, url, engine):
    """An operator sees requests and generated tokens."""
    client.chat.completions.create(model="world", messages=[{"role": "user", "content": "review"}], max_tokens=2)
    request = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    text = urllib.request.urlopen(request).read().decode()
    assert 'trl_tfpo_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert f"trl_tfpo_generated_tokens {float(engine.num_tokens)}" in text


# The command


@pytest.mark.slow
def test_serve_as_a_command(world, tmp_path):
    """The command serves a client, and another weight gives another answer to the same prompt."""
    for name, seed in (("helpful", 1), ("harmless", 2)):
        torch.manual_seed(seed)
        doctor = AutoModelForCausalLM.from_pretrained(world.weights / "doctor")
        with torch.no_grad():
            doctor.lm_head.weight.add_(torch.randn_like(doctor.lm_head.weight) / 4)
        save_model(tmp_path / name, doctor, world.tokenizer)
    command = [sys.executable, "-m", "trl_tfpo", "serve", "--world", "--port", "0"]
    command += ["--alias", "half=helpful:0.9,harmless:0", "--max_choices", "2"]
    process = subprocess.Popen(
        [*command, "--doctor", f"helpful={tmp_path / 'helpful'}", "--doctor", f"harmless={tmp_path / 'harmless'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interruptions,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving at http://127.0.0.1:"), line + process.stderr.read()
        with openai.OpenAI(base_url=line.split()[2], api_key="none", max_retries=0) as client:
            answers = [
                ask(client, world.prompts("test")[0], weights=weights, temperature=0).choices[0].message.content
                for weights in ({"helpful": 0.9, "harmless": 0.0}, {"helpful": 0.0, "harmless": 0.9})
            ]
            answer = client.chat.completions.create(
                model="half", messages=world.prompts("test")[0], temperature=0, n=2
            )
            assert {choice.message.content for choice in answer.choices} == {answers[0]}
            with pytest.raises(openai.BadRequestError, match="at most 2. Got 3"):
                ask(client, world.prompts("test")[0], n=3)
        assert answers[0] != answers[1] and all(answers)
        assert main(["serve", "--world", "--port", line.split(":")[-1].split("/")[0]]) == 2  # taken
    finally:
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error and "interrupted" in error


def test_serve_builds_what_it_is_told(world, tmp_path):
    """The command is the interface that most people use."""
    from trl_tfpo.cli.serve import ServeArguments, build

    (tmp_path / "key").write_text("secret\n")
    world.tokenizer.save_pretrained(tmp_path / "doctor")
    world.doctor.save_pretrained(tmp_path / "doctor")
    app = build(ServeArguments(world=True, doctor=[f"calm={tmp_path / 'doctor'}"], api_key_file=str(tmp_path / "key")))
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics"} <= {
        route.path for route in app.routes
    }
    assert ServeArguments().host == "127.0.0.1"
