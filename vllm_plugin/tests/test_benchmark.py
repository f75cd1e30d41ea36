# SPDX-License-Identifier: Apache-2.0

"""The worker with which the benchmark of serving measures vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_engine import PROMPTS, greedy
from transformers import AutoModelForCausalLM


PLUGIN = Path(__file__).parents[1]
WORKER = PLUGIN.parent / "benchmarks" / "vllm_worker.py"
NUM_NEW = 8


@pytest.mark.parametrize("guided", [False, True])
def test_worker_answers_as_a_plain_loop(folders, guided):
    """On a CPU it runs the older runner, without the stand-in for Triton, and the doctor's default exponent."""
    command = [sys.executable, str(WORKER), "--patient", folders.patient, "--num_new", str(NUM_NEW), "--max_len", "96"]
    command += ["--doctor", folders.helpful] if guided else []
    stand_in = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {name: value for name, value in os.environ.items() if name not in stand_in}
    environment["PYTHONPATH"] = str(PLUGIN)
    result = subprocess.run(
        command, input=json.dumps(PROMPTS) + "\n", capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    messages = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"')]
    assert [list(message) for message in messages] == [["runner"], ["answers"]]
    exponents = {"patient": 0.5, "helpful": 0.5} if guided else {"patient": 1.0}
    models = {name: AutoModelForCausalLM.from_pretrained(getattr(folders, name)).eval() for name in exponents}
    for prompt, answer in zip(PROMPTS, messages[1]["answers"], strict=True):
        assert 0 < len(answer) <= NUM_NEW
        assert answer == greedy(models, prompt, exponents)[: len(answer)]
