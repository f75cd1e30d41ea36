# SPDX-License-Identifier: Apache-2.0

"""A command that is killed, or has no room, writes the same bytes when it is run again; and a server is killed."""

import functools
import json
import os
import random
import signal
import threading
import time
import urllib.request
from http.client import HTTPException

import datasets
import pytest
from conftest import conversational_rows, make_llama, save_model, write_rows
from injection import NUM_FAULTS, on_read_only, strike, without_room
from matplotlib import figure  # noqa: F401  imported here once, and not in each child
from processes import PATIENCE, end_of, fails, finish, free_port, in_child, kill

from trl_tfpo import evaluation, testbed  # noqa: F401
from trl_tfpo.cli import main
from trl_tfpo.evaluation import ChatJudge


pytestmark = pytest.mark.slow


COMMANDS = {
    "annotate": "annotate --dataset_name {data}/preferences.jsonl --patient {data}/patient "
    "--positive_face kind --negative_face rude --output {output}/annotated.parquet --overwrite",
    "generate": "generate --world --doctor {data}/world --num_samples_per_prompt 2 --seed 3 "
    "--output {output}/texts.jsonl",
    "evaluate": "evaluate --overwrite --completions patient={data}/patient.jsonl doctor={data}/doctor.jsonl "
    "--world praise --baseline patient --output_dir {output}",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "preferences.jsonl", conversational_rows(300))
    save_model(folder / "patient", make_llama(1, 32))
    (folder / "world").symlink_to(testbed.load_world().weights / "doctor")
    draw = random.Random(0)
    for name in ("patient", "doctor"):
        texts = [" ".join(draw.choices(["splendid", "awful", "the", "soup", "was"], k=9)) for _ in range(40)]
        rows = [{"prompt": f"prompt {index // 4}", "completion": text} for index, text in enumerate(texts)]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def run(verb, data, output):
    datasets.config.HF_DATASETS_CACHE = output.with_suffix(".cache")
    return main([argument.format(data=data, output=output) for argument in COMMANDS[verb].split()])


def files(output) -> dict[str, bytes]:
    """What a command wrote; beside it a death leaves parts, which nobody reads."""
    return {path.name: path.read_bytes() for path in output.glob("*.*") if path.suffix != ".part"}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_that_is_killed_ends_with_the_same_bytes(verb, data, tmp_path, record_property):
    """A file that is half written reads like a short one: fewer pairs, fewer texts, another mean."""
    (tmp_path / "calm").mkdir()
    begin = time.monotonic()
    finish([in_child(run, verb, data, tmp_path / "calm")])
    duration, expected = time.monotonic() - begin, files(tmp_path / "calm")
    assert expected
    draw, num_killed = random.Random(0), 0
    for fault in range(NUM_FAULTS):
        output = tmp_path / str(fault)
        output.mkdir()
        num_killed += strike(draw, duration, max(map(len, expected.values())), run, verb, data, output)
        assert files(output).items() <= expected.items()
        if verb == "generate" and files(output) == expected:  # the strike came too late
            assert "must not exist" in fails(run, verb, data, output)
        else:
            finish([in_child(run, verb, data, output)])
        assert files(output) == expected
    assert num_killed >= 1
    record_property(f"`trl-tfpo {verb}` is killed", num_killed)


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_without_room_leaves_nothing(verb, data, tmp_path, record_property):
    """A full disk, or one that cannot be written, is said in one line; before the work where it can be known."""
    said = fails(without_room, signal.SIG_IGN, 100, run, verb, data, tmp_path)
    assert "File too large" in said and "Traceback" not in said
    assert not files(tmp_path)
    said = fails(on_read_only, tmp_path, run, verb, data, tmp_path)
    assert f"error: The output folder must be writable. Got '{tmp_path}'" in said
    tmp_path.chmod(0o755)
    finish([in_child(run, verb, data, tmp_path)])
    assert files(tmp_path)
    record_property("the disk is full", 1)
    record_property("the output folder is read-only", 1)


