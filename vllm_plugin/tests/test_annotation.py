# SPDX-License-Identifier: Apache-2.0

"""
The main package annotates and evaluates by vLLM's server. It runs in an environment of its own, whose Python is
`TRL_TFPO_PYTHON`.

`TRL_TFPO_PATIENT` and `TRL_TFPO_PAIRS`, a model and a file of preferences, take the place of the tiny ones. The first
64 pairs are read, with up to 128 tokens.
"""

import importlib.util
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENGINE
from test_http import wait_for


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here", allow_module_level=True)

PYTHON = os.environ.get("TRL_TFPO_PYTHON")
NUM_PAIRS, NUM_TOKENS = 64, 61  # tokens of the tiny models
FACES = ["--positive_face", "t5 t6", "--negative_face", "t7 t8"]
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not PYTHON, reason="TRL_TFPO_PYTHON names no Python with trl-tfpo")


def serve(root, flags, **environment):
    """Start vLLM's server; returns process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "patient"]
    log = root / f"log-{port}"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment,
        )
    wait_for(f"http://127.0.0.1:{port}/health", server, log)
    return server, f"http://127.0.0.1:{port}/v1"


def end(server):
    server.terminate()
    server.wait(timeout=60)


def trl_tfpo(root, *arguments):
    """Run a command of the main package; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM", "TRITON"))}
    environment |= {"HF_DATASETS_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [PYTHON, "-m", "trl_tfpo", *map(str, arguments)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("annotation")


@pytest.fixture(scope="module")
def inputs(root, folders):
    """Options with preferences and a patient. Some completions begin alike, beyond a block of the cache."""
    given = os.environ.get("TRL_TFPO_PAIRS")
    if given:
        rows = [json.loads(line) for line in Path(given).read_text().splitlines()[:NUM_PAIRS]]
    else:
        draw = random.Random(0)

        def text(length):
            return " ".join(f"t{draw.randrange(3, NUM_TOKENS)}" for _ in range(length))

        starts = [text(draw.choice((1, 30))) for _ in range(NUM_PAIRS)]
        rows = [{"prompt": text(9), **{k: f"{x} {text(9)}" for k in ("chosen", "rejected")}} for x in starts]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    patient = os.environ.get("TRL_TFPO_PATIENT", folders.patient)
    faces = ["--faces", "harmlessness", "--convert_transcripts", "--drop_unusable"] if given else FACES
    options = ["--dataset_name", root / "pairs.jsonl", "--patient", patient, "--dtype", "float32", *faces]
    return [*options, "--max_length", "128"]


@pytest.fixture(scope="module")
def expected(root, inputs):
    """Annotated by transformers."""
    trl_tfpo(root, "annotate", *inputs, "--output", root / "expected.jsonl")
    return read(root / "expected.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def differences(found, expected):
    """Absolute differences of the gaps of all tokens, in nats; the ids are the same."""
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name in ("chosen", "rejected"):
            assert row[f"{name}_ids"] == other[f"{name}_ids"]
            yield from (abs(x - y) for x, y in zip(row[f"{name}_gaps"], other[f"{name}_gaps"], strict=True))


def test_rewards_by_the_server(root, inputs, expected, record_property):
    """Token rewards do not depend on the engine."""
    flags = ["--model", str(inputs[3])]
    for name, value in (ENGINE | {"max_model_len": 192, "max_num_batched_tokens": 192}).items():
        value = 2**28 if name == "kv_cache_memory_bytes" else value
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if "TRL_TFPO_PATIENT" not in os.environ:
        flags[flags.index("--max-model-len") + 1] = "128"
    server, url = serve(root, flags, VLLM_USE_V2_MODEL_RUNNER="0")
    try:
        backend = ["--backend", "openai", "--base_url", url, "--model", "patient"]
        trl_tfpo(root, "annotate", *inputs, *backend, "--output", root / "found.jsonl")
    finally:
        end(server)
    found = list(differences(read(root / "found.jsonl"), expected))
    sys.stdout.write(f"{len(expected)} pairs, {len(found)} tokens, largest difference {max(found):.2e} nats\n")
    record_property("largest difference", max(found))
    assert len(expected) == NUM_PAIRS or "TRL_TFPO_PAIRS" in os.environ
    assert max(found) < 1e-3


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl-tfpo is not in the environment of vLLM")
def test_rewards_by_vllm_in_the_process(root, inputs, expected):
    """With the prefix cache, and without it where completions begin alike."""
    engine = ENGINE | {"max_model_len": 128, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 2**28}
    command = [sys.executable, "-m", "trl_tfpo", "annotate", *inputs, "--backend", "vllm"]
    command += ["--engine_args", json.dumps(engine), "--output", root / "offline.jsonl"]
    environment = {"HF_DATASETS_CACHE": str(root / "cache"), "VLLM_USE_V2_MODEL_RUNNER": "0"}
    result = subprocess.run(
        [*map(str, command)], cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = list(differences(read(root / "offline.jsonl"), expected))
    sys.stdout.write(f"{len(expected)} pairs, {len(found)} tokens, largest difference {max(found):.2e} nats\n")
    assert max(found) < 1e-3


@pytest.fixture(scope="module")
def guided_url(root, folders):
    """A server with two doctors. Their vocabulary has the patient's padding: ids that one lacks are excluded."""
    command = [sys.executable, "-m", "trl_tfpo_vllm", "--patient", folders.patient]
    command += ["--doctor", f"helpful={folders.helpful}", "--doctor", f"harmless={folders.patient}"]
    flags = shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for name, value in ENGINE.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    server, url = serve(root, flags)
    yield url
    end(server)


def test_doctors_at_the_server_are_off_in_annotation(root, folders, guided_url):
    """Rewards must be those of the patient: doctors guide every request that does not switch them off."""
    rows = [{"prompt": "t9 t8 t7", "chosen": f"t6 t{x} t4", "rejected": f"t{x} t3"} for x in range(10, 14)]
    (root / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset_name", root / "few.jsonl", "--patient", folders.patient, "--dtype", "float32", *FACES]
    trl_tfpo(root, "annotate", *options, "--output", root / "few-expected.jsonl")
    backend = ["--backend", "openai", "--base_url", guided_url, "--model", "patient"]
    trl_tfpo(root, "annotate", *options, *backend, "--output", root / "few-found.jsonl")
    assert max(differences(read(root / "few-found.jsonl"), read(root / "few-expected.jsonl"))) < 1e-3


def test_a_report_by_the_server(root, folders, guided_url):
    """Exponents arrive, and greedy completions are those of the library."""
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"t9 t{x}"}) + "\n" for x in range(10, 14)))
    inputs = ["--dataset_name", root / "prompts.jsonl", "--max_new_tokens", "6"]
    models = ["--patient", folders.patient, "--dtype", "float32"]
    fakes = shutil.ignore_patterns("value_head*", "token_credits*")  # of the tests of loading
    helpful = shutil.copytree(folders.helpful, root / "helpful", ignore=fakes)
    for name, betas in (("helpful", [0.8]), ("both", [0.5, -0.3])):
        doctors = [part for doctor in (helpful, folders.patient)[: len(betas)] for part in ("--doctor", doctor)]
        weights = ["--alpha", "1", "--beta", *betas, "--temperature", "0"]
        trl_tfpo(root, "generate", *models, *doctors, *weights, *inputs, "--output", root / f"{name}.jsonl")
    command = ["evaluate", "--base_url", guided_url, "--model", "patient", "--patient", folders.patient, *inputs]
    methods = ["--method", "patient", "helpful=helpful:0.8,alpha:1", "both=helpful:0.5,harmless:-0.3,alpha:1"]
    trl_tfpo(root, *command, *methods, "--output_dir", root / "sampled")
    report = json.loads((root / "sampled" / "report.json").read_text())["methods"]
    assert abs(report["patient"]["measures"]["kl"]["mean"]) < 1e-3 < abs(report["both"]["measures"]["kl"]["mean"])
    texts = ["--world", "praise", "--output", root / "texts.jsonl"]  # rewards of any kind, to get the texts
    trl_tfpo(root, *command, *methods, "--temperature", "0", "--output_dir", root / "greedy", *texts)
    for name in ("helpful", "both"):
        expected = [row["completion"] for row in read(root / f"{name}.jsonl")]
        assert [row["completion"] for row in read(root / "texts.jsonl") if row["method"] == name] == expected


def test_a_doctor_that_the_server_lacks(root, folders, guided_url):
    """vLLM would ignore it, and the report would be one of the patient."""
    with pytest.raises(AssertionError, match="'harmless', 'helpful'.*Got .'other'"):
        command = ["evaluate", "--base_url", guided_url, "--model", "patient", "--patient", folders.patient]
        inputs = ["--dataset_name", root / "prompts.jsonl", "--method", "x=other:1"]
        trl_tfpo(root, *command, *inputs, "--output_dir", root / "none")
