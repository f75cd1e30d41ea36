# SPDX-License-Identifier: Apache-2.0

"""Token rewards from a patient behind an endpoint: those of the same patient in this process."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time

import datasets
import pytest
import torch
from conftest import KEY, make_llama, make_tokenizer, save_model, serving, write_rows
from datasets import load_from_disk
from endpoints import relaying
from processes import PATIENCE

from trl_tfpo import annotate_token_rewards
from trl_tfpo.annotation.backends import EndpointScorer, VllmScorer
from trl_tfpo.annotation.score_cache import SHARD_SIZE
from trl_tfpo.cli import main
from trl_tfpo.common.endpoint import Endpoint


NUM_PAIRS = 40


@pytest.fixture(scope="module")
def server(world, doctors):
    """A server of the world whose doctors guide every request that does not switch them off."""
    from trl_tfpo.server import Engine, Limits, make_app

    limits = Limits(max_prompt_tokens=200, max_new_tokens=64, max_rows=16, max_queue=256)
    app = make_app(Engine(world.patient, world.tokenizer, doctors, limits), model_name="world", api_key=KEY)
    with serving(app) as url:
        yield url


@pytest.fixture
def relay(server):
    with relaying(server) as relay:
        yield relay


@pytest.fixture(scope="module")
def pairs(world):
    return world.preference_dataset("praise", num_pairs=NUM_PAIRS, seed=0)


@pytest.fixture(scope="module")
def expected(pairs, world):
    return annotate_token_rewards(pairs, world.patient, world.tokenizer, faces=world.attributes["praise"].faces)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is scored beforehand."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def scorer(relay, **settings):
    return EndpointScorer(Endpoint(relay.url, "world", **{"api_key": KEY, "backoff": 0.0} | settings))


def annotate(relay, pairs, world, **settings):
    faces = world.attributes["praise"].faces
    return annotate_token_rewards(pairs, scorer(relay, **settings), world.tokenizer, faces=faces)


def assert_same(found, expected):
    assert found.column_names == expected.column_names
    for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"):
        assert found[name][:] == expected[name][:]
    for name in ("chosen_gaps", "rejected_gaps", "chosen_token_rewards", "rejected_token_rewards"):
        for mine, theirs in zip(found[name], expected[name], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


def test_an_endpoint_gives_the_rewards_of_its_patient(relay, pairs, world, expected):
    """Rewards of the guided policy, of shifted tokens or of a re-tokenized text would train another doctor."""
    assert_same(annotate(relay, pairs, world), expected)
    bodies = [body for _, _, body in relay.requests if body]
    assert len(bodies) == 4 * NUM_PAIRS + 1 and all(isinstance(token, int) for x in bodies for token in x["prompt"])
    relay.requests.clear()
    annotate(relay, pairs, world)
    assert len([body for _, _, body in relay.requests if body]) == 1  # the check: all scores are in the cache


def test_log_probabilities_under_exponents(relay, world, doctors):
    """The policy of a request decides its scores: exponents that do not arrive give the patient, without a word."""
    ids = world.tokenizer("we liked the station cafe. the soup was fine.")["input_ids"]
    weights = {"calm": 0.3, "wild": 0.2}
    guided = EndpointScorer(scorer(relay).endpoint, scorer(relay).endpoint.exponents(weights, 0.5))
    (found,) = guided.score_completions([ids[:3]], [ids[3:]])
    models = {world.patient: 0.5, doctors["calm"]: 0.3, doctors["wild"]: 0.2}
    with torch.no_grad():
        logps = sum(x * model(torch.tensor([ids])).logits[0].log_softmax(-1) for model, x in models.items())
    by_hand = logps.log_softmax(-1)[2:-1].gather(1, torch.tensor(ids[3:])[:, None])[:, 0]
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="'calm', 'wild'.*Got .'other'"):
        guided.endpoint.exponents({"other": 1.0})


def test_an_endpoint_without_doctors_has_no_alpha(relay):
    """It would ignore the field, and its samples would be reported as those of another policy."""
    endpoint = scorer(relay).endpoint
    endpoint.description = {"id": "world", "owned_by": "someone"}
    with pytest.raises(ValueError, match="`alpha` needs an endpoint that guides. Got 0.5"):
        endpoint.exponents({}, 0.5)
    assert endpoint.patient_alone == endpoint.exponents({}) == {}


def test_failures_are_repeated_and_refusals_are_not(relay, pairs, world, expected):
    """A server that restarts should cost a minute, not the night; a request that is wrong stays wrong."""
    some = pairs.select(range(4))
    relay.failures += [(503, b"loading"), "hang up", (429, b"busy"), (200, b"not JSON"), (500, b"")]
    assert_same(annotate(relay, some, world, num_requests=2), expected.select(range(4)))
    for status in (400, 401, 404, 422):
        relay.requests.clear()
        relay.failures += [(status, b"no")]
        with pytest.raises(ValueError, match=f"must accept the request. Got {status}: no"):
            scorer(relay).score_completions([[3]], [[4]])
        assert len([body for _, _, body in relay.requests if body]) == 1
    relay.failures += [(502, b"gone")] * 9
    with pytest.raises(ConnectionError, match="must answer. Got 502: gone in 3 attempts"):
        scorer(relay, max_retries=2).score_completions([[3]], [[4]])


def test_requests_are_sent_side_by_side(relay):
    """One after the other, an engine that batches would idle; all at once, a small server would refuse them."""
    shares, active = [], []
    barrier = threading.Barrier(8, action=lambda: active.append(time.sleep(0.3) or relay.active))  # no ninth comes
    numbers = itertools.count()
    relay.hold = lambda _: barrier.wait(60) if next(numbers) < 8 else None
    prompts, completions = [[3 + index] for index in range(24)], [[4, 5]] * 24
    found = scorer(relay, num_requests=8).score_completions(prompts, completions, on_progress=shares.append)
    assert active == [8] and shares == pytest.approx([1 / 24] * 24)
    relay.hold = None
    for prompt, scored in zip(prompts, found, strict=True):  # each has its own answer
        torch.testing.assert_close(scored, scorer(relay).score_completions([prompt], [[4, 5]])[0])


def shifted(choice):
    choice["prompt_token_ids"] = choice["prompt_token_ids"][1:] + [0]


def without_ids(choice):  # and a token was added, such as BOS
    del choice["prompt_token_ids"]
    choice["logprobs"]["token_logprobs"].append(-1.0)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (shifted, "which are others"),
        (without_ids, "must score the 4 tokens.*Got 5 scores"),
        (lambda choice: choice.update(logprobs=None), "answer without scores"),
        (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "must score the 4 tokens.*Got 3 scores"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(2, None), "must be finite.*Got None"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(3, -9999.0), "must be finite.*Got -9999"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(3, float("nan")), "must be finite.*Got nan"),
    ],
)
def test_scores_of_other_tokens_are_refused(alter, message, relay):
    """Most endpoints are nearly compatible; a score that is off by one token looks like any other."""

    def of_answer(body):
        answer = json.loads(body)
        alter(answer["choices"][0])
        return json.dumps(answer).encode()

    assert scorer(relay).score_completions([[3, 5]], [[4, 6]])[0].shape == (2,)
    relay.alter = of_answer
    with pytest.raises(ValueError, match=message):
        scorer(relay).score_completions([[3, 5]], [[4, 6]])
    assert len([body for _, _, body in relay.requests if body]) == 2  # not repeated


def test_another_tokenizer_is_refused(relay):
    """Its ids would be read as other words."""
    with pytest.raises(ValueError, match="must have the patient's tokenizer.*Got token"):
        scorer(relay).check(make_tokenizer())
    with pytest.raises(ValueError, match="must be one of .*'world'. Got 'mars'"):
        _ = EndpointScorer(Endpoint(relay.url, "mars", api_key=KEY)).fingerprint


def test_the_fingerprint_is_of_the_model_and_not_of_the_address(server, world):
    """A server that moves to another port must not cost all scores, and another patient must not be taken for it."""
    with relaying(server) as one, relaying(server) as two:
        assert scorer(one).fingerprint == scorer(two).fingerprint

        def other(body):
            return body.replace(b'"owned_by":"trl-tfpo"', b'"owned_by":"vllm","root":"/models/other"')

        two.requests.clear()
        found = scorer(two).endpoint
        found.description = json.loads(other(json.dumps(found.description, separators=(",", ":")).encode()))
        assert EndpointScorer(found).fingerprint != scorer(one).fingerprint


COMMAND = [sys.executable, "-m", "trl_tfpo", "annotate", "--backend", "openai", "--model", "world"]


def options_of(world, pairs, tmp_path):
    """The options that annotate pairs of the world from files, with a tokenizer and no weights."""
    write_rows(tmp_path / "pairs.jsonl", pairs)
    world.tokenizer.save_pretrained(tmp_path / "tokenizer")
    faces = world.attributes["praise"].faces
    options = ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--patient", str(tmp_path / "tokenizer")]
    return [*options, "--positive_face", faces.positive, "--negative_face", faces.negative]


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(relay, pairs, world, expected, tmp_path):
    """Else a night of requests would be lost, or paid for twice."""
    options = options_of(world, pairs, tmp_path)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "other"), "OPENAI_API_KEY": KEY}
    command = [*COMMAND, "--base_url", relay.url, *options, "--num_requests", "4", "--output", str(tmp_path / "out")]
    per_shard, most = 4 * SHARD_SIZE, 4 * NUM_PAIRS + 1
    relay.hold = lambda count: time.sleep(60 if count > per_shard + 20 else 0)  # in the second shard
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while len(relay.requests) <= per_shard + 20 and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    output = process.communicate()[0]
    kept = list((tmp_path / "other").rglob("*.arrow"))
    assert len([path for path in kept if path.parent.parent.name == "trl_tfpo"]) == 1 and KEY.encode() not in output
    relay.hold = None
    relay.requests.clear()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert len([body for _, _, body in relay.requests if body]) == most - per_shard
    assert_same(load_from_disk(tmp_path / "out"), expected)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in result.stdout + result.stderr and not any(KEY.encode() in path.read_bytes() for path in files)


def test_the_key_is_in_no_message(relay, world, pairs, tmp_path, capsys, monkeypatch):
    """Logs are read by many, and pasted into issues."""
    command = ["annotate", "--backend", "openai", "--model", "world", *options_of(world, pairs.select([0]), tmp_path)]
    command += ["--base_url", relay.url, "--output", str(tmp_path / "out")]
    key = "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("TRL_TFPO_TRACEBACK", "")
    relay.failures += [(401, f"wrong key {key}".encode())] * 2
    assert main(command) == 2  # /models, without a failure: the relay's target refuses the key
    relay.target = relay.url.removesuffix("/v1")
    endpoint = Endpoint(relay.url, "world", api_key=key)
    with pytest.raises(ValueError, match=r"Got 401: wrong key \[key\]") as error:
        endpoint.send("/completions", {})
    assert error.value.__cause__ is None and key not in error.value.reason + repr(endpoint)
    for bad in (f"{key}\n", f" {key}", f"{key}é"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        assert main(command) == 2
    command[command.index("--base_url") + 1] = f"http://me:{key}@127.0.0.1/v1"
    assert main(command) == 2
    printed = "".join(capsys.readouterr())
    assert key not in printed and printed.count("error: ") == 5 and "http://...@127.0.0.1/v1" in printed


def test_the_key_is_not_carried_to_another_host(relay):
    """A redirect would hand the key to whoever the endpoint names."""
    relay.failures += [(307, b"elsewhere")]
    with pytest.raises(ValueError, match="Got 307: elsewhere"):
        Endpoint(relay.url, "world", api_key=KEY, backoff=0.0).send("/completions", {})
    assert len(relay.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tgi"], "`--backend` must be one of"),
        (["--backend", "openai"], "Pass `--base_url`"),
        (["--base_url", "http://x/v1"], "`--base_url` belongs to `--backend openai`"),
        (["--backend", "openai", "--base_url", "http://x/v1", "--patient_load_in_4bit"], "belongs to `--backend tran"),
        (["--backend", "vllm", "--engine_args", "{"], "`--engine_args` must be a JSON object"),
        (["--backend", "openai", "--base_url", "ftp://x", "--model", "m"], "`base_url` must be the URL"),
        (["--backend", "openai", "--base_url", "http://x", "--num_requests", "0"], "must be at least 1"),
    ],
)
def test_options_of_another_backend(options, message, tmp_path, capsys):
    """An option without an effect is one that somebody relies on."""
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    patient = save_model(tmp_path / "patient", make_llama(1))
    inputs = ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--patient", patient]
    assert main(["annotate", *inputs, *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_where_vllm_is_missing_the_other_way_is_named(tmp_path):
    """Its requirements exclude ours; an ImportError would not say what to do."""
    pytest.importorskip("trl")
    patient = VllmScorer(save_model(tmp_path / "patient", make_llama(1)))
    with pytest.raises(ValueError, match="(?s)needs vLLM in this environment.*--backend openai"):
        patient.score_completions([[3]], [[4]])


def test_return_token_ids(server, world):
    """What was read and sampled, without a tokenizer between: the ids are those of the answer's text."""
    endpoint = Endpoint(f"{server}/v1", "world", api_key=KEY)
    ids = world.tokenizer("the park inn is")["input_ids"]
    request = {"model": "world", "prompt": [ids, ids[:2]], "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    answer = endpoint.send("/completions", request)
    assert [x["prompt_token_ids"] for x in answer["choices"]] == [ids, ids[:2]]
    for choice in answer["choices"]:
        assert len(choice["token_ids"]) == 5
        assert world.tokenizer.decode(choice["token_ids"], skip_special_tokens=True).strip() == choice["text"].strip()
    assert "token_ids" not in endpoint.send("/completions", request | {"return_token_ids": False})["choices"][0]
    with pytest.raises(ValueError, match="whole answers"):
        endpoint.send("/completions", request | {"stream": True})