def judge_pairs(endpoint, cache_file, num_workers):
    pairs = [(f"good {index}", f"bad {index}") for index in range(200)]
    judge = ChatJudge(
        f"http://127.0.0.1:{endpoint.server_port}/v1", "a-judge", cache_file=cache_file, num_workers=num_workers
    )
    assert judge.judge(["one"] * 200, pairs) == [0.0] * 200


def test_a_judge_that_is_killed_is_not_paid_twice(endpoint, tmp_path, record_property):
    """Each verdict costs money; those that are there when a machine goes must be there for the next."""
    draw, cache_file, num_workers = random.Random(0), tmp_path / "answers.jsonl", 2
    for _ in range(NUM_FAULTS):
        child, num_asked = in_child(judge_pairs, endpoint, cache_file, num_workers), len(endpoint.requests)
        while len(endpoint.requests) < num_asked + draw.randint(5, 15):
            time.sleep(0.001)
        kill(child)
    finish([in_child(judge_pairs, endpoint, cache_file, num_workers)])
    time.sleep(0.1)  # for requests of the dead that are still under way
    asked = [request["messages"][1]["content"] for _, _, request in endpoint.requests]
    assert len(set(asked)) == 200 and len(asked) <= 200 + NUM_FAULTS * num_workers
    record_property("a judge is killed", NUM_FAULTS)


# Serving


def ask(port: str, seed: int) -> str:
    """The text of an answer, which is a stream for odd seeds."""
    body = {"model": "world", "messages": [{"role": "user", "content": "please review the park inn."}]}
    body |= {"seed": seed, "stream": seed % 2 == 1, "max_tokens": 64}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        text = response.read().decode()
    if not body["stream"]:
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if events[-1] != "[DONE]":
        raise OSError(events[-1])
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


def serve(port: str) -> int:
    """A server that has begun to listen."""
    child = in_child(main, ["serve", "--world", "--port", port], said=os.devnull)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return child
        except OSError:
            time.sleep(0.05)
    pytest.fail("the server does not start")


def answers_while(port: str, action) -> dict[int, str | Exception]:
    """What eight clients get, or which error, while an action runs."""
    answers = {}

    def be_a_client(seed):
        try:
            answers[seed] = ask(port, seed)
        except (OSError, HTTPException) as error:
            answers[seed] = error

    clients = [threading.Thread(target=be_a_client, args=(seed,)) for seed in range(8)]
    for client in clients:
        client.start()
    action()
    for client in clients:
        client.join(PATIENCE)
    return answers


def stop(child: int, signal_number: signal.Signals, seconds: float = 0.0) -> None:
    """Send a signal to a process after so many seconds, and wait for its end."""
    time.sleep(seconds)
    os.kill(child, signal_number)
    end_of(child)


def test_a_server_that_is_killed_gives_whole_answers_or_errors(record_property):
    """A client gets its whole answer, or an error, and never waits. A server that is asked to end finishes answers."""
    port = free_port()
    child, begin = serve(port), time.monotonic()
    expected = answers_while(port, lambda: None)
    duration, draw, num_errors = time.monotonic() - begin, random.Random(0), 0
    for fault in range(NUM_FAULTS):
        is_asked_to_end = fault % 3 == 2
        how = (signal.SIGTERM if is_asked_to_end else signal.SIGKILL, draw.uniform(0.0, duration / 2))
        answers = answers_while(port, functools.partial(stop, child, *how))
        errors = {seed for seed, answer in answers.items() if isinstance(answer, Exception)}
        assert answers.keys() == expected.keys()
        assert all(answers[seed] == expected[seed] for seed in answers.keys() - errors)
        if is_asked_to_end:  # clients that come too late are refused
            assert not any(isinstance(answers[seed], HTTPException) for seed in errors)
        num_errors += len(errors)
        child = serve(port)
        assert ask(port, fault % 8) == expected[fault % 8]
    stop(child, signal.SIGTERM)
    assert num_errors >= 1  # or the test shows nothing
    record_property("the server is killed, with 8 answers under way", NUM_FAULTS)
